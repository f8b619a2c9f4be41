//! The registrar's DNS listeners: what is bound, and what answers on it.

mod handler;
mod published;
mod upstream;
mod who;

use std::{net::SocketAddr, sync::Arc};

use muster_common::{
    net::BindError,
    telemetry::{Metrics, Readiness},
    tls::{ALPN_DOT, Credentials},
};
use muster_dns::{
    engine::Engine,
    server::{
        self,
        limit::Rate,
        metrics::Metrics as DnsMetrics,
        stream::{self, StreamLimits},
        udp::{self, UdpLimits, UdpSockets},
    },
};
use tokio::{net::TcpListener, task::JoinSet};

use self::{handler::Queries, published::Published, who::Who};
use super::ServeError;
use crate::{
    config::{Config, Listen},
    registry::registrar::name_server,
    session::Hub,
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
    hub: &Hub,
    credentials: &Arc<Credentials>,
    metrics: &Metrics,
) -> Result<(), ServeError> {
    let who = Who::new(config.dns.open_to.clone(), credentials.trust_domain());
    let (registry, own) = (hub.registry(), hub.own());
    let servers = own.dns_servers.iter().filter_map(|server| name_server(server)).collect();
    // The registry is; and remains so while the registrar drains, which is when it is no longer ready.
    let loaded = Readiness::default();
    loaded.set(true);
    let options = config.dns.options()?;
    let zones =
        Zones::new(registry.clone(), loaded, servers).with_external_headless(options.external_headless);
    let engine = Arc::new(Engine::with_options(zones, options));
    let published = Published::start(registry, engine.clone(), metrics).map_err(ServeError::Thread)?;
    let upstream = config.dns.upstream_servers()?;
    let handler = Arc::new(Queries::new(registry, engine, published, who, upstream, config.dns.query_log));
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
