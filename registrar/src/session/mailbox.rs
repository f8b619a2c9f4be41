//! What waits to be sent to one session. It holds no messages, only what they will be about: they are made when they
//! are sent, so that they are never out of date, and many changes of one peer are one message. So it is bounded by
//! the peers that are held, however slow the session is.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use muster_common::time::Instant;
use uuid::Uuid;

use crate::store::Revision;

/// The most peers that one session may hold.
pub const HELD_MAX: usize = 65_536;
/// The most Services that one session may hold the names of.
pub const SERVICES_MAX: usize = 4096;
/// Introductions that wait. More are not made: the peers' first packets will tell.
const INTRODUCTIONS_MAX: usize = 1024;
/// A peer is introduced once within this time.
const INTRODUCE_AGAIN: Duration = Duration::from_secs(5);
/// Different peers that are introduced within [`INTRODUCE_AGAIN`].
const INTRODUCED_MAX: usize = 1024;

/// Why a session is ended by the registrar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The device was deleted or has left.
    Gone,
    /// The device was revoked.
    Revoked,
    /// The device has opened another session.
    Replaced,
    /// The device has registered as something else. If that was a late word of an earlier life of its agent, this one has
    /// to register again.
    Reregistered,
    /// The registrar stops.
    Shutdown,
}

/// Where an agent is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away {
    /// At a random moment within this time.
    pub within: Duration,
    /// To one of these registrars, `host:port`; to any other one if there is none.
    pub to: Arc<[String]>,
}

/// What a message is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// The session ends.
    End(End),
    /// The device's own configuration.
    Config,
    /// The roots to trust.
    Roots,
    /// The agent is to go to another registrar.
    Drain(Away),
    /// A peer that is about to reach the device.
    Introduction(Uuid),
    /// A held peer that has changed.
    Peer(Uuid),
    /// A held Service that is answered for differently, by its key.
    Service(Arc<str>),
    /// The Services that have virtual IPs.
    VirtualServices,
    /// What the agent has to probe.
    Probes,
    /// Everything up to this revision has been sent.
    Bookmark(Revision),
}

/// What waits to be sent, and which peers and Services are held.
#[derive(Debug, Default)]
pub struct Mailbox {
    held: HashSet<Uuid>,
    end: Option<End>,
    config: bool,
    roots: bool,
    drain: Option<Away>,
    introductions: VecDeque<Uuid>,
    introduced: HashMap<Uuid, Instant>,
    peers: VecDeque<Uuid>,
    waiting: HashSet<Uuid>,
    /// The Services that are held, by key, and whether a change of each waits.
    services: BTreeMap<Arc<str>, bool>,
    changed: VecDeque<Arc<str>>,
    /// Whether the device asks for Services that have virtual IPs.
    watches_virtual_services: bool,
    virtual_services: bool,
    probes: bool,
    bookmark: Option<Revision>,
}

impl Mailbox {
    /// Ends the session; nothing else is sent any more, nor kept for it. The first reason counts. Returns the peers
    /// and Services that were held.
    pub fn end(&mut self, reason: End) -> (Vec<Uuid>, Vec<Arc<str>>) {
        let held = (self.held(), self.held_services());
        let end = Some(*self.end.get_or_insert(reason));
        *self = Self { end, ..Self::default() };
        held
    }

    /// The configuration has changed.
    pub fn config(&mut self) {
        self.config = true;
    }

    /// The roots have changed.
    pub fn roots(&mut self) {
        self.roots = true;
    }

    /// The agent is to go to another registrar.
    pub fn drain(&mut self, away: Away) {
        self.drain = Some(away);
    }

    /// A peer is about to reach the device.
    pub fn introduce(&mut self, peer: Uuid, now: Instant) {
        if self.end.is_some() || self.introduced.get(&peer).is_some_and(|at| now - *at < INTRODUCE_AGAIN) {
            return;
        }
        if self.introduced.len() >= INTRODUCED_MAX {
            self.introduced.retain(|_, at| now - *at < INTRODUCE_AGAIN);
            if self.introduced.len() >= INTRODUCED_MAX {
                return;
            }
        }
        if self.introductions.len() >= INTRODUCTIONS_MAX {
            return;
        }
        self.introduced.insert(peer, now);
        self.introductions.push_back(peer);
    }

    /// A peer has changed: it is sent if it is held.
    pub fn peer(&mut self, peer: Uuid) {
        if self.held.contains(&peer) && self.waiting.insert(peer) {
            self.peers.push_back(peer);
        }
    }

    /// All peers that are held may have changed.
    pub fn all_peers(&mut self) {
        let mut held: Vec<Uuid> = self.held.iter().copied().collect();
        held.sort_unstable();
        held.into_iter().for_each(|peer| self.peer(peer));
    }

    /// The device asks for the Services that have virtual IPs.
    pub fn watch_virtual_services(&mut self) {
        self.watches_virtual_services = true;
        self.virtual_services = true;
    }

    /// The Services that have virtual IPs have changed, or there is more to be sent of them. Says whether the device asks
    /// for them.
    pub fn virtual_services(&mut self) -> bool {
        self.virtual_services = self.watches_virtual_services;
        self.virtual_services
    }

    /// What the agent has to probe may have changed.
    pub fn probes(&mut self) {
        self.probes = true;
    }

    /// Once what waits now has been sent, everything up to `revision` has.
    pub fn bookmark(&mut self, revision: Revision) {
        self.bookmark = self.bookmark.max(Some(revision));
    }

    /// Holds a peer; says whether that is new. `None` if too many are held.
    pub fn hold(&mut self, peer: Uuid) -> Option<bool> {
        if self.end.is_some() || self.held.contains(&peer) {
            return Some(false);
        }
        (self.held.len() < HELD_MAX).then(|| self.held.insert(peer))
    }

    /// Holds a peer no longer; says whether it was held.
    pub fn release(&mut self, peer: Uuid) -> bool {
        self.held.remove(&peer)
    }

    /// The peers that are held, in order.
    pub fn held(&self) -> Vec<Uuid> {
        let mut held: Vec<Uuid> = self.held.iter().copied().collect();
        held.sort_unstable();
        held
    }

    /// Holds the name of a Service; says whether that is new. `None` if too many are held.
    pub fn hold_service(&mut self, service: &Arc<str>) -> Option<bool> {
        if self.end.is_some() || self.services.contains_key(service) {
            return Some(false);
        }
        (self.services.len() < SERVICES_MAX).then(|| self.services.insert(service.clone(), false).is_none())
    }

    /// Holds the name of a Service no longer; says whether it was held.
    pub fn release_service(&mut self, service: &str) -> bool {
        self.services.remove(service).is_some()
    }

    /// The Services that are held, in order.
    pub fn held_services(&self) -> Vec<Arc<str>> {
        self.services.keys().cloned().collect()
    }

    /// A Service is answered for differently: that is sent if it is held.
    pub fn service(&mut self, service: &str) {
        let Some((held, _)) = self.services.get_key_value(service) else { return };
        let held = held.clone();
        if let Some(waits) = self.services.get_mut(service)
            && !std::mem::replace(waits, true)
        {
            self.changed.push_back(held);
        }
    }

    /// What to send next.
    pub fn pop(&mut self) -> Option<Item> {
        if let Some(reason) = self.end {
            return Some(Item::End(reason));
        }
        if std::mem::take(&mut self.config) {
            return Some(Item::Config);
        }
        if std::mem::take(&mut self.roots) {
            return Some(Item::Roots);
        }
        if let Some(away) = self.drain.take() {
            return Some(Item::Drain(away));
        }
        if let Some(peer) = self.introductions.pop_front() {
            return Some(Item::Introduction(peer));
        }
        if let Some(peer) = self.peers.pop_front() {
            self.waiting.remove(&peer);
            return Some(Item::Peer(peer));
        }
        if std::mem::take(&mut self.probes) {
            return Some(Item::Probes);
        }
        if std::mem::take(&mut self.virtual_services) {
            return Some(Item::VirtualServices);
        }
        while let Some(service) = self.changed.pop_front() {
            // Those that were released meanwhile are passed over.
            if let Some(waits) = self.services.get_mut(&service)
                && std::mem::take(waits)
            {
                return Some(Item::Service(service));
            }
        }
        self.bookmark.take().map(Item::Bookmark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(mailbox: &mut Mailbox) -> Vec<Item> {
        std::iter::from_fn(|| mailbox.pop()).collect()
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    #[test]
    fn changes_of_held_peers_are_sent_once_and_before_the_bookmark() {
        let (a, b, c) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let mut mailbox = Mailbox::default();
        assert_eq!(
            (mailbox.hold(a), mailbox.hold(a), mailbox.hold(b)),
            (Some(true), Some(false), Some(true))
        );
        for (peer, revision) in [(a, 5), (b, 6), (a, 7), (c, 8)] {
            mailbox.peer(peer);
            mailbox.bookmark(revision);
        }
        mailbox.config();
        assert_eq!(drain(&mut mailbox), [Item::Config, Item::Peer(a), Item::Peer(b), Item::Bookmark(8)]);
        assert!(mailbox.release(a));
        mailbox.peer(a);
        assert!(drain(&mut mailbox).is_empty());
    }

    #[test]
    fn changes_of_held_services_are_sent_once_and_before_the_bookmark() {
        let mut mailbox = Mailbox::default();
        let (web, db): (Arc<str>, Arc<str>) = ("default/web".into(), "default/db".into());
        assert_eq!(
            (mailbox.hold_service(&web), mailbox.hold_service(&web), mailbox.hold_service(&db)),
            (Some(true), Some(false), Some(true))
        );
        for service in ["default/web", "default/db", "default/web", "default/other"] {
            mailbox.service(service);
            mailbox.bookmark(5);
        }
        let sent = [Item::Service(web.clone()), Item::Service(db.clone()), Item::Bookmark(5)];
        assert_eq!(drain(&mut mailbox), sent);
        mailbox.service("default/web");
        assert!(mailbox.release_service("default/web"));
        assert!(drain(&mut mailbox).is_empty());
        // Held again: what waited before it was released is not sent twice.
        mailbox.hold_service(&web);
        mailbox.service("default/web");
        mailbox.service("default/web");
        assert_eq!(drain(&mut mailbox), [Item::Service(web)]);
        for n in 0..SERVICES_MAX {
            mailbox.hold_service(&format!("default/s{n}").into());
        }
        assert_eq!(mailbox.hold_service(&"default/more".into()), None);
        assert_eq!(mailbox.end(End::Gone).1.len(), SERVICES_MAX);
    }

    #[test]
    fn introductions_are_deduplicated_and_bounded() {
        let mut mailbox = Mailbox::default();
        let peer = Uuid::from_u128;
        mailbox.introduce(peer(1), at(0));
        mailbox.introduce(peer(1), at(4));
        assert_eq!(drain(&mut mailbox), [Item::Introduction(peer(1))]);
        mailbox.introduce(peer(1), at(5));
        assert_eq!(drain(&mut mailbox), [Item::Introduction(peer(1))]);
        // A flood of lookups by many is cut off while the session keeps up …
        for n in 0..5000 {
            mailbox.introduce(peer(n), at(20));
            mailbox.pop();
        }
        assert!(mailbox.introduced.len() <= INTRODUCED_MAX);
        // … and while it does not read; all else goes on.
        for n in 0..5000 {
            mailbox.introduce(peer(n), at(40 + u64::try_from(n).unwrap()));
        }
        assert!(mailbox.introductions.len() <= INTRODUCTIONS_MAX);
        assert_eq!(drain(&mut mailbox).len(), INTRODUCTIONS_MAX);
    }

    #[test]
    fn nothing_follows_the_end() {
        let mut mailbox = Mailbox::default();
        mailbox.config();
        mailbox.end(End::Revoked);
        mailbox.end(End::Gone);
        assert_eq!(mailbox.pop(), Some(Item::End(End::Revoked)));
        assert_eq!(mailbox.pop(), Some(Item::End(End::Revoked)));
    }
}
