//! The listeners on loopback, asked by real clients: `dig` and `kdig`, and raw sockets where those are too polite.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

mod over_tcp;
mod over_tls;
mod over_udp;
#[path = "../support/mod.rs"]
mod support;

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Output,
    sync::Arc,
    time::Duration,
};

use hickory_proto::{op::Message, rr::RecordType};
use muster_common::identity::Party;
use muster_dns::{
    directory::Viewer,
    engine::{Engine, Outcome},
    server::{
        Authoritative, Handler, Handling, Source, bind_tcp, bind_udp,
        limit::Rate,
        metrics::Metrics,
        stream::{self, StreamLimits},
        udp::{self, UdpLimits},
    },
};
use prometheus_client::registry::Registry;
use support::{directory, query};
use tokio::{
    io::AsyncReadExt,
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

async fn is_closed(stream: &mut TcpStream) -> bool {
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
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
