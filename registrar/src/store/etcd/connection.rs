//! Connections to etcd's members, one of which is used until it fails, and what the failures mean.

use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Response, Status};

use super::EtcdConfig;
use super::proto::{kv_client::KvClient, lease_client::LeaseClient, watch_client::WatchClient};
use crate::store::{Revision, StoreError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longer than the 7 s after which etcd itself gives up on a request, so that its answer is heard.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a connection in use is checked (etcd allows every 5 s), and how long the check may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// etcd limits requests, not answers; so does its own client.
const MAX_MESSAGE: usize = i32::MAX as usize;

/// What is asked of etcd, which decides what a failure means.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Changes nothing, or can be repeated; about this revision, if any.
    Read(Option<Revision>),
    /// Must not be repeated unless it is certain that it was not done.
    Write,
}

/// A member's services.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) kv: KvClient<Channel>,
    pub(super) lease: LeaseClient<Channel>,
    pub(super) watch: WatchClient<Channel>,
}

/// All members.
#[derive(Debug)]
pub(super) struct Connection {
    clients: Vec<Client>,
    /// The member in use.
    current: AtomicUsize,
}

impl Connection {
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        if config.endpoints.is_empty() {
            return Err(bad("etcd.endpoints", "it names no endpoint"));
        }
        let tls = tls(config)?;
        let clients =
            config.endpoints.iter().map(|url| client(url, tls.as_ref())).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { clients, current: AtomicUsize::new(0) })
    }

    /// The member in use, and its number.
    pub(super) fn current(&self) -> (Client, usize) {
        let at = self.current.load(Ordering::Relaxed) % self.clients.len();
        (self.clients[at].clone(), at)
    }

    /// Moves on from the member with this number, unless somebody has done so already.
    pub(super) fn leave(&self, failed: usize) {
        let next = (failed + 1) % self.clients.len();
        // If it fails, another caller has moved on.
        let _ = self.current.compare_exchange(failed, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Asks the member in use, and the others if it certainly did not do what it was asked.
    pub(super) async fn call<T>(
        &self,
        kind: Kind,
        ask: impl Fn(Client) -> BoxFuture<'static, Result<Response<T>, Status>>,
    ) -> Result<T, StoreError> {
        let mut tried = 1;
        loop {
            let (client, at) = self.current();
            let error = match tokio::time::timeout(REQUEST_TIMEOUT, ask(client)).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => failure(kind, &status),
                Err(_) => unanswered(kind, format!("no answer within {} s", REQUEST_TIMEOUT.as_secs())),
            };
            if matches!(error, StoreError::Unavailable(_) | StoreError::Unknown(_)) {
                self.leave(at);
            }
            if !error.is_retryable() || tried >= self.clients.len() {
                return Err(error);
            }
            tried += 1;
        }
    }
}

fn bad(setting: &'static str, reason: impl ToString) -> StoreError {
    StoreError::Config { setting, reason: reason.to_string() }
}

fn client(url: &str, tls: Option<&ClientTlsConfig>) -> Result<Client, StoreError> {
    let bad = |reason: String| bad("etcd.endpoints", format!("{url:?}: {reason}"));
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(bad("write http://HOST:PORT or https://HOST:PORT".into()));
    }
    let mut endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|error| bad(error.to_string()))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        // etcd hangs up on clients that check connections which they do not use.
        .keep_alive_while_idle(false);
    if url.starts_with("https://") {
        let tls = tls.ok_or_else(|| bad("https needs etcd.ca_file".into()))?;
        endpoint =
            endpoint.tls_config(tls.clone()).map_err(|error| bad(muster_common::grpc::chain(&error)))?;
    }
    let channel = endpoint.connect_lazy();
    Ok(Client {
        kv: KvClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
        lease: LeaseClient::new(channel.clone()),
        watch: WatchClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
    })
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

/// What a failed call means: above all, whether the request may have been carried out nevertheless.
fn failure(kind: Kind, status: &Status) -> StoreError {
    let message = status.message();
    let told = || muster_common::grpc::chain(status);
    match status.code() {
        Code::OutOfRange if message.contains("compacted") => {
            let Kind::Read(at) = kind else { return StoreError::Invalid(message.into()) };
            // etcd does not say what is kept.
            StoreError::Compacted { oldest: at.unwrap_or(0) + 1 }
        }
        Code::ResourceExhausted if message.contains("space exceeded") => {
            StoreError::Full { place: "etcd".into(), reason: message.into() }
        }
        Code::ResourceExhausted if message.contains("too many requests") => {
            StoreError::Unavailable(message.into())
        }
        Code::OutOfRange | Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => {
            StoreError::Invalid(format!("etcd refused it: {message}"))
        }
        Code::PermissionDenied | Code::Unauthenticated => {
            bad("etcd.cert_file", format!("etcd refused access: {message}"))
        }
        Code::Unavailable if never_sent(status) || message.contains("no leader") => {
            StoreError::Unavailable(told())
        }
        _ => unanswered(kind, told()),
    }
}

/// What it means that there is no answer.
fn unanswered(kind: Kind, reason: String) -> StoreError {
    match kind {
        Kind::Read(_) => StoreError::Unavailable(format!("etcd: {reason}")),
        Kind::Write => StoreError::Unknown(format!("etcd: {reason}")),
    }
}

/// Whether there was no connection to send the request on.
fn never_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}
