//! What happened, one line an event: hashed as a whole, so that two runs can be compared octet for octet, with the
//! last lines kept for the report of a failure.

use std::{collections::VecDeque, fmt, time::Duration};

/// Lines kept.
const TAIL: usize = 120;

/// The record of a run.
#[derive(Debug)]
pub(super) struct Trace {
    hash: u64,
    lines: u64,
    tail: VecDeque<String>,
    echo: bool,
}

impl Trace {
    /// An empty record; with `echo`, every line is also printed.
    pub(super) fn new(echo: bool) -> Self {
        Self { hash: FNV_OFFSET, lines: 0, tail: VecDeque::new(), echo }
    }

    /// Adds a line.
    #[expect(clippy::print_stderr, reason = "only where whoever looks for a failure asks for it")]
    pub(super) fn line(&mut self, at: Duration, text: fmt::Arguments<'_>) {
        let line = format!("{:>13.6} {text}", at.as_secs_f64());
        self.hash = fnv(fnv(self.hash, line.as_bytes()), b"\n");
        self.lines += 1;
        if self.echo {
            eprintln!("{line}");
        }
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
    }

    /// FNV-1a of all lines.
    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    /// How many lines there are.
    pub(super) fn lines(&self) -> u64 {
        self.lines
    }

    /// The last lines.
    pub(super) fn tail(&self) -> String {
        self.tail.iter().fold(String::new(), |text, line| text + line + "\n")
    }
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(hash: u64, octets: &[u8]) -> u64 {
    octets.iter().fold(hash, |hash, octet| (hash ^ u64::from(*octet)).wrapping_mul(0x0100_0000_01b3))
}

/// FNV-1a of `octets`: tells contents apart in a line.
pub(super) fn digest(octets: &[u8]) -> u64 {
    fnv(FNV_OFFSET, octets)
}
