//! Over TCP: pipelines, bounds, and how connections end.

use std::{sync::Arc, time::Duration};

use hickory_proto::op::Message;
use muster_dns::server::stream::StreamLimits;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{ANY_PORT, Slow, authoritative, framed, is_closed, open, read_response, serve_tcp};

#[tokio::test]
async fn slow_answers_do_not_hold_up_others() {
    let address = serve_tcp(Arc::new(Slow), ANY_PORT, StreamLimits::default()).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let frames: Vec<u8> = [400, 1, 200].into_iter().flat_map(|id| framed("a.example.", id)).collect();
    // One octet at a time is no obstacle; neither is closing our half.
    for octet in frames {
        stream.write_all(&[octet]).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    for id in [1, 200, 400] {
        assert_eq!(read_response(&mut stream).await.metadata.id, id);
    }
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_pipeline_longer_than_allowed_is_answered_all_the_same() {
    let limits = StreamLimits { pipelined: 3, ..StreamLimits::default() };
    let address = serve_tcp(Arc::new(Slow), ANY_PORT, limits).await;
    let (mut read, mut write) = TcpStream::connect(address).await.unwrap().into_split();
    let writer = tokio::spawn(async move {
        let frames: Vec<u8> = (0..500).flat_map(|id| framed("a.example.", id % 3)).collect();
        write.write_all(&frames).await.unwrap();
        write
    });
    for _ in 0..500 {
        read_response(&mut read).await;
    }
    drop(writer.await.unwrap());
}

#[tokio::test]
async fn connections_are_bounded_and_end() {
    let idle = Duration::from_millis(300);
    let limits = StreamLimits { connections: 5, connections_per_client: 2, idle, ..StreamLimits::default() };
    let address = serve_tcp(authoritative(open), ANY_PORT, limits).await;
    let mut first = TcpStream::connect(address).await.unwrap();
    first.write_all(&framed("web.net.example.", 1)).await.unwrap();
    assert_eq!(read_response(&mut first).await.answers.len(), 1);
    let mut second = TcpStream::connect(address).await.unwrap();
    second.write_all(&framed("web.net.example.", 2)).await.unwrap();
    assert_eq!(read_response(&mut second).await.answers.len(), 1);
    assert!(is_closed(&mut TcpStream::connect(address).await.unwrap()).await);
    // Both are closed for idleness, half a query or not, and there is room again.
    second.write_all(&[0]).await.unwrap();
    assert!(is_closed(&mut first).await && is_closed(&mut second).await);
    let mut greedy = TcpStream::connect(address).await.unwrap();
    greedy.write_all(&[0xff, 0xff, 0]).await.unwrap();
    assert!(is_closed(&mut greedy).await);
}

#[tokio::test]
async fn a_connection_ends_with_its_age() {
    let limits = StreamLimits { age: Duration::from_millis(200), ..StreamLimits::default() };
    let address = serve_tcp(authoritative(open), ANY_PORT, limits).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    // Busy all the time, and answered until the end.
    for id in 0..1000 {
        if stream.write_all(&framed("web.net.example.", id)).await.is_err() {
            return;
        }
        let Ok(length) = tokio::time::timeout(Duration::from_secs(5), stream.read_u16()).await.unwrap()
        else {
            return;
        };
        let mut response = vec![0; usize::from(length)];
        stream.read_exact(&mut response).await.unwrap();
        assert_eq!(Message::from_vec(&response).unwrap().metadata.id, id);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the connection is still open");
}
