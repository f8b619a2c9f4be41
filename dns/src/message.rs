//! Messages: what of a query is looked at, which queries are turned away before any zone is asked, and how a
//! response is written within its size limit (RFC 1035, RFC 6891; design §7, "Messages").

use hickory_proto::{
    ProtoError,
    op::{Edns, Header, HeaderCounts, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, Record, RecordType},
    serialize::binary::{BinDecodable, BinDecoder, BinEncodable, BinEncoder},
};

/// Largest UDP response that any client gets: fits every path's MTU, so that it is never fragmented.
pub const UDP_CEILING: u16 = 1232;
/// Largest UDP response to a client without EDNS (RFC 1035, 2.3.4).
pub const UDP_MINIMUM: u16 = 512;
/// Octets of a message header.
const HEADER: usize = 12;
/// A pointer to the question's name (RFC 1035, 4.1.4), which is behind the header.
const QUESTION: u16 = 0xc000 | HEADER as u16;
/// Octets of an OPT record without options.
const OPT: u16 = 11;

/// How a query came, which bounds the size of its response.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Transport {
    /// Datagrams.
    Udp,
    /// A stream in the clear.
    Tcp,
    /// DNS over TLS (RFC 7858).
    Tls,
}

/// The part of a query that an answer depends on.
#[derive(Clone, Debug)]
pub struct Request {
    /// Header of the query.
    pub metadata: Metadata,
    /// The one question.
    pub question: Query,
    /// EDNS of the query, if it has any.
    pub edns: Option<Edns>,
}

/// What came of reading a query.
#[derive(Debug)]
pub enum Parsed {
    /// Not to be answered: no header, or a response.
    Silence,
    /// Turned away, with this response.
    Rejected(Response),
    /// A question in class IN.
    Request(Request),
}

/// Reads a query.
pub fn parse(query: &[u8]) -> Parsed {
    let Ok(header) = Header::read(&mut BinDecoder::new(query)) else { return Parsed::Silence };
    if header.metadata.message_type != MessageType::Query || query.len() < HEADER {
        return Parsed::Silence;
    }
    let reject = |code| Parsed::Rejected(Response::new(&header.metadata, code));
    if header.metadata.op_code != OpCode::Query {
        return reject(ResponseCode::NotImp);
    }
    // Checked before the decoder reserves room for as many questions as the header promises.
    if header.counts.queries != 1 {
        return reject(ResponseCode::FormErr);
    }
    let Ok(mut message) = Message::from_vec(query) else { return reject(ResponseCode::FormErr) };
    let Some(question) = message.queries.pop() else { return reject(ResponseCode::FormErr) };
    let request = Request { metadata: message.metadata, question, edns: message.edns };
    if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return Parsed::Rejected(request.response(ResponseCode::BADVERS));
    }
    if request.question.query_class() != DNSClass::IN {
        return Parsed::Rejected(request.response(ResponseCode::Refused));
    }
    Parsed::Request(request)
}

impl Request {
    /// A response to this request, without records so far.
    pub fn response(&self, code: ResponseCode) -> Response {
        let mut response = Response::new(&self.metadata, code);
        response.question = Some(self.question.clone());
        response.edns = self.edns.as_ref().map(|theirs| {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_CEILING);
            edns.set_dnssec_ok(theirs.flags().dnssec_ok);
            edns
        });
        response
    }

    /// The largest response that the client takes over `transport`.
    pub fn max_size(&self, transport: Transport) -> u16 {
        match (transport, &self.edns) {
            (Transport::Tcp | Transport::Tls, _) => u16::MAX,
            (Transport::Udp, None) => UDP_MINIMUM,
            (Transport::Udp, Some(edns)) => edns.max_payload().clamp(UDP_MINIMUM, UDP_CEILING),
        }
    }

    /// The type asked for.
    pub fn record_type(&self) -> RecordType {
        self.question.query_type()
    }
}

/// A response, before it is encoded.
#[derive(Clone, Debug)]
pub struct Response {
    /// Header; the counts and TC come from encoding.
    pub metadata: Metadata,
    /// The question, as it was asked.
    pub question: Option<Query>,
    /// Answer section.
    pub answers: Vec<Record>,
    /// Authority section.
    pub authorities: Vec<Record>,
    /// Additional section, without OPT.
    pub additionals: Vec<Record>,
    /// EDNS, if the query had it.
    pub edns: Option<Edns>,
}

impl Response {
    fn new(query: &Metadata, code: ResponseCode) -> Self {
        let mut metadata = Metadata::response_from_request(query);
        metadata.response_code = code;
        Self {
            metadata,
            question: None,
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
            edns: None,
        }
    }

    /// Writes the response over `out`, with at most `max_size` octets: what does not fit is dropped from the
    /// end, Additional first, then Authority, then Answer, and TC is set if anything was.
    /// Question and OPT are never dropped.
    pub fn encode(&self, max_size: u16, out: &mut Vec<u8>) -> Result<(), ProtoError> {
        out.clear();
        let mut encoder = BinEncoder::new(out);
        let place = encoder.place::<Header>()?;
        if let Some(question) = &self.question {
            question.emit(&mut encoder)?;
        }
        encoder.set_max_size(max_size.saturating_sub(if self.edns.is_some() { OPT } else { 0 }));
        let mut truncated = false;
        let mut counts = [0; 3];
        for (count, records) in counts.iter_mut().zip([&self.answers, &self.authorities, &self.additionals]) {
            if truncated {
                break;
            }
            let question = self.question.as_ref().map(|question| &question.name);
            let records: Vec<Short<'_>> = records.iter().map(|record| Short { record, question }).collect();
            let written = match encoder.emit_all(records.iter()) {
                Ok(written) => written,
                Err(ProtoError::NotAllRecordsWritten { count, .. }) => {
                    truncated = true;
                    count
                }
                Err(error) => return Err(error),
            };
            *count = u16::try_from(written).map_err(|_| ProtoError::from("more than 65,535 records"))?;
        }
        encoder.set_max_size(u16::MAX);
        if let Some(edns) = &self.edns {
            let mut edns = edns.clone();
            edns.set_rcode_high(self.metadata.response_code.high());
            Record::from(&edns).emit(&mut encoder)?;
        }
        let mut metadata = self.metadata;
        metadata.truncation |= truncated;
        let [answers, authorities, additionals] = counts;
        let additionals = additionals + u16::from(self.edns.is_some());
        let queries = u16::from(self.question.is_some());
        place.replace(
            &mut encoder,
            Header { metadata, counts: HeaderCounts { queries, answers, authorities, additionals } },
        )
    }
}

/// A record whose owner, if it is spelled as the question, is a pointer there. The encoder does the same by itself,
/// but only for the first names of a message, and an answer of thousands of records has to be short as well.
struct Short<'a> {
    record: &'a Record,
    question: Option<&'a Name>,
}

impl BinEncodable for Short<'_> {
    fn emit(&self, encoder: &mut BinEncoder<'_>) -> Result<(), ProtoError> {
        let Record { name, dns_class, ttl, data, .. } = self.record;
        if name.is_root() || !self.question.is_some_and(|question| question.eq_case(name)) {
            return self.record.emit(encoder);
        }
        encoder.emit_u16(QUESTION)?;
        self.record.record_type().emit(encoder)?;
        dns_class.emit(encoder)?;
        encoder.emit_u32(*ttl)?;
        let place = encoder.place::<u16>()?;
        data.emit(encoder)?;
        let length = encoder.len_since_place(&place);
        let length =
            u16::try_from(length).map_err(|_| ProtoError::from("more than 65,535 octets of data"))?;
        place.replace(encoder, length)
    }
}

/// `name` in lower case, without a trailing dot. Octets that no name of ours has become `?`, so that a dot
/// within a label cannot pass for one between labels.
pub fn plain_name(name: &Name) -> String {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|octet| match octet {
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => char::from(*octet),
            b'A'..=b'Z' => char::from(octet.to_ascii_lowercase()),
            _ => '?',
        }));
    }
    text
}
