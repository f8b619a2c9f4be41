//! Where the registrars answer DNS: their names are looked up in the hosts file and at the host's own servers,
//! never through the resolver itself.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_proto::{
    op::Query,
    rr::{Name, RecordType},
};
use hickory_resolver::Hosts;
use tokio::sync::watch;

use super::service::{Route, Service, own_request};

/// How long the addresses of all registrars hold, once known.
const REFRESH: Duration = Duration::from_secs(300);
/// First and longest pause before unknown names are tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Servers that are taken from one list.
const SERVERS_MAX: usize = 32;

/// Keeps the registrars' pool at what `servers` tells.
pub(super) async fn follow(service: Arc<Service>, mut servers: watch::Receiver<Vec<String>>) {
    let mut pause = RETRY.0;
    loop {
        let list: Vec<String> = servers.borrow_and_update().iter().take(SERVERS_MAX).cloned().collect();
        let hosts = list.iter().filter_map(|server| split(server)).map(|(host, _)| host.to_ascii_lowercase());
        let registrars: Vec<String> = hosts.filter(|host| host.parse::<IpAddr>().is_err()).collect();
        service.route.rcu(|route| Route { registrars: registrars.clone(), ..Route::clone(route) });
        let mut addresses = Vec::new();
        let mut complete = true;
        for server in &list {
            let found = look_up(&service, server).await;
            complete &= !found.is_empty();
            addresses.extend(found.into_iter().filter(|a| !addresses.contains(a)).collect::<Vec<_>>());
        }
        // Names that do not resolve for the moment are no reason to forget where their servers were.
        if complete || !addresses.is_empty() || list.is_empty() {
            if addresses != service.pools.registrars.addresses() {
                tracing::info!(?addresses, "registrars for DNS");
            }
            service.pools.registrars.set(&addresses);
        }
        pause = if complete { RETRY.0 } else { (pause * 2).min(RETRY.1) };
        tokio::select! {
            changed = servers.changed() => if changed.is_err() {
                // Nobody will tell of others: go on with what there is.
                tokio::time::sleep(if complete { REFRESH } else { pause }).await;
            },
            () = tokio::time::sleep(if complete { REFRESH } else { pause }) => {}
        }
    }
}

/// Host and port of `HOST:PORT`, brackets around an IPv6 address removed.
fn split(server: &str) -> Option<(&str, u16)> {
    let (host, port) = server.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    Some((host.trim_end_matches('.'), port.parse().ok()?))
}

async fn look_up(service: &Arc<Service>, server: &str) -> Vec<SocketAddr> {
    let Some((host, port)) = split(server) else {
        tracing::warn!(server, "not a DNS server's address: expected HOST:PORT");
        return Vec::new();
    };
    if let Ok(address) = host.parse::<IpAddr>() {
        return vec![SocketAddr::new(address, port)];
    }
    let Ok(name) = Name::from_ascii(format!("{host}.")) else { return Vec::new() };
    let hosts = Hosts::from_system().unwrap_or_default();
    let mut found = Vec::new();
    for record_type in [RecordType::A, RecordType::AAAA] {
        if let Some(lookup) = hosts.lookup_static_host(&Query::query(name.clone(), record_type)) {
            found.extend(lookup.answers().iter().filter_map(|record| record.data.ip_addr()));
        }
    }
    if found.is_empty() {
        for record_type in [RecordType::A, RecordType::AAAA] {
            match service.resolve(&own_request(name.clone(), record_type)).await {
                Ok((stored, _)) => found.extend(stored.addresses()),
                Err(error) => tracing::debug!(host, %error, "cannot look up a registrar"),
            }
        }
    }
    found.into_iter().map(|address| SocketAddr::new(address, port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_split() {
        assert_eq!(split("registrar.example:853"), Some(("registrar.example", 853)));
        assert_eq!(split("[2001:db8::1]:853"), Some(("2001:db8::1", 853)));
        assert_eq!(split("192.0.2.1:853"), Some(("192.0.2.1", 853)));
        for bad in ["registrar.example", "registrar.example:", "x:70000"] {
            assert_eq!(split(bad), None);
        }
    }
}
