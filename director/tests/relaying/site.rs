//! A director with its CA, and clients with certificates of it.

use std::{net::SocketAddr, num::NonZeroUsize, sync::Arc, time::Duration};

use muster_common::{
    census::Bounds,
    grpc::{self, AcceptMetrics},
    telemetry::Metrics,
    tls::{ALPN_H2, Credentials, KeyPair},
};
use muster_director::{
    relay::Limits,
    running::{HELLO_INTERVAL, Running, Settings},
};
use muster_net::UdpSockets;
use muster_proto::{admin::Endpoint, director::relay_service_client::RelayServiceClient};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as RcgenKey, KeyUsagePurpose, SanType,
};
use rustls::pki_types::PrivateKeyDer;
use tokio::net::TcpListener;
use tonic::transport::Channel;
use uuid::Uuid;

pub(crate) type Ca = CertifiedIssuer<'static, RcgenKey>;
pub(crate) type Client = RelayServiceClient<Channel>;

pub(crate) fn ca() -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    CertifiedIssuer::self_signed(params, RcgenKey::generate().unwrap()).unwrap()
}

/// Credentials of `id`, issued and trusting `ca`.
pub(crate) fn credentials(ca: &Ca, id: &str) -> Arc<Credentials> {
    let key = RcgenKey::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    let certificate = params.signed_by(&key, ca).unwrap();
    let chain = vec![certificate.der().clone(), ca.der().clone()];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    Credentials::new(&KeyPair { chain, key }, &[ca.der().clone()]).unwrap()
}

/// A director on loopback.
pub(crate) struct Site {
    pub(crate) running: Running,
    pub(crate) metrics: Metrics,
    pub(crate) ca: Ca,
    /// Where frames go.
    pub(crate) udp: SocketAddr,
    pub(crate) udp6: SocketAddr,
    /// Where devices attach.
    pub(crate) tcp: SocketAddr,
}

impl Site {
    pub(crate) async fn new(limits: Limits) -> Self {
        let sockets = UdpSockets::bind_many(0, NonZeroUsize::new(2).unwrap()).unwrap();
        let port = sockets[0].port();
        let metrics = Metrics::with_prefix("muster_director");
        let settings = Settings {
            sockets,
            limits,
            network: "net".parse().unwrap(),
            endpoints: vec![Endpoint { address: "127.0.0.1".into(), port: port.into() }],
            hello_interval: HELLO_INTERVAL,
        };
        let running = Running::start(settings, &metrics).unwrap();
        let ca = ca();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = listener.local_addr().unwrap();
        let own = credentials(&ca, "spiffe://muster.test/network/net/director/d1");
        let tls = Arc::new(own.server_config(ALPN_H2).unwrap());
        let bounds = Bounds { parties: 64, per_device: 8, strangers: 64, strangers_per_source: 64 };
        tokio::spawn(running.serve(listener, tls, bounds, AcceptMetrics::default(), std::future::pending()));
        let (udp, udp6) = (([127, 0, 0, 1], port).into(), ([0, 0, 0, 0, 0, 0, 0, 1], port).into());
        Self { running, metrics, ca, udp, udp6, tcp }
    }

    /// A client with a certificate of that party, such as `network/net/device/…`.
    pub(crate) async fn client(&self, ca: &Ca, party: &str) -> Result<Client, grpc::ChannelError> {
        let own = credentials(ca, &format!("spiffe://muster.test/{party}"));
        let config = own.client_config(|_| true, ALPN_H2).unwrap();
        Ok(RelayServiceClient::new(grpc::connect(&self.tcp.to_string(), Arc::new(config)).await?))
    }

    pub(crate) async fn device(&self, device: u8) -> Client {
        self.client(&self.ca, &format!("network/net/device/{}", uid(device))).await.unwrap()
    }

    /// A counter, by its name and labels as they are in the text.
    pub(crate) fn counter(&self, name: &str) -> u64 {
        let text = self.metrics.encode();
        let line = text.lines().find(|line| line.starts_with(&format!("muster_director_{name} ")));
        line.map_or(0, |line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
    }
}

pub(crate) fn uid(device: u8) -> Uuid {
    Uuid::from_bytes([device; 16])
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..1_000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}
