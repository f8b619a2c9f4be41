//! `muster-agent status`.

use std::time::Duration;

use muster_common::time::Timestamp;
use muster_proto::agent::{GetStatusRequest, GetStatusResponse, PeerStatus};

use super::{Output, client, ping::show, print, print_json};
use crate::config::Config;

pub(super) async fn status(config: &Config, output: Output) -> anyhow::Result<()> {
    let mut agent = client::connect(&config.socket).await?;
    let answer = agent.get_status(GetStatusRequest {}).await;
    let answer = answer.map_err(|status| client::refused(&status))?.into_inner();
    match output {
        Output::Json => print_json(&answer),
        Output::Text => print(&table(&answer, Timestamp::now())),
    }
}

fn table(status: &GetStatusResponse, now: Timestamp) -> String {
    let mut text = String::new();
    let mut row = |title: &str, value: String| {
        if !value.is_empty() {
            text.push_str(&format!("{title:<13}{value}\n"));
        }
    };
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
    row("Peers", status.peers.len().to_string());
    if !status.peers.is_empty() {
        text.push('\n');
        text.push_str(&peers(&status.peers, now));
    }
    text
}

fn peers(peers: &[PeerStatus], now: Timestamp) -> String {
    let header = ["NAME", "ADDRESSES", "PATH", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT"];
    let mut rows = vec![header.map(str::to_owned)];
    for peer in peers {
        let handshake = peer.last_handshake.as_ref().map(|at| format!("{} ago", ago(now, timestamp(at))));
        rows.push([
            peer.name.clone(),
            peer.virtual_addresses.join(","),
            peer.path.clone(),
            peer.endpoint.as_ref().map_or_else(|| "-".to_owned(), show),
            handshake.unwrap_or_else(|| "never".to_owned()),
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
mod tests {
    use muster_proto::{admin::Endpoint, agent::RegistrarStatus};

    use super::*;

    #[test]
    fn numbers_are_for_people() {
        assert_eq!([0, 1023, 1024, 1_600_000].map(octets), ["0 B", "1023 B", "1.0 KiB", "1.5 MiB"]);
        assert_eq!(octets(u64::MAX), "16777215.9 TiB");
        let at = |s| Timestamp::from_epoch(Duration::from_secs(s));
        assert_eq!(
            [0, 119, 120, 7_200, 999_999].map(|s| ago(at(s), at(0))),
            ["0s", "119s", "2m", "2h", "11d"]
        );
    }

    #[test]
    fn a_refused_device_says_so() {
        let status = GetStatusResponse {
            name: "alice".into(),
            registrar: Some(RegistrarStatus {
                address: "r:7500".into(),
                last_error: "the device has been revoked".into(),
                ..RegistrarStatus::default()
            }),
            peers: vec![PeerStatus {
                name: "bob".into(),
                path: "direct".into(),
                endpoint: Some(Endpoint { address: "192.0.2.1".into(), port: 7551 }),
                ..PeerStatus::default()
            }],
            ..GetStatusResponse::default()
        };
        let text = table(&status, Timestamp::from_epoch(Duration::from_secs(10)));
        assert!(text.contains("r:7500, not connected: the device has been revoked"), "{text}");
        assert!(text.contains("bob") && text.contains("192.0.2.1:7551") && text.contains("never"), "{text}");
        assert!(text.contains("Address      none yet"), "{text}");
    }
}
