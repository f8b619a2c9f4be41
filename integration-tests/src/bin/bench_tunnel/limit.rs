//! The limit: sealing and opening alone, of packets as large as the tunnel's, on one core.

use std::time::Duration;

use aws_lc_rs::{
    aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey},
    error::Unspecified,
};
use muster_common::time::Instant;
use muster_integration_tests::{
    LabError, Result,
    figures::{Figures, median},
};

use crate::{peers::Peer, results::Results, stop};

/// Octets of a packet.
const PACKET: usize = 1420;
/// Packets between two looks at the clock.
const BATCH: u32 = 512;
/// How long each is measured in a round.
const TURN: Duration = Duration::from_millis(300);

const CIPHERS: [(&str, &Algorithm); 3] =
    [("ChaCha20-Poly1305", &CHACHA20_POLY1305), ("AES-128-GCM", &AES_128_GCM), ("AES-256-GCM", &AES_256_GCM)];

/// Measures the ciphers in turn, and how far Muster's tunnel in `results` is from the first, which is WireGuard's.
pub(crate) fn measure(rounds: u32, results: &Results, figures: &mut Figures) -> Result {
    let mut rates = CIPHERS.map(|(name, cipher)| (name, cipher, Vec::new(), Vec::new()));
    for _ in 0..rounds {
        for (name, cipher, seal, open) in &mut rates {
            stop::check()?;
            let failed =
                |_| LabError::Command { command: format!("sealing with {name}"), reason: "it failed".into() };
            seal.push(sealing(cipher).map_err(failed)?);
            open.push(opening(cipher).map_err(failed)?);
        }
    }
    for (name, cipher, mut seal, mut open) in rates {
        let (seal, open) = (median(&mut seal), median(&mut open));
        let both = 1.0 / seal + 1.0 / open;
        figures.report(&format!("limit: {name} sealing"), seal, "GB/s");
        figures.report(&format!("limit: {name} opening"), open, "GB/s");
        figures.report(&format!("limit: {name} sealing and opening"), both, "s/GB");
        if cipher == &CHACHA20_POLY1305 {
            for measure in
                results.measures().filter(|name| name.ends_with(": tunnel CPU") && name.contains("TCP"))
            {
                if let Some(muster) = results.median(measure, Peer::Muster) {
                    figures.compare(&format!("{measure}, muster"), muster, "s/GB", "the limit", both);
                }
            }
        }
    }
    Ok(())
}

fn nonce(counter: u64) -> Nonce {
    let mut octets = [0; 12];
    if let Some(low) = octets.last_chunk_mut() {
        *low = counter.to_le_bytes();
    }
    Nonce::assume_unique_for_key(octets)
}

fn key(cipher: &'static Algorithm) -> Result<LessSafeKey, Unspecified> {
    let octets = vec![7; cipher.key_len()];
    UnboundKey::new(cipher, &octets).map(LessSafeKey::new)
}

/// GB of packets sealed in a second.
fn sealing(cipher: &'static Algorithm) -> Result<f64, Unspecified> {
    let key = key(cipher)?;
    let mut packet = [1; PACKET];
    let mut counter = 0;
    rate(|| {
        counter += 1;
        key.seal_in_place_separate_tag(nonce(counter), Aad::empty(), &mut packet).map(drop)
    })
}

/// GB of packets opened in a second, each after it was put back as it was sealed.
fn opening(cipher: &'static Algorithm) -> Result<f64, Unspecified> {
    let key = key(cipher)?;
    let mut sealed = vec![1; PACKET];
    key.seal_in_place_append_tag(nonce(1), Aad::empty(), &mut sealed)?;
    let mut packet = sealed.clone();
    rate(|| {
        packet.copy_from_slice(&sealed);
        key.open_in_place(nonce(1), Aad::empty(), &mut packet).map(drop)
    })
}

/// GB a second, where `packet` takes care of one packet.
fn rate(mut packet: impl FnMut() -> Result<(), Unspecified>) -> Result<f64, Unspecified> {
    let start = Instant::now();
    let mut packets = 0;
    loop {
        for _ in 0..BATCH {
            packet()?;
        }
        packets += BATCH;
        let elapsed = Instant::now().saturating_duration_since(start);
        if elapsed > TURN {
            return Ok(f64::from(packets) * PACKET as f64 / elapsed.as_secs_f64() / 1e9);
        }
    }
}
