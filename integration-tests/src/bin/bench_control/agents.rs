//! Ten thousand agents at one registrar: what they cost it at rest, how soon one more is reached, how soon they are all back
//! after it was killed, and what a change costs those who hold the device, and those who do not.

mod changes;

use std::time::Duration;

use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, Result,
    device::Error,
    figures::{Figures, median, quantile},
    muster::Registrar,
    run_on,
    swarm::{Member, Swarm, allow_open_files},
    usage::own_resident,
};
use tokio::{runtime::Runtime, task::JoinSet};

use crate::{DOMAIN, LIMITS, MEBI, cost, milliseconds, resident};

const AGENTS: usize = 10_000;
/// Each agent has a connection at both ends, and those that are joining one more.
const OPEN_FILES: u64 = 16_000;
/// How long the registrar is watched while nothing happens.
const REST: Duration = Duration::from_secs(60);
/// Before that, so that what the joins have left is done.
const SETTLE: Duration = Duration::from_secs(10);
/// Devices that join one after another, and the time between two of them.
const JOINS: usize = 1500;
const JOIN_PAUSE: Duration = Duration::from_millis(10);
/// Restarts of the registrar.
const STORMS: usize = 5;

/// The lab's parts while the agents run.
struct Crowd {
    host: Host,
    registrar: Registrar,
    runtime: Runtime,
    swarm: Swarm,
}

impl Crowd {
    /// Does `what` with the agents, where they run.
    fn with<T: Send + 'static, F>(self, what: impl FnOnce(Swarm) -> F) -> Result<(Self, T)>
    where
        F: Future<Output = Result<(Swarm, T), Error>> + Send + 'static,
    {
        let Self { host, registrar, runtime, swarm } = self;
        let (swarm, outcome) = run_on(&runtime, what(swarm))?;
        Ok((Self { host, registrar, runtime, swarm }, outcome))
    }
}

pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result {
    allow_open_files(OPEN_FILES)?;
    let crowd = gather(lab, figures)?;
    let (mut crowd, idle) = rest(crowd, figures)?;
    crowd = changes::unrelated(crowd, idle, figures)?;
    crowd = changes::held(crowd, figures)?;
    crowd = restart(crowd, figures)?;
    crowd = join_and_reach(crowd, figures)?;
    let Crowd { mut registrar, runtime, swarm, .. } = crowd;
    let resident = resident(&mut registrar)? / MEBI;
    figures.report("agents: registrar's memory, after all of this", resident, "MiB");
    drop(swarm);
    runtime.shutdown_background();
    registrar.kill();
    Ok(())
}

/// All agents join, and have their sessions.
fn gather(lab: &Lab, figures: &mut Figures) -> Result<Crowd> {
    let host = lab.host("agents")?;
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", LIMITS)?;
    registrar.serve()?;
    let empty = resident(&mut registrar)?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let runtime = host.runtime()?;
    let before = own_resident()?;
    let began = Instant::now();
    let (swarm, last) = run_on(&runtime, async move {
        let mut swarm = Swarm::start(&join, AGENTS);
        let last = swarm.all_connected().await?;
        Ok((swarm, last))
    })?;
    std::thread::sleep(SETTLE);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let agents = AGENTS as f64;
    let figure = |what: &str| format!("agents: {what}, {AGENTS} agents");
    figures.report(&figure("joins and first sessions"), agents / (last - began).as_secs_f64(), "agents/s");
    let now = resident(&mut registrar)?;
    figures.compare(&figure("registrar's memory"), now / MEBI, "MiB", "goal of 512", 512.0);
    figures.report(&figure("registrar's memory for each"), (now - empty) / agents / 1024.0, "KiB");
    let each = (own_resident()? - before) / agents / 1024.0;
    figures.report(&figure("memory of the load generator for each"), each, "KiB");
    Ok(Crowd { host, registrar, runtime, swarm })
}

/// Octets that came to an agent in [`REST`] though nothing happened.
type Idle = f64;

/// Nothing happens, and all keep their sessions.
fn rest(mut crowd: Crowd, figures: &mut Figures) -> Result<(Crowd, Idle)> {
    let (octets, messages) = (changes::received(&crowd.host)?, crowd.swarm.messages());
    let before = cost(&mut crowd.registrar)?;
    std::thread::sleep(REST);
    let share = (cost(&mut crowd.registrar)? - before) / REST.as_secs_f64() * 100.0;
    let idle = changes::received(&crowd.host)? - octets;
    let figure = |what: &str| format!("agents: {what}, {AGENTS} agents at rest");
    figures.compare(&figure("registrar's processor time, of one core"), share, "%", "goal of 5", 5.0);
    let each = idle / changes::COUNT / REST.as_secs_f64();
    figures.report(&figure("octets to each a second"), each, "octets/s");
    let messages = changes::count(crowd.swarm.messages() - messages);
    figures.report(&figure("messages to all of them"), messages, "messages");
    Ok((crowd, idle))
}

/// More devices join, and each is found by name and reached by an agent that is there already.
fn join_and_reach(crowd: Crowd, figures: &mut Figures) -> Result<Crowd> {
    let (crowd, mut times) = crowd.with(|mut swarm| async move {
        let mut newcomers = JoinSet::new();
        let mut due = Instant::now();
        for number in 0..JOINS {
            let began = Instant::now();
            let (newcomer, other) = (swarm.add(), swarm.members().get(number).cloned());
            let other = other.ok_or("there are fewer agents than joins")?;
            newcomers.spawn(async move { Ok::<_, Error>(reached(&newcomer, &other).await? - began) });
            due += JOIN_PAUSE;
            muster_common::time::until(Some(due)).await;
        }
        let mut times = Vec::new();
        while let Some(time) = newcomers.join_next().await {
            times.push(time??);
        }
        Ok((swarm, times))
    })?;
    let figure =
        |q: &str| format!("agents: from Enroll until another agent can reach it, 100 joins a second, {q}");
    figures.report(&figure("p50"), milliseconds(quantile(&mut times, 0.5)), "ms");
    let slow = milliseconds(quantile(&mut times, 0.99));
    figures.compare(&figure("p99"), slow, "ms", "goal of 1,000", 1000.0);
    Ok(crowd)
}

/// When `other` has found the newcomer by its name, its data plane could send to it, and that of the newcomer could answer.
async fn reached(newcomer: &Member, other: &Member) -> Result<Instant, Error> {
    let found = other.find(&newcomer.name()).await?;
    let address = found.virtual_addresses.first().ok_or("it has no address")?.parse()?;
    if newcomer.address().await? != address {
        return Err(format!("{} is not at {address}, where it was found", newcomer.name()).into());
    }
    other.reach(address).await?;
    newcomer.called_by(other).await
}

/// The registrar is killed, and started again.
fn restart(mut crowd: Crowd, figures: &mut Figures) -> Result<Crowd> {
    let (mut since_kill, mut since_start) = (Vec::new(), Vec::new());
    for _ in 0..STORMS {
        let killed = Instant::now();
        crowd.registrar.kill();
        crowd = crowd
            .with(|mut swarm| async move {
                swarm.all_disconnected().await?;
                Ok((swarm, ()))
            })?
            .0;
        let started = Instant::now();
        crowd.registrar.start()?;
        let last;
        (crowd, last) = crowd.with(|mut swarm| async move {
            let last = swarm.all_connected().await?;
            Ok((swarm, last))
        })?;
        since_kill.push((last - killed).as_secs_f64());
        since_start.push((last - started).as_secs_f64());
        // Sessions that lasted are good ones: the next failure is the first again.
        std::thread::sleep(Duration::from_secs(15));
    }
    let figure = |what: &str, which: &str| {
        format!("agents: from the registrar's {what} until all {AGENTS} sessions are open, {which}")
    };
    let middle = median(&mut since_kill);
    figures.compare(&figure("kill -9", "median"), middle, "s", "goal of 10", 10.0);
    let slowest = since_kill.last().copied().unwrap_or_default();
    figures.report(&figure("kill -9", "slowest"), slowest, "s");
    figures.report(&figure("next start", "median"), median(&mut since_start), "s");
    Ok(crowd)
}
