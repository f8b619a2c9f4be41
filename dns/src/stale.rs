//! Marks an encoded response as stale: with the Extended DNS Error that says so (RFC 8914, 4.4), for those who asked with
//! EDNS and have room for it.

use crate::message::{self, Parsed, Transport};

/// Octets of an OPT record without options (RFC 6891, 6.1.2).
const OPT: usize = 11;
/// The option: code 15, two octets long, "Stale Answer".
const STALE_ANSWER: [u8; 6] = [0, 15, 0, 2, 0, 3];

/// Marks `response` to `query`; leaves it as it is if that cannot be said.
pub fn mark(query: &[u8], transport: Transport, response: &mut Vec<u8>) {
    let Parsed::Request(request) = message::parse(query) else { return };
    let fits = response.len() + STALE_ANSWER.len() <= usize::from(request.max_size(transport));
    if request.edns.is_none() || !fits {
        return;
    }
    // The OPT record is the last one of a response, and the last octets of it are the length of its options.
    let Some(opt) = response.len().checked_sub(OPT).and_then(|start| response.get_mut(start..)) else {
        return;
    };
    let [0, 0, 41, .., high, low] = opt else { return };
    let length = u16::from_be_bytes([*high, *low]);
    if length == 0 {
        [*high, *low] = (STALE_ANSWER.len() as u16).to_be_bytes();
        response.extend_from_slice(&STALE_ANSWER);
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
        rr::{
            Name, RecordType,
            rdata::opt::{EdnsCode, EdnsOption},
        },
    };

    use super::*;

    fn query(edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        let name: Name = "web.net.example.".parse().unwrap();
        message.add_query(Query::query(name, RecordType::A));
        message.edns = edns.map(|payload| {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            edns
        });
        message.to_vec().unwrap()
    }

    fn answer(query: &[u8]) -> Vec<u8> {
        let Parsed::Request(request) = message::parse(query) else { panic!("no request") };
        let mut out = Vec::new();
        request.response(ResponseCode::NXDomain).encode(512, &mut out).unwrap();
        out
    }

    #[test]
    fn those_who_asked_with_edns_are_told() {
        let query = query(Some(1232));
        let mut out = answer(&query);
        mark(&query, Transport::Udp, &mut out);
        let message = Message::from_vec(&out).unwrap();
        assert_eq!(message.metadata.response_code, ResponseCode::NXDomain);
        let edns = message.edns.unwrap();
        let option = edns.option(EdnsCode::Unknown(15)).expect("an Extended DNS Error");
        assert_eq!(*option, EdnsOption::Unknown(15, vec![0, 3]));
        // Once is enough.
        let before = out.clone();
        mark(&query, Transport::Udp, &mut out);
        assert_eq!(out, before);
    }

    #[test]
    fn others_get_what_they_would_get() {
        let plain = query(None);
        let mut out = answer(&plain);
        let before = out.clone();
        mark(&plain, Transport::Udp, &mut out);
        assert_eq!(out, before);
        // No room.
        let small = query(Some(512));
        let mut out = answer(&small);
        out.splice(12..12, vec![0; 512 - out.len()]);
        let before = out.clone();
        mark(&small, Transport::Udp, &mut out);
        assert_eq!(out, before);
        mark(&small, Transport::Tcp, &mut out);
        assert_eq!(out.len(), before.len() + STALE_ANSWER.len());
        // Neither query nor response is one.
        for length in 0..20 {
            mark(&small[..length], Transport::Tcp, &mut vec![0; 20]);
            mark(&small, Transport::Tcp, &mut vec![0; length]);
        }
    }
}
