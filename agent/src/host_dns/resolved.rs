//! systemd-resolved, over D-Bus: it is told that our resolver, on our interface, is for names of the network alone.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use tokio::time::timeout;
use zbus::{Connection, MatchRule, MessageStream, connection, message::Type};

/// The service on the bus.
pub const SERVICE: &str = "org.freedesktop.resolve1";
const PATH: &str = "/org/freedesktop/resolve1";
const MANAGER: &str = "org.freedesktop.resolve1.Manager";
const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";
/// How long the bus or resolved may take for one call.
const PATIENCE: Duration = Duration::from_secs(5);
/// The numbers of address families in D-Bus calls.
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
/// Domains that resolved takes for one interface.
const DOMAINS_MAX: usize = 256;

/// Why resolved does not know of us.
#[derive(Debug, thiserror::Error)]
pub enum ResolvedError {
    /// The bus does not answer.
    #[error("cannot connect to the system bus: {0}")]
    Bus(zbus::Error),
    /// A call failed.
    #[error("systemd-resolved refused {call}: {source}")]
    Call {
        /// Name of the method.
        call: &'static str,
        /// What it said.
        source: zbus::Error,
    },
    /// No answer.
    #[error("the system bus or systemd-resolved did not answer within {} s", PATIENCE.as_secs())]
    Timeout,
}

/// What resolved is told about an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Index of the interface.
    pub index: i32,
    /// Our resolver.
    pub server: SocketAddr,
    /// Domains whose names are asked of it; those with `false` also complete short names.
    pub domains: Vec<(String, bool)>,
}

/// A connection to the bus.
pub struct Resolved(Connection);

impl Resolved {
    /// Connects to the bus at `address`, or to the system's if that is empty.
    pub async fn connect(address: &str) -> Result<Self, ResolvedError> {
        let builder = if address.is_empty() {
            connection::Builder::system()
        } else {
            connection::Builder::address(address)
        };
        let built =
            within(async { builder.method_timeout(PATIENCE).build().await.map_err(ResolvedError::Bus) });
        built.await.map(Self)
    }

    /// Whether resolved is on the bus.
    pub async fn is_running(&self) -> Result<bool, ResolvedError> {
        within(async {
            let reply = self.0.call_method(Some(BUS), BUS_PATH, Some(BUS), "NameHasOwner", &SERVICE).await;
            reply.and_then(|reply| reply.body().deserialize()).map_err(ResolvedError::Bus)
        })
        .await
    }

    /// Yields a message whenever resolved has started or stopped, and ends with the connection.
    pub async fn changes(&self) -> Result<MessageStream, ResolvedError> {
        within(async {
            let rule = MatchRule::builder()
                .msg_type(Type::Signal)
                .sender(BUS)
                .interface(BUS)
                .member("NameOwnerChanged")
                .add_arg(SERVICE)
                .build()
                .map_err(ResolvedError::Bus)?;
            MessageStream::for_match_rule(rule, &self.0, None).await.map_err(ResolvedError::Bus)
        })
        .await
    }

    /// Tells resolved what to ask of us.
    pub async fn apply(&self, link: &Link) -> Result<(), ResolvedError> {
        let (index, server) = (link.index, link.server);
        let (family, octets) = match server.ip() {
            IpAddr::V4(v4) => (AF_INET, v4.octets().to_vec()),
            IpAddr::V6(v6) => (AF_INET6, v6.octets().to_vec()),
        };
        if server.port() == 53 {
            // Every version has this one.
            self.call("SetLinkDNS", &(index, vec![(family, octets)])).await?;
        } else {
            self.call("SetLinkDNSEx", &(index, vec![(family, octets, server.port(), "")])).await?;
        }
        // Nothing but these domains: our interface is the way to nowhere else.
        self.optional("SetLinkDefaultRoute", &(index, false)).await;
        // The answers come from this host, and their zone is not signed.
        self.optional("SetLinkDNSOverTLS", &(index, "no")).await;
        self.optional("SetLinkDNSSEC", &(index, "no")).await;
        self.call("SetLinkDomains", &(index, link.domains.clone())).await
    }

    /// Makes resolved forget what it was told about the interface.
    pub async fn revert(&self, index: i32) -> Result<(), ResolvedError> {
        self.call("RevertLink", &index).await
    }

    async fn call<B>(&self, call: &'static str, body: &B) -> Result<(), ResolvedError>
    where
        B: serde::Serialize + zbus::DynamicType + Sync,
    {
        within(async {
            let reply = self.0.call_method(Some(SERVICE), PATH, Some(MANAGER), call, body).await;
            reply.map(drop).map_err(|source| ResolvedError::Call { call, source })
        })
        .await
    }

    /// What an old version does not know it does not do either.
    async fn optional<B>(&self, call: &'static str, body: &B)
    where
        B: serde::Serialize + zbus::DynamicType + Sync,
    {
        if let Err(error) = self.call(call, body).await {
            tracing::debug!(%error, "going on without");
        }
    }
}

async fn within<T>(future: impl Future<Output = Result<T, ResolvedError>>) -> Result<T, ResolvedError> {
    timeout(PATIENCE, future).await.unwrap_or(Err(ResolvedError::Timeout))
}

/// The domains to route to us: the network's, and the reverse zones of its pools; `search` also completes names.
pub fn domains(domain: &str, routes: &[IpNet], search: &[String]) -> Vec<(String, bool)> {
    let mut domains: Vec<(String, bool)> = search.iter().map(|name| (name.clone(), false)).collect();
    let mut add = |name: String| {
        if !domains.iter().any(|(known, _)| *known == name) {
            domains.push((name, true));
        }
    };
    add(domain.trim_end_matches('.').to_owned());
    routes.iter().flat_map(|pool| reverse_zones(*pool)).for_each(add);
    domains.truncate(DOMAINS_MAX);
    domains
}

/// Reverse zones, cut at octets or nibbles, that together are `pool`.
fn reverse_zones(pool: IpNet) -> Vec<String> {
    match pool {
        IpNet::V4(v4) => {
            let cut = v4.prefix_len().div_ceil(8);
            let zone = |octets: [u8; 4]| {
                let labels = octets.iter().take(cut.into()).rev();
                labels.map(|octet| format!("{octet}.")).collect::<String>() + "in-addr.arpa"
            };
            v4.subnets(cut * 8).into_iter().flatten().map(|net| zone(net.network().octets())).collect()
        }
        IpNet::V6(v6) => {
            let cut = v6.prefix_len().div_ceil(4);
            let zone = |octets: [u8; 16]| {
                let nibbles: Vec<u8> = octets.iter().flat_map(|octet| [octet >> 4, octet & 15]).collect();
                let labels = nibbles.iter().take(cut.into()).rev();
                labels.map(|nibble| format!("{nibble:x}.")).collect::<String>() + "ip6.arpa"
            };
            v6.subnets(cut * 4).into_iter().flatten().map(|net| zone(net.network().octets())).collect()
        }
    }
}

#[cfg(test)]
#[path = "resolved_tests.rs"]
mod tests;
