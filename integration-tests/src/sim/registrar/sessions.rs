//! The sessions of a registrar: the real mailboxes, in a played shell that does what `session` does.

use std::{net::SocketAddr, time::Duration};

use muster_agent::control::Failure;
use muster_proto::registration::{
    Bookmark, Drain, Introduction, PeerChanged, PeerRemoved, SessionHello, SessionResponse, session_request,
    session_response::Message,
};
use muster_registrar::{
    registry::{
        Applied, Change, Device,
        device::Outside,
        plan::register,
        view::{is_configured_differently, is_registered_differently, is_seen_differently},
    },
    session::mailbox::{End, Item, Mailbox},
    store::Revision,
};
use rand::RngExt as _;
use uuid::Uuid;

use super::{CATCH_UP, Registrar, jobs::Origin};
use crate::sim::{
    Checked, Violation,
    connections::{Down, Up},
    links::Node,
    requests::{NETWORK, Refusal, Reply, Request, address, outside},
    world::{Event, World},
};

/// An open session, or one whose hello waits for the index.
#[derive(Debug)]
pub(in crate::sim) struct Session {
    pub(super) uid: Uuid,
    pub(super) mailbox: Mailbox,
    pub(super) greeting: Option<SessionHello>,
    writing: bool,
    endpoints: Option<(Vec<SocketAddr>, Option<Outside>)>,
    /// When it was greeted.
    pub(in crate::sim) since: Option<Duration>,
}

impl Registrar {
    /// Tells all whom it concerns what has changed, as the hub does.
    pub(super) fn changed(&mut self, applied: &Applied) {
        for change in &applied.changes {
            match change {
                Change::Device { old, new } => {
                    self.device_changed(old.as_deref(), new.as_deref(), applied.revision);
                }
                Change::Network { .. } | Change::Director { .. } => {
                    for session in self.sessions.values_mut().filter(|s| s.greeting.is_none()) {
                        session.mailbox.config();
                        session.mailbox.all_peers();
                    }
                }
                // There are no Services, and no subnets of sites, in the simulation.
                Change::Token { .. }
                | Change::Carrier { .. }
                | Change::Registrar { .. }
                | Change::RegistrarRecord { .. }
                | Change::Namespace { .. }
                | Change::Service { .. }
                | Change::EndpointSlice { .. }
                | Change::Presence { .. } => {}
            }
        }
    }

    fn device_changed(&mut self, old: Option<&Device>, new: Option<&Device>, revision: Revision) {
        let Some(device) = new.or(old).map(|device| device.uid) else { return };
        let own = self.by_device.get(&device).and_then(|id| self.sessions.get_mut(id));
        if let Some(own) = own.map(|session| &mut session.mailbox) {
            match (old, new) {
                (_, None) => {
                    own.end(End::Gone);
                }
                (_, Some(new)) if new.revoked => {
                    own.end(End::Revoked);
                }
                (Some(old), Some(new)) if is_registered_differently(old, new) => {
                    own.end(End::Reregistered);
                }
                (Some(old), Some(new)) => {
                    if is_configured_differently(old, new) {
                        own.config();
                    }
                    if old.namespace != new.namespace || old.labels() != new.labels() {
                        own.all_peers();
                    }
                }
                (None, Some(_)) => own.config(),
            }
        }
        if matches!((old, new), (Some(old), Some(new)) if !is_seen_differently(old, new)) {
            return;
        }
        for session in self.sessions.values_mut() {
            if session.mailbox.held().contains(&device) {
                session.mailbox.peer(device);
                session.mailbox.bookmark(revision);
            }
        }
    }

    pub(super) fn close(&mut self, connection: u64) {
        if let Some(session) = self.sessions.remove(&connection)
            && self.by_device.get(&session.uid) == Some(&connection)
        {
            self.by_device.remove(&session.uid);
        }
    }
}

impl World {
    pub(in crate::sim) fn on_up(&mut self, connection: u64, message: Up) -> Checked {
        let Some(c) = self.connections.get(&connection) else { return Ok(()) };
        let (r, life, uid, host, doomed) = (c.registrar, c.registrar_life, c.uid, c.host, c.doomed);
        if !self.is_alive(r, life) {
            return Ok(());
        }
        let message = match message {
            Up::Hangup => {
                self.registrars[r].close(connection);
                return Ok(());
            }
            _ if doomed => return Ok(()),
            _ if !self.links.is_open(Node::Host(host), Node::Registrar(r)) => {
                self.doom(connection);
                return Ok(());
            }
            Up::Open(hello) => {
                match register::find(&self.registrars[r].index, NETWORK, uid) {
                    Err(error) => {
                        let refused = Failure::Refused(error.to_string());
                        self.send_down(connection, Down::Closed(refused));
                    }
                    Ok(_) => {
                        self.send_down(connection, Down::Opened);
                        let late = hello.revision > self.registrars[r].index.revision();
                        let session = Session {
                            uid,
                            mailbox: Mailbox::default(),
                            greeting: Some(hello),
                            writing: false,
                            endpoints: None,
                            since: None,
                        };
                        self.registrars[r].sessions.insert(connection, session);
                        if late {
                            self.after(CATCH_UP, Event::Greet { registrar: r, life, connection });
                        } else {
                            self.greet(r, connection, false)?;
                        }
                    }
                }
                self.flush_sessions(r);
                return Ok(());
            }
            Up::Message(message) => message,
        };
        let Some(session) = self.registrars[r].sessions.get_mut(&connection) else { return Ok(()) };
        match message.message {
            Some(session_request::Message::EndpointsChanged(changed)) => {
                let endpoints = changed.private_endpoints.iter().filter_map(address).collect();
                let waiting = session.endpoints.take().and_then(|(_, outside)| outside);
                let outside = changed.reachability.as_ref().map(outside).or(waiting);
                session.endpoints = Some((endpoints, outside));
                self.write_endpoints(r, connection)?;
            }
            Some(session_request::Message::HeldPeers(held)) => {
                let (added, removed) = (uids(&held.added_uids)?, uids(&held.removed_uids)?);
                for uid in removed {
                    session.mailbox.release(uid);
                }
                for uid in added {
                    if session.mailbox.hold(uid) == Some(true) {
                        session.mailbox.peer(uid);
                    }
                }
            }
            Some(
                session_request::Message::Hello(_)
                | session_request::Message::HeldServices(_)
                | session_request::Message::EndpointHealth(_)
                | session_request::Message::Alive(_),
            )
            | None => {}
        }
        self.flush_sessions(r);
        Ok(())
    }

    pub(in crate::sim) fn on_greet(&mut self, r: usize, life: u64, connection: u64) -> Checked {
        if !self.is_alive(r, life) {
            return Ok(());
        }
        self.greet(r, connection, true)?;
        self.flush_sessions(r);
        Ok(())
    }

    /// Prepares what has to be sent in answer to a hello.
    pub(super) fn greet(&mut self, r: usize, connection: u64, late: bool) -> Checked {
        let registrar = &mut self.registrars[r];
        let Some(session) = registrar.sessions.get_mut(&connection) else { return Ok(()) };
        let Some(hello) = session.greeting.take() else { return Ok(()) };
        let uid = session.uid;
        if registrar.draining {
            registrar.close(connection);
            self.send_down(connection, Down::Closed(Failure::Unavailable("draining".into())));
            return Ok(());
        }
        let revision = if late { 0 } else { hello.revision };
        let held = uids(&hello.held_peer_uids)?;
        for peer in &held {
            session.mailbox.hold(*peer);
        }
        session.since = Some(self.now);
        if let Err(error) = register::find(&registrar.index, NETWORK, uid) {
            registrar.close(connection);
            self.send_down(connection, Down::Closed(Failure::Refused(error.to_string())));
            return Ok(());
        }
        if let Some(older) = registrar.by_device.insert(uid, connection)
            && let Some(older) = registrar.sessions.get_mut(&older)
        {
            older.mailbox.end(End::Replaced);
        }
        let index = &registrar.index;
        let state = index.network(NETWORK);
        let is_new = |peer: &Uuid| {
            let state =
                state.filter(|state| state.network.revision.max(state.directors.revision) <= revision);
            state.and_then(|state| state.devices.by_uid(*peer)).is_none_or(|peer| peer.revision > revision)
                || index.peer(NETWORK, uid, *peer).is_none()
        };
        let new: Vec<Uuid> = held.into_iter().filter(is_new).collect();
        let reached = index.revision();
        if let Some(session) = registrar.sessions.get_mut(&connection) {
            session.mailbox.config();
            new.into_iter().for_each(|peer| session.mailbox.peer(peer));
            session.mailbox.bookmark(reached);
        }
        Ok(())
    }

    fn write_endpoints(&mut self, r: usize, connection: u64) -> Checked {
        let Some(session) = self.registrars[r].sessions.get_mut(&connection) else { return Ok(()) };
        if session.writing {
            return Ok(());
        }
        let (uid, endpoints) = (session.uid, session.endpoints.take());
        session.writing = endpoints.is_some();
        match endpoints {
            Some((endpoints, outside)) => {
                let request = Request::Endpoints { uid, endpoints, outside };
                self.start(r, Origin::Session(connection), request)
            }
            None => Ok(()),
        }
    }

    pub(super) fn endpoints_written(
        &mut self,
        r: usize,
        connection: u64,
        request: &Request,
        result: Result<Reply, Refusal>,
    ) -> Checked {
        let Some(session) = self.registrars[r].sessions.get_mut(&connection) else { return Ok(()) };
        session.writing = false;
        match (result, request) {
            (Err(Refusal::Unavailable(_)), Request::Endpoints { endpoints, outside, .. }) => {
                let next = session.endpoints.get_or_insert_with(|| (endpoints.clone(), None));
                next.1 = next.1.take().or_else(|| outside.clone());
            }
            (Err(refusal), _) => {
                self.registrars[r].close(connection);
                self.send_down(connection, Down::Closed(Failure::Refused(format!("{refusal:?}"))));
            }
            _ => {}
        }
        self.write_endpoints(r, connection)
    }

    /// Sends what waits in the mailboxes.
    pub(super) fn flush_sessions(&mut self, r: usize) {
        let ids: Vec<u64> = self.registrars[r].sessions.keys().copied().collect();
        for connection in ids {
            loop {
                let is_mute = self.rng.random_bool(self.links.mute);
                let registrar = &mut self.registrars[r];
                let Some(session) = registrar.sessions.get_mut(&connection) else { break };
                if session.greeting.is_some() {
                    break;
                }
                let Some(item) = session.mailbox.pop() else { break };
                let uid = session.uid;
                let index = &registrar.index;
                let message = match item {
                    Item::End(end) => {
                        registrar.close(connection);
                        let failure = match end {
                            End::Gone | End::Revoked => Failure::Refused(format!("{end:?}")),
                            _ => Failure::Unavailable(format!("{end:?}")),
                        };
                        self.send_down(connection, Down::Closed(failure));
                        break;
                    }
                    Item::Config => {
                        let advertised = self.advertised();
                        let index = &self.registrars[r].index;
                        let state = index.network(NETWORK);
                        let config = state.and_then(|s| Some(s.config(s.devices.by_uid(uid)?, &advertised)));
                        let Some(config) = config else { continue };
                        Message::Config(config)
                    }
                    Item::Roots | Item::Service(_) | Item::VirtualServices | Item::Probes => continue,
                    Item::Drain(away) => Message::Drain(Drain {
                        within: Some(pbjson_types::Duration {
                            seconds: away.within.as_secs().try_into().unwrap_or(0),
                            nanos: 0,
                        }),
                        registrars: away.to.to_vec(),
                    }),
                    Item::Introduction(_) if is_mute => continue,
                    Item::Introduction(peer) => match index.peer(NETWORK, uid, peer) {
                        Some(peer) => Message::Introduction(Introduction { peer: Some(peer) }),
                        None => continue,
                    },
                    Item::Peer(peer) => match index.peer(NETWORK, uid, peer) {
                        Some(peer) => Message::PeerChanged(PeerChanged { peer: Some(peer) }),
                        None => {
                            session.mailbox.release(peer);
                            Message::PeerRemoved(PeerRemoved { device_uid: peer.to_string() })
                        }
                    },
                    Item::Bookmark(revision) => Message::Bookmark(Bookmark { revision }),
                };
                self.send_down(
                    connection,
                    Down::Message(Box::new(SessionResponse { message: Some(message) })),
                );
            }
        }
    }
}

fn uids(texts: &[String]) -> Checked<Vec<Uuid>> {
    texts.iter().map(|text| Uuid::try_parse(text).map_err(|e| Violation(format!("{text}: {e}")))).collect()
}
