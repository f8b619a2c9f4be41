//! Servers for other names: stub domains, replies that are not to be believed, servers that fail, loops, completion,
//! and prefetch.

use hickory_proto::op::Query;
use muster_agent::resolver::{CacheLimits, Completion, Prefetch, Stub, StubTransport};
use muster_dns::message::Transport;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UdpSocket,
};

use super::*;

fn device() -> Arc<Credentials> {
    Authority::new().credentials(DEVICE)
}

fn stub(domain: &str, server: SocketAddr, transport: StubTransport) -> Stub {
    let (server_name, ca) = ("dns.corp.example".into(), "/nonexistent".into());
    Stub { domain: domain.into(), servers: vec![server], transport, server_name, ca }
}

/// Answers A for every name with one address, held for `ttl` seconds; and NXDOMAIN if that address is 0.0.0.0.
struct Always(Ipv4Addr, u32);

impl Handler for Always {
    fn handle(&self, query: &[u8], _: &Source, out: &mut Vec<u8>) -> Handling {
        let Parsed::Request(request) = parse(query) else { panic!("not a query") };
        let mut response = request.response(ResponseCode::NoError);
        let name = request.question.name.clone();
        if self.0.is_unspecified() {
            response.metadata.response_code = ResponseCode::NXDomain;
        } else if request.record_type() == RecordType::A {
            response.answers.push(Record::from_rdata(name, self.1, RData::A(A(self.0))));
        }
        response.encode(1200, out).unwrap();
        Handling::Done(Outcome::Silence)
    }
}

fn always(last: u8) -> Running {
    server(Always([192, 0, 2, last].into(), 60))
}

pub(super) async fn ask(host: &Host, name: &str) -> Message {
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let socket = UdpSocket::bind(ANY_PORT).await.unwrap();
    socket.connect(host.address).await.unwrap();
    socket.send(&query.to_vec().unwrap()).await.unwrap();
    let mut buffer = [0; 4096];
    let received = tokio::time::timeout(Duration::from_secs(8), socket.recv(&mut buffer)).await;
    let response = Message::from_vec(&buffer[..received.unwrap().unwrap()]).unwrap();
    assert_eq!(response.metadata.id, query.metadata.id);
    assert!(response.queries[0].name.eq_case(&query.queries[0].name));
    response
}

pub(super) fn first_address(response: &Message) -> Option<IpAddr> {
    response.answers.iter().find_map(|record| record.data.ip_addr())
}

async fn resolve(host: &Host, name: &str) -> IpAddr {
    host.resolver.resolve(name).await.unwrap().addresses[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn stub_domains_have_their_own_servers() {
    let (upstream, corp, lab) = (always(1), always(2), always(3));
    let stubs = vec![
        stub("corp.example", corp.address, StubTransport::Udp),
        stub("lab.corp.example", lab.address, StubTransport::Tcp),
    ];
    let settings = Settings { upstream: vec![upstream.address], stubs, ..Settings::default() };
    let host = host_with(&device(), &[], settings);
    for (name, last) in
        [("www.example", 1), ("www.corp.example", 2), ("a.lab.corp.example", 3), ("xcorp.example", 1)]
    {
        assert_eq!(resolve(&host, name).await, IpAddr::from([192, 0, 2, last]), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stub_over_tls_is_known_by_its_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let key = RcgenKey::generate().unwrap();
    let params = CertificateParams::new(vec!["dns.corp.example".into()]).unwrap();
    let certificate = params.signed_by(&key, &authority.0).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(muster_common::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        );
    let listener = bind_tcp(ANY_PORT, false).unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config.unwrap()));
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let source = Source { address: ANY_PORT, transport: Transport::Tls, identity: None };
                while let Ok(length) = stream.read_u16().await {
                    let (mut query, mut out) = (vec![0; length.into()], Vec::new());
                    stream.read_exact(&mut query).await.unwrap();
                    Always([192, 0, 2, 9].into(), 60).handle(&query, &source, &mut out);
                    stream.write_u16(u16::try_from(out.len()).unwrap()).await.unwrap();
                    stream.write_all(&out).await.unwrap();
                    stream.flush().await.unwrap();
                }
            });
        }
    });
    let ca = directory.path().join("ca.pem");
    std::fs::write(&ca, authority.0.pem()).unwrap();
    let tls = |server_name: &str| {
        let base = stub("corp.example", address, StubTransport::Tls);
        let stubs = vec![Stub { ca: ca.clone(), server_name: server_name.into(), ..base }];
        host_with(&device(), &[], Settings { stubs, ..Settings::default() })
    };
    assert_eq!(resolve(&tls("dns.corp.example"), "www.corp.example").await, IpAddr::from([192, 0, 2, 9]));
    assert!(tls("other.example").resolver.resolve("www.corp.example").await.is_err());
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn spoofed_replies_are_passed_over() {
    let socket = UdpSocket::bind(ANY_PORT).await.unwrap();
    let other = UdpSocket::bind(ANY_PORT).await.unwrap();
    let address = socket.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let mut buffer = [0; 1500];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let answer = |last: u8, change: &dyn Fn(&mut Message)| {
                let mut response = Message::response(query.metadata.id, query.metadata.op_code);
                response.add_queries(query.queries.clone());
                let name = query.queries[0].name.clone();
                if query.queries[0].query_type() == RecordType::A {
                    response.add_answer(Record::from_rdata(name, 60, RData::A(A([192, 0, 2, last].into()))));
                }
                change(&mut response);
                response.to_vec().unwrap()
            };
            let wrong_id = answer(66, &|m| m.metadata.id = m.metadata.id.wrapping_add(1));
            let wrong_name = answer(66, &|m| {
                m.queries[0].set_name(Name::from_ascii("www.example.net.").unwrap());
            });
            let wrong_case = answer(66, &|m| {
                let name = m.queries[0].name.to_lowercase();
                m.queries[0].set_name(name);
            });
            let no_question = answer(66, &|m| m.queries.clear());
            other.send_to(&answer(66, &|_| {}), from).await.unwrap();
            for spoofed in [wrong_id, wrong_name, wrong_case, no_question] {
                // By chance the question has no capital: then this is the right answer, wrongly filled.
                if spoofed.get(12..length.min(spoofed.len())) != buffer.get(12..length.min(spoofed.len())) {
                    socket.send_to(&spoofed, from).await.unwrap();
                }
            }
            socket.send_to(&answer(1, &|_| {}), from).await.unwrap();
        }
    });
    let host = host(&device(), &[], &[address]);
    for i in 0..20 {
        let name = format!("a-name-with-many-letters-{i}.example.org");
        assert_eq!(resolve(&host, &name).await, IpAddr::from([192, 0, 2, 1]));
    }
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_answers_for_one_that_fails() {
    let good = always(1);
    // Bound, and never answering.
    let silent = std::net::UdpSocket::bind(ANY_PORT).unwrap();
    let host = host(&device(), &[], &[silent.local_addr().unwrap(), good.address]);
    assert_eq!(resolve(&host, "one.example.org").await, IpAddr::from([192, 0, 2, 1]));
    // From now on the other one is asked first, at once.
    let next = tokio::time::timeout(Duration::from_secs(1), resolve(&host, "two.example.org"));
    assert_eq!(next.await.unwrap(), IpAddr::from([192, 0, 2, 1]));
}

/// Refuses everything.
struct Refusing;

impl Handler for Refusing {
    fn handle(&self, query: &[u8], _: &Source, out: &mut Vec<u8>) -> Handling {
        let Parsed::Request(request) = parse(query) else { panic!("not a query") };
        request.response(ResponseCode::Refused).encode(1200, out).unwrap();
        Handling::Done(Outcome::Silence)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_answers_for_one_that_refuses() {
    let (refusing, good) = (server(Refusing), always(1));
    let both = host(&device(), &[], &[refusing.address, good.address]);
    assert_eq!(resolve(&both, "one.example.org").await, IpAddr::from([192, 0, 2, 1]));
    assert!(refusing.queries() > 0);
    let alone = host(&device(), &[], &[refusing.address]);
    assert_eq!(ask(&alone, "one.example.org.").await.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_outlive_the_hosts_servers() {
    let upstream = server(Always([192, 0, 2, 1].into(), 0));
    let host = host(&device(), &[], &[upstream.address]);
    assert!(!host.resolver.resolve("www.example.org").await.unwrap().stale);
    upstream.stop().await;
    assert!(host.resolver.resolve("www.example.org").await.unwrap().stale);
}

#[tokio::test(flavor = "multi_thread")]
async fn we_are_never_our_own_server() {
    let upstream = always(1);
    let host = host(&device(), &[], &[upstream.address]);
    let own: IpAddr = "127.7.7.7".parse().unwrap();
    host.resolver.listen_also(&[own, own]);
    let stats = host.resolver.stats();
    assert_eq!(stats.listen, [host.address, SocketAddr::new(own, host.address.port())]);
    let also = Host { address: stats.listen[1], ..host };
    assert_eq!(first_address(&ask(&also, "www.example.org.").await), Some([192, 0, 2, 1].into()));

    // Servers that turn out later to be ourselves.
    let port = UdpSocket::bind(ANY_PORT).await.unwrap().local_addr().unwrap().port();
    let at = |last: u8| SocketAddr::from(([127, 7, 7, last], port));
    let stubs = vec![stub("corp.example", at(9), StubTransport::Udp)];
    let settings =
        Settings { listen: vec![at(8)], upstream: vec![at(9), at(10)], stubs, ..Settings::default() };
    let host = host_with(&device(), &[], settings);
    assert_eq!(host.resolver.stats().upstream, [at(9), at(10)]);
    host.resolver.listen_also(&[at(9).ip()]);
    assert_eq!(host.resolver.stats().upstream, [at(10)]);
    let error = host.resolver.resolve("www.corp.example").await.unwrap_err().to_string();
    assert!(error.contains("no server to ask"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_comes_back_is_noticed() {
    let target = Arc::new(OnceLock::new());
    let forwarder = server(Forwarder(Arc::clone(&target)));
    let host = host(&device(), &[], &[forwarder.address]);
    target.set(host.address).unwrap();
    // At once, and not only when it has taken too long.
    let asked =
        tokio::time::timeout(Duration::from_secs(1), ask(&host, "a-name-with-many-letters.example.org."));
    assert_eq!(asked.await.unwrap().metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test(flavor = "multi_thread")]
async fn short_names_are_completed_if_that_is_configured() {
    let authority = Authority::new();
    let registrar = registrar(&authority, 60);
    let nothing = server(Always(Ipv4Addr::UNSPECIFIED, 60));
    let credentials = authority.credentials(DEVICE);
    let servers = [registrar.address.to_string()];
    let search = vec!["default.svc".to_owned(), String::new()];
    for (search, code) in [(search, ResponseCode::NoError), (Vec::new(), ResponseCode::NXDomain)] {
        let completion = Completion { search, ndots: 1 };
        let settings = Settings { upstream: vec![nothing.address], completion, ..Settings::default() };
        let host = host_with(&credentials, &servers, settings);
        host.ready().await;
        for _ in 0..2 {
            let response = ask(&host, "wEb.").await;
            assert_eq!(response.metadata.response_code, code);
            if code == ResponseCode::NoError {
                assert_eq!(first_address(&response), Some("100.64.1.7".parse().unwrap()));
                assert!(response.answers[0].name.eq_case(&Name::from_ascii("wEb.").unwrap()));
                assert_eq!(response.answers[0].record_type(), RecordType::CNAME);
            }
        }
        assert_eq!(ask(&host, "no.such.").await.metadata.response_code, ResponseCode::NXDomain);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_use_is_fetched_before_it_expires() {
    let upstream = server(Always([192, 0, 2, 1].into(), 60));
    for (amount, fetched) in [(2, true), (0, false)] {
        let before = upstream.queries();
        let prefetch = Prefetch { amount, percentage: 90, ..Prefetch::default() };
        let cache = CacheLimits { positive_ttl: Duration::from_secs(20), prefetch, ..CacheLimits::default() };
        let settings = Settings { upstream: vec![upstream.address], cache, ..Settings::default() };
        let host = host_with(&device(), &[], settings);
        ask(&host, "www.example.org.").await;
        // A tenth of its lifetime has passed.
        tokio::time::sleep(Duration::from_millis(2100)).await;
        for _ in 0..3 {
            assert!(first_address(&ask(&host, "www.example.org.").await).is_some());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(upstream.queries() - before, if fetched { 2 } else { 1 });
    }
}
