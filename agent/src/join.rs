//! Devices as parties that join: what is their own in it. How they join is in `muster_enrollment`.

use std::path::Path;

use base64::{Engine, prelude::BASE64_STANDARD};
use muster_common::{
    file::Format,
    identity,
    name::{Label, NameError},
};
use muster_enrollment::{Encoding, Journal, KeyError, Party, Words, pem};
use muster_proto::enrollment::EnrollResponse;

use crate::{keys, state::Identity};

/// A device.
#[derive(Debug)]
pub struct Device;

impl Party for Device {
    const WORDS: &'static Words = &Words {
        kind: "device",
        other: "director",
        program: "agent",
        who: "this host",
        create_token: "muster create token",
    };
    const FORMAT: Format = Format { program: "muster-agent", prefix: "", version: 1 };
    const ENCODING: Encoding = Encoding::Json;
    type Identity = Identity;

    fn check_name(name: Label) -> Result<Label, NameError> {
        // It becomes a name in DNS.
        name.for_device()
    }

    fn new_further_keys() -> Result<String, KeyError> {
        Ok(BASE64_STANDARD.encode(keys::new_wireguard_key()?.as_ref()))
    }

    fn identity(registrar: &str, journal: &Journal, answer: EnrollResponse) -> Identity {
        Identity {
            network: answer.network,
            domain: answer.domain,
            device_uid: answer.device_uid,
            name: answer.name,
            namespace: answer.namespace,
            registrar: registrar.to_owned(),
            certificate_chain: pem(&answer.certificate_chain),
            tls_key: journal.tls_key.clone(),
            roots: pem(&answer.roots),
            wireguard_key: journal.wireguard_key.clone(),
        }
    }

    fn of_certificate(party: &identity::Party) -> Option<(&str, &str)> {
        match party {
            identity::Party::Device { network, uid } => Some((network.as_str(), uid.as_str())),
            _ => None,
        }
    }

    fn joined_already(_: &str, _: &Path) -> String {
        "to join again, first run `muster-agent leave`".into()
    }
}

#[cfg(test)]
mod tests {
    use muster_common::tls::SpkiHash;
    use muster_enrollment::{Join, join};

    use crate::state::State;

    #[tokio::test]
    async fn names_are_checked_before_anything_is_sent() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(&directory.path().join("agent"));
        for (name, part) in [("svc", "reserved"), ("-bad-", "not a valid name"), ("a.b", "not a valid name")]
        {
            let request = Join {
                registrar: "127.0.0.1:1".into(),
                token: "t".into(),
                ca_hash: SpkiHash::of_spki(b"ca"),
                name: name.into(),
            };
            let error = join(&state, &request).await.unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("--name"), "{error}");
        }
        assert!(!state.directory().exists(), "nothing was made");
    }
}
