//! Frames over TCP, for networks that block UDP: from one device's stream, through the director, to another's.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use muster_common::{
    frame::{DataHeader, HEADER, Handle, frames, push_frame},
    grpc::{self, Options},
    identity::Party,
    time::Instant,
    tls::{ALPN_H2, Credentials},
};
use muster_integration_tests::{
    Result,
    attachments::Attachment,
    device::Error,
    failed,
    figures::{Figures, median},
    population::device_uid,
    run_on,
};
use muster_proto::director::{RelayRequest, relay_service_client::RelayServiceClient};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use crate::{
    director::Network,
    peers::{PORT, RELAY, RELAY_BEHIND},
    turns::{Hosts, RELAY_CPU, WARM_UP},
};

/// Octets in each frame, behind its header.
const PAYLOAD: usize = 1_400;
/// As agents have them.
const OPTIONS: Options = Options { within: Duration::from_secs(5), window: 8 << 20 };

/// Measures `rounds` turns of so many seconds.
pub(crate) fn measure(
    hosts: &Hosts,
    network: &mut Network,
    rounds: u32,
    seconds: u32,
    figures: &mut Figures,
) -> Result {
    let (mut rates, mut per_core) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        network.start(Some(RELAY_CPU))?;
        let turn = turn(hosts, network, seconds);
        network.director.kill();
        let (rate, on_one_core) = turn?;
        eprintln!("TCP, {PAYLOAD} B: {rate:.2} Gbit/s, {on_one_core:.2} Gbit in a second of processor time");
        rates.push(rate);
        per_core.push(on_one_core);
    }
    let figure = format!("{PAYLOAD} B, over TCP");
    figures.report(&format!("{figure}, director"), median(&mut rates), "Gbit/s");
    figures.report(
        &format!("{figure}, director, in a second of processor time"),
        median(&mut per_core),
        "Gbit",
    );
    Ok(())
}

fn turn(hosts: &Hosts, network: &mut Network, seconds: u32) -> Result<(f64, f64)> {
    let credentials =
        |number| network.issuer.device(device_uid(number)).map_err(|error| failed("a certificate", error));
    let (from, to) = (credentials(0)?, credentials(1)?);
    let (sender, receiver) = (hosts.sender.runtime()?, hosts.receiver.runtime()?);
    let arrived = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&arrived);
    let handle = run_on(&receiver, receive(to, address(RELAY_BEHIND)?, counter))?;
    run_on(&sender, send(from, address(RELAY)?, handle))?;
    std::thread::sleep(WARM_UP * 4);
    let (start, before, used) = (Instant::now(), arrived.load(Ordering::Relaxed), processor_time(network)?);
    std::thread::sleep(Duration::from_secs(u64::from(seconds)));
    let octets = arrived.load(Ordering::Relaxed) - before;
    let (time, used) = (Instant::now() - start, processor_time(network)? - used);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let gigabits = octets as f64 * 8e-9;
    Ok((gigabits / time.as_secs_f64(), gigabits / used.as_secs_f64()))
}

fn address(host: &str) -> Result<SocketAddr> {
    format!("{host}:{PORT}").parse().map_err(|error| failed("an address", error))
}

fn processor_time(network: &mut Network) -> Result<Duration> {
    network.director.process().map_or(Ok(Duration::ZERO), |process| process.processor_time())
}

/// Attaches a device and opens its stream; `outgoing` is what it sends.
async fn stream(
    credentials: &Arc<Credentials>,
    director: SocketAddr,
    outgoing: mpsc::Receiver<Bytes>,
) -> std::result::Result<(Attachment, tonic::Streaming<muster_proto::director::RelayResponse>), Error> {
    let accept = |party: &Party| matches!(party, Party::Director { .. });
    let config = Arc::new(credentials.client_config(accept, ALPN_H2)?);
    let channel = grpc::connect_with(&director.to_string(), config, OPTIONS).await?;
    let mut client = RelayServiceClient::new(channel);
    let attachment = Attachment::open(&mut client).await?;
    let first = RelayRequest { session: attachment.session, frames: Bytes::new() };
    let more = ReceiverStream::new(outgoing).map(|frames| RelayRequest { session: 0, frames });
    let incoming = client.relay(tokio_stream::once(first).chain(more)).await?.into_inner();
    Ok((attachment, incoming))
}

/// Counts the octets that arrive behind headers, for as long as its runtime lives; returns who it is.
async fn receive(
    credentials: Arc<Credentials>,
    director: SocketAddr,
    arrived: Arc<AtomicU64>,
) -> std::result::Result<Handle, Error> {
    let (sender, outgoing) = mpsc::channel(1);
    let (attachment, mut incoming) = stream(&credentials, director, outgoing).await?;
    let handle = attachment.handle;
    tokio::spawn(async move {
        let _held = (attachment, sender);
        while let Ok(Some(response)) = incoming.message().await {
            let octets =
                frames(&response.frames).map(|frame| frame.len().saturating_sub(HEADER)).sum::<usize>();
            arrived.fetch_add(u64::try_from(octets).unwrap_or(0), Ordering::Relaxed);
        }
    });
    Ok(handle)
}

/// Sends to `to` as fast as the stream takes it, for as long as its runtime lives.
async fn send(
    credentials: Arc<Credentials>,
    director: SocketAddr,
    to: Handle,
) -> std::result::Result<(), Error> {
    let (sender, outgoing) = mpsc::channel(4);
    let (attachment, incoming) = stream(&credentials, director, outgoing).await?;
    let header = DataHeader { session: attachment.session, handle: to }.octets();
    let frame = [header.as_slice(), &[0x5a; PAYLOAD]].concat();
    let mut batch = Vec::new();
    while push_frame(&mut batch, &frame) {}
    let batch = Bytes::from(batch);
    tokio::spawn(async move {
        let _held = (attachment, incoming);
        while sender.send(batch.clone()).await.is_ok() {}
    });
    Ok(())
}
