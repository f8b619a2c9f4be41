//! A kind of party for tests, and what its store does.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use muster_common::{
    file::Format,
    identity,
    name::{Label, NameError},
};
use muster_proto::enrollment::EnrollResponse;
use serde::{Deserialize, Serialize};

use crate::{Certified, Encoding, Identity as _, Journal, KeyError, Party, StateError, Store, Words};

/// A party as directors are, that has a further key.
pub(crate) struct Relay;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Identity {
    network: String,
    uid: String,
    name: String,
    certificate_chain: String,
    tls_key: String,
    roots: String,
}

impl crate::Identity for Identity {
    fn certified(&self) -> Certified<'_> {
        let Self { network, uid, name, certificate_chain, tls_key, roots } = self;
        Certified { network, uid, name, certificate_chain, tls_key, roots }
    }

    fn certificate(&mut self) -> (&mut String, &mut String) {
        (&mut self.certificate_chain, &mut self.tls_key)
    }
}

impl Party for Relay {
    const WORDS: &'static Words = &Words {
        kind: "director",
        other: "device",
        program: "director",
        who: "this host's director",
        create_token: "muster create token --director",
    };
    const FORMAT: Format = Format { program: "muster-director", prefix: "# ", version: 1 };
    const ENCODING: Encoding = Encoding::Toml;
    type Identity = Identity;

    fn check_name(name: Label) -> Result<Label, NameError> {
        name.for_device()
    }

    fn new_further_keys() -> Result<String, KeyError> {
        Ok("further".into())
    }

    fn identity(_: &str, journal: &Journal, answer: EnrollResponse) -> Identity {
        Identity {
            network: answer.network,
            uid: answer.director_uid,
            name: answer.name,
            certificate_chain: crate::pem(&answer.certificate_chain),
            tls_key: journal.tls_key.clone(),
            roots: crate::pem(&answer.roots),
        }
    }

    fn of_certificate(party: &identity::Party) -> Option<(&str, &str)> {
        match party {
            identity::Party::Director { network, uid } => Some((network.as_str(), uid.as_str())),
            _ => None,
        }
    }

    fn joined_already(name: &str, path: &Path) -> String {
        format!("delete {name}, and {}", path.display())
    }
}

fn store() -> (tempfile::TempDir, Store<Relay>) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::new(&directory.path().join("director"));
    (directory, store)
}

fn identity() -> Identity {
    Identity {
        network: "net".into(),
        uid: "d-1".into(),
        name: "relay-1".into(),
        certificate_chain: "chain\n".into(),
        tls_key: "secret\n".into(),
        roots: "roots\n".into(),
    }
}

#[test]
fn what_is_written_is_read_and_is_private() {
    let (_directory, store) = store();
    assert!(matches!(store.identity(), Err(StateError::NotJoined { .. })));
    store.check_not_joined().unwrap();
    store.set_identity(&identity()).unwrap();
    assert_eq!(store.identity().unwrap(), identity());
    let path = store.directory().join("identity");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(store.directory()).unwrap().permissions().mode() & 0o777, 0o700);
    let error = store.check_not_joined().unwrap_err().to_string();
    assert!(error.contains("network net as relay-1") && error.contains("remedy: delete relay-1"), "{error}");

    let journal = Journal { purpose: "p".into(), tls_key: "k".into(), wireguard_key: String::new() };
    store.set_journal(&journal).unwrap();
    let text = fs::read_to_string(store.directory().join("joining")).unwrap();
    assert!(!text.contains("wireguard"), "{text}");
    assert_eq!(store.journal().unwrap().tls_key, "k");
    store.remove_journal().unwrap();
    store.remove_journal().unwrap();
    assert!(store.journal().is_none());
    store.remove_all(&["other"]).unwrap();
    assert!(matches!(store.identity(), Err(StateError::NotJoined { .. })));
}

#[test]
fn a_damaged_identity_is_an_error_and_stays_while_others_are_set_aside() {
    let (_directory, store) = store();
    store.set_identity(&identity()).unwrap();
    store.write("other", &identity()).unwrap();
    for kind in ["identity", "other"] {
        let path = store.directory().join(kind);
        let mut octets = fs::read(&path).unwrap();
        octets.truncate(octets.len() - 3);
        fs::write(&path, &octets).unwrap();
    }
    let error = store.identity().unwrap_err().to_string();
    assert!(error.contains("director's identity") && error.contains("checksum"), "{error}");
    assert!(error.contains("remedy") && !error.contains("secret"), "{error}");
    assert!(store.check_not_joined().is_err(), "nor is it joined over");
    assert!(store.directory().join("identity").exists());
    assert!(store.read_or_set_aside::<Identity>("other").is_none());
    let names = fs::read_dir(store.directory()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert!(names[1].starts_with("other.corrupt-") && names.len() == 2, "{names:?}");
    store.remove_all(&[]).unwrap();
    assert_eq!(fs::read_dir(store.directory()).unwrap().count(), 0);
}

#[test]
fn a_file_of_another_kind_or_with_other_keys_is_no_identity() {
    let (_directory, store) = store();
    let path = store.directory().join("identity");
    store.write("joining", &identity()).unwrap();
    fs::rename(store.directory().join("joining"), &path).unwrap();
    assert!(store.identity().unwrap_err().to_string().contains("another file"));
    // A correct checksum over something else.
    Relay::FORMAT.write(&path, "identity", b"tls_key = \"secret\"\n").unwrap();
    let error = store.identity().unwrap_err().to_string();
    assert!(error.contains("missing field") && !error.contains("secret"), "{error}");
}

#[test]
fn one_process_at_a_time() {
    let (_directory, store) = store();
    let lock = store.lock().unwrap();
    let error = store.lock().unwrap_err().to_string();
    assert!(error.contains(&format!("another muster-director (process {})", std::process::id())), "{error}");
    drop(lock);
    store.lock().unwrap();
}

#[test]
fn certificates_are_replaced_with_their_keys() {
    let mut identity = identity();
    identity.set_key_pair(&[b"der".to_vec()], "new");
    assert_eq!(identity.tls_key, "new");
    assert_eq!(identity.certificate_chain, "-----BEGIN CERTIFICATE-----\nZGVy\n-----END CERTIFICATE-----\n");
}
