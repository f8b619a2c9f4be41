//! Hellos: which address a session's frames come from and go to.

use std::net::SocketAddr;

use muster_common::{
    frame::{self, Flags, Frame, Hello, WELCOME},
    time::Instant,
};

use super::{Relay, SILENCE, Session};

impl Session {
    /// Whether it is of this session, and none that has been taken before.
    pub(super) fn is_new(&self, hello: &Hello<'_>) -> bool {
        hello.counter() > self.counter && hello.is_authentic(&self.key())
    }

    /// Whether frames may go to `from` because of who sends from there, without asking whether they arrive. Not
    /// while they leave by a stream: the device has it because UDP failed it, maybe in one direction alone.
    fn is_trusted(&self, from: SocketAddr) -> bool {
        let from = from.ip();
        match self.endpoint {
            Some(endpoint) => from == endpoint.ip() || (!self.has_stream && from == self.attached_from),
            None => !self.has_stream && from == self.attached_from,
        }
    }
}

impl Relay {
    /// The answer to a hello that came from `from`, as long as the hello is.
    ///
    /// The session's address becomes `from` if that is a port of the host that has attached or is bound, or if the hello
    /// has the proof that an earlier answer arrived there: a device cannot point its frames at anyone else.
    pub fn handle_hello(&mut self, from: SocketAddr, hello: &[u8], now: Instant) -> Option<[u8; WELCOME]> {
        let Some(Frame::Hello(hello)) = frame::parse(hello) else { return None };
        let id = hello.session();
        let session = self.sessions.get_mut(&id)?;
        if !session.is_new(&hello) {
            return None;
        }
        let proof = frame::proof(&self.secret, id, from);
        let is_bound = session.is_trusted(from) || hello.proof() == proof;
        if is_bound {
            session.counter = hello.counter();
            session.endpoint = Some(from);
            session.heard = now;
        }
        let flags = Flags { is_bound, is_draining: self.is_draining };
        let welcome = frame::welcome(&session.key(), &hello, from, proof, flags);
        if is_bound {
            self.look_again(id, now + SILENCE);
            self.settle(id, now);
        }
        Some(welcome)
    }
}
