//! The registrar's DNS listeners, and who is who on them.

mod handler;
mod upstream;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use muster_common::{
    identity::Party,
    net::BindError,
    telemetry::{Metrics, Readiness},
    tls::{ALPN_DOT, Credentials},
};
use muster_dns::{
    directory::Viewer,
    engine::Engine,
    server::{
        self, Source,
        limit::Rate,
        metrics::Metrics as DnsMetrics,
        stream::{self, StreamLimits},
        udp::{self, UdpLimits, UdpSockets},
    },
};
use tokio::{net::TcpListener, task::JoinSet};

use self::handler::Queries;
use super::ServeError;
use crate::{
    config::{Config, Listen},
    registry::Registry,
    zone::Zones,
};

/// Bound, not yet served.
pub(super) struct DnsSockets {
    clear: Vec<(SocketAddr, UdpSockets, TcpListener)>,
    tls: TcpListener,
}

impl DnsSockets {
    pub(super) fn bind(listen: &Listen, workers: usize) -> Result<Self, BindError> {
        let udp = |address| match workers {
            0 => server::bind_udp(address, false),
            count => UdpSockets::bind(address, false, count),
        };
        let addresses = listen.dns.addresses().into_iter();
        let clear = addresses.map(|at| Ok((at, udp(at)?, server::bind_tcp(at, false)?)));
        Ok(Self {
            clear: clear.collect::<Result<_, BindError>>()?,
            tls: server::bind_tcp(listen.dot, false)?,
        })
    }

    /// Where DNS is answered in the clear.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.clear.iter().map(|(address, ..)| *address).collect()
    }
}

/// Serves DNS from the registry.
pub(super) fn spawn(
    tasks: &mut JoinSet<&'static str>,
    sockets: DnsSockets,
    config: &Config,
    registry: &Arc<Registry>,
    credentials: &Arc<Credentials>,
    metrics: &Metrics,
) -> Result<(), ServeError> {
    let who = {
        let (open_to, trust_domain) = (config.dns.open_to.clone(), credentials.trust_domain().to_owned());
        move |source: &Source| viewer(source, &open_to, &trust_domain)
    };
    // Host names among them are not resolved: that is what these servers are for.
    let servers = config.advertise.dns.iter().filter_map(|server| server.parse::<SocketAddr>().ok());
    let servers = servers.map(|server| server.ip()).collect();
    // The registry is; and remains so while the registrar drains, which is when it is no longer ready.
    let loaded = Readiness::default();
    loaded.set(true);
    let options = config.dns.options()?;
    let zones =
        Zones::new(registry.clone(), loaded, servers).with_external_headless(options.external_headless);
    let engine = Engine::with_options(zones, options);
    let upstream = config.dns.upstream_servers()?;
    let handler = Arc::new(Queries::new(engine, who, upstream, config.dns.query_log));
    let mut dns_metrics = None;
    metrics.register(|registry| dns_metrics = Some(DnsMetrics::register(registry)));
    let Some(dns_metrics) = dns_metrics.map(Arc::new) else { return Ok(()) };

    let limits = &config.dns;
    let rate = Rate { per_second: limits.responses_per_second, burst: limits.burst.max(1) };
    let udp_limits =
        UdpLimits { rate: (limits.responses_per_second > 0).then_some(rate), ..UdpLimits::default() };
    let stream_limits = StreamLimits {
        connections: limits.connections,
        connections_per_client: limits.connections_per_client,
        ..StreamLimits::default()
    };
    let tls = credentials.resuming_server(ALPN_DOT)?;

    for (_, udp, tcp) in sockets.clear {
        let (udp_handler, tcp_handler) = (handler.clone(), handler.clone());
        let (udp_metrics, tcp_metrics) = (dns_metrics.clone(), dns_metrics.clone());
        tasks.spawn(async move {
            ended("DNS over UDP", udp::serve(udp, udp_handler, udp_limits, &udp_metrics).await)
        });
        tasks.spawn(async move {
            ended("DNS over TCP", stream::serve_tcp(tcp, tcp_handler, stream_limits, &tcp_metrics).await)
        });
    }
    tasks.spawn(async move {
        let served = stream::serve_tls(sockets.tls, tls, handler, stream_limits, &dns_metrics).await;
        ended("DNS over TLS", served)
    });
    Ok(())
}

fn ended(what: &'static str, result: std::io::Result<()>) -> &'static str {
    if let Err(error) = result {
        tracing::error!(%error, "{what} ended");
    }
    what
}

/// Who asks: a certificate tells more than an address.
fn viewer(source: &Source, open_to: &[IpNet], trust_domain: &str) -> Viewer {
    let identity = source.identity.as_ref().filter(|identity| identity.trust_domain == trust_domain);
    match identity.map(|identity| &identity.party) {
        Some(Party::Device { network, uid }) => {
            return Viewer::Member { network: network.clone(), uid: uid.clone() };
        }
        Some(Party::Operator { .. }) => return Viewer::Open,
        Some(Party::Director { .. } | Party::Registrar { .. }) | None => {}
    }
    let address: IpAddr = source.address.ip();
    if open_to.iter().any(|net| net.contains(&address)) { Viewer::Open } else { Viewer::Stranger }
}

#[cfg(test)]
mod tests {
    use muster_dns::message::Transport;

    use super::*;

    #[test]
    fn certificates_and_open_ranges_decide_who_asks() {
        let open: Vec<IpNet> = vec!["192.0.2.0/24".parse().unwrap(), "fd00::/8".parse().unwrap()];
        let who = |address: &str, identity: Option<&str>| {
            let identity = identity.map(|id| Arc::new(id.parse().unwrap()));
            let address = format!("{address}:5").parse().unwrap();
            viewer(&Source { address, transport: Transport::Udp, identity }, &open, "muster.test")
        };
        assert_eq!(who("198.51.100.1", None), Viewer::Stranger);
        assert_eq!(who("192.0.2.1", None), Viewer::Open);
        assert_eq!(who("[fd00::1]", None), Viewer::Open);
        let device = "spiffe://muster.test/network/n/device/d";
        let member = Viewer::Member { network: "n".parse().unwrap(), uid: "d".parse().unwrap() };
        assert_eq!(who("198.51.100.1", Some(device)), member);
        assert_eq!(who("198.51.100.1", Some("spiffe://other.test/network/n/device/d")), Viewer::Stranger);
        assert_eq!(who("198.51.100.1", Some("spiffe://muster.test/operator/admin")), Viewer::Open);
        assert_eq!(who("198.51.100.1", Some("spiffe://muster.test/registrar/r")), Viewer::Stranger);
    }
}
