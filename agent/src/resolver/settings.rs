//! How the resolver is set up. `[resolver]` of the configuration becomes this.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::cache::CacheLimits;

/// Port of DNS.
pub(super) const PORT: u16 = 53;
/// Port of DNS over TLS (RFC 7858, 3.1).
const PORT_TLS: u16 = 853;

/// How the resolver is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen, UDP and TCP. The addresses need not be on the host yet.
    pub listen: Vec<SocketAddr>,
    /// Servers for names outside the network; empty for those that `resolv_conf` names.
    pub upstream: Vec<SocketAddr>,
    /// The host's resolv.conf, or the backup of it if the file itself names us. It is read again when it changes.
    pub resolv_conf: PathBuf,
    /// The resolv.conf of systemd-resolved that has its servers. It is read where `resolv_conf` names resolved itself,
    /// which may ask us.
    pub resolved_conf: PathBuf,
    /// Who may ask beside this host itself, such as containers on it.
    pub allow: Vec<IpNet>,
    /// Bounds of the cache.
    pub cache: CacheLimits,
    /// Servers for names below certain domains.
    pub stubs: Vec<Stub>,
    /// How servers that do not answer are watched.
    pub health: Health,
    /// Which names are completed.
    pub completion: Completion,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([169, 254, 20, 10], PORT))],
            upstream: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            resolved_conf: "/run/systemd/resolve/resolv.conf".into(),
            allow: Vec::new(),
            cache: CacheLimits::default(),
            stubs: Vec::new(),
            health: Health::default(),
            completion: Completion::default(),
        }
    }
}

/// How servers that do not answer are watched: as by CoreDNS' `forward`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Health {
    /// A server that has failed is asked `. NS` so often, at first; later up to ten times less often.
    pub interval: Duration,
    /// After so many failures in a row, the query included, a server is asked only if all others are down too;
    /// 0: it is never taken to be down.
    pub max_fails: u32,
}

impl Default for Health {
    fn default() -> Self {
        Self { interval: Duration::from_millis(500), max_fails: 2 }
    }
}

/// Servers for the names below a domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stub {
    /// The domain, with or without a trailing dot; of several that match, the longest counts.
    pub domain: String,
    /// Its servers, best first.
    pub servers: Vec<SocketAddr>,
    /// How they are reached.
    pub transport: StubTransport,
    /// Over TLS: the name in their certificate.
    pub server_name: String,
    /// Over TLS: file with the CA certificates to trust.
    pub ca: PathBuf,
}

/// How a server is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StubTransport {
    /// Datagrams, and TCP for what does not fit.
    #[default]
    Udp,
    /// TCP alone.
    Tcp,
    /// DNS over TLS (RFC 7858), version 1.3.
    Tls,
}

/// Completion of short names with a search list, for clients that do not do it themselves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Completion {
    /// What is tried behind a name of one or two labels, in this order, relative to the network's domain: `""` is the
    /// domain itself, what ends in a dot is absolute. Empty: nothing is completed.
    pub search: Vec<String>,
    /// Names with fewer dots are completed first and asked as they are last; others the other way round
    /// (resolv.conf(5)).
    pub ndots: u8,
}

impl Default for Completion {
    fn default() -> Self {
        Self { search: Vec::new(), ndots: 1 }
    }
}

/// A server written as ADDRESS or ADDRESS:PORT; without a port, that of the transport. `None` if it is neither.
pub fn server_address(text: &str, transport: StubTransport) -> Option<SocketAddr> {
    let port = if transport == StubTransport::Tls { PORT_TLS } else { PORT };
    let whole = text.parse::<SocketAddr>().ok();
    whole.or_else(|| text.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, port)))
}
