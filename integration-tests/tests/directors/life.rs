//! A director's life beside a registrar: joined once, restarted, killed, drained, revoked, and with no registrar there.

use std::time::Duration;

use muster_integration_tests::{
    Host, Lab, Result, expect,
    muster::{Agent, Director, Registrar},
    process::wait_for,
    scenario,
};

const PATIENCE: Duration = Duration::from_secs(30);

fn hosts(lab: &Lab) -> Result<(Registrar, Host)> {
    let lan = lab.switch("lan")?;
    let (hq, relay) = (lab.host("hq")?, lab.host("relay-1")?);
    lan.plug(&hq, &["10.1.0.1/24"])?;
    lan.plug(&relay, &["10.1.0.2/24"])?;
    relay.route("default via 10.1.0.1")?;
    let mut registrar = Registrar::init(&hq, "net.example", "10.1.0.1", "")?;
    registrar.serve()?;
    Ok((registrar, relay))
}

/// Waits until the registrar shows the director like this.
fn wait_shown(registrar: &Registrar, text: &str) -> Result {
    wait_for(&format!("a director that is {text}"), PATIENCE, || {
        let shown = registrar.muster(&["get", "directors"]).map_err(|e| e.to_string())?;
        if shown.contains(text) { Ok(()) } else { Err(shown) }
    })
}

#[test]
fn a_director_comes_back_and_goes_in_good_order() {
    scenario("a director's life", |lab| {
        let (mut registrar, relay) = hosts(lab)?;
        let mut director = Director::serve(&relay, &registrar, "region = \"here\"\ndrain = 20")?;
        wait_shown(&registrar, "Ready")?;
        let shown = registrar.muster(&["get", "directors"])?;
        expect(shown.contains("10.1.0.2:7501") && shown.contains("here"), "address and region", &shown)?;

        director.kill();
        wait_shown(&registrar, "Offline")?;
        director.run()?;
        wait_shown(&registrar, "Ready")?;

        // It relays on without a registrar, also if it starts while none is there.
        registrar.kill();
        wait_for("the director to notice", PATIENCE, || match director.metric("registrar_connected") {
            Ok(0) => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        director.wait_ready()?;
        director.stop()?;
        director.run()?;
        registrar.serve()?;
        wait_shown(&registrar, "Ready")?;

        // Nobody is attached, so nobody is waited for.
        let begin = relay.sh("cut -d' ' -f1 /proc/uptime")?;
        director.stop()?;
        let end = relay.sh("cut -d' ' -f1 /proc/uptime")?;
        let seconds = |text: &str| text.trim().parse::<f64>().unwrap_or(f64::NAN);
        expect(seconds(&end) - seconds(&begin) < 10.0, "a quick end", &format!("{begin} {end}"))?;
        // Devices are not sent to it until it is back.
        wait_shown(&registrar, "Draining")?;
        director.run()?;
        wait_shown(&registrar, "Ready")
    });
}

#[test]
fn a_director_that_is_revoked_is_told_so() {
    scenario("revoked director", |lab| {
        let (registrar, relay) = hosts(lab)?;
        let mut director = Director::serve(&relay, &registrar, "")?;
        wait_shown(&registrar, "Ready")?;
        registrar.muster(&["revoke", "director", "relay-1"])?;
        wait_shown(&registrar, "Revoked")?;
        wait_for("the director to be told", PATIENCE, || {
            let log = director.process().map(|process| process.log()).unwrap_or_default();
            if log.contains("this director has been revoked") { Ok(()) } else { Err(log) }
        })?;
        expect(director.metric("registrar_connected")? == 0, "no session", "there is one")?;
        registrar.muster(&["delete", "director", "relay-1"])?;
        director.stop()
    });
}

#[test]
fn tokens_are_for_one_kind_of_party_and_joins_for_one_director() {
    scenario("joining directors", |lab| {
        let (registrar, relay) = hosts(lab)?;
        let director = Director::new(&relay, "")?;
        let fails = |output: muster_integration_tests::Output, part: &str| {
            let (status, text) = (output.status, output.stderr);
            expect(!status.success() && text.contains(part), part, &format!("{status}: {text}"))
        };
        let join = registrar.new_join_command(&["--director"])?;
        let elsewhere = join.with("registrar", "10.1.0.2:1");
        fails(director.try_join(&elsewhere, "relay-1")?, "refused")?;
        let pin = format!("sha256:{}", "0".repeat(64));
        fails(director.try_join(&join.with("ca-hash", &pin), "relay-1")?, "CA hash does not match")?;
        fails(director.try_join(&join, "-bad-")?, "not a valid name")?;
        // What could not be sent has used nothing up.
        director.join(&join, "relay-1")?;
        fails(director.try_join(&join, "relay-1")?, "has already joined")?;

        // The token was for one, and the name is taken.
        let second = Director::new(&lab.host("unplugged")?, "")?;
        fails(second.try_join(&join, "relay-2")?, "cannot connect")?;
        std::fs::remove_dir_all(relay.directory().join("director/state")).ok();
        fails(director.try_join(&join, "relay-2")?, "used already")?;
        let again = registrar.new_join_command(&["--director"])?;
        fails(director.try_join(&again, "relay-1")?, "exists already")?;

        // A token for devices makes no director, and one for directors no device.
        let for_devices = registrar.new_join_command(&[])?;
        fails(director.try_join(&for_devices, "relay-3")?, "--director")?;
        let devices = registrar.muster(&["get", "devices"])?;
        expect(!devices.contains("relay-3"), "no device has been made", &devices)?;
        let agent = Agent::new(&relay, "")?;
        let for_directors = registrar.new_join_command(&["--director"])?;
        fails(agent.try_join(&for_directors, "web")?, "lets a director join")?;
        // Neither has been used up.
        agent.join(&for_devices, "web")?;
        director.join(&for_directors, "relay-2").map(drop)
    });
}
