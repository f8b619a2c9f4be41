//! Over UDP: batches, several sockets, answers that take time, floods.

use std::{sync::Arc, time::Duration};

use hickory_proto::{op::Message, rr::RecordType};
use muster_dns::{
    engine::Outcome,
    server::{
        Handler, Handling, Source, bind_udp,
        limit::Rate,
        udp::{self, UdpLimits, UdpSockets},
    },
};
use tokio::net::UdpSocket;

use crate::{ANY_PORT, Slow, authoritative, framed, metrics, open, serve_udp, support::query};

/// A query for web.net.example with this id.
fn numbered(id: u16) -> Vec<u8> {
    framed("web.net.example.", id).split_off(2)
}

/// Sockets of one address, and a client that has sent `queries` to it before anything is served.
fn asked_already(queries: &[Vec<u8>]) -> (UdpSockets, std::net::UdpSocket) {
    let sockets = UdpSockets::bind(ANY_PORT, false, 1).unwrap();
    let client = std::net::UdpSocket::bind(ANY_PORT).unwrap();
    client.connect(sockets.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    for query in queries {
        client.send(query).unwrap();
    }
    (sockets, client)
}

fn receive(client: &std::net::UdpSocket) -> Message {
    let mut buffer = [0; 1500];
    let length = client.recv(&mut buffer).unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

#[tokio::test]
async fn all_queries_of_a_batch_are_answered_whatever_is_among_them() {
    let mut queries: Vec<Vec<u8>> = (0..200).map(numbered).collect();
    let mut response = numbered(1000);
    response[2] |= 0x80;
    for (place, bad) in
        [vec![], vec![0; 3], vec![0xff; 30], response, vec![0xc0; 60_000]].into_iter().enumerate()
    {
        queries.insert(place * 15, bad);
    }
    let (sockets, client) = asked_already(&queries);
    let _running = udp::spawn(
        sockets,
        authoritative(open),
        UdpLimits { rate: None, ..UdpLimits::default() },
        &metrics(),
    )
    .unwrap();
    let mut answered = Vec::new();
    while answered.len() < 200 {
        let response = receive(&client);
        if !response.answers.is_empty() {
            assert_eq!(response.answers.len(), 1);
            answered.push(response.metadata.id);
        }
    }
    assert_eq!(answered, (0..200).collect::<Vec<_>>());
}

/// Answers with the query itself; to the ids 3 and 4, with more than a datagram holds.
struct Oversized;

impl Handler for Oversized {
    fn handle(&self, query: &[u8], _: &Source, out: &mut Vec<u8>) -> Handling {
        out.clear();
        out.extend_from_slice(query);
        if [3, 4].contains(&query[1]) {
            out.resize(70_000, 0);
        }
        Handling::Done(Outcome::Silence)
    }
}

#[tokio::test]
async fn a_response_that_cannot_be_sent_keeps_back_no_other() {
    let queries: Vec<Vec<u8>> = (0..8).map(numbered).collect();
    let (sockets, client) = asked_already(&queries);
    let _running = udp::spawn(sockets, Arc::new(Oversized), UdpLimits::default(), &metrics()).unwrap();
    for id in [0, 1, 2, 5, 6, 7] {
        assert_eq!(receive(&client).metadata.id, id);
    }
}

/// Notes on which threads it is called.
#[derive(Default)]
struct Threads(std::sync::Mutex<std::collections::BTreeSet<String>>);

impl Handler for Threads {
    fn handle(&self, query: &[u8], _: &Source, out: &mut Vec<u8>) -> Handling {
        let name = std::thread::current().name().unwrap().to_owned();
        self.0.lock().unwrap().insert(name);
        out.clear();
        out.extend_from_slice(query);
        Handling::Done(Outcome::Silence)
    }
}

#[tokio::test]
async fn every_socket_of_an_address_serves_and_ends_with_the_listener() {
    let handler = Arc::new(Threads::default());
    let sockets = UdpSockets::bind(ANY_PORT, false, 4).unwrap();
    let address = sockets.local_addr().unwrap();
    assert!(bind_udp(address, false).is_err(), "nobody joins in");
    let running = udp::spawn(
        sockets,
        Arc::clone(&handler),
        UdpLimits { rate: None, ..UdpLimits::default() },
        &metrics(),
    )
    .unwrap();
    for port in 0.. {
        let client = UdpSocket::bind(ANY_PORT).await.unwrap();
        client.connect(address).await.unwrap();
        client.send(&numbered(port)).await.unwrap();
        let received = tokio::time::timeout(Duration::from_secs(5), client.recv(&mut [0; 1500])).await;
        received.expect("each of them answers").unwrap();
        if handler.0.lock().unwrap().len() == 4 {
            break;
        }
        assert!(port < 1000, "{:?}", handler.0.lock().unwrap());
    }
    drop(running);
    assert_eq!(Arc::strong_count(&handler), 1, "its threads have ended");
    UdpSockets::bind(address, false, 4).unwrap();
}

#[tokio::test]
async fn answers_that_take_time_are_sent_when_they_are_ready() {
    let any = "[::]:0".parse().unwrap();
    for (listener, server) in [(ANY_PORT, "127.0.0.1"), (any, "127.0.0.77"), (any, "::1")] {
        let port = serve_udp(Arc::new(Slow), listener, None).await.port();
        let client = UdpSocket::bind((if server == "::1" { "::1" } else { "127.0.0.1" }, 0)).await.unwrap();
        client.connect((server, port)).await.unwrap();
        for id in [400, 1, 200] {
            client.send(&numbered(id)).await.unwrap();
        }
        for id in [1, 200, 400] {
            let mut buffer = [0; 1500];
            let received = tokio::time::timeout(Duration::from_secs(5), client.recv(&mut buffer)).await;
            let length = received.expect("an answer").unwrap();
            assert_eq!(Message::from_vec(&buffer[..length]).unwrap().metadata.id, id);
        }
    }
}

#[tokio::test]
async fn a_flood_gets_the_allowed_responses_and_some_hints() {
    let rate = Rate { per_second: 1, burst: 10 };
    let address = serve_udp(authoritative(open), ANY_PORT, Some(rate)).await;
    let client = UdpSocket::bind(ANY_PORT).await.unwrap();
    client.connect(address).await.unwrap();
    for _ in 0..40 {
        client.send(&query("web.net.example.", RecordType::A).to_vec().unwrap()).await.unwrap();
    }
    let (mut full, mut hints, mut buffer) = (0, 0, [0; 1500]);
    while let Ok(length) = tokio::time::timeout(Duration::from_millis(500), client.recv(&mut buffer)).await {
        let response = Message::from_vec(&buffer[..length.unwrap()]).unwrap();
        if response.metadata.truncation {
            assert!(response.answers.is_empty() && response.additionals.is_empty());
            hints += 1;
        } else {
            full += 1;
        }
    }
    assert!((10..=12).contains(&full), "{full}");
    // Half of the others, on average.
    assert!((4..=26).contains(&hints), "{hints}");
}
