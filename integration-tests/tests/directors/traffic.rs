//! What hosts send each other while something happens: pings, of which none may be lost, and TCP transfers, whose octets
//! are compared.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use muster_integration_tests::{Host, Process, Result, expect, failed, process::wait_for};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `host` reaches the device called `name`.
pub(crate) fn reaches(host: &Host, name: &str) -> Result {
    wait_for(&format!("{} to reach {name}", host.name()), PATIENCE, || {
        let ping = format!("ping -c 1 -W 1 $(dig +short {name}.net.example)");
        host.sh(&ping).map(drop).map_err(|e| e.to_string())
    })
}

/// Pings that go on until they are ended.
pub(crate) struct Pings(Process);

/// What has become of pings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pinged {
    pub(crate) sent: usize,
    pub(crate) lost: usize,
    /// The longest time without an answer.
    pub(crate) gap: Duration,
}

impl Pings {
    /// A hundred a second to the device called `name`. (More than that is not to be had of `ping`.)
    pub(crate) fn start(host: &Host, name: &str) -> Result<Self> {
        // Each has a log of its own.
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let mut ping = host.command("sh");
        ping.args(["-ec", &format!("exec ping -D -i 0.01 $(dig +short {name}.net.example)")]);
        host.spawn(&format!("ping-{number}-{name}"), ping).map(Self)
    }

    /// How many answers there were.
    pub(crate) fn answers(&self) -> usize {
        self.0.log().matches("bytes from").count()
    }

    /// Waits for so many more answers.
    pub(crate) fn more(&self, more: usize) -> Result {
        let before = self.answers();
        wait_for("answers to pings", PATIENCE, || {
            let had = self.answers() - before;
            if had >= more { Ok(()) } else { Err(format!("{had} of {more}")) }
        })
    }

    /// Ends them.
    pub(crate) fn end(mut self) -> Result<Pinged> {
        self.0.signal(Signal::INT)?;
        self.0.wait(PATIENCE)?;
        let log = self.0.log();
        let number = |word: &str| {
            let line = log.lines().find(|line| line.contains("packets transmitted")).unwrap_or_default();
            let field = line.split(", ").find(|field| field.contains(word)).unwrap_or_default();
            field.split(' ').next().and_then(|n| n.parse::<usize>().ok()).unwrap_or(0)
        };
        let (sent, received) = (number("transmitted"), number("received"));
        expect(sent > 0 && received <= sent, "a summary", &log)?;
        let times: Vec<f64> = log
            .lines()
            .filter(|line| line.contains("bytes from"))
            .filter_map(|line| line.strip_prefix('[')?.split_once(']')?.0.parse().ok())
            .collect();
        let gaps = times.iter().zip(times.iter().skip(1)).map(|(before, after)| after - before);
        let gap = Duration::from_secs_f64(gaps.fold(0.0, f64::max));
        // The last is still on its way when ping ends.
        Ok(Pinged { sent, lost: (sent - received).saturating_sub(1), gap })
    }
}

/// A TCP transfer, of about three megabytes a second, until it is ended.
pub(crate) struct Transfer {
    sender: Process,
    receiver: Process,
    stop: PathBuf,
}

const SENDER: &str = "
import hashlib, os, random, socket, sys, time
listener = socket.create_server(('', int(sys.argv[1])))
print('listening', flush=True)
peer = listener.accept()[0]
octets, digest, total = random.Random(7), hashlib.sha256(), 0
while not os.path.exists(sys.argv[2]):
    block = octets.randbytes(65536)
    peer.sendall(block)
    digest.update(block)
    total += len(block)
    time.sleep(0.02)
peer.close()
print('whole', total, digest.hexdigest(), flush=True)
";

const RECEIVER: &str = "
import hashlib, socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60)
digest, total, told = hashlib.sha256(), 0, 0
while block := peer.recv(65536):
    digest.update(block)
    total += len(block)
    if total >= told + 262144:
        told = total
        print('so far', total, flush=True)
print('whole', total, digest.hexdigest(), flush=True)
";

impl Transfer {
    /// From one host to another; the former listens on this port.
    pub(crate) fn start(from: &Host, to: &Host, port: u16) -> Result<Self> {
        let stop = from.directory().join(format!("stop-{port}"));
        let mut sender = from.command("python3");
        sender.args(["-c", SENDER, &port.to_string()]).arg(&stop);
        let sender = from.spawn(&format!("sender-{port}"), sender)?;
        wait_for("the sender to listen", PATIENCE, || {
            let log = sender.log();
            if log.contains("listening") { Ok(()) } else { Err(log) }
        })?;
        let address = to.sh(&format!("dig +short {}.net.example", from.name()))?;
        let mut receiver = to.command("python3");
        receiver.args(["-c", RECEIVER, address.trim(), &port.to_string()]);
        let receiver = to.spawn(&format!("receiver-{port}"), receiver)?;
        let transfer = Self { sender, receiver, stop };
        transfer.more()?;
        Ok(transfer)
    }

    /// Waits until two further megabytes have arrived.
    pub(crate) fn more(&self) -> Result {
        let before = self.arrived();
        wait_for("more of the transfer", PATIENCE, || {
            let more = self.arrived() - before;
            if more >= 2_000_000 { Ok(()) } else { Err(format!("{more} octets; {}", self.receiver.log())) }
        })
    }

    fn arrived(&self) -> usize {
        let log = self.receiver.log();
        log.lines().filter_map(|line| line.strip_prefix("so far ")?.parse().ok()).next_back().unwrap_or(0)
    }

    /// Ends it: all that was sent has arrived.
    pub(crate) fn end(mut self) -> Result {
        std::fs::write(&self.stop, "").map_err(|error| failed("stopping the transfer", &error))?;
        for process in [&mut self.sender, &mut self.receiver] {
            process.wait(PATIENCE)?;
        }
        let (sent, received) = (self.sender.log(), self.receiver.log());
        let whole = |log: &str| log.lines().find(|line| line.starts_with("whole")).map(str::to_owned);
        let is_same = whole(&sent).is_some() && whole(&sent) == whole(&received);
        expect(is_same, "what was sent has arrived", &format!("{sent}\n{received}"))
    }
}
