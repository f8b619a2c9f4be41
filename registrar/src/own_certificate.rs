//! The registrar's own certificate: `registrar.pem` in the data directory, chain and key in one file. The registrar
//! is the CA, and so it issues and renews it by itself.

use std::{path::Path, time::Duration};

use muster_common::{
    file,
    identity::{Party, SpiffeId},
    name::Label,
    time::Timestamp,
    tls::{KeyPair, TlsError, certificate_validity},
};
use zeroize::Zeroizing;

use crate::ca::{Ca, CaError};

/// Name of the file in the data directory.
pub const FILE: &str = "registrar.pem";

/// Reads the certificate at `path`.
///
/// # Errors
/// If there is none, or it cannot be used.
pub fn load(path: &Path) -> Result<KeyPair, CaError> {
    let pem = Zeroizing::new(file::read(path)?);
    Ok(KeyPair::from_pem(&path.display().to_string(), &pem)?)
}

/// Issues a new certificate and writes it to `path`. The registrar keeps the identity that it has in `old`.
///
/// # Errors
/// If it cannot be made or written.
pub fn issue(
    path: &Path,
    ca: &Ca,
    trust_domain: &str,
    old: Option<&KeyPair>,
    lifetime: Duration,
    now: Timestamp,
) -> Result<KeyPair, CaError> {
    let identity = match old.map(KeyPair::identity) {
        Some(Ok(identity)) if identity.trust_domain == trust_domain => identity,
        _ => SpiffeId::new(trust_domain, Party::Registrar { uid: random_uid()? }),
    };
    let issued = ca.issue_new(&identity, now, lifetime)?;
    let pem = Zeroizing::new(format!("{}{}", issued.chain, *issued.key));
    file::write_private(path, pem.as_bytes())?;
    load(path)
}

/// Whether a new certificate is due: two thirds of its life are over, the clock is before its time, or the CA's root
/// is another one by now.
///
/// # Errors
/// If the certificate cannot be read.
pub fn is_due(pair: &KeyPair, ca: &Ca, now: Timestamp) -> Result<bool, TlsError> {
    let Some((own, chain)) = pair.chain.split_first() else { return Ok(true) };
    let (from, to) = certificate_validity(own)?;
    let renew = from + to.saturating_duration_since(from) * 2 / 3;
    Ok(chain != ca.chain() || now < from || now >= renew)
}

fn random_uid() -> Result<Label, TlsError> {
    let uid = uuid::Builder::from_random_bytes(rand::random()).into_uuid().to_string();
    uid.parse().map_err(|error| TlsError::Certificate(format!("{error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::rotation;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    #[test]
    fn certificates_are_renewed_in_time_and_keep_the_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let now = Timestamp::now();
        let ca = Ca::create(dir.path(), "muster.test", now).unwrap();
        assert!(load(&path).is_err());
        let first = issue(&path, &ca, "muster.test", None, 30 * DAY, now).unwrap();
        let due = |pair, at| is_due(pair, &ca, at).unwrap();
        assert!(!due(&first, now));
        assert!(!due(&first, now + 19 * DAY));
        assert!(due(&first, now + 20 * DAY));
        assert!(due(&first, now.saturating_sub(DAY)));
        let second = issue(&path, &ca, "muster.test", Some(&first), 30 * DAY, now + 20 * DAY).unwrap();
        assert_eq!(second.identity().unwrap(), first.identity().unwrap());
        assert_eq!(load(&path).unwrap().chain, second.chain);
        assert!(!due(&second, now + 21 * DAY));

        // A new root is not waited for.
        rotation::prepare(dir.path(), "muster.test", now).unwrap();
        rotation::activate(dir.path()).unwrap();
        assert!(is_due(&second, &Ca::load(dir.path()).unwrap(), now + 21 * DAY).unwrap());
    }
}
