//! The data path takes no memory: not for frames that pass, and not for those that do not.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_common::{
    datagram::Ecn,
    frame::{self, DataHeader, Handle, Key, push_frame},
    time::Instant,
};
use muster_director::relay::{Arrival, Limits, Relay, Verdicts};
use uuid::Uuid;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.with(|count| count.set(count.get() + 1));
}

// SAFETY: everything is done by the system's allocator, under the caller's own promises; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn frames_take_no_memory() {
    assert!(allocations(|| drop(Box::new(1))) > 0, "it does count");
    let now = Instant::from_boot(Duration::from_secs(1_000));
    let mut relay =
        Relay::new([7; 32], Limits { octets_per_second: 1 << 40, burst: 1 << 40, ..Limits::default() });
    let mut attach = |device: u8, address: &str| {
        let (uid, from): (_, SocketAddr) = (Uuid::from_bytes([device; 16]), address.parse().unwrap());
        let attached = relay.attach(uid, from.ip(), now).unwrap();
        let hello = frame::hello(&Key::new(&attached.key), attached.session, 1, 0);
        relay.handle_hello(from, &hello, now).unwrap();
        (attached, from)
    };
    let ((a, from), (b, _)) = (attach(1, "192.0.2.1:1"), attach(2, "[2001:db8::1]:2"));
    let (c, _) = attach(3, "192.0.2.3:3");
    let streaming = relay.attach(Uuid::from_bytes([4; 16]), IpAddr::from([192, 0, 2, 4]), now).unwrap();
    assert!(relay.set_stream(streaming.session, Uuid::from_bytes([4; 16]), true, now));

    let frame = |session, handle| [DataHeader { session, handle }.octets().as_slice(), &[4; 984]].concat();
    let run: Vec<u8> = (0..64)
        .flat_map(|n| match n {
            0..20 => frame(a.session, b.handle),
            20..30 => frame(a.session, c.handle),
            30..40 => frame(a.session, streaming.handle),
            40..45 => frame(a.session, Handle(99)),
            45..50 => frame(a.session, a.handle),
            50..55 => frame(1, b.handle),
            55..60 => frame(c.session, b.handle),
            _ => vec![4; 1_000],
        })
        .collect();
    let mut buffer = run.clone();
    let arrival = Arrival { from, ecn: Ecn::Ect0, datagram_len: 1_000, range: 0..run.len() };
    let mut verdicts = Verdicts::new(1_000);
    let batches = allocations(|| {
        for _ in 0..100 {
            verdicts.clear();
            for _ in 0..60 {
                buffer.copy_from_slice(&run);
                relay.forward(&arrival, &mut buffer, now, &mut verdicts);
            }
        }
    });
    assert_eq!((batches, verdicts.forwards.len()), (0, 180));

    let mut batch = Vec::new();
    for _ in 0..60 {
        push_frame(&mut batch, &frame(streaming.session, b.handle));
    }
    let sent = batch.clone();
    let streams = allocations(|| {
        for _ in 0..100 {
            batch.copy_from_slice(&sent);
            verdicts.clear();
            relay.forward_batch(streaming.session, &mut batch, now, &mut verdicts);
        }
    });
    assert_eq!((streams, verdicts.forwards.len()), (0, 1));
}
