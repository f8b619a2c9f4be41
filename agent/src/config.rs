//! The agent's configuration: TOML at `/etc/muster/agent.toml`, every key with a default, every key also set by
//! environment (`MUSTER_…`). `--print-config` shows all of it.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use muster_common::{
    config::{self, ConfigError},
    telemetry::LogConfig,
};
use serde::{Deserialize, Serialize};

use crate::host_dns;

/// Read when no file is named; it may be missing.
pub const DEFAULT_PATH: &str = "/etc/muster/agent.toml";

/// Longest name of a network interface (IFNAMSIZ less the terminating zero).
const INTERFACE_NAME_MAX: usize = 15;

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
    /// Largest packet in octets, 1280 to 65,535; 0 for 1420, which fits a WireGuard datagram into Ethernet's 1500.
    pub mtu: u32,
}

/// The `[tunnel]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tunnel {
    /// UDP port, the same for IPv4 and IPv6; 0 for any free one, which a firewall cannot be opened for.
    pub port: u16,
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
        Self { port: 7551 }
    }
}

impl Default for Resolver {
    fn default() -> Self {
        let listen = SocketAddr::from(([169, 254, 20, 10], 53));
        Self { enabled: true, listen: vec![listen], upstream: Vec::new(), host: host_dns::Mode::Auto }
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
        if self.resolver.enabled && self.resolver.listen.is_empty() {
            let reason = "write an address to listen on, such as \"169.254.20.10:53\", or set resolver.enabled = false";
            return Err(ConfigError::value("resolver.listen", "[]", reason));
        }
        self.upstream().map(drop)
    }

    /// The interface's MTU in octets.
    pub fn mtu(&self) -> u32 {
        if self.interface.mtu == 0 { 1420 } else { self.interface.mtu }
    }

    /// The configured upstream servers, port 53 where none is given.
    pub fn upstream(&self) -> Result<Vec<SocketAddr>, ConfigError> {
        let parse = |text: &String| {
            text.parse::<SocketAddr>()
                .or_else(|_| text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53)))
                .map_err(|_| {
                    let reason = "write IP addresses, such as \"192.0.2.1\" or \"[2001:db8::1]:53\"";
                    ConfigError::value("resolver.upstream", text, reason)
                })
        };
        self.resolver.upstream.iter().map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_print_and_load_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        std::fs::write(&path, config::print(&Config::default())).unwrap();
        assert_eq!(Config::load(Some(&path)).unwrap(), Config::default());
    }

    #[test]
    fn bad_values_name_key_and_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        for (text, parts) in [
            ("[interface]\nname = \"\"\n", ["interface.name", "muster0"]),
            ("[interface]\nname = \"a/b\"\n", ["interface.name", "muster0"]),
            ("[interface]\nmtu = 576\n", ["interface.mtu", "1280"]),
            ("[resolver]\nlisten = []\n", ["resolver.listen", "enabled"]),
            ("[resolver]\nupstream = [\"dns.example\"]\n", ["resolver.upstream", "IP address"]),
            ("[resolver]\nhost = \"dnsmasq\"\n", ["host", "resolv.conf"]),
            ("[tunel]\nport = 1\n", ["tunel", "agent.toml"]),
            ("[http]\nlisten = \"localhost\"\n", ["listen", "agent.toml"]),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Config::load(Some(&path)).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        assert!(Config::load(Some(Path::new("/none.toml"))).unwrap_err().to_string().contains("/none.toml"));
    }

    #[test]
    fn upstreams_have_port_53_unless_told() {
        let mut config = Config::default();
        config.resolver.upstream = vec!["192.0.2.1".into(), "[2001:db8::1]:5353".into()];
        let expected: Vec<SocketAddr> =
            vec!["192.0.2.1:53".parse().unwrap(), "[2001:db8::1]:5353".parse().unwrap()];
        assert_eq!(config.upstream().unwrap(), expected);
    }
}
