//! Where the wire keeps order, so does the tunnel.

use muster_integration_tests::{Result, expect, scenario};

use crate::{
    datagrams::{Sender, exchange},
    site::{FAMILIES, Plan, Site},
};

/// Datagrams in each case.
const COUNT: u64 = 40_000;

/// The longest payload that takes no fragments here, and one that takes some of IPv6.
const UNFRAGMENTED: usize = 1_372;
const FRAGMENTED: usize = 1_392;

fn in_order(site: &Site, longest: usize) -> Result {
    let senders = [
        Sender::Singly { shortest: 18, longest: 18 },
        Sender::Singly { shortest: 8, longest },
        Sender::Runs { datagrams: 50, len: 64 },
        Sender::Runs { datagrams: 40, len: 1_200 },
    ];
    for (family, direction) in FAMILIES.into_iter().zip(site.directions()) {
        for sender in senders {
            for flows in [1, 4] {
                let count = COUNT / flows as u64;
                let seen = exchange(site, direction, family, flows, count, sender)?;
                let what = format!("order of {flows} flows over {family:?}, {sender:?}");
                expect(seen.late == 0, &what, &format!("{seen:?}"))?;
                expect(seen.received >= COUNT * 99 / 100, &what, &format!("{seen:?}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn order_is_kept() {
    scenario("order", |lab| in_order(&Site::new(lab, Plan::default())?, FRAGMENTED));
}

#[test]
fn order_is_kept_without_offloads() {
    scenario("order without offloads", |lab| {
        in_order(&Site::new(lab, Plan { offloads: [false; 2], ..Plan::default() })?, FRAGMENTED)
    });
}

/// But for fragments: those say nothing of ports, so that the kernel does not know what flow they are of.
#[test]
fn order_is_kept_by_several_threads() {
    scenario("order with threads", |lab| {
        in_order(&Site::new(lab, Plan { threads: 4, ..Plan::default() })?, UNFRAGMENTED)
    });
}
