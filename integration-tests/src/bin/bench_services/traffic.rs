//! Connections through a virtual IP beside connections straight to the endpoint, in turn; and how evenly endpoints are used.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use muster_agent::{
    nftables::Socket,
    virtual_ips::{
        known::Known,
        ruleset::Ruleset,
        table::{Place, Table},
    },
};
use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, LabError, Result,
    figures::{Figures, median, quantile},
};
use muster_proto::registration::{VirtualEndpoint, VirtualEndpoints, VirtualPort, VirtualService};

use crate::table;

const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const VIRTUAL: Ipv4Addr = Ipv4Addr::new(100, 111, 0, 1);
const TCP: u16 = 8000;
const UDP: u16 = 8001;
const IPERF: u16 = 5201;
/// Endpoints whose use is counted, as ports of the server.
const BALANCED: u16 = 7;
/// Addresses of the client that those come from, and the first port of each. No port serves twice: to the kernel, that would
/// be more of the same connection.
const CLIENTS: [Ipv4Addr; 5] = [
    Ipv4Addr::new(192, 0, 2, 11),
    Ipv4Addr::new(192, 0, 2, 12),
    Ipv4Addr::new(192, 0, 2, 13),
    Ipv4Addr::new(192, 0, 2, 14),
    Ipv4Addr::new(192, 0, 2, 15),
];
const FIRST_PORT: u16 = 10_000;
const PORTS: u16 = 20_000;
/// After a table is written, until what the kernel does with it behind the scenes is done.
const SETTLE: Duration = Duration::from_secs(1);
/// For how long each of the two ways is taken at a time, and how often.
const TURN: Duration = Duration::from_secs(2);
const TURNS: usize = 7;
/// Connections of which the time is measured.
const TIMED: usize = 1000;
const ROUNDS: usize = 5;

pub(super) fn measure(lab: &Lab, figures: &mut Figures) -> Result {
    let (client, server) = (lab.host("client")?, lab.host("server")?);
    let switch = lab.switch("wire")?;
    let addresses = [Ipv4Addr::new(192, 0, 2, 1)].into_iter().chain(CLIENTS);
    let addresses: Vec<String> = addresses.map(|address| format!("{address}/24")).collect();
    switch.plug(&client, &addresses.iter().map(String::as_str).collect::<Vec<_>>())?;
    switch.plug(&server, &["192.0.2.2/24"])?;
    client.route("100.96.0.0/12 via 192.0.2.2")?;
    serve(&server)?;
    let mut command = server.command("iperf3");
    command.args(["-s", "-p", &IPERF.to_string()]);
    let _iperf = server.spawn("iperf3", command)?;

    let (mut few, mut many) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        load(&client, 10)?;
        few.extend(connect_times(&client)?);
        load(&client, 10_000)?;
        many.extend(connect_times(&client)?);
    }
    load(&client, 10)?;
    connections(&client, figures)?;
    on_the_cable(&client, figures)?;
    balance(&client, figures)?;
    let micro = |time: Duration| time.as_secs_f64() * 1e6;
    figures.compare(
        "traffic: first packet's way there and back with 10,000 Services, median",
        micro(quantile(&mut many, 0.5)),
        "us",
        "with 10 Services",
        micro(quantile(&mut few, 0.5)),
    );
    Ok(())
}

fn failed(what: &str) -> impl FnOnce(LabError) -> LabError + '_ {
    move |error| LabError::Command { command: what.into(), reason: error.to_string() }
}

/// Servers that say one octet to whoever connects, and that say over UDP which one they are.
fn serve(server: &Host) -> Result {
    server
        .enter(|| {
            let listener = TcpListener::bind((SERVER, TCP))?;
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let _ = (&stream).write_all(b"x");
                }
            });
            for n in 0..BALANCED {
                let socket = UdpSocket::bind((SERVER, UDP + n))?;
                std::thread::spawn(move || {
                    let mut octets = [0; 16];
                    while let Ok((_, from)) = socket.recv_from(&mut octets) {
                        let _ = socket.send_to(&[u8::try_from(n).unwrap_or(0)], from);
                    }
                });
            }
            Ok(())
        })
        .map_err(failed("starting servers"))
}

/// The virtual IP, among `others` Services.
fn load(client: &Host, others: u32) -> Result {
    let port = |name: &str, protocol: &str, port: u16| VirtualPort {
        name: name.into(),
        protocol: protocol.into(),
        port: port.into(),
    };
    let endpoint = VirtualEndpoint {
        address: SERVER.to_string(),
        is_ready: true,
        is_serving: true,
        ..VirtualEndpoint::default()
    };
    let slice = |name: &str, ports| VirtualEndpoints {
        namespace: "default".into(),
        name: name.into(),
        service: "web".into(),
        endpoints: vec![endpoint.clone()],
        ports,
    };
    let mut snapshot = table::snapshot(others);
    snapshot.services.push(VirtualService {
        namespace: "default".into(),
        name: "web".into(),
        addresses: vec![VIRTUAL.to_string()],
        ports: vec![port("tcp", "TCP", TCP), port("iperf", "TCP", IPERF), port("udp", "UDP", UDP)],
        ..VirtualService::default()
    });
    snapshot.endpoints.push(slice("web-tcp", vec![port("tcp", "TCP", TCP), port("iperf", "TCP", IPERF)]));
    for n in 0..BALANCED {
        snapshot.endpoints.push(slice(&format!("web-{n}"), vec![port("udp", "UDP", UDP + n)]));
    }
    let snapshot = table::sealed(snapshot);
    client
        .enter(|| {
            let (mut known, mut table) = (Known::default(), Table::default());
            let services = known.take(snapshot).map_err(io::Error::other)?;
            table.update(&known, &Place::default(), &services);
            let mut socket = Socket::new("muster_muster0_services").map_err(io::Error::other)?;
            let batch = Ruleset::new("muster0").load(&table, &Place::default());
            socket.commit("write", batch).map_err(io::Error::other)
        })
        .map_err(failed("writing virtual IPs"))?;
    std::thread::sleep(SETTLE);
    Ok(())
}

/// Connects, and reads what the server says; nothing of it is left on the client.
fn connect(address: Ipv4Addr) -> io::Result<()> {
    let mut stream = TcpStream::connect(SocketAddr::from((address, TCP)))?;
    let socket = socket2::SockRef::from(&stream);
    socket.set_linger(Some(Duration::ZERO))?;
    stream.read_exact(&mut [0])
}

/// Connections a second, straight and through the virtual IP in turn.
fn connections(client: &Host, figures: &mut Figures) -> Result {
    let turn = |address: Ipv4Addr| -> io::Result<f64> {
        let (began, mut count) = (Instant::now(), 0_u32);
        while Instant::now() - began < TURN {
            connect(address)?;
            count += 1;
        }
        Ok(f64::from(count) / (Instant::now() - began).as_secs_f64())
    };
    let (mut straight, mut through) = client
        .enter(|| {
            let (mut straight, mut through) = (Vec::new(), Vec::new());
            for _ in 0..TURNS {
                straight.push(turn(SERVER)?);
                through.push(turn(VIRTUAL)?);
            }
            Ok((straight, through))
        })
        .map_err(failed("connecting"))?;
    let figure = "traffic: connections a second through a virtual IP";
    figures.compare(figure, median(&mut through), "1/s", "straight", median(&mut straight));
    Ok(())
}

/// How long one connection takes, until the server's first octet.
fn connect_times(client: &Host) -> Result<Vec<Duration>> {
    client
        .enter(|| {
            let time = |_| {
                let began = Instant::now();
                connect(VIRTUAL).map(|()| Instant::now() - began)
            };
            (0..TIMED).map(time).collect()
        })
        .map_err(failed("connecting"))
}

/// Gbit/s of one TCP stream to a server of iperf3.
pub(crate) fn throughput(client: &Host, address: &str, port: u16) -> Result<f64> {
    let text = client.sh(&format!("iperf3 -c {address} -p {port} -t 3 -C cubic -J"))?;
    let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let bits = value.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64);
    bits.map(|bits| bits / 1e9).ok_or_else(|| LabError::Command { command: "iperf3".into(), reason: text })
}

/// On a bare cable, as fast as memory is.
fn on_the_cable(client: &Host, figures: &mut Figures) -> Result {
    let run = |address: Ipv4Addr| throughput(client, &address.to_string(), IPERF);
    let (mut straight, mut through) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        straight.push(run(SERVER)?);
        through.push(run(VIRTUAL)?);
    }
    let figure = "traffic: throughput of a bare cable through a virtual IP";
    figures.compare(figure, median(&mut through), "Gbit/s", "straight", median(&mut straight));
    Ok(())
}

/// How evenly new connections are spread: chi-squared of their counts.
fn balance(client: &Host, figures: &mut Figures) -> Result {
    let counts = client
        .enter(|| {
            let mut counts = [0_u32; BALANCED as usize];
            let ports = FIRST_PORT..FIRST_PORT + PORTS;
            let sources = CLIENTS.iter().flat_map(|client| ports.clone().map(|port| (*client, port)));
            for source in sources {
                let socket = UdpSocket::bind(source)?;
                socket.set_read_timeout(Some(Duration::from_secs(2)))?;
                socket.connect((VIRTUAL, UDP))?;
                socket.send(b"x")?;
                let mut octet = [0];
                socket.recv(&mut octet)?;
                if let Some(count) = counts.get_mut(usize::from(octet[0])) {
                    *count += 1;
                }
            }
            Ok(counts)
        })
        .map_err(failed("spreading connections"))?;
    let connections = CLIENTS.len() as u32 * u32::from(PORTS);
    let expected = f64::from(connections) / f64::from(BALANCED);
    let chi_squared: f64 = counts.iter().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum();
    let figure = format!(
        "traffic: chi-squared of {connections} connections to {BALANCED} endpoints (6 degrees of freedom: below 22.5 in 999 of 1,000 runs)"
    );
    figures.report(&figure, chi_squared, "");
    Ok(())
}
