//! Who this director is, and what of joining is its own. How it joins and keeps that is in `muster_enrollment`.

use std::{fmt, path::Path};

use muster_common::{
    file::Format,
    identity,
    name::{Label, NameError},
};
use muster_enrollment::{Certified, Encoding, Journal, KeyError, Party, Store, Words, pem};
use muster_proto::enrollment::EnrollResponse;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// A director, as a party that joins.
#[derive(Debug)]
pub struct Director;

/// The state directory.
pub type State = Store<Director>;

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

impl muster_enrollment::Identity for Identity {
    fn certified(&self) -> Certified<'_> {
        let Self { network, director_uid: uid, name, certificate_chain, tls_key, roots, .. } = self;
        Certified { network, uid, name, certificate_chain, tls_key, roots }
    }

    fn certificate(&mut self) -> (&mut String, &mut String) {
        (&mut self.certificate_chain, &mut self.tls_key)
    }
}

impl Party for Director {
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
        Ok(name)
    }

    fn new_further_keys() -> Result<String, KeyError> {
        Ok(String::new())
    }

    fn identity(registrar: &str, journal: &Journal, answer: EnrollResponse) -> Identity {
        Identity {
            network: answer.network,
            director_uid: answer.director_uid,
            name: answer.name,
            registrar: registrar.to_owned(),
            registrars: Vec::new(),
            certificate_chain: pem(&answer.certificate_chain),
            tls_key: journal.tls_key.clone(),
            roots: pem(&answer.roots),
        }
    }

    fn of_certificate(party: &identity::Party) -> Option<(&str, &str)> {
        match party {
            identity::Party::Director { network, uid } => Some((network.as_str(), uid.as_str())),
            _ => None,
        }
    }

    fn joined_already(name: &str, path: &Path) -> String {
        format!(
            "for a second one, give it a state_dir and ports of its own; to replace it, delete it with `muster delete director {name}`, and remove {}",
            path.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use muster_common::tls::SpkiHash;
    use muster_enrollment::{Join, join};

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
    fn the_file_stays_as_it_is() {
        let (_directory, state) = state();
        state.set_identity(&identity()).unwrap();
        let path = state.directory().join("identity");
        let text = fs::read_to_string(&path).unwrap();
        let (first, body) = text.split_once('\n').unwrap();
        assert!(first.starts_with("# muster-director identity 1 sha256:"), "{first}");
        let keys: Vec<_> =
            body.lines().filter_map(|line| line.split_once(" = ")).map(|(key, _)| key).collect();
        assert_eq!(keys[..5], ["network", "director_uid", "name", "registrar", "registrars"]);
        assert_eq!(state.identity().unwrap(), identity());
        let error = state.check_not_joined().unwrap_err().to_string();
        assert!(error.contains("relay-1") && error.contains("muster delete director relay-1"), "{error}");
    }

    #[test]
    fn every_damage_is_an_error_that_shows_no_secret() {
        let (_directory, state) = state();
        state.set_identity(&identity()).unwrap();
        let path = state.directory().join("identity");
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

    #[tokio::test]
    async fn names_are_checked_before_anything_is_sent() {
        let (_directory, state) = state();
        for name in ["-bad-", "a.b", &"x".repeat(64)] {
            let request = Join {
                registrar: "127.0.0.1:1".into(),
                token: "t".into(),
                ca_hash: SpkiHash::of_spki(b"ca"),
                name: name.into(),
            };
            let error = join(&state, &request).await.unwrap_err().to_string();
            assert!(error.contains("not a valid name") && error.contains("--name"), "{error}");
        }
        assert!(!state.directory().exists(), "nothing was made");
    }

    #[test]
    fn secrets_are_not_printed() {
        assert_eq!(format!("{:?}", identity()), "Identity(net/d-1)");
    }
}
