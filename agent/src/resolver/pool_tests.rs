//! Fail-over among servers on loopback: who is asked, who is passed over, and how one comes back.

use hickory_proto::op::ResponseCode;
use muster_common::tls;
use prometheus_client::{encoding::text::encode, registry::Registry};
use rustls::RootCertStore;
use tokio::{net::UdpSocket, task::JoinHandle};

use super::{super::metrics::Metrics, *};

/// Signs of life are asked for at once, and again soon.
const HEALTH: Health = Health { interval: Duration::from_millis(10), max_fails: 2 };
/// Long after a failure has been forgotten.
const LATER: Duration = Duration::from_secs(3600);
/// Something should have happened by then.
const DEADLINE: Duration = Duration::from_secs(20);

fn pool(kind: Kind, health: Health, registry: &mut Registry) -> Pool {
    let config = ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    Pool::new(kind, config, health, Metrics::register(registry).forward, Arc::default())
}

fn query(name: &str) -> Message {
    let mut query = Message::query();
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    query
}

/// A server over UDP that answers everything with one code. It is gone once dropped.
struct Answering {
    address: SocketAddr,
    /// The names that it has been asked for.
    asked: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Answering {
    async fn start(address: SocketAddr, code: ResponseCode) -> Self {
        // A port that has just been left may serve another program for a moment.
        let bind = async {
            loop {
                match UdpSocket::bind(address).await {
                    Ok(socket) => return socket,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        let socket = tokio::time::timeout(DEADLINE, bind).await.unwrap();
        let (address, asked) = (socket.local_addr().unwrap(), Arc::<Mutex<Vec<_>>>::default());
        let names = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            let mut buffer = [0; 1500];
            // An error is that an asker has gone.
            loop {
                let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
                let query = Message::from_vec(&buffer[..length]).unwrap();
                let question = &query.queries[0];
                let name = question.name.to_ascii().to_lowercase();
                names.lock().unwrap().push(format!("{name} {}", question.query_type()));
                let mut response = Message::response(query.metadata.id, query.metadata.op_code);
                response.metadata.response_code = code;
                response.add_query(question.clone());
                let _ = socket.send_to(&response.to_vec().unwrap(), from).await;
            }
        });
        Self { address, asked, task }
    }

    /// What it has been asked for since last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    /// From now on, what is sent there is refused.
    async fn stop(self) -> SocketAddr {
        self.task.abort();
        let _ = self.task.await;
        self.address
    }
}

async fn answering(code: ResponseCode) -> Answering {
    Answering::start("127.0.0.1:0".parse().unwrap(), code).await
}

/// An address where nobody answers.
async fn nobody() -> SocketAddr {
    answering(ResponseCode::NoError).await.stop().await
}

async fn until(what: &str, is: impl Fn() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("not even late: {what}"));
}

/// Whether each server would be asked last, long after its last failure.
fn down(pool: &Pool) -> Vec<bool> {
    let (servers, later) = (pool.servers.load_full(), Instant::now() + LATER);
    servers.iter().map(|server| server.distrusted(pool.client.health, later)).collect()
}

#[tokio::test]
async fn a_server_that_fails_is_passed_over_until_it_gives_a_sign_of_life() {
    let (first, second) = (nobody().await, answering(ResponseCode::NoError).await);
    let mut registry = Registry::default();
    let pool = pool(Kind::Udp, HEALTH, &mut registry);
    pool.set(&[first, second.address]);
    pool.exchange(&query("one.example.")).await.unwrap();
    assert_eq!(second.asked(), ["one.example. A"]);

    // Signs of life that it does not give count like queries that it does not answer.
    until("down", || down(&pool) == [true, false]).await;
    let metrics = || {
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    };
    let failed_checks = format!("proxy_healthcheck_failures_total{{proxy_name=\"forward\",to=\"{first}\"}} ");
    let text = metrics();
    assert!(text.contains(&failed_checks) && !text.contains(&format!("{failed_checks}0")), "{text}");
    assert!(text.contains("forward_healthcheck_broken_total 0"), "{text}");

    pool.exchange(&query("two.example.")).await.unwrap();
    assert_eq!(second.asked(), ["two.example. A"]);

    // Back, it is asked for one sign of life first, and then for everything.
    let first = Answering::start(first, ResponseCode::NoError).await;
    until("back", || down(&pool) == [false, false]).await;
    assert_eq!(first.asked(), [". NS"]);
    pool.exchange(&query("three.example.")).await.unwrap();
    assert_eq!((first.asked(), second.asked()), (vec!["three.example. A".to_owned()], vec![]));

    // It may fail and come back again.
    let first = first.stop().await;
    pool.exchange(&query("four.example.")).await.unwrap();
    assert_eq!(second.asked(), ["four.example. A"]);
    until("down", || down(&pool) == [true, false]).await;
    let first = Answering::start(first, ResponseCode::ServFail).await;
    // Any answer is a sign of life.
    until("back", || down(&pool) == [false, false]).await;
    assert_eq!(first.asked(), [". NS"]);
}

#[tokio::test]
async fn servers_that_are_all_down_are_asked_all_the_same() {
    // No sign of life is asked for as long as the test runs.
    let health = Health { interval: LATER, max_fails: 1 };
    let (first, second) = (nobody().await, nobody().await);
    let mut registry = Registry::default();
    let pool = pool(Kind::Udp, health, &mut registry);
    pool.set(&[first, second]);
    assert!(!pool.is_failing());
    let error = pool.exchange(&query("one.example.")).await.unwrap_err();
    assert!(matches!(error, PoolError::Failed { server, .. } if server == second), "{error}");
    assert!(pool.is_failing() && down(&pool) == [true, true]);
    // But not at once.
    let error = pool.exchange(&query("two.example.")).await.unwrap_err();
    assert!(matches!(error, PoolError::Paused), "{error}");
    for server in &*pool.servers.load_full() {
        *server.failed_at.lock().unwrap() = None;
    }
    assert!(pool.is_failing());
    let second = Answering::start(second, ResponseCode::NoError).await;
    pool.exchange(&query("three.example.")).await.unwrap();
    assert_eq!(second.asked(), ["three.example. A"]);
    assert!(!pool.is_failing() && down(&pool) == [true, false], "an answer is a sign of life");
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    assert!(text.contains("forward_healthcheck_broken_total 1"), "{text}");
}

#[tokio::test]
async fn a_server_is_down_after_so_many_failures_in_a_row() {
    for (max_fails, expected) in [(0, [false; 4]), (1, [true; 4]), (3, [false, false, true, true])] {
        let health = Health { interval: LATER, max_fails };
        let (address, good) = (nobody().await, answering(ResponseCode::NoError).await);
        let pool = pool(Kind::Udp, health, &mut Registry::default());
        pool.set(&[address, good.address]);
        for (failure, expected) in (1..).zip(expected) {
            // As if the last failure were long ago: it is asked first again, unless it is down.
            *pool.servers.load_full()[0].failed_at.lock().unwrap() = None;
            pool.exchange(&query("web.example.")).await.unwrap();
            assert_eq!(down(&pool), [expected, false], "{failure} of {max_fails}");
        }
    }
}

#[test]
fn failures_count_in_a_row_alone_and_are_not_forgotten_while_a_server_is_down() {
    let server = Server::new("192.0.2.1:53".parse().unwrap(), &Kind::Udp);
    let fail = || {
        server.note(true);
        server.fails.fetch_add(1, Ordering::Relaxed);
    };
    let distrusted = |after| server.distrusted(HEALTH, Instant::now() + after);
    let soon = DISTRUST / 2;
    assert!(!distrusted(Duration::ZERO));
    fail();
    assert!(distrusted(soon) && !distrusted(LATER));
    server.note(false);
    fail();
    assert!(distrusted(soon) && !distrusted(LATER), "an answer has come between the two");
    fail();
    assert!(distrusted(soon) && distrusted(LATER));
    server.note(false);
    assert!(!distrusted(Duration::ZERO));
}

#[tokio::test]
async fn servers_that_are_no_longer_in_use_are_left_alone() {
    let pool = pool(Kind::Udp, HEALTH, &mut Registry::default());
    pool.set(&[nobody().await]);
    assert!(pool.exchange(&query("one.example.")).await.is_err());
    let server = Arc::downgrade(&pool.servers.load_full()[0]);
    // It has been asked for a sign of life.
    until("checked", || server.upgrade().is_some_and(|server| server.fails.load(Ordering::Relaxed) > 1))
        .await;
    pool.set(&[]);
    until("nobody asks it any more", || server.strong_count() == 0).await;
}
