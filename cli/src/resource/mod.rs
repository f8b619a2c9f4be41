//! The kinds of resource: what each is called, how it is shown, and how the registrar is asked for it. One
//! module per kind; everything else in this crate is written once, over [`Resource`].

mod device;
mod director;
mod endpoint_slice;
mod namespace;
mod network;
mod registrar;
mod service;
mod token;

use std::{fmt, str::FromStr};

use futures_util::stream::{BoxStream, StreamExt};
use muster_common::time::Timestamp;
use muster_proto::admin::{EventType, ListOptions, ObjectMeta};
use pbjson_types::FieldMask;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tonic::Status;

pub use token::Secret;
pub(crate) use token::is_for_directors;

use crate::channel::Channel;
use crate::{describe::Description, table::Column};

/// Calls `$body` with `$R` being the type of `$kind`.
#[macro_export]
macro_rules! with_resource {
    ($kind:expr, $R:ident => $body:expr) => {
        match $kind {
            $crate::resource::Kind::Network => {
                type $R = muster_proto::admin::Network;
                $body
            }
            $crate::resource::Kind::Device => {
                type $R = muster_proto::admin::Device;
                $body
            }
            $crate::resource::Kind::Director => {
                type $R = muster_proto::admin::Director;
                $body
            }
            $crate::resource::Kind::Registrar => {
                type $R = muster_proto::admin::Registrar;
                $body
            }
            $crate::resource::Kind::Token => {
                type $R = muster_proto::admin::Token;
                $body
            }
            $crate::resource::Kind::Namespace => {
                type $R = muster_proto::admin::Namespace;
                $body
            }
            $crate::resource::Kind::Service => {
                type $R = muster_proto::admin::Service;
                $body
            }
            $crate::resource::Kind::EndpointSlice => {
                type $R = muster_proto::admin::EndpointSlice;
                $body
            }
        }
    };
}

/// A kind of resource.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// A virtual network.
    Network,
    /// A registered host.
    Device,
    /// A relay for devices that no direct path leads to.
    Director,
    /// A registrar of the deployment.
    Registrar,
    /// A join token.
    Token,
    /// A namespace of a network.
    Namespace,
    /// A Service, as Kubernetes has it.
    Service,
    /// Endpoints of a Service, as Kubernetes has them.
    EndpointSlice,
}

/// What a kind is called.
#[derive(Debug)]
pub struct Names {
    /// In manifests: `muster/v1`.
    pub api_version: &'static str,
    /// In manifests: `Device`.
    pub kind: &'static str,
    /// `device`
    pub singular: &'static str,
    /// `devices`
    pub plural: &'static str,
    /// `dev`; the singular if there is nothing shorter
    pub short: &'static str,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
    /// Whether names are unique in their namespace only, so that one object is found by both.
    pub unique_in_namespace: bool,
    /// Whether its objects belong to a network.
    pub in_network: bool,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Network,
        Self::Device,
        Self::Director,
        Self::Registrar,
        Self::Token,
        Self::Namespace,
        Self::Service,
        Self::EndpointSlice,
    ];

    /// Order in which kinds are created: networks first, then namespaces, as the others live in them.
    pub const fn rank(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Namespace => 1,
            Self::Device | Self::Director | Self::Registrar | Self::Token | Self::Service => 2,
            Self::EndpointSlice => 3,
        }
    }

    /// What the kind is called.
    pub const fn names(self) -> &'static Names {
        match self {
            Self::Network => &network::NAMES,
            Self::Device => &device::NAMES,
            Self::Director => &director::NAMES,
            Self::Registrar => &registrar::NAMES,
            Self::Token => &token::NAMES,
            Self::Namespace => &namespace::NAMES,
            Self::Service => &service::NAMES,
            Self::EndpointSlice => &endpoint_slice::NAMES,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names().singular)
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let kind = Self::ALL.into_iter().find(|kind| {
            let names = kind.names();
            [names.singular, names.plural, names.short].contains(&lower.as_str())
        });
        kind.ok_or_else(|| format!("there is no resource type {text:?}; there are {}", known_types()))
    }
}

/// What all kinds are called on the command line: `networks (net), devices (dev)…`.
pub fn known_types() -> String {
    let name = |kind: &Kind| match kind.names() {
        names if names.short == names.singular => names.plural.to_owned(),
        names => format!("{} ({})", names.plural, names.short),
    };
    Kind::ALL.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// `apiVersion` of Muster's own resources.
pub const MUSTER: &str = "muster/v1";

/// What finds one object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Name of the network; empty for networks themselves.
    pub network: String,
    /// Empty for kinds whose names are unique in the network.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
}

impl Key {
    /// The key of `object`.
    pub fn of<R: Resource>(object: &R) -> Self {
        let meta = object.metadata().cloned().unwrap_or_default();
        let namespace = if R::KIND.names().unique_in_namespace { meta.namespace } else { String::new() };
        Self { network: meta.network, namespace, name: meta.name }
    }
}

/// Which objects a list or watch is about.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Name of the network.
    pub network: String,
    /// Empty for all namespaces.
    pub namespace: String,
    /// A label selector; empty for all.
    pub selector: String,
}

/// One page of a list.
#[derive(Debug)]
pub struct Page<R> {
    /// The objects.
    pub items: Vec<R>,
    /// Asks for the next page; empty on the last.
    pub next: String,
    /// Revision of the list.
    pub revision: u64,
}

/// A change to a watched object; bookmarks have none.
#[derive(Debug)]
pub struct Event<R> {
    /// What happened.
    pub event: EventType,
    /// The object, as it is or, deleted, was.
    pub object: Option<R>,
    /// Revision to go on from.
    pub revision: u64,
}

/// A watch under way.
pub type Events<R> = BoxStream<'static, Result<Event<R>, Status>>;

/// What a kind of resource must know of itself. An answer without an object in it, which a sound registrar never
/// gives, is `None`.
#[expect(async_fn_in_trait, reason = "commands run on one thread, so futures need not be Send")]
pub trait Resource: Clone + Default + PartialEq + Serialize + DeserializeOwned + Send + 'static {
    /// Its kind.
    const KIND: Kind;
    /// The columns between NAME and AGE, and after it with `-o wide`.
    const COLUMNS: &'static [Column];

    /// Its metadata, if it has any.
    fn metadata(&self) -> Option<&ObjectMeta>;
    /// Its metadata, made if it has none.
    fn metadata_mut(&mut self) -> &mut ObjectMeta;
    /// A cell per column.
    fn cells(&self, now: Timestamp) -> Vec<String>;
    /// All that there is to tell, after the metadata.
    fn describe(&self, description: &mut Description, now: Timestamp);

    /// Checks that `value` can be this kind's `spec`. Kubernetes' kinds are checked as a whole instead.
    fn check_spec(value: &Value) -> Result<(), serde_json::Error> {
        let _ = value;
        Ok(())
    }

    /// Turns the JSON mapping of an object into the form in which it is printed.
    fn present(value: &mut Value) {
        let _ = value;
    }

    /// Writes out what is left to defaults, so that objects that mean the same are equal.
    fn fill_defaults(&mut self) {}

    /// Marks it as revoked; false if this kind cannot be.
    fn revoke(&mut self) -> bool {
        false
    }

    /// Marks it as one to be left, or not any more; false if this kind cannot be.
    fn drain(&mut self, drained: bool) -> bool {
        let _ = drained;
        false
    }

    /// Paths of fields that stay as they were first set.
    const FIXED: &'static [&'static str] = &[];
    /// Whether the registrar can check a change without making it.
    const VALIDATES: bool = false;

    /// Asks for one object.
    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status>;
    /// Asks for a page of objects.
    async fn list(channel: Channel, scope: &Scope, options: ListOptions) -> Result<Page<Self>, Status>;
    /// Creates the object, or only checks it; a token comes with its secret.
    async fn create(
        channel: Channel,
        object: Self,
        validate_only: bool,
    ) -> Result<(Option<Self>, Option<Secret>), Status>;
    /// Changes the fields named in `mask`, or only checks the change.
    async fn update(
        channel: Channel,
        object: Self,
        mask: FieldMask,
        validate_only: bool,
    ) -> Result<Option<Self>, Status>;
    /// Deletes the object; with a `revision` other than 0, only as it was at that.
    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status>;
    /// Watches from `revision`; 0 sends what is there first.
    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status>;

    /// Its name, empty if it has none.
    fn name(&self) -> &str {
        self.metadata().map_or("", |m| &m.name)
    }

    /// As in `device/web`.
    fn qualified_name(&self) -> String {
        format!("{}/{}", Self::KIND, self.name())
    }
}

/// Turns the stream of a watch response into [`Events`].
fn events<T: 'static, R: 'static>(stream: tonic::Streaming<T>, convert: fn(T) -> Event<R>) -> Events<R> {
    stream.map(move |response| response.map(convert)).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_several_names() {
        for text in ["device", "devices", "dev", "Device"] {
            assert_eq!(text.parse(), Ok(Kind::Device));
        }
        assert_eq!("net".parse(), Ok(Kind::Network));
        assert_eq!("tokens".parse(), Ok(Kind::Token));
        let error = "pod".parse::<Kind>().unwrap_err();
        assert_eq!(
            error,
            "there is no resource type \"pod\"; there are networks (net), devices (dev), directors (dir), registrars (reg), tokens, namespaces (ns), services (svc), endpointslices"
        );
    }
}
