//! The deployment's certificate authority: one root that issues and, while it is being replaced, further ones that
//! are trusted. [`rotation`] replaces the root; [`SharedCa`] is what a serving registrar holds, and reloads.
//!
//! Files, all with mode 0600, in one directory: `ca.key` issues; `ca.crt` is its certificate; `roots/*.crt` are
//! trusted too; `cross.crt` is the issuing or the next root's key, signed by the root before it; `next.key` waits;
//! `retired/*.crt` are no longer trusted, whatever the store says; `successions/` is what the other registrars need to
//! follow a rotation.

pub mod copy;
mod files;
pub mod rotation;
pub mod succession;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use muster_common::{
    file::{self, FileError, LockError},
    identity::SpiffeId,
    time::Timestamp,
    tls::{SpkiHash, TlsError, certificate_validity},
};
use rand::Rng;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

pub use self::files::{CaFile, is_file_name, read_all, remove_all};
use self::files::{Files, read_certificate, read_key};
use crate::csr::CheckedRequest;

/// How far `notBefore` lies before the moment of issue: a clock may be ten minutes slow, with a margin for the time
/// that it takes to deliver the certificate.
pub const BACKDATE: Duration = Duration::from_secs(15 * 60);
/// Lifetime of a root: long enough that nobody is surprised by its end, and `ca rotate` replaces it at any time.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 60 * 60);

/// The longest common name, in characters (RFC 5280, appendix A.1).
const COMMON_NAME_MAX: usize = 64;

/// Why the CA could not be made, read, or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what it should be.
    #[error("cannot use {}: {reason}; restore the file from a backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file's name cannot be handed on.
    #[error(
        "{} has a name that no file of the CA can have elsewhere; rename it: before .crt, 1 to 128 letters, digits, \
         `-`, `_` and `.`, with no dot at the beginning", .0.display()
    )]
    Name(PathBuf),
    /// The CA's files are there already.
    #[error("there is a CA in {} already; it is left as it is", .0.display())]
    Exists(PathBuf),
    /// The root is not valid at this time.
    #[error(
        "the CA's root certificate is valid from {from} to {to}, and it is {now} by this host's clock; set the \
         clock (timedatectl), or replace the root (muster-registrar ca rotate)"
    )]
    NotValid {
        /// Beginning of its validity.
        from: Timestamp,
        /// End of its validity.
        to: Timestamp,
        /// The time by the clock.
        now: Timestamp,
    },
    /// A certificate cannot be read.
    #[error(transparent)]
    Certificate(#[from] TlsError),
    /// A key or certificate cannot be made.
    #[error("cannot make a key or certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// A step of a rotation at the wrong time.
    #[error(transparent)]
    Rotation(#[from] rotation::RotationError),
    /// The rotation that another registrar has begun cannot be followed.
    #[error("cannot take over the CA's next root from another registrar: {0}")]
    Succession(#[from] succession::SuccessionError),
    /// Another process takes a step of a rotation.
    #[error("cannot change the CA in {}: {source}; try again in a moment", directory.display())]
    Busy {
        /// Where the CA is.
        directory: PathBuf,
        /// Who has it.
        source: LockError,
    },
}

/// The authority at one moment.
#[derive(Debug)]
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    hash: SpkiHash,
    validity: (Timestamp, Timestamp),
    /// What follows a certificate in its chain: the cross-signed root, if there is one, then all roots.
    chain: Vec<CertificateDer<'static>>,
    /// The issuing root first.
    roots: Vec<CertificateDer<'static>>,
    retired: Vec<CertificateDer<'static>>,
}

impl Ca {
    /// Makes a CA for `trust_domain` and writes its files to `directory`, which may exist.
    ///
    /// # Errors
    /// [`CaError::Exists`] if there is one already.
    pub fn create(directory: &Path, trust_domain: &str, now: Timestamp) -> Result<Self, CaError> {
        let files = Files::new(directory);
        if files.exists() {
            return Err(CaError::Exists(directory.to_owned()));
        }
        let (key, certificate) = new_root(trust_domain, now)?;
        file::create_private(&files.certificate(), certificate.pem().as_bytes())?;
        if let Err(error) = file::create_private(&files.key(), key.serialize_pem().as_bytes()) {
            // Nothing half-made stays behind.
            let _ = std::fs::remove_file(files.certificate());
            return Err(error.into());
        }
        Self::load(directory)
    }

    /// Reads the CA from the files in `directory`.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    pub fn load(directory: &Path) -> Result<Self, CaError> {
        let files = Files::new(directory);
        let key = read_key(&files.key())?;
        let hash = SpkiHash::of_spki(&key.subject_public_key_info());

        // The key decides which root issues: it is what a rotation replaces in one step.
        let mut roots = Vec::new();
        for path in [vec![files.certificate()], files.list("roots")?].concat() {
            roots.push(read_certificate(&path)?);
        }
        let mut issuing = None;
        for (position, root) in roots.iter().enumerate() {
            if SpkiHash::of(root)? == hash {
                issuing = Some(position);
            }
        }
        let Some(issuing) = issuing else {
            let reason = "no certificate in ca.crt or roots/ belongs to this key".to_owned();
            return Err(CaError::Damaged { path: files.key(), reason });
        };
        roots[..=issuing].rotate_right(1);
        let mut retired = Vec::new();
        for path in files.list("retired")? {
            retired.push(read_certificate(&path)?);
        }
        // A rotation that was cut off may leave a root in two places, or one that was retired where it was.
        let mut position = 1;
        while position < roots.len() {
            let gone = roots[..position].contains(&roots[position]) || retired.contains(&roots[position]);
            if gone { drop(roots.remove(position)) } else { position += 1 }
        }

        let mut chain = Vec::new();
        if files.cross().exists() {
            let cross = read_certificate(&files.cross())?;
            // Before the next root issues, the chain has no use for it.
            if SpkiHash::of(&cross)? == hash {
                chain.push(cross);
            }
        }
        chain.extend(roots.iter().cloned());
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(&roots[0], key)?,
            hash,
            validity: certificate_validity(&roots[0])?,
            chain,
            roots,
            retired,
        })
    }

    /// Issues a certificate for the key in `request` to `identity`, valid from [`BACKDATE`] before `now` until
    /// `lifetime` after it, but not beyond the root's end. The certificate comes first, followed by what somebody
    /// needs to verify it who trusts, or has pinned, any of the roots.
    ///
    /// # Errors
    /// [`CaError::NotValid`] if the root is not valid now.
    pub fn issue(
        &self,
        request: &CheckedRequest,
        identity: &SpiffeId,
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        self.sign(request.key(), identity, now, lifetime)
    }

    /// As [`Self::issue`], for a key that was made here: returns it with its chain, in PEM.
    ///
    /// # Errors
    /// As [`Self::issue`].
    pub fn issue_new(
        &self,
        identity: &SpiffeId,
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<IssuedPem, CaError> {
        let key = KeyPair::generate()?;
        let chain = self.sign(&key, identity, now, lifetime)?;
        Ok(IssuedPem {
            chain: muster_common::tls::certificates_to_pem(&chain),
            key: key.serialize_pem().into(),
        })
    }

    /// The roots to trust, the issuing one first.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// When the issuing root expires.
    pub fn expiry(&self) -> Timestamp {
        self.validity.1
    }

    /// Former roots, which are not to be trusted any more.
    pub fn retired(&self) -> &[CertificateDer<'static>] {
        &self.retired
    }

    /// What follows the certificate itself in the chains that are issued now.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The hash that `muster-agent join --ca-hash` takes: of the issuing root's public key.
    pub fn hash(&self) -> SpkiHash {
        self.hash
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        identity: &SpiffeId,
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let (from, to) = self.validity;
        if now < from || now >= to {
            return Err(CaError::NotValid { from, to, now });
        }
        let mut params = blank(now.saturating_sub(BACKDATE), (now + lifetime).min(to))?;
        // For people and for tools that cannot do without; the identity is the URI alone.
        let mut name = identity.party.to_string();
        name.truncate(COMMON_NAME_MAX);
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.is_ca = IsCa::ExplicitNoCa;
        let certificate = params.signed_by(key, &self.issuer)?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend(self.chain.iter().cloned());
        Ok(chain)
    }
}

/// A new key with its certificate.
pub struct IssuedPem {
    /// PEM, the certificate itself first.
    pub chain: String,
    /// PKCS#8 in PEM.
    pub key: zeroize::Zeroizing<String>,
}

/// The CA of a serving registrar. It can be reloaded; whoever subscribes learns of changed roots.
#[derive(Debug)]
pub struct SharedCa {
    directory: PathBuf,
    current: ArcSwap<Ca>,
    roots: watch::Sender<Vec<CertificateDer<'static>>>,
}

impl SharedCa {
    /// Reads the CA in `directory`.
    ///
    /// # Errors
    /// As [`Ca::load`].
    pub fn open(directory: &Path) -> Result<Self, CaError> {
        let ca = Ca::load(directory)?;
        let roots = watch::Sender::new(ca.roots.clone());
        Ok(Self { directory: directory.to_owned(), current: ArcSwap::from_pointee(ca), roots })
    }

    /// The CA as it is now.
    pub fn current(&self) -> Arc<Ca> {
        self.current.load_full()
    }

    /// All roots to trust, now and whenever they change. Beside this registrar's own there may be those that another
    /// registrar has put into the store they share.
    pub fn roots(&self) -> watch::Receiver<Vec<CertificateDer<'static>>> {
        self.roots.subscribe()
    }

    /// Reads the files again; says whether anything has changed. After an error, all is as before. The roots change
    /// with [`trust`](Self::trust).
    ///
    /// # Errors
    /// As [`Ca::load`].
    pub fn reload(&self) -> Result<bool, CaError> {
        let ca = Ca::load(&self.directory)?;
        let changed = {
            let current = self.current.load();
            ca.chain != current.chain || ca.retired != current.retired
        };
        if changed {
            self.current.store(Arc::new(ca));
        }
        Ok(changed)
    }

    /// Has the roots of the CA trusted, and those of `stored` that it has not retired; says whether that is a change.
    pub fn trust(&self, stored: &[CertificateDer<'static>]) -> bool {
        let ca = self.current.load();
        let mut all = ca.roots.clone();
        for root in stored {
            if !all.contains(root) && !ca.retired.contains(root) {
                all.push(root.clone());
            }
        }
        self.roots.send_if_modified(|known| {
            let changed = *known != all;
            *known = all;
            changed
        })
    }
}

/// A new root, self-signed. Its name has a random part, since roots of one deployment must have different names.
fn new_root(trust_domain: &str, now: Timestamp) -> Result<(KeyPair, Certificate), CaError> {
    let key = KeyPair::generate()?;
    let mut params = root_params(now.saturating_sub(BACKDATE), now + ROOT_LIFETIME)?;
    let [a, b, c, d, ..] = random::<16>();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Muster CA {trust_domain} {a:02x}{b:02x}{c:02x}{d:02x}"));
    let certificate = params.self_signed(&key)?;
    Ok((key, certificate))
}

/// The parameters of a CA certificate, without a name.
fn root_params(from: Timestamp, to: Timestamp) -> Result<CertificateParams, CaError> {
    let mut params = blank(from, to)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// Parameters with validity and a random serial, and nothing else.
fn blank(from: Timestamp, to: Timestamp) -> Result<CertificateParams, CaError> {
    let time = |at: Timestamp| {
        // Within the range of the type up to the year 9999.
        let seconds = i64::try_from(at.unix_seconds()).unwrap_or(i64::MAX).min(253_402_300_799);
        time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = time(from);
    params.not_after = time(to);
    // Positive, and of 16 octets whatever they are (RFC 5280, 4.1.2.2).
    let mut serial = random::<16>();
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn random<const N: usize>() -> [u8; N] {
    let mut octets = [0; N];
    rand::rng().fill_bytes(&mut octets);
    octets
}

#[cfg(test)]
#[path = "ca/tests.rs"]
mod tests;
