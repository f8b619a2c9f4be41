//! What it costs that there are many devices: start, memory, lookups and registrations of a registrar with ten thousand, a
//! hundred thousand, and a million.

use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, Result,
    figures::{Figures, median},
    muster::Registrar,
    population, run_on,
};
use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};

use crate::{
    DOMAIN, LIMITS, MEBI, callers,
    calls::{every_one_durable, on_etcd, start_etcd},
    resident,
};

const POPULATIONS: [(u32, &str); 3] = [(10_000, "10,000"), (100_000, "100,000"), (1_000_000, "1,000,000")];

/// On sqlite, with lookups, which are answered from memory and do not depend on the store.
pub(crate) fn sqlite(lab: &Lab, figures: &mut Figures) -> Result {
    let host = lab.host("many")?;
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", LIMITS)?;
    let (_, empty) = start(&mut registrar)?;
    figures.report("registrar's memory without devices", empty / MEBI, "MiB");
    let mut filled = 0;
    for (devices, words) in POPULATIONS {
        registrar.stop()?;
        registrar.fill(filled..devices)?;
        filled = devices;
        let (seconds, _) = start(&mut registrar)?;
        let figure = |what: &str| format!("{what}, {words} devices");
        figures.report(&figure("from start to serving"), seconds, "s");
        look_up(&host, &registrar, devices, words, figures)?;
        let resident = resident(&mut registrar)?;
        figures.report(&figure("registrar's memory"), resident / MEBI, "MiB");
        let per_device = (resident - empty) / f64::from(devices);
        figures.report(&figure("registrar's memory per device"), per_device, "octets");
        register(
            &host,
            &registrar,
            devices,
            &figure("durable registrations on sqlite, 64 callers"),
            figures,
        )?;
        back_up(&host, &registrar, &figure("backup of sqlite beside a registrar that serves"), figures)?;
    }
    registrar.stop()
}

/// On etcd.
pub(crate) fn etcd(lab: &Lab, figures: &mut Figures) -> Result {
    const FIGURE: &str = "durable registrations on etcd, 64 callers";
    let host = lab.host("many-etcd")?;
    let Some(etcd) = start_etcd(&host, "127.0.0.1")? else {
        figures.missing(FIGURE, "etcd cannot be installed here");
        return Ok(());
    };
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", &on_etcd("127.0.0.1"))?;
    let runtime = host.runtime()?;
    let mut filled = 0;
    for (devices, words) in POPULATIONS {
        run_on(&runtime, async move {
            let store = EtcdStore::open(&EtcdConfig::default())?;
            population::fill_store(store, filled..devices).await
        })?;
        filled = devices;
        let (seconds, _) = start(&mut registrar)?;
        let figure = |what: &str| format!("{what}, {words} devices");
        figures.report(&figure("from start to serving, etcd"), seconds, "s");
        register(&host, &registrar, devices, &figure(FIGURE), figures)?;
        figures.report(&figure("registrar's memory, etcd"), resident(&mut registrar)? / MEBI, "MiB");
        figures.report(&figure("etcd's memory"), etcd.resident()? / MEBI, "MiB");
        back_up(&host, &registrar, &figure("backup of etcd beside a registrar that serves"), figures)?;
        registrar.stop()?;
    }
    Ok(())
}

/// Starts the registrar; returns the seconds until it is ready, and its memory then.
fn start(registrar: &mut Registrar) -> Result<(f64, f64)> {
    let started = Instant::now();
    registrar.serve()?;
    Ok(((Instant::now() - started).as_secs_f64(), resident(registrar)?))
}

/// A whole backup, which is read again before it counts as made.
fn back_up(host: &Host, registrar: &Registrar, figure: &str, figures: &mut Figures) -> Result {
    let file = host.directory().join("backup").display().to_string();
    let started = Instant::now();
    registrar.ask(&["backup", "--output", &file])?;
    figures.report(figure, (Instant::now() - started).as_secs_f64(), "s");
    host.sh(&format!("rm {file}")).map(drop)
}

/// Lookups one after another, and from many callers at once.
fn look_up(host: &Host, registrar: &Registrar, devices: u32, words: &str, figures: &mut Figures) -> Result {
    let join = registrar.new_join_command(&["--reusable"])?;
    for (callers_word, what) in [("1", "one caller"), ("64", "64 callers")] {
        let [mut rates, mut median_times, mut slow_times] = [const { Vec::new() }; 3];
        let arguments = ["lookup", callers_word, &devices.to_string()];
        for [rate, p50, p99] in callers(host, &arguments, &join)? {
            rates.push(rate);
            median_times.push(p50);
            slow_times.push(p99);
        }
        let figure = |q: &str| format!("lookup {q}, {what}, {words} devices");
        figures.report(&figure("rate"), median(&mut rates), "calls/s");
        figures.report(&figure("p50"), median(&mut median_times), "µs");
        figures.report(&figure("p99"), median(&mut slow_times), "µs");
    }
    Ok(())
}

/// Registrations of devices that come to those that there are.
fn register(host: &Host, registrar: &Registrar, devices: u32, figure: &str, figures: &mut Figures) -> Result {
    let join = registrar.new_join_command(&["--reusable"])?;
    let mut rates = Vec::new();
    for [seconds, count, commits, ..] in callers::<5>(host, &["register", &devices.to_string()], &join)? {
        every_one_durable(count, commits)?;
        rates.push(count / seconds);
    }
    figures.report(figure, median(&mut rates), "calls/s");
    Ok(())
}
