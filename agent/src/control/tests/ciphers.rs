//! AES-256-GCM is used with a peer exactly if this device and that one have it.

use muster_proto::admin::TransportCipher;

use super::*;
use crate::datapath::Cipher;

/// As [`peer`], of a device that says it takes these.
fn taking(ciphers: &[i32], n: u8, revision: u64) -> Peer {
    Peer { transport_ciphers: ciphers.to_vec(), ..peer(n, revision) }
}

fn aes() -> Start {
    Start { accepts_aes: true, ..start() }
}

const AES: i32 = TransportCipher::Aes256Gcm as i32;

/// How the data plane is told to send.
fn told(control: &mut Control) -> Vec<Cipher> {
    let cipher = |command| match command {
        Command::AddPeer(peer) | Command::UpdatePeer(peer) => Some(peer.cipher),
        _ => None,
    };
    commands(control).into_iter().filter_map(cipher).collect()
}

#[test]
fn the_registrar_is_told_what_this_device_takes() {
    for (start, expected) in [(start(), vec![]), (aes(), vec![AES])] {
        let mut control = Control::new(start, 1, at(0));
        control.handle_timeout(at(0));
        let did = actions(&mut control);
        let [Action::Register { request, .. }] = &did[..] else { panic!("{did:?}") };
        assert_eq!(request.transport_ciphers, expected);
    }
}

#[test]
fn it_is_chosen_only_if_both_take_it() {
    let (plain, both) = (Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm);
    // None, from an older agent; those of a newer one; and AES among them.
    for (start, ciphers, expected) in [
        (start(), vec![], plain),
        (start(), vec![AES], plain),
        (aes(), vec![], plain),
        (aes(), vec![0, 99], plain),
        (aes(), vec![99, AES], both),
    ] {
        let (mut control, attempt) = connected(start.clone(), at(0));
        let (id, _) = lookup(&mut control, &Event::LookupAddress(address(1)), at(1)).unwrap();
        control.handle_looked_up(id, LookupResult::Found(Box::new(taking(&ciphers, 1, 3))), at(2));
        assert_eq!(told(&mut control), [expected], "looked up: {ciphers:?}");
        let introduction = Introduction { peer: Some(taking(&ciphers, 2, 3)) };
        control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(3));
        assert_eq!(told(&mut control), [expected], "introduced: {ciphers:?}");
        // From disk, where an agent of before may have written it.
        let start = Start { config: Some(config()), peers: vec![taking(&ciphers, 3, 3)], ..start };
        assert_eq!(told(&mut Control::new(start, 1, at(0))), [expected], "from disk: {ciphers:?}");
    }
}

#[test]
fn a_peer_that_takes_it_no_longer_is_no_longer_sent_it() {
    let (mut control, attempt) = connected(aes(), at(0));
    let introduction = Introduction { peer: Some(taking(&[AES], 1, 1)) };
    control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(1));
    assert_eq!(told(&mut control), [Cipher::Aes256Gcm]);
    for (ciphers, expected) in [(&[][..], Cipher::ChaCha20Poly1305), (&[AES][..], Cipher::Aes256Gcm)] {
        let changed = PeerChanged { peer: Some(taking(ciphers, 1, 2)) };
        control.handle_session_message(attempt, message(Message::PeerChanged(changed)), at(2));
        let did = commands(&mut control);
        assert!(matches!(&did[..], [Command::UpdatePeer(peer)] if peer.cipher == expected), "{did:?}");
    }
}
