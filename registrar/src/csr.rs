//! Certificate requests (PKCS#10, RFC 2986): checked for proof of possession, and stripped to their public key. The
//! registrar alone decides identity, validity and usages; nothing else in a request is taken over.

use muster_common::tls::SpkiHash;
use rcgen::SubjectPublicKeyInfo;
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::ParsedExtension,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ED25519},
    prelude::FromDer,
    x509::AlgorithmIdentifier,
};

/// The largest request that is looked at, in octets. A sound one has about 250.
pub const MAX_SIZE: usize = 4096;

/// A public key whose owner has proved to hold the private one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedRequest {
    key: SubjectPublicKeyInfo,
    hash: SpkiHash,
}

impl CheckedRequest {
    /// The public key.
    pub fn key(&self) -> &SubjectPublicKeyInfo {
        &self.key
    }

    /// SHA-256 of the key's SubjectPublicKeyInfo.
    pub fn key_hash(&self) -> &SpkiHash {
        &self.hash
    }
}

/// Why a certificate request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Not PKCS#10.
    #[error("cannot read the certificate request: {0}; send one PKCS#10 request in DER")]
    Malformed(String),
    /// Larger than [`MAX_SIZE`].
    #[error("the certificate request has {0} octets, and at most {MAX_SIZE} are allowed; send the key alone")]
    TooLarge(usize),
    /// Its signature is not made with the key in it.
    #[error("the certificate request does not prove possession of its private key: its signature is wrong")]
    Signature,
    /// A key of another kind.
    #[error("the certificate request has a key of a kind that is not accepted; use ECDSA P-256 or Ed25519")]
    Key,
    /// It asks for a name.
    #[error(
        "the certificate request asks for an identity of its own (a subject alternative name); the registrar \
         alone decides the identity: send the request without one"
    )]
    Identity,
    /// It asks to become a CA.
    #[error("the certificate request asks for a CA certificate; send the request without basic constraints")]
    Authority,
}

/// Checks a request.
///
/// The subject's distinguished name is no identity in Muster, and is passed over.
///
/// # Errors
/// See [`CsrError`].
pub fn check(der: &[u8]) -> Result<CheckedRequest, CsrError> {
    if der.len() > MAX_SIZE {
        return Err(CsrError::TooLarge(der.len()));
    }
    let (rest, request) =
        X509CertificationRequest::from_der(der).map_err(|e| CsrError::Malformed(e.to_string()))?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed("there is something after its end".into()));
    }
    let info = &request.certification_request_info;
    for attribute in info.attributes() {
        let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() else { continue };
        for extension in &requested.extensions {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(_) => return Err(CsrError::Identity),
                ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                    return Err(CsrError::Authority);
                }
                _ => {}
            }
        }
    }
    if !is_accepted(&info.subject_pki.algorithm) {
        return Err(CsrError::Key);
    }
    request.verify_signature().map_err(|_| CsrError::Signature)?;
    let key = SubjectPublicKeyInfo::from_der(info.subject_pki.raw).map_err(|_| CsrError::Key)?;
    Ok(CheckedRequest { key, hash: SpkiHash::of_spki(info.subject_pki.raw) })
}

fn is_accepted(algorithm: &AlgorithmIdentifier<'_>) -> bool {
    let curve = algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    algorithm.algorithm == OID_SIG_ED25519
        || algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY && curve == Some(OID_EC_P256)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, PublicKeyData, SanType};

    use super::*;

    fn request(params: &CertificateParams, key: &KeyPair) -> Vec<u8> {
        params.serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn sound_requests_give_their_key() {
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let checked = check(&request(&CertificateParams::default(), &key)).unwrap();
            assert_eq!(checked.key().subject_public_key_info(), key.subject_public_key_info());
            assert_eq!(*checked.key_hash(), SpkiHash::of_spki(&key.subject_public_key_info()));
        }
    }

    #[test]
    fn requests_for_another_identity_are_refused() {
        let key = KeyPair::generate().unwrap();
        for name in [
            SanType::URI("spiffe://muster/operator/admin".try_into().unwrap()),
            SanType::DnsName("registrar.example".try_into().unwrap()),
        ] {
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![name];
            assert_eq!(check(&request(&params, &key)), Err(CsrError::Identity));
        }
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        assert_eq!(check(&request(&params, &key)), Err(CsrError::Authority));
    }

    #[test]
    fn possession_must_be_proved() {
        let key = KeyPair::generate().unwrap();
        let mut der = request(&CertificateParams::default(), &key);
        // The signature is at the end.
        let last = der.len() - 4;
        der[last] ^= 1;
        assert_eq!(check(&der), Err(CsrError::Signature));
    }

    #[test]
    fn other_keys_and_sizes_are_refused() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        assert_eq!(check(&request(&CertificateParams::default(), &key)), Err(CsrError::Key));
        assert_eq!(check(&[0x30; MAX_SIZE + 1]), Err(CsrError::TooLarge(MAX_SIZE + 1)));
        let mut der = request(&CertificateParams::default(), &KeyPair::generate().unwrap());
        der.push(0);
        assert!(matches!(check(&der), Err(CsrError::Malformed(_))));
        assert!(matches!(check(b""), Err(CsrError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn damaged_requests_never_pass_for_another_key(position in 0_usize..1000, byte: u8) {
            let der = request(&CertificateParams::default(), &KeyPair::generate().unwrap());
            let mut damaged = der.clone();
            let position = position % der.len();
            damaged[position] = byte;
            // A few octets, such as some tags around the signature, bear no meaning.
            if let Ok(checked) = check(&damaged) {
                prop_assert_eq!(checked, check(&der).unwrap());
            }
        }

        #[test]
        fn any_octets_are_survived(octets: Vec<u8>) {
            prop_assert!(check(&octets).is_err());
        }
    }
}
