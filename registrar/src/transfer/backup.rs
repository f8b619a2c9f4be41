//! A backup: the store at one revision, while registrars go on, and the CA, in one file that is read again before it
//! counts.

use std::path::PathBuf;

use muster_common::time::Timestamp;
use muster_proto::storage::BackupHeader;

use super::{
    TransferError,
    archive::{self, Contents, Writer},
    format::Encoder,
    progress::Progress,
    source::{ATTEMPTS, Source, whole},
};
use crate::{
    ca::{CaFile, copy},
    config::Config,
    registry::field,
};

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file to write.
    pub output: PathBuf,
    /// Whether it may take the place of another.
    pub overwrite: bool,
    /// Whether the CA is to be in it.
    pub with_ca: bool,
}

/// Writes a backup of the configured store, and of the CA in the data directory.
///
/// # Errors
/// See [`TransferError`]. There is no new file then, and what was there before still is.
pub async fn backup(
    config: &Config,
    options: &Options,
    now: Timestamp,
    progress: &mut Progress,
) -> Result<Contents, TransferError> {
    if !options.overwrite && options.output.symlink_metadata().is_ok() {
        return Err(TransferError::Exists(options.output.clone()));
    }
    let ca = if options.with_ca { copy::read(&config.data_dir)? } else { Vec::new() };
    let (kind, place) = (config.store.kind, config.place(config.store.kind));
    let source = Source::open_shared(config, kind).await.map_err(TransferError::store("open", &place))?;
    write(&source, &place, options, &ca, now, progress).await
}

/// Writes the file, and begins again when the store forgets what is being read: when reading takes longer than history
/// is kept.
async fn write(
    source: &Source,
    place: &str,
    options: &Options,
    ca: &[CaFile],
    now: Timestamp,
    progress: &mut Progress,
) -> Result<Contents, TransferError> {
    let mut attempt = 1;
    loop {
        match write_once(source, place, options, ca, now, progress).await {
            Err(error) if error.is_compacted() && attempt < ATTEMPTS => attempt += 1,
            result => return result,
        }
    }
}

async fn write_once(
    source: &Source,
    place: &str,
    options: &Options,
    ca: &[CaFile],
    now: Timestamp,
    progress: &mut Progress,
) -> Result<Contents, TransferError> {
    let (layout, revision) = source.layout(place).await?;
    let (format, _) = whole(layout, place)?;
    let header = BackupHeader {
        layout_version: format.version,
        trust_domain: format.trust_domain,
        revision,
        taken_at: Some(field::to_timestamp(now)),
    };

    let mut file = Writer::create(&options.output)?;
    let wrong = |source| TransferError::Format { path: options.output.clone(), source };
    let mut buffer = Vec::new();
    let mut encoder = Encoder::new(&header, &mut buffer);
    for ca_file in ca {
        encoder.ca_file(ca_file, &mut buffer).map_err(wrong)?;
        file.write(&mut buffer)?;
    }
    let (mut pages, mut keys) = (source.pages(Some(revision)), 0);
    while let Some(page) = pages.next().await.map_err(TransferError::store("read", place))? {
        for kv in &page {
            encoder.key(&kv.key, &kv.value, &mut buffer).map_err(wrong)?;
            file.write(&mut buffer)?;
        }
        keys += page.len() as u64;
        progress.tell("read", keys, None);
    }
    let summary = encoder.end(&mut buffer);
    file.flush(&mut buffer)?;

    let contents = archive::verify(file.unfinished(), progress)?;
    if contents.summary != summary || contents.ca != ca || contents.header != header {
        return Err(TransferError::NotAsWritten(options.output.display().to_string()));
    }
    file.finish(options.overwrite)?;
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use async_trait::async_trait;
    use bytes::Bytes;
    use prost::Message as _;

    use super::*;
    use crate::{
        layout,
        registry::keys,
        store::{
            Announcement, KeyRange, RangeResult, Revision, Store, StoreError, Txn, TxnOutcome, WatchStream,
            memory::MemoryStore,
        },
    };

    /// Is written to and forgets its history after each of the first pages that are read.
    struct Forgetful {
        store: MemoryStore,
        times: AtomicU32,
    }

    #[async_trait]
    impl Store for Forgetful {
        async fn range(
            &self,
            range: KeyRange,
            at: Option<Revision>,
            limit: usize,
        ) -> Result<RangeResult, StoreError> {
            let page = self.store.range(range, at, limit).await?;
            let left = |times: u32| times.checked_sub(1);
            if page.more && self.times.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok() {
                self.store.apply_txn(&Txn::new().put("changed", page.revision.to_string()))?;
                self.store.compact_sync(page.revision + 1)?;
            }
            Ok(page)
        }
        async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
            self.store.txn(txn).await
        }
        async fn watch(&self, range: KeyRange, from: Revision) -> Result<WatchStream, StoreError> {
            self.store.watch(range, from).await
        }
        async fn compact(&self, up_to: Revision) -> Result<(), StoreError> {
            self.store.compact(up_to).await
        }
        async fn revision(&self) -> Result<Revision, StoreError> {
            self.store.revision().await
        }
        async fn announce(&self, key: Bytes) -> Result<Announcement, StoreError> {
            self.store.announce(key).await
        }
    }

    #[tokio::test]
    async fn reading_begins_again_when_history_is_forgotten_but_not_forever() {
        let directory = tempfile::tempdir().unwrap();
        for (times, fails) in [(2, false), (100, true)] {
            let store = MemoryStore::new();
            let format = layout::format("net.example".into());
            store.apply_txn(&Txn::new().put(keys::format(), format.encode_to_vec())).unwrap();
            for number in 0..10_000 {
                store.apply_txn(&Txn::new().put(format!("k/{number:05}"), "v")).unwrap();
            }
            let source = Source::Store(Arc::new(Forgetful { store: store.clone(), times: times.into() }));
            let output = directory.path().join(times.to_string());
            let options = Options { output: output.clone(), overwrite: false, with_ca: false };
            let mut progress = Progress::silent();
            let written = write(&source, "memory", &options, &[], Timestamp::now(), &mut progress).await;
            assert_eq!(output.exists(), !fails);
            match written {
                Ok(contents) => {
                    assert_eq!(contents.header.revision, store.revision().await.unwrap());
                    assert_eq!(contents.summary.keys, 10_001);
                }
                Err(error) => assert!(fails && error.is_compacted(), "{error}"),
            }
        }
        // What was given up left nothing behind.
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
