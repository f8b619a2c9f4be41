//! Hosts that little is let out of: no UDP, TCP to port 443 alone, or nothing but to a proxy. Frames go over TCP then.

use std::{fs, time::Duration};

use muster_integration_tests::{
    Lab, LabError, Process, Result, Switch, expect,
    muster::{Agent, Director, JoinCommand, Registrar},
    nat::{Kind, Site},
    process::wait_for,
    scenario,
};

const PATIENCE: Duration = Duration::from_secs(40);

const REGISTRAR: &str = "198.51.100.200";
/// Where its DNS over TLS is, as both cannot have port 443 of one address.
const DNS: &str = "198.51.100.201";
const DIRECTOR: &str = "198.51.100.202";
const PROXY: &str = "198.51.100.203";
const PASSWORD: &str = "kept-to-itself";

/// A registrar that is reached on port 443 alone, and a director on its own port and on 443.
struct Internet {
    switch: Switch,
    director: Director,
    _registrar: Registrar,
    join: JoinCommand,
}

impl Internet {
    fn new(lab: &Lab) -> Result<Self> {
        let switch = lab.switch("internet")?;
        let (hq, relay) = (lab.host("hq")?, lab.host("relay-1")?);
        switch.plug(&hq, &[&format!("{REGISTRAR}/24"), &format!("{DNS}/24")])?;
        switch.plug(&relay, &[&format!("{DIRECTOR}/24")])?;
        relay.route(&format!("default via {REGISTRAR}"))?;
        let listen = format!("[listen]\ngrpc = \"{REGISTRAR}:443\"\ndot = \"{DNS}:443\"\n");
        let mut registrar = Registrar::init(&hq, "net.example", REGISTRAR, &listen)?;
        for path in [registrar.config(), registrar.credential()] {
            let file = |source| LabError::File { path: path.display().to_string(), source };
            let text = fs::read_to_string(&path).map_err(file)?;
            let text = text.replace(&format!("{REGISTRAR}:7500"), &format!("{REGISTRAR}:443"));
            fs::write(&path, text.replace(&format!("{REGISTRAR}:853"), &format!("{DNS}:443")))
                .map_err(file)?;
        }
        registrar.serve()?;
        let listen = format!("[listen]\ntcp = [\"[::]:{}\", \"[::]:443\"]\n", Director::PORT);
        let director = Director::serve(&relay, &registrar, &listen)?;
        let join = registrar.new_join_command(&["--reusable"])?;
        Ok(Self { switch, director, _registrar: registrar, join })
    }

    /// A site whose router forwards nothing new but what `accepted` says.
    fn site(&self, lab: &Lab, name: &str, number: u8, accepted: &str) -> Result<Site> {
        let site = Site::new(lab, &self.switch, name, Kind::PortRestricted, number)?;
        for router in &site.routers {
            router.host().sh(&format!(
                "nft -f - <<'RULES'\ntable inet strict {{ chain forward {{ \
                 type filter hook forward priority filter; policy drop; \
                 ct state established,related accept; {accepted} accept; }}; }}\nRULES"
            ))?;
        }
        Ok(site)
    }

    /// Both devices reach each other through the director, over TCP.
    fn both_talk(&self, alice: &Agent, bob: &Agent) -> Result {
        wait_for("a ping from alice to bob", PATIENCE, || {
            let ping = "ping -c 1 -W 1 $(dig +short bob.net.example)";
            alice.host().sh(ping).map(drop).map_err(|e| format!("{e}\n{:?}", alice.ask(&["status"])))
        })?;
        for (agent, peer) in [(alice, "bob"), (bob, "alice")] {
            let status = agent.ask(&["status", "-o", "json"])?;
            expect(status.contains("\"transport\": \"tcp\""), "transport tcp", &status)?;
            let path = agent.path_to(peer)?;
            let expected = ("relay".to_owned(), "relay-1".to_owned());
            expect(path == expected, "the path is through the director", &format!("{path:?}"))?;
        }
        // More than fits one message, and both ways.
        alice.host().sh("ping -c 100 -i 0.005 -s 1300 -W 5 $(dig +short bob.net.example)")?;
        bob.host().sh("ping -c 20 -i 0.005 -W 5 $(dig +short alice.net.example)")?;
        expect(self.director.metric("streams ")? >= 2, "two streams", &self.director.metrics()?)
    }
}

fn joined(site: &Site, join: &JoinCommand, environment: &[(&str, &str)]) -> Result<Agent> {
    let mut agent = Agent::new(&site.host, "")?;
    for (name, value) in environment {
        agent.set_environment(name, value);
    }
    agent.join(join, site.host.name())?;
    agent.run()?;
    Ok(agent)
}

/// A proxy that lets users with a password through, to port 443.
fn proxy(lab: &Lab, switch: &Switch) -> Result<Process> {
    let host = lab.host("proxy")?;
    switch.plug(&host, &[&format!("{PROXY}/24")])?;
    let config = host.directory().join("tinyproxy.conf");
    let lines = format!(
        "Port 3128\nListen {PROXY}\nTimeout 600\nMaxClients 100\nLogLevel Connect\nAllow 198.51.100.0/24\n\
         BasicAuth muster {PASSWORD}\nConnectPort 443\n"
    );
    fs::create_dir_all(host.directory())
        .and_then(|()| fs::write(&config, lines))
        .map_err(|source| LabError::File { path: config.display().to_string(), source })?;
    let mut command = host.command("tinyproxy");
    command.arg("-d").arg("-c").arg(&config);
    let process = host.spawn("tinyproxy", command)?;
    wait_for("the proxy to listen", PATIENCE, || {
        host.sh("ss -ltn | grep -q :3128").map_err(|_| process.log())
    })?;
    Ok(process)
}

#[test]
fn where_udp_is_blocked_frames_go_over_tcp() {
    scenario("UDP blocked", |lab| {
        let internet = Internet::new(lab)?;
        let sites = [("alice", 1), ("bob", 2)]
            .map(|(name, number)| internet.site(lab, name, number, "meta l4proto tcp"));
        let [alice, bob] = sites;
        let (alice, bob) = (joined(&alice?, &internet.join, &[])?, joined(&bob?, &internet.join, &[])?);
        internet.both_talk(&alice, &bob)
    });
}

#[test]
fn where_only_port_443_is_open_that_is_taken() {
    scenario("port 443 alone", |lab| {
        let internet = Internet::new(lab)?;
        let [alice, bob] = [("alice", 1), ("bob", 2)]
            .map(|(name, number)| internet.site(lab, name, number, "tcp dport 443"));
        let alice = joined(&alice?, &internet.join, &[])?;
        let bob = joined(&bob?, &internet.join, &[])?;
        let blocked = format!("timeout 1 bash -c '</dev/tcp/{DIRECTOR}/{}'", Director::PORT);
        let blocked = alice.host().try_sh(&blocked)?;
        expect(!blocked.status.success(), "the director's own port is blocked", &blocked.stderr)?;
        internet.both_talk(&alice, &bob)
    });
}

#[test]
fn where_only_a_proxy_is_reached_it_is_used() {
    scenario("nothing but a proxy", |lab| {
        let internet = Internet::new(lab)?;
        let proxy = proxy(lab, &internet.switch)?;
        let only = format!("ip daddr {PROXY} tcp dport 3128");
        let [alice, bob] =
            [("alice", 1), ("bob", 2)].map(|(name, number)| internet.site(lab, name, number, &only));
        let (alice, bob) = (alice?, bob?);

        // Wrong in one way or another: each is explained, and uses no token up.
        let with_password = format!("http://muster:{PASSWORD}@{PROXY}:3128");
        for (url, parts) in [
            (format!("http://{PROXY}:3128"), ["407", "put user and password"]),
            (format!("http://muster:{PASSWORD}1@{PROXY}:3128"), ["HTTPS_PROXY", "user and password"]),
            (format!("socks5://{PROXY}:3128"), ["names no proxy that can be used", "http://HOST:PORT"]),
        ] {
            let mut agent = Agent::new(&alice.host, "")?;
            agent.set_environment("HTTPS_PROXY", &url);
            let output = agent.try_join(&internet.join, "alice")?;
            let told = !output.status.success() && parts.iter().all(|part| output.stderr.contains(part));
            expect(told && !output.stderr.contains(PASSWORD), parts[1], &output.stderr)?;
        }
        let mut agent = Agent::new(&alice.host, "")?;
        agent.set_environment("HTTPS_PROXY", &with_password);
        let output = agent.try_join(&internet.join.with("registrar", "198.51.100.200:7500"), "alice")?;
        let told = output.stderr.contains("403") && output.stderr.contains("such as 443");
        expect(told, "a port that the proxy does not connect to", &output.stderr)?;

        let alice =
            joined(&alice, &internet.join, &[("https_proxy", &with_password), ("no_proxy", "x.example")])?;
        let bob = joined(&bob, &internet.join, &[("HTTPS_PROXY", &with_password)])?;
        internet.both_talk(&alice, &bob)?;
        for (name, address) in [("registrar", REGISTRAR), ("DNS", DNS), ("director", DIRECTOR)] {
            expect(proxy.log().contains(&format!("CONNECT {address}:443")), name, &proxy.log())?;
        }
        for mut agent in [alice, bob] {
            let log = agent.process().map(|process| process.log()).unwrap_or_default();
            expect(!log.contains(PASSWORD), "the password is not logged", &log)?;
            agent.stop()?;
        }
        Ok(())
    });
}
