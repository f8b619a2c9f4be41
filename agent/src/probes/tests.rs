//! Probes of servers of all kinds.

use std::{net::Ipv4Addr, sync::Arc};

use muster_proto::admin::{ExecAction, GrpcAction, HttpGetAction, HttpHeader, Probe, TcpSocketAction};
use rustls::{ServerConfig, crypto::aws_lc_rs};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::TcpListenerStream;
use tonic_health::ServingStatus;

use super::{check::check, *};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    (listener, port)
}

fn tcp(port: &str) -> Probe {
    Probe { tcp_socket: Some(TcpSocketAction { port: port.into() }), ..Probe::default() }
}

fn http(port: &str, path: &str, scheme: &str, headers: &[(&str, &str)]) -> Probe {
    let header = |(name, value): &(&str, &str)| HttpHeader { name: (*name).into(), value: (*value).into() };
    let get = HttpGetAction {
        path: path.into(),
        port: port.into(),
        scheme: scheme.into(),
        http_headers: headers.iter().map(header).collect(),
    };
    Probe { http_get: Some(get), ..Probe::default() }
}

/// Answers with the status that the path names, and only if the request has `wanted` in it.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, wanted: &str) {
    let (mut request, mut octets) = (String::new(), [0; 1024]);
    while !request.contains("\r\n\r\n") {
        match stream.read(&mut octets).await {
            Ok(count @ 1..) => request.push_str(&String::from_utf8_lossy(&octets[..count])),
            _ => return,
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let status = if request.to_lowercase().contains(wanted) { path.trim_start_matches('/') } else { "599" };
    let answer = format!("HTTP/1.1 {status} x\r\nContent-Length: 0\r\n\r\n");
    let _ = stream.write_all(answer.as_bytes()).await;
}

fn error(result: Result<(), CheckError>) -> String {
    result.unwrap_err().to_string()
}

#[tokio::test]
async fn over_tcp() {
    let (listener, port) = listener().await;
    check(&tcp(&port), HERE, false).await.unwrap();
    drop(listener);
    assert!(error(check(&tcp(&port), HERE, false).await).contains("cannot connect"));
}

#[tokio::test]
async fn over_http() {
    let (listener, port) = listener().await;
    let host = format!("host: 127.0.0.1:{port}");
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let host = host.clone();
            tokio::spawn(async move { answer(stream, &host).await });
        }
    });
    for (status, is_ready) in [(200, true), (204, true), (302, true), (399, true), (400, false), (503, false)]
    {
        let result = check(&http(&port, &format!("/{status}"), "HTTP", &[]), HERE, false).await;
        assert_eq!(result.is_ok(), is_ready, "{status}: {result:?}");
    }
    let other = http(&port, "/200", "HTTP", &[("Host", "web.example")]);
    assert!(error(check(&other, HERE, false).await).contains("599"));
}

#[tokio::test]
async fn redirects_on_the_host_are_followed() {
    let (listener, port) = listener().await;
    let here = format!("http://127.0.0.1:{port}");
    let answers = [
        ("/good", "302", "/200".to_owned()),
        ("/bad", "301", format!("{here}/503")),
        ("/deep/relative", "307", "bad".to_owned()),
        ("/deep/bad", "308", "../503?x=1".to_owned()),
        ("/round", "302", "/round".to_owned()),
        ("/away", "302", "http://192.0.2.9/".to_owned()),
        ("/nowhere", "302", "http://[".to_owned()),
        ("/seen", "304", "/503".to_owned()),
        ("/200", "200", String::new()),
    ];
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut octets = [0; 1024];
            let count = stream.read(&mut octets).await.unwrap();
            let request = String::from_utf8_lossy(&octets[..count]).into_owned();
            let path = request.split(' ').nth(1).unwrap_or_default();
            let (_, status, location) = answers
                .iter()
                .find(|(known, ..)| *known == path)
                .cloned()
                .unwrap_or(("", "503", String::new()));
            let answer = format!("HTTP/1.1 {status} x\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    for path in ["/good", "/away", "/nowhere", "/seen"] {
        check(&http(&port, path, "HTTP", &[]), HERE, false).await.unwrap();
    }
    for (path, why) in [("/bad", "503"), ("/deep/relative", "503"), ("/round", "more than 10 times")] {
        let error = error(check(&http(&port, path, "HTTP", &[]), HERE, false).await);
        assert!(error.contains(why), "{path}: {error}");
    }
}

#[tokio::test]
async fn over_https_whatever_the_certificate() {
    let (listener, port) = listener().await;
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["other.example".into()]).unwrap().self_signed(&key).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(stream) = acceptor.accept(stream).await {
                answer(stream, "x-who: me").await;
            }
        }
    });
    check(&http(&port, "/200", "HTTPS", &[("X-Who", "me")]), HERE, false).await.unwrap();
    assert!(check(&http(&port, "/200", "HTTP", &[("X-Who", "me")]), HERE, false).await.is_err());
}

#[tokio::test]
async fn over_grpc() {
    let (listener, port) = listener().await;
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status("shop", ServingStatus::NotServing).await;
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let port = port.parse().unwrap();
    let of = |service: &str| Probe {
        grpc: Some(GrpcAction { port, service: service.into() }),
        ..Probe::default()
    };
    check(&of(""), HERE, false).await.unwrap();
    assert!(error(check(&of("shop"), HERE, false).await).contains("NOT_SERVING"));
    assert!(error(check(&of("other"), HERE, false).await).contains("health service says"));
    reporter.set_service_status("shop", ServingStatus::Serving).await;
    check(&of("shop"), HERE, false).await.unwrap();
}

#[tokio::test]
async fn by_a_command_where_that_is_allowed() {
    let exec = |words: &[&str]| Probe {
        exec: Some(ExecAction { command: words.iter().map(|word| (*word).to_owned()).collect() }),
        ..Probe::default()
    };
    check(&exec(&["sh", "-c", "exit 0"]), HERE, true).await.unwrap();
    assert!(error(check(&exec(&["sh", "-c", "exit 3"]), HERE, true).await).contains("exit status: 3"));
    assert!(check(&exec(&["no-such-program"]), HERE, true).await.is_err());
    assert!(error(check(&exec(&["true"]), HERE, false).await).contains("exec_probes = true"));
    assert!(error(check(&Probe::default(), HERE, true).await).contains("update it"));
}

fn endpoint(service: &str, address: &str, probe: Probe) -> EndpointProbe {
    EndpointProbe {
        namespace: "n".into(),
        service: service.into(),
        device_uid: "d".into(),
        address: address.into(),
        probe: Some(probe),
    }
}

fn ready(found: &watch::Receiver<Found>) -> Vec<(String, bool)> {
    found.borrow().iter().map(|((_, service, _), ready)| (service.clone(), *ready)).collect()
}

#[tokio::test]
async fn what_is_found_follows_the_servers_and_what_is_asked() {
    let ((listener, port), (silent, mute)) = (listener().await, listener().await);
    let mut probes = Probes::new(false, &Metrics::with_prefix("test"));
    let mut found = probes.found();
    let allowed = BTreeSet::from([HERE]);
    let quick = |probe| Probe { period_seconds: 1, failure_threshold: 2, timeout_seconds: 1, ..probe };
    let web = || endpoint("web", "127.0.0.1", quick(tcp(&port)));
    // One that takes connections, and says nothing; and one that is not this host's.
    let hung = || endpoint("hung", "127.0.0.1", quick(http(&mute, "/", "HTTP", &[])));
    let foreign = endpoint("foreign", "127.0.0.2", quick(tcp(&port)));
    probes.set(vec![web(), hung(), foreign], &allowed);
    found.wait_for(|found| found.len() == 2).await.unwrap();
    assert_eq!(ready(&found), [("hung".into(), false), ("web".into(), true)]);
    // What is asked for again goes on as it is.
    probes.set(vec![web()], &allowed);
    assert_eq!(ready(&found), [("web".into(), true)]);
    drop(listener);
    found.wait_for(|found| found.values().all(|ready| !ready)).await.unwrap();
    let told = told(&found.borrow());
    assert_eq!((told.len(), &*told[0].service, told[0].ready), (1, "web", false));
    probes.set(Vec::new(), &allowed);
    assert!(found.borrow().is_empty());
    drop(silent);
}
