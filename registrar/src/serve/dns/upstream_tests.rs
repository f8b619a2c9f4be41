use hickory_proto::rr::{RData, Record, rdata::A};
use tokio::net::TcpListener;

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

#[test]
fn spelling_is_mixed() {
    let long = Name::from_ascii("abcdefghijklmnopqrstuvwxyz.abcdefghijklmnopqrstuvwxyz.example.").unwrap();
    let one = mixed(&long, &mut rand::rng());
    assert_eq!(one, long, "the same name");
    assert!(one.to_ascii().bytes().any(|b| b.is_ascii_uppercase()));
    assert!(one.is_fqdn());
}
