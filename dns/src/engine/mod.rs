//! The authoritative engine: a query in, a response out, from a [`Directory`]; no I/O, no clock, no state. Where
//! a name outside the zones is needed, it says what to ask and goes on with the reply. What it answers is the
//! design's DNS section and the specification, one module a part.

mod alias;
mod completion;
mod endpoints;
mod external;
mod lookup;
mod metadata;
mod pods;
mod reverse;
mod services;
mod transfer;

use std::{collections::VecDeque, net::IpAddr};

use hickory_proto::{
    ProtoError,
    op::{Message, ResponseCode},
    rr::{Name, Record, RecordType},
};
use lookup::{Content, Found, Place, Question};
pub use metadata::Metadata;
pub use services::protocol_label;
pub use transfer::Transfer;

use crate::{
    directory::{Directory, Viewer},
    message::{self, Parsed, Request, Response, Transport},
    options::{Fallthrough, Options},
    records,
};

/// A stranger's UDP response is at most so many times as large as its query, as on the wire, so that forged
/// source addresses gain nothing (the limit of RFC 9000, 8.1).
const AMPLIFICATION: usize = 3;
/// Octets that IPv4 and UDP put around a datagram, the least there is.
const DATAGRAM_OVERHEAD: usize = 28;
/// The most CNAMEs in a row (specification 5).
const CHAIN_MAX: u8 = 10;

/// What the engine knows of a query beside its text.
#[derive(Clone, Debug)]
pub struct QueryContext {
    /// Who asks.
    pub viewer: Viewer,
    /// How the query came.
    pub transport: Transport,
    /// The client's address, if it is known: zone transfer goes by it, and completion without a certificate.
    pub source: Option<IpAddr>,
}

/// What came of a query.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// There is no response to send.
    Silence,
    /// A response has been written.
    Response {
        /// Its code.
        code: ResponseCode,
        /// The type that was asked for, if that could be read.
        record_type: Option<RecordType>,
    },
}

/// How far the engine came with a query.
#[derive(Debug)]
pub enum Step {
    /// To its end.
    Done(Outcome),
    /// Another server has to be asked first: then [`Engine::resume`] goes on, or [`Engine::finish`].
    Ask(Upstream),
}

/// What to ask another server, and where the engine was when it needed that.
#[derive(Debug)]
pub struct Upstream {
    /// The name to ask for.
    pub name: Name,
    /// The type to ask for, in class IN.
    pub record_type: RecordType,
    /// Whether the client's query is passed on as it is, and the reply is its answer (fallthrough).
    pub whole: bool,
    pending: Box<Pending>,
}

#[derive(Debug)]
struct Pending {
    request: Request,
    max_size: u16,
    viewer: Viewer,
    then: Then,
}

/// What to do with another server's reply.
#[derive(Debug)]
enum Then {
    /// Put its answers behind these records.
    Follow(Vec<Record>),
    /// Pass it on.
    PassOn,
    /// Take it if the name exists, else go on with the other candidates; if none exists, the asked name does
    /// not exist in this place.
    Complete { rest: VecDeque<Name>, place: Place },
}

/// A response, or what is needed for one.
enum Next {
    Respond(Response),
    Ask { name: Name, whole: bool, then: Then },
}

/// The engine over a directory.
#[derive(Clone, Debug)]
pub struct Engine<D> {
    directory: D,
    options: Options,
}

impl<D: Directory> Engine<D> {
    /// An engine that answers from `directory`, with the options' defaults.
    pub fn new(directory: D) -> Self {
        Self::with_options(directory, Options::default())
    }

    /// An engine that answers from `directory`.
    pub fn with_options(directory: D, options: Options) -> Self {
        Self { directory, options }
    }

    /// The directory that is answered from.
    pub fn directory(&self) -> &D {
        &self.directory
    }

    /// The options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Answers `query` from the directory alone, writing the response over `out`, which is left empty if there
    /// is none to send. A zone transfer of more than one message is SERVFAIL here: see [`Engine::transfer`].
    pub fn answer(&self, query: &[u8], context: &QueryContext, out: &mut Vec<u8>) -> Outcome {
        match self.step(query, context, false, out) {
            Step::Done(outcome) => outcome,
            Step::Ask(upstream) => self.finish(upstream, None, out),
        }
    }

    /// As [`Engine::answer`], for callers that can ask other servers.
    pub fn begin(&self, query: &[u8], context: &QueryContext, out: &mut Vec<u8>) -> Step {
        self.step(query, context, true, out)
    }

    /// Goes on with another server's `reply`; `None` if there was none. The caller has checked that it is the
    /// reply to what was asked.
    pub fn resume(&self, upstream: Upstream, reply: Option<&Message>, out: &mut Vec<u8>) -> Step {
        out.clear();
        let Upstream { name, pending, .. } = upstream;
        let Pending { request, max_size, viewer, then } = *pending;
        let next = self.take(&request, &viewer, &name, then, reply);
        let next = next.unwrap_or_else(|_| Next::Respond(request.response(ResponseCode::ServFail)));
        conclude(request, viewer, max_size, next, out)
    }

    /// As [`Engine::resume`], for callers that ask no more than once: further questions count as unanswered.
    pub fn finish(&self, upstream: Upstream, reply: Option<&Message>, out: &mut Vec<u8>) -> Outcome {
        let mut step = self.resume(upstream, reply, out);
        // Ends: each step has fewer candidates.
        loop {
            match step {
                Step::Done(outcome) => return outcome,
                Step::Ask(upstream) => step = self.resume(upstream, None, out),
            }
        }
    }

    fn step(&self, query: &[u8], context: &QueryContext, recurse: bool, out: &mut Vec<u8>) -> Step {
        out.clear();
        let bound = |max_size: u16| match (&context.viewer, context.transport) {
            (Viewer::Stranger, Transport::Udp) => max_size.min(stranger_limit(query.len())),
            _ => max_size,
        };
        match message::parse(query) {
            Parsed::Silence => Step::Done(Outcome::Silence),
            Parsed::Rejected(response) => Step::Done(write(&response, bound(message::UDP_MINIMUM), out)),
            Parsed::Request(request) => {
                // Nothing is asked for strangers' sake.
                let recurse = recurse && context.viewer != Viewer::Stranger;
                let next = self.respond(&request, query, context, recurse);
                let next = next.unwrap_or_else(|_| Next::Respond(request.response(ResponseCode::ServFail)));
                let max_size = bound(request.max_size(context.transport));
                conclude(request, context.viewer.clone(), max_size, next, out)
            }
        }
    }

    fn respond(
        &self,
        request: &Request,
        query: &[u8],
        context: &QueryContext,
        recurse: bool,
    ) -> Result<Next, ProtoError> {
        if matches!(request.record_type(), RecordType::AXFR | RecordType::IXFR) {
            return self.transfer_in_one(request, query, context).map(Next::Respond);
        }
        let viewer = &context.viewer;
        match self.look(&Question::new(request, &request.question.name, viewer))? {
            Found::Outside => Ok(Next::Respond(self.outside(request))),
            Found::Refused => Ok(Next::Respond(request.response(ResponseCode::Refused))),
            Found::In(place, Content::NoName) if self.directory.is_loaded() => {
                let names = self.candidates(&request.question.name, context)?;
                self.complete(request, viewer, recurse, names, place)
            }
            Found::In(place, content) => self.settle(request, recurse, Vec::new(), &place, content),
        }
    }

    /// Makes a response of `content`, which is that of the name where `chain` ends.
    fn settle(
        &self,
        request: &Request,
        recurse: bool,
        mut chain: Vec<Record>,
        place: &Place,
        content: Content,
    ) -> Result<Next, ProtoError> {
        let code = match content {
            Content::NoName if !self.directory.is_loaded() => ResponseCode::ServFail,
            Content::NoName if recurse && self.falls_through(&request.question.name) => {
                let name = request.question.name.clone();
                return Ok(Next::Ask { name, whole: true, then: Then::PassOn });
            }
            Content::NoName => ResponseCode::NXDomain,
            _ => ResponseCode::NoError,
        };
        let mut response = request.response(code);
        response.metadata.authoritative = true;
        match content {
            Content::Elsewhere { chain: found, target, .. } if recurse => {
                chain.extend(found);
                return Ok(Next::Ask { name: target, whole: false, then: Then::Follow(chain) });
            }
            Content::Elsewhere { chain: found, alone: true, .. } => chain.extend(found),
            Content::Records { answers, additionals } => {
                chain.extend(answers);
                response.additionals = additionals;
            }
            Content::NoData | Content::NoName | Content::Elsewhere { .. } => {
                response.authorities.push(place.soa()?);
            }
        }
        response.answers = chain;
        Ok(Next::Respond(response))
    }

    /// What another server's reply to the question for `asked` leads to.
    fn take(
        &self,
        request: &Request,
        viewer: &Viewer,
        asked: &Name,
        then: Then,
        reply: Option<&Message>,
    ) -> Result<Next, ProtoError> {
        let mut response = request.response(ResponseCode::NoError);
        match (then, reply) {
            (Then::Follow(chain), reply) => {
                response.metadata.authoritative = true;
                response.answers = chain;
                if let Some(reply) = reply {
                    response.answers.extend(respelled(&reply.answers, asked));
                    response.metadata.truncation = reply.metadata.truncation;
                }
            }
            (Then::PassOn, Some(reply)) => copy(reply, asked, &mut response),
            (Then::PassOn, None) => response.metadata.response_code = ResponseCode::ServFail,
            (Then::Complete { .. }, Some(reply)) if reply.metadata.response_code == ResponseCode::NoError => {
                let ttl = reply.answers.iter().map(|record| record.ttl).min().unwrap_or(0);
                copy(reply, asked, &mut response);
                let alias = records::alias(&request.question.name, ttl, asked.clone());
                response.answers.insert(0, alias);
            }
            (Then::Complete { rest, place }, _) => {
                return self.complete(request, viewer, true, rest, place);
            }
        }
        Ok(Next::Respond(response))
    }

    /// Whether `name` is passed on if it does not exist (specification 16).
    fn falls_through(&self, name: &Name) -> bool {
        match &self.options.fallthrough {
            Fallthrough::Never => false,
            Fallthrough::Always => true,
            Fallthrough::Zones(zones) => {
                let text = message::plain_name(name);
                zones.iter().any(|zone| zone.relative(&text).is_some())
            }
        }
    }

    /// The response to a name in no zone that the viewer may know of.
    fn outside(&self, request: &Request) -> Response {
        let loaded = self.directory.is_loaded();
        request.response(if loaded { ResponseCode::Refused } else { ResponseCode::ServFail })
    }
}

/// Passes on another server's reply to the question for `asked`.
fn copy(reply: &Message, asked: &Name, response: &mut Response) {
    response.metadata.response_code = reply.metadata.response_code;
    response.metadata.truncation = reply.metadata.truncation;
    response.metadata.recursion_available = reply.metadata.recursion_available;
    response.answers = respelled(&reply.answers, asked).collect();
    response.authorities = respelled(&reply.authorities, asked).collect();
    response.additionals = respelled(&reply.additionals, asked).collect();
}

/// `records` with what their owners share with `asked` spelled as there: other servers are asked in random upper and
/// lower case, and answer so.
fn respelled<'a>(records: &'a [Record], asked: &'a Name) -> impl Iterator<Item = Record> + 'a {
    records.iter().map(|record| {
        let mut record = record.clone();
        let same = |(own, asked): &(&[u8], &[u8])| own.eq_ignore_ascii_case(asked);
        let shared = record.name.iter().rev().zip(asked.iter().rev()).take_while(same).count();
        let own = record.name.iter().take(record.name.iter().count() - shared);
        let labels = own.chain(asked.iter().skip(asked.iter().count() - shared));
        if let Ok(mut name) = Name::from_labels(labels) {
            name.set_fqdn(true);
            record.name = name;
        }
        record
    })
}

fn conclude(request: Request, viewer: Viewer, max_size: u16, next: Next, out: &mut Vec<u8>) -> Step {
    match next {
        Next::Respond(mut response) => {
            rotate(&mut response, request.record_type());
            Step::Done(write(&response, max_size, out))
        }
        Next::Ask { name, whole, then } => {
            let record_type = request.record_type();
            let pending = Box::new(Pending { request, max_size, viewer, then });
            Step::Ask(Upstream { name, record_type, whole, pending })
        }
    }
}

/// Spreads load: addresses begin at another one with each query, chosen by its id.
fn rotate(response: &mut Response, wanted: RecordType) {
    if !matches!(wanted, RecordType::A | RecordType::AAAA) {
        return;
    }
    let start = response.answers.iter().position(|record| record.record_type() == wanted);
    if let Some(addresses) = start.and_then(|start| response.answers.get_mut(start..)) {
        let by = usize::from(response.metadata.id).checked_rem(addresses.len()).unwrap_or(0);
        addresses.rotate_left(by);
    }
}

fn write(response: &Response, max_size: u16, out: &mut Vec<u8>) -> Outcome {
    let code = response.metadata.response_code;
    let record_type = response.question.as_ref().map(|question| question.query_type());
    match response.encode(max_size, out) {
        Ok(()) => Outcome::Response { code, record_type },
        Err(error) => {
            tracing::debug!(%error, "cannot encode a response");
            out.clear();
            Outcome::Silence
        }
    }
}

fn stranger_limit(query: usize) -> u16 {
    let limit = (query + DATAGRAM_OVERHEAD).saturating_mul(AMPLIFICATION).saturating_sub(DATAGRAM_OVERHEAD);
    u16::try_from(limit).unwrap_or(u16::MAX)
}
