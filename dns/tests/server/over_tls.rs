//! DNS over TLS: who asks is known by certificate.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hickory_proto::op::Message;
use muster_common::{
    identity::Party,
    tls::{ALPN_DOT, Credentials, KeyPair},
};
use muster_dns::server::{
    Handler, bind_tcp,
    stream::{self, StreamLimits},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as RcgenKey, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    ANY_PORT, DEVICE, REGISTRAR, authoritative, framed, is_closed, metrics, read_response, run, viewer,
};

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
