use std::{os::unix::fs::PermissionsExt, sync::Arc};

use muster_common::{
    identity::Party,
    tls::{ALPN_H2, Credentials, KeyPair as TlsPair, certificate_identity, pinned_client_config},
};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    rotation::{Phase, RotationError, activate, cut, phase, prepare, retire},
    *,
};
use crate::csr;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const REGISTRAR: &str = "spiffe://muster.test/registrar/r1";
const DEVICE: &str = "spiffe://muster.test/network/net/device/d1";

fn now() -> Timestamp {
    Timestamp::now()
}

fn pair(ca: &Ca, identity: &str) -> TlsPair {
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default().serialize_request(&key).unwrap();
    let request = csr::check(request.der()).unwrap();
    let chain = ca.issue(&request, &identity.parse().unwrap(), now(), DAY).unwrap();
    TlsPair { chain, key: PrivateKeyDer::try_from(key.serialize_der()).unwrap() }
}

/// A TLS handshake in memory, to its end on both sides.
fn handshake(client: rustls::ClientConfig, server: &Arc<Credentials>) -> Result<(), rustls::Error> {
    let name = ServerName::try_from("registrar").unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = rustls::ServerConnection::new(Arc::new(server.server_config(ALPN_H2).unwrap())).unwrap();
    while client.is_handshaking() || server.is_handshaking() || client.wants_write() || server.wants_write() {
        let mut data = Vec::new();
        client.write_tls(&mut data).unwrap();
        server.read_tls(&mut data.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut data = Vec::new();
        server.write_tls(&mut data).unwrap();
        client.read_tls(&mut data.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    Ok(())
}

/// Whether a client that has `client` as its certificate and trusts `roots` talks with a server that has `server`
/// and trusts `server_roots`.
fn talk(
    client: &TlsPair,
    roots: &[CertificateDer<'_>],
    server: &TlsPair,
    server_roots: &[CertificateDer<'_>],
) -> Result<(), rustls::Error> {
    let client = Credentials::new(client, roots).unwrap();
    let accept = |party: &Party| matches!(party, Party::Registrar { .. });
    let server = Credentials::new(server, server_roots).unwrap();
    handshake(client.client_config(accept, ALPN_H2).unwrap(), &server)
}

#[test]
fn a_ca_is_made_once_and_read_as_it_was_made() {
    let dir = tempfile::tempdir().unwrap();
    let made = Ca::create(dir.path(), "muster.test", now()).unwrap();
    for name in ["ca.key", "ca.crt"] {
        let mode = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let before = std::fs::read(dir.path().join("ca.key")).unwrap();
    assert!(matches!(Ca::create(dir.path(), "muster.test", now()), Err(CaError::Exists(_))));
    assert_eq!(std::fs::read(dir.path().join("ca.key")).unwrap(), before);
    let read = Ca::load(dir.path()).unwrap();
    assert_eq!(read.roots(), made.roots());
    assert_eq!(read.hash(), SpkiHash::of(&made.roots()[0]).unwrap());
}

#[test]
fn damaged_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Ca::load(dir.path()).unwrap_err().to_string().contains("ca.key"));
    Ca::create(dir.path(), "muster.test", now()).unwrap();
    let other = tempfile::tempdir().unwrap();
    Ca::create(other.path(), "muster.test", now()).unwrap();
    std::fs::copy(other.path().join("ca.crt"), dir.path().join("ca.crt")).unwrap();
    let error = Ca::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("ca.key") && error.contains("belongs to this key"), "{error}");
    std::fs::write(dir.path().join("ca.crt"), "x").unwrap();
    let error = Ca::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("ca.crt") && error.contains("backup"), "{error}");
}

#[test]
fn certificates_say_who_it_is_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::create(dir.path(), "muster.test", now()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "admin");
    let request = csr::check(params.serialize_request(&key).unwrap().der()).unwrap();
    let at = now();
    let chain = ca.issue(&request, &DEVICE.parse().unwrap(), at, 30 * DAY).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], ca.roots()[0]);
    assert_eq!(certificate_identity(&chain[0]).unwrap().to_string(), DEVICE);
    let (from, to) = certificate_validity(&chain[0]).unwrap();
    assert_eq!(from.unix_seconds(), at.saturating_sub(BACKDATE).unix_seconds());
    assert_eq!(to.unix_seconds(), (at + 30 * DAY).unix_seconds());

    let (_, parsed) = X509Certificate::from_der(&chain[0]).unwrap();
    assert_eq!(parsed.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
    let mut names = parsed.subject().iter_attributes().map(|name| name.as_str().unwrap());
    assert_eq!((names.next(), names.next()), (Some("network/net/device/d1"), None));
    assert!(!parsed.is_ca());
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth && !usage.any);
    let again = ca.issue(&request, &DEVICE.parse().unwrap(), at, DAY).unwrap();
    let (_, again) = X509Certificate::from_der(&again[0]).unwrap();
    assert_ne!(parsed.raw_serial(), again.raw_serial());
    assert_eq!(parsed.raw_serial().len(), 16);
}

#[test]
fn nothing_outlives_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::create(dir.path(), "muster.test", now()).unwrap();
    let request = CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap();
    let request = csr::check(request.der()).unwrap();
    let issue = |at| ca.issue(&request, &DEVICE.parse().unwrap(), at, 30 * DAY);
    let late = issue(now() + ROOT_LIFETIME.saturating_sub(DAY)).unwrap();
    assert_eq!(certificate_validity(&late[0]).unwrap().1, certificate_validity(&ca.roots()[0]).unwrap().1);
    let error = issue(now() + ROOT_LIFETIME + DAY).unwrap_err().to_string();
    assert!(error.contains("clock") && error.contains("ca rotate"), "{error}");
    assert!(issue(now().saturating_sub(365 * DAY)).is_err());
}

#[test]
fn roots_are_replaced_while_both_are_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let shared = {
        Ca::create(path, "muster.test", now()).unwrap();
        SharedCa::open(path).unwrap()
    };
    let mut told = shared.roots();
    let old = shared.current();
    let (old_device, old_registrar) = (pair(&old, DEVICE), pair(&old, REGISTRAR));
    assert!(matches!(activate(path), Err(CaError::Rotation(RotationError::NotPrepared))));
    assert!(matches!(
        retire(path, DAY, now(), false),
        Err(CaError::Rotation(RotationError::NothingToRetire))
    ));
    assert!(!shared.reload().unwrap());

    let next = prepare(path, "muster.test", now()).unwrap();
    assert_eq!(phase(path).unwrap(), Phase::Prepared { next });
    assert!(matches!(prepare(path, "muster.test", now()), Err(CaError::Rotation(RotationError::UnderWay))));
    assert!(shared.reload().unwrap());
    assert!(shared.trust(&[]));
    assert!(told.has_changed().unwrap());
    let both = told.borrow_and_update().clone();
    assert_eq!(both.len(), 2);
    assert_eq!(shared.current().hash(), old.hash());

    assert_eq!(activate(path).unwrap(), next);
    assert!(shared.reload().unwrap());
    let new = shared.current();
    assert_eq!(new.hash(), next);
    assert!(matches!(phase(path).unwrap(), Phase::Activated { old: hashes, .. } if hashes == [old.hash()]));
    let (new_device, new_registrar) = (pair(&new, DEVICE), pair(&new, REGISTRAR));

    // By either root, to either root.
    for device in [&old_device, &new_device] {
        for registrar in [&old_registrar, &new_registrar] {
            talk(device, &both, registrar, new.roots()).unwrap();
            // A device that has missed the change trusts the old root alone, and is not locked out.
            talk(device, old.roots(), registrar, new.roots()).unwrap();
        }
    }
    // Join commands from before and from after the change.
    for pin in [old.hash(), new.hash()] {
        let server = Credentials::new(&new_registrar, new.roots()).unwrap();
        handshake(pinned_client_config(pin).unwrap(), &server).unwrap();
    }

    let error = retire(path, DAY, now(), false).unwrap_err().to_string();
    assert!(error.contains("--force"), "{error}");
    retire(path, DAY, now() + 2 * DAY, false).unwrap();
    assert!(shared.reload().unwrap());
    let settled = shared.current();
    assert_eq!(phase(path).unwrap(), Phase::Settled);
    assert_eq!(settled.roots(), &new.roots()[..1]);
    assert_eq!(settled.retired(), old.roots());
    // The store may still have the old root, and that of another registrar.
    let other = tempfile::tempdir().unwrap();
    let other = Ca::create(other.path(), "muster.test", now()).unwrap();
    assert!(shared.trust(&[old.roots()[0].clone(), other.roots()[0].clone()]));
    assert_eq!(*told.borrow_and_update(), [settled.roots(), other.roots()].concat());
    assert!(!shared.trust(other.roots()));
    talk(&new_device, settled.roots(), &new_registrar, settled.roots()).unwrap();
    assert!(talk(&old_device, settled.roots(), &new_registrar, settled.roots()).is_err());
    assert!(talk(&new_device, settled.roots(), &old_registrar, settled.roots()).is_err());
    assert_eq!(pair(&settled, DEVICE).chain.len(), 2);
}

#[test]
fn steps_that_were_cut_off_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    Ca::create(path, "muster.test", now()).unwrap();
    let old = Ca::load(path).unwrap();

    // Before the preparation counted.
    prepare(path, "muster.test", now()).unwrap();
    for root in Files::new(path).list("roots").unwrap() {
        std::fs::remove_file(root).unwrap();
    }
    assert_eq!(phase(path).unwrap(), Phase::Settled);
    assert_eq!(Ca::load(path).unwrap().chain, old.chain);
    let next = prepare(path, "muster.test", now()).unwrap();

    // Right after the new key took over.
    let key = std::fs::read(path.join("next.key")).unwrap();
    let (certificate, root) = (path.join("ca.crt"), Files::new(path).root(next));
    let (old_certificate, next_root) = (std::fs::read(&certificate).unwrap(), std::fs::read(&root).unwrap());
    activate(path).unwrap();
    let whole = Ca::load(path).unwrap();
    std::fs::write(path.join("next.key"), key).unwrap();
    std::fs::write(&certificate, old_certificate).unwrap();
    std::fs::write(&root, next_root).unwrap();
    let cut = Ca::load(path).unwrap();
    assert_eq!((cut.hash(), cut.roots()), (next, whole.roots()));
    activate(path).unwrap();
    assert_eq!(Ca::load(path).unwrap().chain, whole.chain);
    retire(path, DAY, now(), true).unwrap();
    assert_eq!(Ca::load(path).unwrap().roots().len(), 1);
}

/// A CA that is prepared, with the hashes of its root and of the next one.
fn prepared(path: &Path) -> (SpkiHash, SpkiHash) {
    let old = Ca::create(path, "muster.test", now()).unwrap().hash();
    (old, prepare(path, "muster.test", now()).unwrap())
}

/// One root is trusted, the other one is not; and it can be replaced in its turn.
fn check_settled(path: &Path, old: SpkiHash, new: SpkiHash) {
    let hashes = |all: &[CertificateDer<'_>]| all.iter().map(|root| SpkiHash::of(root).unwrap()).collect();
    let check = |trusted: SpkiHash, retired: &[SpkiHash]| {
        let ca = Ca::load(path).unwrap();
        assert_eq!(phase(path).unwrap(), Phase::Settled);
        let (roots, gone): (Vec<_>, Vec<_>) = (hashes(ca.roots()), hashes(ca.retired()));
        assert_eq!((ca.hash(), roots), (trusted, vec![trusted]));
        assert!(gone.len() == retired.len() && retired.iter().all(|root| gone.contains(root)), "{gone:?}");
    };
    check(new, &[old]);
    let last = prepare(path, "muster.test", now()).unwrap();
    activate(path).unwrap();
    assert!(matches!(phase(path).unwrap(), Phase::Activated { old, .. } if old == [new]));
    retire(path, DAY, now(), true).unwrap();
    check(last, &[old, new]);
}

#[test]
fn an_activation_that_was_cut_off_goes_on() {
    for changes in 0.. {
        let mut whole = false;
        // The same command again, or the next one.
        for again in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path();
            let (old, new) = prepared(path);
            whole = cut::after(changes, || activate(path)).is_ok();
            if Ca::load(path).unwrap().hash() == old {
                assert_eq!(phase(path).unwrap(), Phase::Prepared { next: new });
                assert_eq!(activate(path).unwrap(), new);
            } else if again {
                let result = activate(path);
                assert!(matches!(result, Ok(_) | Err(CaError::Rotation(RotationError::NotPrepared))));
            }
            assert_eq!(Ca::load(path).unwrap().hash(), new, "after {changes} changes");
            assert!(matches!(phase(path).unwrap(), Phase::Activated { old: hashes, .. } if hashes == [old]));
            retire(path, DAY, now(), true).unwrap();
            check_settled(path, old, new);
        }
        if whole {
            assert!(changes > 3);
            break;
        }
    }
}

#[test]
fn a_retirement_that_was_cut_off_goes_on() {
    for changes in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let (old, new) = prepared(path);
        activate(path).unwrap();
        let whole = cut::after(changes, || retire(path, DAY, now(), true)).is_ok();
        match retire(path, DAY, now(), true) {
            Ok(()) | Err(CaError::Rotation(RotationError::NothingToRetire)) => {}
            Err(error) => panic!("after {changes} changes: {error}"),
        }
        check_settled(path, old, new);
        if whole {
            assert!(changes > 1);
            break;
        }
    }
}
