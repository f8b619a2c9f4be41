//! The agent's configuration: TOML at `/etc/muster/agent.toml`, every key with a default, every key also set by
//! environment (`MUSTER_…`). `--print-config` shows all of it.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use muster_common::{
    config::{self, ConfigError},
    name::Label,
    telemetry::LogConfig,
};
use serde::{Deserialize, Serialize};

use crate::{
    control::Offer,
    cpu, host_dns,
    resolver::{CacheLimits, Completion, Prefetch, Settings, Stub, StubTransport, server_address},
};

/// Read when no file is named; it may be missing.
pub const DEFAULT_PATH: &str = "/etc/muster/agent.toml";

/// Longest name of a network interface (IFNAMSIZ less the terminating zero).
const INTERFACE_NAME_MAX: usize = 15;
/// Far more than help: each has buffers of some megabytes, and the kernel gives a TUN device no more than 256 queues.
const THREADS_MAX: usize = 64;
/// Hosts without an agent that the registrar takes of one device, and subnets.
const HOSTS_MAX: usize = 256;
const SUBNETS_MAX: usize = 64;
/// The CA certificates that Debian's and Ubuntu's programs trust (package ca-certificates).
const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";

/// All keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where identity, last known configuration, peers and names are kept.
    pub state_dir: PathBuf,
    /// For what does not outlive a reboot.
    pub runtime_dir: PathBuf,
    /// The Unix socket of the local API.
    pub socket: PathBuf,
    /// The virtual network's interface.
    pub interface: Interface,
    /// The WireGuard tunnel.
    pub tunnel: Tunnel,
    /// The host's resolver for names of the network.
    pub resolver: Resolver,
    /// Services of the network.
    pub services: Services,
    /// What this host speaks for beside itself.
    pub site: Site,
    /// Metrics and health.
    pub http: Http,
    /// Logs.
    pub log: LogConfig,
}

/// The `[interface]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Interface {
    /// Name of the TUN device, 1 to 15 characters.
    pub name: String,
    /// Largest packet in octets, 1280 to 65,535; 0 for what fits into the host's network interfaces when the agent starts:
    /// 1420 with Ethernet's usual 1500, 8920 with 9000.
    pub mtu: u32,
}

/// The `[tunnel]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tunnel {
    /// UDP port, the same for IPv4 and IPv6; 0 for any free one, which a firewall cannot be opened for.
    pub port: u16,
    /// Whether packets from and to other agents are sealed with AES-256-GCM where both CPUs are made for it.
    pub aes: bool,
    /// Threads that move packets, up to 64; 0 for half the host's processors, 8 at most.
    pub threads: usize,
    /// Whether packets pass between kernel and agent in batches of one flow, as far as the kernel can. Off where a
    /// kernel or network card spoils them; the tunnel then takes several times the processor time.
    pub offloads: bool,
    /// Whether the gateway of this host is asked for a port that leads to the tunnel (PCP, NAT-PMP, UPnP).
    pub port_mapping: bool,
}

/// The `[resolver]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resolver {
    /// Whether the agent answers DNS on this host at all.
    pub enabled: bool,
    /// Where it listens, UDP and TCP. Link-local addresses are added to the host by the agent.
    pub listen: Vec<SocketAddr>,
    /// Servers for names outside the network, as ADDRESS or ADDRESS:PORT; empty for those that the host has.
    pub upstream: Vec<String>,
    /// How programs on the host are led to it.
    pub host: host_dns::Mode,
    /// Octets that cached answers may take, at least 64 KiB.
    pub cache_octets: u64,
    /// The longest that an answer is cached, in seconds, 1 to 604,800.
    pub ttl_max: u32,
    /// The longest that it is cached that there is no such name or record, in seconds, 1 to 604,800.
    pub negative_ttl_max: u32,
    /// The shortest that either is cached, in seconds; not more than the longest.
    pub ttl_min: u32,
    /// An answer that was asked for so often, without a pause of `prefetch_pause`, is fetched anew before it expires;
    /// 0: none is.
    pub prefetch_amount: u32,
    /// In seconds, at least 1.
    pub prefetch_pause: u32,
    /// Percentage of its lifetime that is left of an answer when it is fetched anew, 1 to 90.
    pub prefetch_percentage: u8,
    /// What short names are completed with, relative to the network's domain; empty: they are not.
    pub search: Vec<String>,
    /// Names with fewer dots are completed before they are asked as they are, 0 to 2.
    pub ndots: u8,
    /// Servers for names below certain domains.
    pub stub: Vec<StubDomain>,
}

/// A `[[resolver.stub]]` section.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StubDomain {
    /// The domain; of several that match, the longest counts.
    pub domain: String,
    /// Its servers, best first, as ADDRESS or ADDRESS:PORT.
    pub servers: Vec<String>,
    /// `udp` (and TCP for what does not fit), `tcp` or `tls`.
    pub transport: StubTransport,
    /// With `tls`: the name in the servers' certificates.
    pub server_name: String,
    /// With `tls`: file with the CA certificates to trust; empty for those that the system trusts.
    pub ca: PathBuf,
}

/// The `[services]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Services {
    /// Whether this host reaches Services by their virtual IPs.
    pub virtual_ips: bool,
    /// Whether readiness probes may run commands here: whoever administers the network then runs programs on this host,
    /// as the agent's user.
    pub exec_probes: bool,
}

/// The `[site]` section: hosts without an agent, and subnets, that are reached through this host. An operator decides on
/// both; nothing is forwarded before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Site {
    /// Hosts that get names and virtual addresses of their own; at most 256.
    pub hosts: Vec<SiteHost>,
    /// Networks that are reached as they are, in CIDR notation; at most 64.
    pub subnets: Vec<String>,
    /// Whether hosts see this host's address in place of whoever calls them, and so need no route to the network.
    pub masquerade: bool,
}

/// An item of `site.hosts`.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SiteHost {
    /// Its name in the network, a DNS label.
    pub name: String,
    /// Where this host reaches it.
    pub address: String,
}

/// The `[http]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Where `/metrics`, `/healthz` and `/readyz` are served.
    pub listen: SocketAddr,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/muster/agent".into(),
            runtime_dir: "/run/muster".into(),
            socket: "/run/muster/agent.sock".into(),
            interface: Interface::default(),
            tunnel: Tunnel::default(),
            resolver: Resolver::default(),
            services: Services::default(),
            site: Site::default(),
            http: Http::default(),
            log: LogConfig::default(),
        }
    }
}

impl Default for Interface {
    fn default() -> Self {
        Self { name: "muster0".into(), mtu: 0 }
    }
}

impl Default for Tunnel {
    fn default() -> Self {
        Self { port: 7551, aes: true, threads: 0, offloads: true, port_mapping: true }
    }
}

impl Default for Resolver {
    fn default() -> Self {
        let listen = SocketAddr::from(([169, 254, 20, 10], 53));
        Self {
            enabled: true,
            listen: vec![listen],
            upstream: Vec::new(),
            host: host_dns::Mode::Auto,
            cache_octets: 16 << 20,
            ttl_max: 3600,
            negative_ttl_max: 1800,
            ttl_min: 0,
            prefetch_amount: 2,
            prefetch_pause: 60,
            prefetch_percentage: 10,
            search: Vec::new(),
            ndots: 1,
            stub: Vec::new(),
        }
    }
}

impl Default for Services {
    fn default() -> Self {
        Self { virtual_ips: true, exec_probes: false }
    }
}

impl Default for Site {
    fn default() -> Self {
        Self { hosts: Vec::new(), subnets: Vec::new(), masquerade: true }
    }
}

impl Default for Http {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 7581)) }
    }
}

impl Config {
    /// From the file at `path`, which must exist; without one from [`DEFAULT_PATH`], if that exists.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let default = Path::new(DEFAULT_PATH);
        let path = path.or_else(|| default.exists().then_some(default));
        let config: Self = config::load(path)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let name = &self.interface.name;
        let printable = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%');
        if name.is_empty() || name.len() > INTERFACE_NAME_MAX || !printable || name == "." || name == ".." {
            let reason = "write 1 to 15 letters, digits, dashes or underscores, such as muster0";
            return Err(ConfigError::value("interface.name", name, reason));
        }
        let mtu = self.interface.mtu;
        if mtu != 0 && !(1280..=65_535).contains(&mtu) {
            let reason = "write 1280 to 65535 (IPv6 needs 1280), or 0 to let the agent choose";
            return Err(ConfigError::value("interface.mtu", mtu, reason));
        }
        if self.tunnel.threads > THREADS_MAX {
            let reason = "write 1 to 64, or 0 to let the agent choose";
            return Err(ConfigError::value("tunnel.threads", self.tunnel.threads, reason));
        }
        if self.resolver.enabled && self.resolver.listen.is_empty() {
            let reason = "write an address to listen on, such as \"169.254.20.10:53\", or set resolver.enabled = false";
            return Err(ConfigError::value("resolver.listen", "[]", reason));
        }
        self.site.offer()?;
        self.resolver.settings().map(drop)
    }

    /// Whether the tunnel takes AES-256-GCM: on CPUs that are made for it, unless that is switched off.
    pub fn accepts_aes(&self) -> bool {
        self.tunnel.aes && cpu::has_aes()
    }
}

impl Site {
    /// What the registrar is asked to let this host speak for.
    pub fn offer(&self) -> Result<Offer, ConfigError> {
        let refuse = |key, value: &str, reason| Err(ConfigError::value(key, value, reason));
        if self.hosts.len() > HOSTS_MAX {
            return refuse("site.hosts", &self.hosts.len().to_string(), "name at most 256 hosts");
        }
        if self.subnets.len() > SUBNETS_MAX {
            return refuse("site.subnets", &self.subnets.len().to_string(), "name at most 64 subnets");
        }
        let mut offer = Offer::default();
        for SiteHost { name, address } in &self.hosts {
            if name.parse::<Label>().is_err() {
                let reason = "write a name of letters, digits and dashes, such as \"printer\"";
                return refuse("site.hosts.name", name, reason);
            }
            let Some(ip) = address.parse().ok().filter(is_host) else {
                let reason = "write the address at which this host reaches it, such as \"192.168.7.9\"";
                return refuse("site.hosts.address", address, reason);
            };
            if offer.hosts.iter().any(|(other, at)| other.eq_ignore_ascii_case(name) || *at == ip) {
                return refuse("site.hosts", name, "name each host once, with an address of its own");
            }
            offer.hosts.push((name.to_ascii_lowercase(), ip));
        }
        for text in &self.subnets {
            let wide = |net: &IpNet| net.prefix_len() >= if net.addr().is_ipv4() { 8 } else { 16 };
            let Some(net) = text.parse::<IpNet>().ok().filter(|net| *net == net.trunc() && wide(net)) else {
                let reason = "write networks, such as \"192.168.7.0/24\", of /8 or smaller (IPv6: /16)";
                return refuse("site.subnets", text, reason);
            };
            offer.subnets.push(net);
        }
        Ok(offer)
    }
}

/// Whether an address can be one host on a network.
fn is_host(address: &IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local)
}

impl Resolver {
    /// What the resolver is started with.
    pub fn settings(&self) -> Result<Settings, ConfigError> {
        self.check()?;
        let defaults = Settings::default();
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Ok(Settings {
            listen: self.listen.clone(),
            upstream: servers("resolver.upstream", &self.upstream, StubTransport::Udp)?,
            cache: CacheLimits {
                octets: usize::try_from(self.cache_octets).unwrap_or(usize::MAX),
                positive_ttl: seconds(self.ttl_max),
                negative_ttl: seconds(self.negative_ttl_max),
                least_ttl: seconds(self.ttl_min),
                prefetch: Prefetch {
                    amount: self.prefetch_amount,
                    pause: seconds(self.prefetch_pause),
                    percentage: self.prefetch_percentage,
                },
                ..defaults.cache
            },
            stubs: self.stub.iter().map(StubDomain::settings).collect::<Result<_, _>>()?,
            completion: Completion { search: self.search.clone(), ndots: self.ndots },
            ..defaults
        })
    }

    fn check(&self) -> Result<(), ConfigError> {
        const WEEK: u32 = 604_800;
        let refuse =
            |key, value: &dyn ToString, reason| Err(ConfigError::value(key, value.to_string(), reason));
        if self.cache_octets < 64 << 10 {
            return refuse("resolver.cache_octets", &self.cache_octets, "write 65536 or more");
        }
        let longest =
            [("resolver.ttl_max", self.ttl_max), ("resolver.negative_ttl_max", self.negative_ttl_max)];
        for (key, ttl) in longest {
            if !(1..=WEEK).contains(&ttl) {
                return refuse(key, &ttl, "write 1 to 604800 seconds");
            }
        }
        if self.ttl_min > self.ttl_max.min(self.negative_ttl_max) {
            let reason = "write no more than resolver.ttl_max and resolver.negative_ttl_max are";
            return refuse("resolver.ttl_min", &self.ttl_min, reason);
        }
        if self.prefetch_pause == 0 {
            return refuse(
                "resolver.prefetch_pause",
                &0,
                "write 1 second or more; amount = 0 switches it off",
            );
        }
        if !(1..=90).contains(&self.prefetch_percentage) {
            return refuse("resolver.prefetch_percentage", &self.prefetch_percentage, "write 1 to 90");
        }
        if self.ndots > 2 {
            return refuse("resolver.ndots", &self.ndots, "write 0 to 2: longer names are never completed");
        }
        for suffix in &self.search {
            if !suffix.is_empty() && !is_name(suffix) {
                let reason =
                    "write what stands before the network's domain, such as \"default.svc\", or \"\"";
                return refuse("resolver.search", suffix, reason);
            }
        }
        Ok(())
    }
}

impl StubDomain {
    fn settings(&self) -> Result<Stub, ConfigError> {
        let refuse = |key, value: &str, reason| Err(ConfigError::value(key, value, reason));
        if !is_name(&self.domain) {
            let reason = "write a domain, such as \"corp.example\"";
            return refuse("resolver.stub.domain", &self.domain, reason);
        }
        if self.servers.is_empty() {
            let reason = "write at least one address, such as [\"192.0.2.1\"]";
            return refuse("resolver.stub.servers", "[]", reason);
        }
        let tls = self.transport == StubTransport::Tls;
        if tls && !is_name(&self.server_name) {
            let reason = "transport tls needs the name in the servers' certificates, such as \"dns.example\"";
            return refuse("resolver.stub.server_name", &self.server_name, reason);
        }
        Ok(Stub {
            domain: self.domain.clone(),
            servers: servers("resolver.stub.servers", &self.servers, self.transport)?,
            transport: self.transport,
            server_name: self.server_name.clone(),
            ca: if self.ca.as_os_str().is_empty() { SYSTEM_CA.into() } else { self.ca.clone() },
        })
    }
}

/// Whether `text` is a DNS name, not the root.
fn is_name(text: &str) -> bool {
    muster_dns::wire::encode_name(text).is_some_and(|wire| wire.len() > 1)
}

fn servers(
    key: &'static str,
    list: &[String],
    transport: StubTransport,
) -> Result<Vec<SocketAddr>, ConfigError> {
    let parse = |text: &String| {
        server_address(text, transport).ok_or_else(|| {
            let reason = "write IP addresses, such as \"192.0.2.1\" or \"[2001:db8::1]:53\"";
            ConfigError::value(key, text, reason)
        })
    };
    list.iter().map(parse).collect()
}

#[cfg(test)]
mod tests;
