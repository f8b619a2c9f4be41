//! Whether the store can be served, at start and from then on.

use muster_proto::storage::{Format, Migrated, Restoring};

use super::ServeError;
use crate::{
    layout::{self, Layout},
    registry::keys,
    store::{Store, StoreError},
};

/// What the store says of itself, if it can be served.
///
/// # Errors
/// If it cannot be reached, is empty, or of another version.
pub(crate) async fn read_format(store: &dyn Store, place: &str) -> Result<Format, ServeError> {
    let range = store.range(keys::meta(), None, layout::KEYS_MAX).await.map_err(|error| match error {
        StoreError::Unavailable(_) => ServeError::Unreachable { place: place.to_owned(), source: error },
        error => error.into(),
    })?;
    let layout = layout::read(&range.kvs)
        .map_err(|error| ServeError::Format { place: place.to_owned(), reason: error.to_string() })?;
    match layout {
        Layout::None => Err(ServeError::Empty(place.to_owned())),
        Layout::Whole(format) => Ok(format),
        Layout::Restoring(Restoring { source, .. }) => {
            Err(ServeError::Incomplete { place: place.to_owned(), contents: source })
        }
        Layout::Migrated(_, Migrated { target, .. }) => {
            Err(ServeError::Migrated { place: place.to_owned(), target })
        }
    }
}

/// Whether the store is still the one that began to be served. One that does not answer may be.
///
/// # Errors
/// If it was emptied, is being restored, was migrated away, or is another one.
pub(super) async fn check_store(store: &dyn Store, place: &str, served: &Format) -> Result<(), ServeError> {
    match read_format(store, place).await {
        Ok(format) if format == *served => Ok(()),
        Ok(_) => Err(ServeError::Replaced(place.to_owned())),
        Err(
            error @ (ServeError::Empty(_)
            | ServeError::Format { .. }
            | ServeError::Incomplete { .. }
            | ServeError::Migrated { .. }),
        ) => Err(error),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::store::{Txn, memory::MemoryStore};

    async fn write(store: &MemoryStore, format: &Format) {
        store.txn(Txn::new().put(keys::format(), format.encode_to_vec())).await.unwrap();
    }

    #[tokio::test]
    async fn a_store_that_is_another_or_gone_is_noticed() {
        let store = MemoryStore::new();
        let error = check_store(&store, "here", &Format::default()).await.unwrap_err();
        assert!(matches!(error, ServeError::Empty(_)), "{error}");
        let (first, second) = (layout::format("muster.test".into()), layout::format("muster.test".into()));
        write(&store, &first).await;
        let served = read_format(&store, "here").await.unwrap();
        check_store(&store, "here", &served).await.unwrap();
        write(&store, &second).await;
        let error = check_store(&store, "here", &served).await.unwrap_err();
        assert!(matches!(error, ServeError::Replaced(_)), "{error}");
        let migrated = Migrated { target: "there".into(), ..Migrated::default() };
        store.txn(Txn::new().put(keys::migrated(), migrated.encode_to_vec())).await.unwrap();
        let error = check_store(&store, "here", &second).await.unwrap_err();
        assert!(matches!(error, ServeError::Migrated { .. }), "{error}");
    }
}
