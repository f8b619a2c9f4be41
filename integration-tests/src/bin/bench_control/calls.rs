//! Registrations and joins, on both stores, while there are few devices.

use std::time::Duration;

use muster_integration_tests::{
    Host, Lab, LabError, Process, Result,
    figures::{Figures, median},
    muster::Registrar,
    process::wait_for,
};

use crate::{DOMAIN, LIMITS, callers, cost};

/// Register and Enroll on sqlite, and what the disk does for them.
pub(crate) fn sqlite(lab: &Lab, figures: &mut Figures) -> Result {
    let host = lab.host("sqlite")?;
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", LIMITS)?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let (mut rates, mut per_sync) = (Vec::new(), Vec::new());
    let before = cost(&mut registrar)?;
    let mut total = 0.0;
    for [seconds, count, commits, store_commits, _] in callers(&host, &["register", "0"], &join)? {
        every_one_durable(count, commits)?;
        rates.push(count / seconds);
        per_sync.push(count / store_commits);
        total += count;
    }
    let microseconds = (cost(&mut registrar)? - before) / total * 1e6;
    let rate = median(&mut rates);
    figures.report("durable registrations on sqlite, 64 callers", rate, "calls/s");
    figures.report("registrations per fsync, sqlite", median(&mut per_sync), "calls");
    figures.report("registrar's processor time per registration, sqlite", microseconds, "µs");
    let joins = callers(&host, &["join"], &join)?;
    let mut joins: Vec<f64> = joins.into_iter().map(|[seconds, count]| count / seconds).collect();
    let joins = median(&mut joins);
    figures.compare("full joins on sqlite, 64 callers", joins, "joins/s", "registrations", rate);
    registrar.stop()
}

/// Register on etcd, beside bare puts to the same etcd, in turn.
pub(crate) fn etcd(lab: &Lab, figures: &mut Figures) -> Result {
    const FIGURE: &str = "durable registrations on etcd, 64 callers";
    let host = lab.host("etcd")?;
    let Some(_etcd) = start_etcd(&host, "127.0.0.1")? else {
        figures.missing(FIGURE, "etcd cannot be installed here");
        return Ok(());
    };
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", &on_etcd("127.0.0.1"))?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let (mut rates, mut puts) = (Vec::new(), Vec::new());
    for [seconds, count, commits, _, put_rate] in callers(&host, &["register-and-put", "0"], &join)? {
        every_one_durable(count, commits)?;
        rates.push(count / seconds);
        puts.push(put_rate);
    }
    let puts = median(&mut puts);
    figures.report("puts to bare etcd, 64 clients", puts, "puts/s");
    figures.compare(FIGURE, median(&mut rates), "calls/s", "puts to bare etcd", puts);
    registrar.stop()
}

/// The registrar's configuration for an etcd at `address`.
pub(crate) fn on_etcd(address: &str) -> String {
    format!("{LIMITS}[store]\nkind = \"etcd\"\n[store.etcd]\nendpoints = [\"http://{address}:2379\"]\n")
}

/// An etcd on `host`, at one of its addresses; `None` if none is installed.
pub(crate) fn start_etcd(host: &Host, address: &str) -> Result<Option<Process>> {
    if !host.has("etcd")? {
        return Ok(None);
    }
    let url = format!("http://{address}:2379");
    let mut command = host.command("etcd");
    command.arg("--data-dir").arg(host.directory().join("etcd-data")).args(["--log-level", "error"]);
    command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
    // A million devices are more than etcd takes by default.
    command.args(["--quota-backend-bytes", "8589934592"]);
    let process = host.spawn("etcd", command)?;
    wait_for("etcd", Duration::from_secs(20), || {
        host.sh(&format!("curl -sf {url}/health")).map_err(|e| e.to_string())
    })?;
    Ok(Some(process))
}

/// What has been answered must have been written, each by a transaction of its own.
pub(crate) fn every_one_durable(answered: f64, committed: f64) -> Result {
    if committed >= answered {
        return Ok(());
    }
    Err(LabError::Command {
        command: "counting registrations".into(),
        reason: format!("{answered} were answered, and only {committed} transactions committed"),
    })
}
