//! The `[dns]` table: who is answered, how much, and what the specification of DNS leaves to the operator.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use muster_common::{
    config::ConfigError,
    name::{Domain, Label},
};
use muster_dns::options::{Fallthrough, Options, PodMode};
use serde::{Deserialize, Serialize};

/// The port that other DNS servers are asked at, unless they are given with one.
const PORT: u16 = 53;
/// The most threads that answer over UDP.
const WORKERS_MAX: usize = 256;
/// The longest name, in characters.
const NAME_MAX: usize = 253;

/// How names of devices by address are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pods {
    /// They do not exist.
    #[default]
    Disabled,
    /// With the address spelled in the name, whether or not it is in use.
    Insecure,
    /// Only if a live device of the namespace has the address.
    Verified,
}

/// Answers to DNS queries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dns {
    /// CIDR blocks whose hosts may ask for everything without a certificate; all others get the apex alone.
    pub open_to: Vec<IpNet>,
    /// UDP responses a second for each source prefix (/24, /56); 0 for no limit.
    pub responses_per_second: u32,
    /// UDP responses at once, after a pause.
    pub burst: u32,
    /// Connections at a time: of TCP, of TLS with a certificate, and of TLS without one, each.
    pub connections: usize,
    /// Connections at a time of one client: of an address, and with a certificate of one device.
    pub connections_per_client: usize,
    /// Threads that answer over UDP; 0 for one on each processor core.
    pub workers: usize,
    /// Whether every query is logged.
    pub query_log: bool,
    /// How names of devices by address (`100-64-0-1.default.pod.<domain>`) are answered.
    pub pods: Pods,
    /// Whether endpoints are served at all; without them, headless Services do not exist.
    pub endpoints: bool,
    /// Whether an endpoint without a hostname is called like its device, and not by its address.
    pub endpoint_device_names: bool,
    /// Whether a Service with a ClusterIP and without endpoints does not exist.
    pub ignore_empty_services: bool,
    /// The namespaces whose Services are served; empty: all.
    pub namespaces: Vec<String>,
    /// CIDR blocks whose hosts may have the zones transferred over TCP (AXFR, IXFR).
    pub transfer_to: Vec<IpNet>,
    /// Reverse zones beside those of the networks' pools, as CIDR blocks.
    pub reverse_zones: Vec<IpNet>,
    /// Whether headless Services without external addresses are in the external zone, with their endpoints.
    pub external_headless: bool,
    /// Whether names are completed here with the search list of the asking device's namespace.
    pub complete_search: bool,
    /// What completion tries after that: the search list of the hosts.
    pub host_search: Vec<String>,
    /// Zones whose names are asked of `upstream` if they do not exist; `.` for all.
    pub fallthrough: Vec<String>,
    /// Servers, `ADDRESS` or `ADDRESS:PORT`, that are asked for what is elsewhere.
    pub upstream: Vec<String>,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            open_to: Vec::new(),
            responses_per_second: 200,
            burst: 400,
            connections: 20_000,
            connections_per_client: 100,
            workers: 0,
            query_log: false,
            pods: Pods::Disabled,
            endpoints: true,
            endpoint_device_names: false,
            ignore_empty_services: false,
            namespaces: Vec::new(),
            transfer_to: Vec::new(),
            reverse_zones: Vec::new(),
            external_headless: false,
            complete_search: false,
            host_search: Vec::new(),
            fallthrough: Vec::new(),
            upstream: Vec::new(),
        }
    }
}

impl Dns {
    /// Checks what the types alone do not.
    ///
    /// # Errors
    /// [`ConfigError::Value`], with the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (key, value) in [
            ("dns.connections", self.connections),
            ("dns.connections_per_client", self.connections_per_client),
        ] {
            if value == 0 {
                return Err(ConfigError::value(key, value, "use at least 1"));
            }
        }
        if self.workers > WORKERS_MAX {
            let reason = format!("use at most {WORKERS_MAX}, or 0 for one on each processor core");
            return Err(ConfigError::value("dns.workers", self.workers, reason));
        }
        for net in &self.reverse_zones {
            let unit = if net.addr().is_ipv4() { 8 } else { 4 };
            if *net != net.trunc() {
                let reason = format!("has bits set beyond the prefix; write {}", net.trunc());
                return Err(ConfigError::value("dns.reverse_zones", net, reason));
            }
            if net.prefix_len() == 0 || net.prefix_len() % unit != 0 {
                let reason = "reverse zones end at an octet of IPv4 or a digit of IPv6: write for example \
                              10.0.0.0/8, 192.0.2.0/24 or fd00::/8";
                return Err(ConfigError::value("dns.reverse_zones", net, reason));
            }
        }
        self.upstream_servers()?;
        let options = self.options()?;
        if options.fallthrough != Fallthrough::Never && self.upstream.is_empty() {
            let reason = "there is nobody to ask; name servers in dns.upstream";
            return Err(ConfigError::value("dns.fallthrough", self.fallthrough.join(", "), reason));
        }
        if !self.complete_search && !self.host_search.is_empty() {
            let reason = "is used with dns.complete_search = true only";
            return Err(ConfigError::value("dns.host_search", self.host_search.join(", "), reason));
        }
        Ok(())
    }

    /// The engine's options.
    ///
    /// # Errors
    /// [`ConfigError::Value`], with the key.
    pub fn options(&self) -> Result<Options, ConfigError> {
        let namespace = |text: &String| {
            text.parse::<Label>().map_err(|error| ConfigError::value("dns.namespaces", text, error))
        };
        let namespaces: BTreeSet<Label> = self.namespaces.iter().map(namespace).collect::<Result<_, _>>()?;
        let zone = |text: &String| {
            text.parse::<Domain>().map_err(|error| {
                ConfigError::value("dns.fallthrough", text, format!("{error}; or \".\" for all"))
            })
        };
        let fallthrough = if self.fallthrough.is_empty() {
            Fallthrough::Never
        } else if self.fallthrough.iter().any(|zone| zone == ".") {
            Fallthrough::Always
        } else {
            Fallthrough::Zones(self.fallthrough.iter().map(zone).collect::<Result<_, _>>()?)
        };
        let host_search = self.host_search.iter().map(|text| search(text)).collect::<Result<_, _>>()?;
        Ok(Options {
            pods: match self.pods {
                Pods::Disabled => PodMode::Disabled,
                Pods::Insecure => PodMode::Insecure,
                Pods::Verified => PodMode::Verified,
            },
            endpoint_device_names: self.endpoint_device_names,
            ignore_empty_services: self.ignore_empty_services,
            endpoints: self.endpoints,
            namespaces: (!namespaces.is_empty()).then_some(namespaces),
            transfer_to: self.transfer_to.clone(),
            fallthrough,
            complete: self.complete_search,
            host_search,
            external_headless: self.external_headless,
            reverse_zones: self.reverse_zones.clone(),
        })
    }

    /// The servers of `upstream`.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for what is no address.
    pub fn upstream_servers(&self) -> Result<Vec<SocketAddr>, ConfigError> {
        let parse = |text: &String| {
            let bare = |text: &str| text.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, PORT));
            let server = text.parse::<SocketAddr>().ok().or_else(|| bare(text));
            let usable = |server: &SocketAddr| {
                server.port() != 0 && !server.ip().is_unspecified() && !server.ip().is_multicast()
            };
            server.filter(usable).ok_or_else(|| {
                let reason =
                    "write a server's ADDRESS or ADDRESS:PORT, such as 192.0.2.53 or [2001:db8::53]:53";
                ConfigError::value("dns.upstream", text, reason)
            })
        };
        self.upstream.iter().map(parse).collect()
    }
}

/// One entry of a search list: labels, without a dot at either end.
fn search(text: &str) -> Result<String, ConfigError> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let labels = name.len() <= NAME_MAX && name.split('.').all(|label| label.parse::<Label>().is_ok());
    if labels {
        Ok(name.to_ascii_lowercase())
    } else {
        Err(ConfigError::value("dns.host_search", text, "write domains, such as corp.example"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Dns, String> {
        let dns: Dns = toml::from_str(text).map_err(|error| error.to_string())?;
        dns.check().map(|()| dns).map_err(|error| error.to_string())
    }

    #[test]
    fn the_defaults_are_those_of_the_engine() {
        let dns = read("").unwrap();
        assert_eq!(dns.options().unwrap(), Options::default());
        assert!(dns.upstream_servers().unwrap().is_empty());
    }

    #[test]
    fn every_option_reaches_the_engine() {
        let dns = read(
            "pods = \"verified\"\nendpoints = false\nendpoint_device_names = true\nignore_empty_services = true\n\
             namespaces = [\"prod\"]\ntransfer_to = [\"192.0.2.0/24\"]\nreverse_zones = [\"10.0.0.0/8\", \"fd00::/8\"]\n\
             external_headless = true\ncomplete_search = true\nhost_search = [\"Corp.example.\", \"corp\"]\n\
             fallthrough = [\"net.example\"]\nupstream = [\"192.0.2.53\", \"[2001:db8::53]:5353\"]",
        )
        .unwrap();
        let options = dns.options().unwrap();
        let expected = Options {
            pods: PodMode::Verified,
            endpoint_device_names: true,
            ignore_empty_services: true,
            endpoints: false,
            namespaces: Some(BTreeSet::from(["prod".parse().unwrap()])),
            transfer_to: vec!["192.0.2.0/24".parse().unwrap()],
            fallthrough: Fallthrough::Zones(vec!["net.example".parse().unwrap()]),
            complete: true,
            host_search: vec!["corp.example".into(), "corp".into()],
            external_headless: true,
            reverse_zones: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
        };
        assert_eq!(options, expected);
        let servers: Vec<SocketAddr> =
            vec!["192.0.2.53:53".parse().unwrap(), "[2001:db8::53]:5353".parse().unwrap()];
        assert_eq!(dns.upstream_servers().unwrap(), servers);
        let all = read("fallthrough = [\".\"]\nupstream = [\"192.0.2.53\"]").unwrap();
        assert_eq!(all.options().unwrap().fallthrough, Fallthrough::Always);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_key_and_remedy() {
        for (text, key, remedy) in [
            ("pods = \"on\"", "pods", "verified"),
            ("namespaces = [\"a.b\"]", "dns.namespaces", "letters"),
            ("fallthrough = [\"local\"]\nupstream = [\"192.0.2.53\"]", "dns.fallthrough", "for all"),
            ("fallthrough = [\".\"]", "dns.fallthrough", "dns.upstream"),
            ("host_search = [\"corp.example\"]", "dns.host_search", "dns.complete_search"),
            ("complete_search = true\nhost_search = [\"a..b\"]", "dns.host_search", "corp.example"),
            ("reverse_zones = [\"10.0.0.1/8\"]", "dns.reverse_zones", "10.0.0.0/8"),
            ("reverse_zones = [\"10.64.0.0/11\"]", "dns.reverse_zones", "octet"),
            ("reverse_zones = [\"::/0\"]", "dns.reverse_zones", "fd00::/8"),
            ("upstream = [\"resolver.example\"]", "dns.upstream", "192.0.2.53"),
            ("upstream = [\"192.0.2.53:0\"]", "dns.upstream", "ADDRESS:PORT"),
            ("upstream = [\"0.0.0.0\"]", "dns.upstream", "ADDRESS:PORT"),
            ("workers = 1000", "dns.workers", "at most 256"),
            ("connections = 0", "dns.connections", "at least 1"),
            ("transfer_to = [\"x\"]", "transfer_to", ""),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(key) && error.contains(remedy), "{text}: {error}");
        }
    }
}
