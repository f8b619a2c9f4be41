//! What the agent keeps on disk so that it comes up without a registrar: beside the identity, what it was told last. A
//! damaged file is set aside and reported; only the identity is indispensable.

mod identity;

use std::{ops::Deref, path::Path};

use base64::{Engine, prelude::BASE64_STANDARD};
use muster_enrollment::Store;
use muster_proto::registration::{DeviceConfig, Peer};
use serde::{Deserialize, Serialize};

use crate::join::Device;

pub use identity::Identity;
pub use muster_enrollment::{Lock, StateError, pem};

/// Kinds of file.
const CONFIG: &str = "config";
const PEERS: &str = "peers";
const NAMES: &str = "names";
const VIRTUAL_SERVICES: &str = "virtual-services";

/// The peers held, and the session revision up to which they are right.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    /// Of the registrar's store, whose revisions these are.
    #[serde(default)]
    pub epoch: u64,
    /// Of the last bookmark.
    pub revision: u64,
    /// As the registrar described them.
    pub peers: Vec<Peer>,
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct State(Store<Device>);

impl Deref for State {
    type Target = Store<Device>;

    fn deref(&self) -> &Store<Device> {
        &self.0
    }
}

impl State {
    /// The state in `directory`, which need not exist.
    pub fn new(directory: &Path) -> Self {
        Self(Store::new(directory))
    }

    /// What the registrar decided last.
    pub fn config(&self) -> Option<DeviceConfig> {
        self.read_or_set_aside(CONFIG)
    }

    /// Stores what the registrar decided.
    pub fn set_config(&self, config: &DeviceConfig) -> Result<(), StateError> {
        self.write(CONFIG, config)
    }

    /// The peers held last.
    pub fn peers(&self) -> Peers {
        self.read_or_set_aside(PEERS).unwrap_or_default()
    }

    /// Stores the peers held.
    pub fn set_peers(&self, peers: &Peers) -> Result<(), StateError> {
        self.write(PEERS, peers)
    }

    /// The resolver's cache as it was, in the resolver's own encoding.
    pub fn names(&self) -> Option<Vec<u8>> {
        self.bytes(NAMES)
    }

    /// Stores the resolver's cache.
    pub fn set_names(&self, names: &[u8]) -> Result<(), StateError> {
        self.set_bytes(NAMES, names)
    }

    /// The Services that have virtual IPs, in the registrar's own encoding.
    pub fn virtual_services(&self) -> Option<Vec<u8>> {
        self.bytes(VIRTUAL_SERVICES)
    }

    /// Stores the Services that have virtual IPs.
    pub fn set_virtual_services(&self, services: &[u8]) -> Result<(), StateError> {
        self.set_bytes(VIRTUAL_SERVICES, services)
    }

    fn bytes(&self, kind: &str) -> Option<Vec<u8>> {
        let text: String = self.read_or_set_aside(kind)?;
        BASE64_STANDARD.decode(text).ok()
    }

    fn set_bytes(&self, kind: &str, bytes: &[u8]) -> Result<(), StateError> {
        self.write(kind, &BASE64_STANDARD.encode(bytes))
    }

    /// Removes everything, also what had been set aside: the host has left.
    pub fn remove(&self) -> Result<(), StateError> {
        self.remove_all(&[CONFIG, PEERS, NAMES, VIRTUAL_SERVICES])
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use zeroize::Zeroizing;

    use super::*;

    fn state() -> (tempfile::TempDir, State) {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(&directory.path().join("agent"));
        (directory, state)
    }

    fn peers() -> Peers {
        let peer = Peer { device_uid: "d-1".into(), name: "web".into(), ..Peer::default() };
        Peers { epoch: 3, revision: 7, peers: vec![peer] }
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
        let text = fs::read_to_string(state.directory().join(PEERS)).unwrap();
        assert!(
            text.starts_with("muster-agent peers 1 sha256:")
                && text.contains("\n{\n  \"epoch\": 3,\n  \"revision\": 7,"),
            "{text}"
        );
        let config =
            DeviceConfig { name: "web".into(), routes: vec!["100.64.0.0/11".into()], ..Default::default() };
        state.set_config(&config).unwrap();
        assert_eq!(state.config(), Some(config));
        state.set_names(b"\0names").unwrap();
        assert_eq!(state.names().unwrap(), b"\0names");
        state.set_identity(&identity()).unwrap();
        assert_eq!(state.identity().unwrap().wireguard_private_key().unwrap(), Zeroizing::new([7; 32]));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state.directory().join("identity")), 0o600);
        assert_eq!(mode(state.directory()), 0o700);
        state.remove().unwrap();
        assert!(matches!(state.identity(), Err(StateError::NotJoined { .. })));
        assert_eq!(fs::read_dir(state.directory()).unwrap().count(), 0);
    }

    #[test]
    fn every_damage_is_noticed_and_set_aside() {
        let (_directory, state) = state();
        state.set_peers(&peers()).unwrap();
        let path = state.directory().join(PEERS);
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
        let aside = fs::read_dir(state.directory()).unwrap().filter_map(Result::ok);
        assert!(aside.map(|e| e.file_name().into_string().unwrap()).all(|n| n.starts_with("peers.corrupt-")));
        state.remove().unwrap();
        assert_eq!(fs::read_dir(state.directory()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_identity_is_an_error_and_stays() {
        let (_directory, state) = state();
        state.set_identity(&identity()).unwrap();
        assert!(matches!(state.check_not_joined(), Err(StateError::AlreadyJoined { .. })));
        let path = state.directory().join("identity");
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
