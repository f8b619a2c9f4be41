//! The deterministic simulator: registrar cores, agent cores and tunnel cores in one thread, on virtual time, with a
//! network of delay, loss, reordering and partitions between them, driven by random operations from a seed, and
//! compared with a reference model made of plain maps. Nothing here reads a clock, opens a socket or spawns a task:
//! one seed is one run, octet for octet.
//!
//! The cores are the real ones ([`Index`](muster_registrar::registry::Index) with its plans and the sessions'
//! mailbox, [`Control`](muster_agent::control::Control), [`Flows`](muster_agent::directors::flow::Flows),
//! [`Tunnel`](muster_tunnel::Tunnel), [`Relay`](muster_director::relay::Relay)); the shells around them are played:
//! `registrar` for `registry::shell`, `session` and `api`, `host` for the agent's run loop and its disk, `directors`
//! for the director's sockets, attachments and session.

mod check;
mod connections;
mod directors;
mod host;
mod internet;
mod links;
mod model;
mod nat;
mod operations;
mod queue;
mod registrar;
mod requests;
mod trace;
mod wire;
mod world;

use std::fmt;

use world::World;

/// What a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Devices and registrars come and go for days, on one network.
    Lives,
    /// Hosts behind NATs of all kinds, that move, and directors that come and go, for an hour or so.
    Paths,
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its seed.
    pub seed: u64,
    /// Hash of the whole trace.
    pub hash: u64,
    /// Lines of the trace.
    pub lines: u64,
    /// How much of what happened, for judging whether a run is worth its time.
    pub counts: Counts,
}

/// How much of what happened in a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Virtual seconds.
    pub seconds: u64,
    /// Devices that joined.
    pub joined: u64,
    /// Registrations answered.
    pub registered: u64,
    /// Sessions opened.
    pub sessions: u64,
    /// Lookups answered.
    pub lookups: u64,
    /// Certificates renewed.
    pub renewed: u64,
    /// Transactions that the store refused.
    pub conflicts: u64,
    /// Datagrams sent.
    pub datagrams: u64,
    /// Inner packets sent.
    pub packets: u64,
    /// Inner packets delivered.
    pub delivered: u64,
    /// Inner packets answered with "unreachable".
    pub unreachable: u64,
    /// Attachments to directors.
    pub attached: u64,
    /// Frames that directors passed on.
    pub relayed: u64,
    /// Pairs of which it was checked that their path is direct, and that it is relayed.
    pub direct: u64,
    /// See `direct`.
    pub by_director: u64,
}

/// A run in which something did not hold.
#[derive(Debug, thiserror::Error)]
pub struct Failure {
    /// What the run was about.
    pub scenario: Scenario,
    /// The run's seed.
    pub seed: u64,
    /// What does not hold.
    pub violation: Violation,
    tail: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {0}: {1}\nthe last of the trace:\n{2}seed {0}: {1}\nreplay it with: MUSTER_SIM_SEED={0} cargo test \
             -p muster-integration-tests --test simulation {3} (MUSTER_SIM_TRACE=1 prints the whole trace)",
            self.seed,
            self.violation,
            self.tail,
            self.scenario.test()
        )
    }
}

/// What does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(String);

/// Something that must hold.
type Checked<T = ()> = Result<T, Violation>;

/// A violation unless `holds`.
fn must(holds: bool, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(Violation(what())) }
}

impl Scenario {
    /// The test that plays it.
    const fn test(self) -> &'static str {
        match self {
            Self::Lives => "what_must_hold_holds",
            Self::Paths => "paths_are_found",
        }
    }
}

/// Runs the simulation of `seed`.
///
/// # Errors
/// [`Failure`] if something does not hold.
pub fn run(scenario: Scenario, seed: u64, echo: bool) -> Result<Summary, Box<Failure>> {
    let mut world = World::new(scenario, seed, echo);
    match world.play() {
        Ok(()) => Ok(world.summary()),
        Err(violation) => Err(Box::new(Failure { scenario, seed, violation, tail: world.trace.tail() })),
    }
}
