//! ICMP echo against the kernel's own answers.

use std::time::Duration;

use muster_agent::ping::{Outcome, Pinger};

use crate::namespace::{Namespace, connect, have_root};

#[test]
fn a_neighbour_answers_and_nobody_times_out() {
    if !have_root() {
        return;
    }
    let (host, neighbour) = (Namespace::new(), Namespace::new());
    connect(&host, &neighbour);
    host.ip("route add unreachable 10.66.0.0/16");
    host.enter(async || {
        for target in ["10.9.0.2", "fd09::2", "127.0.0.1", "::1"] {
            let pinger = Pinger::new(target.parse().expect("an address")).expect("socket");
            for sequence in [1, 2, u16::MAX] {
                let outcome = pinger.ping(sequence, Duration::from_secs(2)).await.expect("sent");
                assert!(
                    matches!(outcome, Outcome::Reply(time) if time > Duration::ZERO),
                    "{target}: {outcome:?}"
                );
            }
        }
        let nobody = Pinger::new("10.9.0.200".parse().expect("an address")).expect("socket");
        let outcome = nobody.ping(1, Duration::from_millis(50)).await.expect("sent");
        assert_eq!(outcome, Outcome::Timeout);
        let unreachable = Pinger::new("10.66.0.1".parse().expect("an address")).expect("socket");
        assert_eq!(unreachable.ping(1, Duration::from_secs(1)).await.expect("sent"), Outcome::Unreachable);
    });
}
