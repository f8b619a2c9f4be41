//! A wireguard-go process in a network namespace of its own, and the tunnel under test on a UDP socket beside it.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use muster_common::time::{Instant, Timestamp};
use muster_tunnel::{
    Config, Dropped, Ecn, Outgoing, PeerConfig, PresharedKey, PrivateKey, PublicKey, Received, Tunnel,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Virtual address of wireguard-go's side.
pub(crate) const THEIRS: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
/// Virtual address of the tunnel under test.
pub(crate) const OURS: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
const THEIR_PORT: u16 = 51_820;
const PREFIX: &str = "muster-wg-";
/// How long anything may take that takes milliseconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether the test can run. If not, it says why, or fails where `MUSTER_REQUIRE_ROOT=1` demands it.
pub(crate) fn can_run() -> bool {
    let missing = if fs::metadata("/proc/self").map(|m| m.uid()).unwrap_or(1) != 0 {
        "root, which makes the network namespace"
    } else if !Path::new("/dev/net/tun").exists() {
        "/dev/net/tun"
    } else if let Some(missing) = ["ip", "ping", "wg", "wireguard-go"].into_iter().find(|c| !is_installed(c))
    {
        missing
    } else {
        return true;
    };
    if std::env::var_os("MUSTER_REQUIRE_ROOT").is_some_and(|v| v == "1") {
        panic!("this test needs {missing}, and MUSTER_REQUIRE_ROOT=1 forbids to skip it");
    }
    eprintln!("skipped: this test needs {missing}");
    false
}

fn is_installed(command: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').any(|dir| Path::new(dir).join(command).exists())
}

/// Runs a command to its end, with `input`, and returns what it printed.
pub(crate) fn run(command: &str, input: &str) -> String {
    let mut words = command.split_whitespace();
    let mut child = Command::new(words.next().expect("a command"))
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run `{command}`: {error}"));
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("the command reads its input");
    let output = child.wait_with_output().expect("the command ends");
    assert!(output.status.success(), "`{command}` failed: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The namespace, wireguard-go in it, and the tunnel under test. The calling thread lives in the namespace from then
/// on, so that sockets and processes that it makes do too.
pub(crate) struct Lab {
    namespace: String,
    interface: String,
    wireguard_go: Option<Child>,
    pub(crate) their_key: PublicKey,
    pub(crate) tunnel: Tunnel,
    pub(crate) socket: UdpSocket,
    out: Outgoing,
    /// How much the tunnel's clock is ahead of the real one.
    ahead: Duration,
    /// Inner packets that came for us.
    pub(crate) packets: Vec<Vec<u8>>,
    /// First octet and length of all datagrams that came.
    pub(crate) datagrams: Vec<(u8, usize)>,
    /// All datagrams that were sent.
    pub(crate) sent: Vec<Vec<u8>>,
    pub(crate) keepalives: usize,
    pub(crate) dropped: Vec<Dropped>,
    /// Whether echo requests are answered.
    pub(crate) answers: bool,
}

impl Lab {
    /// Starts wireguard-go, which knows us, and a tunnel, which does not know it yet.
    pub(crate) fn new(handshake_rate: u32, preshared_key: Option<[u8; 32]>) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let (namespace, interface) = (format!("{PREFIX}{number}"), format!("mt{number}"));
        run(&format!("ip netns add {namespace}"), "");
        let seed = random();
        let private_key = PrivateKey::from_bytes(random());
        let our_key = private_key.public_key();
        let config = Config { private_key, seed, mtu: 1420, handshake_rate, accepts_aes: true };
        let file = fs::File::open(Path::new("/run/netns").join(&namespace)).expect("the namespace is there");
        use std::os::fd::AsFd as _;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("enters the namespace");
        let their_private = run("wg genkey", "");
        let mut lab = Self {
            namespace,
            interface,
            wireguard_go: None,
            their_key: run("wg pubkey", &their_private).parse().expect("wg prints keys"),
            tunnel: Tunnel::new(config, Instant::now(), Timestamp::now()),
            socket: socket(),
            out: Outgoing::new(),
            ahead: Duration::ZERO,
            packets: vec![],
            datagrams: vec![],
            sent: vec![],
            keepalives: 0,
            dropped: vec![],
            answers: true,
        };
        run("ip link set lo up", "");
        lab.wireguard_go = Some(
            Command::new("wireguard-go")
                .args(["-f", &lab.interface])
                .env("LOG_LEVEL", "error")
                .env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("wireguard-go starts"),
        );
        lab.wait_for("wireguard-go's control socket", |lab| lab.control_socket().exists());
        lab.wg(&format!("private-key /dev/stdin listen-port {THEIR_PORT}"), &their_private);
        lab.wg(&format!("peer {our_key} allowed-ips {OURS}/32"), "");
        if let Some(psk) = preshared_key {
            use base64::Engine as _;
            let psk = base64::engine::general_purpose::STANDARD.encode(psk);
            lab.wg(&format!("peer {our_key} preshared-key /dev/stdin"), &psk);
        }
        run(&format!("ip address add {THEIRS}/24 dev {}", lab.interface), "");
        run(&format!("ip link set {} mtu 1420 up", lab.interface), "");
        // It opens its port when it hears that the interface is up.
        let port = format!(":{THEIR_PORT:04X} ");
        lab.wait_for("wireguard-go's port", |_| {
            fs::read_to_string("/proc/thread-self/net/udp").is_ok_and(|sockets| sockets.contains(&port))
        });
        lab
    }

    /// Tells our tunnel of wireguard-go.
    pub(crate) fn add_peer(&mut self, endpoints: &[SocketAddr], preshared_key: Option<[u8; 32]>) {
        let config = PeerConfig {
            preshared_key: preshared_key.map(PresharedKey::from_bytes),
            virtual_addresses: vec![IpAddr::V4(THEIRS)],
            endpoints: endpoints.to_vec(),
            ..PeerConfig::new(self.their_key)
        };
        self.tunnel.add_peer(config, self.now());
        self.drain();
    }

    /// Where wireguard-go listens.
    pub(crate) fn their_endpoint(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, THEIR_PORT).into()
    }

    /// Tells wireguard-go where we are.
    pub(crate) fn tell_our_endpoint(&self) {
        let at = self.socket.local_addr().expect("the socket is bound");
        self.wg(&format!("peer {} endpoint {at}", self.tunnel.public_key()), "");
    }

    /// `wg set` on wireguard-go's interface.
    pub(crate) fn wg(&self, arguments: &str, input: &str) {
        run(&format!("wg set {} {arguments}", self.interface), input);
    }

    /// What `wg show` says of us: `endpoints`, `latest-handshakes`, `transfer`, …, without our key.
    pub(crate) fn show(&self, what: &str) -> Vec<String> {
        let line = run(&format!("wg show {} {what}", self.interface), "");
        line.split_whitespace().skip(1).map(str::to_owned).collect()
    }

    /// Octets that wireguard-go has received from us.
    pub(crate) fn they_received(&self) -> u64 {
        self.show("transfer")[0].parse().expect("a number")
    }

    /// Starts a ping from wireguard-go's side to ours.
    pub(crate) fn ping(&self, wait_seconds: u32) -> Child {
        Command::new("ping")
            .args(["-c", "1", "-s", "33", "-W", &wait_seconds.to_string(), &OURS.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .expect("ping starts")
    }

    pub(crate) fn now(&self) -> Instant {
        Instant::now() + self.ahead
    }

    /// Puts the tunnel's clock forward, after as much real time as wireguard-go wants between two initiations.
    pub(crate) fn skip(&mut self, time: Duration) {
        std::thread::sleep(Duration::from_millis(30));
        self.ahead += time;
        self.tunnel.handle_timeout(self.now());
        self.drain();
    }

    /// Sends a packet into our tunnel.
    pub(crate) fn send(&mut self, packet: &[u8]) {
        let now = self.now();
        if let Err(reason) = self.tunnel.handle_packet(packet, now, &mut self.out) {
            self.dropped.push(reason);
        }
        self.drain();
    }

    pub(crate) fn drain(&mut self) {
        let mut datagrams = Vec::new();
        while let Some(transmit) = self.tunnel.poll_transmit() {
            datagrams.push((transmit.hop, transmit.payload));
        }
        for run in self.out.runs() {
            datagrams.extend(run.datagrams().map(|datagram| (run.hop, datagram.to_vec())));
        }
        self.out.clear();
        for (hop, payload) in datagrams {
            let destination = hop.udp().expect("there are no directors");
            // An error here may be the ICMP error for an earlier datagram; what got lost is sent again.
            let _ = self.socket.send_to(&payload, destination);
            self.sent.push(payload);
        }
    }

    /// Handles one datagram, if one comes within a few milliseconds, and what is due.
    pub(crate) fn step(&mut self) {
        let mut buffer = [0; 65_535];
        match self.socket.recv_from(&mut buffer) {
            Ok((len, source)) => {
                let datagram = &mut buffer[..len];
                self.datagrams.push((datagram[0], len));
                match self.tunnel.handle_datagram(source, Ecn::NotEct, datagram, Instant::now() + self.ahead)
                {
                    Ok(Received::Packet { packet, .. }) => {
                        let packet = packet.to_vec();
                        let answer = if self.answers { echo_reply(&packet) } else { None };
                        self.packets.push(packet);
                        if let Some(answer) = answer {
                            self.send(&answer);
                        }
                    }
                    Ok(Received::Keepalive) => self.keepalives += 1,
                    Ok(Received::Probe | Received::Handshake) => {}
                    Err(reason) => self.dropped.push(reason),
                }
            }
            // Refused: an ICMP error for something sent before.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock
                        | ErrorKind::TimedOut
                        | ErrorKind::Interrupted
                        | ErrorKind::ConnectionRefused
                ) => {}
            Err(error) => panic!("cannot receive: {error}"),
        }
        self.tunnel.handle_timeout(self.now());
        self.drain();
    }

    /// Goes on until `condition` holds.
    pub(crate) fn wait_for(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < end, "{what} did not come; dropped: {:?}", self.dropped);
            self.step();
        }
    }

    /// Goes on until a child has ended, and says whether it was successful.
    pub(crate) fn wait_for_child(&mut self, mut child: Child) -> bool {
        let mut status = None;
        self.wait_for("the end of a child", |_| {
            status = child.try_wait().expect("a child can be waited for");
            status.is_some()
        });
        status.is_some_and(|status| status.success())
    }

    /// An echo request from us comes back as it went.
    pub(crate) fn assert_echo(&mut self, sequence: u16, payload: &[u8]) {
        let request = echo(OURS, THEIRS, 8, sequence, payload);
        self.packets.clear();
        self.send(&request);
        let is_reply = |packet: &Vec<u8>| packet[20] == 0 && packet[26..28] == sequence.to_be_bytes();
        let mut reply = None;
        self.wait_for("an echo reply", |lab| {
            reply = lab.packets.iter().find(|packet| is_reply(packet)).cloned();
            reply.is_some()
        });
        let reply = reply.unwrap_or_default();
        assert_eq!(reply.len(), request.len(), "the padding is gone");
        assert_eq!(reply[24..], request[24..]);
    }

    fn control_socket(&self) -> PathBuf {
        Path::new("/var/run/wireguard").join(format!("{}.sock", self.interface))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(child) = &mut self.wireguard_go {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_file(self.control_socket());
        let _ = Command::new("ip").args(["netns", "delete", &self.namespace]).status();
    }
}

/// Removes namespaces that an earlier run could not.
fn sweep() {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = Command::new("ip").args(["netns", "delete", &name]).status();
        }
    }
}

/// A socket on a new port of the namespace's loopback.
pub(crate) fn socket() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has ports");
    socket.set_read_timeout(Some(Duration::from_millis(5))).expect("a timeout can be set");
    socket
}

fn random() -> [u8; 32] {
    use std::io::Read as _;
    let mut octets = [0; 32];
    fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut octets)).expect("randomness");
    octets
}

/// An ICMP echo request (8) or reply (0).
pub(crate) fn echo(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    kind: u8,
    sequence: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((28 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 1, 0, 0]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum);
    packet.extend([kind, 0, 0, 0, 0x4d, 0x75]);
    packet.extend(sequence.to_be_bytes());
    packet.extend(payload);
    let sum = checksum(&packet[20..]);
    packet[22..24].copy_from_slice(&sum);
    packet
}

/// The answer to an echo request.
fn echo_reply(request: &[u8]) -> Option<Vec<u8>> {
    if request.len() < 28 || request[0] != 0x45 || request[9] != 1 || request[20] != 8 {
        return None;
    }
    let mut reply = request.to_vec();
    reply[12..16].copy_from_slice(&request[16..20]);
    reply[16..20].copy_from_slice(&request[12..16]);
    reply[20..24].copy_from_slice(&[0; 4]);
    let sum = checksum(&reply[20..]);
    reply[22..24].copy_from_slice(&sum);
    Some(reply)
}

fn checksum(octets: &[u8]) -> [u8; 2] {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    let mut sum: u32 = octets.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
