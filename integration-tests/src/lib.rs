//! Networks for tests: hosts, switches and NAT routers as network namespaces of one machine, with real processes
//! in them. A [`Lab`] builds the topology in code, keeps every process's output, and always cleans up.
#![forbid(unsafe_code)]

pub mod attachments;
pub mod device;
pub mod figures;
pub mod lab;
pub mod muster;
pub mod nat;
pub mod population;
pub mod process;
pub mod router;
pub mod sim;
pub mod swarm;
pub mod usage;

pub use lab::{Host, Lab, Switch, run_on};
pub use process::{Output, Process};

/// Why a step of a scenario could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A command could not be started, or failed.
    #[error("{command}: {reason}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended and what it said.
        reason: String,
    },
    /// Something did not come about in time.
    #[error("waited {seconds} s for {what}; last seen: {last}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
        /// The last observation.
        last: String,
    },
    /// A file of the lab.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What scenarios return: the error text is the failing test's message.
pub type Result<T = (), E = LabError> = std::result::Result<T, E>;

/// An error that says `what` was not there, and what was `seen` instead, unless `condition` holds.
pub fn expect(condition: bool, what: &str, seen: &str) -> Result {
    if condition { Ok(()) } else { Err(failed(what, seen)) }
}

/// An error that says what was attempted, and why it has failed.
pub fn failed(what: &str, reason: impl ToString) -> LabError {
    LabError::Command { command: what.to_owned(), reason: reason.to_string() }
}

/// Runs `body` as the scenario `name`, in a lab of its own; a failure panics, with the logs of all processes.
///
/// Scenarios need root. Without it they are skipped, and say why; where `MUSTER_REQUIRE_ROOT=1`, as in CI, they
/// fail instead.
#[expect(clippy::print_stderr, clippy::panic, reason = "tells whoever runs the tests")]
pub fn scenario(name: &str, body: impl FnOnce(&Lab) -> Result) {
    let root = rustix::process::geteuid().is_root() && std::path::Path::new("/dev/net/tun").exists();
    if !root {
        let why = "it needs root (or a user namespace with network and mount namespaces) and /dev/net/tun";
        assert!(may_skip(), "scenario {name} cannot run: {why}");
        eprintln!("skipped scenario {name}: {why}; run `make test`");
        return;
    }
    let lab = Lab::new().unwrap_or_else(|error| panic!("scenario {name}: {error}"));
    if let Err(error) = body(&lab) {
        panic!("scenario {name}: {error}");
    }
}

/// Whether a scenario has to do without `program`, of the Debian package `package`, which is then said: it is skipped.
/// Where `MUSTER_REQUIRE_ROOT=1`, as in CI, it fails instead.
#[expect(clippy::print_stderr, reason = "tells whoever runs the tests")]
pub fn is_missing(host: &Host, program: &str, package: &str) -> Result<bool> {
    if host.has(program)? {
        return Ok(false);
    }
    let why = format!("{program} is not installed: apt-get install {package}");
    expect(may_skip(), &format!("{program}, which all scenarios need"), &why)?;
    eprintln!("skipped: {why}");
    Ok(true)
}

/// Whether scenarios may be skipped.
fn may_skip() -> bool {
    std::env::var_os("MUSTER_REQUIRE_ROOT").is_none_or(|v| v != "1")
}
