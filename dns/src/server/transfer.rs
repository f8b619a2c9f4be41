//! Responses of several messages, which are zone transfers: how a handler gives one, and what a connection keeps of
//! it while it is on its way. One message is made at a time, so that a zone never stands in memory encoded.

use hickory_proto::{
    op::ResponseCode,
    rr::{RecordType, RecordType::AXFR, RecordType::IXFR},
};
use muster_common::time::Instant;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Handling,
    metrics::{Listener, Tally},
};
use crate::{
    directory::Directory,
    engine::{Engine, Outcome, QueryContext, Transfer},
    message::{self, Parsed, Transport},
};

/// Octets of a message before its question.
const HEADER: usize = 12;

/// The messages of one response, made one at a time.
pub trait Messages: Send {
    /// Writes the next message over `out`; `None` if all have been written. Called where sockets are read, so it
    /// must not block.
    fn next_message(&mut self, out: &mut Vec<u8>) -> Option<Outcome>;
}

impl Messages for Transfer {
    fn next_message(&mut self, out: &mut Vec<u8>) -> Option<Outcome> {
        Self::next_message(self, out)
    }
}

/// The transfer that `query` asks for and its client is allowed, for handlers to return; `None` for every other
/// query, which is the engine's to answer. Queries that ask for none cost next to nothing here.
pub fn transfer<D: Directory>(engine: &Engine<D>, query: &[u8], context: &QueryContext) -> Option<Handling> {
    if context.transport == Transport::Udp || !asks_for_transfer(query) {
        return None;
    }
    Some(Handling::Several(Box::new(engine.transfer(query, context)?)))
}

/// Whether the question's type is that of a zone transfer, told without parsing the rest.
fn asks_for_transfer(query: &[u8]) -> bool {
    let mut rest = query.get(HEADER..).unwrap_or_default();
    while let Some((length, after)) = rest.split_first() {
        if *length == 0 {
            let kind = after.first_chunk().map(|kind| RecordType::from(u16::from_be_bytes(*kind)));
            return matches!(kind, Some(AXFR | IXFR));
        }
        rest = after.get(usize::from(*length)..).unwrap_or_default();
    }
    false
}

/// Writes a response to `query` that has nothing but `code` over `out`.
pub(super) fn reject(query: &[u8], code: ResponseCode, out: &mut Vec<u8>) -> Outcome {
    out.clear();
    if let Parsed::Request(request) = message::parse(query) {
        if request.response(code).encode(message::UDP_MINIMUM, out).is_ok() {
            return Outcome::Response { code, record_type: Some(request.record_type()) };
        }
        out.clear();
    }
    Outcome::Silence
}

/// A transfer that a connection sends. It is counted as one response, as large as all its messages, when it ends,
/// however that is.
pub(super) struct Sending {
    messages: Box<dyn Messages>,
    metrics: Listener,
    v4: bool,
    query: usize,
    started: Instant,
    sent: usize,
    outcome: Outcome,
    _place: OwnedSemaphorePermit,
}

impl Sending {
    /// `query` is the size of the query that came at `started`.
    pub(super) fn new(
        messages: Box<dyn Messages>,
        place: OwnedSemaphorePermit,
        metrics: &Listener,
        v4: bool,
        query: usize,
        started: Instant,
    ) -> Self {
        let (metrics, outcome) = (metrics.clone(), Outcome::Silence);
        Self { messages, metrics, v4, query, started, sent: 0, outcome, _place: place }
    }

    /// Writes the next message over `out`; `false` if there is none left.
    pub(super) fn next(&mut self, out: &mut Vec<u8>) -> bool {
        out.clear();
        let Some(outcome) = self.messages.next_message(out) else { return false };
        self.outcome = outcome;
        self.sent += out.len();
        true
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if self.sent == 0 {
            return;
        }
        let mut tally = Tally::default();
        self.metrics.handled(self.v4, self.outcome, self.query, self.sent, &mut tally);
        self.metrics.took(&mut tally, Instant::now() - self.started);
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, MessageType, OpCode, Query},
        rr::Name,
    };
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_types_of_transfers_are_taken_for_them() {
        for name in [".", "example.", "a.b.c.net.example."] {
            for kind in (0..=300).map(RecordType::from) {
                let mut query = Message::new(1, MessageType::Query, OpCode::Query);
                query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
                let query = query.to_vec().unwrap();
                assert_eq!(asks_for_transfer(&query), kind == AXFR || kind == IXFR, "{name} {kind}");
                assert!((0..query.len() - 2).all(|end| !asks_for_transfer(&query[..end])));
            }
        }
    }

    proptest! {
        #[test]
        fn any_octets_will_do(octets in proptest::collection::vec(any::<u8>(), 0..600)) {
            asks_for_transfer(&octets);
            let mut out = vec![1];
            let outcome = reject(&octets, ResponseCode::ServFail, &mut out);
            prop_assert_eq!(outcome == Outcome::Silence, out.is_empty());
        }
    }
}
