//! What `muster apply` has done, so that it can be undone when the rest fails. Nothing is undone that somebody else
//! has built upon in the meantime.

use muster_proto::admin::{EndpointSlice, Service};
use serde_json::Value;

use crate::{
    client::{Client, Failure},
    error::{Error, Result},
    resource::{Key, Kind, Resource, Scope},
    with_resource,
};

/// One thing that was done.
pub(super) struct Undo {
    kind: Kind,
    key: Key,
    namespace: String,
    /// Of the object, after it was done.
    revision: u64,
    /// The object before, and the fields that were changed; none if it was created.
    before: Option<(Value, Vec<String>)>,
}

impl Undo {
    /// That `object` was created.
    pub(super) fn created<R: Resource>(object: &R) -> Self {
        let meta = object.metadata().cloned().unwrap_or_default();
        let (namespace, revision) = (meta.namespace, meta.resource_version);
        Self { kind: R::KIND, key: Key::of(object), namespace, revision, before: None }
    }

    /// That the fields `mask` of an object were changed, which was `before`, and is `after`.
    pub(super) fn changed<R: Resource>(before: &R, after: &R, mask: Vec<String>) -> Self {
        let before = serde_json::to_value(before).ok().map(|before| (before, mask));
        Self { before, ..Self::created(after) }
    }

    /// Undoes it. The answer tells what has been undone, or that it is not, and why.
    pub(super) async fn run(self, client: &Client) -> Result<String, String> {
        let what = format!("{}/{}", self.kind, self.key.name);
        let created = self.before.is_none();
        match with_resource!(self.kind, R => Box::pin(self.run_as::<R>(client)).await) {
            Ok(()) if created => Ok(format!("{what} deleted again")),
            Ok(()) => Ok(format!("{what} changed back")),
            Err(error) if created => Err(format!("{what} was created, and cannot be deleted again: {error}")),
            Err(error) => Err(format!("{what} was changed, and cannot be changed back: {error}")),
        }
    }

    async fn run_as<R: Resource>(self, client: &Client) -> Result<()> {
        if let Some((before, mask)) = self.before {
            let format = |e: serde_json::Error| Error::Format { format: "JSON", reason: e.to_string() };
            let mut before: R = serde_json::from_value(before).map_err(format)?;
            before.metadata_mut().resource_version = self.revision;
            return Ok(client.update(before, mask).await.map(drop)?);
        }
        // With a namespace or Service goes what is in it: none of that may be another's.
        let network = self.key.network.clone();
        let others = match self.kind {
            Kind::Namespace => {
                let scope = Scope { network, namespace: self.key.name.clone(), selector: String::new() };
                client.any::<Service>(&scope).await? || client.any::<EndpointSlice>(&scope).await?
            }
            Kind::Service => {
                let selector = format!("kubernetes.io/service-name={}", self.key.name);
                let scope = Scope { network, namespace: self.namespace, selector };
                client.any::<EndpointSlice>(&scope).await?
            }
            _ => false,
        };
        if others {
            return Err(Error::Label("it has objects that this command has not made".into()));
        }
        match client.delete::<R>(&self.key, self.revision).await {
            Err(error) if error.failure == Failure::NotFound => Ok(()),
            done => Ok(done?),
        }
    }
}
