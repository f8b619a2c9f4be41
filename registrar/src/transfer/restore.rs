//! Puts a backup into the configured store, which must be empty, and its CA into the data directory.

use std::path::Path;

use muster_common::file;

use super::{
    TransferError,
    archive::{self, Contents, Reader},
    format::Item,
    loading::Loading,
    progress::Progress,
    target::Target,
};
use crate::{ca::copy, config::Config, layout};

/// Restores the backup at `path`, or goes on with that; the CA only if `with_ca`.
///
/// # Errors
/// See [`TransferError`]. Once it has begun to write, no registrar serves the store before the same has been finished.
pub async fn restore(
    config: &Config,
    path: &Path,
    with_ca: bool,
    progress: &mut Progress,
) -> Result<Contents, TransferError> {
    // All of it is read before anything is written.
    let contents = archive::verify(path, progress)?;
    let header = &contents.header;
    layout::check_version(header.layout_version)
        .map_err(|source| TransferError::BackupLayout { path: path.to_owned(), source })?;
    let with_ca = with_ca && !contents.ca.is_empty();
    // What it reads and keeps in memory would be replaced under a registrar that runs.
    let runs = |source| TransferError::Runs { directory: config.data_dir.clone(), source };
    let _lock = file::lock_existing(&config.data_dir).map_err(runs)?;
    if with_ca {
        copy::check(&config.data_dir, &contents.ca)?;
    }
    let target = Target::open_or_create(config, config.store.kind)?;
    let taken = archive::taken_at(header).map(|at| format!(" of {at}"));
    let source = format!("the backup {}{}", path.display(), taken.unwrap_or_default());
    let mut loading = Loading::begin(&target.store, &target.place, contents.summary, source).await?;
    if with_ca {
        copy::write(&config.data_dir, &contents.ca)?;
    }

    let mut reader = Reader::open(path)?;
    let mut end = None;
    while let Some(item) = reader.next()? {
        match item {
            Item::Key { key, value } => loading.put(key, value, progress).await?,
            Item::End(summary) => end = Some(summary),
            Item::Header(_) | Item::CaFile(_) => {}
        }
    }
    if end != Some(contents.summary) {
        return Err(TransferError::Changed(path.to_owned()));
    }
    loading.verify(progress).await?;
    loading.complete(header.trust_domain.clone()).await?;
    Ok(contents)
}
