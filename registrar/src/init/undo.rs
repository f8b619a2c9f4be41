//! Takes back what was made, unless all of it was.

use std::{
    fs,
    path::{Path, PathBuf},
};

use muster_common::file::{FileError, create_private_dir};

/// Files and directories that were not there before, in the order of their making. Dropped, it removes them.
#[derive(Debug, Default)]
pub(crate) struct Undo(Vec<PathBuf>);

impl Undo {
    /// Announces that `path` will be made. What is there already stays, whatever comes.
    pub(crate) fn will_make(&mut self, path: &Path) {
        if path.symlink_metadata().is_err() {
            self.0.push(path.to_owned());
        }
    }

    /// Makes a directory and what is missing above it.
    pub(crate) fn make_directory(&mut self, path: &Path) -> Result<(), FileError> {
        let missing: Vec<&Path> = path
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && path.symlink_metadata().is_err())
            .collect();
        missing.into_iter().rev().for_each(|path| self.will_make(path));
        create_private_dir(path)
    }

    /// All was made: nothing is taken back.
    pub(crate) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let removed = match path.symlink_metadata() {
                Ok(found) if found.is_dir() => fs::remove_dir(path),
                Ok(_) => fs::remove_file(path),
                Err(_) => continue,
            };
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), %error, "cannot remove what a failed command has made");
            }
        }
    }
}
