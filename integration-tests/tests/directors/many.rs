//! A thousand devices on one director, of which a tenth restarts each second.

use std::time::Duration;

use muster_common::time::Instant;
use muster_integration_tests::{
    Result, attachments::Crowd, expect, failed, muster::Director, nat::Kind, population::device_uid,
    process::wait_for, run_on, scenario,
};

use crate::{
    bad::director_address,
    site::Internet,
    traffic::{Pings, reaches},
};

const DEVICES: u32 = 1_000;
/// How many crash and come back in one go.
const TENTH: usize = 100;
/// Memory that a thousand devices and their ten restarts may cost, with their connections.
const MEMORY: f64 = 256e6;

fn memory(director: &mut Director) -> Result<f64> {
    director.process().map_or(Ok(0.0), |process| process.resident())
}

#[test]
#[expect(clippy::print_stderr, reason = "memory is a figure worth to be seen")]
fn a_thousand_devices_of_which_a_tenth_restarts_each_second() {
    scenario("a thousand devices", |lab| {
        let mut internet = Internet::prepared(lab, 1, |registrar| registrar.fill(0..DEVICES))?;
        let (alice, _bob) =
            (internet.host("alice", Kind::Symmetric)?, internet.host("bob", Kind::Symmetric)?);
        let mut director = internet.directors.remove(0);
        director.wait_attached(2)?;
        reaches(&alice.site.host, "bob")?;
        let pings = Pings::start(&alice.site.host, "bob")?;

        let crowd = internet.stranger("crowd", 150)?;
        let issuer = internet.issuer()?;
        let credentials: Vec<_> = (0..DEVICES)
            .map(|number| issuer.device(device_uid(number)))
            .collect::<Result<_, _>>()
            .map_err(|error| failed("a certificate", &error))?;
        let runtime = crowd.runtime()?;
        let begin = memory(&mut director)?;
        let all = credentials.len();
        let mut crowd = run_on(&runtime, async move {
            let mut crowd = Crowd::new(credentials, director_address()).await?;
            crowd.attach(0..all).await?;
            Ok(crowd)
        })?;
        director.wait_attached(u64::from(DEVICES) + 2)?;
        let attached = memory(&mut director)?;

        let mut seconds = Vec::new();
        for start in (0..all).step_by(TENTH) {
            let started = Instant::now();
            crowd = run_on(&runtime, async move {
                let which = start..start + TENTH;
                crowd.crash(which.clone());
                crowd.attach(which).await?;
                tokio::time::sleep(Duration::from_secs(1).saturating_sub(Instant::now() - started)).await;
                Ok(crowd)
            })?;
            seconds.push((Instant::now() - started).as_secs_f64());
        }
        let _crowd = run_on(&runtime, async move { crowd.greet(0..all).await.map(|()| crowd) })?;
        director.wait_attached(u64::from(DEVICES) + 2)?;
        // What those who crashed have left is given up soon.
        wait_for("old sessions to end", Duration::from_secs(60), || match director.metric("sessions ") {
            Ok(sessions) if sessions == u64::from(DEVICES) + 2 => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        let end = memory(&mut director)?;
        let pinged = pings.end()?;
        let seen = format!(
            "resident {:.0} MB, {:.0} MB with all, {:.0} MB at the end; each tenth within {seconds:.1?} s; {pinged:?}",
            begin / 1e6,
            attached / 1e6,
            end / 1e6
        );
        eprintln!("{seen}");
        expect(attached - begin < MEMORY, "memory is bounded", &seen)?;
        expect(end - attached < MEMORY / 4.0, "restarts cost no memory", &seen)?;
        expect(director.metric("drops_total{reason=\"full\"}")? == 0, "no frame found a queue full", &seen)?;
        // The machine is busy, and a socket's buffer may run over; the director drops nothing.
        expect(pinged.lost * 100 <= pinged.sent, "others are hardly affected", &seen)
    });
}
