//! Explicit congestion notification crosses the tunnel, RFC 6040.

use muster_integration_tests::{Host, Lab, LabError, Result, expect, scenario};

use crate::{
    site::{FAMILIES, Family, Plan, Site, nft},
    stream::transfer,
};

/// Packets that a named counter of nftables has counted.
fn counted(host: &Host, counter: &str) -> Result<u64> {
    let text = host.sh(&format!("nft list counter inet marks {counter}"))?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words
        .nth(1)
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| LabError::Command { command: counter.to_owned(), reason: text.clone() })
}

/// Counts on the router what alice sends outside, and at bob what arrives inside. `mark` is done to what the
/// router forwards from alice.
fn watch(site: &Site, outer: Family, mark: &str) -> Result {
    let ip = if outer == Family::V4 { "ip" } else { "ip6" };
    nft(
        site.router.host(),
        &format!(
            "table inet marks; delete table inet marks
             table inet marks {{
                 counter not_ect {{ }}; counter ect0 {{ }}; counter ect1 {{ }}
                 chain forward {{
                     type filter hook forward priority filter;
                     iifname != alice accept
                     {ip} ecn not-ect counter name not_ect
                     {ip} ecn ect0 counter name ect0
                     {ip} ecn ect1 counter name ect1
                     {mark}
                 }}
             }}"
        ),
    )?;
    nft(
        site.bob.host(),
        "table inet marks; delete table inet marks
         table inet marks {
             counter echo { }; counter ect0 { }; counter ect1 { }; counter ce { }; counter cwr { }
             chain input {
                 type filter hook input priority filter;
                 iifname != muster0 accept
                 icmp type echo-request counter name echo
                 icmpv6 type echo-request counter name echo
                 ip ecn ect0 counter name ect0
                 ip6 ecn ect0 counter name ect0
                 ip ecn ect1 counter name ect1
                 ip6 ecn ect1 counter name ect1
                 ip ecn ce counter name ce
                 ip6 ecn ce counter name ce
                 tcp flags & (syn|cwr) == cwr counter name cwr
             }
         }",
    )
}

#[test]
fn marks_cross_the_tunnel() {
    scenario("ECN over IPv4", |lab| marks(lab, Family::V4));
}

#[test]
fn marks_cross_the_tunnel_over_ipv6() {
    scenario("ECN over IPv6", |lab| marks(lab, Family::V6));
}

fn marks(lab: &Lab, outer: Family) -> Result {
    let site = Site::new(lab, Plan { outer, ..Plan::default() })?;
    let (alice, bob, router) = (site.alice.host(), site.bob.host(), site.router.host());
    let ip = if outer == Family::V4 { "ip" } else { "ip6" };
    for family in FAMILIES {
        let target = site.address(&site.bob, family)?;
        let ping = |ecn: u8| alice.try_sh(&format!("ping -c 3 -i 0.1 -W 1 -Q {ecn} {target}"));

        watch(&site, outer, "")?;
        for (ecn, counter) in [(2, "ect0"), (1, "ect1")] {
            ping(ecn)?;
            let (outside, inside) = (counted(router, counter)?, counted(bob, counter)?);
            expect((outside, inside) == (3, 3), counter, &format!("outside {outside}, inside {inside}"))?;
        }
        ping(0)?;
        expect(counted(router, "not_ect")? >= 3, "a packet without ECN stays so outside", "")?;
        let arrived = counted(bob, "echo")?;
        expect(
            (counted(bob, "ce")?, arrived) == (0, 9),
            "no marks without congestion",
            &arrived.to_string(),
        )?;

        watch(&site, outer, &format!("{ip} ecn != not-ect {ip} ecn set ce"))?;
        for ecn in [2, 1] {
            ping(ecn)?;
        }
        let marked = counted(bob, "ce")?;
        expect(marked == 6, "congestion on the way is told", &marked.to_string())?;

        // What does not understand the mark must not lose it: the packet is dropped instead.
        watch(&site, outer, &format!("{ip} ecn set ce"))?;
        let lost = ping(0)?;
        expect(!lost.status.success(), "dropped", &lost.stdout)?;
        expect(counted(bob, "echo")? == 0, "nothing arrives", "")?;
        ping(2)?;
        expect(counted(bob, "ce")? == 3, "ECN-capable packets still arrive", "")?;
    }
    Ok(())
}

#[test]
fn tcp_is_slowed_by_marks_and_arrives() {
    scenario("TCP with ECN", |lab| {
        let site = Site::new(lab, Plan::default())?;
        for agent in [&site.alice, &site.bob] {
            agent.host().sh("echo 1 > /proc/sys/net/ipv4/tcp_ecn")?;
        }
        for family in FAMILIES {
            watch(&site, Family::V4, "ip ecn ect0 numgen random mod 20 == 0 ip ecn set ce")?;
            transfer(&site, site.directions()[0], family, 8 << 20, || Ok(()))?;
            let bob = site.bob.host();
            for counter in ["ect0", "ce", "cwr"] {
                expect(counted(bob, counter)? > 0, counter, "none has arrived")?;
            }
        }
        Ok(())
    });
}
