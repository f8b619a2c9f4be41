//! The resolver between real programs on loopback: `dig` asks it, it asks a registrar's DNS over mutual TLS and a
//! server that plays the host's own.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

mod changes;
mod forwarding;
mod metrics;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, SOA, TXT},
    },
};
use muster_agent::resolver::{Network, ResolveError, Resolver, Settings, Unsaved};
use muster_common::{
    identity::Party,
    tls::{ALPN_DOT, Credentials, KeyPair},
};
use muster_dns::{
    directory::{Device, Viewer, Zone},
    engine::{Engine, Outcome},
    fixed::FixedDirectory,
    message::{Parsed, parse},
    server::{
        Authoritative, Handler, Handling, Source, bind_tcp, bind_udp,
        metrics::Metrics,
        stream::{self, StreamLimits},
        udp::{self, UdpLimits},
    },
};
use prometheus_client::registry::Registry;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as RcgenKey, KeyUsagePurpose, SanType,
};
use rustls::pki_types::PrivateKeyDer;
use tokio::{
    process::Command,
    sync::{mpsc, watch},
    task::JoinHandle,
};

const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const REGISTRAR: &str = "spiffe://muster.test/registrar/r1";
const DEVICE: &str = "spiffe://muster.test/network/net/device/d1";

/// A CA and what it issues.
struct Authority(CertifiedIssuer<'static, RcgenKey>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, RcgenKey::generate().unwrap()).unwrap())
    }

    fn issue(&self, id: &str) -> KeyPair {
        let key = RcgenKey::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::days(1);
        params.not_after = now + time::Duration::days(1);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        KeyPair {
            chain: vec![certificate.der().clone(), self.0.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        }
    }

    fn credentials(&self, id: &str) -> Arc<Credentials> {
        Credentials::new(&self.issue(id), &[self.0.der().clone()]).unwrap()
    }
}

fn addresses<T: std::str::FromStr<Err: std::fmt::Debug>>(list: &[&str]) -> Vec<T> {
    list.iter().map(|text| text.parse().unwrap()).collect()
}

fn directory(ttl: u32) -> FixedDirectory {
    let zone = Zone {
        domain: "net.example".parse().unwrap(),
        network: "net".parse().unwrap(),
        ttl,
        serial: 1,
        public_addresses: addresses(&["203.0.113.10"]),
        name_server_addresses: addresses(&["203.0.113.53"]),
        pools: addresses(&["100.64.0.0/11"]),
        external_domain: None,
        external_serial: 1,
    };
    let web = Device {
        name: "web".parse().unwrap(),
        virtual_addresses: addresses(&["100.64.1.7", "fd00:1:2::7"]),
        private_addresses: addresses(&["192.168.1.7"]),
        director: addresses(&["203.0.113.20:3478"]),
    };
    FixedDirectory { zones: vec![(Arc::new(zone), vec![web])], ..FixedDirectory::default() }
}

fn viewer(source: &Source) -> Viewer {
    match source.identity.as_deref().map(|identity| &identity.party) {
        Some(Party::Device { network, uid }) => Viewer::Member { network: network.clone(), uid: uid.clone() },
        _ => Viewer::Stranger,
    }
}

/// Counts what the handler within is asked.
struct Counted<H>(H, Arc<AtomicUsize>);

impl<H: Handler> Handler for Counted<H> {
    fn handle(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.handle(query, source, out)
    }
}

/// A running server, with the number of queries it has had. Stops when aborted or dropped.
struct Running {
    address: SocketAddr,
    queries: Arc<AtomicUsize>,
    tasks: Vec<JoinHandle<std::io::Result<()>>>,
}

impl Running {
    fn queries(&self) -> usize {
        self.queries.load(Ordering::Relaxed)
    }

    /// Stops it, and returns when its connections are closed.
    async fn stop(mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
        // Each connection's task holds the handler.
        while Arc::strong_count(&self.queries) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn uncounted() -> Metrics {
    Metrics::register(&mut Registry::default())
}

/// A registrar's DNS over TLS.
fn registrar(authority: &Authority, ttl: u32) -> Running {
    registrar_with(authority, Authoritative::new(Engine::new(directory(ttl)), viewer))
}

fn registrar_with(authority: &Authority, handler: impl Handler) -> Running {
    let queries = Arc::<AtomicUsize>::default();
    let handler = Arc::new(Counted(handler, Arc::clone(&queries)));
    let listener = bind_tcp(ANY_PORT, false).unwrap();
    let address = listener.local_addr().unwrap();
    let config = authority.credentials(REGISTRAR).resuming_server(ALPN_DOT).unwrap();
    let task = tokio::spawn(async move {
        stream::serve_tls(listener, config, handler, StreamLimits::default(), &uncounted()).await
    });
    Running { address, queries, tasks: vec![task] }
}

/// A server over UDP and TCP.
fn server(handler: impl Handler) -> Running {
    let queries = Arc::<AtomicUsize>::default();
    let handler = Arc::new(Counted(handler, Arc::clone(&queries)));
    let socket = bind_udp(ANY_PORT, false).unwrap();
    let address = socket.local_addr().unwrap();
    let listener = bind_tcp(address, false).unwrap();
    let for_tcp = Arc::clone(&handler);
    let limits = UdpLimits { rate: None, ..UdpLimits::default() };
    let udp = tokio::spawn(async move { udp::serve(socket, handler, limits, &uncounted()).await });
    let tcp = tokio::spawn(async move {
        stream::serve_tcp(listener, for_tcp, StreamLimits::default(), &uncounted()).await
    });
    Running { address, queries, tasks: vec![udp, tcp] }
}

/// The host's own server, as far as it knows example.org.
struct Elsewhere;

impl Handler for Elsewhere {
    fn handle(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling {
        let Parsed::Request(request) = parse(query) else { panic!("not a query") };
        let mut response = request.response(ResponseCode::NoError);
        let name = request.question.name.clone();
        let mut slow = false;
        match name.to_ascii().to_lowercase().as_str() {
            "www.example.org." | "slow.example.org." => {
                slow = name.to_ascii().starts_with("slow");
                response.answers.push(Record::from_rdata(name, 60, RData::A(A([192, 0, 2, 80].into()))));
            }
            "registrar.example.org." | "net.example." if request.record_type() == RecordType::A => {
                response.answers.push(Record::from_rdata(name, 60, RData::A(A([127, 0, 0, 1].into()))));
            }
            "big.example.org." => {
                for i in 0..100 {
                    let text = TXT::new(vec![format!("{i:0100}")]);
                    response.answers.push(Record::from_rdata(name.clone(), 60, RData::TXT(text)));
                }
            }
            "broken.example.org." => response.metadata.response_code = ResponseCode::ServFail,
            _ => {
                response.metadata.response_code = ResponseCode::NXDomain;
                let org = Name::from_ascii("example.org.").unwrap();
                let soa = SOA::new(org.clone(), org.clone(), 1, 2, 3, 4, 60);
                response.authorities.push(Record::from_rdata(org, 60, RData::SOA(soa)));
            }
        }
        response.encode(request.max_size(source.transport), out).unwrap();
        let outcome = Outcome::Silence;
        if slow {
            let out = std::mem::take(out);
            return Handling::Later(Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(300)).await;
                (outcome, out)
            }));
        }
        Handling::Done(outcome)
    }
}

struct Host {
    resolver: Resolver,
    resolved: mpsc::Receiver<IpAddr>,
    address: SocketAddr,
    /// Keeps the channel to the resolver open, and tells it of other registrars.
    servers: watch::Sender<Vec<String>>,
}

fn host(credentials: &Arc<Credentials>, registrars: &[String], upstream: &[SocketAddr]) -> Host {
    host_with(credentials, registrars, Settings { upstream: upstream.to_vec(), ..Settings::default() })
}

fn host_with(credentials: &Arc<Credentials>, registrars: &[String], settings: Settings) -> Host {
    host_counted(credentials, registrars, settings, &mut Registry::default())
}

/// Its metrics go to `registry`.
fn host_counted(
    credentials: &Arc<Credentials>,
    registrars: &[String],
    settings: Settings,
    registry: &mut Registry,
) -> Host {
    let mut settings = Settings { resolv_conf: "/nonexistent".into(), ..settings };
    if settings.listen == Settings::default().listen {
        settings.listen = vec![ANY_PORT];
    }
    let network = Network { domain: "net.example".parse().unwrap(), routes: addresses(&["100.64.0.0/11"]) };
    let (servers, watch) = watch::channel(registrars.to_vec());
    let started = Resolver::start(&settings, network, credentials, watch, registry);
    let (resolver, resolved) = started.unwrap();
    let address = resolver.stats().listen[0];
    Host { resolver, resolved, address, servers }
}

impl Host {
    async fn dig(&self, arguments: &[&str]) -> String {
        let output = Command::new("dig")
            .args([&format!("@{}", self.address.ip()), "-p", &self.address.port().to_string()])
            .args(arguments)
            .output()
            .await;
        String::from_utf8(output.unwrap().stdout).unwrap()
    }

    /// Until the registrars' addresses are known, which takes a moment.
    async fn ready(&self) {
        while self.resolver.stats().registrars.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Whether `dig` is there; if it need not be, says so.
fn has_dig() -> bool {
    static HAS_DIG: OnceLock<bool> = OnceLock::new();
    *HAS_DIG.get_or_init(|| match std::process::Command::new("dig").arg("-v").output() {
        Ok(_) => true,
        Err(error) if std::env::var_os("MUSTER_REQUIRE_ROOT").is_none() => {
            eprintln!("skipped: cannot run dig: {error}; install dnsutils");
            false
        }
        Err(error) => panic!("cannot run dig: {error}; install dnsutils"),
    })
}

fn contains_all(output: &str, expected: &[&str]) {
    for text in expected {
        assert!(output.contains(text), "{text} is not in {output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_is_resolved_with_its_three_addresses() {
    let authority = Authority::new();
    let registrar = registrar(&authority, 60);
    let mut host = host(&authority.credentials(DEVICE), &[registrar.address.to_string()], &[]);
    host.ready().await;
    if has_dig() {
        let output = host.dig(&["web.net.example", "A"]).await;
        let expected = [
            "status: NOERROR",
            "flags: qr rd ra;",
            "web.net.example.\t60\tIN\tA\t100.64.1.7",
            "private.web.net.example. 60\tIN\tA\t192.168.1.7",
            "director.web.net.example. 60\tIN\tA\t203.0.113.20",
        ];
        contains_all(&output, &expected);
        // The data plane hears of it at once.
        assert_eq!(host.resolved.recv().await, Some("100.64.1.7".parse().unwrap()));
        let asked = registrar.queries();
        contains_all(&host.dig(&["+tcp", "WEB.net.example"]).await, &["WEB.net.example.", "100.64.1.7"]);
        assert_eq!(registrar.queries(), asked);
        contains_all(&host.dig(&["-x", "100.64.1.7"]).await, &["PTR\tweb.net.example."]);
    }
    let answer = host.resolver.resolve("web").await.unwrap();
    assert_eq!(answer.name, "web.net.example");
    assert_eq!(answer.addresses, addresses::<IpAddr>(&["100.64.1.7", "fd00:1:2::7"]));
    assert_eq!(answer.private, addresses::<IpAddr>(&["192.168.1.7"]));
    assert_eq!(answer.director, addresses::<IpAddr>(&["203.0.113.20"]));
    assert!(!answer.stale && answer.ttl > Duration::from_secs(50));
    assert!(matches!(host.resolver.resolve("nobody").await, Err(ResolveError::NotFound(_))));
    assert!(matches!(host.resolver.resolve("a..b").await, Err(ResolveError::Name(_))));

    let asked = registrar.queries();
    host.resolver.resolve("web").await.unwrap();
    assert_eq!(registrar.queries(), asked);
    host.resolver.invalidate("web");
    host.resolver.resolve("web").await.unwrap();
    assert_eq!(registrar.queries(), asked + 2);
    let stats = host.resolver.stats();
    assert!(stats.cache_entries > 0 && stats.cache_hits > 0 && stats.queries > stats.cache_hits);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_names_go_to_the_hosts_own_server() {
    if !has_dig() {
        return;
    }
    let authority = Authority::new();
    let registrar = registrar(&authority, 60);
    let elsewhere = server(Elsewhere);
    let host = host(&authority.credentials(DEVICE), &[registrar.address.to_string()], &[elsewhere.address]);
    contains_all(&host.dig(&["www.example.org"]).await, &["www.example.org.\t60\tIN\tA\t192.0.2.80"]);
    assert_eq!((elsewhere.queries(), registrar.queries()), (1, 0));
    // Too large for UDP on the way in; over TCP it is had whole, and truncated for our client's UDP.
    let output = host.dig(&["big.example.org", "TXT"]).await;
    contains_all(&output, &["retrying in TCP mode", "ANSWER: 100,"]);
    assert_eq!(elsewhere.queries(), 3);
    // Negative answers are kept, for their own type.
    for _ in 0..3 {
        contains_all(&host.dig(&["nx.example.org"]).await, &["status: NXDOMAIN", "SOA"]);
    }
    assert_eq!(elsewhere.queries(), 4);
    host.dig(&["nx.example.org", "TXT"]).await;
    assert_eq!(elsewhere.queries(), 5);
    contains_all(&host.dig(&["broken.example.org"]).await, &["status: SERVFAIL"]);
    contains_all(&host.dig(&["www.example.org", "AXFR"]).await, &["Transfer failed"]);
    assert_eq!(registrar.queries(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_question_is_asked_once_however_many_ask_it() {
    let authority = Authority::new();
    let elsewhere = server(Elsewhere);
    let host = Arc::new(host(&authority.credentials(DEVICE), &[], &[elsewhere.address]));
    let asking: Vec<_> = (0..50)
        .map(|_| {
            let host = Arc::clone(&host);
            tokio::spawn(async move { host.resolver.resolve("slow.example.org").await.unwrap().addresses })
        })
        .collect();
    for asked in asking {
        assert_eq!(asked.await.unwrap()[0], IpAddr::from([192, 0, 2, 80]));
    }
    // One for A, one for AAAA.
    assert_eq!(elsewhere.queries(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_outlive_the_registrar_and_a_restart() {
    let authority = Authority::new();
    // Answers that hold for no time at all, so that they are stale at once.
    let registrar = registrar(&authority, 0);
    let credentials = authority.credentials(DEVICE);
    let servers = [registrar.address.to_string()];
    let first = host(&credentials, &servers, &[]);
    first.ready().await;
    assert!(!first.resolver.resolve("web").await.unwrap().stale);
    registrar.stop().await;
    let answer = first.resolver.resolve("web").await.unwrap();
    assert!(answer.stale && answer.private == addresses::<IpAddr>(&["192.168.1.7"]));
    assert!(matches!(first.resolver.resolve("unknown").await, Err(ResolveError::Query { .. })));
    if has_dig() {
        let output = first.dig(&["web.net.example"]).await;
        contains_all(
            &output,
            &["NOERROR", "EDE: 3 (Stale Answer)", "web.net.example.\t30\tIN\tA\t100.64.1.7"],
        );
        contains_all(&first.dig(&["unknown.net.example"]).await, &["SERVFAIL"]);
    }
    let snapshot = first.resolver.snapshot();
    drop(first);
    let second = host(&credentials, &servers, &[]);
    assert!(second.resolver.resolve("web").await.is_err());
    assert_eq!(second.resolver.restore(&snapshot).unwrap(), 2);
    let answer = second.resolver.resolve("web").await.unwrap();
    assert!(answer.stale && answer.addresses.len() == 2);
    assert!(second.resolver.restore(&snapshot[1..]).is_err());
}

/// Resolves until it succeeds: servers that have just failed are given a rest.
async fn eventually(host: &Host, name: &str) {
    let mut failures = Vec::new();
    let succeed = async {
        while let Err(error) = host.resolver.resolve(name).await {
            failures.push(error.to_string());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(Duration::from_secs(15), succeed).await.is_err() {
        failures.dedup();
        panic!("{failures:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_registrar_takes_over() {
    let authority = Authority::new();
    let (one, two) = (registrar(&authority, 0), registrar(&authority, 0));
    let servers = [one.address.to_string(), two.address.to_string()];
    let host = host(&authority.credentials(DEVICE), &servers, &[]);
    host.ready().await;
    host.resolver.resolve("web").await.unwrap();
    assert_eq!((one.queries(), two.queries()), (2, 0));
    one.stop().await;
    assert!(!host.resolver.resolve("web").await.unwrap().stale);
    assert_eq!(two.queries(), 2);
    // The registrars are told anew, and the old ones are gone.
    let three = registrar(&authority, 0);
    host.servers.send(vec![three.address.to_string()]).unwrap();
    two.stop().await;
    while three.queries() == 0 {
        eventually(&host, "web").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_used() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let registrar = registrar(&authority, 60);
    let foreign = Credentials::new(&foreign.issue(DEVICE), &[authority.0.der().clone()]).unwrap();
    let host = host(&foreign, &[registrar.address.to_string()], &[]);
    host.ready().await;
    assert!(host.resolver.resolve("web").await.is_err());
    assert_eq!(registrar.queries(), 0);
    foreign.replace_key(&authority.issue(DEVICE)).unwrap();
    eventually(&host, "web").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registrars_are_looked_up_at_the_hosts_own_server() {
    let authority = Authority::new();
    let registrar = registrar(&authority, 60);
    let elsewhere = server(Elsewhere);
    // Even one under the very domain that it serves.
    for name in ["registrar.example.org", "Net.Example"] {
        let servers = [format!("{name}:{}", registrar.address.port())];
        let host = host(&authority.credentials(DEVICE), &servers, &[elsewhere.address]);
        host.ready().await;
        assert_eq!(host.resolver.stats().registrars, [registrar.address]);
        assert_eq!(host.resolver.resolve("web").await.unwrap().addresses.len(), 2);
    }
}

/// Passes every query on to the address that it is told later, as another resolver on the host may.
struct Forwarder(Arc<OnceLock<SocketAddr>>);

impl Handler for Forwarder {
    fn handle(&self, query: &[u8], _: &Source, _: &mut Vec<u8>) -> Handling {
        let (query, target) = (query.to_vec(), *self.0.get().unwrap());
        Handling::Later(Box::pin(async move {
            let socket = tokio::net::UdpSocket::bind(ANY_PORT).await.unwrap();
            socket.connect(target).await.unwrap();
            socket.send(&query).await.unwrap();
            let mut response = vec![0; 1500];
            let received = tokio::time::timeout(Duration::from_secs(10), socket.recv(&mut response)).await;
            response.truncate(received.map_or(0, Result::unwrap));
            (Outcome::Silence, response)
        }))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_ends() {
    let target = Arc::new(OnceLock::new());
    let forwarder = server(Forwarder(Arc::clone(&target)));
    let host = host(&Authority::new().credentials(DEVICE), &[], &[forwarder.address]);
    target.set(host.address).unwrap();
    assert!(host.resolver.resolve("www.example.org").await.is_err());
    // A few tries each for A and AAAA, and no more for what has come back.
    assert!((2..=20).contains(&forwarder.queries()), "{}", forwarder.queries());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_server_there_is_an_answer_that_says_so() {
    let host = host(&Authority::new().credentials(DEVICE), &[], &[]);
    let error = host.resolver.resolve("www.example.org").await.unwrap_err().to_string();
    assert!(error.contains("www.example.org") && error.contains("no server to ask"), "{error}");
    let error = host.resolver.resolve("web").await.unwrap_err().to_string();
    assert!(error.contains("web.net.example") && error.contains("registrar"), "{error}");
    let socket = tokio::net::UdpSocket::bind(ANY_PORT).await.unwrap();
    socket.connect(host.address).await.unwrap();
    for noise in [&[][..], &[0; 5], &[0xff; 40], &[0; 12]] {
        socket.send(noise).await.unwrap();
    }
    let mut response = [0; 512];
    let length = socket.recv(&mut response).await.unwrap();
    let response = Message::from_vec(&response[..length]).unwrap();
    assert_eq!(response.metadata.response_code, ResponseCode::FormErr);
    assert!(response.metadata.recursion_available);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registrar_that_does_not_even_refuse_delays_no_known_name() {
    let authority = Authority::new();
    let registrar = registrar(&authority, 0);
    let credentials = authority.credentials(DEVICE);
    let first = host(&credentials, &[registrar.address.to_string()], &[]);
    first.ready().await;
    first.resolver.resolve("web").await.unwrap();
    let snapshot = first.resolver.snapshot();
    drop(first);
    // Connections are made, and nothing ever comes over them.
    let silent = std::net::TcpListener::bind(ANY_PORT).unwrap();
    let second = host(&credentials, &[silent.local_addr().unwrap().to_string()], &[]);
    second.ready().await;
    second.resolver.restore(&snapshot).unwrap();
    let known = tokio::time::timeout(Duration::from_millis(1200), second.resolver.resolve("web"));
    assert!(known.await.expect("at once").unwrap().stale);
    // Those who wait for one connection hear together that it has failed, and do not try it one after the other.
    let unknown = |n: u32| {
        let name = format!("unknown{n}");
        let resolver = &second.resolver;
        async move { resolver.resolve(&name).await.map(drop).unwrap_err().to_string() }
    };
    let all = futures_util::future::join_all((0..50).map(unknown));
    let errors = tokio::time::timeout(Duration::from_millis(3500), all).await.expect("all together");
    assert!(
        errors.iter().all(|e| e.contains("cannot get an answer") || e.contains("a moment ago")),
        "{errors:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_new_has_to_be_saved_soon() {
    let authority = Authority::new();
    let registrar = registrar(&authority, 0);
    let host = host(&authority.credentials(DEVICE), &[registrar.address.to_string()], &[]);
    host.ready().await;
    assert_eq!(host.resolver.unsaved(), Unsaved::Nothing);
    host.resolver.resolve("web").await.unwrap();
    assert_eq!(host.resolver.unsaved(), Unsaved::New);
    host.resolver.snapshot();
    assert_eq!(host.resolver.unsaved(), Unsaved::Nothing);
    host.resolver.resolve("web").await.unwrap();
    assert_eq!(host.resolver.unsaved(), Unsaved::Refreshed);
    // That something does not exist is not worth a write.
    host.resolver.snapshot();
    assert!(host.resolver.resolve("nothing").await.is_err());
    assert_ne!(host.resolver.unsaved(), Unsaved::New);
}
