//! The load over UDP, as a process of its own: a fixed number of queries under way, or a fixed rate; and the bare
//! echo, which shows what the socket alone allows.

use std::{net::UdpSocket, time::Duration};

use muster_common::time::Instant;
use muster_integration_tests::{device::Error, figures::quantile};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{ROUND, ROUNDS, query, sys::Batch};

/// Queries under way at a time.
const WINDOW: usize = 256;
/// After so long without an answer, those under way count as lost.
const PATIENCE: Duration = Duration::from_millis(200);
/// Queries a second when times are taken.
const PACE: u32 = 10_000;

/// Answers every datagram with itself, marked as a response.
pub(crate) fn echo(address: &str) -> Result<(), Error> {
    let socket = UdpSocket::bind(address)?;
    let mut batch = Batch::new();
    loop {
        batch.receive(&socket)?;
        batch.send(&socket, true)?;
    }
}

/// Keeps [`WINDOW`] queries for random names under way. A line a round: answers, seconds, lost queries.
pub(crate) fn flood(address: &str, names: u32) -> Result<(), Error> {
    let socket = client(address)?;
    let mut rng = StdRng::seed_from_u64(7);
    let mut batch = Batch::new();
    flood_round(&socket, &mut batch, names, &mut rng, Duration::from_secs(1))?;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let (answers, lost) = flood_round(&socket, &mut batch, names, &mut rng, ROUND)?;
        println!("{answers} {} {lost}", (Instant::now() - started).as_secs_f64());
    }
    Ok(())
}

fn flood_round(
    socket: &UdpSocket,
    batch: &mut Batch,
    names: u32,
    rng: &mut StdRng,
    time: Duration,
) -> Result<(u64, usize), Error> {
    let end = Instant::now() + time;
    let (mut under_way, mut answers, mut lost) = (0, 0, 0);
    let mut room = Vec::new();
    while Instant::now() < end {
        while under_way < WINDOW {
            batch.clear();
            while batch.len() < crate::sys::BATCH {
                query(rng.random(), rng.random_range(0..names), &mut room);
                batch.push(&room);
            }
            under_way += batch.len();
            batch.send(socket, false)?;
        }
        match batch.receive(socket) {
            Ok(()) => {
                answers += batch.len() as u64;
                under_way = under_way.saturating_sub(batch.len());
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                lost += std::mem::take(&mut under_way);
            }
            Err(error) => return Err(error.into()),
        }
    }
    // What is still on its way belongs to no round.
    while under_way > 0 && batch.receive(socket).is_ok() {
        under_way = under_way.saturating_sub(batch.len());
    }
    Ok((answers, lost))
}

/// Asks for every name once, and again for those that were lost, so that a cache holds them all.
pub(crate) fn warm(address: &str, names: u32) -> Result<(), Error> {
    let socket = client(address)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut batch = Batch::new();
    let mut room = Vec::new();
    for group in (0..names).collect::<Vec<_>>().chunks(crate::sys::BATCH) {
        for _ in 0..5 {
            batch.clear();
            for name in group {
                query(7, *name, &mut room);
                batch.push(&room);
            }
            let mut missing = batch.len();
            batch.send(&socket, false)?;
            while missing > 0 && batch.receive(&socket).is_ok() {
                missing = missing.saturating_sub(batch.len());
            }
            if missing == 0 {
                break;
            }
        }
    }
    Ok(())
}

/// One query after another at a fixed pace. A line a round: median and 99th percentile in microseconds.
pub(crate) fn paced(address: &str, names: u32) -> Result<(), Error> {
    let socket = client(address)?;
    let mut rng = StdRng::seed_from_u64(11);
    let (mut room, mut answer) = (Vec::new(), [0; 1500]);
    for _ in 0..ROUNDS {
        let (start, mut samples) = (Instant::now(), Vec::new());
        for number in 0..PACE * 2 {
            let due = start + Duration::from_secs(1) / PACE * number;
            while Instant::now() < due {
                std::hint::spin_loop();
            }
            query(rng.random(), rng.random_range(0..names), &mut room);
            let sent = Instant::now();
            socket.send(&room)?;
            if socket.recv(&mut answer).is_ok() {
                samples.push(Instant::now() - sent);
            }
        }
        let micros = |d: Duration| d.as_secs_f64() * 1e6;
        println!("{} {}", micros(quantile(&mut samples, 0.5)), micros(quantile(&mut samples, 0.99)));
    }
    Ok(())
}

fn client(address: &str) -> Result<UdpSocket, Error> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}
