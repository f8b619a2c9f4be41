//! The listeners on loopback, asked by real clients: `dig` and `kdig`, and raw sockets where those are too polite.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

mod support;

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Output,
    sync::Arc,
    time::Duration,
};

use hickory_proto::{op::Message, rr::RecordType};
use muster_common::{
    identity::Party,
    tls::{ALPN_DOT, Credentials, KeyPair},
};
use muster_dns::{
    directory::Viewer,
    engine::{Engine, Outcome},
    server::{
        Authoritative, Handler, Handling, Source, bind_tcp, bind_udp,
        limit::Rate,
        metrics::Metrics,
        stream::{self, StreamLimits},
        udp::{self, UdpLimits, UdpSockets},
    },
};
use prometheus_client::registry::Registry;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as RcgenKey, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use support::{directory, query};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    process::Command,
};

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const REGISTRAR: &str = "spiffe://muster.test/registrar/r1";
const DEVICE: &str = "spiffe://muster.test/network/net/device/d1";

/// Who may see what, as the registrar decides it.
fn viewer(source: &Source) -> Viewer {
    match source.identity.as_deref().map(|identity| &identity.party) {
        Some(Party::Device { network, uid }) => Viewer::Member { network: network.clone(), uid: uid.clone() },
        _ => Viewer::Stranger,
    }
}

fn open(_: &Source) -> Viewer {
    Viewer::Open
}

fn authoritative(viewer: fn(&Source) -> Viewer) -> Arc<impl Handler> {
    Arc::new(Authoritative::new(Engine::new(directory()), viewer))
}

fn metrics() -> Metrics {
    Metrics::register(&mut Registry::default())
}

async fn serve_udp<H: Handler>(handler: Arc<H>, address: SocketAddr, rate: Option<Rate>) -> SocketAddr {
    let socket = bind_udp(address, false).unwrap();
    let address = socket.local_addr().unwrap();
    let limits = UdpLimits { rate, ..UdpLimits::default() };
    tokio::spawn(async move { udp::serve(socket, handler, limits, &metrics()).await });
    address
}

async fn serve_tcp<H: Handler>(handler: Arc<H>, address: SocketAddr, limits: StreamLimits) -> SocketAddr {
    let listener = bind_tcp(address, false).unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { stream::serve_tcp(listener, handler, limits, &metrics()).await });
    address
}

/// Both on one port: another one, if somebody else has it for TCP.
async fn serve_both<H: Handler>(handler: Arc<H>) -> SocketAddr {
    let (socket, listener) = loop {
        let socket = bind_udp(ANY_PORT, false).unwrap();
        if let Ok(listener) = bind_tcp(socket.local_addr().unwrap(), false) {
            break (socket, listener);
        }
    };
    let (address, other) = (socket.local_addr().unwrap(), Arc::clone(&handler));
    tokio::spawn(async move { udp::serve(socket, handler, UdpLimits::default(), &metrics()).await });
    let limits = StreamLimits::default();
    tokio::spawn(async move { stream::serve_tcp(listener, other, limits, &metrics()).await });
    address
}

/// A CA and what it issues.
struct Authority(CertifiedIssuer<'static, RcgenKey>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, RcgenKey::generate().unwrap()).unwrap())
    }

    fn issue(&self, id: &str) -> (KeyPair, String) {
        let key = RcgenKey::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::days(1);
        params.not_after = now + time::Duration::days(1);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let pair = KeyPair {
            chain: vec![certificate.der().clone(), self.0.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        };
        (pair, certificate.pem() + &key.serialize_pem())
    }

    fn credentials(&self, id: &str) -> Arc<Credentials> {
        let root: CertificateDer<'_> = self.0.der().clone();
        Credentials::new(&self.issue(id).0, &[root]).unwrap()
    }
}

async fn serve_tls<H: Handler>(handler: Arc<H>, credentials: &Arc<Credentials>) -> SocketAddr {
    serve_tls_within(handler, credentials, StreamLimits::default()).await
}

async fn serve_tls_within<H: Handler>(
    handler: Arc<H>,
    credentials: &Arc<Credentials>,
    limits: StreamLimits,
) -> SocketAddr {
    let listener = bind_tcp(ANY_PORT, false).unwrap();
    let address = listener.local_addr().unwrap();
    let server = credentials.resuming_server(ALPN_DOT).unwrap();
    tokio::spawn(async move { stream::serve_tls(listener, server, handler, limits, &metrics()).await });
    address
}

/// Runs a client; `None`, and why, if it is not installed and need not be.
async fn run(program: &str, address: SocketAddr, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args([&format!("@{}", address.ip()), "-p", &address.port().to_string()])
        .args(arguments)
        .output()
        .await;
    match output {
        Ok(Output { stdout, .. }) => Some(String::from_utf8(stdout).unwrap()),
        Err(error) if std::env::var_os("MUSTER_REQUIRE_ROOT").is_none() => {
            eprintln!("skipped: cannot run {program}: {error}; install dnsutils and knot-dnsutils");
            None
        }
        Err(error) => panic!("cannot run {program}: {error}; install dnsutils and knot-dnsutils"),
    }
}

#[tokio::test]
async fn dig_gets_all_addresses_over_udp_and_tcp() {
    let address = serve_both(authoritative(open)).await;
    for transport in ["+notcp", "+tcp"] {
        let arguments = [transport, "+norec", "web.net.example", "A"];
        let Some(output) = run("dig", address, &arguments).await else { return };
        for expected in [
            "status: NOERROR",
            "flags: qr aa;",
            "ANSWER: 1, AUTHORITY: 0, ADDITIONAL: 5",
            "web.net.example.\t5\tIN\tA\t100.64.1.7",
            "private.web.net.example. 5\tIN\tA\t192.168.1.7",
            "director.web.net.example. 5\tIN\tAAAA\t2001:db8::20",
        ] {
            assert!(output.contains(expected), "{expected}: {output}");
        }
    }
    // Does not fit into 512 octets: dig comes again over TCP by itself.
    let output = run("dig", address, &["+noedns", "crowd.net.example", "A"]).await.unwrap();
    assert!(
        output.contains("Truncated, retrying in TCP mode") && output.contains("192.168.9.60"),
        "{output}"
    );
    let output = run("dig", address, &["-x", "100.64.1.7", "+short"]).await.unwrap();
    assert_eq!(output.trim(), "web.net.example.");
    let output = run("dig", address, &["web.net.example", "SVCB", "+short"]).await.unwrap();
    assert!(output.contains("1 director.web.net.example. port=3478"), "{output}");
    let output = run("dig", address, &["+edns=1", "+noednsneg", "web.net.example"]).await.unwrap();
    assert!(output.contains("BADVERS"), "{output}");
    let output = run("dig", address, &["+opcode=status", "web.net.example"]).await.unwrap();
    assert!(output.contains("NOTIMP"), "{output}");
    let output = run("dig", address, &["ch", "txt", "version.bind"]).await.unwrap();
    assert!(output.contains("REFUSED"), "{output}");
}

#[tokio::test]
async fn a_wildcard_listener_answers_from_the_address_it_was_asked_at() {
    let any = ["[::]:0", "0.0.0.0:0"].map(|any| any.parse().unwrap());
    let mut ports = Vec::new();
    for any in any {
        ports.push(serve_udp(authoritative(open), any, None).await.port());
    }
    let question = query("web.net.example.", RecordType::A).to_vec().unwrap();
    let asked = [(0, "127.0.0.1"), (0, "127.0.0.77"), (0, "::1"), (1, "127.0.0.1"), (1, "127.0.0.77")];
    for (listener, server) in asked {
        let server = SocketAddr::new(server.parse().unwrap(), ports[listener]);
        let client = UdpSocket::bind(if server.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" }).await.unwrap();
        // A connected socket takes datagrams from that address alone.
        client.connect(server).await.unwrap();
        client.send(&question).await.unwrap();
        let mut buffer = [0; 1500];
        let received = tokio::time::timeout(Duration::from_secs(5), client.recv(&mut buffer)).await;
        let length = received.unwrap_or_else(|_| panic!("no response from {server}")).unwrap();
        assert_eq!(Message::from_vec(&buffer[..length]).unwrap().answers.len(), 1);
    }
}

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
async fn over_tls_the_certificate_decides() {
    let authority = Authority::new();
    let address = serve_tls(authoritative(viewer), &authority.credentials(REGISTRAR)).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("device.pem");
    std::fs::write(&file, authority.issue(DEVICE).1).unwrap();
    let certificate = format!("+tls-certfile={}", file.display());
    let key = format!("+tls-keyfile={}", file.display());
    let member = ["+tls", &certificate, &key, "web.net.example", "A"];
    let Some(output) = run("kdig", address, &member).await else { return };
    for expected in ["TLS1.3", "NOERROR", "100.64.1.7", "192.168.1.7", "203.0.113.20"] {
        assert!(output.contains(expected), "{expected}: {output}");
    }
    let hidden = run("kdig", address, &["+tls", &certificate, &key, "vault.net.example"]).await.unwrap();
    assert!(hidden.contains("NXDOMAIN"), "{hidden}");
    let stranger = run("kdig", address, &["+tls", "web.net.example"]).await.unwrap();
    assert!(stranger.contains("REFUSED"), "{stranger}");
    let apex = run("kdig", address, &["+tls", "net.example", "SOA"]).await.unwrap();
    assert!(apex.contains("hostmaster.net.example."), "{apex}");
    // A certificate of somebody else's CA does not get in at all.
    std::fs::write(&file, Authority::new().issue(DEVICE).1).unwrap();
    let output = run("kdig", address, &member).await.unwrap();
    assert!(!output.contains("100.64.1.7") && !output.contains("REFUSED"), "{output}");
}

fn framed(name: &str, id: u16) -> Vec<u8> {
    let mut message = query(name, RecordType::A);
    message.metadata.id = id;
    let octets = message.to_vec().unwrap();
    let mut frame = u16::try_from(octets.len()).unwrap().to_be_bytes().to_vec();
    frame.extend(octets);
    frame
}

async fn read_response(stream: &mut (impl AsyncReadExt + Unpin)) -> Message {
    let length = stream.read_u16().await.unwrap();
    let mut octets = vec![0; usize::from(length)];
    stream.read_exact(&mut octets).await.unwrap();
    Message::from_vec(&octets).unwrap()
}

#[tokio::test]
async fn a_device_shows_its_certificate_on_every_connection() {
    let authority = Authority::new();
    let address = serve_tls(authoritative(viewer), &authority.credentials(REGISTRAR)).await;
    let accept = |party: &Party| matches!(party, Party::Registrar { .. });
    let config = Arc::new(authority.credentials(DEVICE).client_config(accept, ALPN_DOT).unwrap());
    for _ in 0..3 {
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(&config));
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::IpAddress(address.ip().into());
        let mut stream = connector.connect(name, stream).await.unwrap();
        // Several connections' worth of queries on one, in one write.
        let frames: Vec<u8> = (0..50).flat_map(|id| framed("web.net.example.", id)).collect();
        stream.write_all(&frames).await.unwrap();
        for id in 0..50 {
            let response = read_response(&mut stream).await;
            assert_eq!((response.metadata.id, response.answers.len()), (id, 1));
        }
        let kind = stream.get_ref().1.handshake_kind().unwrap();
        assert_ne!(kind, rustls::HandshakeKind::Resumed);
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(ALPN_DOT));
    }
}

#[tokio::test]
async fn a_resumed_session_is_the_same_device_as_long_as_its_ca_is_trusted() {
    let (authority, other) = (Authority::new(), Authority::new());
    let registrar = authority.credentials(REGISTRAR);
    let address = serve_tls(authoritative(viewer), &registrar).await;
    let accept = |party: &Party| matches!(party, Party::Registrar { .. });
    let mut config = authority.credentials(DEVICE).client_config(accept, ALPN_DOT).unwrap();
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let config = Arc::new(config);
    let connect = async || {
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(&config));
        let stream = TcpStream::connect(address).await.unwrap();
        let mut stream = connector.connect(address.ip().into(), stream).await.unwrap();
        stream.write_all(&framed("web.net.example.", 7)).await?;
        let mut length = [0; 2];
        stream.read_exact(&mut length).await?;
        let mut octets = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut octets).await?;
        let kind = stream.get_ref().1.handshake_kind().unwrap();
        std::io::Result::Ok((kind, Message::from_vec(&octets).unwrap().answers.len()))
    };
    assert_eq!(connect().await.unwrap(), (rustls::HandshakeKind::Full, 1));
    for _ in 0..3 {
        assert_eq!(connect().await.unwrap(), (rustls::HandshakeKind::Resumed, 1));
    }
    registrar.replace_roots(&[other.0.der().clone()]).unwrap();
    connect().await.unwrap_err();
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn strangers_over_tls_take_no_places_of_devices_and_do_not_stay() {
    let authority = Authority::new();
    let stranger_age = Duration::from_millis(700);
    let limits = StreamLimits {
        connections: 2,
        connections_per_client: 2,
        handshake: Duration::from_secs(60),
        stranger_age,
        ..StreamLimits::default()
    };
    let registrar = authority.credentials(REGISTRAR);
    let address = serve_tls_within(authoritative(viewer), &registrar, limits).await;
    let accept = |party: &Party| matches!(party, Party::Registrar { .. });
    let device = authority.credentials(DEVICE).client_config(accept, ALPN_DOT).unwrap();
    let mut stranger = device.clone();
    stranger.client_auth_cert_resolver = Arc::new(NoCertificate);
    let connect = async |config: &rustls::ClientConfig| {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config.clone()));
        connector.connect(address.ip().into(), TcpStream::connect(address).await.unwrap()).await
    };
    let mut devices = Vec::new();
    for _ in 0..2 {
        devices.push(connect(&device).await.unwrap());
    }
    let mut first = connect(&stranger).await.unwrap();
    // Busy as it is, it goes.
    for id in 0..1000 {
        let sent = first.write_all(&framed("web.net.example.", id)).await;
        if sent.is_err() || first.read_u8().await.is_err() {
            break;
        }
        assert!(id < 999, "the connection is still open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Both places of strangers are taken by handshakes that do not end: devices that are there go on.
    let _slow = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(is_closed(&mut TcpStream::connect(address).await.unwrap()).await);
    for stream in &mut devices {
        stream.write_all(&framed("web.net.example.", 1)).await.unwrap();
        assert_eq!(read_response(stream).await.answers.len(), 1);
    }
}

/// Answers each query after as many milliseconds as its id says, with its id.
struct Slow;

impl Handler for Slow {
    fn handle(&self, query: &[u8], _: &Source, _: &mut Vec<u8>) -> Handling {
        let message = Message::from_vec(query).unwrap();
        Handling::Later(Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(message.metadata.id.into())).await;
            (Outcome::Silence, message.into_response().to_vec().unwrap())
        }))
    }
}

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

async fn is_closed(stream: &mut TcpStream) -> bool {
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
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

#[tokio::test]
async fn what_happens_is_counted() {
    let mut registry = Registry::with_prefix("coredns");
    let metrics = Metrics::register(&mut registry);
    let socket = bind_udp(ANY_PORT, false).unwrap();
    let address = socket.local_addr().unwrap();
    let handler = authoritative(open);
    tokio::spawn(async move { udp::serve(socket, handler, UdpLimits::default(), &metrics).await });
    let client = UdpSocket::bind(ANY_PORT).await.unwrap();
    client.connect(address).await.unwrap();
    for name in ["web.net.example.", "nobody.net.example."] {
        client.send(&query(name, RecordType::A).to_vec().unwrap()).await.unwrap();
        client.recv(&mut [0; 1500]).await.unwrap();
    }
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let server = format!("server=\"dns://127.0.0.1:{}\",zone=\".\",view=\"\"", address.port());
    for expected in [
        format!("coredns_dns_requests_total{{{server},proto=\"udp\",family=\"1\",type=\"A\"}} 2"),
        format!("coredns_dns_responses_total{{{server},rcode=\"NXDOMAIN\",plugin=\"muster\"}} 1"),
        format!("coredns_dns_request_size_bytes_count{{{server},proto=\"udp\"}} 2"),
        format!("coredns_dns_request_duration_seconds_count{{{server},type=\"A\"}} 2"),
        format!("coredns_dns_response_size_bytes_count{{{server},proto=\"udp\"}} 2"),
        format!("coredns_dns_request_size_bytes_bucket{{le=\"100.0\",{server},proto=\"udp\"}} 2"),
        format!("coredns_dns_request_duration_seconds_bucket{{le=\"+Inf\",{server},type=\"A\"}} 2"),
        format!("coredns_dns_connections{{{server},proto=\"udp\"}} 0"),
        "# HELP coredns_dns_requests DNS queries.".to_owned(),
        "# UNIT coredns_dns_request_duration_seconds seconds".to_owned(),
        "# TYPE coredns_dns_responses counter".to_owned(),
    ] {
        assert!(text.contains(&expected), "{expected}\n{text}");
    }
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

#[tokio::test]
async fn what_cannot_be_bound_is_named_with_a_remedy() {
    let taken = bind_udp(ANY_PORT, false).unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind_udp(address, false).unwrap_err().to_string();
    assert!(error.contains(&address.to_string()) && error.contains("another program"), "{error}");
    let listener = bind_tcp(ANY_PORT, false).unwrap();
    assert!(bind_tcp(listener.local_addr().unwrap(), false).is_err());
    // An address that is yet to come.
    let absent: SocketAddr = "169.254.20.10:0".parse().unwrap();
    if let Err(error) = bind_udp(absent, false) {
        assert!(error.to_string().contains("no interface of this host"), "{error}");
    }
    bind_udp(absent, true).unwrap();
    bind_tcp(absent, true).unwrap();
}
