//! One question to one server over UDP. A reply is believed only if it comes from the server to the question's own port,
//! with its id, and repeats the question as it was spelled, in capitals and small letters at random ("0x20"). What does
//! not is passed over, and waiting goes on.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hickory_proto::op::Message;
use hickory_resolver::net::NetError;
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

/// How long a reply is waited for before the question is sent again, and before the server is given up.
const WAITS: [Duration; 3] =
    [Duration::from_millis(500), Duration::from_millis(500), Duration::from_millis(1000)];
/// How long the right reply is waited for once there is one that is wrong in nothing but its capitals.
const FOLDED_WAIT: Duration = Duration::from_millis(200);
/// Octets of a message header.
const HEADER: usize = 12;
/// No server sends more: the question says how much is taken.
const REPLY_MAX: usize = 4096;

/// What came back.
#[derive(Debug)]
pub(super) enum Reply {
    /// The response.
    Whole(Box<Message>),
    /// Something that says too little, to be asked for over TCP.
    AskOverTcp {
        /// Because the question came back spelled otherwise; else because the response does not fit.
        folded: bool,
    },
}

/// Sends `query` to `server`; of its question, every capital has to come back.
pub(super) async fn exchange(server: SocketAddr, query: &Message) -> Result<Reply, NetError> {
    let query = query.to_vec()?;
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // A socket of its own: the kernel picks a port at random, and drops what other hosts send to it.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let mut buffer = [0; REPLY_MAX];
    for wait in WAITS {
        socket.send(&query).await?;
        let mut deadline = Instant::now() + wait;
        let mut folded = false;
        while let Ok(received) = timeout_at(deadline, socket.recv(&mut buffer)).await {
            let Some(reply) = buffer.get(..received?) else { continue };
            match compare(&query, reply) {
                Match::Other => {
                    tracing::debug!(%server, "passed over a DNS reply that does not match the question")
                }
                Match::Truncated => return Ok(Reply::AskOverTcp { folded: false }),
                Match::Folded => {
                    folded = true;
                    deadline = deadline.min(Instant::now() + FOLDED_WAIT);
                }
                Match::Same => match Message::from_vec(reply) {
                    Ok(message) => return Ok(Reply::Whole(Box::new(message))),
                    Err(error) => tracing::debug!(%server, %error, "passed over an unreadable DNS reply"),
                },
            }
        }
        if folded {
            return Ok(Reply::AskOverTcp { folded: true });
        }
    }
    Err(NetError::Timeout)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Match {
    /// To another question, or not a response at all.
    Other,
    /// To this question, but for its capitals.
    Folded,
    Truncated,
    Same,
}

/// Whether `reply` is to `query`.
fn compare(query: &[u8], reply: &[u8]) -> Match {
    let (Some((asked, rest)), Some((header, replied))) =
        (query.split_first_chunk::<HEADER>(), reply.split_first_chunk::<HEADER>())
    else {
        return Match::Other;
    };
    let question = rest.get(..question_length(rest).unwrap_or(rest.len())).unwrap_or(rest);
    let [id_high, id_low, flags, code, q_high, q_low, ..] = *header;
    if !asked.starts_with(&[id_high, id_low]) || flags & 0x80 == 0 {
        return Match::Other;
    }
    match (u16::from_be_bytes([q_high, q_low]), replied.get(..question.len())) {
        (1, Some(repeated)) if repeated == question => {}
        (1, Some(repeated)) if repeated.eq_ignore_ascii_case(question) => return Match::Folded,
        // FORMERR, SERVFAIL, NOTIMP, REFUSED: a server that cannot read the question need not repeat it.
        (0, _) if matches!(code & 0x0f, 1 | 2 | 4 | 5) => {}
        _ => return Match::Other,
    }
    if flags & 0x02 == 0 { Match::Same } else { Match::Truncated }
}

/// Octets of the question that `rest` begins with.
fn question_length(rest: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match usize::from(*rest.get(at)?) {
            0 => return Some(at + 5),
            length => at += 1 + length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reply_to_the_question_matches() {
        let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\x01\x03wEb\0\0\x01\0\x01\0\0\x29\x04\xd0\0\0\0\0\0\0";
        let right = b"\x12\x34\x81\x80\0\x01\0\0\0\0\0\0\x03wEb\0\0\x01\0\x01";
        let with = |at: usize, value: u8| {
            let mut reply = right.to_vec();
            reply[at] = value;
            compare(query, &reply)
        };
        assert_eq!(with(1, 0x34), Match::Same);
        for (at, value) in [(0, 0x13), (1, 0x35), (2, 0x01), (5, 2), (5, 0), (13, b'x'), (18, 2), (20, 3)] {
            assert_eq!(with(at, value), Match::Other, "{at}");
        }
        assert_eq!(with(14, b'e'), Match::Folded);
        assert_eq!(with(2, 0x83), Match::Truncated);
        for length in 0..right.len() {
            assert_eq!(compare(query, &right[..length]), Match::Other, "{length}");
        }
        assert_eq!(compare(query, b"\x12\x34\x81\x81\0\0\0\0\0\0\0\0"), Match::Same);
        assert_eq!(compare(query, b"\x12\x34\x81\x83\0\0\0\0\0\0\0\0"), Match::Other);
    }
}
