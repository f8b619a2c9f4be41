//! Octets that tell where they belong, and a TCP connection that is filled with them.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use aws_lc_rs::{
    cipher::{AES_128, EncryptingKey, EncryptionContext, UnboundCipherKey},
    iv::FixedLength,
};
use muster_integration_tests::{Result, expect, muster::Agent};

use crate::site::{Family, Site, enter};

/// What is written and compared at a time.
const BLOCK: usize = 64 << 10;

/// A pseudo-random stream, the same for the same seed: a key stream of AES, which is quick in any build.
pub(crate) struct Octets {
    key: EncryptingKey,
}

impl Octets {
    pub(crate) fn new(seed: u64) -> Self {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let key = UnboundCipherKey::new(&AES_128, &key).expect("16 octets");
        Self { key: EncryptingKey::ctr(key).expect("a key") }
    }

    /// Fills `block`, the one of this number; its beginning is the same however long it is, up to 64 KiB.
    pub(crate) fn fill(&self, number: u64, block: &mut [u8]) {
        block.fill(0);
        let mut iv = [0; 16];
        iv[..8].copy_from_slice(&number.to_be_bytes());
        let context = EncryptionContext::Iv128(FixedLength::from(iv));
        self.key.less_safe_encrypt(block, context).expect("encrypted");
    }
}

/// Sends `len` octets over TCP from one device to the other, where each is compared. `halfway` is called when half
/// of them have been received.
pub(crate) fn transfer(
    site: &Site,
    (from, to): (&Agent, &Agent),
    family: Family,
    len: usize,
    halfway: impl FnOnce() -> Result,
) -> Result {
    let address = site.address(to, family)?;
    let (sender, receiver) = (from.host().namespace().to_owned(), to.host().namespace().to_owned());
    let (bound, at) = std::sync::mpsc::channel();
    let (half_done, is_half_done) = std::sync::mpsc::channel();
    let receiving = thread::spawn(move || {
        enter(&receiver);
        receive(address, len, &bound, &half_done)
    });
    let sending = thread::spawn(move || {
        enter(&sender);
        let at: SocketAddr = at.recv().map_err(|_| "nobody listens".to_owned())?;
        send(at, len).map_err(|e| format!("sending: {e}"))
    });
    let outcome = if is_half_done.recv().is_ok() { halfway() } else { Ok(()) };
    let name = format!("{} octets from {} to {} over {family:?}", len, from.host().name(), to.host().name());
    let results = [receiving.join(), sending.join()].map(|r| r.unwrap_or_else(|_| Err("panicked".into())));
    for result in results {
        expect(result.is_ok(), &name, &result.err().unwrap_or_default())?;
    }
    outcome
}

fn send(to: SocketAddr, len: usize) -> std::io::Result<()> {
    let octets = Octets::new(len as u64);
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(20))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    let mut block = vec![0; BLOCK];
    for (number, start) in (0..len).step_by(BLOCK).enumerate() {
        let block = &mut block[..BLOCK.min(len - start)];
        octets.fill(number as u64, block);
        stream.write_all(block)?;
    }
    Ok(())
}

fn receive(
    address: IpAddr,
    len: usize,
    bound: &std::sync::mpsc::Sender<SocketAddr>,
    half_done: &std::sync::mpsc::Sender<()>,
) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("receiving: {e}");
    let octets = Octets::new(len as u64);
    let listener = TcpListener::bind((address, 0)).map_err(failed)?;
    let _ = bound.send(listener.local_addr().map_err(failed)?);
    let (mut stream, _) = listener.accept().map_err(failed)?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(failed)?;
    let (mut block, mut expected) = (vec![0; BLOCK], vec![0; BLOCK]);
    for (number, start) in (0..len).step_by(BLOCK).enumerate() {
        if start <= len / 2 && len / 2 < start + BLOCK {
            let _ = half_done.send(());
        }
        let size = BLOCK.min(len - start);
        let (block, expected) = (&mut block[..size], &mut expected[..size]);
        stream.read_exact(block).map_err(|e| format!("receiving after {start} octets: {e}"))?;
        octets.fill(number as u64, expected);
        if block != expected {
            let wrong = block.iter().zip(expected.iter()).position(|(a, b)| a != b).unwrap_or(0);
            return Err(format!("octet {} is another", start + wrong));
        }
    }
    match stream.read(&mut [0]) {
        Ok(0) => Ok(()),
        other => Err(format!("more than was sent: {other:?}")),
    }
}
