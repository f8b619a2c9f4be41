//! `kill -9` at any time: while clients write, at the start, and during an orderly end. `MUSTER_KILLS=n` kills that many
//! times, `MUSTER_KILLS_SEED=n` repeats a run's choices.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use muster_common::time::Instant;

use muster_integration_tests::{
    Lab, Process, Result, expect, failed, muster::Registrar, process::wait_for, run_on, scenario,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{runtime::Runtime, task::JoinHandle};

use crate::{
    clients::{Client, Site, list},
    ledger,
};

/// How often it is killed unless `MUSTER_KILLS` says otherwise.
const KILLS: u64 = 15;
/// Clients, and devices of each.
const CLIENTS: u64 = 6;
const DEVICES: u64 = 12;
/// How long the registrar may take to answer after a start.
const PATIENCE: Duration = Duration::from_secs(60);

/// What happens between a start and the kill.
#[derive(Debug)]
enum Moment {
    /// Clients write for so long.
    Writing(Duration),
    /// It is killed so long after its start.
    Starting(Duration),
    /// Clients write for so long; then it is told to stop, and killed after so long again.
    Stopping(Duration, Duration),
}

impl Moment {
    fn choose(rng: &mut StdRng) -> Self {
        let mut within = |milliseconds| Duration::from_millis(rng.random_range(0..milliseconds));
        let (writing, starting, stopping) = (within(500), within(250), within(700));
        match rng.random_range(0..10) {
            0..6 => Self::Writing(writing),
            6..8 => Self::Starting(starting),
            _ => Self::Stopping(writing, stopping),
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_it_is_killed() {
    let number = |name| std::env::var(name).ok().and_then(|value: String| value.parse().ok());
    let kills = number("MUSTER_KILLS").unwrap_or(KILLS);
    let seed = number("MUSTER_KILLS_SEED").unwrap_or_else(|| rand::random::<u32>().into());
    eprintln!("kill -9: {kills} times; MUSTER_KILLS_SEED={seed}");
    scenario("kill -9", |lab| run(lab, kills, seed));
}

fn run(lab: &Lab, kills: u64, seed: u64) -> Result {
    let host = lab.host("hq")?;
    lab.switch("lan")?.plug(&host, &["10.1.0.1/24"])?;
    let limits = "[limits]\njoins_per_second = 10000\njoins_burst = 10000\n[log]\nlevel = \"warn\"";
    let mut registrar = Registrar::init(&host, "net.example", "10.1.0.1", limits)?;
    registrar.serve()?;
    let site =
        Site { join: registrar.new_join_command(&["--reusable"])?, credential: registrar.credential() };
    registrar.kill();

    let runtime = host.runtime()?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut clients: Vec<Client> =
        (0..CLIENTS).map(|number| Client::new(site.clone(), number, DEVICES, seed)).collect();
    let mut starts = Vec::new();
    for round in 0..kills {
        let moment = Moment::choose(&mut rng);
        let started = Instant::now();
        registrar.start()?;
        if !matches!(moment, Moment::Starting(_)) {
            verify(&mut registrar, &runtime, &site, &mut clients)
                .map_err(|error| failed(&format!("after {round} kills, seed {seed}"), error))?;
            starts.push(Instant::now() - started);
        }
        let writing = Writing::start(&runtime, clients);
        match moment {
            Moment::Writing(within) | Moment::Starting(within) => std::thread::sleep(within),
            Moment::Stopping(within, until) => {
                std::thread::sleep(within);
                registrar.terminate()?;
                std::thread::sleep(until);
            }
        }
        registrar.kill();
        clients = writing
            .stop(&runtime)
            .map_err(|error| failed(&format!("kill {round}, {moment:?}, seed {seed}"), error))?;
        if round % 100 == 99 {
            eprintln!("kill -9: {} of {kills}, {}", round + 1, told(&clients));
        }
    }
    registrar.start()?;
    verify(&mut registrar, &runtime, &site, &mut clients)?;
    registrar.wait_ready()?;
    let metrics = registrar.metrics()?;
    let sound = metrics.lines().any(|line| line == "muster_registrar_bad_values_total 0");
    expect(sound, "every value in the store can be read", &metrics)?;
    registrar.stop()?;
    let database = registrar.data().join("registry.db");
    let checked = host.sh(&format!("sqlite3 '{}' 'pragma integrity_check'", database.display()))?;
    expect(checked.trim() == "ok", "the database is sound", &checked)?;
    eprintln!("kill -9: {kills} times, {}", told(&clients));
    starts.sort_unstable();
    if let (Some(median), Some(most)) = (starts.get(starts.len() / 2), starts.last()) {
        eprintln!("from a start until all is shown: {median:.0?} in the median, {most:.0?} at most");
    }
    let written: u64 = clients.iter().map(|client| client.acknowledged).sum();
    expect(written > kills, "clients have written", &written.to_string())
}

fn told(clients: &[Client]) -> String {
    let acknowledged: u64 = clients.iter().map(|client| client.acknowledged).sum();
    let lost: u64 = clients.iter().map(|client| client.lost).sum();
    format!("{acknowledged} writes acknowledged, {lost} attempts without an answer")
}

/// Waits until the registrar answers, and compares what it shows with what the clients know.
fn verify(registrar: &mut Registrar, runtime: &Runtime, site: &Site, clients: &mut [Client]) -> Result {
    let shown = wait_for("the registrar to answer", PATIENCE, || {
        if !registrar.process().is_some_and(Process::is_running) {
            return Ok(Err("it has ended"));
        }
        let site = site.clone();
        run_on(runtime, async move { list(&site).await }).map(Ok).map_err(|error| error.to_string())
    })?;
    let shown = shown.map_err(|error| failed("the registrar's start", error))?;
    ledger::check(clients.iter_mut().flat_map(Client::known), &shown)
        .map_err(|error| failed("what the registrar shows", error))
}

/// All clients at work.
struct Writing {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Result<Client, muster_integration_tests::device::Error>>>,
}

impl Writing {
    fn start(runtime: &Runtime, clients: Vec<Client>) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let tasks = clients.into_iter().map(|client| runtime.spawn(client.write(stop.clone()))).collect();
        Self { stop, tasks }
    }

    /// Ends them, and returns them with what they know by now.
    fn stop(self, runtime: &Runtime) -> Result<Vec<Client>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut clients = Vec::new();
        for task in self.tasks {
            let client = runtime.block_on(task).map_err(|error| failed("a client", error))?;
            clients.push(client.map_err(|error| failed("a client", format!("{error:?}")))?);
        }
        Ok(clients)
    }
}
