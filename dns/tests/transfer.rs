//! Zone transfers from the listeners on loopback, by `dig` and `kdig`: everything that the directory has comes over,
//! beside other queries and within bounds.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Record, RecordType},
};
use muster_common::tls::{ALPN_DOT, Credentials, KeyPair};
use muster_dns::{
    directory::{Device, Endpoint, Port, Protocol, Service, ServiceKind, Viewer},
    engine::{Engine, Outcome},
    fixed::FixedDirectory,
    options::Options,
    server::{
        Authoritative, Handler, Handling, Messages, Source, bind_tcp, bind_udp,
        metrics::Metrics,
        stream::{self, StreamLimits},
        udp::{self, UdpLimits},
    },
};
use prometheus_client::registry::Registry;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as RcgenKey, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use support::{label, query};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    process::Command,
};

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Devices, and as many Services.
const COUNT: u32 = 20_000;

fn address(net: u32, number: u32) -> std::net::IpAddr {
    Ipv4Addr::from(net + number).into()
}

/// The network `net` with many devices, and Services: three of four with a cluster IP and a port, the last one
/// headless with an endpoint.
fn large() -> Arc<FixedDirectory> {
    static LARGE: OnceLock<Arc<FixedDirectory>> = OnceLock::new();
    LARGE.get_or_init(|| Arc::new(make_large())).clone()
}

fn make_large() -> FixedDirectory {
    let mut directory = support::directory();
    let device = |number| Device {
        name: label(&format!("device-{number}")),
        virtual_addresses: vec![address(0x6440_2000, number)],
        private_addresses: Vec::new(),
        director: Vec::new(),
    };
    directory.zones[0].1.extend((0..COUNT).map(device));
    let ports = vec![Port { name: "http".to_owned(), protocol: Protocol::Tcp, number: 80 }];
    let shared: Arc<[Port]> = ports.clone().into();
    let service = |number| {
        let headless = number % 4 == 3;
        let endpoint = || Endpoint {
            hostname: Some(label("first")),
            device: None,
            address: address(0x6440_2000, number),
            ports: shared.clone(),
        };
        let kind = match headless {
            true => ServiceKind::Headless,
            false => ServiceKind::ClusterIp(vec![address(0x6450_0000, number)]),
        };
        let service = Service {
            name: label(&format!("service-{number:05}")),
            namespace: label("default"),
            kind,
            ports: ports.clone(),
            endpoints: if headless { vec![endpoint()] } else { Vec::new() },
            external: Vec::new(),
        };
        (label("net"), Arc::new(service))
    };
    directory.namespaces.push((label("net"), label("default")));
    directory.services.extend((0..COUNT).map(service));
    directory
}

/// What a transfer of it has, without the two SOA.
fn expected() -> BTreeSet<String> {
    let mut all = BTreeSet::from([
        "net.example. 5 IN NS ns.dns.net.example.".to_owned(),
        "ns.dns.net.example. 5 IN A 203.0.113.53".to_owned(),
        "ns.dns.net.example. 5 IN AAAA 2001:db8::53".to_owned(),
    ]);
    for number in 0..COUNT {
        let name = format!("service-{number:05}.default.svc.net.example.");
        if number % 4 == 3 {
            let at = address(0x6440_2000, number);
            all.insert(format!("{name} 5 IN A {at}"));
            all.insert(format!("first.{name} 5 IN A {at}"));
            all.insert(format!("_http._tcp.{name} 5 IN SRV 0 100 80 first.{name}"));
        } else {
            all.insert(format!("{name} 5 IN A {}", address(0x6450_0000, number)));
            all.insert(format!("{name} 5 IN SRV 0 100 80 {name}"));
            all.insert(format!("_http._tcp.{name} 5 IN SRV 0 100 80 {name}"));
        }
    }
    all
}

const SOA: &str =
    "net.example. 5 IN SOA ns.dns.net.example. hostmaster.net.example. 1790000000 7200 1800 86400 5";

/// Checks that `records` are a whole transfer.
fn check(records: &[String]) {
    let expected = expected();
    assert_eq!(records.len(), 2 + expected.len());
    assert_eq!((records.first().unwrap().as_str(), records.last().unwrap().as_str()), (SOA, SOA));
    let content: BTreeSet<String> = records[1..records.len() - 1].iter().cloned().collect();
    let differ: Vec<&String> = content.symmetric_difference(&expected).take(5).collect();
    assert!(differ.is_empty(), "{differ:?}");
}

/// Records as `dig` and `kdig` print them, blanks made one.
fn printed(output: &str) -> Vec<String> {
    let lines = output.lines().filter(|line| !line.is_empty() && !line.starts_with(';'));
    lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

fn authoritative(peers: &str) -> Arc<impl Handler> {
    let options = Options { transfer_to: vec![peers.parse().unwrap()], ..Options::default() };
    Arc::new(Authoritative::new(Engine::with_options(large(), options), |_: &Source| Viewer::Open))
}

fn metrics() -> Metrics {
    Metrics::register(&mut Registry::default())
}

async fn serve_tcp<H: Handler>(handler: Arc<H>, address: SocketAddr, limits: StreamLimits) -> SocketAddr {
    let listener = bind_tcp(address, false).unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { stream::serve_tcp(listener, handler, limits, &metrics()).await });
    address
}

async fn serve_udp<H: Handler>(handler: Arc<H>) -> SocketAddr {
    let socket = bind_udp(ANY_PORT, false).unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move { udp::serve(socket, handler, UdpLimits::default(), &metrics()).await });
    address
}

async fn serve_tls<H: Handler>(handler: Arc<H>) -> SocketAddr {
    let listener = bind_tcp(ANY_PORT, false).unwrap();
    let address = listener.local_addr().unwrap();
    let server = credentials().resuming_server(ALPN_DOT).unwrap();
    let limits = StreamLimits { stranger_age: Duration::from_secs(600), ..StreamLimits::default() };
    tokio::spawn(async move { stream::serve_tls(listener, server, handler, limits, &metrics()).await });
    address
}

/// A registrar's, of a CA of its own.
fn credentials() -> Arc<Credentials> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let ca = CertifiedIssuer::self_signed(params, RcgenKey::generate().unwrap()).unwrap();
    let key = RcgenKey::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("spiffe://muster.test/registrar/r1".try_into().unwrap())];
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - time::Duration::days(1);
    params.not_after = now + time::Duration::days(1);
    let root: CertificateDer<'_> = ca.der().clone();
    let chain = vec![params.signed_by(&key, &ca).unwrap().der().clone(), root.clone()];
    let pair = KeyPair { chain, key: PrivateKeyDer::try_from(key.serialize_der()).unwrap() };
    Credentials::new(&pair, &[root]).unwrap()
}

/// Runs a client; `None`, and why, if it is not installed and need not be.
async fn run(program: &str, address: SocketAddr, arguments: &[&str]) -> Option<String> {
    let server = [format!("@{}", address.ip()), "-p".to_owned(), address.port().to_string()];
    match Command::new(program).args(server).args(arguments).output().await {
        Ok(output) => Some(String::from_utf8(output.stdout).unwrap()),
        Err(error) if std::env::var_os("MUSTER_REQUIRE_ROOT").is_none() => {
            eprintln!("skipped: cannot run {program}: {error}; install dnsutils and knot-dnsutils");
            None
        }
        Err(error) => panic!("cannot run {program}: {error}; install dnsutils and knot-dnsutils"),
    }
}

fn framed(name: &str, kind: RecordType, id: u16) -> Vec<u8> {
    let mut message = query(name, kind);
    message.metadata.id = id;
    let octets = message.to_vec().unwrap();
    [&u16::try_from(octets.len()).unwrap().to_be_bytes()[..], &octets].concat()
}

async fn read_response(stream: &mut TcpStream) -> Message {
    let length = stream.read_u16().await.unwrap();
    let mut octets = vec![0; usize::from(length)];
    stream.read_exact(&mut octets).await.unwrap();
    Message::from_vec(&octets).unwrap()
}

/// Section 14: the whole zone, in its order, over TCP and TLS; nothing of it over UDP or to others.
#[tokio::test(flavor = "multi_thread")]
async fn dig_and_kdig_get_the_whole_zone() {
    let handler = authoritative("127.0.0.1/32");
    let tcp = serve_tcp(Arc::clone(&handler), ANY_PORT, StreamLimits::default()).await;
    let axfr = ["+noall", "+answer", "net.example", "AXFR"];
    let Some(output) = run("dig", tcp, &axfr).await else { return };
    check(&printed(&output));
    let output = run("kdig", tcp, &["+tcp", "net.example", "AXFR"]).await.unwrap();
    check(&printed(&output));
    let tls = serve_tls(Arc::clone(&handler)).await;
    let output = run("kdig", tls, &["+tls", "net.example", "AXFR"]).await.unwrap();
    check(&printed(&output));
    // A client that has an older serial gets all of it, one that is current the SOA alone.
    let output = run("dig", tcp, &["+noall", "+answer", "net.example", "IXFR=1789999999"]).await.unwrap();
    check(&printed(&output));
    let output = run("dig", tcp, &["+noall", "+answer", "net.example", "IXFR=1790000000"]).await.unwrap();
    assert_eq!(printed(&output), [SOA]);

    let below = run("dig", tcp, &["svc.net.example", "AXFR"]).await.unwrap();
    assert!(below.contains("Transfer failed"), "{below}");
    let others = serve_tcp(authoritative("127.0.0.2/32"), ANY_PORT, StreamLimits::default()).await;
    let output = run("dig", others, &["net.example", "AXFR"]).await.unwrap();
    assert!(output.contains("Transfer failed") && printed(&output).is_empty(), "{output}");
    let mut stream = TcpStream::connect(others).await.unwrap();
    stream.write_all(&framed("net.example.", RecordType::AXFR, 7)).await.unwrap();
    assert_eq!(read_response(&mut stream).await.metadata.response_code, ResponseCode::Refused);
    let udp = UdpSocket::bind(ANY_PORT).await.unwrap();
    udp.connect(serve_udp(handler).await).await.unwrap();
    check_refused(&udp).await;
}

/// Asks for a transfer over UDP, which gets an answer no longer than the question.
async fn check_refused(udp: &UdpSocket) {
    let question = &framed("net.example.", RecordType::AXFR, 9)[2..];
    udp.send(question).await.unwrap();
    let mut buffer = [0; 1500];
    let length = tokio::time::timeout(Duration::from_secs(5), udp.recv(&mut buffer)).await.unwrap().unwrap();
    assert!(length <= question.len());
    let response = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!((response.metadata.id, response.metadata.response_code), (9, ResponseCode::Refused));
    assert!(response.answers.is_empty() && !response.metadata.truncation);
}

/// RFC 5936, 4.1: several transfers on a connection, and other queries beside them.
#[tokio::test(flavor = "multi_thread")]
async fn two_transfers_and_queries_share_a_connection() {
    let address = serve_tcp(authoritative("127.0.0.0/8"), ANY_PORT, StreamLimits::default()).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut frames =
        [framed("net.example.", RecordType::AXFR, 1), framed("net.example.", RecordType::AXFR, 2)];
    frames[1].extend((100..150).flat_map(|id| framed("web.net.example.", RecordType::A, id)));
    stream.write_all(&frames.concat()).await.unwrap();
    let mut records: BTreeMap<u16, Vec<String>> = BTreeMap::new();
    let (mut answered, mut turns, mut last) = (BTreeSet::new(), 0, 0);
    let ended = |records: &BTreeMap<u16, Vec<String>>| {
        [1, 2].iter().all(|id| {
            records.get(id).is_some_and(|records| records.len() > 1 && records.last().unwrap() == SOA)
        })
    };
    while !ended(&records) {
        let response = read_response(&mut stream).await;
        let id = response.metadata.id;
        assert_eq!(response.metadata.response_code, ResponseCode::NoError);
        assert!(!response.metadata.truncation);
        if id >= 100 {
            assert_eq!(response.answers.len(), 1);
            answered.insert(id);
            continue;
        }
        assert!(response.metadata.authoritative);
        turns += usize::from(std::mem::replace(&mut last, id) != id);
        records.entry(id).or_default().extend(response.answers.iter().map(Record::to_string));
    }
    assert_eq!(answered, (100..150).collect(), "before the transfers are at their end");
    assert!(turns > 500, "{turns}");
    assert_eq!(records.len(), 2);
    records.values().for_each(|records| check(records));
    // The connection goes on.
    stream.write_all(&framed("web.net.example.", RecordType::A, 3)).await.unwrap();
    assert_eq!(read_response(&mut stream).await.metadata.id, 3);
}

/// A client that takes its time gets everything all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_gets_the_whole_zone() {
    let address = serve_tcp(authoritative("127.0.0.0/8"), ANY_PORT, StreamLimits::default()).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    stream.write_all(&framed("net.example.", RecordType::AXFR, 1)).await.unwrap();
    let mut records: Vec<String> = Vec::new();
    while records.len() < 2 || records.last().unwrap() != SOA {
        if records.len().is_multiple_of(5000) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        records.extend(read_response(&mut stream).await.answers.iter().map(Record::to_string));
    }
    check(&records);
}

/// Transfers that do not end: the response to the query again and again.
struct Endless;

struct Again(Message);

impl Messages for Again {
    fn next_message(&mut self, out: &mut Vec<u8>) -> Option<Outcome> {
        *out = self.0.clone().into_response().to_vec().unwrap();
        Some(Outcome::Response { code: ResponseCode::NoError, record_type: None })
    }
}

impl Handler for Endless {
    fn handle(&self, query: &[u8], _: &Source, _: &mut Vec<u8>) -> Handling {
        Handling::Several(Box::new(Again(Message::from_vec(query).unwrap())))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_at_a_time_are_bounded() {
    let limits = StreamLimits { transfers: 2, ..StreamLimits::default() };
    let address = serve_tcp(Arc::new(Endless), ANY_PORT, limits).await;
    let start = async |id| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&framed("net.example.", RecordType::AXFR, id)).await.unwrap();
        let response = read_response(&mut stream).await;
        assert_eq!((response.metadata.id, response.queries.len()), (id, 1));
        (response.metadata.response_code, stream)
    };
    let mut open = Vec::new();
    for id in [1, 2] {
        let (code, stream) = start(id).await;
        assert_eq!(code, ResponseCode::NoError);
        open.push(stream);
    }
    let (code, mut third) = start(3).await;
    assert_eq!(code, ResponseCode::ServFail);
    // Nothing follows, and the connection can be used to try again, as soon as there is a place.
    open.pop();
    for id in 4.. {
        third.write_all(&framed("net.example.", RecordType::AXFR, id)).await.unwrap();
        let response = read_response(&mut third).await;
        assert_eq!(response.metadata.id, id);
        if response.metadata.response_code == ResponseCode::NoError {
            break;
        }
        assert!(id < 500, "the place is not given back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(start(1000).await.0, ResponseCode::ServFail);
}

/// Whatever a handler says, no datagram leads to several.
#[tokio::test]
async fn several_messages_are_refused_over_udp() {
    let udp = UdpSocket::bind(ANY_PORT).await.unwrap();
    udp.connect(serve_udp(Arc::new(Endless)).await).await.unwrap();
    check_refused(&udp).await;
}

/// A transfer is one query and one response, as large as its messages together.
#[tokio::test]
async fn a_transfer_is_counted_once() {
    let mut registry = Registry::with_prefix("coredns");
    let metrics = Metrics::register(&mut registry);
    let listener = bind_tcp(ANY_PORT, false).unwrap();
    let address = listener.local_addr().unwrap();
    let handler = authoritative("127.0.0.1/32");
    tokio::spawn(
        async move { stream::serve_tcp(listener, handler, StreamLimits::default(), &metrics).await },
    );
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&framed("net.example.", RecordType::AXFR, 1)).await.unwrap();
    let (mut octets, mut ends) = (0, 0);
    while ends < 2 {
        let mut message = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut message).await.unwrap();
        octets += message.len();
        let answers = Message::from_vec(&message).unwrap().answers;
        ends += answers.iter().filter(|record| record.record_type() == RecordType::SOA).count();
    }
    // It is counted by the time that the connection answers anything else.
    stream.write_all(&framed("web.net.example.", RecordType::A, 2)).await.unwrap();
    read_response(&mut stream).await;
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let sum = text.lines().find(|line| line.starts_with("coredns_dns_response_size_bytes_sum")).unwrap();
    let sum: f64 = sum.rsplit(' ').next().unwrap().parse().unwrap();
    assert!((octets as f64..octets as f64 + 512.).contains(&sum), "{sum} {octets}");
    let requests = "proto=\"tcp\",family=\"1\",type=\"AXFR\"} 1";
    assert!(text.contains(requests), "{text}");
}
