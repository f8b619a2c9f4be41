//! `muster-agent status`.

use std::{collections::BTreeMap, fmt::Display, net::IpAddr, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::Args;
use muster_common::time::Timestamp;
use muster_proto::agent::{
    DatapathStatus, DirectorStatus, GetStatusRequest, GetStatusResponse, LeftOutRoute, PeerStatus,
    ProxiedHostStatus, TrafficCounter, VirtualIpStatus,
};

use super::{
    Output, client,
    ping::{milliseconds, show, to_std},
    print, print_json,
};
use crate::config::Config;

/// The agent's answer may be as long as this: there may be thousands of peers.
const ANSWER_MAX: usize = 64 << 20;

const EXAMPLES: &str = "Examples:
  muster-agent status
  muster-agent status --peer bob
  muster-agent status -o json";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Show all that is known of one peer: its device name, name under the domain, or virtual address
    #[arg(short, long, value_name = "NAME|ADDRESS")]
    peer: Option<String>,
}

pub(super) async fn status(config: &Config, arguments: Arguments, output: Output) -> anyhow::Result<()> {
    let mut agent = client::connect(&config.socket).await?.max_decoding_message_size(ANSWER_MAX);
    let answer = agent.get_status(GetStatusRequest {}).await;
    let answer = answer.map_err(|status| client::refused(&status))?.into_inner();
    let now = Timestamp::now();
    match (arguments.peer, output) {
        (None, Output::Json) => print_json(&answer),
        (None, Output::Text) => print(&table(&answer, now)),
        (Some(peer), output) => {
            let peer = find(&answer, &peer)?;
            match output {
                Output::Json => print_json(peer),
                Output::Text => print(&details(peer, now)),
            }
        }
    }
}

/// The peer that `wanted` names or is an address of.
fn find<'a>(status: &'a GetStatusResponse, wanted: &str) -> Result<&'a PeerStatus, NoSuchPeer> {
    let address: Option<IpAddr> = wanted.parse().ok();
    let name = wanted.strip_suffix('.').unwrap_or(wanted);
    let is_wanted = |peer: &&PeerStatus| match address {
        Some(address) => peer.virtual_addresses.iter().any(|a| a.parse() == Ok(address)),
        None => {
            peer.name.eq_ignore_ascii_case(name)
                || format!("{}.{}", peer.name, status.domain).eq_ignore_ascii_case(name)
        }
    };
    status.peers.iter().find(is_wanted).ok_or_else(|| NoSuchPeer(wanted.to_owned()))
}

/// The agent holds no such peer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no peer {0} is held: there is no such device, or nothing passes between it and this one at present\nremedy: see `muster-agent status` for those held; `muster-agent ping {0}` reaches out to it"
)]
struct NoSuchPeer(String);

/// Puts a titled line at the end of `text`, unless there is nothing to say.
fn row(text: &mut String, title: &str, value: &str) {
    if !value.is_empty() {
        text.push_str(&format!("{title:<13}{value}\n"));
    }
}

fn details(peer: &PeerStatus, now: Timestamp) -> String {
    let traffic = |packets: u64, bytes| format!("{packets} datagrams, {}", octets(bytes));
    let mut path = match &peer.endpoint {
        _ if !peer.director.is_empty() => format!("{} via {}", peer.path, peer.director),
        Some(endpoint) => format!("{} via {}", peer.path, show(endpoint)),
        None => peer.path.clone(),
    };
    if let Some(time) = &peer.round_trip {
        path.push_str(&format!(", round trip {}", milliseconds(to_std(time))));
    }
    if let Some(since) = peer.path_since.as_ref().map(timestamp) {
        path.push_str(&format!(", for {} ({})", ago(now, since), peer.path_reason));
    }
    let mut text = String::new();
    for (title, value) in [
        ("Peer", format!("{} (uid {})", peer.name, peer.device_uid)),
        ("Address", peer.virtual_addresses.join(", ")),
        ("Key", BASE64_STANDARD.encode(&peer.public_key)),
        ("Path", path),
        ("Handshake", handshake(peer, now)),
        ("Cipher", peer.cipher.clone()),
        ("MTU", mtu(peer.path_mtu)),
        ("Received", traffic(peer.received_packets, peer.received_bytes)),
        ("Sent", traffic(peer.sent_packets, peer.sent_bytes)),
        (
            "Waiting",
            if peer.queued_packets == 0 { String::new() } else { format!("{} packets", peer.queued_packets) },
        ),
        ("Dropped", drops(&peer.drops)),
    ] {
        row(&mut text, title, &value);
    }
    text
}

/// In octets; nothing while it is not known.
fn mtu(octets: u32) -> String {
    if octets == 0 { String::new() } else { octets.to_string() }
}

fn handshake(peer: &PeerStatus, now: Timestamp) -> String {
    let at = peer.last_handshake.as_ref().map(timestamp);
    at.map_or_else(|| "never".to_owned(), |at| format!("{} ago", ago(now, at)))
}

/// Such as `no_route 12, replayed 3`.
fn drops(drops: &BTreeMap<String, u64>) -> String {
    list(drops.iter().map(|(reason, number)| format!("{reason} {number}")))
}

fn list(items: impl Iterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.map(|item| item.to_string()).collect();
    items.join(", ")
}

/// Such as `tun_checksum, tun_tso, udp_gro (not in use: tun_uso, udp_segment)`.
fn offloads(offloads: &BTreeMap<String, bool>) -> String {
    let named =
        |wanted| list(offloads.iter().filter(move |(_, in_use)| **in_use == wanted).map(|(name, _)| name));
    match (named(true), named(false)) {
        (in_use, none) if none.is_empty() => in_use,
        (none, missing) if none.is_empty() => format!("none (not in use: {missing})"),
        (in_use, missing) => format!("{in_use} (not in use: {missing})"),
    }
}

/// One direction, from the side that it enters at to the one that it leaves at.
fn direction(
    tun: Option<&TrafficCounter>,
    udp: Option<&TrafficCounter>,
    tun_call: &str,
    verb: &str,
) -> String {
    let (Some(tun), Some(udp)) = (tun, udp) else { return String::new() };
    format!(
        "{} packets, {}, {} a {tun_call}; {verb} {} datagrams, {}, {} a call",
        tun.packets,
        octets(tun.bytes),
        per_call(tun),
        udp.packets,
        octets(udp.bytes),
        per_call(udp)
    )
}

/// Packets that one system call moves on average, with one decimal, rounded down.
fn per_call(counter: &TrafficCounter) -> String {
    let tenths = (u128::from(counter.packets) * 10).checked_div(counter.calls.into()).unwrap_or(0);
    format!("{}.{}", tenths / 10, tenths % 10)
}

fn table(status: &GetStatusResponse, now: Timestamp) -> String {
    let mut text = String::new();
    let mut row = |title: &str, value: String| row(&mut text, title, &value);
    row("Device", format!("{} (namespace {}, uid {})", status.name, status.namespace, status.device_uid));
    row("Network", format!("{} ({})", status.network, status.domain));
    let addresses = [&status.virtual_ipv4, &status.virtual_ipv6].map(String::as_str);
    let addresses: Vec<&str> = addresses.into_iter().filter(|a| !a.is_empty()).collect();
    row(
        "Address",
        match &addresses[..] {
            [] => "none yet".to_owned(),
            addresses => format!("{} on {}", addresses.join(", "), status.interface),
        },
    );
    row("MTU", mtu(status.mtu));
    row("Ready", if status.ready { "yes" } else { "no" }.to_owned());
    if let Some(registrar) = &status.registrar {
        let since = registrar.since.as_ref().map(timestamp);
        let since = since.map(|at| format!(" for {}", ago(now, at))).unwrap_or_default();
        row(
            "Registrar",
            if registrar.connected {
                format!("{}, connected{since}", registrar.address)
            } else {
                let error = &registrar.last_error;
                let error = if error.is_empty() { String::new() } else { format!(": {error}") };
                format!("{}, not connected{since}{error}", registrar.address)
            },
        );
    }
    if let Some(expiry) = status.certificate_expiry.as_ref().map(timestamp) {
        let state = if expiry < now { "expired at" } else { "valid until" };
        row("Certificate", format!("{state} {expiry}"));
    }
    let private: Vec<String> = status.private_endpoints.iter().map(show).collect();
    row("Private", private.join(", "));
    let reflexive: Vec<String> = status.reflexive_endpoints.iter().map(show).collect();
    row("Reflexive", reflexive.join(", "));
    for of in &status.directors {
        row("Director", director(of));
    }
    for host in &status.proxied_hosts {
        row("Speaks for", proxied(host));
    }
    for subnet in &status.site_subnets {
        row("Subnet", format!("{}, {}", subnet.subnet, subnet.state));
    }
    for LeftOutRoute { subnet, reason } in &status.left_out_routes {
        row("Not routed", format!("{subnet}: {reason}"));
    }
    if !status.site_error.is_empty() {
        row("Site", format!("nothing is forwarded: {}", status.site_error));
    }
    if let Some(VirtualIpStatus { frontends, endpoints, error }) = &status.virtual_ips {
        row(
            "Virtual IPs",
            match error.as_str() {
                "" => format!("{frontends}, with {endpoints} endpoints"),
                error => format!("not in place: {error}"),
            },
        );
    }
    if let Some(resolver) = &status.resolver {
        let upstream = resolver.upstream.join(", ");
        row(
            "Resolver",
            format!(
                "{} (other names: {}), {} queries, {} from cache",
                resolver.listen.join(", "),
                if upstream.is_empty() { "no server" } else { &upstream },
                resolver.queries,
                resolver.cache_hits
            ),
        );
    }
    if let Some(datapath) = &status.datapath {
        let DatapathStatus { tun_received, tun_sent, udp_received, udp_sent, .. } = datapath;
        row("Threads", datapath.threads.to_string());
        row("Offloads", offloads(&datapath.offloads));
        row("From host", direction(tun_received.as_ref(), udp_sent.as_ref(), "read", "sent"));
        row("To host", direction(tun_sent.as_ref(), udp_received.as_ref(), "write", "received"));
        row("Dropped", drops(&datapath.drops));
    }
    row("Peers", status.peers.len().to_string());
    if !status.peers.is_empty() {
        text.push('\n');
        text.push_str(&peers(&status.peers, now));
    }
    text
}

/// Such as `d1 (home), 12.00 ms over udp`.
fn director(status: &DirectorStatus) -> String {
    let DirectorStatus { name, role, transport, last_error, .. } = status;
    let time = status.round_trip.as_ref().map(|time| format!("{} ", milliseconds(to_std(time))));
    match (transport.as_str(), last_error.as_str()) {
        ("none", "") => format!("{name} ({role}), not attached"),
        ("none", error) => format!("{name} ({role}), not reached: {error}"),
        (transport, _) => format!("{name} ({role}), {}over {transport}", time.unwrap_or_default()),
    }
}

/// Such as `printer (192.168.7.9) at 100.64.3.3`.
fn proxied(host: &ProxiedHostStatus) -> String {
    let ProxiedHostStatus { name, lan_address, virtual_ipv4, virtual_ipv6, refused } = host;
    match (virtual_ipv4.as_str(), virtual_ipv6.as_str(), refused.as_str()) {
        ("", "", "") => format!("{name} ({lan_address}), not known to the registrar yet"),
        (_, _, refused) if !refused.is_empty() => format!("{name} ({lan_address}), refused: {refused}"),
        ("", address, _) | (address, _, _) => format!("{name} ({lan_address}) at {address}"),
    }
}

fn peers(peers: &[PeerStatus], now: Timestamp) -> String {
    let header = ["NAME", "ADDRESSES", "PATH", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT"];
    let mut rows = vec![header.map(str::to_owned)];
    for peer in peers {
        rows.push([
            peer.name.clone(),
            peer.virtual_addresses.join(","),
            peer.path.clone(),
            match &peer.endpoint {
                _ if !peer.director.is_empty() => peer.director.clone(),
                endpoint => endpoint.as_ref().map_or_else(|| "-".to_owned(), show),
            },
            handshake(peer, now),
            octets(peer.received_bytes),
            octets(peer.sent_bytes),
        ]);
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
            line.push_str(&format!("{cell:<width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn timestamp(at: &pbjson_types::Timestamp) -> Timestamp {
    Timestamp::from_epoch(Duration::from_secs(u64::try_from(at.seconds).unwrap_or(0)))
}

/// The time since, in its largest unit.
fn ago(now: Timestamp, at: Timestamp) -> String {
    let seconds = now.saturating_duration_since(at).as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn octets(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (0..units.len() - 1).find(|step| count >> (10 * (step + 1)) == 0).unwrap_or(units.len() - 1);
    let unit = units.get(step).unwrap_or(&"B");
    let shift = u32::try_from(step).unwrap_or(0) * 10;
    // One decimal, rounded down.
    let tenths = (u128::from(count) * 10) >> shift;
    if step == 0 { format!("{count} B") } else { format!("{}.{} {unit}", tenths / 10, tenths % 10) }
}

#[cfg(test)]
mod tests;
