//! The director's configuration: TOML at `/etc/muster/director.toml`, every key with a default, every key also set by
//! environment (`MUSTER_…`). `--print-config` shows all of it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use muster_common::{
    census::Bounds,
    config::{self, ConfigError},
    name::Label,
    telemetry::LogConfig,
};
use serde::{Deserialize, Serialize};

/// Read when no file is named; it may be missing.
pub const DEFAULT_PATH: &str = "/etc/muster/director.toml";

/// More endpoints, or further TCP ports, are not told to anybody.
pub const ADVERTISED_MAX: usize = 4;
/// Far more than help: each has sockets, and buffers of some megabytes.
const THREADS_MAX: usize = 64;
/// As many as anybody needs.
const LISTEN_MAX: usize = 8;
/// Octets of the largest run of datagrams that the kernel hands over at once. A device may always send one.
const RUN_OCTETS: u64 = 65_536;
/// In seconds. Devices leave within one, so more is of no use.
const DRAIN_MAX: u64 = 3_600;
/// Connections of one device: attached and relaying over TCP, twice, while one takes the place of the other.
const CONNECTIONS_PER_DEVICE: usize = 8;

/// All keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the identity is kept.
    pub state_dir: PathBuf,
    /// Where the director is, in words of the operator's choice, such as `eu-west`; empty: untold.
    pub region: String,
    /// Threads that relay, up to 64; 0: one on each processor core.
    pub threads: usize,
    /// Seconds that a shutdown may take, in which devices go to another director.
    pub drain: u64,
    /// Where it listens.
    pub listen: Listen,
    /// What devices are told.
    pub advertise: Advertise,
    /// Bounds.
    pub limits: Limits,
    /// Logs.
    pub log: LogConfig,
}

/// The `[listen]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// Frames over UDP: one address of each family at most, both with one port. `[::]` alone is every address, of IPv4
    /// too. Answers leave from the very address that is named here, where the host has several.
    pub udp: Vec<SocketAddr>,
    /// Attachments, and frames of devices that UDP is blocked for: TLS over TCP. One at least has the port of `udp`.
    pub tcp: Vec<SocketAddr>,
    /// Metrics and health over HTTP, without authentication.
    pub http: SocketAddr,
}

/// The `[advertise]` section: the director as devices reach it from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Advertise {
    /// For UDP, and for TCP on the same port; best first, at most 4. Empty: the addresses listened on, or those that
    /// the host's default routes leave from.
    pub endpoints: Vec<SocketAddr>,
    /// Further TCP ports, at most 4. Empty: those listened on.
    pub tcp_ports: Vec<u16>,
}

/// The `[limits]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Devices attached at a time.
    pub devices: u32,
    /// Octets a second that one device may send in the long run; 0: any number.
    pub device_rate: u64,
    /// Octets that one device may send at once after a pause, 65,536 at least.
    pub device_burst: u64,
    /// Connections at a time with a certificate: one for each attached device, one more where UDP is blocked.
    pub connections: usize,
    /// Connections at a time of those who have shown no certificate yet.
    pub strangers: usize,
    /// Likewise, of one source: an IPv4 address or an IPv6 /64.
    pub strangers_per_source: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/muster/director".into(),
            region: String::new(),
            threads: 0,
            drain: 30,
            listen: Listen::default(),
            advertise: Advertise::default(),
            limits: Limits::default(),
            log: LogConfig::default(),
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        let everywhere = SocketAddr::from(([0u16; 8], 7501));
        Self { udp: vec![everywhere], tcp: vec![everywhere], http: SocketAddr::from(([127, 0, 0, 1], 7582)) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            devices: 100_000,
            device_rate: 125_000_000,
            device_burst: 16 << 20,
            connections: 110_000,
            strangers: 1_000,
            strangers_per_source: 200,
        }
    }
}

impl Config {
    /// From the file at `path`, which must exist; without one from [`DEFAULT_PATH`], if that exists.
    ///
    /// # Errors
    /// What is wrong with the file, the environment or a value, and what to write instead.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let default = Path::new(DEFAULT_PATH);
        let path = path.or_else(|| default.exists().then_some(default));
        let config: Self = config::load(path)?;
        config.check()?;
        Ok(config)
    }

    /// How long a shutdown may take.
    pub const fn drain(&self) -> Duration {
        Duration::from_secs(self.drain)
    }

    /// The port of UDP, and of TCP beside it.
    pub fn port(&self) -> u16 {
        self.listen.udp.first().map_or(0, SocketAddr::port)
    }

    /// The further TCP ports that devices are told.
    pub fn tcp_ports(&self) -> Vec<u16> {
        if !self.advertise.tcp_ports.is_empty() {
            return self.advertise.tcp_ports.clone();
        }
        let mut ports = Vec::new();
        for port in self.listen.tcp.iter().map(SocketAddr::port) {
            if port != self.port() && !ports.contains(&port) {
                ports.push(port);
            }
        }
        ports.truncate(ADVERTISED_MAX);
        ports
    }

    fn check(&self) -> Result<(), ConfigError> {
        if !self.region.is_empty() && self.region.parse::<Label>().is_err() {
            let reason = "write letters, digits and dashes, 63 at most, such as \"eu-west\", or \"\"";
            return Err(ConfigError::value("region", &self.region, reason));
        }
        if self.threads > THREADS_MAX {
            let reason = "write 1 to 64, or 0 for one on each processor core";
            return Err(ConfigError::value("threads", self.threads, reason));
        }
        if self.drain > DRAIN_MAX {
            return Err(ConfigError::value("drain", self.drain, "write 0 to 3600 seconds"));
        }
        self.listen.check()?;
        let has_udp_port = self.listen.tcp.iter().any(|address| address.port() == self.port());
        if !has_udp_port && self.advertise.endpoints.is_empty() {
            let reason = format!(
                "devices look for TCP on the port of UDP first: add \"[::]:{}\", or write advertise.endpoints",
                self.port()
            );
            return Err(ConfigError::value("listen.tcp", list(&self.listen.tcp), reason));
        }
        self.advertise.check()?;
        self.limits.check()
    }
}

impl Listen {
    fn check(&self) -> Result<(), ConfigError> {
        for (key, addresses) in [("listen.udp", &self.udp), ("listen.tcp", &self.tcp)] {
            if addresses.is_empty() || addresses.len() > LISTEN_MAX {
                let reason = "write 1 to 8 addresses to listen on, such as [\"[::]:7501\"]";
                return Err(ConfigError::value(key, list(addresses), reason));
            }
            if addresses.iter().any(|address| address.port() == 0) {
                let reason = "write a port, such as 7501: devices are told it";
                return Err(ConfigError::value(key, list(addresses), reason));
            }
        }
        let of_family = |v6| self.udp.iter().filter(|address| address.is_ipv6() == v6).count();
        if of_family(true) > 1 || of_family(false) > 1 {
            let reason = "write one IPv4 and one IPv6 address at most, or [\"[::]:7501\"] for all";
            return Err(ConfigError::value("listen.udp", list(&self.udp), reason));
        }
        let mut ports = self.udp.iter().map(SocketAddr::port);
        let first = ports.next();
        if ports.any(|port| Some(port) != first) {
            let reason = "write the same port for both: a director has one UDP port";
            return Err(ConfigError::value("listen.udp", list(&self.udp), reason));
        }
        Ok(())
    }
}

impl Advertise {
    fn check(&self) -> Result<(), ConfigError> {
        let unusable = |e: &SocketAddr| e.ip().is_unspecified() || e.ip().is_multicast() || e.port() == 0;
        if self.endpoints.len() > ADVERTISED_MAX || self.endpoints.iter().any(unusable) {
            let reason =
                "write at most 4 addresses that devices reach from outside, such as [\"198.51.100.10:7501\"]";
            return Err(ConfigError::value("advertise.endpoints", list(&self.endpoints), reason));
        }
        if self.tcp_ports.len() > ADVERTISED_MAX || self.tcp_ports.contains(&0) {
            let reason = "write at most 4 ports, such as [443]";
            return Err(ConfigError::value("advertise.tcp_ports", format!("{:?}", self.tcp_ports), reason));
        }
        Ok(())
    }
}

impl Limits {
    /// Bounds of the TCP listeners' connections.
    pub const fn bounds(&self) -> Bounds {
        Bounds {
            parties: self.connections,
            per_device: CONNECTIONS_PER_DEVICE,
            strangers: self.strangers,
            strangers_per_source: self.strangers_per_source,
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.device_burst < RUN_OCTETS {
            let reason = "write 65536 or more: that much may arrive at once";
            return Err(ConfigError::value("limits.device_burst", self.device_burst, reason));
        }
        let counts = [
            ("limits.devices", usize::try_from(self.devices).unwrap_or(usize::MAX)),
            ("limits.connections", self.connections),
            ("limits.strangers", self.strangers),
            ("limits.strangers_per_source", self.strangers_per_source),
        ];
        for (key, count) in counts {
            if count == 0 {
                return Err(ConfigError::value(key, count, "write 1 or more"));
            }
        }
        Ok(())
    }
}

fn list(addresses: &[SocketAddr]) -> String {
    format!("{addresses:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("director.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(Some(&path))
    }

    #[test]
    fn defaults_print_and_load_again() {
        assert_eq!(load(&config::print(&Config::default())).unwrap(), Config::default());
        assert_eq!(load("").unwrap(), Config::default());
    }

    #[test]
    fn bad_values_name_key_and_remedy() {
        for (text, parts) in [
            ("region = \"Rhine / Main\"\n", ["region", "eu-west"]),
            ("threads = 65\n", ["threads", "1 to 64"]),
            ("drain = 3601\n", ["drain", "3600"]),
            ("drain = -1\n", ["drain", "remedy"]),
            ("[listen]\nudp = []\n", ["listen.udp", "7501"]),
            ("[listen]\nudp = [\"[::]:0\"]\n", ["listen.udp", "port"]),
            ("[listen]\nudp = [\"0.0.0.0:7501\", \"[::1]:7502\"]\n", ["listen.udp", "same port"]),
            ("[listen]\nudp = [\"192.0.2.1:1\", \"192.0.2.2:1\"]\n", ["listen.udp", "one IPv4"]),
            ("[listen]\nudp = [\"relay.example:7501\"]\n", ["udp", "remedy"]),
            ("[listen]\ntcp = []\n", ["listen.tcp", "7501"]),
            ("[listen]\ntcp = [\"[::]:443\"]\n", ["listen.tcp", "[::]:7501"]),
            ("[advertise]\nendpoints = [\"0.0.0.0:7501\"]\n", ["advertise.endpoints", "from outside"]),
            ("[advertise]\nendpoints = [\"192.0.2.1:0\"]\n", ["advertise.endpoints", "from outside"]),
            ("[advertise]\ntcp_ports = [1, 2, 3, 4, 5]\n", ["advertise.tcp_ports", "at most 4"]),
            ("[limits]\ndevices = 0\n", ["limits.devices", "1 or more"]),
            ("[limits]\ndevice_burst = 1500\n", ["limits.device_burst", "65536"]),
            ("[limits]\nstrangers = 0\n", ["limits.strangers", "1 or more"]),
            ("[limit]\ndevices = 1\n", ["limit", "remedy"]),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
    }

    #[test]
    fn tcp_ports_are_those_listened_on_unless_told() {
        let listen = "[listen]\ntcp = [\"[::]:7501\", \"0.0.0.0:443\", \"[::1]:443\", \"[::]:80\"]\n";
        assert_eq!(load(listen).unwrap().tcp_ports(), [443, 80]);
        let told = format!("{listen}[advertise]\ntcp_ports = [8443]\n");
        assert_eq!(load(&told).unwrap().tcp_ports(), [8443]);
        // Behind a translator that has another port, TCP need not be on the port of UDP.
        let translated = "[listen]\ntcp = [\"[::]:443\"]\n[advertise]\nendpoints = [\"192.0.2.1:7501\"]\n";
        assert_eq!(load(translated).unwrap().tcp_ports(), [443]);
    }
}
