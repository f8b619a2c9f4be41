//! Two registrars on one etcd, and agents that look each other up all the time: for how long they get no answer when
//! their registrar is killed, and when it is frozen.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, Result,
    device::Error,
    expect, failed,
    figures::{Figures, quantile},
    muster::Registrar,
    run_on,
    swarm::{Member, Swarm, allow_open_files},
};
use rustix::process::Signal;
use tokio::{runtime::Runtime, task::JoinSet};

use crate::{
    DOMAIN,
    calls::{on_etcd, start_etcd},
};

const AGENTS: usize = 200;
const OPEN_FILES: u64 = 4096;
const ETCD: &str = "198.51.100.1";
const REGISTRARS: [&str; 2] = ["198.51.100.11", "198.51.100.12"];
const ROUNDS: usize = 5;
/// Between an answer and the next lookup of the same agent.
const PAUSE: Duration = Duration::from_millis(100);
/// How long lookups go on before the registrar fails, and after all have an answer again.
const CALM: Duration = Duration::from_secs(2);
/// Time for everything to be as it was: longer than sessions take to count as good ones.
const RECOVER: Duration = Duration::from_secs(12);
/// After so long without an answer the agent is counted as it is.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a registrar fails.
#[derive(Clone, Copy, PartialEq)]
enum Failure {
    Killed,
    Frozen,
}

pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result {
    const FIGURE: &str = "failover: gap in an agent's lookups";
    allow_open_files(OPEN_FILES)?;
    let clients = lab.host("clients")?;
    let switch = lab.switch("failover")?;
    switch.plug(&clients, &[&format!("{ETCD}/24")])?;
    let Some(_etcd) = start_etcd(&clients, ETCD)? else {
        figures.missing(FIGURE, "etcd cannot be installed here");
        return Ok(());
    };
    let hosts = [lab.host("first")?, lab.host("second")?];
    for (host, address) in hosts.iter().zip(REGISTRARS) {
        switch.plug(host, &[&format!("{address}/24")])?;
    }
    let mut registrars = registrars(&hosts)?;
    let join = registrars[0].new_join_command(&["--reusable"])?;
    let runtime = clients.runtime()?;
    let swarm = run_on(&runtime, async move {
        let mut swarm = Swarm::start(&join, AGENTS);
        swarm.all_connected().await?;
        Ok(swarm)
    })?;
    for (failure, what) in [(Failure::Killed, "is killed"), (Failure::Frozen, "is frozen")] {
        let mut gaps = Vec::new();
        let mut unreachable = 0;
        for _ in 0..ROUNDS {
            std::thread::sleep(RECOVER);
            let (more, failures) = fail(&mut registrars, &runtime, swarm.members(), failure)?;
            gaps.extend(more);
            unreachable += failures;
        }
        let figure = |q: &str| format!("{FIGURE} when its registrar {what}, {q}");
        figures.report(&figure("p50"), quantile(&mut gaps, 0.5).as_secs_f64(), "s");
        figures.compare(&figure("p99"), quantile(&mut gaps, 0.99).as_secs_f64(), "s", "goal of 3", 3.0);
        figures.report(&figure("longest"), quantile(&mut gaps, 1.0).as_secs_f64(), "s");
        let (seen, failures) =
            (u32::try_from(gaps.len()).unwrap_or(0), u32::try_from(unreachable).unwrap_or(0));
        figures.report(&figure("number of gaps"), f64::from(seen), "gaps");
        figures.report(&figure("packets answered with \"unreachable\""), f64::from(failures), "packets");
    }
    drop(swarm);
    runtime.shutdown_background();
    registrars.iter_mut().for_each(|registrar| registrar.kill());
    Ok(())
}

/// Both registrars, of which agents know both addresses.
fn registrars(hosts: &[Host; 2]) -> Result<[Registrar; 2]> {
    let store = on_etcd(ETCD);
    let addresses = REGISTRARS.join(" ");
    let mut first = Registrar::init(&hosts[0], DOMAIN, &addresses, &store)?;
    first.serve()?;
    let mut second = Registrar::beside(&first, &hosts[1], &addresses, &store)?;
    second.serve()?;
    Ok([first, second])
}

/// The registrar with the most agents fails while all look each other up. Returns the gaps of its agents, and how many
/// packets had no answer in time.
fn fail(
    registrars: &mut [Registrar; 2],
    runtime: &Runtime,
    members: &[Member],
    failure: Failure,
) -> Result<(Vec<Duration>, usize)> {
    let all = members.to_vec();
    let on_first: BTreeSet<usize> = run_on(runtime, async move {
        let mut on_first = BTreeSet::new();
        for (number, member) in all.iter().enumerate() {
            if member.status().await?.address.starts_with(REGISTRARS[0]) {
                on_first.insert(number);
            }
        }
        Ok(on_first)
    })?;
    let victim = usize::from(on_first.len() * 2 < members.len());
    let registrar = &mut registrars[victim];
    let lookups = Lookups::start(runtime, members)?;
    std::thread::sleep(CALM);
    let failed_at = Instant::now();
    match failure {
        Failure::Killed => registrar.kill(),
        Failure::Frozen => signal(registrar, Signal::STOP)?,
    }
    let answers = lookups.finish(runtime, failed_at)?;
    match failure {
        Failure::Killed => registrar.serve()?,
        Failure::Frozen => signal(registrar, Signal::CONT)?,
    }
    let (mut gaps, mut unreachable) = (Vec::new(), 0);
    for (number, answers) in answers {
        if on_first.contains(&number) == (victim == 0) {
            gaps.push(gap(&answers.times, failed_at));
            unreachable += answers.unreachable;
        }
    }
    expect(!gaps.is_empty(), "agents at the registrar that fails", "none")?;
    Ok((gaps, unreachable))
}

fn signal(registrar: &mut Registrar, signal: Signal) -> Result {
    registrar.process().ok_or_else(|| failed("the registrar", "it does not run"))?.signal(signal)
}

/// The longest time between two answers of which the later one came after `since`.
fn gap(times: &[Instant], since: Instant) -> Duration {
    let pairs = times.iter().zip(times.iter().skip(1));
    let gaps = pairs.filter(|(_, later)| **later > since).map(|(earlier, later)| *later - *earlier);
    gaps.max().unwrap_or(PATIENCE)
}

/// What an agent's lookups have come to.
#[derive(Default)]
struct Answers {
    times: Vec<Instant>,
    /// Packets for which there was no answer in time.
    unreachable: usize,
}

/// Lookups of all agents, of each other.
struct Lookups {
    tasks: JoinSet<Result<(usize, Answers), Error>>,
    stop: Arc<AtomicBool>,
    has_failed: Arc<AtomicBool>,
    /// Agents that have had an answer to a lookup that was begun after the registrar had failed.
    answered: Arc<AtomicUsize>,
}

impl Lookups {
    fn start(runtime: &Runtime, members: &[Member]) -> Result<Self> {
        let members = members.to_vec();
        run_on(runtime, async move {
            let (stop, has_failed, answered) =
                <(Arc<AtomicBool>, Arc<AtomicBool>, Arc<AtomicUsize>)>::default();
            let mut tasks = JoinSet::new();
            for (number, member) in members.iter().cloned().enumerate() {
                let peer = members.get((number + 1) % members.len()).ok_or("there is no other agent")?;
                let address = peer.address().await?;
                let (stop, has_failed, answered) = (stop.clone(), has_failed.clone(), answered.clone());
                tasks.spawn(async move {
                    let mut answers = Answers::default();
                    let mut is_counted = false;
                    while !stop.load(Ordering::Relaxed) {
                        let is_after = has_failed.load(Ordering::Relaxed);
                        match member.reach(address).await {
                            Ok(at) => {
                                answers.times.push(at);
                                if is_after && !std::mem::replace(&mut is_counted, true) {
                                    answered.fetch_add(1, Ordering::Relaxed);
                                }
                                member.forget(address);
                            }
                            Err(_) => answers.unreachable += 1,
                        }
                        tokio::time::sleep(PAUSE).await;
                    }
                    Ok((number, answers))
                });
            }
            Ok(Self { tasks, stop, has_failed, answered })
        })
    }

    /// Waits until all have an answer again, and ends.
    fn finish(mut self, runtime: &Runtime, failed_at: Instant) -> Result<Vec<(usize, Answers)>> {
        self.has_failed.store(true, Ordering::Relaxed);
        while self.answered.load(Ordering::Relaxed) < self.tasks.len()
            && Instant::now() - failed_at < PATIENCE
        {
            std::thread::sleep(PAUSE);
        }
        std::thread::sleep(CALM);
        self.stop.store(true, Ordering::Relaxed);
        run_on(runtime, async move {
            let mut all = Vec::new();
            while let Some(answers) = self.tasks.join_next().await {
                all.push(answers??);
            }
            Ok(all)
        })
    }
}
