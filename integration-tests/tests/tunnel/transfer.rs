//! What is sent arrives: over TCP 1 GiB in all, and UDP datagrams.

use muster_integration_tests::{Lab, Result, expect, scenario};

use crate::{
    datagrams::{Sender, exchange},
    site::{FAMILIES, Family, Plan, Site},
    stream::transfer,
    wire::{BadWire, Faults},
};

/// Of all that is sent over TCP by the tests of this file.
const TOTAL: usize = 1 << 30;
const ASSORTED: Sender = Sender::Singly { shortest: 8, longest: 1_392 };

/// Sends `len` octets in each direction over both families, and some datagrams.
fn everywhere(site: &Site, len: usize) -> Result {
    for family in FAMILIES {
        for direction in site.directions() {
            transfer(site, direction, family, len, || Ok(()))?;
        }
        let seen = exchange(site, site.directions()[0], family, 1, 5_000, ASSORTED)?;
        expect(seen.received == 5_000 && seen.late == 0, "all datagrams, in order", &format!("{seen:?}"))?;
    }
    Ok(())
}

#[test]
fn with_offloads() {
    scenario("transfer with offloads", |lab| {
        let site = Site::new(lab, Plan::default())?;
        everywhere(&site, TOTAL / 12)
    });
}

#[test]
fn through_a_tunnel_over_ipv6() {
    scenario("transfer over IPv6", |lab| {
        let site = Site::new(lab, Plan { outer: Family::V6, ..Plan::default() })?;
        everywhere(&site, TOTAL / 64)
    });
}

#[test]
fn without_offloads() {
    scenario("transfer without offloads", |lab| {
        let site = Site::new(lab, Plan { offloads: [false; 2], ..Plan::default() })?;
        expect(!Site::has_offloads(&site.alice)?, "no offloads", "on")?;
        everywhere(&site, TOTAL / 32)
    });
}

#[test]
fn with_offloads_at_one_end() {
    scenario("transfer with offloads at one end", |lab| {
        let site = Site::new(lab, Plan { offloads: [true, false], ..Plan::default() })?;
        let at = [Site::has_offloads(&site.alice)?, Site::has_offloads(&site.bob)?];
        expect(at == [true, false], "offloads at one end", &format!("{at:?}"))?;
        everywhere(&site, TOTAL / 64)
    });
}

#[test]
fn while_offloads_come_and_go() {
    scenario("downgrade in mid-flow", |lab| {
        let site = Site::new(lab, Plan::default())?;
        let at_both = |script: &str| -> Result {
            for agent in [&site.alice, &site.bob] {
                agent.host().sh(&format!("PATH=$PATH:/usr/sbin:/sbin; {script}"))?;
            }
            Ok(())
        };
        let (off, on) = ("tso off gso off gro off tx-udp-segmentation off", "tso on gso on gro on");
        for (family, direction) in FAMILIES.into_iter().zip(site.directions()) {
            // The kernel no longer hands over, nor takes, batches at the tunnel's interface, and then does again.
            for features in [off, on] {
                transfer(&site, direction, family, TOTAL / 64, || {
                    at_both(&format!("ethtool -K muster0 {features}"))
                })?;
                let has = Site::has_offloads(&site.alice)?;
                expect(has == (features == on), "offloads are switched", features)?;
            }
            // Nor at the network card's.
            for features in [off, on] {
                transfer(&site, direction, family, TOTAL / 64, || {
                    at_both(&format!("ethtool -K eth0 {features}"))
                })?;
            }
        }
        Ok(())
    });
}

#[test]
fn while_the_cable_becomes_too_narrow_for_segments() {
    scenario("narrowed in mid-flow", |lab| {
        let site = Site::new(lab, Plan::default())?;
        let [direction, _] = site.directions();
        for family in FAMILIES {
            // From now on the kernel refuses what the agent hands over in runs: each datagram is fragmented.
            for mtu in [1300, 1500] {
                transfer(&site, direction, family, TOTAL / 64, || {
                    let set = |name: &str| format!("ip link set {name} mtu {mtu}");
                    site.router.host().sh(&format!("{}; {}", set("alice"), set("bob")))?;
                    site.alice.host().sh(&set("eth0"))?;
                    site.bob.host().sh(&set("eth0")).map(drop)
                })?;
            }
        }
        Ok(())
    });
}

/// The order of datagrams has a test of its own.
#[test]
fn with_several_threads() {
    scenario("threads", |lab| {
        let site = Site::new(lab, Plan { threads: 4, ..Plan::default() })?;
        for family in FAMILIES {
            for direction in site.directions() {
                transfer(&site, direction, family, TOTAL / 4, || Ok(()))?;
            }
        }
        Ok(())
    });
}

#[test]
fn over_narrow_cables() {
    scenario("cables of 1,280 octets", |lab| narrow(lab, Family::V4));
}

#[test]
fn over_narrow_cables_over_ipv6() {
    scenario("cables of 1,280 octets, over IPv6", |lab| narrow(lab, Family::V6));
}

/// Packets of 1,280 octets do not fit cables of 1,280, once they are sealed.
fn narrow(lab: &Lab, outer: Family) -> Result {
    let site = Site::new(lab, Plan { cable_mtu: 1280, mtu: 1280, outer, ..Plan::default() })?;
    for family in FAMILIES {
        for direction in site.directions() {
            transfer(&site, direction, family, TOTAL / 128, || Ok(()))?;
        }
        let sender = Sender::Singly { shortest: 8, longest: 1_232 };
        let seen = exchange(&site, site.directions()[1], family, 1, 5_000, sender)?;
        expect(seen.received == 5_000 && seen.late == 0, "all datagrams, in order", &format!("{seen:?}"))?;
    }
    Ok(())
}

#[test]
fn over_wide_cables() {
    scenario("cables of 9,000 octets", |lab| {
        let site = Site::new(lab, Plan { cable_mtu: 9000, ..Plan::default() })?;
        let link = site.alice.host().sh("ip link show dev muster0")?;
        expect(link.contains("mtu 8920 "), "the interface as wide as the cables allow", &link)?;
        everywhere(&site, TOTAL / 32)?;
        let sender = Sender::Singly { shortest: 1_400, longest: 8_872 };
        let seen = exchange(&site, site.directions()[1], Family::V6, 1, 2_000, sender)?;
        expect(seen.received == 2_000 && seen.late == 0, "all datagrams, in order", &format!("{seen:?}"))
    });
}

#[test]
fn over_a_wire_that_loses_and_reorders() {
    scenario("bad wire", |lab| bad_wire(lab, Family::V4));
}

#[test]
fn over_a_wire_that_loses_and_reorders_over_ipv6() {
    scenario("bad wire, over IPv6", |lab| bad_wire(lab, Family::V6));
}

fn bad_wire(lab: &Lab, outer: Family) -> Result {
    let site = Site::new(lab, Plan { outer, ..Plan::default() })?;
    let wire = BadWire::new(&site, Faults { lost: 300, repeated: 200, delayed: 50 })?;
    for (family, direction) in FAMILIES.into_iter().zip(site.directions()) {
        transfer(&site, direction, family, TOTAL / 64, || Ok(()))?;
    }
    for family in FAMILIES {
        let seen = exchange(&site, site.directions()[0], family, 2, 5_000, ASSORTED)?;
        // What the wire repeats, the tunnel does not: no more arrive than were sent.
        let enough = (9_000..10_000).contains(&seen.received);
        expect(enough && seen.late > 0, "most datagrams, some of them late", &format!("{seen:?}"))?;
    }
    expect(wire.delayed() > 100, "the wire has reordered", &wire.delayed().to_string())
}
