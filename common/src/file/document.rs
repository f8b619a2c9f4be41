//! Files of a program's own, each a document with a first line that names program, kind, version and checksum: damage and
//! mistaken files are noticed before anything of them is believed.

use std::{io, path::Path};

use aws_lc_rs::digest;
use zeroize::Zeroizing;

use super::{FileError, read, write_private};

/// Whose documents, and how their first line begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Name of the program.
    pub program: &'static str,
    /// What comes before it, such as `# ` where the rest of the file has comments of this kind.
    pub prefix: &'static str,
    /// Version of the contents.
    pub version: u32,
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not as it was written.
    #[error("{0}")]
    Damaged(String),
}

impl Format {
    /// Writes `body`, a document of this `kind`, to `path`, as [`write_private`] does.
    ///
    /// # Errors
    /// The system refuses; what was there is as it was then.
    pub fn write(&self, path: &Path, kind: &str, body: &[u8]) -> Result<(), FileError> {
        let mut contents = Zeroizing::new(self.header(kind, body).into_bytes());
        contents.extend_from_slice(body);
        write_private(path, &contents)
    }

    /// The body of a document of this `kind`; `None` if there is no such file.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or is something else.
    pub fn read(&self, path: &Path, kind: &str) -> Result<Option<Zeroizing<Vec<u8>>>, DocumentError> {
        let mut contents = match read(path) {
            Ok(contents) => Zeroizing::new(contents),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let damaged = |reason: String| Err(DocumentError::Damaged(reason));
        let Some(end) = contents.iter().position(|octet| *octet == b'\n') else {
            return damaged("it is empty, or cut short in its first line".into());
        };
        let body = Zeroizing::new(contents.split_off(end + 1));
        if *contents != self.header(kind, &body).into_bytes() {
            let Self { program, prefix, version } = self;
            return damaged(
                if contents.starts_with(format!("{prefix}{program} {kind} {version} ").as_bytes()) {
                    "its checksum does not match: it is damaged or was edited".into()
                } else if contents.starts_with(format!("{prefix}{program} ").as_bytes()) {
                    format!("it was written by another version of {program}, or is another file")
                } else {
                    format!("it is not one of {program}'s files")
                },
            );
        }
        Ok(Some(body))
    }

    fn header(&self, kind: &str, body: &[u8]) -> String {
        let Self { program, prefix, version } = self;
        let hash = hex(digest::digest(&digest::SHA256, body).as_ref());
        format!("{prefix}{program} {kind} {version} sha256:{hash}\n")
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const FORMAT: Format = Format { program: "muster-test", prefix: "# ", version: 1 };

    #[test]
    fn a_document_is_read_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/state");
        assert!(FORMAT.read(&path, "state").unwrap().is_none());
        FORMAT.write(&path, "state", b"one\ntwo").unwrap();
        assert_eq!(**FORMAT.read(&path, "state").unwrap().unwrap(), *b"one\ntwo");
        // The format is for ever: this is how it looks.
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("# muster-test state 1 sha256:21066d10") && text.ends_with("\none\ntwo"),
            "{text}"
        );
    }

    #[test]
    fn every_damage_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        FORMAT.write(&path, "state", b"a = \"secret\"\nb = 2\n").unwrap();
        let good = fs::read(&path).unwrap();
        let cut = (0..good.len()).map(|n| good[..n].to_vec());
        let flipped = (0..good.len()).map(|n| {
            let mut octets = good.clone();
            octets[n] ^= 1;
            octets
        });
        for case in cut.chain(flipped) {
            fs::write(&path, &case).unwrap();
            let error = FORMAT.read(&path, "state").unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
        fs::write(&path, &good).unwrap();
        for (format, kind, part) in [
            (FORMAT, "other", "another file"),
            (Format { version: 2, ..FORMAT }, "state", "another version of muster-test"),
            (Format { program: "muster-other", ..FORMAT }, "state", "not one of muster-other's files"),
        ] {
            let error = format.read(&path, kind).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
