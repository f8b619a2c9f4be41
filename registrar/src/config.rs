//! The registrar's configuration file, `/etc/muster/registrar.toml` by default.

mod dns;
mod listen;

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use muster_common::{census::Bounds, config::ConfigError, telemetry::LogConfig};
use serde::{Deserialize, Serialize};

pub use self::{
    dns::{Dns, Pods},
    listen::{DnsListen, DnsListenError},
};
use crate::store::etcd::EtcdConfig;

/// Where the configuration is, unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/muster/registrar.toml";

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Holds the CA, the registrar's certificate and, with sqlite, the store.
    pub data_dir: PathBuf,
    /// How long a shutdown may take: agents are asked to go to another registrar, spread over this time.
    pub drain: Period,
    /// Where the registrar listens.
    pub listen: Listen,
    /// What agents are told.
    pub advertise: Advertise,
    /// Where the registry is kept.
    pub store: StoreConfig,
    /// Certificates that the registrar issues.
    pub certificates: Certificates,
    /// Answers to DNS queries.
    pub dns: Dns,
    /// Bounds.
    pub limits: Limits,
    /// Logs.
    pub log: LogConfig,
}

/// Addresses that the registrar listens on, each `ADDRESS:PORT`.
///
/// [`DnsListen`] says why DNS does not listen on every address by default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// gRPC over mutual TLS.
    pub grpc: SocketAddr,
    /// DNS over UDP and TCP, or `auto`.
    pub dns: DnsListen,
    /// DNS over TLS.
    pub dot: SocketAddr,
    /// Metrics and health over HTTP, without authentication.
    pub http: SocketAddr,
}

/// Addresses that agents are given, each `HOST:PORT`, as they reach them from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Advertise {
    /// gRPC of this registrar; agents are told of all. Empty: the public addresses of the networks.
    pub registrars: Vec<String>,
    /// DNS over TLS of this registrar; empty: likewise.
    pub dns: Vec<String>,
}

/// Kinds of store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// A file, for one registrar.
    Sqlite,
    /// An etcd, for any number of registrars.
    Etcd,
}

impl fmt::Display for StoreKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sqlite => "sqlite",
            Self::Etcd => "etcd",
        })
    }
}

/// Where the registry is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// `sqlite` or `etcd`.
    pub kind: StoreKind,
    /// The file of the sqlite store; empty: `registry.db` in the data directory.
    pub path: PathBuf,
    /// How etcd is reached.
    pub etcd: Etcd,
}

/// How etcd is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Etcd {
    /// Client URLs of the members.
    pub endpoints: Vec<String>,
    /// What all keys begin with.
    pub prefix: String,
    /// PEM files for `https` endpoints: the CA of etcd, and a certificate and key to show it. Empty: none.
    pub ca_file: PathBuf,
    /// See `ca_file`.
    pub cert_file: PathBuf,
    /// See `ca_file`.
    pub key_file: PathBuf,
    /// The user to be, if etcd has authentication enabled; empty: the certificate's common name.
    pub username: String,
    /// Holds the user's password in its first line, with mode 0600.
    pub password_file: PathBuf,
}

/// Lifetimes of certificates. All but those of operators are renewed unattended at two thirds of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Certificates {
    /// Of devices.
    pub device_lifetime: Period,
    /// Of this registrar.
    pub registrar_lifetime: Period,
    /// Of operators, who get a new one with `muster-registrar credential`.
    pub operator_lifetime: Period,
}

/// Bounds of what clients can make the registrar hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// gRPC connections at a time of those who have a certificate; each agent holds one.
    pub connections: usize,
    /// gRPC connections at a time of one device.
    pub connections_per_device: usize,
    /// gRPC connections at a time without a certificate: of those who join, and handshakes under way.
    pub strangers: usize,
    /// Likewise from one source address.
    pub strangers_per_address: usize,
    /// gRPC requests at a time on one connection, streams included.
    pub requests_per_connection: u32,
    /// The largest gRPC message that is read, in octets.
    pub message_octets: usize,
    /// How long a gRPC request other than a stream may take.
    pub request_timeout: Period,
    /// Requests to join a second from each source address, in the long run.
    pub joins_per_second: u32,
    /// Requests to join at once from each source address, after a pause.
    pub joins_burst: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/muster/registrar".into(),
            drain: Period::seconds(10),
            listen: Listen::default(),
            advertise: Advertise::default(),
            store: StoreConfig::default(),
            certificates: Certificates::default(),
            dns: Dns::default(),
            limits: Limits::default(),
            log: LogConfig::default(),
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        let any = |port| SocketAddr::from(([0_u16; 8], port));
        let http = SocketAddr::from(([127, 0, 0, 1], 7580));
        Self { grpc: any(7500), dns: DnsListen::Auto, dot: any(853), http }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { kind: StoreKind::Sqlite, path: PathBuf::new(), etcd: Etcd::default() }
    }
}

impl Default for Etcd {
    fn default() -> Self {
        let EtcdConfig { endpoints, prefix, .. } = EtcdConfig::default();
        let none = PathBuf::new();
        Self {
            endpoints,
            prefix,
            ca_file: none.clone(),
            cert_file: none.clone(),
            key_file: none.clone(),
            username: String::new(),
            password_file: none,
        }
    }
}

impl Default for Certificates {
    fn default() -> Self {
        let days = |days: u64| Period::seconds(days * 24 * 60 * 60);
        Self { device_lifetime: days(30), registrar_lifetime: days(30), operator_lifetime: days(365) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 100_000,
            connections_per_device: 32,
            strangers: 16_384,
            strangers_per_address: 1024,
            requests_per_connection: 128,
            message_octets: 256 * 1024,
            request_timeout: Period::seconds(30),
            joins_per_second: 200,
            joins_burst: 2000,
        }
    }
}

impl Limits {
    /// Who may connect to the gRPC port.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            parties: self.connections,
            per_device: self.connections_per_device,
            strangers: self.strangers,
            strangers_per_source: self.strangers_per_address,
        }
    }
}

impl Etcd {
    /// Where the paths of files are, by their keys.
    pub fn files_mut(&mut self) -> [(&'static str, &mut PathBuf); 4] {
        [
            ("ca_file", &mut self.ca_file),
            ("cert_file", &mut self.cert_file),
            ("key_file", &mut self.key_file),
            ("password_file", &mut self.password_file),
        ]
    }
}

impl Config {
    /// Checks what the types alone do not.
    ///
    /// # Errors
    /// [`ConfigError::Value`], with the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (key, list) in
            [("advertise.registrars", &self.advertise.registrars), ("advertise.dns", &self.advertise.dns)]
        {
            for address in list {
                let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
                if !port.is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0)) {
                    let reason = "write HOST:PORT, such as registrar.example:7500 or [2001:db8::1]:7500";
                    return Err(ConfigError::value(key, address, reason));
                }
            }
        }
        for (key, period, least) in [
            ("certificates.device_lifetime", self.certificates.device_lifetime, 3600),
            ("certificates.registrar_lifetime", self.certificates.registrar_lifetime, 3600),
            ("certificates.operator_lifetime", self.certificates.operator_lifetime, 3600),
            ("limits.request_timeout", self.limits.request_timeout, 1),
        ] {
            if period.get() < Duration::from_secs(least) {
                return Err(ConfigError::value(key, period, format!("use at least {least}s")));
            }
        }
        for (key, value) in [
            ("limits.connections", self.limits.connections),
            ("limits.connections_per_device", self.limits.connections_per_device),
            ("limits.strangers", self.limits.strangers),
            ("limits.strangers_per_address", self.limits.strangers_per_address),
            ("limits.message_octets", self.limits.message_octets),
            ("limits.joins_per_second", self.limits.joins_per_second as usize),
            ("limits.joins_burst", self.limits.joins_burst as usize),
        ] {
            if value == 0 {
                return Err(ConfigError::value(key, value, "use at least 1"));
            }
        }
        self.dns.check()?;
        if self.store.kind == StoreKind::Etcd && self.store.etcd.endpoints.is_empty() {
            return Err(ConfigError::value("store.etcd.endpoints", "[]", "name at least one member of etcd"));
        }
        Ok(())
    }

    /// The file of the sqlite store.
    pub fn sqlite_path(&self) -> PathBuf {
        if self.store.path.as_os_str().is_empty() {
            self.data_dir.join("registry.db")
        } else {
            self.store.path.clone()
        }
    }

    /// Where the store of a kind is, for people.
    pub fn place(&self, kind: StoreKind) -> String {
        match kind {
            StoreKind::Sqlite => self.sqlite_path().display().to_string(),
            StoreKind::Etcd => {
                format!("etcd {} (prefix {})", self.store.etcd.endpoints.join(", "), self.store.etcd.prefix)
            }
        }
    }

    /// The settings of the etcd store.
    pub fn etcd(&self) -> EtcdConfig {
        let path = |path: &PathBuf| Some(path.clone()).filter(|path| !path.as_os_str().is_empty());
        let Etcd { endpoints, prefix, ca_file, cert_file, key_file, username, password_file } =
            &self.store.etcd;
        EtcdConfig {
            endpoints: endpoints.clone(),
            prefix: prefix.clone(),
            ca_file: path(ca_file),
            cert_file: path(cert_file),
            key_file: path(key_file),
            username: Some(username.clone()).filter(|name| !name.is_empty()),
            password_file: path(password_file),
        }
    }
}

/// A length of time, written with units: `30d`, `12h`, `90s`, `1h 30m`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Period(Duration);

impl Period {
    /// So many seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// The length.
    pub const fn get(self) -> Duration {
        self.0
    }
}

/// Why a text is not a length of time.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a length of time: write for example 30d, 12h, 90s or 1h 30m")]
pub struct PeriodError(String);

impl FromStr for Period {
    type Err = PeriodError;

    fn from_str(text: &str) -> Result<Self, PeriodError> {
        let parse = || {
            let span: jiff::Span = text.parse().ok()?;
            let relative = jiff::SpanRelativeTo::days_are_24_hours();
            let duration = span.to_duration(relative).ok()?;
            Duration::try_from(duration).ok()
        };
        parse().map(Self).ok_or_else(|| PeriodError(text.chars().take(80).collect()))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        if self.0.subsec_nanos() != 0 {
            return write!(f, "{}ms", self.0.as_millis());
        }
        for (unit, length) in [("d", 86_400), ("h", 3600), ("m", 60)] {
            if seconds != 0 && seconds.is_multiple_of(length) {
                return write!(f, "{}{unit}", seconds / length);
            }
        }
        write!(f, "{seconds}s")
    }
}

impl fmt::Debug for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Period {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use muster_common::config::{load_with, print};

    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registrar.toml");
        std::fs::write(&path, text).unwrap();
        let config: Config = load_with(Some(&path), |_| None)?;
        config.check().map(|()| config)
    }

    #[test]
    fn every_key_has_a_default_and_what_is_printed_loads_again() {
        assert_eq!(load("").unwrap(), Config::default());
        let printed = print(&Config::default());
        assert_eq!(load(&printed).unwrap(), Config::default());
        for part in
            ["data_dir", "grpc = \"[::]:7500\"", "device_lifetime = \"30d\"", "open_to = []", "ca_file"]
        {
            assert!(printed.contains(part), "{part}: {printed}");
        }
    }

    #[test]
    fn bad_configurations_are_refused_with_key_and_remedy() {
        for (text, says) in [
            ("data_dri = \"/x\"", "data_dri"),
            ("[listen]\ngrpc = \"here\"", "grpc"),
            ("[listen]\ndns = \"53\"", "ADDRESS:PORT"),
            ("[store]\nkind = \"mysql\"", "sqlite"),
            ("[certificates]\ndevice_lifetime = \"a month\"", "write for example 30d"),
            ("[certificates]\ndevice_lifetime = \"10s\"", "certificates.device_lifetime"),
            ("[advertise]\nregistrars = [\"host\"]", "HOST:PORT"),
            ("[advertise]\ndns = [\"host:0\"]", "HOST:PORT"),
            ("[dns]\nopen_to = [\"10.0.0.0/33\"]", "open_to"),
            ("[dns]\nupstream = [\"resolver\"]", "dns.upstream"),
            ("[limits]\nconnections = 0", "limits.connections"),
            ("[store]\nkind = \"etcd\"\n[store.etcd]\nendpoints = []", "store.etcd.endpoints"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn the_environment_reaches_every_table() {
        let config: Config = load_with(None, |name| {
            let value = match name {
                "MUSTER_LISTEN_GRPC" => "127.0.0.1:1",
                "MUSTER_STORE_ETCD_ENDPOINTS" => "http://a:1,http://b:1",
                "MUSTER_CERTIFICATES_DEVICE_LIFETIME" => "1h 30m",
                "MUSTER_LIMITS_CONNECTIONS" => "7",
                _ => return None,
            };
            Some(value.to_owned())
        })
        .unwrap();
        assert_eq!(config.listen.grpc, "127.0.0.1:1".parse().unwrap());
        assert_eq!(config.store.etcd.endpoints.len(), 2);
        assert_eq!(config.certificates.device_lifetime, Period::seconds(5400));
        assert_eq!(config.limits.connections, 7);
    }

    #[test]
    fn periods_print_as_they_are_read() {
        for text in ["30d", "12h", "90s", "5m", "0s", "1500ms"] {
            assert_eq!(text.parse::<Period>().unwrap().to_string(), text);
        }
        for text in ["", "30", "-1d", "1y", "d"] {
            assert!(text.parse::<Period>().is_err(), "{text}");
        }
    }
}
