//! Connections between real parties on loopback: who gets in, who does not, and what is said of it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use muster_common::{
    census::Bounds,
    grpc::{self, Caller, ChannelError},
    identity::Party,
    tls::{ALPN_H2, Credentials, KeyPair, SpkiHash, pinned_client_config},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as RcgenKey, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_stream::StreamExt;

type Issuer = CertifiedIssuer<'static, RcgenKey>;

fn ca() -> Issuer {
    static CAS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let mut params = CertificateParams::default();
    let number = CAS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("CA {number}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    CertifiedIssuer::self_signed(params, RcgenKey::generate().unwrap()).unwrap()
}

/// A key pair of `id`, the CA's certificate at the end of its chain, valid from `from` to `to` days from now.
fn issue(ca: &Issuer, id: &str, from: i64, to: i64) -> KeyPair {
    let key = RcgenKey::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now + time::Duration::days(from);
    params.not_after = now + time::Duration::days(to);
    let certificate = params.signed_by(&key, ca).unwrap();
    KeyPair {
        chain: vec![certificate.der().clone(), ca.der().clone()],
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    }
}

fn credentials(pair: &KeyPair, roots: &[&Issuer]) -> Arc<Credentials> {
    let roots: Vec<CertificateDer<'_>> = roots.iter().map(|ca| ca.der().clone()).collect();
    Credentials::new(pair, &roots).unwrap()
}

const REGISTRAR: &str = "spiffe://muster.test/registrar/r1";
const DEVICE: &str = "spiffe://muster.test/network/net/device/d1";

fn is_registrar(party: &Party) -> bool {
    matches!(party, Party::Registrar { .. })
}

/// A server that tells each connection's caller over the channel, and reads what it sends.
async fn serve(credentials: &Arc<Credentials>) -> (SocketAddr, tokio::sync::mpsc::Receiver<Caller>) {
    let bounds = Bounds { parties: 16, per_device: 16, strangers: 16, strangers_per_source: 16 };
    serve_within(credentials, bounds).await
}

/// Likewise, for so many connections.
async fn serve_within(
    credentials: &Arc<Credentials>,
    bounds: Bounds,
) -> (SocketAddr, tokio::sync::mpsc::Receiver<Caller>) {
    use tonic::transport::server::Connected;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = Arc::new(credentials.server_config(ALPN_H2).unwrap());
    let mut incoming = grpc::incoming(listener, config, bounds, grpc::AcceptMetrics::default());
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        let mut open = tokio::task::JoinSet::new();
        while let Some(connection) = incoming.next().await {
            let mut connection = connection.unwrap();
            let _ = sender.send(connection.connect_info()).await;
            open.spawn(async move { while connection.read_u8().await.is_ok() {} });
        }
    });
    (address, receiver)
}

async fn connect(address: SocketAddr, client: &Arc<Credentials>) -> Result<(), ChannelError> {
    let config = Arc::new(client.client_config(is_registrar, ALPN_H2).unwrap());
    grpc::connect(&address.to_string(), config).await.map(drop)
}

#[tokio::test]
async fn a_device_is_known_by_its_certificate() {
    let ca = ca();
    let server = credentials(&issue(&ca, REGISTRAR, -1, 1), &[&ca]);
    let (address, mut callers) = serve(&server).await;
    let device = credentials(&issue(&ca, DEVICE, -1, 1), &[&ca]);
    connect(address, &device).await.unwrap();
    let caller = callers.recv().await.unwrap();
    assert_eq!(caller.identity.unwrap().to_string(), DEVICE);
}

#[tokio::test]
async fn parties_of_another_ca_or_role_are_refused() {
    let (ours, theirs) = (ca(), ca());
    let server = credentials(&issue(&ours, REGISTRAR, -1, 1), &[&ours]);
    let (address, mut callers) = serve(&server).await;

    // A client with a certificate of another CA gets no further than its handshake.
    let stranger = credentials(&issue(&theirs, DEVICE, -1, 1), &[&ours]);
    drop(connect(address, &stranger).await);
    // A client that does not know our CA refuses us, and says why.
    let wary = credentials(&issue(&ours, DEVICE, -1, 1), &[&theirs]);
    let error = connect(address, &wary).await.unwrap_err().to_string();
    assert!(error.contains("not from a CA that we trust"), "{error}");
    assert!(tokio::time::timeout(Duration::from_millis(200), callers.recv()).await.is_err());

    // A device cannot pass for a registrar.
    let impostor = credentials(&issue(&ours, DEVICE, -1, 1), &[&ours]);
    let (address, _callers) = serve(&impostor).await;
    let device = credentials(&issue(&ours, DEVICE, -1, 1), &[&ours]);
    let error = connect(address, &device).await.unwrap_err().to_string();
    assert!(error.contains("not a party"), "{error}");
}

#[tokio::test]
async fn expired_and_future_certificates_are_refused() {
    let ca = ca();
    let device = credentials(&issue(&ca, DEVICE, -1, 1), &[&ca]);
    for (from, to, why) in [(-3, -1, "expired"), (1, 3, "valid from")] {
        let server = credentials(&issue(&ca, REGISTRAR, from, to), &[&ca]);
        let (address, _callers) = serve(&server).await;
        let error = connect(address, &device).await.unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
    }
}

#[tokio::test]
async fn keys_and_roots_are_replaced_while_serving() {
    let (old, new) = (ca(), ca());
    let server = credentials(&issue(&old, REGISTRAR, -1, 1), &[&old]);
    let (address, mut callers) = serve(&server).await;
    let device = credentials(&issue(&old, DEVICE, -1, 1), &[&old]);
    connect(address, &device).await.unwrap();
    callers.recv().await.unwrap();

    // Both roots are trusted; then either side moves to the new one at its own time.
    let both = [old.der().clone(), new.der().clone()];
    server.replace_roots(&both).unwrap();
    device.replace_roots(&both).unwrap();
    server.replace_key(&issue(&new, REGISTRAR, -1, 1)).unwrap();
    connect(address, &device).await.unwrap();
    callers.recv().await.unwrap();
    device.replace_key(&issue(&new, DEVICE, -1, 1)).unwrap();
    connect(address, &device).await.unwrap();
    assert!(callers.recv().await.unwrap().identity.is_some());

    // The old root retires: who still uses it is refused.
    server.replace_roots(&[new.der().clone()]).unwrap();
    device.replace_key(&issue(&old, DEVICE, -1, 1)).unwrap();
    drop(connect(address, &device).await);
    assert!(tokio::time::timeout(Duration::from_millis(200), callers.recv()).await.is_err());
}

#[tokio::test]
async fn a_pinned_connection_needs_the_right_ca() {
    let (ours, theirs) = (ca(), ca());
    let server = credentials(&issue(&ours, REGISTRAR, -1, 1), &[&ours]);
    let (address, mut callers) = serve(&server).await;

    let pin = SpkiHash::of(ours.der()).unwrap();
    let pin: SpkiHash = pin.to_string().parse().unwrap();
    let config = Arc::new(pinned_client_config(pin).unwrap());
    grpc::connect(&address.to_string(), config).await.unwrap();
    assert!(callers.recv().await.unwrap().identity.is_none());

    let config = Arc::new(pinned_client_config(SpkiHash::of(theirs.der()).unwrap()).unwrap());
    let error = grpc::connect(&address.to_string(), config).await.unwrap_err().to_string();
    assert!(error.contains("CA hash does not match") && error.contains("--ca-hash"), "{error}");
    assert!("sha256:12".parse::<SpkiHash>().is_err());
    assert!(format!("sha256:{}", "é".repeat(32)).parse::<SpkiHash>().is_err());
}

/// Connects with TLS alone, as someone who then says nothing.
async fn silent(address: SocketAddr, config: rustls::ClientConfig) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(address).await.unwrap();
    TlsConnector::from(Arc::new(config)).connect(address.ip().into(), stream).await.unwrap()
}

/// The server has closed the connection.
async fn ended(stream: &mut TlsStream<TcpStream>) {
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_u8()).await;
    assert!(matches!(read, Ok(Err(_))), "the connection is still open: {read:?}");
}

#[tokio::test]
async fn strangers_take_no_places_of_devices() {
    let ca = ca();
    let server = credentials(&issue(&ca, REGISTRAR, -1, 1), &[&ca]);
    let bounds = Bounds { parties: 2, per_device: 2, strangers: 3, strangers_per_source: 3 };
    let (address, mut callers) = serve_within(&server, bounds).await;
    let pin = SpkiHash::of(ca.der()).unwrap();
    let mut strangers = vec![
        silent(address, pinned_client_config(pin).unwrap()).await,
        silent(address, pinned_client_config(pin).unwrap()).await,
    ];
    // The third place is for handshakes, and so both of the devices' can be had.
    let device = credentials(&issue(&ca, DEVICE, -1, 1), &[&ca]);
    let config = device.client_config(is_registrar, ALPN_H2).unwrap();
    let _devices = [silent(address, config.clone()).await, silent(address, config.clone()).await];
    for _ in 0..4 {
        callers.recv().await.unwrap();
    }
    // One who never ends the handshake takes the last place: the next is closed at once, and devices go on.
    let slow = TcpStream::connect(address).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut refused = TcpStream::connect(address).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(5), refused.read_u8()).await;
    assert!(matches!(read, Ok(Err(_))), "closed at once: {read:?}");
    drop(slow);
    // Once it is gone there is a place again; but the devices have all of theirs.
    let mut third = loop {
        let stream = TcpStream::connect(address).await.unwrap();
        let config = Arc::new(config.clone());
        if let Ok(stream) = TlsConnector::from(config).connect(address.ip().into(), stream).await {
            break stream;
        }
    };
    ended(&mut third).await;
    strangers.clear();
}

#[tokio::test]
async fn connections_end_with_the_certificate_and_are_never_resumed() {
    let ca = ca();
    let server = credentials(&issue(&ca, REGISTRAR, -1, 1), &[&ca]);
    let (address, mut callers) = serve(&server).await;
    let key = RcgenKey::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(DEVICE.try_into().unwrap())];
    params.not_after = time::OffsetDateTime::now_utc() + time::Duration::seconds(3);
    let certificate = params.signed_by(&key, &ca).unwrap();
    let pair = KeyPair {
        chain: vec![certificate.der().clone(), ca.der().clone()],
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    };
    let device = credentials(&pair, &[&ca]);
    let config = device.client_config(is_registrar, ALPN_H2).unwrap();
    let mut first = silent(address, config.clone()).await;
    callers.recv().await.unwrap();
    // It begins, and so it may stay for as long as its certificate is valid.
    first.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let second = silent(address, config.clone()).await;
    assert_eq!(second.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
    callers.recv().await.unwrap();
    ended(&mut first).await;
    // It is valid to the end of its last second. A resumed session would be let in after that.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let stream = TcpStream::connect(address).await.unwrap();
    let late = TlsConnector::from(Arc::new(config)).connect(address.ip().into(), stream).await;
    if let Ok(mut late) = late {
        ended(&mut late).await;
    }
    assert!(tokio::time::timeout(Duration::from_millis(200), callers.recv()).await.is_err());
}

/// A server that resumes sessions. What it thinks of each connection comes out of the channel, once it has been
/// asked to look at it through the other.
async fn serve_resuming(
    credentials: &Arc<Credentials>,
) -> (SocketAddr, tokio::sync::mpsc::Sender<()>, tokio::sync::mpsc::Receiver<(rustls::HandshakeKind, bool)>) {
    let server = credentials.resuming_server(ALPN_H2).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (look, mut looks) = tokio::sync::mpsc::channel(16);
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = tokio_rustls::TlsAcceptor::from(server.config());
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            // The client reads this, and with it its tickets.
            stream.write_all(b"x").await.unwrap();
            stream.flush().await.unwrap();
            looks.recv().await;
            let connection = stream.get_ref().1;
            assert!(connection.peer_certificates().is_some());
            let verdict = (connection.handshake_kind().unwrap(), server.check(connection).is_ok());
            sender.send(verdict).await.unwrap();
        }
    });
    (address, look, receiver)
}

#[tokio::test]
async fn resumed_sessions_are_verified_again() {
    use rustls::HandshakeKind::{Full, Resumed};
    let (old, new) = (ca(), ca());
    let server = credentials(&issue(&old, REGISTRAR, -1, 1), &[&old]);
    let (address, look, mut verdicts) = serve_resuming(&server).await;
    let device = credentials(&issue(&old, DEVICE, -1, 1), &[&old]);
    let mut config = device.client_config(is_registrar, ALPN_H2).unwrap();
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    for kind in [Full, Resumed, Resumed] {
        silent(address, config.clone()).await.read_u8().await.unwrap();
        look.send(()).await.unwrap();
        assert_eq!(verdicts.recv().await.unwrap(), (kind, true));
    }
    // The root goes just after a resumed handshake, which nobody believes then.
    silent(address, config.clone()).await.read_u8().await.unwrap();
    server.replace_roots(&[new.der().clone()]).unwrap();
    look.send(()).await.unwrap();
    assert_eq!(verdicts.recv().await.unwrap(), (Resumed, false));
    // Later, there is no resumed handshake any more, and the full one fails.
    let late = TcpStream::connect(address).await.unwrap();
    let late = TlsConnector::from(Arc::new(config)).connect(address.ip().into(), late).await;
    if let Ok(mut late) = late {
        ended(&mut late).await;
    }
    assert!(verdicts.try_recv().is_err());
}

#[tokio::test]
async fn a_session_does_not_outlive_its_certificate() {
    use rustls::HandshakeKind::{Full, Resumed};
    let ca = ca();
    let server = credentials(&issue(&ca, REGISTRAR, -1, 1), &[&ca]);
    let (address, look, mut verdicts) = serve_resuming(&server).await;
    let key = RcgenKey::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(DEVICE.try_into().unwrap())];
    params.not_after = time::OffsetDateTime::now_utc() + time::Duration::seconds(2);
    let certificate = params.signed_by(&key, &ca).unwrap();
    let pair = KeyPair {
        chain: vec![certificate.der().clone(), ca.der().clone()],
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    };
    let mut config = credentials(&pair, &[&ca]).client_config(is_registrar, ALPN_H2).unwrap();
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    silent(address, config.clone()).await.read_u8().await.unwrap();
    look.send(()).await.unwrap();
    assert_eq!(verdicts.recv().await.unwrap(), (Full, true));
    // It is valid to the end of its last second.
    tokio::time::sleep(Duration::from_millis(3200)).await;
    silent(address, config).await.read_u8().await.unwrap();
    look.send(()).await.unwrap();
    assert_eq!(verdicts.recv().await.unwrap(), (Resumed, false));
}

#[tokio::test]
async fn strangers_stay_no_longer_than_joining_takes() {
    let ca = ca();
    let server = credentials(&issue(&ca, REGISTRAR, -1, 1), &[&ca]);
    let (address, mut callers) = serve(&server).await;
    let pin = SpkiHash::of(ca.der()).unwrap();
    let mut stranger = silent(address, pinned_client_config(pin).unwrap()).await;
    let mut device = silent(
        address,
        credentials(&issue(&ca, DEVICE, -1, 1), &[&ca]).client_config(is_registrar, ALPN_H2).unwrap(),
    )
    .await;
    let mut begun = silent(
        address,
        credentials(&issue(&ca, DEVICE, -1, 1), &[&ca]).client_config(is_registrar, ALPN_H2).unwrap(),
    )
    .await;
    for _ in 0..3 {
        callers.recv().await.unwrap();
    }
    begun.write_all(b"P").await.unwrap();
    stranger.write_all(b"P").await.unwrap();
    // Real time, to the second before which all of them are still there.
    tokio::time::sleep(Duration::from_secs(28)).await;
    for stream in [&mut stranger, &mut device, &mut begun] {
        assert!(tokio::time::timeout(Duration::from_millis(10), stream.read_u8()).await.is_err());
    }
    ended(&mut stranger).await;
    ended(&mut device).await;
    assert!(tokio::time::timeout(Duration::from_millis(10), begun.read_u8()).await.is_err());
}
