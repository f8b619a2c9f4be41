//! A wire that loses, repeats and reorders: a TUN device of the router that the tunnel's datagrams are led through.

use std::{
    collections::VecDeque,
    io::IoSlice,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use muster_agent::tun::{Offloads, SUPER_PACKET_MAX, Tun};
use muster_integration_tests::Result;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::site::{Site, enter};

/// What becomes of packets, each in one of so many.
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    pub(crate) lost: u32,
    pub(crate) repeated: u32,
    /// Comes after up to 40 later ones.
    pub(crate) delayed: u32,
}

/// The wire; whole again when dropped.
pub(crate) struct BadWire {
    stop: Arc<AtomicBool>,
    delayed: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl BadWire {
    /// Leads what the tunnel of `site` sends through a wire with `faults`.
    pub(crate) fn new(site: &Site, faults: Faults) -> Result<Self> {
        let host = site.router.host();
        let namespace = host.namespace().to_owned();
        let (stop, delayed) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (until, count) = (Arc::clone(&stop), Arc::clone(&delayed));
        let (made, is_made) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            enter(&namespace);
            let tun = Tun::create("wire").expect("a TUN device");
            tun.set_offloads(Offloads::default()).expect("no offloads");
            let _ = made.send(());
            pass(&tun, faults, &until, &count);
        });
        let _ = is_made.recv();
        host.sh("ip link set wire mtu 9000 txqueuelen 10000 up
             for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done
             ip route add default dev wire table 77; ip -6 route add default dev wire table 77
             for interface in alice bob; do for family in -4 -6; do
                 ip $family rule add iif $interface ipproto udp dport 7551 lookup 77
             done; done")?;
        Ok(Self { stop, delayed, thread: Some(thread) })
    }

    /// How many packets have been overtaken so far.
    pub(crate) fn delayed(&self) -> u64 {
        self.delayed.load(Ordering::Relaxed)
    }
}

impl Drop for BadWire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pass(tun: &Tun, faults: Faults, stop: &AtomicBool, delayed: &AtomicU64) {
    let mut random = StdRng::seed_from_u64(7);
    let mut buffer = vec![0; SUPER_PACKET_MAX];
    // Packets that wait, with how many others are still to pass first.
    let mut held: VecDeque<(u32, Vec<u8>)> = VecDeque::new();
    let write = |packet: &[u8]| drop(tun.send_super(&[IoSlice::new(packet)]));
    while !stop.load(Ordering::Acquire) {
        let Ok(len) = tun.recv_super(&mut buffer) else {
            let pause = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            let ready = poll(&mut [PollFd::from_borrowed_fd(tun.as_fd(), PollFlags::IN)], Some(&pause));
            if ready == Ok(0) {
                held.drain(..).for_each(|(_, packet)| write(&packet));
            }
            continue;
        };
        let packet = &buffer[..len];
        if random.random_range(0..faults.lost) == 0 {
            continue;
        }
        if random.random_range(0..faults.delayed) == 0 {
            held.push_back((random.random_range(1..40), packet.to_vec()));
            delayed.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        write(packet);
        if random.random_range(0..faults.repeated) == 0 {
            write(packet);
        }
        held.iter_mut().for_each(|(left, _)| *left -= 1);
        held.retain(|(left, packet)| {
            if *left == 0 {
                write(packet);
            }
            *left > 0
        });
    }
}
