//! Where DNS listens. Not on every address by default: the agent on the same host has port 53 of addresses of its
//! own, and whoever binds `[::]` shuts it out.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

const AUTO: &str = "auto";
const PORT: u16 = 53;
/// What the routes to these addresses, kept for documentation (RFC 5737, RFC 3849), leave from is the host's address.
/// Nothing is sent.
const OUTSIDE: [(&str, &str); 2] = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];

/// Where DNS listens over UDP and TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DnsListen {
    /// On port 53 of the addresses that the host's default routes leave from, one per family; without such a route,
    /// of 127.0.0.1.
    #[default]
    Auto,
    /// On this address.
    At(SocketAddr),
}

/// Why a text does not say where to listen.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no address to listen on: write ADDRESS:PORT, such as 198.51.100.10:53, or {AUTO:?}")]
pub struct DnsListenError(String);

impl DnsListen {
    /// The addresses, at least one. With `Auto`, those that the host has now.
    pub fn addresses(self) -> Vec<SocketAddr> {
        let own = |bind: &str, outside: &str| -> Option<IpAddr> {
            let socket = UdpSocket::bind(bind).ok()?;
            socket.connect(outside).ok()?;
            let address = socket.local_addr().ok()?.ip();
            (!address.is_unspecified()).then_some(address)
        };
        match self {
            Self::At(address) => vec![address],
            Self::Auto => {
                let mut found: Vec<SocketAddr> = OUTSIDE
                    .iter()
                    .filter_map(|(bind, outside)| own(bind, outside))
                    .map(|address| SocketAddr::new(address, PORT))
                    .collect();
                if found.is_empty() {
                    found.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT));
                }
                found
            }
        }
    }
}

impl FromStr for DnsListen {
    type Err = DnsListenError;

    fn from_str(text: &str) -> Result<Self, DnsListenError> {
        match text {
            AUTO => Ok(Self::Auto),
            _ => text.parse().map(Self::At).map_err(|_| DnsListenError(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for DnsListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str(AUTO),
            Self::At(address) => address.fmt(f),
        }
    }
}

impl Serialize for DnsListen {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DnsListen {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_or_those_of_the_host() {
        let at = |text: &str| text.parse::<DnsListen>().map(DnsListen::addresses);
        assert_eq!(at("[::]:53").unwrap(), ["[::]:53".parse().unwrap()]);
        for text in ["", "198.51.100.10", "host:53", "Auto"] {
            let error = at(text).unwrap_err().to_string();
            assert!(error.contains("ADDRESS:PORT") && error.contains("auto"), "{error}");
        }
        let own = at("auto").unwrap();
        assert!(!own.is_empty());
        for address in own {
            assert!(!address.ip().is_unspecified() && address.port() == 53, "{address}");
        }
        for text in ["auto", "127.0.0.1:5353", "[::]:53"] {
            assert_eq!(text.parse::<DnsListen>().unwrap().to_string(), text);
        }
    }
}
