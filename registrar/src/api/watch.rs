//! Watches: what there is as ADDED events, then changes as they come, and bookmarks in between. A watch has no queue
//! of its own but a place in the registry's history; one that falls out of it is ended, and told to list again.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, stream};
use muster_common::labels::{Labels, Selector};
use muster_proto::admin::EventType;
use tokio::sync::watch::Receiver;
use tonic::Status;

use super::{Api, status::Refusal as _};
use crate::{
    registry::{Change, Index},
    store::Revision,
};

/// Objects of the snapshot, and revisions of the history, taken at a time.
const CHUNK: usize = 256;
/// How old a bookmark gets while nothing that is watched changes.
const BOOKMARK: Duration = Duration::from_secs(5);

/// An object before and after a change.
pub(super) type Versions<'a, T> = (Option<&'a Arc<T>>, Option<&'a Arc<T>>);

/// A kind of object that can be watched.
pub(super) trait Kind: Send + 'static {
    type Object: Send + Sync + 'static;
    type Response: Send + 'static;

    /// At most `limit` objects after the one called `after`, in order.
    fn after(&self, index: &Index, after: &str, limit: usize) -> Vec<Arc<Self::Object>>;
    /// The object that a change is about, before and after it.
    fn of(change: &Change) -> Option<Versions<'_, Self::Object>>;
    /// Whether the object is among those that are watched, labels aside.
    fn includes(&self, object: &Self::Object) -> bool;
    fn name(object: &Self::Object) -> &str;
    fn labels(object: &Self::Object) -> &Labels;
    fn revision(object: &Self::Object) -> Revision;
    /// The event; without an object, a bookmark.
    fn response(
        &self,
        api: &Api,
        event: EventType,
        object: Option<&Self::Object>,
        revision: Revision,
    ) -> Self::Response;
}

struct Watch<K: Kind> {
    api: Arc<Api>,
    kind: K,
    selector: Selector,
    phase: Phase,
    queue: VecDeque<K::Response>,
    revisions: Receiver<Revision>,
    /// Revision of the last message.
    told: Revision,
    /// Objects that changed while the snapshot was taken, and were left to the changes that follow it.
    skipped: HashSet<String>,
    ended: bool,
}

enum Phase {
    /// Sending what there was at `revision`, from the object after `after` on.
    Snapshot { revision: Revision, after: String },
    /// Sending what changes after this revision.
    Follow(Revision),
}

/// Starts a watch: from `revision` on, or, if it is 0, with what there is.
pub(super) async fn start<K: Kind>(
    api: Arc<Api>,
    kind: K,
    selector: Selector,
    revision: Revision,
) -> Result<impl Stream<Item = Result<K::Response, Status>> + Send + 'static, Status> {
    let phase = if revision == 0 {
        Phase::Snapshot { revision: api.registry.read().revision(), after: String::new() }
    } else {
        // The client may come from a registrar that was faster.
        if api.registry.reached(revision).await.is_err() {
            return Err(Status::out_of_range(format!(
                "revision {revision} is in the future of this registrar; list again, and watch from there"
            )));
        }
        api.registry.changes_after(revision, 1).map_err(|error| error.status())?;
        Phase::Follow(revision)
    };
    let revisions = api.registry.revisions();
    let watch = Watch {
        api,
        kind,
        selector,
        phase,
        queue: VecDeque::new(),
        revisions,
        told: revision,
        skipped: HashSet::new(),
        ended: false,
    };
    Ok(stream::unfold(watch, |mut watch| async move {
        if watch.ended {
            return None;
        }
        let response = watch.next().await;
        watch.ended = response.is_err();
        Some((response, watch))
    }))
}

impl<K: Kind> Watch<K> {
    async fn next(&mut self) -> Result<K::Response, Status> {
        loop {
            if let Some(response) = self.queue.pop_front() {
                return Ok(response);
            }
            match &self.phase {
                Phase::Snapshot { revision, after } => {
                    let (revision, after) = (*revision, after.clone());
                    self.snapshot(revision, &after);
                }
                Phase::Follow(revision) => {
                    let revision = *revision;
                    self.follow(revision).await?;
                }
            }
        }
    }

    /// Queues the next part of the snapshot.
    fn snapshot(&mut self, revision: Revision, after: &str) {
        let objects = self.kind.after(&self.api.registry.read(), after, CHUNK);
        for object in &objects {
            if K::revision(object) > revision {
                self.skipped.insert(K::name(object).to_owned());
            } else if self.matches(object) {
                self.push(EventType::Added, Some(object), K::revision(object));
            }
        }
        self.phase = match objects.last() {
            Some(last) if objects.len() == CHUNK => {
                Phase::Snapshot { revision, after: K::name(last).to_owned() }
            }
            _ => {
                self.push(EventType::Bookmark, None, revision);
                Phase::Follow(revision)
            }
        };
    }

    /// Queues the changes after `revision`, or waits for some.
    async fn follow(&mut self, revision: Revision) -> Result<(), Status> {
        // Before the history is read, so that all up to here is in what is read.
        let current = *self.revisions.borrow_and_update();
        let entries = self.api.registry.changes_after(revision, CHUNK).map_err(|error| error.status())?;
        for applied in &entries {
            for (old, new) in applied.changes.iter().filter_map(K::of) {
                self.change(old.map(|object| &**object), new.map(|object| &**object), applied.revision);
            }
        }
        let through = if entries.len() < CHUNK { revision.max(current) } else { revision };
        let through = entries.last().map_or(through, |last| through.max(last.revision));
        self.phase = Phase::Follow(through);
        if !self.queue.is_empty() || entries.len() == CHUNK {
            return Ok(());
        }
        tokio::select! {
            changed = self.revisions.changed() => {
                changed.map_err(|_| Status::unavailable("the registrar stops; watch again at another one"))?;
            }
            () = tokio::time::sleep(BOOKMARK), if through > self.told => {
                self.push(EventType::Bookmark, None, through);
            }
            () = self.api.hub.closing().cancelled() => {
                return Err(Status::unavailable("this registrar is shutting down; watch again at another one"));
            }
        }
        Ok(())
    }

    fn change(&mut self, old: Option<&K::Object>, new: Option<&K::Object>, revision: Revision) {
        let was = old.filter(|object| self.matches(object));
        let is = new.filter(|object| self.matches(object));
        let first = !self.skipped.is_empty()
            && new.or(old).is_some_and(|object| self.skipped.remove(K::name(object)));
        match (was, is) {
            (Some(_), Some(new)) if !first => self.push(EventType::Modified, Some(new), revision),
            (_, Some(new)) => self.push(EventType::Added, Some(new), revision),
            // As it was when it was last among those that are watched.
            (Some(old), None) => self.push(EventType::Deleted, Some(new.unwrap_or(old)), revision),
            (None, None) => {}
        }
    }

    fn matches(&self, object: &K::Object) -> bool {
        self.kind.includes(object) && self.selector.matches(K::labels(object))
    }

    fn push(&mut self, event: EventType, object: Option<&K::Object>, revision: Revision) {
        self.told = self.told.max(revision);
        self.queue.push_back(self.kind.response(&self.api, event, object, revision));
    }
}
