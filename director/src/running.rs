//! A director at work: threads that relay, and the service that devices attach by. What runs it tells it whom to
//! refuse and when to drain.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use muster_common::{
    census::Bounds,
    grpc::{AcceptMetrics, incoming},
    name::Label,
    telemetry,
};
use muster_net::UdpSockets;
use muster_proto::{admin::Endpoint, director::relay_service_server::RelayServiceServer};
use rustls::ServerConfig;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tonic::transport::Server;
use uuid::Uuid;

use crate::{
    attach::Service,
    hub::Hub,
    metrics::{Attachments, Metrics},
    relay::{AttachError, Attached, Limits, Relay},
    stream,
    udp::Threads,
};

/// How often devices say hello. NATs forget a flow of UDP after 30 s at the earliest, as a rule (RFC 4787, REQ-5).
pub const HELLO_INTERVAL: Duration = Duration::from_secs(15);
/// What one stream and one connection may have under way, in octets: 1 Gbit/s at 30 ms.
const WINDOWS: (u32, u32) = (4 << 20, 8 << 20);
/// Octets of the largest HTTP/2 frame: a batch of frames is one or two.
const HTTP2_FRAME: u32 = 64 << 10;
/// Streams of one connection: attached and relaying, twice.
const STREAMS: u32 = 8;
const HEADERS: u32 = 16 << 10;
/// How often an idle connection is checked, and how long the check may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(20));

/// What a director needs to begin.
#[derive(Debug)]
pub struct Settings {
    /// One pair for each thread that relays, all on the same addresses; at least one.
    pub sockets: Vec<UdpSockets>,
    /// How much it takes.
    pub limits: Limits,
    /// The network whose devices it serves.
    pub network: Label,
    /// Where devices send their hellos; best first.
    pub endpoints: Vec<Endpoint>,
    /// See [`HELLO_INTERVAL`].
    pub hello_interval: Duration,
}

/// Sums since the start, and how things are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Devices attached.
    pub attached: u64,
    /// Frames passed on.
    pub frames: u64,
    /// Octets of those.
    pub octets: u64,
    /// Devices are asked to leave.
    pub is_draining: bool,
}

/// A director at work, until it is dropped.
#[derive(Debug)]
pub struct Running {
    service: Service,
    _threads: Threads,
    time: JoinHandle<()>,
    failed: mpsc::Receiver<io::Error>,
}

impl Running {
    /// Starts the threads. Devices attach when [`Self::serve`] is called.
    ///
    /// # Errors
    /// There are no sockets, or the system has no more threads or files.
    pub fn start(settings: Settings, registry: &telemetry::Metrics) -> io::Result<Self> {
        let Settings { sockets, limits, network, endpoints, hello_interval } = settings;
        let metrics = Metrics::register(registry);
        let hub = Arc::new(Hub::new(Relay::new(rand::random(), limits), metrics));
        registry.register(|registry| registry.register_collector(Box::new(Attachments(hub.clone()))));
        let sockets: Vec<_> = sockets.into_iter().map(Arc::new).collect();
        let Some(first) = sockets.first().cloned() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "there are no sockets to relay with"));
        };
        let (failure, failed) = mpsc::channel(1);
        let threads = Threads::start(&hub, &sockets, limits.unbound_per_second, &failure)?;
        let keeper = hub.clone();
        let time = tokio::spawn(async move { keeper.keep_time().await });
        let service = Service { hub, sockets: first, network, endpoints: endpoints.into(), hello_interval };
        Ok(Self { service, _threads: threads, time, failed })
    }

    /// Takes devices that connect to `listener`, until `stop` is there; may be called for several listeners.
    pub fn serve<F: Future<Output = ()> + Send + 'static>(
        &self,
        listener: TcpListener,
        tls: Arc<ServerConfig>,
        bounds: Bounds,
        metrics: AcceptMetrics,
        stop: F,
    ) -> impl Future<Output = Result<(), tonic::transport::Error>> + Send + use<F> {
        let service = RelayServiceServer::new(self.service.clone())
            .max_decoding_message_size(stream::MESSAGE)
            .max_encoding_message_size(stream::MESSAGE);
        let server = Server::builder()
            .max_concurrent_streams(STREAMS)
            .initial_stream_window_size(WINDOWS.0)
            .initial_connection_window_size(WINDOWS.1)
            .max_frame_size(HTTP2_FRAME)
            .http2_max_header_list_size(HEADERS)
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .add_service(service);
        async move { server.serve_with_incoming_shutdown(incoming(listener, tls, bounds, metrics), stop).await }
    }

    /// What the registrar is told of, and decides about.
    pub(crate) fn hub(&self) -> Arc<Hub> {
        Arc::clone(&self.service.hub)
    }

    /// A session for `device`, as if it had attached from `from` and held the stream, until it is refused or replaced:
    /// for whoever relays without certificates, as tests do.
    ///
    /// # Errors
    /// As [`Relay::attach`].
    pub fn attach(&self, device: Uuid, from: IpAddr) -> Result<Attached, AttachError> {
        self.service.hub.attach(device, from).map(|admitted| admitted.attached)
    }

    /// The registrar does not want these devices: what they have here ends at once, and they cannot come back.
    pub fn refuse(&self, devices: &[Uuid]) {
        if !devices.is_empty() {
            self.service.hub.refuse(devices);
        }
    }

    /// Forgets whom the registrar did not want: it is asked anew about each device that attaches.
    pub fn forgive(&self) {
        self.service.hub.forgive();
    }

    /// Changes whenever devices have come or gone; [`Self::devices`] tells which are there.
    pub fn attached(&self) -> watch::Receiver<u64> {
        self.service.hub.changes()
    }

    /// The devices attached, in order.
    pub fn devices(&self) -> Vec<Uuid> {
        self.service.hub.devices()
    }

    /// From now on nobody attaches, and those who are attached are asked to leave within that time.
    pub fn drain(&self, within: Duration) {
        self.service.hub.drain(within);
    }

    /// How much has been relayed, and for how many.
    pub fn counters(&self) -> Counters {
        let snapshot = self.service.hub.snapshot();
        let (frames, octets) = self.service.hub.metrics.passed_on();
        Counters { attached: snapshot.devices as u64, frames, octets, is_draining: snapshot.is_draining }
    }

    /// Waits until a thread cannot go on, and says why.
    pub async fn failed(&mut self) -> io::Error {
        match self.failed.recv().await {
            Some(error) => error,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.time.abort();
    }
}
