//! The operator's credential: one file that says which registrar to ask, and proves to it who asks. Made by
//! `muster-registrar init`, used by `muster`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    file::{self, FileError},
    tls::{KeyPair, TlsError, certificates_from_pem},
};

/// Where `muster-registrar init` puts the credential, and the last place that is searched.
pub const SYSTEM_PATH: &str = "/etc/muster/operator.toml";
/// Names a credential file.
pub const VARIABLE: &str = "MUSTER_CREDENTIAL";

/// The contents of a credential file: TOML, mode 0600.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorCredential {
    /// The registrars' gRPC addresses, as `HOST:PORT`, with commas between.
    pub registrar: String,
    /// The network that commands are about unless told otherwise.
    pub network: String,
    /// The operator's certificate with its chain, PEM.
    pub certificate: String,
    /// The private key of the certificate, PKCS#8 in PEM.
    pub key: String,
    /// The roots to trust, PEM.
    pub roots: String,
}

/// Why there is no credential to use.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// None of the places has a file.
    #[error(
        "there is no operator credential: looked in {}; `muster-registrar init` makes one: name it with \
         --credential or ${VARIABLE}, or copy it to one of these places", list(.0)
    )]
    NotFound(Vec<PathBuf>),
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is not a credential.
    #[error(
        "{} is not an operator credential: {reason}; use a file that `muster-registrar init` made", path.display()
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Others than its owner can read or change it.
    #[error(
        "the operator credential {} holds a private key, but others can read it (mode {mode:03o}); \
         run: chmod 600 {}", path.display(), path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl OperatorCredential {
    /// Finds the credential file: `given` (from `--credential`), else `$MUSTER_CREDENTIAL`, else the first that
    /// exists of `$XDG_CONFIG_HOME/muster/operator.toml` (`~/.config` by default) and [`SYSTEM_PATH`].
    ///
    /// # Errors
    /// [`CredentialError::NotFound`], with the places. A file that is named but missing is [`Self::load`]'s error.
    pub fn find(given: Option<&Path>) -> Result<PathBuf, CredentialError> {
        find_with(given, |variable| std::env::var(variable).ok(), |path| path.symlink_metadata().is_ok())
    }

    /// Reads and checks the credential at `path`.
    ///
    /// # Errors
    /// All but [`CredentialError::NotFound`].
    pub fn load(path: &Path) -> Result<Self, CredentialError> {
        use std::os::unix::fs::PermissionsExt;
        let text = Zeroizing::new(file::read(path)?);
        let mode = std::fs::metadata(path)
            .map_err(|source| FileError::new("read", path, source))?
            .permissions()
            .mode();
        if mode & 0o077 != 0 {
            return Err(CredentialError::Exposed { path: path.to_owned(), mode: mode & 0o777 });
        }
        let invalid = |reason: String| CredentialError::Invalid { path: path.to_owned(), reason };
        let text = std::str::from_utf8(&text).map_err(|error| invalid(error.to_string()))?;
        // The message alone: toml's full text quotes the file, which holds a key.
        let credential: Self = toml::from_str(text).map_err(|error| invalid(error.message().to_owned()))?;
        credential.key_pair().map_err(|error| invalid(error.to_string()))?;
        credential.trusted().map_err(|error| invalid(error.to_string()))?;
        Ok(credential)
    }

    /// Writes the credential to `path`, with mode 0600, replacing what is there.
    ///
    /// # Errors
    /// [`CredentialError::File`].
    pub fn save(&self, path: &Path) -> Result<(), CredentialError> {
        Ok(file::write_private(path, self.to_toml().as_bytes())?)
    }

    /// Writes the credential to `path`, with mode 0600, where nothing may be yet.
    ///
    /// # Errors
    /// [`CredentialError::File`].
    pub fn create(&self, path: &Path) -> Result<(), CredentialError> {
        Ok(file::create_private(path, self.to_toml().as_bytes())?)
    }

    /// The operator's certificate chain and key.
    ///
    /// # Errors
    /// If they are not PEM.
    pub fn key_pair(&self) -> Result<KeyPair, TlsError> {
        let pem = Zeroizing::new(format!("{}\n{}", self.certificate, self.key));
        KeyPair::from_pem("the credential's certificate and key", pem.as_bytes())
    }

    /// The roots to trust.
    ///
    /// # Errors
    /// If they are not PEM.
    pub fn trusted(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates_from_pem("the credential's roots", self.roots.as_bytes())
    }

    fn to_toml(&self) -> Zeroizing<String> {
        // Five texts always serialise.
        Zeroizing::new(toml::to_string_pretty(self).unwrap_or_default())
    }
}

impl fmt::Debug for OperatorCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OperatorCredential")
            .field("registrar", &self.registrar)
            .field("network", &self.network)
            .finish_non_exhaustive()
    }
}

fn find_with(
    given: Option<&Path>,
    variable: impl Fn(&str) -> Option<String>,
    exists: impl Fn(&Path) -> bool,
) -> Result<PathBuf, CredentialError> {
    let set = |name| variable(name).filter(|value| !value.is_empty());
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    if let Some(path) = set(VARIABLE) {
        return Ok(path.into());
    }
    let configuration = set("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|home| Path::new(&home).join(".config")));
    let mut places: Vec<PathBuf> =
        configuration.into_iter().map(|directory| directory.join("muster/operator.toml")).collect();
    places.push(SYSTEM_PATH.into());
    match places.iter().find(|path| exists(path)) {
        Some(path) => Ok(path.clone()),
        None => Err(CredentialError::NotFound(places)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn credential() -> OperatorCredential {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        OperatorCredential {
            registrar: "registrar.example:7500".into(),
            network: "default".into(),
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            roots: certificate.pem(),
        }
    }

    #[test]
    fn credentials_are_private_and_read_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("muster/operator.toml");
        let written = credential();
        written.create(&path).unwrap();
        assert_eq!(OperatorCredential::load(&path).unwrap(), written);
        assert!(written.create(&path).is_err());
        written.save(&path).unwrap();
        assert!(!format!("{written:?}").contains("PRIVATE"));

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = OperatorCredential::load(&path).unwrap_err().to_string();
        assert!(error.contains("mode 640") && error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn other_files_are_refused_without_showing_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("operator.toml");
        let mut broken = credential();
        broken.key = "secret-key".into();
        broken.save(&path).unwrap();
        let error = OperatorCredential::load(&path).unwrap_err().to_string();
        assert!(error.contains("operator.toml") && !error.contains("secret-key"), "{error}");
        file::write_private(&path, b"registrar = \"x\"\nkey = \"secret-key\"\nother = 1\n").unwrap();
        let error = OperatorCredential::load(&path).unwrap_err().to_string();
        assert!(error.contains("not an operator credential") && !error.contains("secret-key"), "{error}");
        let error = OperatorCredential::load(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("cannot read"), "{error}");
    }

    #[test]
    fn places_are_searched_in_order() {
        let all = |name: &str| match name {
            VARIABLE => Some("/v".to_owned()),
            "XDG_CONFIG_HOME" => Some("/xdg".to_owned()),
            "HOME" => Some("/home".to_owned()),
            _ => None,
        };
        let found = |given: Option<&str>, without: &[&str], existing: &str| {
            let variable = |name: &str| all(name).filter(|_| !without.contains(&name));
            find_with(given.map(Path::new), variable, |path| path == Path::new(existing))
        };
        let path = |found: Result<PathBuf, CredentialError>| found.unwrap().display().to_string();
        assert_eq!(path(found(Some("/given"), &[], "")), "/given");
        assert_eq!(path(found(None, &[], "")), "/v");
        let xdg = "/xdg/muster/operator.toml";
        assert_eq!(path(found(None, &[VARIABLE], xdg)), xdg);
        let home = "/home/.config/muster/operator.toml";
        assert_eq!(path(found(None, &[VARIABLE, "XDG_CONFIG_HOME"], home)), home);
        assert_eq!(path(found(None, &[VARIABLE], SYSTEM_PATH)), SYSTEM_PATH);
        let error = found(None, &[VARIABLE], "").unwrap_err().to_string();
        assert!(error.contains(xdg) && error.contains(SYSTEM_PATH) && error.contains("init"), "{error}");
    }
}
