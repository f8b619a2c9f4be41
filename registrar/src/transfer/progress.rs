//! How far long work has come, for whoever waits for it.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use muster_common::time::Instant;

/// Tells from time to time how many keys are done.
#[derive(Debug)]
pub struct Progress {
    /// `None`: tells nothing.
    interval: Option<Duration>,
    last: Instant,
}

impl Progress {
    /// On standard error: every second if that is a terminal, else every ten.
    pub fn to_stderr() -> Self {
        let seconds = if io::stderr().is_terminal() { 1 } else { 10 };
        Self { interval: Some(Duration::from_secs(seconds)), last: Instant::now() }
    }

    /// Nowhere.
    pub fn silent() -> Self {
        Self { interval: None, last: Instant::now() }
    }

    /// `done` keys have been `what`, of a total that may be known.
    pub fn tell(&mut self, what: &str, done: u64, total: Option<u64>) {
        let Some(interval) = self.interval else { return };
        let now = Instant::now();
        if now - self.last < interval {
            return;
        }
        self.last = now;
        let total = total.map(|total| format!(" of {total}")).unwrap_or_default();
        // Nobody to hear it is no reason to stop.
        let _ = writeln!(io::stderr(), "{done}{total} keys {what}");
    }
}
