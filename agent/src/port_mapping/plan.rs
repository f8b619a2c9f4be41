//! When the gateway is asked for a mapping, by which protocol, and when again: a state machine without I/O.

use std::{
    collections::{BTreeMap, VecDeque},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use muster_common::time::Instant;

/// What a gateway may grant: shorter leases would have it asked all the time, and of longer ones it may forget.
const LIFETIME: (Duration, Duration) = (Duration::from_secs(120), Duration::from_secs(86_400));
/// After a round without a mapping, before the next: at first, and at last after doubling.
const PAUSE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3_600));
/// Between attempts to renew at least.
const RENEWAL_PAUSE: Duration = Duration::from_secs(30);
/// From one round to another that is begun because the gateway may have forgotten the mapping.
const RECHECK_PAUSE: Duration = Duration::from_secs(30);

/// How a gateway is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// Port Control Protocol (RFC 6887).
    Pcp,
    /// NAT Port Mapping Protocol (RFC 6886).
    NatPmp,
    /// UPnP Internet Gateway Device.
    Upnp,
}

impl Protocol {
    /// All of them, the quickest and most exact first.
    pub const ALL: [Self; 3] = [Self::Pcp, Self::NatPmp, Self::Upnp];

    /// The word that status output and metrics use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pcp => "pcp",
            Self::NatPmp => "nat-pmp",
            Self::Upnp => "upnp",
        }
    }
}

/// The host's way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Of the gateway.
    pub address: Ipv4Addr,
    /// Of this host, as the gateway sees it.
    pub own: Ipv4Addr,
}

/// What a gateway has granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    /// What is sent there reaches the tunnel's port.
    pub(super) external: SocketAddr,
    /// From now.
    pub(super) lifetime: Duration,
}

/// What came of asking by a protocol last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It mapped this address.
    Mapped(SocketAddr),
    /// Why it did not.
    Failed(String),
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    protocol: Protocol,
    external: SocketAddr,
    ends_at: Instant,
}

/// See the module. Who asks calls [`Self::poll`], and tells what came of it with [`Self::answered`].
#[derive(Debug)]
pub(super) struct Plan {
    gateway: Option<Gateway>,
    mapping: Option<Mapping>,
    /// Protocols that this round has not tried yet.
    round: VecDeque<Protocol>,
    asked: Option<Protocol>,
    /// When the next round begins.
    round_at: Option<Instant>,
    last_round: Option<Instant>,
    pause: Duration,
    outcomes: BTreeMap<Protocol, Outcome>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            gateway: None,
            mapping: None,
            round: VecDeque::new(),
            asked: None,
            round_at: None,
            last_round: None,
            pause: PAUSE.0,
            outcomes: BTreeMap::new(),
        }
    }
}

impl Plan {
    /// The host's way out is this one; mappings of another are of no use. What is being asked is void, and asked again
    /// if this is still the same.
    pub(super) fn set_gateway(&mut self, gateway: Option<Gateway>, now: Instant) {
        if gateway != self.gateway {
            *self = Self { gateway, round_at: gateway.map(|_| now), ..Self::default() };
        } else if let Some(protocol) = self.asked.take() {
            self.round.push_front(protocol);
        }
    }

    /// The gateway may have forgotten the mapping: this host is seen at another address from outside.
    pub(super) fn recheck(&mut self, now: Instant) {
        if self.mapping.is_some() && self.asked.is_none() {
            let soonest = self.last_round.map_or(now, |last| now.max(last + RECHECK_PAUSE));
            self.round_at = Some(self.round_at.map_or(soonest, |at| at.min(soonest)));
        }
    }

    /// What to ask of whom now. Nothing while something is asked.
    pub(super) fn poll(&mut self, now: Instant) -> Option<(Protocol, Gateway)> {
        let gateway = self.gateway?;
        if self.mapping.is_some_and(|mapping| mapping.ends_at <= now) {
            self.mapping = None;
        }
        if self.asked.is_some() {
            return None;
        }
        if self.round_at.is_some_and(|at| at <= now) {
            self.round_at = None;
            self.last_round = Some(now);
            // What worked is renewed; by another protocol it would be another mapping.
            let first = self.mapping.map(|mapping| mapping.protocol);
            let others = Protocol::ALL.into_iter().filter(|protocol| Some(*protocol) != first);
            self.round = first.into_iter().chain(others).collect();
        }
        self.asked = self.round.pop_front();
        self.asked.map(|protocol| (protocol, gateway))
    }

    /// What came of asking by `protocol`.
    pub(super) fn answered(&mut self, protocol: Protocol, answer: Result<Lease, String>, now: Instant) {
        if self.asked.take() != Some(protocol) {
            return;
        }
        let answer = answer.and_then(|lease| match is_reachable(lease.external) {
            true => Ok(lease),
            false => Err(format!("it names {}, where nobody can be reached", lease.external)),
        });
        match answer {
            Ok(Lease { external, lifetime }) => {
                let lifetime = lifetime.clamp(LIFETIME.0, LIFETIME.1);
                self.mapping = Some(Mapping { protocol, external, ends_at: now + lifetime });
                self.outcomes.insert(protocol, Outcome::Mapped(external));
                self.round.clear();
                self.round_at = Some(now + lifetime / 2);
                self.pause = PAUSE.0;
            }
            Err(reason) => {
                self.outcomes.insert(protocol, Outcome::Failed(reason));
                if self.round.is_empty() {
                    self.round_at = Some(now + self.next_pause(now));
                }
            }
        }
    }

    /// Half of what is left of a lease (RFC 6887, 11.2.1), or ever longer without one.
    fn next_pause(&mut self, now: Instant) -> Duration {
        if let Some(mapping) = &self.mapping {
            return ((mapping.ends_at - now) / 2).max(RENEWAL_PAUSE);
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(PAUSE.1);
        pause
    }

    /// When [`Self::poll`] is to be called next.
    pub(super) fn timeout(&self) -> Option<Instant> {
        let ends_at = self.mapping.map(|mapping| mapping.ends_at);
        let round_at = self.round_at.filter(|_| self.asked.is_none());
        ends_at.into_iter().chain(round_at).min()
    }

    /// What is mapped to the tunnel, and by which protocol.
    pub(super) fn mapping(&self) -> Option<(Protocol, SocketAddr)> {
        self.mapping.map(|mapping| (mapping.protocol, mapping.external))
    }

    /// Whom is asked.
    pub(super) const fn gateway(&self) -> Option<Gateway> {
        self.gateway
    }

    /// What came of each protocol last; nothing of those that were not needed.
    pub(super) const fn outcomes(&self) -> &BTreeMap<Protocol, Outcome> {
        &self.outcomes
    }
}

/// Whether somebody might be reached there. A private address may be one behind another NAT, and of use to those who are
/// there, too.
fn is_reachable(external: SocketAddr) -> bool {
    let ip = external.ip();
    let is_local = matches!(ip, IpAddr::V4(ip) if ip.is_link_local() || ip.is_broadcast());
    external.port() != 0 && !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || is_local)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GATEWAY: Gateway =
        Gateway { address: Ipv4Addr::new(192, 168, 1, 1), own: Ipv4Addr::new(192, 168, 1, 7) };

    fn lease(seconds: u64) -> Result<Lease, String> {
        let external = "203.0.113.9:7551".parse().unwrap();
        Ok(Lease { external, lifetime: Duration::from_secs(seconds) })
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(1_000 + seconds))
    }

    /// A plan of a host with a gateway, asked by each protocol in vain or until one gives.
    fn round(plan: &mut Plan, now: Instant, giving: Option<(Protocol, u64)>) -> Vec<Protocol> {
        let mut asked = Vec::new();
        while let Some((protocol, gateway)) = plan.poll(now) {
            assert_eq!(gateway, GATEWAY);
            assert_eq!(plan.poll(now), None, "one at a time");
            asked.push(protocol);
            let answer = match giving {
                Some((gives, seconds)) if gives == protocol => lease(seconds),
                _ => Err("no answer".into()),
            };
            plan.answered(protocol, answer, now);
        }
        asked
    }

    fn plan() -> Plan {
        let mut plan = Plan::default();
        assert_eq!((plan.poll(at(0)), plan.timeout()), (None, None), "nobody to ask");
        plan.set_gateway(Some(GATEWAY), at(0));
        plan
    }

    #[test]
    fn protocols_are_tried_in_turn_and_ever_more_seldom() {
        let mut plan = plan();
        assert_eq!(round(&mut plan, at(0), None), Protocol::ALL);
        assert_eq!(plan.outcomes().len(), 3);
        let mut now = at(0);
        for pause in [60, 120, 240, 480, 960, 1_920, 3_600, 3_600] {
            assert_eq!(plan.timeout(), Some(now + Duration::from_secs(pause)));
            assert_eq!(plan.poll(now + Duration::from_secs(pause - 1)), None);
            now += Duration::from_secs(pause);
            assert_eq!(round(&mut plan, now, None), Protocol::ALL);
        }
    }

    #[test]
    fn a_mapping_is_renewed_at_half_its_lease_by_the_protocol_that_gave_it() {
        let mut plan = plan();
        let giving = Some((Protocol::NatPmp, 7_200));
        assert_eq!(round(&mut plan, at(0), giving), [Protocol::Pcp, Protocol::NatPmp]);
        let mapped = Some((Protocol::NatPmp, "203.0.113.9:7551".parse().unwrap()));
        assert_eq!((plan.mapping(), plan.timeout()), (mapped, Some(at(3_600))));
        assert_eq!(round(&mut plan, at(3_600), giving), [Protocol::NatPmp]);
        assert_eq!(plan.timeout(), Some(at(7_200)));
        // A gateway that does not answer keeps what it has given until that ends.
        assert_eq!(round(&mut plan, at(7_200), None), [Protocol::NatPmp, Protocol::Pcp, Protocol::Upnp]);
        assert_eq!((plan.mapping(), plan.timeout()), (mapped, Some(at(9_000))));
        assert_eq!(round(&mut plan, at(9_000), None).len(), 3);
        assert_eq!(plan.timeout(), Some(at(9_900)));
        assert_eq!(round(&mut plan, at(10_799), None).len(), 3);
        assert_eq!((plan.mapping(), plan.timeout()), (mapped, Some(at(10_800))));
        assert_eq!(plan.poll(at(10_800)), None);
        assert_eq!((plan.mapping(), plan.timeout()), (None, Some(at(10_829))));
    }

    #[test]
    fn another_gateway_is_asked_at_once_and_what_the_old_one_says_is_void() {
        let mut plan = plan();
        let asked = plan.poll(at(0)).unwrap().0;
        let other = Gateway { own: Ipv4Addr::new(192, 168, 1, 8), ..GATEWAY };
        plan.set_gateway(Some(other), at(1));
        plan.answered(asked, lease(7_200), at(1));
        assert_eq!(plan.mapping(), None);
        assert_eq!(plan.poll(at(1)), Some((Protocol::Pcp, other)));
        plan.answered(Protocol::Pcp, lease(7_200), at(1));
        plan.set_gateway(Some(other), at(2));
        assert!(plan.mapping().is_some(), "nothing has changed");
        let asked = plan.poll(at(3_601)).unwrap().0;
        plan.set_gateway(Some(other), at(3_602));
        assert_eq!(plan.poll(at(3_602)), Some((asked, other)), "it is asked again");
        plan.answered(asked, lease(7_200), at(3_602));
        plan.set_gateway(None, at(3_603));
        assert_eq!((plan.mapping(), plan.poll(at(3_603)), plan.timeout()), (None, None, None));
    }

    #[test]
    fn a_gateway_that_may_have_forgotten_is_asked_but_not_all_the_time() {
        let mut plan = plan();
        let giving = Some((Protocol::Upnp, 7_200));
        round(&mut plan, at(0), giving);
        plan.recheck(at(10));
        assert_eq!(plan.timeout(), Some(at(30)));
        assert_eq!(round(&mut plan, at(30), giving), [Protocol::Upnp]);
        plan.recheck(at(200));
        assert_eq!(plan.timeout(), Some(at(200)));
        let mut without = self::plan();
        round(&mut without, at(0), None);
        without.recheck(at(1));
        assert_eq!(without.timeout(), Some(at(60)), "there is nothing to forget");
    }

    #[test]
    fn what_a_gateway_claims_is_checked() {
        for external in ["0.0.0.0:7551", "127.0.0.1:7551", "224.0.0.1:7551", "203.0.113.9:0", "169.254.1.1:9"]
        {
            let mut plan = plan();
            plan.poll(at(0)).unwrap();
            let lie = Lease { external: external.parse().unwrap(), lifetime: Duration::from_secs(7_200) };
            plan.answered(Protocol::Pcp, Ok(lie), at(0));
            assert_eq!(plan.mapping(), None, "{external}");
            assert!(
                matches!(&plan.outcomes()[&Protocol::Pcp], Outcome::Failed(why) if why.contains("nobody"))
            );
        }
        // Neither a lease of no time at all nor one for ever.
        for (given, renewed) in [(0, 60), (u64::from(u32::MAX), 43_200)] {
            let mut plan = plan();
            plan.poll(at(0)).unwrap();
            plan.answered(Protocol::Pcp, lease(given), at(0));
            assert_eq!(plan.timeout(), Some(at(renewed)));
        }
    }

    proptest! {
        /// Whatever gateways do, no more than three questions are asked within any half minute, unless the gateway changes.
        #[test]
        fn gateways_are_never_flooded(answers in prop::collection::vec((0..4_u8, 0..10_000_u64), 1..60)) {
            let mut plan = plan();
            let mut now = at(0);
            let mut asked: Vec<Instant> = Vec::new();
            for (answer, seconds) in answers {
                while let Some((protocol, _)) = plan.poll(now) {
                    asked.push(now);
                    let answer = if answer == 0 { lease(seconds) } else { Err("no".into()) };
                    plan.answered(protocol, answer, now);
                }
                if answer == 1 {
                    plan.recheck(now);
                }
                now = plan.timeout().expect("there is always another time");
            }
            for window in asked.windows(4) {
                prop_assert!(window[3] - window[0] >= Duration::from_secs(29), "{:?}", window);
            }
        }
    }
}
