//! What the admin services of all kinds in a network share: how objects are listed and watched.

use std::{marker::PhantomData, pin::Pin, sync::Arc};

use futures_util::Stream;
use muster_common::labels::Labels;
use muster_proto::admin::{EventType, ListOptions, ObjectMeta};
use tonic::Status;

use super::{
    Api,
    list::{Page, selector},
    status::status,
    watch::{self, Kind, Versions},
};
use crate::{
    registry::{
        Change, Index,
        index::NetworkState,
        plan::{AdminError, Outcome},
    },
    store::Revision,
};

/// A kind of object that networks hold.
pub(super) trait Object: Send + Sync + Sized + 'static {
    /// What a watch tells of it.
    type Response: Send + 'static;

    /// At most `limit` objects whose keys come after `after`, in order.
    fn after(state: &NetworkState, after: &str, limit: usize) -> Vec<Arc<Self>>;
    /// The object that a change is about, before and after it.
    fn of(change: &Change) -> Option<Versions<'_, Self>>;
    fn network(&self) -> &str;
    /// Its namespace; empty for kinds without.
    fn namespace(&self) -> &str;
    /// What it is ordered by.
    fn key(&self) -> &str;
    fn labels(&self) -> &Labels;
    fn revision(&self) -> Revision;
    /// The event; without an object, a bookmark.
    fn response(api: &Api, event: EventType, object: Option<&Self>, revision: Revision) -> Self::Response;
}

/// A page of a list.
pub(super) struct Listed<O> {
    pub(super) objects: Vec<Arc<O>>,
    pub(super) next_page_token: String,
    /// Revision of the list.
    pub(super) revision: Revision,
}

/// A stream of a watch's events.
pub(super) type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Api {
    pub(super) fn check_network(&self, network: &str) -> Result<(), Status> {
        if self.registry.read().network(network).is_some() {
            return Ok(());
        }
        let name = network.chars().take(80).collect();
        Err(status(AdminError::NotFound { kind: "network", name }))
    }

    /// A page of the objects of a network, in one namespace or, if it is empty, in all.
    pub(super) fn list<O: Object>(
        &self,
        network: &str,
        namespace: &str,
        options: Option<ListOptions>,
    ) -> Result<Listed<O>, Status> {
        self.check_network(network)?;
        let page = Page::new(options, self.registry.read().revision())?;
        let after = |after: &str, limit: usize| {
            let index = self.registry.read();
            index.network(network).map(|state| O::after(state, after, limit)).unwrap_or_default()
        };
        let matches = |object: &Arc<O>| is_in(&**object, namespace);
        let (objects, next_page_token) =
            page.collect(after, |object| object.key(), matches, |object| object.labels());
        Ok(Listed { objects, next_page_token, revision: page.revision })
    }

    /// Writes what `plan` comes to, or checks it alone. The answer is the object as `stored` finds it then, or as it
    /// would be.
    pub(super) async fn write<M>(
        &self,
        validate_only: bool,
        plan: impl FnMut(&mut Index, u32) -> Result<Outcome<M>, AdminError>,
        stored: impl FnOnce(&Index, &M) -> Result<M, AdminError>,
    ) -> Result<M, Status> {
        if validate_only {
            return self.registry.validate(plan).await.map_err(status);
        }
        let planned = self.registry.commit(plan).await.map_err(status)?;
        let gone = |_| Status::aborted("the object was deleted at the same time");
        stored(&self.registry.read(), &planned).map_err(gone)
    }

    /// Watches the objects of a network, in one namespace or, if it is empty, in all.
    pub(super) async fn watch<O: Object>(
        self: &Arc<Self>,
        network: String,
        namespace: String,
        label_selector: &str,
        revision: Revision,
    ) -> Result<Events<O::Response>, Status> {
        self.check_network(&network)?;
        let selector = selector("label_selector", label_selector)?;
        let kind = Watched { network, namespace, object: PhantomData::<fn() -> O> };
        let stream = watch::start(self.clone(), kind, selector, revision).await?;
        Ok(Box::pin(stream))
    }
}

fn is_in<O: Object>(object: &O, namespace: &str) -> bool {
    namespace.is_empty() || object.namespace().eq_ignore_ascii_case(namespace)
}

/// The labels of a stored message.
pub(super) fn labels(meta: Option<&ObjectMeta>) -> &Labels {
    static NONE: Labels = Labels::new();
    meta.map_or(&NONE, |meta| &meta.labels)
}

struct Watched<O> {
    network: String,
    namespace: String,
    object: PhantomData<fn() -> O>,
}

impl<O: Object> Kind for Watched<O> {
    type Object = O;
    type Response = O::Response;

    fn after(&self, index: &Index, after: &str, limit: usize) -> Vec<Arc<O>> {
        index.network(&self.network).map(|state| O::after(state, after, limit)).unwrap_or_default()
    }

    fn of(change: &Change) -> Option<Versions<'_, O>> {
        O::of(change)
    }

    fn includes(&self, object: &O) -> bool {
        object.network() == self.network && is_in(object, &self.namespace)
    }

    fn name(object: &O) -> &str {
        object.key()
    }

    fn labels(object: &O) -> &Labels {
        object.labels()
    }

    fn revision(object: &O) -> Revision {
        object.revision()
    }

    fn response(&self, api: &Api, event: EventType, object: Option<&O>, revision: Revision) -> O::Response {
        O::response(api, event, object, revision)
    }
}
