//! Who this device is.

use std::fmt;

use base64::{Engine, prelude::BASE64_STANDARD};
use muster_enrollment::Certified;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Who this device is, with its secrets.
#[derive(Clone, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Name of the network.
    pub network: String,
    /// The network's domain.
    pub domain: String,
    /// Assigned by the registrar.
    pub device_uid: String,
    /// The device's name.
    pub name: String,
    /// The device's namespace.
    pub namespace: String,
    /// `HOST:PORT` of the registrar that the device joined through.
    pub registrar: String,
    /// PEM, the device's own certificate first.
    pub certificate_chain: String,
    /// PEM, PKCS#8.
    pub tls_key: String,
    /// PEM.
    pub roots: String,
    /// Base64 of the Curve25519 private key.
    pub wireguard_key: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}/{})", self.network, self.device_uid)
    }
}

impl muster_enrollment::Identity for Identity {
    fn certified(&self) -> Certified<'_> {
        let Self { network, device_uid: uid, name, certificate_chain, tls_key, roots, .. } = self;
        Certified { network, uid, name, certificate_chain, tls_key, roots }
    }

    fn certificate(&mut self) -> (&mut String, &mut String) {
        (&mut self.certificate_chain, &mut self.tls_key)
    }
}

impl Identity {
    /// The WireGuard private key; `None` if it is damaged.
    pub fn wireguard_private_key(&self) -> Option<Zeroizing<[u8; 32]>> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(&self.wireguard_key).ok()?);
        bytes.as_slice().try_into().ok().map(Zeroizing::new)
    }
}
