//! Directors that are not to be trusted, and devices that are not: agents do not use the former, and what the latter say
//! of their addresses hurts themselves alone.

use std::{fs, time::Duration};

use muster_integration_tests::{
    Host, Result, expect, failed,
    muster::{Director, Registrar},
    nat::Kind,
    process::wait_for,
    scenario,
};

use crate::{
    heal::two_hosts,
    site::{DOMAIN, Internet},
    traffic::{Pings, reaches},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// What alice has to say of the director called `name`; empty if she does not know it.
fn last_error(status: &str, name: &str) -> String {
    let status: serde_json::Value = serde_json::from_str(status).unwrap_or_default();
    let directors = status.get("directors").and_then(serde_json::Value::as_array);
    let found =
        directors.into_iter().flatten().find(|director| director.get("name").is_some_and(|n| n == name));
    let text = found.and_then(|director| director.get("lastError")?.as_str());
    text.unwrap_or_default().to_owned()
}

#[test]
fn directors_that_are_not_trusted_are_not_used() {
    scenario("untrusted directors", |lab| {
        let (internet, alice, _bob, mut revoked, mut good) = two_hosts(lab)?;
        let (revoked_name, good_name) = (revoked.host().name().to_owned(), good.host().name().to_owned());
        // It goes on running, and would take whoever comes.
        internet.registrar.muster(&["revoke", "director", &revoked_name])?;
        wait_for("devices to leave the revoked director", PATIENCE, || match revoked.metric("attached ") {
            Ok(0) => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        good.wait_attached(2)?;
        reaches(&alice.site.host, "bob")?;
        wait_for("the other director to be used", PATIENCE, || {
            let path = alice.agent.path_to("bob").map_err(|e| e.to_string())?;
            if path == ("relay".to_owned(), good_name.clone()) { Ok(()) } else { Err(format!("{path:?}")) }
        })?;

        // In place of the good one there is one with the revoked one's certificate, and then one of a deployment that
        // is called alike.
        good.kill();
        revoked.kill();
        let state = |director: &Director| director.host().directory().join("director/state");
        let own = good.host().directory().join("own-state");
        let rename = |from: &std::path::Path, to: &std::path::Path| {
            fs::rename(from, to).map_err(|error| failed("moving the state", &error))
        };
        rename(&state(&good), &own)?;
        rename(&state(&revoked), &state(&good))?;
        let is_refused = |impostor: &Director, why: &str| -> Result {
            wait_for("the impostor to be refused", PATIENCE, || {
                let status = alice.agent.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
                let error = last_error(&status, &good_name);
                if error.contains(why) { Ok(()) } else { Err(status) }
            })?;
            expect(impostor.metric("attached ")? == 0, "nobody attaches to an impostor", "somebody does")
        };
        good.run()?;
        is_refused(&good, "not a party that this connection may be with")?;
        good.kill();

        let elsewhere = internet.stranger("elsewhere", 160)?;
        let mut foreign = Registrar::init(&elsewhere, DOMAIN, "198.51.100.160", "")?;
        foreign.serve()?;
        rename(&state(&good), &state(&revoked))?;
        let mut impostor = Director::serve(good.host(), &foreign, "")?;
        is_refused(&impostor, "not from a CA that we trust")?;
        impostor.kill();

        fs::remove_dir_all(state(&good)).map_err(|error| failed("removing the impostor", &error))?;
        rename(&own, &state(&good))?;
        good.run()?;
        good.wait_attached(2)?;
        reaches(&alice.site.host, "bob")
    });
}

/// UDP datagrams and their octets, with IP and UDP headers, that have come to a host.
fn counted(host: &Host) -> Result<(u64, u64)> {
    let text = host.sh("nft list chain inet count in | grep -o 'packets [0-9]* bytes [0-9]*'")?;
    let mut numbers = text.split_whitespace().filter_map(|word| word.parse().ok());
    Ok((numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)))
}

#[test]
#[expect(clippy::print_stderr, reason = "what the victim gets is a figure worth to be seen")]
fn an_agent_that_lies_about_its_addresses_hurts_itself_alone() {
    scenario("false addresses", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let victim = internet.stranger("victim", 150)?;
        victim.sh(
            "nft add table inet count; nft add chain inet count in '{ type filter hook input priority 0; }'; \
             nft add rule inet count in meta l4proto udp counter",
        )?;
        let alice = internet.host("alice", Kind::Open)?;
        let carol = internet.host("carol", Kind::Symmetric)?;
        // Liar says that it is also where the victim is: at four addresses of it.
        let liar = internet.host("liar", Kind::PortRestricted)?;
        let island = lab.switch("island")?;
        island.plug(&liar.site.host, &["198.51.100.150/32", "2001:db8::150/128"])?;
        let director = internet.directors.remove(0);
        director.wait_attached(3)?;
        wait_for("the registrar to be lied to", PATIENCE, || {
            let shown =
                internet.registrar.muster(&["get", "devices", "-o", "json"]).map_err(|e| e.to_string())?;
            if shown.contains("198.51.100.150") { Ok(()) } else { Err(shown) }
        })?;
        reaches(&alice.site.host, "carol")?;
        let others = Pings::start(&alice.site.host, "carol")?;
        for from in [&alice, &carol] {
            reaches(&from.site.host, "liar")?;
            let pings = Pings::start(&from.site.host, "liar")?;
            pings.more(400)?;
            let pinged = pings.end()?;
            expect(pinged.lost * 20 < pinged.sent, "even it is reached", &format!("{pinged:?}"))?;
        }
        let got = counted(&victim)?;
        eprintln!("of 800 pings and their sessions, the victim got {got:?} datagrams and octets");
        // Probes to two addresses, from two hosts, now and then.
        expect(got.0 > 0, "the lie is believed as far as a probe", "it is not")?;
        expect(got.0 < 60 && got.1 < 15_000, "the victim gets a trickle", &format!("{got:?}"))?;
        let pinged = others.end()?;
        expect(pinged.lost == 0, "others lose nothing", &format!("{pinged:?}"))?;
        let path = alice.agent.path_to("liar")?.0;
        expect(path != "none", "there is a path", &path)
    });
}
