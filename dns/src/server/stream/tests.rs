//! Transfers on a connection, over a stream that holds little: what is made and when does not depend on a kernel.

use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RecordType},
};
use tokio::io::{AsyncReadExt, DuplexStream, duplex};

use super::*;
use crate::server::Messages;

/// Octets of a message of a transfer.
const SIZE: usize = 1000;

/// A transfer of so many messages, each with its number behind the query's id; counts those that were made.
struct Numbered {
    id: [u8; 2],
    next: usize,
    end: usize,
    made: Arc<AtomicUsize>,
}

impl Messages for Numbered {
    fn next_message(&mut self, out: &mut Vec<u8>) -> Option<Outcome> {
        out.clear();
        if self.next == self.end {
            return None;
        }
        out.extend(self.id);
        out.extend(u32::try_from(self.next).unwrap().to_be_bytes());
        out.resize(SIZE, 0);
        self.next += 1;
        self.made.fetch_add(1, Ordering::Relaxed);
        Some(Outcome::Response { code: ResponseCode::NoError, record_type: Some(RecordType::AXFR) })
    }
}

/// Answers AXFR with so many messages, those of id 13 with one that is empty, those of id 14
/// not at all, and everything else with the query.
struct Transfers(usize, Arc<AtomicUsize>);

impl Handler for Transfers {
    fn handle(&self, query: &[u8], _: &Source, out: &mut Vec<u8>) -> Handling {
        struct Empty;
        impl Messages for Empty {
            fn next_message(&mut self, _: &mut Vec<u8>) -> Option<Outcome> {
                Some(Outcome::Silence)
            }
        }
        let message = Message::from_vec(query).unwrap();
        out.clear();
        if message.queries[0].query_type() != RecordType::AXFR {
            out.extend_from_slice(query);
            return Handling::Done(Outcome::Silence);
        }
        if message.metadata.id == 14 {
            return Handling::Later(Box::pin(std::future::ready((Outcome::Silence, Vec::new()))));
        }
        if message.metadata.id == 13 {
            return Handling::Several(Box::new(Empty));
        }
        let (id, made) = ([query[0], query[1]], Arc::clone(&self.1));
        Handling::Several(Box::new(Numbered { id, next: 0, end: self.0, made }))
    }
}

fn framed(id: u16, kind: RecordType) -> Vec<u8> {
    let mut query = Message::new(id, MessageType::Query, OpCode::Query);
    query.add_query(Query::query(Name::from_ascii("net.example.").unwrap(), kind));
    let query = query.to_vec().unwrap();
    [&u16::try_from(query.len()).unwrap().to_be_bytes()[..], &query].concat()
}

struct Client {
    stream: DuplexStream,
    made: Arc<AtomicUsize>,
    served: tokio::task::JoinHandle<io::Result<()>>,
    transfers: Arc<Semaphore>,
}

/// A connection whose stream holds `room` octets on their way, with transfers of `count` messages.
fn connect(count: usize, room: usize, limits: StreamLimits) -> Client {
    let (stream, server) = duplex(room);
    let made = Arc::<AtomicUsize>::default();
    let handler = Transfers(count, Arc::clone(&made));
    let transfers = Arc::new(Semaphore::new(limits.transfers));
    let metrics = Metrics::default().listener(Transport::Tcp, ([127, 0, 0, 1], 53).into());
    let bounds = Bounds { parties: 1, per_device: 1, strangers: 1, strangers_per_source: 1 };
    let place = Census::new(bounds).admit([127, 0, 0, 1].into()).ok().unwrap();
    let slot = Slot::new(place, &metrics, &transfers);
    let served = tokio::spawn(async move {
        let address = ([127, 0, 0, 1], 5).into();
        let source = Source { address, transport: Transport::Tcp, identity: None };
        Connection::new(server, source, &handler, &limits, &slot).run().await
    });
    Client { stream, made, served, transfers }
}

impl Client {
    async fn send(&mut self, frames: &[Vec<u8>]) {
        self.stream.write_all(&frames.concat()).await.unwrap();
    }

    /// The id of the next message, and the number if it is of a transfer.
    async fn receive(&mut self) -> io::Result<(u16, Option<u32>)> {
        let mut message = vec![0; usize::from(self.stream.read_u16().await?)];
        self.stream.read_exact(&mut message).await?;
        let number = u32::from_be_bytes(message[2..6].try_into().unwrap());
        let id = u16::from_be_bytes([message[0], message[1]]);
        Ok((id, (message.len() == SIZE).then_some(number)))
    }
}

/// Lets the other tasks of this thread do whatever they can.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_has_one_message_made_for_it() {
    let mut client = connect(500, 64, StreamLimits::default());
    client.send(&[framed(1, RecordType::AXFR)]).await;
    for number in 0..500 {
        settle().await;
        assert_eq!(client.made.load(Ordering::Relaxed), number + 1);
        assert_eq!(client.receive().await.unwrap(), (1, Some(u32::try_from(number).unwrap())));
    }
    drop(client.stream);
    client.served.await.unwrap().unwrap();
    assert_eq!(client.transfers.available_permits(), StreamLimits::default().transfers);
}

#[tokio::test]
async fn queries_are_answered_and_transfers_take_turns_while_none_of_them_ends() {
    let mut client = connect(usize::MAX, 4096, StreamLimits::default());
    client.send(&[framed(1, RecordType::AXFR), framed(2, RecordType::AXFR)]).await;
    let (mut next, mut answered) = ([0; 2], 0);
    for query in 100..200 {
        // The last query of each round comes by halves, which keeps the others waiting no longer.
        let frame = framed(query, RecordType::A);
        client.send(&[frame[..7].to_vec()]).await;
        for _ in 0..4 {
            match client.receive().await.unwrap() {
                (id @ 1..=2, Some(number)) => {
                    assert_eq!(number, next[usize::from(id) - 1]);
                    next[usize::from(id) - 1] += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(next[0].abs_diff(next[1]) <= 1, "{next:?}");
        client.send(&[frame[7..].to_vec()]).await;
        for _ in 0..20 {
            match client.receive().await.unwrap() {
                (id @ 1..=2, Some(number)) => {
                    assert_eq!(number, next[usize::from(id) - 1]);
                    next[usize::from(id) - 1] += 1;
                }
                (id, None) => {
                    assert_eq!(id, query);
                    answered += 1;
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(answered, 100);
}

#[tokio::test]
async fn a_client_that_closed_its_half_gets_the_rest() {
    let mut client = connect(50, 64, StreamLimits::default());
    client.send(&[framed(1, RecordType::AXFR)]).await;
    client.stream.shutdown().await.unwrap();
    for number in 0..50 {
        assert_eq!(client.receive().await.unwrap(), (1, Some(number)));
    }
    assert!(client.receive().await.is_err());
    client.served.await.unwrap().unwrap();
}

#[tokio::test]
async fn idle_and_age_hold_within_a_transfer() {
    let short = Duration::from_millis(200);
    // Who reads nothing is cut off, and its place is free again.
    let limits = StreamLimits { idle: short, ..StreamLimits::default() };
    let mut client = connect(usize::MAX, 64, limits);
    client.send(&[framed(1, RecordType::AXFR)]).await;
    let error = timeout(Duration::from_secs(10), client.served).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(client.transfers.available_permits(), limits.transfers);
    // Who reads is not idle, for however long it asks nothing, but gets no older than others.
    for (idle, age) in [(Duration::from_secs(60), short), (short, 8 * short)] {
        let started = Instant::now();
        let mut client = connect(usize::MAX, 64, StreamLimits { idle, age, ..StreamLimits::default() });
        client.send(&[framed(1, RecordType::AXFR)]).await;
        let (mut asked, mut answered) = (false, false);
        while let Ok((id, _)) = client.receive().await {
            let open = Instant::now() - started;
            assert!(open < Duration::from_secs(10), "the connection is still open");
            answered |= id == 2;
            if !asked && open > age / 2 {
                client.send(&[framed(2, RecordType::A)]).await;
                asked = true;
            }
        }
        assert!(answered, "still takes queries");
        assert!(Instant::now() - started >= age, "cut off although it reads");
        client.served.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn transfers_have_places_in_the_pipeline() {
    let limits = StreamLimits { pipelined: 2, ..StreamLimits::default() };
    let mut client = connect(3, 4096, limits);
    let queries: Vec<Vec<u8>> = (100..140).map(|id| framed(id, RecordType::AXFR)).collect();
    client.send(&queries).await;
    let mut next = [0; 40];
    for _ in 0..3 * 40 {
        let (id, number) = client.receive().await.unwrap();
        let next = &mut next[usize::from(id) - 100];
        assert_eq!(number, Some(*next));
        *next += 1;
        assert!(client.transfers.available_permits() >= limits.transfers - 2);
    }
    assert_eq!(next, [3; 40]);
}

#[tokio::test]
async fn a_message_that_cannot_be_made_ends_the_connection() {
    let mut client = connect(1, 4096, StreamLimits::default());
    client.send(&[framed(13, RecordType::AXFR)]).await;
    assert!(client.receive().await.is_err());
    client.served.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn queries_that_wait_for_one_without_an_answer_are_answered() {
    let mut client = connect(1, 4096, StreamLimits { pipelined: 1, ..StreamLimits::default() });
    client
        .send(&[framed(14, RecordType::AXFR), framed(14, RecordType::AXFR), framed(2, RecordType::A)])
        .await;
    let received = timeout(Duration::from_secs(5), client.receive()).await;
    assert_eq!(received.unwrap().unwrap(), (2, None));
}
