//! What the agent keeps on disk so that it comes up without a registrar: one file a kind, mode 0600, replaced
//! as a whole, with a version and a checksum. A damaged file is set aside and reported; only the identity is
//! indispensable.

mod identity;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use aws_lc_rs::digest;
use base64::{Engine, prelude::BASE64_STANDARD};
use muster_common::{
    file::{self, FileError},
    time::Timestamp,
};
use muster_proto::registration::{DeviceConfig, Peer};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use zeroize::Zeroizing;

pub use identity::{Identity, Journal, pem};

/// Version of the files' contents.
const VERSION: u32 = 1;

/// Why state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no identity.
    #[error(
        "this host has not joined a network: there is no identity in {}\nremedy: run the join command that `muster create token` prints on the operator's machine",
        .0.display()
    )]
    NotJoined(PathBuf),
    /// There is an identity already.
    #[error(
        "this host has already joined network {network} as {name}; nothing was changed\nremedy: to join again, first run `muster-agent leave`"
    )]
    AlreadyJoined {
        /// Name of the network.
        network: String,
        /// Name of the device.
        name: String,
    },
    /// The identity cannot be used.
    #[error(
        "cannot use the device's identity in {}: {reason}\nremedy: restore the file from a backup, or move it away and join again with a new token", path.display()
    )]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process holds the state directory.
    #[error(
        "another muster-agent{} uses the state directory {}\nremedy: stop it first (systemctl stop muster-agent), or configure another state_dir", owner(pid), directory.display()
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

/// The peers held, and the session revision up to which they are right.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    /// Of the last bookmark.
    pub revision: u64,
    /// As the registrar described them.
    pub peers: Vec<Peer>,
}

/// The kinds of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Identity,
    Journal,
    Config,
    Peers,
    Names,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Identity, Self::Journal, Self::Config, Self::Peers, Self::Names];

    const fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Journal => "joining",
            Self::Config => "config",
            Self::Peers => "peers",
            Self::Names => "names",
        }
    }
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct State {
    directory: PathBuf,
}

/// Keeps other agents away from a state directory until it is dropped.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock lasts as long as the file is open")] File);

impl State {
    /// The state in `directory`, which need not exist.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Takes the directory for this process; creates it if it is missing.
    pub fn lock(&self) -> Result<Lock, StateError> {
        file::create_private_dir(&self.directory)?;
        let path = self.directory.join("lock");
        let error = |source: io::Error| FileError::new("lock", &path, source);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(error)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = Read::take(&lock, 20).read_to_string(&mut pid);
                return Err(StateError::InUse {
                    directory: self.directory.clone(),
                    pid: pid.trim().to_owned(),
                });
            }
            Err(errno) => return Err(error(errno.into()).into()),
        }
        lock.set_len(0).map_err(error)?;
        writeln!(lock, "{}", std::process::id()).map_err(error)?;
        Ok(Lock(lock))
    }

    /// The device's identity.
    pub fn identity(&self) -> Result<Identity, StateError> {
        let path = self.path(Kind::Identity);
        match self.read(Kind::Identity) {
            Ok(Some(identity)) => Ok(identity),
            Ok(None) => Err(StateError::NotJoined(self.directory.clone())),
            Err(ReadError::File(error)) => Err(error.into()),
            Err(ReadError::Damaged(reason)) => Err(StateError::Identity { path, reason }),
        }
    }

    /// Fails if there is an identity, or one that cannot be read.
    pub fn check_not_joined(&self) -> Result<(), StateError> {
        match self.identity() {
            Ok(identity) => Err(StateError::AlreadyJoined {
                network: identity.network.clone(),
                name: identity.name.clone(),
            }),
            Err(StateError::NotJoined(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Stores the identity.
    pub fn set_identity(&self, identity: &Identity) -> Result<(), StateError> {
        self.write(Kind::Identity, identity)
    }

    /// The join under way, if there is one.
    pub fn journal(&self) -> Option<Journal> {
        self.read_or_set_aside(Kind::Journal)
    }

    /// Stores the keys of a join under way.
    pub fn set_journal(&self, journal: &Journal) -> Result<(), StateError> {
        self.write(Kind::Journal, journal)
    }

    /// Forgets the join under way.
    pub fn remove_journal(&self) -> Result<(), StateError> {
        Ok(remove(&self.path(Kind::Journal))?)
    }

    /// What the registrar decided last.
    pub fn config(&self) -> Option<DeviceConfig> {
        self.read_or_set_aside(Kind::Config)
    }

    /// Stores what the registrar decided.
    pub fn set_config(&self, config: &DeviceConfig) -> Result<(), StateError> {
        self.write(Kind::Config, config)
    }

    /// The peers held last.
    pub fn peers(&self) -> Peers {
        self.read_or_set_aside(Kind::Peers).unwrap_or_default()
    }

    /// Stores the peers held.
    pub fn set_peers(&self, peers: &Peers) -> Result<(), StateError> {
        self.write(Kind::Peers, peers)
    }

    /// The resolver's cache as it was, in the resolver's own encoding.
    pub fn names(&self) -> Option<Vec<u8>> {
        let text: String = self.read_or_set_aside(Kind::Names)?;
        BASE64_STANDARD.decode(text).ok()
    }

    /// Stores the resolver's cache.
    pub fn set_names(&self, names: &[u8]) -> Result<(), StateError> {
        self.write(Kind::Names, &BASE64_STANDARD.encode(names))
    }

    /// Removes everything, also what had been set aside: the host has left.
    pub fn remove(&self) -> Result<(), StateError> {
        for kind in Kind::ALL {
            remove(&self.path(kind))?;
        }
        let error = |source| FileError::new("list", &self.directory, source);
        let entries = match fs::read_dir(&self.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(error)?,
        };
        for entry in entries {
            let entry = entry.map_err(error)?;
            if entry.file_name().to_string_lossy().contains(".corrupt-") {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn path(&self, kind: Kind) -> PathBuf {
        self.directory.join(kind.name())
    }

    fn write<T: Serialize>(&self, kind: Kind, value: &T) -> Result<(), StateError> {
        let path = self.path(kind);
        let encode = |e: serde_json::Error| FileError::new("encode", &path, io::Error::other(e));
        let body = Zeroizing::new(serde_json::to_vec_pretty(value).map_err(encode)?);
        let mut contents = Zeroizing::new(header(kind, VERSION, &body).into_bytes());
        contents.extend_from_slice(&body);
        Ok(file::write_private(&path, &contents)?)
    }

    fn read<T: DeserializeOwned>(&self, kind: Kind) -> Result<Option<T>, ReadError> {
        let contents = match file::read(&self.path(kind)) {
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
        if first != header(kind, VERSION, body).as_bytes() {
            let ours = format!("muster-agent {} {VERSION} ", kind.name());
            return Err(damaged(if first.starts_with(ours.as_bytes()) {
                "its checksum does not match: it is damaged or was edited"
            } else if first.starts_with(b"muster-agent ") {
                "it was written by another version of muster-agent, or is another file"
            } else {
                "it is not one of muster-agent's files"
            }));
        }
        serde_json::from_slice(body).map(Some).map_err(|e| ReadError::Damaged(e.to_string()))
    }

    /// For what the agent can do without.
    fn read_or_set_aside<T: DeserializeOwned>(&self, kind: Kind) -> Option<T> {
        let path = self.path(kind);
        match self.read(kind) {
            Ok(value) => value,
            Err(ReadError::File(error)) => {
                tracing::warn!(%error, "going on without this file");
                None
            }
            Err(ReadError::Damaged(reason)) => {
                let aside = path.with_extension(format!("corrupt-{}", Timestamp::now().unix_seconds()));
                let renamed = fs::rename(&path, &aside);
                tracing::warn!(
                    path = %path.display(), %reason, set_aside = %aside.display(),
                    error = renamed.err().map(tracing::field::display),
                    "a state file cannot be used: set it aside and go on without it"
                );
                None
            }
        }
    }
}

enum ReadError {
    File(FileError),
    Damaged(String),
}

fn header(kind: Kind, version: u32, body: &[u8]) -> String {
    let hash = digest::digest(&digest::SHA256, body);
    format!("muster-agent {} {version} sha256:{}\n", kind.name(), hex(hash.as_ref()))
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", path, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn state() -> (tempfile::TempDir, State) {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(&directory.path().join("agent"));
        (directory, state)
    }

    fn peers() -> Peers {
        let peer = Peer { device_uid: "d-1".into(), name: "web".into(), ..Peer::default() };
        Peers { revision: 7, peers: vec![peer] }
    }

    fn identity() -> Identity {
        Identity {
            network: "net".into(),
            domain: "net.example".into(),
            device_uid: "d-1".into(),
            name: "web".into(),
            namespace: "default".into(),
            registrar: "r:7500".into(),
            certificate_chain: String::new(),
            tls_key: String::new(),
            roots: String::new(),
            wireguard_key: BASE64_STANDARD.encode([7; 32]),
        }
    }

    #[test]
    fn what_is_written_is_read_and_is_private() {
        let (_directory, state) = state();
        assert_eq!(state.peers(), Peers::default());
        state.set_peers(&peers()).unwrap();
        assert_eq!(state.peers(), peers());
        let config =
            DeviceConfig { name: "web".into(), routes: vec!["100.64.0.0/11".into()], ..Default::default() };
        state.set_config(&config).unwrap();
        assert_eq!(state.config(), Some(config));
        state.set_names(b"\0names").unwrap();
        assert_eq!(state.names().unwrap(), b"\0names");
        state.set_identity(&identity()).unwrap();
        assert_eq!(state.identity().unwrap().wireguard_private_key().unwrap(), Zeroizing::new([7; 32]));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state.path(Kind::Identity)), 0o600);
        assert_eq!(mode(&state.directory), 0o700);
        state.remove().unwrap();
        assert!(matches!(state.identity(), Err(StateError::NotJoined(_))));
        assert_eq!(fs::read_dir(&state.directory).unwrap().count(), 0);
    }

    #[test]
    fn every_damage_is_noticed_and_set_aside() {
        let (_directory, state) = state();
        state.set_peers(&peers()).unwrap();
        let path = state.path(Kind::Peers);
        let good = fs::read(&path).unwrap();
        let mut cases: Vec<Vec<u8>> = (0..good.len()).step_by(7).map(|n| good[..n].to_vec()).collect();
        for position in (0..good.len()).step_by(5) {
            let mut flipped = good.clone();
            flipped[position] ^= 1;
            cases.push(flipped);
        }
        for case in cases {
            fs::write(&path, &case).unwrap();
            assert_eq!(state.peers(), Peers::default(), "{}", String::from_utf8_lossy(&case));
            assert!(!path.exists());
        }
        let aside = fs::read_dir(&state.directory).unwrap().filter_map(Result::ok);
        assert!(aside.map(|e| e.file_name().into_string().unwrap()).all(|n| n.starts_with("peers.corrupt-")));
        state.remove().unwrap();
        assert_eq!(fs::read_dir(&state.directory).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_identity_is_an_error_and_stays() {
        let (_directory, state) = state();
        state.set_identity(&identity()).unwrap();
        assert!(matches!(state.check_not_joined(), Err(StateError::AlreadyJoined { .. })));
        let path = state.path(Kind::Identity);
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate(bytes.len() - 3);
        fs::write(&path, &bytes).unwrap();
        let error = state.identity().unwrap_err().to_string();
        assert!(error.contains("checksum") && error.contains("remedy"), "{error}");
        assert!(path.exists());
        // Nor is it joined over.
        assert!(state.check_not_joined().is_err());
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
