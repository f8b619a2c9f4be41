//! Asks other DNS servers for what is elsewhere: targets of `ExternalName` Services, and names that fall through.
//! Each query has a socket of its own; a reply counts only if it comes from the server that was asked, with the
//! query's id and its question, spelled as it was sent.

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RecordType},
};
use rand::RngExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
};

/// How long one server may take over each transport.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long all servers together may take; clients ask again after 5 seconds.
const DEADLINE: Duration = Duration::from_millis(4500);
/// Queries under way at a time; what exceeds it is unanswered.
const IN_FLIGHT: usize = 1024;
/// The largest UDP reply that is asked for, so that none is fragmented.
const UDP_SIZE: u16 = 1232;
/// Replies that are read of one socket: after so many that do not belong to the query, somebody is guessing.
const REPLIES_MAX: u32 = 64;

/// What is asked: name in lower case, type, and whether the reply is to be whole.
type Question = (Name, RecordType, bool);
type Asking = BoxFuture<'static, Option<Message>>;

/// The servers that are asked.
#[derive(Clone, Debug)]
pub(super) struct Resolver {
    servers: Arc<[SocketAddr]>,
    in_flight: Arc<Semaphore>,
    /// What is being asked. All who ask the same share one query: several would be as many targets for a forger
    /// (RFC 5452, 5), and a server that asks the registrar in turn would be asked until there is no room left.
    asked: Arc<Mutex<HashMap<Question, WeakShared<Asking>>>>,
}

impl Resolver {
    /// Asks `servers`, in this order.
    pub(super) fn new(servers: Vec<SocketAddr>) -> Self {
        Self {
            servers: servers.into(),
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT)),
            asked: Arc::default(),
        }
    }

    /// The reply to the question for `name`, if any server gives one. With `complete`, one that does not fit into a
    /// datagram is fetched over TCP; otherwise it says that it is truncated.
    pub(super) async fn ask(&self, name: Name, record_type: RecordType, complete: bool) -> Option<Message> {
        let _slot = self.in_flight.try_acquire().ok()?;
        let question = (name.to_lowercase(), record_type, complete);
        // Dropped after the query, also when whoever asks goes away.
        let _forgotten = Forget { resolver: self, question: &question };
        self.asking(&question).await
    }

    /// The query for `question` that is under way, or else a new one.
    fn asking(&self, question: &Question) -> Shared<Asking> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(asking) = asked.get(question).and_then(WeakShared::upgrade) {
            return asking;
        }
        let (servers, wanted) = (self.servers.clone(), question.clone());
        let asking = async move {
            let found = first_useful(&servers, &wanted);
            tokio::time::timeout(DEADLINE, found).await.ok().flatten()
        };
        let asking = asking.boxed().shared();
        asked.extend(asking.downgrade().map(|weak| (question.clone(), weak)));
        asking
    }
}

/// Forgets a question once nobody waits for the reply any more.
struct Forget<'a> {
    resolver: &'a Resolver,
    question: &'a Question,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let mut asked = self.resolver.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.get(self.question).is_some_and(|asking| asking.upgrade().is_none()) {
            asked.remove(self.question);
        }
    }
}

/// The reply of the first server that has one.
async fn first_useful(servers: &[SocketAddr], question: &Question) -> Option<Message> {
    for server in servers {
        match ask_one(*server, question).await {
            Ok(reply) if is_useful(&reply) => return Some(reply),
            Ok(reply) => {
                tracing::debug!(%server, code = %reply.metadata.response_code, "upstream refuses");
            }
            Err(error) => tracing::debug!(%server, %error, "upstream does not answer"),
        }
    }
    None
}

async fn ask_one(server: SocketAddr, (name, record_type, complete): &Question) -> io::Result<Message> {
    let query = Asked::new(name, *record_type);
    let octets = query.encode()?;
    let reply = within(over_udp(server, &query, &octets)).await?;
    if reply.metadata.truncation && *complete {
        return within(over_tcp(server, &query, &octets)).await;
    }
    Ok(reply)
}

/// Whether the server has said something of the name; others may know more otherwise.
fn is_useful(reply: &Message) -> bool {
    matches!(reply.metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain)
}

async fn within<T>(asking: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(TIMEOUT, asking).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// A query as it was sent.
struct Asked {
    id: u16,
    question: Query,
}

impl Asked {
    fn new(name: &Name, record_type: RecordType) -> Self {
        let mut random = rand::rng();
        let mut question = Query::query(mixed(name, &mut random), record_type);
        question.set_query_class(DNSClass::IN);
        Self { id: random.random(), question }
    }

    fn encode(&self) -> io::Result<Vec<u8>> {
        let mut message = Message::new(self.id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.queries.push(self.question.clone());
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_SIZE);
        message.edns = Some(edns);
        message.to_vec().map_err(io::Error::other)
    }

    /// `octets`, if they are the reply to this query.
    fn reply(&self, octets: &[u8]) -> Option<Message> {
        if octets.first_chunk() != Some(&self.id.to_be_bytes()) {
            return None;
        }
        let message = Message::from_vec(octets).ok()?;
        let [question] = message.queries.as_slice() else { return None };
        let same = message.metadata.message_type == MessageType::Response
            && message.metadata.op_code == OpCode::Query
            && question.query_type() == self.question.query_type()
            && question.query_class() == DNSClass::IN
            && question.name().iter().eq(self.question.name().iter());
        same.then_some(message)
    }
}

/// `name`, each letter in upper or lower case at random: what a forger does not see, it has to guess.
fn mixed(name: &Name, random: &mut impl rand::RngExt) -> Name {
    let mut flip = |octet: &u8| {
        if random.random() { octet.to_ascii_uppercase() } else { octet.to_ascii_lowercase() }
    };
    let labels = name.iter().map(|label| label.iter().map(&mut flip).collect::<Vec<u8>>());
    let mixed = Name::from_labels(labels.collect::<Vec<_>>());
    mixed.map_or_else(
        |_| name.clone(),
        |mut mixed| {
            mixed.set_fqdn(true);
            mixed
        },
    )
}

async fn over_udp(server: SocketAddr, query: &Asked, octets: &[u8]) -> io::Result<Message> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // The kernel gives each socket a random port, and, as it is connected, only what the server sends.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(octets).await?;
    let mut room = vec![0; usize::from(UDP_SIZE)];
    for _ in 0..REPLIES_MAX {
        let length = socket.recv(&mut room).await?;
        if let Some(reply) = room.get(..length).and_then(|octets| query.reply(octets)) {
            return Ok(reply);
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "replies to other questions"))
}

async fn over_tcp(server: SocketAddr, query: &Asked, octets: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(octets.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), octets].concat()).await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await?;
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "a reply to another question");
    query.reply(&reply).ok_or_else(invalid)
}

#[cfg(test)]
#[path = "upstream_tests.rs"]
mod tests;
