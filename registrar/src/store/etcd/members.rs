//! etcd's members: the connections to them, the one that is in use, and when each was last heard of.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use muster_common::time::Instant;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::auth::Token;
use super::proto::{
    auth_client::AuthClient, kv_client::KvClient, lease_client::LeaseClient, watch_client::WatchClient,
};
use super::{EtcdConfig, bad};
use crate::store::StoreError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a connection in use is checked (etcd allows every 5 s), and how long the check may take. The watch and
/// requests without an answer notice sooner; this ends what is left of a connection.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// For how long a member that has answered is taken to be there.
const FRESH: Duration = Duration::from_secs(2);
/// etcd limits requests, not answers; so does its own client.
const MAX_MESSAGE: usize = i32::MAX as usize;

/// All members.
#[derive(Debug)]
pub(super) struct Members {
    all: Vec<Member>,
    /// The member in use.
    current: AtomicUsize,
    /// Their URLs, for messages.
    names: String,
}

#[derive(Debug)]
struct Member {
    endpoint: Endpoint,
    link: Mutex<Link>,
}

#[derive(Debug)]
struct Link {
    channel: Channel,
    /// When the member last answered.
    heard: Option<Instant>,
}

/// A member's services, called with a token.
#[derive(Clone, Debug)]
pub(super) struct Client {
    /// Which member.
    pub(super) member: usize,
    channel: Channel,
    token: Token,
}

type Authorized = InterceptedService<Channel, Token>;

impl Client {
    pub(super) fn kv(&self) -> KvClient<Authorized> {
        KvClient::with_interceptor(self.channel.clone(), self.token.clone())
            .max_decoding_message_size(MAX_MESSAGE)
    }

    pub(super) fn lease(&self) -> LeaseClient<Authorized> {
        LeaseClient::with_interceptor(self.channel.clone(), self.token.clone())
    }

    pub(super) fn watch(&self) -> WatchClient<Authorized> {
        WatchClient::with_interceptor(self.channel.clone(), self.token.clone())
            .max_decoding_message_size(MAX_MESSAGE)
    }

    pub(super) fn auth(&self) -> AuthClient<Authorized> {
        AuthClient::with_interceptor(self.channel.clone(), self.token.clone())
    }
}

impl Members {
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        if config.endpoints.is_empty() {
            return Err(bad("etcd.endpoints", "it names no endpoint"));
        }
        let tls = tls(config)?;
        let member = |url: &String| {
            let endpoint = endpoint(url, tls.as_ref())?;
            let link = Mutex::new(Link { channel: endpoint.connect_lazy(), heard: None });
            Ok(Member { endpoint, link })
        };
        let all = config.endpoints.iter().map(member).collect::<Result<Vec<_>, StoreError>>()?;
        Ok(Self { all, current: AtomicUsize::new(0), names: config.endpoints.join(", ") })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Their URLs.
    pub(super) fn names(&self) -> &str {
        &self.names
    }

    /// The first of the member in use and those after it that is none of `busy`; the one in use if all are.
    pub(super) fn next(&self, busy: &[usize]) -> usize {
        let current = self.current.load(Ordering::Relaxed);
        let mut order = (0..self.all.len()).map(|step| (current + step) % self.all.len());
        order.find(|member| !busy.contains(member)).unwrap_or(current)
    }

    pub(super) fn client(&self, member: usize, token: Token) -> Client {
        Client { member, channel: self.link(member).channel.clone(), token }
    }

    /// Notes that a member is there.
    pub(super) fn heard(&self, member: usize) {
        self.link(member).heard = Some(Instant::now());
    }

    /// Whether a member has answered a moment ago.
    pub(super) fn heard_lately(&self, member: usize) -> bool {
        self.link(member).heard.is_some_and(|heard| Instant::now() - heard < FRESH)
    }

    /// Moves on from a member, unless somebody has done so already.
    pub(super) fn leave(&self, failed: usize) {
        let next = (failed + 1) % self.all.len();
        let moved = self.current.compare_exchange(failed, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        // Its connection may be dead, which TCP would not notice for a quarter of an hour.
        if moved && !self.heard_lately(failed) {
            self.link(failed).channel = self.all[failed].endpoint.connect_lazy();
        }
    }

    fn link(&self, member: usize) -> MutexGuard<'_, Link> {
        self.all[member].link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn endpoint(url: &str, tls: Option<&ClientTlsConfig>) -> Result<Endpoint, StoreError> {
    let bad = |reason: String| bad("etcd.endpoints", format!("{url:?}: {reason}"));
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(bad("write http://HOST:PORT or https://HOST:PORT".into()));
    }
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|error| bad(error.to_string()))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        // etcd hangs up on clients that check connections which they do not use.
        .keep_alive_while_idle(false);
    if !url.starts_with("https://") {
        return Ok(endpoint);
    }
    let tls = tls.ok_or_else(|| bad("https needs etcd.ca_file".into()))?;
    endpoint.tls_config(tls.clone()).map_err(|error| bad(muster_common::grpc::chain(&error)))
}

fn tls(config: &EtcdConfig) -> Result<Option<ClientTlsConfig>, StoreError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| StoreError::Io { action: "read", path: path.into(), source })
    };
    let Some(ca) = &config.ca_file else {
        if config.cert_file.is_some() || config.key_file.is_some() {
            return Err(bad("etcd.ca_file", "a client certificate is set, but no CA to check etcd by"));
        }
        return Ok(None);
    };
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
    match (&config.cert_file, &config.key_file) {
        (Some(cert), Some(key)) => tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?)),
        (None, None) => {}
        (Some(_), None) => return Err(bad("etcd.key_file", "etcd.cert_file is set without it")),
        (None, Some(_)) => return Err(bad("etcd.cert_file", "etcd.key_file is set without it")),
    }
    Ok(Some(tls))
}
