//! A host with virtual IPs, servers behind them that say who they are, and what the registrar would tell.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    time::Duration,
};

use muster_agent::{
    state::State,
    virtual_ips::{Started, VirtualIps, table::Place},
    writer::Writer,
};
use muster_common::{digest, telemetry::Metrics};
use muster_proto::registration::{
    VirtualEndpoint, VirtualEndpoints, VirtualPort, VirtualService, VirtualServicesChanged,
};
use prost::Message as _;
use tokio::time::sleep;

use super::super::namespace::{Namespace, have_root};

pub(super) const TABLE: &str = "list table inet muster_muster0_services";
pub(super) const PORT: u16 = 80;
pub(super) const TARGET: u16 = 8080;

/// The virtual IP of a family.
pub(super) fn vip(is_ipv4: bool) -> IpAddr {
    if is_ipv4 { [100, 96, 0, 10].into() } else { "fd00:1::a".parse().unwrap() }
}

/// The address of an endpoint.
pub(super) fn endpoint(is_ipv4: bool, n: u8) -> IpAddr {
    if is_ipv4 { [100, 64, 0, 10 + n].into() } else { format!("fd00::{n:x}").parse().unwrap() }
}

/// A namespace with the interface `muster0`, and addresses for seven endpoints of each family.
pub(super) fn host() -> Namespace {
    let host = Namespace::new();
    host.ip("link add muster0 type veth peer name peer0");
    host.ip("link set peer0 up");
    host.ip("addr add 100.64.0.1/11 dev muster0");
    host.ip("addr add fd00::ff/64 dev muster0 nodad");
    host.ip("link set muster0 up");
    host.ip("route add 100.96.0.0/12 dev muster0 src 100.64.0.1");
    host.ip("-6 route add fd00:1::/64 dev muster0 src fd00::ff");
    for n in 1..=7 {
        host.ip(&format!("addr add {}/32 dev lo", endpoint(true, n)));
        host.ip(&format!("addr add {}/128 dev lo nodad", endpoint(false, n)));
    }
    host
}

/// Servers at all endpoints, over TCP and UDP, each of which says its own address; they end with the process.
pub(super) fn serve() {
    for n in 1..=7 {
        for is_ipv4 in [true, false] {
            let address = SocketAddr::new(endpoint(is_ipv4, n), TARGET);
            let listener = TcpListener::bind(address).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { return };
                    std::thread::spawn(move || {
                        let mut octet = [0];
                        while stream.write_all(format!("{address}\n").as_bytes()).is_ok() {
                            if !matches!(stream.read(&mut octet), Ok(1)) {
                                return;
                            }
                        }
                    });
                }
            });
            let socket = UdpSocket::bind(address).unwrap();
            std::thread::spawn(move || {
                let mut octets = [0; 100];
                while let Ok((_, from)) = socket.recv_from(&mut octets) {
                    let _ = socket.send_to(address.to_string().as_bytes(), from);
                }
            });
        }
    }
}

/// What the registrar would tell, and the agent that takes it.
pub(super) struct World {
    pub(super) services: BTreeMap<String, VirtualService>,
    pub(super) endpoints: BTreeMap<String, VirtualEndpoints>,
    pub(super) revision: u64,
    pub(super) directory: tempfile::TempDir,
    pub(super) writer: Arc<Writer>,
    pub(super) started: Started,
}

impl World {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(directory.path());
        let writer = Arc::new(Writer::start(state).unwrap());
        let started = start(None, &writer);
        Self {
            services: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            revision: 1,
            directory,
            writer,
            started,
        }
    }

    pub(super) fn digest(&self) -> u64 {
        let services = self.services.values().map(|service| service.encode_to_vec());
        let all = services.chain(self.endpoints.values().map(|slice| slice.encode_to_vec()));
        digest::of_all(all)
    }

    /// A Service of one family and one port with these endpoints, as it is from now on.
    pub(super) async fn put(
        &mut self,
        name: &str,
        is_ipv4: bool,
        endpoints: &[u8],
        change: impl FnOnce(&mut VirtualService),
    ) {
        let port = |number: u16, protocol: &str| VirtualPort {
            name: protocol.to_lowercase(),
            protocol: protocol.into(),
            port: number.into(),
        };
        let ports = |number| ["TCP", "UDP", "SCTP"].map(|protocol| port(number, protocol)).to_vec();
        let mut service = VirtualService {
            namespace: "default".into(),
            name: name.into(),
            addresses: vec![vip(is_ipv4).to_string()],
            ports: ports(PORT),
            ..VirtualService::default()
        };
        change(&mut service);
        let slice = VirtualEndpoints {
            namespace: "default".into(),
            name: format!("{name}-1"),
            service: name.into(),
            endpoints: endpoints
                .iter()
                .map(|n| VirtualEndpoint {
                    address: endpoint(is_ipv4, *n).to_string(),
                    zone: format!("z{n}"),
                    is_ready: true,
                    is_serving: true,
                })
                .collect(),
            ports: ports(TARGET),
        };
        let is_snapshot = self.revision == 1;
        self.revision += 1;
        self.services.insert(name.into(), service.clone());
        self.endpoints.insert(name.into(), slice.clone());
        self.tell(VirtualServicesChanged {
            is_snapshot,
            services: vec![service],
            endpoints: vec![slice],
            ..VirtualServicesChanged::default()
        })
        .await;
    }

    pub(super) async fn tell(&self, message: VirtualServicesChanged) {
        let (revision, digest) = (self.revision, self.digest());
        self.started.virtual_ips.take(VirtualServicesChanged { revision, digest, ..message });
        sleep(Duration::from_millis(150)).await;
    }
}

pub(super) fn start(stored: Option<&[u8]>, writer: &Arc<Writer>) -> Started {
    let metrics = Metrics::with_prefix("test");
    let started = VirtualIps::start("muster0", stored, Arc::clone(writer), &metrics).unwrap();
    let own = ["100.64.0.1", "fd00::ff"].map(|address| address.parse().unwrap());
    started.virtual_ips.move_to(Place { own: own.into(), ..Place::default() });
    std::thread::sleep(Duration::from_millis(200));
    started
}

/// Connects to the virtual IP; returns who answers.
pub(super) fn connect(is_ipv4: bool) -> std::io::Result<(TcpStream, IpAddr)> {
    let address = SocketAddr::new(vip(is_ipv4), PORT);
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let answer = line(&mut stream)?;
    Ok((stream, answer))
}

pub(super) fn line(stream: &mut TcpStream) -> std::io::Result<IpAddr> {
    let (mut text, mut octet) = (String::new(), [0]);
    while stream.read(&mut octet)? == 1 && octet != *b"\n" {
        text.push(char::from(octet[0]));
    }
    Ok(text.parse::<SocketAddr>().map_err(|_| ErrorKind::InvalidData)?.ip())
}

pub(super) fn answers(is_ipv4: bool, count: usize) -> BTreeSet<IpAddr> {
    (0..count).map(|_| connect(is_ipv4).unwrap().1).collect()
}

/// Runs `test` on such a host, with its servers, if it may be made.
pub(super) fn on_host(test: impl AsyncFnOnce(&Namespace) + Send) {
    if have_root() {
        let host = host();
        let place = &host;
        host.enter(async move || {
            serve();
            test(place).await;
        });
    }
}
