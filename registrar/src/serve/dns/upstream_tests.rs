use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::rr::{RData, Record, rdata::A};
use proptest::prelude::*;
use tokio::{net::TcpListener, sync::Notify};

use super::*;

fn name() -> Name {
    Name::from_ascii("www.example.com.").unwrap()
}

/// The reply of a good server.
fn reply(query: &[u8], truncated: bool) -> Message {
    let mut message = Message::from_vec(query).unwrap();
    message.metadata.message_type = MessageType::Response;
    message.metadata.truncation = truncated;
    message.edns = None;
    let owner = message.queries[0].name().clone();
    if !truncated {
        message.answers.push(Record::from_rdata(owner, 7, RData::A(A([192, 0, 2, 1].into()))));
    }
    message
}

/// A server which sends what `replies` makes of each query, over UDP.
async fn server(replies: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut room = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut room).await {
            for reply in replies(&room[..length]) {
                socket.send_to(&reply, from).await.unwrap();
            }
        }
    });
    address
}

async fn ask(server: SocketAddr, complete: bool) -> Option<Message> {
    Resolver::new(vec![server]).ask(name(), RecordType::A, complete).await
}

#[tokio::test]
async fn only_the_reply_to_what_was_asked_counts() {
    let good = server(|query| {
        let forged = |change: fn(&mut Message)| {
            let mut message = reply(query, false);
            change(&mut message);
            message.answers.clear();
            message.to_vec().unwrap()
        };
        vec![
            b"junk".to_vec(),
            query.to_vec(),
            forged(|m| m.metadata.id = m.metadata.id.wrapping_add(1)),
            forged(|m| m.queries[0] = Query::query(m.queries[0].name().clone(), RecordType::AAAA)),
            forged(|m| {
                m.queries[0] = Query::query(Name::from_ascii("www.example.org.").unwrap(), RecordType::A)
            }),
            forged(|m| {
                // Every letter in the other case.
                let text = m.queries[0].name().to_ascii();
                let other = text.chars().map(|c| {
                    if c.is_ascii_uppercase() { c.to_ascii_lowercase() } else { c.to_ascii_uppercase() }
                });
                m.queries[0] =
                    Query::query(Name::from_ascii(other.collect::<String>()).unwrap(), RecordType::A);
            }),
            forged(|m| m.queries.clear()),
            reply(query, false).to_vec().unwrap(),
        ]
    })
    .await;
    let found = ask(good, false).await.unwrap();
    assert_eq!((found.answers.len(), found.answers[0].ttl), (1, 7));
    let flood = server(|query| vec![query.to_vec(); 100]).await;
    assert!(ask(flood, false).await.is_none());
}

#[tokio::test]
async fn the_next_server_is_asked_if_one_refuses() {
    let refuses = server(|query| {
        let mut message = reply(query, false);
        message.metadata.response_code = ResponseCode::Refused;
        vec![message.to_vec().unwrap()]
    })
    .await;
    assert!(ask(refuses, false).await.is_none());
    let good = server(|query| vec![reply(query, false).to_vec().unwrap()]).await;
    let both = Resolver::new(vec![refuses, good]);
    assert_eq!(both.ask(name(), RecordType::A, false).await.unwrap().answers.len(), 1);
    assert!(Resolver::new(Vec::new()).ask(name(), RecordType::A, false).await.is_none());
}

#[tokio::test]
async fn a_truncated_reply_is_fetched_over_tcp_or_passed_on() {
    let address = server(|query| vec![reply(query, true).to_vec().unwrap()]).await;
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut query).await.unwrap();
        let reply = reply(&query, false).to_vec().unwrap();
        stream.write_u16(reply.len() as u16).await.unwrap();
        stream.write_all(&reply).await.unwrap();
    });
    assert!(ask(address, false).await.unwrap().metadata.truncation);
    let whole = ask(address, true).await.unwrap();
    assert!(!whole.metadata.truncation && whole.answers.len() == 1);
}

/// A forger that knows everything but cannot send from the server's address.
#[tokio::test]
async fn only_the_server_that_was_asked_is_heard() {
    for host in ["127.0.0.1", "::1"] {
        let socket = UdpSocket::bind((host, 0)).await.unwrap();
        let forger = UdpSocket::bind((host, 0)).await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut room = [0; 1500];
            let (length, from) = socket.recv_from(&mut room).await.unwrap();
            let mut forged = reply(&room[..length], false);
            forged.answers[0].ttl = 666;
            // What is not taken is told to who sends it: nobody hears there.
            let _ = forger.send_to(&forged.to_vec().unwrap(), from).await;
            let good = reply(&room[..length], false).to_vec().unwrap();
            socket.send_to(&good, from).await.unwrap();
        });
        let found = ask(address, false).await.unwrap();
        assert_eq!((found.answers.len(), found.answers[0].ttl), (1, 7), "{host}");
    }
}

#[tokio::test]
async fn the_next_server_is_asked_if_one_is_silent_or_gone() {
    let silent = server(|_| Vec::new()).await;
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let good = server(|query| vec![reply(query, false).to_vec().unwrap()]).await;
    let all = Resolver::new(vec![gone, silent, good]);
    assert_eq!(all.ask(name(), RecordType::A, false).await.unwrap().answers.len(), 1);
    assert!(ask(gone, false).await.is_none());
}

/// Over TCP, a reply counts as little as over UDP if it is to something else, and so does none at all.
#[tokio::test]
async fn the_next_server_is_asked_if_one_fails_over_tcp() {
    type Reply = fn(&[u8]) -> Vec<u8>;
    fn frame(message: &Message) -> Vec<u8> {
        let octets = message.to_vec().unwrap();
        [&u16::try_from(octets.len()).unwrap().to_be_bytes(), &*octets].concat()
    }
    let replies: [Reply; 5] = [
        |_| Vec::new(),
        |_| vec![0, 0],
        |query| {
            let octets = frame(&reply(query, false));
            octets[..octets.len() - 1].to_vec()
        },
        |query| {
            let mut other = reply(query, false);
            other.metadata.id = other.metadata.id.wrapping_add(1);
            other.answers[0].ttl = 666;
            frame(&other)
        },
        |query| {
            let mut other = reply(query, false);
            other.answers[0].ttl = 666;
            other.queries[0] = Query::query(Name::from_ascii("www.example.org.").unwrap(), RecordType::A);
            frame(&other)
        },
    ];
    let good = server(|query| vec![reply(query, false).to_vec().unwrap()]).await;
    for made in replies {
        // A port that is free for UDP may be in use for TCP.
        let (bad, listener) = loop {
            let bad = server(|query| vec![reply(query, true).to_vec().unwrap()]).await;
            if let Ok(listener) = TcpListener::bind(bad).await {
                break (bad, listener);
            }
        };
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut query).await.unwrap();
            stream.write_all(&made(&query)).await.unwrap();
        });
        let found = Resolver::new(vec![bad, good]).ask(name(), RecordType::A, true).await.unwrap();
        assert_eq!((found.metadata.truncation, found.answers[0].ttl), (false, 7));
    }
    // Nothing listens there on TCP.
    let bad = server(|query| vec![reply(query, true).to_vec().unwrap()]).await;
    let found = Resolver::new(vec![bad, good]).ask(name(), RecordType::A, true).await.unwrap();
    assert!(!found.metadata.truncation);
    assert!(ask(bad, true).await.is_none());
}

/// A server which answers nothing until it is told to, and how many queries it has got.
async fn held() -> (SocketAddr, Arc<Notify>, Arc<AtomicUsize>) {
    let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let (address, open, count) =
        (socket.local_addr().unwrap(), Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (gate, counted) = (open.clone(), count.clone());
    tokio::spawn(async move {
        let mut room = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut room).await {
            counted.fetch_add(1, Ordering::SeqCst);
            let reply = reply(&room[..length], false).to_vec().unwrap();
            let (socket, gate) = (socket.clone(), gate.clone());
            tokio::spawn(async move {
                gate.notified().await;
                socket.send_to(&reply, from).await.unwrap();
            });
        }
    });
    (address, open, count)
}

fn numbered(number: usize) -> Name {
    Name::from_ascii(format!("name{number}.example.com.")).unwrap()
}

#[tokio::test]
async fn what_exceeds_the_bound_is_unanswered_at_once() {
    let (address, open, count) = held().await;
    let resolver = Resolver { in_flight: Arc::new(Semaphore::new(2)), ..Resolver::new(vec![address]) };
    let asking = |number: usize| {
        let resolver = resolver.clone();
        tokio::spawn(async move { resolver.ask(numbered(number), RecordType::A, false).await })
    };
    let first = [asking(1), asking(2)];
    while count.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    assert!(resolver.ask(numbered(3), RecordType::A, false).await.is_none());
    assert_eq!(count.load(Ordering::SeqCst), 2, "nothing was sent for it");
    open.notify_waiters();
    for asked in first {
        assert!(asked.await.unwrap().is_some());
    }
    // There is room again.
    assert_eq!(resolver.in_flight.available_permits(), 2);
    // Who goes away leaves room, too.
    let left = asking(4);
    while count.load(Ordering::SeqCst) < 3 {
        tokio::task::yield_now().await;
    }
    left.abort();
    assert!(left.await.unwrap_err().is_cancelled());
    assert_eq!(resolver.in_flight.available_permits(), 2);
}

/// RFC 5452, 5: several outstanding queries for one name are as many targets for a forger.
#[tokio::test]
async fn one_question_is_asked_once_at_a_time() {
    let (address, open, count) = held().await;
    let resolver = Resolver::new(vec![address]);
    let asking = |name: &str, record_type| {
        let (resolver, name) = (resolver.clone(), Name::from_ascii(name).unwrap());
        tokio::spawn(async move { resolver.ask(name, record_type, false).await })
    };
    let (www, other) = ("www.example.com.", "WWW.Example.com.");
    let same = [asking(www, RecordType::A), asking(other, RecordType::A), asking(www, RecordType::A)];
    let apart = asking(www, RecordType::AAAA);
    while count.load(Ordering::SeqCst) < 2 || resolver.in_flight.available_permits() > IN_FLIGHT - 4 {
        tokio::task::yield_now().await;
    }
    assert_eq!(count.load(Ordering::SeqCst), 2);
    // The one who asked first goes away; the others still get their reply.
    let [first, second, third] = same;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    while resolver.in_flight.available_permits() < IN_FLIGHT - 3 {
        tokio::task::yield_now().await;
    }
    open.notify_waiters();
    for asked in [second, third, apart] {
        assert_eq!(asked.await.unwrap().unwrap().answers.len(), 1);
    }
    assert_eq!(count.load(Ordering::SeqCst), 2);
    assert!(resolver.asked.lock().unwrap().is_empty(), "nothing is kept of it");
    // A reply is not remembered: the next one asks anew.
    let again = asking(www, RecordType::A);
    while count.load(Ordering::SeqCst) < 3 {
        tokio::task::yield_now().await;
    }
    open.notify_waiters();
    assert!(again.await.unwrap().is_some());
}

/// A server that asks us what we ask it, as a registrar that is its own upstream does.
#[tokio::test]
async fn a_loop_is_not_gone_round() {
    let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let resolver = Resolver::new(vec![socket.local_addr().unwrap()]);
    let count = Arc::new(AtomicUsize::new(0));
    let (asked_back, counted) = (resolver.clone(), count.clone());
    tokio::spawn(async move {
        let mut room = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut room).await {
            counted.fetch_add(1, Ordering::SeqCst);
            let query = room[..length].to_vec();
            let (socket, resolver) = (socket.clone(), asked_back.clone());
            tokio::spawn(async move {
                let question = Message::from_vec(&query).unwrap().queries[0].clone();
                let found = resolver.ask(question.name().clone(), question.query_type(), false).await;
                let mut message = reply(&query, false);
                if found.is_none() {
                    message.metadata.response_code = ResponseCode::ServFail;
                }
                let _ = socket.send_to(&message.to_vec().unwrap(), from).await;
            });
        }
    });
    assert!(resolver.ask(name(), RecordType::A, false).await.is_none());
    assert_eq!(count.load(Ordering::SeqCst), 1);
    while resolver.in_flight.available_permits() < IN_FLIGHT {
        tokio::task::yield_now().await;
    }
}

proptest! {
    /// Whatever a server sends, nothing panics, and it is a reply only with the id and the question of the query.
    #[test]
    fn any_reply_is_survived(
        octets in proptest::collection::vec(any::<u8>(), 0..600),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        with_id in any::<bool>(),
    ) {
        let asked = Asked::new(&name(), RecordType::A);
        let mut octets = octets;
        if let Some(id) = octets.first_chunk_mut().filter(|_| with_id) {
            *id = asked.id.to_be_bytes();
        }
        let _ = asked.reply(&octets);
        let mut damaged = reply(&asked.encode().unwrap(), false).to_vec().unwrap();
        for (place, octet) in damage {
            let place = place.index(damaged.len());
            damaged[place] = octet;
        }
        if let Some(message) = asked.reply(&damaged) {
            prop_assert_eq!(message.metadata.id, asked.id);
            prop_assert_eq!(message.queries.len(), 1);
            prop_assert!(message.queries[0].name().eq_case(asked.question.name()));
            prop_assert_eq!(message.queries[0].query_type(), RecordType::A);
        }
    }
}

#[test]
fn spelling_is_mixed() {
    let long = Name::from_ascii("abcdefghijklmnopqrstuvwxyz.abcdefghijklmnopqrstuvwxyz.example.").unwrap();
    let one = mixed(&long, &mut rand::rng());
    assert_eq!(one, long, "the same name");
    assert!(one.to_ascii().bytes().any(|b| b.is_ascii_uppercase()));
    assert!(one.is_fqdn());
}
