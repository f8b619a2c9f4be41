//! What the director keeps on disk: who it is, with its certificate and key, and the keys of a join under way. Files of
//! mode 0600, replaced as a whole, with a checksum.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use aws_lc_rs::digest;
use muster_common::{
    file::{self, FileError},
    tls::{KeyPair, TlsError, certificates_from_pem, certificates_to_pem},
};
use rustix::fs::{FlockOperation, flock};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Names of the files in the state directory.
const IDENTITY: &str = "identity";
const JOURNAL: &str = "joining";
const LOCK: &str = "lock";

/// Why state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no identity.
    #[error(
        "this host's director has not joined a network: there is no identity in {}\nremedy: run the join command that `muster create token --director` prints on the operator's machine",
        .0.display()
    )]
    NotJoined(PathBuf),
    /// There is an identity already.
    #[error(
        "this host's director has already joined network {network} as {name}; nothing was changed\nremedy: for a second one, give it a state_dir and ports of its own; to replace it, delete it with `muster delete director {name}`, and remove {}", path.display()
    )]
    AlreadyJoined {
        /// Name of the network.
        network: String,
        /// Name of the director.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// The identity cannot be used.
    #[error(
        "cannot use the director's identity in {}: {reason}\nremedy: restore the file from a backup, or move it away and join again with a new token", path.display()
    )]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process holds the state directory.
    #[error(
        "another muster-director{} uses the state directory {}\nremedy: stop it first (systemctl stop muster-director), or configure another state_dir", owner(pid), directory.display()
    )]
    InUse {
        /// The state directory.
        directory: PathBuf,
        /// Its process, as far as it is known.
        pid: String,
    },
}

fn owner(pid: &str) -> String {
    if pid.is_empty() { String::new() } else { format!(" (process {pid})") }
}

/// Who this director is, with its secrets.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Name of the network.
    pub network: String,
    /// Assigned by the registrar.
    pub director_uid: String,
    /// The director's name.
    pub name: String,
    /// `HOST:PORT` of the registrar that the director joined through.
    pub registrar: String,
    /// `HOST:PORT` of the registrars that it was told of last.
    pub registrars: Vec<String>,
    /// PEM, the director's own certificate first.
    pub certificate_chain: String,
    /// PEM, PKCS#8.
    pub tls_key: String,
    /// PEM.
    pub roots: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}/{})", self.network, self.director_uid)
    }
}

impl Identity {
    /// Certificate and TLS key.
    ///
    /// # Errors
    /// They are not PEM.
    pub fn key_pair(&self) -> Result<KeyPair, TlsError> {
        let pem = Zeroizing::new(format!("{}{}", self.certificate_chain, self.tls_key));
        KeyPair::from_pem("the director's certificate and key", pem.as_bytes())
    }

    /// The roots to trust.
    ///
    /// # Errors
    /// They are not PEM.
    pub fn root_certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates_from_pem("the roots", self.roots.as_bytes())
    }

    /// Replaces the certificate and its key.
    pub fn set_key_pair(&mut self, chain: &[Vec<u8>], tls_key: &str) {
        self.tls_key.zeroize();
        self.certificate_chain = pem(chain);
        tls_key.clone_into(&mut self.tls_key);
    }
}

/// DER certificates as PEM.
pub fn pem(certificates: &[Vec<u8>]) -> String {
    let certificates: Vec<_> =
        certificates.iter().map(|certificate| CertificateDer::from(certificate.as_slice())).collect();
    certificates_to_pem(&certificates)
}

/// The key of a join under way, written before the registrar is asked: if the answer gets lost, the same key is used
/// again, and the token counts once.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    /// Hexadecimal SHA-256 of token, name and CA hash: the key serves this join alone.
    pub purpose: String,
    /// PEM, PKCS#8.
    pub tls_key: String,
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct State {
    directory: PathBuf,
}

/// Keeps other directors away from a state directory until it is dropped.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock lasts as long as the file is open")] File);

impl State {
    /// The state in `directory`, which need not exist.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Takes the directory for this process; creates it if it is missing.
    ///
    /// # Errors
    /// Another process has it, or the system refuses.
    pub fn lock(&self) -> Result<Lock, StateError> {
        file::create_private_dir(&self.directory)?;
        let path = self.directory.join(LOCK);
        let error = |source: io::Error| FileError::new("lock", &path, source);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(error)?;
        // Root, who joins, may come before the service's own user.
        file::adopt(&path)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = Read::take(&lock, 20).read_to_string(&mut pid);
                let directory = self.directory.clone();
                return Err(StateError::InUse { directory, pid: pid.trim().to_owned() });
            }
            Err(errno) => return Err(error(errno.into()).into()),
        }
        lock.set_len(0).map_err(error)?;
        writeln!(lock, "{}", std::process::id()).map_err(error)?;
        Ok(Lock(lock))
    }

    /// The director's identity.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn identity(&self) -> Result<Identity, StateError> {
        let path = self.directory.join(IDENTITY);
        match read(&path, IDENTITY) {
            Ok(Some(identity)) => Ok(identity),
            Ok(None) => Err(StateError::NotJoined(self.directory.clone())),
            Err(ReadError::File(error)) => Err(error.into()),
            Err(ReadError::Damaged(reason)) => Err(StateError::Identity { path, reason }),
        }
    }

    /// Fails if there is an identity, or one that cannot be read.
    ///
    /// # Errors
    /// Which of these.
    pub fn check_not_joined(&self) -> Result<(), StateError> {
        match self.identity() {
            Ok(identity) => Err(StateError::AlreadyJoined {
                network: identity.network.clone(),
                name: identity.name.clone(),
                path: self.directory.join(IDENTITY),
            }),
            Err(StateError::NotJoined(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Stores the identity.
    ///
    /// # Errors
    /// The system refuses; the identity is as it was then.
    pub fn set_identity(&self, identity: &Identity) -> Result<(), StateError> {
        Ok(write(&self.directory.join(IDENTITY), IDENTITY, identity)?)
    }

    /// The join under way, if there is one. One that cannot be read is none: a new key is made.
    pub fn journal(&self) -> Option<Journal> {
        let path = self.directory.join(JOURNAL);
        match read(&path, JOURNAL) {
            Ok(journal) => journal,
            Err(ReadError::File(error)) => {
                tracing::warn!(%error, "going on without this file");
                None
            }
            Err(ReadError::Damaged(reason)) => {
                tracing::warn!(path = %path.display(), reason, "going on without this file");
                None
            }
        }
    }

    /// Stores the key of a join under way.
    ///
    /// # Errors
    /// The system refuses.
    pub fn set_journal(&self, journal: &Journal) -> Result<(), StateError> {
        Ok(write(&self.directory.join(JOURNAL), JOURNAL, journal)?)
    }

    /// Forgets the join under way.
    ///
    /// # Errors
    /// The system refuses.
    pub fn remove_journal(&self) -> Result<(), StateError> {
        let path = self.directory.join(JOURNAL);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(FileError::new("remove", &path, error).into())
            }
            _ => Ok(()),
        }
    }
}

enum ReadError {
    File(FileError),
    Damaged(String),
}

fn write<T: Serialize>(path: &Path, kind: &str, value: &T) -> Result<(), FileError> {
    let encode = |e: toml::ser::Error| FileError::new("encode", path, io::Error::other(e));
    let body = Zeroizing::new(toml::to_string_pretty(value).map_err(encode)?);
    let contents = Zeroizing::new(format!("{}{}", header(kind, body.as_bytes()), body.as_str()));
    file::write_private(path, contents.as_bytes())
}

fn read<T: DeserializeOwned>(path: &Path, kind: &str) -> Result<Option<T>, ReadError> {
    let contents = match file::read(path) {
        Ok(contents) => Zeroizing::new(contents),
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ReadError::File(error)),
    };
    let damaged = |reason: &str| ReadError::Damaged(reason.to_owned());
    let end = contents
        .iter()
        .position(|b| *b == b'\n')
        .ok_or_else(|| damaged("it is empty, or cut short in its first line"))?;
    let (first, body) = contents.split_at(end + 1);
    if first != header(kind, body).as_bytes() {
        return Err(damaged(if first.starts_with(format!("# muster-director {kind} 1 ").as_bytes()) {
            "its checksum does not match: it is damaged or was edited"
        } else if first.starts_with(b"# muster-director ") {
            "it was written by another version of muster-director, or is another file"
        } else {
            "it is not one of muster-director's files"
        }));
    }
    let text = std::str::from_utf8(body).map_err(|e| ReadError::Damaged(e.to_string()))?;
    // The error would quote the file, and that holds a key.
    toml::from_str(text).map(Some).map_err(|e| ReadError::Damaged(e.message().to_owned()))
}

fn header(kind: &str, body: &[u8]) -> String {
    let hash = digest::digest(&digest::SHA256, body);
    format!("# muster-director {kind} 1 sha256:{}\n", hex(hash.as_ref()))
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn state() -> (tempfile::TempDir, State) {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(&directory.path().join("director"));
        (directory, state)
    }

    fn identity() -> Identity {
        Identity {
            network: "net".into(),
            director_uid: "d-1".into(),
            name: "relay-1".into(),
            registrar: "r:7500".into(),
            registrars: vec!["r:7500".into(), "s:7500".into()],
            certificate_chain: "chain\n".into(),
            tls_key: "secret\n".into(),
            roots: "roots\n".into(),
        }
    }

    #[test]
    fn what_is_written_is_read_and_is_private() {
        let (_directory, state) = state();
        assert!(matches!(state.identity(), Err(StateError::NotJoined(_))));
        state.check_not_joined().unwrap();
        state.set_identity(&identity()).unwrap();
        assert_eq!(state.identity().unwrap(), identity());
        let path = state.directory.join(IDENTITY);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&state.directory).unwrap().permissions().mode() & 0o777, 0o700);
        let error = state.check_not_joined().unwrap_err().to_string();
        assert!(error.contains("relay-1") && error.contains("remedy"), "{error}");
        let journal = Journal { purpose: "p".into(), tls_key: "k".into() };
        state.set_journal(&journal).unwrap();
        assert_eq!(state.journal().unwrap().tls_key, "k");
        state.remove_journal().unwrap();
        state.remove_journal().unwrap();
        assert!(state.journal().is_none());
    }

    #[test]
    fn a_damaged_identity_is_an_error_and_stays() {
        let (_directory, state) = state();
        state.set_identity(&identity()).unwrap();
        let path = state.directory.join(IDENTITY);
        let good = fs::read(&path).unwrap();
        let mut cases: Vec<Vec<u8>> = (0..good.len()).step_by(7).map(|n| good[..n].to_vec()).collect();
        for position in (0..good.len()).step_by(5) {
            let mut flipped = good.clone();
            flipped[position] ^= 1;
            cases.push(flipped);
        }
        for case in cases {
            fs::write(&path, &case).unwrap();
            let error = state.identity().unwrap_err().to_string();
            assert!(error.contains("remedy") && !error.contains("secret"), "{error}");
            assert!(state.check_not_joined().is_err(), "nor is it joined over");
            assert_eq!(fs::read(&path).unwrap(), case);
        }
    }

    #[test]
    fn a_file_of_another_kind_or_with_other_keys_is_no_identity() {
        let (_directory, state) = state();
        state.set_journal(&Journal { purpose: "p".into(), tls_key: "secret".into() }).unwrap();
        let path = state.directory.join(IDENTITY);
        fs::rename(state.directory.join(JOURNAL), &path).unwrap();
        assert!(state.identity().unwrap_err().to_string().contains("another file"));
        // A correct checksum over something else.
        let body = "tls_key = \"secret\"\n";
        fs::write(&path, format!("{}{body}", header(IDENTITY, body.as_bytes()))).unwrap();
        let error = state.identity().unwrap_err().to_string();
        assert!(error.contains("missing field") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn one_process_at_a_time() {
        let (_directory, state) = state();
        let lock = state.lock().unwrap();
        let error = state.lock().unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        state.lock().unwrap();
    }

    #[test]
    fn secrets_are_not_printed() {
        assert_eq!(format!("{:?}", identity()), "Identity(net/d-1)");
    }
}
