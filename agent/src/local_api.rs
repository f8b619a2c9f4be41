//! The local API, `muster.agent.v1` over a Unix socket that only the agent's user may open.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use muster_common::{
    file::{self, FileError},
    time::{Instant, Timestamp},
};
use muster_proto::{
    admin::Endpoint,
    agent::{
        DatapathStatus, GetStatusRequest, GetStatusResponse, LeaveRequest, LeaveResponse,
        ListServicesRequest, ListServicesResponse, NetcheckRequest, NetcheckResponse, PingRequest,
        PingResponse, ResolveRequest, ResolveResponse, ResolverStatus, TrafficCounter,
        agent_service_server::{AgentService, AgentServiceServer},
    },
};
use muster_tunnel::DirectorId;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

use crate::{
    datapath::{Counter, Handle, PublicKey, Snapshot},
    netcheck::Surroundings,
    ping::{Outcome, Pinger},
    resolver::{ResolveError, Resolver},
    service_list::{ListError, Registrar, ServiceLists},
};

/// Longest series of pings.
const MAX_PINGS: u32 = 1_000_000;
/// Bounds of the time between pings, and of the wait for a reply.
const PING_TIMES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(60));

/// What the run loop answers.
#[derive(Debug)]
pub enum Query {
    /// Everything but counters of peers and resolver.
    Status(oneshot::Sender<GetStatusResponse>),
    /// What is known of the network around this host.
    Netcheck(oneshot::Sender<Surroundings>),
    /// How it stands with the registrar.
    Registrar(oneshot::Sender<Registrar>),
    /// Leaves the network; answered when that is done.
    Leave {
        /// Although the registrar cannot be told.
        force: bool,
        /// What came of it.
        answer: oneshot::Sender<Result<LeaveResponse, String>>,
    },
}

/// What the API needs of the running agent.
#[derive(Default)]
pub struct Shared {
    /// Set once the resolver runs.
    pub resolver: ArcSwapOption<Resolver>,
    /// Set once the data plane runs.
    pub datapath: ArcSwapOption<Handle>,
    /// What the directors are called that the data plane has numbers for.
    pub directors: ArcSwap<DirectorNames>,
}

/// Names of directors.
pub type DirectorNames = BTreeMap<DirectorId, String>;

impl Shared {
    /// The data plane's counters, if it runs.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        let handle = self.datapath.load_full()?;
        handle.snapshot().await.ok()
    }
}

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another agent listens there.
    #[error(
        "another muster-agent answers at {}\nremedy: stop it first (systemctl stop muster-agent), or configure another socket", .0.display()
    )]
    InUse(PathBuf),
}

/// The socket, listening. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl Socket {
    /// Listens at `path`, mode 0600. A socket that nobody listens on any more is replaced.
    pub async fn bind(path: &Path) -> Result<Self, SocketError> {
        if UnixStream::connect(path).await.is_ok() {
            return Err(SocketError::InUse(path.to_owned()));
        }
        let error = |source: io::Error| FileError::new("listen on socket", path, source);
        if let Some(directory) = path.parent() {
            file::create_private_dir(directory)?;
        }
        // Under another name until its mode is right, then in one step.
        let temporary = path.with_extension(format!("new-{}", std::process::id()));
        let _ = fs::remove_file(&temporary);
        let bind = || {
            let listener = UnixListener::bind(&temporary)?;
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
            fs::rename(&temporary, path)?;
            Ok(listener)
        };
        let listener = bind().inspect_err(|_| drop(fs::remove_file(&temporary))).map_err(error)?;
        Ok(Self { listener: Some(listener), path: path.to_owned() })
    }

    /// Serves until `stop` is ready, and calls under way are done.
    pub async fn serve(
        mut self,
        queries: mpsc::Sender<Query>,
        shared: Arc<Shared>,
        stop: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        tonic::transport::Server::builder()
            .add_service(AgentServiceServer::new(Api { queries, shared, lists: ServiceLists::default() }))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
            .await
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

struct Api {
    queries: mpsc::Sender<Query>,
    shared: Arc<Shared>,
    lists: ServiceLists,
}

impl Api {
    async fn ask<T>(&self, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Result<T, Status> {
        let stopping = || Status::unavailable("the agent is stopping");
        let (sender, answer) = oneshot::channel();
        self.queries.send(query(sender)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    }
}

fn resolver(shared: &Shared) -> Result<Arc<Resolver>, Status> {
    shared.resolver.load_full().ok_or_else(|| {
        Status::unavailable(
            "the resolver is not running: the agent has not been configured by a registrar yet, or resolver.enabled is false",
        )
    })
}

fn explain(error: &ResolveError) -> Status {
    match error {
        ResolveError::Name(_) => Status::invalid_argument(error.to_string()),
        ResolveError::NotFound(_) | ResolveError::NoAddress(_) => Status::not_found(error.to_string()),
        _ => Status::unavailable(muster_common::grpc::chain(error)),
    }
}

#[tonic::async_trait]
impl AgentService for Api {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let mut status = self.ask(Query::Status).await?;
        if let Some(snapshot) = self.shared.snapshot().await {
            let names = self.shared.directors.load();
            complete_peers(&mut status, &snapshot, &names, Instant::now(), Timestamp::now());
            status.datapath = Some(datapath(&snapshot));
        }
        if let Some(resolver) = self.shared.resolver.load_full() {
            let stats = resolver.stats();
            status.resolver = Some(ResolverStatus {
                listen: stats.listen.iter().map(ToString::to_string).collect(),
                upstream: stats.upstream.iter().map(ToString::to_string).collect(),
                cache_entries: stats.cache_entries,
                queries: stats.queries,
                cache_hits: stats.cache_hits,
            });
        }
        Ok(Response::new(status))
    }

    type PingStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<PingResponse, Status>> + Send>>;

    async fn ping(&self, request: Request<PingRequest>) -> Result<Response<Self::PingStream>, Status> {
        let request = request.into_inner();
        let (name, address) = match request.target.parse::<IpAddr>() {
            Ok(address) => (String::new(), address),
            Err(_) => {
                let answer =
                    resolver(&self.shared)?.resolve(&request.target).await.map_err(|e| explain(&e))?;
                let first = answer.addresses.first().copied();
                (answer.name, first.ok_or_else(|| Status::not_found("the name has no address"))?)
            }
        };
        let count = if request.count == 0 { 4 } else { request.count };
        if count > MAX_PINGS {
            return Err(Status::invalid_argument(format!("at most {MAX_PINGS} pings at a time")));
        }
        let interval = duration(request.interval.as_ref(), Duration::from_secs(1));
        let timeout = duration(request.timeout.as_ref(), Duration::from_secs(2));
        let pinger = Pinger::new(address).map_err(|e| Status::failed_precondition(e.to_string()))?;
        let shared = Arc::clone(&self.shared);
        let (responses, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            for sequence in 1..=count {
                let next = Instant::now() + interval;
                // The number in the packet goes around; no more than one is ever under way.
                let response = match pinger.ping((sequence & 0xffff) as u16, timeout).await {
                    Ok(outcome) => Ok(respond(sequence, &name, address, outcome, &shared).await),
                    Err(error) => Err(Status::failed_precondition(error.to_string())),
                };
                let failed = response.is_err();
                if responses.send(response).await.is_err() || failed {
                    return;
                }
                if sequence < count {
                    tokio::select! {
                        () = tokio::time::sleep(next - Instant::now()) => {}
                        () = responses.closed() => return,
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        let registrar = self.ask(Query::Registrar).await?;
        let services = self.lists.list(registrar, &request.into_inner().namespace).await;
        let services = services.map_err(|error| {
            let text = error.to_string();
            match error {
                ListError::Namespace(_) => Status::invalid_argument(text),
                ListError::Refused { .. } => Status::permission_denied(text),
                ListError::Unavailable { .. } => Status::unavailable(text),
                ListError::TooMany(_) => Status::resource_exhausted(text),
            }
        })?;
        Ok(Response::new(ListServicesResponse { services }))
    }

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        let name = request.into_inner().name;
        let answer = resolver(&self.shared)?.resolve(&name).await.map_err(|e| explain(&e))?;
        let texts = |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect();
        Ok(Response::new(ResolveResponse {
            addresses: texts(&answer.addresses),
            private_addresses: texts(&answer.private),
            director_addresses: texts(&answer.director),
            ttl: Some(proto_duration(answer.ttl)),
            name: answer.name,
        }))
    }

    async fn netcheck(&self, _: Request<NetcheckRequest>) -> Result<Response<NetcheckResponse>, Status> {
        Ok(Response::new(self.ask(Query::Netcheck).await?.examine().await))
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        let force = request.into_inner().force;
        let left = self.ask(|answer| Query::Leave { force, answer }).await?;
        left.map(Response::new).map_err(Status::failed_precondition)
    }
}

async fn respond(
    sequence: u32,
    name: &str,
    address: IpAddr,
    outcome: Outcome,
    shared: &Shared,
) -> PingResponse {
    let snapshot = shared.snapshot().await.unwrap_or_default();
    let peer = snapshot.peers.values().find(|peer| peer.virtual_addresses.contains(&address));
    PingResponse {
        sequence,
        address: address.to_string(),
        round_trip: match outcome {
            Outcome::Reply(time) => Some(proto_duration(time)),
            Outcome::Timeout | Outcome::Unreachable => None,
        },
        path: peer.map_or("none", |peer| peer.path.as_str()).to_owned(),
        endpoint: peer.and_then(|peer| peer.endpoint).map(endpoint),
        name: name.to_owned(),
        director: director(peer.and_then(|peer| peer.director), &shared.directors.load()),
    }
}

/// What a director is called; empty for none.
fn director(id: Option<DirectorId>, names: &DirectorNames) -> String {
    id.map(|id| names.get(&id).cloned().unwrap_or_else(|| format!("number {}", id.0))).unwrap_or_default()
}

/// Adds to the peers in `status` what the data plane knows of them.
fn complete_peers(
    status: &mut GetStatusResponse,
    snapshot: &Snapshot,
    names: &DirectorNames,
    now: Instant,
    civil: Timestamp,
) {
    let at = |at: Instant| timestamp(civil.saturating_sub(now - at));
    for peer in &mut status.peers {
        let key: Option<PublicKey> = peer.public_key.as_slice().try_into().ok();
        let Some(live) = key.and_then(|key| snapshot.peers.get(&key)) else { continue };
        live.path.as_str().clone_into(&mut peer.path);
        peer.endpoint = live.endpoint.map(endpoint);
        peer.director = director(live.director, names);
        peer.round_trip = live.round_trip.map(proto_duration);
        peer.path_since = live.path_since.map(at);
        peer.path_reason = live.path_reason.unwrap_or_default().replace('_', " ");
        peer.last_handshake = live.last_handshake.map(at);
        peer.received_bytes = live.received_bytes;
        peer.sent_bytes = live.sent_bytes;
        peer.received_packets = live.received_packets;
        peer.sent_packets = live.sent_packets;
        peer.queued_packets = u32::try_from(live.queued).unwrap_or(u32::MAX);
        peer.drops = happened(&live.drops);
        peer.cipher = live.cipher.map(|cipher| cipher.as_str().to_owned()).unwrap_or_default();
        peer.path_mtu = live.path_mtu.into();
    }
}

fn datapath(snapshot: &Snapshot) -> DatapathStatus {
    let traffic = |Counter { packets, bytes, calls }| Some(TrafficCounter { packets, bytes, calls });
    DatapathStatus {
        threads: u32::try_from(snapshot.threads).unwrap_or(u32::MAX),
        offloads: snapshot.offloads.named().map(|(name, in_use)| (name.to_owned(), in_use)).into(),
        tun_received: traffic(snapshot.tun_received),
        tun_sent: traffic(snapshot.tun_sent),
        udp_received: traffic(snapshot.udp_received),
        udp_sent: traffic(snapshot.udp_sent),
        drops: happened(&snapshot.drops),
    }
}

fn happened(drops: &BTreeMap<&'static str, u64>) -> BTreeMap<String, u64> {
    drops
        .iter()
        .filter(|(_, number)| **number > 0)
        .map(|(reason, number)| ((*reason).to_owned(), *number))
        .collect()
}

/// A transport address as the API writes it.
pub fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint { address: address.ip().to_string(), port: address.port().into() }
}

/// A moment as the API writes it.
pub fn timestamp(at: Timestamp) -> pbjson_types::Timestamp {
    let since = at.since_epoch();
    pbjson_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

/// A duration as the API writes it.
pub fn proto_duration(duration: Duration) -> pbjson_types::Duration {
    pbjson_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

fn duration(given: Option<&pbjson_types::Duration>, default: Duration) -> Duration {
    let Some(given) = given else { return default };
    let seconds = Duration::from_secs(u64::try_from(given.seconds).unwrap_or(0));
    let nanos = Duration::from_nanos(u64::try_from(given.nanos).unwrap_or(0));
    seconds.saturating_add(nanos).clamp(PING_TIMES.0, PING_TIMES.1)
}

#[cfg(test)]
mod tests {
    use muster_proto::agent::PeerStatus;

    use super::*;
    use crate::datapath::{self, PeerSnapshot};

    #[tokio::test]
    async fn stale_sockets_are_replaced_and_live_ones_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/agent.sock");
        fs::create_dir(directory.path().join("run")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = Socket::bind(&path).await.unwrap_err().to_string();
        assert!(error.contains("another muster-agent"), "{error}");
        drop(socket);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn status_has_what_the_data_plane_counts() {
        let key = [7; 32];
        let drops = BTreeMap::from([("replayed", 3), ("no_route", 0)]);
        let now = Instant::now();
        let peer = PeerSnapshot {
            endpoint: Some("192.0.2.1:7551".parse().unwrap()),
            last_handshake: Some(now),
            received_packets: 1,
            received_bytes: 2,
            sent_packets: 3,
            sent_bytes: 4,
            queued: 5,
            path: datapath::Path::Direct,
            cipher: Some(datapath::Cipher::Aes256Gcm),
            path_mtu: 8920,
            drops: drops.clone(),
            director: Some(DirectorId(2)),
            path_since: Some(now),
            path_reason: Some("director_lost"),
            ..PeerSnapshot::default()
        };
        let snapshot = Snapshot {
            peers: BTreeMap::from([(key, peer)]),
            tun_received: Counter { packets: 40, bytes: 4_000, calls: 2 },
            threads: 3,
            offloads: datapath::Offloads { tun_tso: true, ..Default::default() },
            drops,
            ..Snapshot::default()
        };
        let known = PeerStatus { public_key: key.to_vec(), ..PeerStatus::default() };
        let strange = PeerStatus { public_key: vec![8; 32], ..PeerStatus::default() };
        let mut status = GetStatusResponse { peers: vec![known, strange.clone()], ..Default::default() };
        let civil = Timestamp::from_epoch(Duration::from_secs(9));
        let names = DirectorNames::from([(DirectorId(2), "far".to_owned())]);
        complete_peers(&mut status, &snapshot, &names, now, civil);
        assert_eq!(director(Some(DirectorId(3)), &names), "number 3");
        let happened = BTreeMap::from([("replayed".to_owned(), 3)]);
        let expected = PeerStatus {
            public_key: key.to_vec(),
            path: "direct".into(),
            endpoint: Some(Endpoint { address: "192.0.2.1".into(), port: 7551 }),
            last_handshake: Some(timestamp(civil)),
            received_packets: 1,
            received_bytes: 2,
            sent_packets: 3,
            sent_bytes: 4,
            queued_packets: 5,
            drops: happened.clone(),
            cipher: "aes-256-gcm".into(),
            path_mtu: 8920,
            director: "far".into(),
            path_since: Some(timestamp(civil)),
            path_reason: "director lost".into(),
            ..PeerStatus::default()
        };
        assert_eq!(status.peers, [expected, strange]);

        let all = super::datapath(&snapshot);
        assert_eq!(all.tun_received, Some(TrafficCounter { packets: 40, bytes: 4_000, calls: 2 }));
        assert_eq!((all.drops, all.offloads.len(), all.threads), (happened, 5, 3));
        assert_eq!((all.offloads["tun_tso"], all.offloads["udp_gro"]), (true, false));
    }

    #[test]
    fn odd_times_are_clamped() {
        let second = Duration::from_secs(1);
        assert_eq!(duration(None, second), second);
        let odd = |seconds, nanos| duration(Some(&pbjson_types::Duration { seconds, nanos }), second);
        assert_eq!(odd(-5, -5), PING_TIMES.0);
        assert_eq!(odd(i64::MAX, i32::MAX), PING_TIMES.1);
        assert_eq!(odd(0, 200_000_000), Duration::from_millis(200));
    }
}
