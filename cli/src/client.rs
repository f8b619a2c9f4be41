//! The connection to the registrar: calls with a time limit, pages put together, failures in plain words.

use std::{future::Future, sync::Arc, time::Duration};

use muster_common::grpc::{self, ChannelError};
use muster_proto::admin::ListOptions;
use pbjson_types::FieldMask;
use tonic::{Code, Status, transport};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    channel::Channel,
    error::Result,
    resource::{Events, Key, Names, Resource, Scope, Secret},
};

/// What kind of failure it was, as far as commands act upon it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no such object.
    NotFound,
    /// There is one already.
    AlreadyExists,
    /// The object has changed since it was read.
    Conflict,
    /// The registrar is away; trying again may help.
    Unavailable,
    /// The revision to watch from is no longer kept.
    Expired,
    /// What it builds upon is not as it must be.
    Precondition,
    /// Anything else.
    Other,
}

/// The registrar refused a call, or did not answer.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// What kind of failure.
    pub failure: Failure,
    message: String,
}

impl CallError {
    fn new(failure: Failure, message: String) -> Self {
        Self { failure, message }
    }

    /// There is no such object.
    pub fn not_found(names: &Names, name: &str, place: &str) -> Self {
        Self::new(Failure::NotFound, format!("{} {name:?} not found{place}", names.plural))
    }
}

/// A connection to the registrar, and the network that calls are about.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    registrar: String,
    network: String,
    timeout: Duration,
}

impl Client {
    /// Connects to the first of `registrars` (`HOST:PORT`, with commas between) that answers.
    pub async fn connect(
        config: rustls::ClientConfig,
        registrars: &str,
        network: String,
        timeout: Duration,
    ) -> Result<Self> {
        let (config, mut failed) = (Arc::new(config), None);
        for registrar in registrars.split(',').map(str::trim) {
            let connecting = grpc::connect(registrar, Arc::clone(&config));
            let connected = tokio::time::timeout(timeout, connecting).await.unwrap_or_else(|_| {
                Err(ChannelError::Connect {
                    address: registrar.to_owned(),
                    reason: format!("no answer within {} s", timeout.as_secs_f32()),
                })
            });
            match connected {
                Ok(channel) => return Ok(Self::new(channel, registrar.to_owned(), network, timeout)),
                // The first one is the one that is meant.
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        Err(failed.unwrap_or_else(|| ChannelError::Address(registrars.to_owned())).into())
    }

    /// For how many seconds the registrar's store had not answered, if the registrar has said so.
    pub fn stale_for(&self) -> Option<u64> {
        self.channel.stale_for()
    }

    /// A client of `registrar`, which `channel` leads to.
    pub fn new(channel: transport::Channel, registrar: String, network: String, timeout: Duration) -> Self {
        Self { channel: Channel::new(channel), registrar, network, timeout }
    }

    /// Name of the network that calls are about.
    pub fn network(&self) -> &str {
        &self.network
    }

    /// Address of the registrar.
    pub fn registrar(&self) -> &str {
        &self.registrar
    }

    /// One object.
    pub async fn get<R: Resource>(&self, key: &Key) -> Result<R, CallError> {
        let call = R::get(self.channel.clone(), key);
        let object = self.call::<R, _>("get", key, call).await?;
        object.ok_or_else(|| Self::hollow("get"))
    }

    /// All objects in `scope`, with the revision to watch from.
    pub async fn list<R: Resource>(&self, scope: &Scope) -> Result<(Vec<R>, u64), CallError> {
        let (mut items, mut token, mut revision) = (Vec::new(), String::new(), None);
        loop {
            let page = self.page::<R>(scope, 0, token.clone()).await?;
            items.extend(page.items);
            // A watch from the first page's revision also sees what changed while the others were fetched.
            let revision = *revision.get_or_insert(page.revision);
            if page.next.is_empty() || page.next == token {
                return Ok((items, revision));
            }
            token = page.next;
        }
    }

    /// Whether there is any object in `scope`, which need not exist.
    pub async fn any<R: Resource>(&self, scope: &Scope) -> Result<bool, CallError> {
        let mut token = String::new();
        loop {
            let page = match self.page::<R>(scope, 0, token.clone()).await {
                Ok(page) => page,
                Err(error) if error.failure == Failure::NotFound => return Ok(false),
                Err(error) => return Err(error),
            };
            if !page.items.is_empty() {
                return Ok(true);
            }
            if page.next.is_empty() || page.next == token {
                return Ok(false);
            }
            token = page.next;
        }
    }

    /// The revision that a watch of what comes next starts from.
    pub async fn revision<R: Resource>(&self, scope: &Scope) -> Result<u64, CallError> {
        Ok(self.page::<R>(scope, 1, String::new()).await?.revision)
    }

    async fn page<R: Resource>(
        &self,
        scope: &Scope,
        page_size: u32,
        page_token: String,
    ) -> Result<crate::resource::Page<R>, CallError> {
        let options = ListOptions { page_size, page_token, label_selector: scope.selector.clone() };
        self.call::<R, _>("list", &whole(scope), R::list(self.channel.clone(), scope, options)).await
    }

    /// Creates an object.
    pub async fn create<R: Resource>(&self, object: R) -> Result<(R, Option<Secret>), CallError> {
        let key = Key::of(&object);
        let call = R::create(self.channel.clone(), object, false);
        let (object, secret) = self.call::<R, _>("create", &key, call).await?;
        Ok((object.ok_or_else(|| Self::hollow("create"))?, secret))
    }

    /// Asks whether an object could be created, and how it would be; kinds that cannot be checked are taken as
    /// they are.
    pub async fn check_create<R: Resource>(&self, object: R) -> Result<R, CallError> {
        if !R::VALIDATES {
            return Ok(object);
        }
        let key = Key::of(&object);
        let call = R::create(self.channel.clone(), object.clone(), true);
        Ok(self.call::<R, _>("create", &key, call).await?.0.unwrap_or(object))
    }

    /// Asks whether an object could be changed, and how it would be then.
    pub async fn check_update<R: Resource>(&self, object: R, mask: Vec<String>) -> Result<R, CallError> {
        if !R::VALIDATES {
            return Ok(object);
        }
        let key = Key::of(&object);
        let call = R::update(self.channel.clone(), object.clone(), FieldMask { paths: mask }, true);
        Ok(self.call::<R, _>("change", &key, call).await?.unwrap_or(object))
    }

    /// Changes the fields of an object that `mask` names.
    pub async fn update<R: Resource>(&self, object: R, mask: Vec<String>) -> Result<R, CallError> {
        let key = Key::of(&object);
        let call = R::update(self.channel.clone(), object, FieldMask { paths: mask }, false);
        self.call::<R, _>("change", &key, call).await?.ok_or_else(|| Self::hollow("change"))
    }

    /// Deletes an object; with a `revision` other than 0, only as it was at that.
    pub async fn delete<R: Resource>(&self, key: &Key, revision: u64) -> Result<(), CallError> {
        self.call::<R, _>("delete", key, R::delete(self.channel.clone(), key, revision)).await
    }

    /// Watches the objects in `scope` from `revision`. Errors in the stream are for [`Self::explain`].
    pub async fn watch<R: Resource>(&self, scope: &Scope, revision: u64) -> Result<Events<R>, CallError> {
        let call = R::watch(self.channel.clone(), scope, revision);
        self.call::<R, _>("watch", &whole(scope), call).await
    }

    /// The registrar's health, such as `SERVING`.
    pub async fn health(&self) -> Result<ServingStatus, CallError> {
        let mut client = HealthClient::new(self.channel.clone());
        let call = client.check(HealthCheckRequest::default());
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(response)) => Ok(response.into_inner().status()),
            Ok(Err(status)) => Err(self.explain(None, "ask the health of", &Key::default(), &status)),
            Err(_) => Err(self.late("health")),
        }
    }

    async fn call<R: Resource, T>(
        &self,
        action: &str,
        key: &Key,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => Err(self.explain(Some(R::KIND.names()), action, key, &status)),
            Err(_) => Err(self.late(action)),
        }
    }

    fn late(&self, action: &str) -> CallError {
        let message = format!(
            "the registrar {} did not answer within {} s ({action}); --request-timeout gives it longer",
            self.registrar,
            self.timeout.as_secs_f32()
        );
        CallError::new(Failure::Unavailable, message)
    }

    fn hollow(action: &str) -> CallError {
        CallError::new(Failure::Other, format!("the registrar's answer ({action}) has no object in it"))
    }

    /// What `status` means, when `action` was asked for.
    pub fn explain(&self, names: Option<&Names>, action: &str, key: &Key, status: &Status) -> CallError {
        let Key { network, namespace, name } = key;
        let what = match names {
            Some(names) if name.is_empty() => names.plural.to_owned(),
            Some(names) => format!("{} {name:?}", names.singular),
            None => "the registrar".into(),
        };
        let place = if names.is_some_and(|n| n.in_network) && !network.is_empty() {
            let namespace =
                if namespace.is_empty() { String::new() } else { format!(" in namespace {namespace:?}") };
            format!("{namespace} in network {network:?}")
        } else {
            String::new()
        };
        let said = match status.message() {
            "" => status.code().description(),
            message => message,
        };
        match (status.code(), names) {
            (Code::NotFound, Some(names)) if !name.is_empty() && action != "create" => {
                CallError::not_found(names, name, &place)
            }
            (Code::NotFound, _) => {
                CallError::new(Failure::NotFound, format!("cannot {action} {what}{place}: {said}"))
            }
            (Code::AlreadyExists, _) => {
                CallError::new(Failure::AlreadyExists, format!("cannot {action} {what}{place}: {said}"))
            }
            (Code::Aborted, _) => {
                CallError::new(Failure::Conflict, format!("cannot {action} {what}{place}: {said}"))
            }
            (Code::FailedPrecondition, _) => {
                CallError::new(Failure::Precondition, format!("cannot {action} {what}{place}: {said}"))
            }
            (Code::OutOfRange, _) => {
                CallError::new(Failure::Expired, format!("cannot {action} {what}{place}: {said}"))
            }
            _ if is_transport(status) => {
                let message = format!(
                    "the connection to the registrar {} failed: {}",
                    self.registrar,
                    grpc::chain(status)
                );
                CallError::new(Failure::Unavailable, message)
            }
            (Code::Unavailable | Code::DeadlineExceeded, _) => CallError::new(
                Failure::Unavailable,
                format!(
                    "the registrar {} cannot {action} {what}{place} now: {said}; try again, or ask another with --registrar HOST:PORT",
                    self.registrar
                ),
            ),
            (Code::Unauthenticated, _) => CallError::new(
                Failure::Other,
                format!(
                    "the registrar {} does not accept the credential: {said}; give an operator's with --credential FILE, or make one on the registrar's host with muster-registrar credential",
                    self.registrar
                ),
            ),
            (Code::PermissionDenied, _) => CallError::new(
                Failure::Other,
                format!(
                    "not allowed to {action} {what}{place}: {said}; give the credential of an operator who may with --credential FILE"
                ),
            ),
            (Code::Unimplemented, _) => CallError::new(
                Failure::Other,
                format!("the registrar {} cannot {action} {what}: {said}; upgrade it", self.registrar),
            ),
            _ => CallError::new(Failure::Other, format!("cannot {action} {what}{place}: {said}")),
        }
    }
}

/// Whether the connection failed, not the call: only then has the status a cause on this side.
fn is_transport(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// All that is in `scope`, for messages.
pub(crate) fn whole(scope: &Scope) -> Key {
    Key { network: scope.network.clone(), namespace: scope.namespace.clone(), name: String::new() }
}
