//! A network from end to end: join, register, hold a virtual address, resolve a peer by name, reach it.

use std::time::Duration;

use muster_integration_tests::{
    Host, Lab, Result, expect,
    muster::{Agent, JoinCommand, Registrar},
    process::wait_for,
    router::Router,
    scenario,
};

const DOMAIN: &str = "net.example";
const PATIENCE: Duration = Duration::from_secs(20);

/// A registrar and two devices, each on a network of its own, joined by a router.
struct Site {
    registrar: Registrar,
    alice: Agent,
    bob: Agent,
    router: Router,
    registrar_host: Host,
}

fn site(lab: &Lab) -> Result<Site> {
    let (core, lan_a, lan_b) = (lab.switch("core")?, lab.switch("lan-a")?, lab.switch("lan-b")?);
    let gateway = lab.host("gateway")?;
    let (hq, alice, bob) = (lab.host("hq")?, lab.host("alice")?, lab.host("bob")?);
    core.plug(&gateway, &["198.51.100.1/24"])?;
    lan_a.plug(&gateway, &["192.168.1.1/24"])?;
    lan_b.plug(&gateway, &["192.168.2.1/24"])?;
    let router = Router::new(gateway)?;
    core.plug(&hq, &["198.51.100.10/24"])?;
    hq.route("default via 198.51.100.1")?;
    lan_a.plug(&alice, &["192.168.1.10/24"])?;
    alice.route("default via 192.168.1.1")?;
    lan_b.plug(&bob, &["192.168.2.20/24"])?;
    bob.route("default via 192.168.2.1")?;
    let mut registrar = Registrar::init(&hq, DOMAIN, "198.51.100.10", "")?;
    registrar.serve()?;
    Ok(Site {
        registrar,
        alice: Agent::new(&alice, "")?,
        bob: Agent::new(&bob, "")?,
        router,
        registrar_host: hq,
    })
}

/// As [`site`], with both devices joined, running and ready.
fn network(lab: &Lab) -> Result<Site> {
    let mut site = site(lab)?;
    let join = site.registrar.new_join_command(&["--reusable"])?;
    site.alice.join(&join, "alice")?;
    site.bob.join(&join, "bob")?;
    site.alice.run()?;
    site.bob.run()?;
    Ok(site)
}

fn ping(from: &Host, target: &str) -> Result {
    from.sh(&format!("ping -c 2 -i 0.2 -W 3 {target}")).map(drop)
}

#[test]
fn devices_reach_each_other_by_name() {
    scenario("first network", |lab| {
        let site = network(lab)?;
        let (alice, bob) = (site.alice.host(), site.bob.host());
        ping(alice, "bob.net.example")?;
        ping(bob, "alice.net.example")?;
        let six = alice.sh("dig +short AAAA bob.net.example")?;
        ping(alice, six.trim())?;
        let status = site.alice.ask(&["status", "-o", "json"])?;
        expect(status.contains("\"bob\"") && status.contains("direct"), "status names bob", &status)?;
        let pinged = site.alice.ask(&["ping", "bob", "-c", "2"])?;
        expect(pinged.contains("direct"), "ping shows the path", &pinged)
    });
}

#[test]
fn one_answer_tells_three_addresses() {
    scenario("three addresses", |lab| {
        let site = network(lab)?;
        let answer = site.alice.host().sh("dig +noall +answer +additional bob.net.example")?;
        for part in
            ["bob.net.example.", "private.bob.net.example.", "192.168.2.20", "director.bob.net.example."]
        {
            expect(answer.contains(part), part, &answer)?;
        }
        let resolved = site.alice.ask(&["resolve", "bob", "-o", "json"])?;
        expect(resolved.contains("192.168.2.20"), "resolve tells the private address", &resolved)?;
        let address = site.alice.host().sh("dig +short bob.net.example")?;
        let name = site.alice.host().sh(&format!("dig +short -x {}", address.trim()))?;
        expect(name.trim() == "bob.net.example.", "PTR", &name)?;
        // A stranger sees the apex, and nothing else.
        let hq = &site.registrar_host;
        let apex = hq.sh("dig +short @198.51.100.10 net.example")?;
        expect(apex.trim() == "198.51.100.10", "apex", &apex)?;
        let refused = hq.sh("dig @198.51.100.10 bob.net.example")?;
        expect(refused.contains("REFUSED"), "strangers are refused", &refused)
    });
}

#[test]
fn traffic_and_names_outlive_the_registrar() {
    scenario("nobody home", |lab| {
        let mut site = network(lab)?;
        ping(site.alice.host(), "bob.net.example")?;
        ping(site.bob.host(), "alice.net.example")?;
        site.registrar.kill();
        ping(site.alice.host(), "bob.net.example")?;
        // Both come up again from disk, know each other, and go on.
        for agent in [&mut site.alice, &mut site.bob] {
            agent.kill();
            agent.run()?;
        }
        wait_for("alice to reach bob again", PATIENCE, || {
            ping(site.alice.host(), "bob.net.example").map_err(|e| e.to_string())
        })?;
        // And reconcile when it is back.
        site.registrar.serve()?;
        wait_for("alice to be connected", PATIENCE, || {
            let status = site.alice.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
            if status.replace(' ', "").contains("\"connected\":true") { Ok(()) } else { Err(status) }
        })
    });
}

#[test]
fn an_agent_keeps_its_address_and_sweeps_after_a_crash() {
    scenario("crash", |lab| {
        let mut site = network(lab)?;
        let before = site.alice.host().sh("ip -o addr show dev muster0")?;
        site.alice.kill();
        site.alice.run()?;
        let after = site.alice.host().sh("ip -o addr show dev muster0")?;
        let addresses = |text: &str| -> Vec<String> {
            text.split_whitespace().filter(|w| w.contains('/')).map(str::to_owned).collect()
        };
        expect(addresses(&before) == addresses(&after), "the same addresses", &format!("{before}\n{after}"))?;
        ping(site.alice.host(), "bob.net.example")?;
        site.alice.stop()?;
        let left = site.alice.host().try_sh("ip -o link show dev muster0")?;
        expect(!left.status.success(), "the interface is gone", &left.stdout)?;
        let routes = site.alice.host().sh("ip route; ip -6 route")?;
        expect(!routes.contains("100.64"), "no route is left", &routes)
    });
}

#[test]
fn revoked_and_deleted_devices_are_cut_off() {
    scenario("revocation", |lab| {
        let mut site = network(lab)?;
        ping(site.alice.host(), "bob.net.example")?;
        site.registrar.muster(&["revoke", "device", "bob"])?;
        wait_for("alice to have forgotten bob", PATIENCE, || {
            let status = site.alice.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
            if status.contains("\"bob\"") { Err(status) } else { Ok(()) }
        })?;
        let answer = site.alice.try_ask(&["resolve", "bob"])?;
        expect(!answer.status.success(), "bob does not exist for alice", &answer.stdout)?;
        expect(
            site.bob.process().is_some_and(muster_integration_tests::Process::is_running),
            "bob's agent runs on",
            "",
        )
    });
}

#[test]
fn leaving_gives_everything_back() {
    scenario("leave", |lab| {
        let mut site = network(lab)?;
        site.bob.ask(&["leave"])?;
        let devices = site.registrar.muster(&["get", "devices", "-o", "name"])?;
        expect(!devices.contains("bob") && devices.contains("alice"), "bob is gone", &devices)?;
        let left = site.bob.host().try_sh("ip -o link show dev muster0")?;
        expect(!left.status.success(), "the interface is gone", &left.stdout)?;
        // The name is free again.
        let process = site.bob.process().map(|p| p.wait(PATIENCE));
        expect(matches!(process, Some(Ok(status)) if status.success()), "the agent has ended", "")?;
        site.bob.join(&site.registrar.new_join_command(&[])?, "bob")?;
        site.bob.run()?;
        ping(site.alice.host(), "bob.net.example")
    });
}

#[test]
fn cut_networks_heal() {
    scenario("cut", |lab| {
        let site = network(lab)?;
        ping(site.alice.host(), "bob.net.example")?;
        site.router.cut(true)?;
        let lost = site.alice.host().try_sh("ping -c 1 -W 1 bob.net.example")?;
        expect(!lost.status.success(), "the cable is cut", &lost.stdout)?;
        site.router.cut(false)?;
        wait_for("alice to reach bob again", PATIENCE, || {
            ping(site.alice.host(), "bob.net.example").map_err(|e| e.to_string())
        })
    });
}

/// Runs a join that must fail, and checks exit code, message, and that nothing was left behind.
fn refused(site: &Site, join: &JoinCommand, name: &str, message: &[&str]) -> Result {
    let output = site.alice.try_join(join, name)?;
    expect(output.status.code() == Some(1), "exit code 1", &format!("{output:?}"))?;
    for part in message {
        expect(output.stderr.to_lowercase().contains(part), part, &output.stderr)?;
    }
    let devices = site.registrar.muster(&["get", "devices", "-o", "name"])?;
    expect(!devices.contains("alice"), "no device was made", &devices)
}

#[test]
fn bad_joins_are_refused_with_cause_and_remedy() {
    scenario("bad joins", |lab| {
        let site = site(lab)?;
        let good = site.registrar.join_command()?;
        let wrong_hash = good.with("ca-hash", &format!("sha256:{}", "0".repeat(64)));
        refused(&site, &wrong_hash, "alice", &["ca hash does not match"])?;
        refused(
            &site,
            &good.with("registrar", "198.51.100.10:7501"),
            "alice",
            &["198.51.100.10:7501", "refused"],
        )?;
        refused(&site, &good.with("token", "muster.aaaaaaaaaa.bbbb"), "alice", &["token", "create token"])?;
        for name in ["svc", "director", "bad-", "a.b"] {
            refused(&site, &good, name, &["name"])?;
        }
        let revoked = site.registrar.new_join_command(&[])?;
        let token = revoked.option("token").and_then(|t| t.split('.').nth(1)).unwrap_or_default().to_owned();
        site.registrar.muster(&["revoke", "token", &token])?;
        refused(&site, &revoked, "alice", &["revoked"])?;
        // The token from init still works, once.
        site.bob.join(&good, "bob")?;
        refused(&site, &good, "alice", &["used"])?;
        let another = site.registrar.new_join_command(&["--reusable"])?;
        refused(&site, &another, "bob", &["bob", "exists already"])?;
        site.alice.join(&another, "alice")?;
        let twice = site.alice.try_join(&another, "alice2")?;
        expect(
            twice.status.code() == Some(1) && twice.stderr.contains("joined"),
            "joined already",
            &twice.stderr,
        )
    });
}
