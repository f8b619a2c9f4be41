use std::{fs, time::Duration};

use muster_common::time::Timestamp;
use proptest::prelude::*;

use super::*;

fn now() -> Timestamp {
    Timestamp::now()
}

/// Two registrars' directories with one CA.
fn two() -> (tempfile::TempDir, tempfile::TempDir, SpkiHash) {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ca = Ca::create(ours.path(), "muster.test", now()).unwrap();
    for name in ["ca.key", "ca.crt"] {
        fs::copy(ours.path().join(name), theirs.path().join(name)).unwrap();
    }
    (ours, theirs, ca.hash())
}

fn only(directory: &Path) -> (SpkiHash, Succession) {
    let mut all = list(directory).unwrap();
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn chain(directory: &Path) -> Vec<CertificateDer<'static>> {
    Ca::load(directory).unwrap().chain().to_vec()
}

#[test]
fn each_step_is_followed_and_the_files_come_out_the_same() {
    let (ours, theirs, old) = two();
    let (ours, theirs) = (ours.path(), theirs.path());
    let new = rotation::prepare(ours, "muster.test", now()).unwrap();
    let (of, next) = only(ours);
    assert_eq!((of, next.new_root()), (old, new));
    let step = |directory: &Path| Here::load(directory).unwrap().step(old, new);
    assert_eq!((step(ours), step(theirs)), (Step::Prepared, Step::Unspecified));

    assert!(follow(theirs, old, &next, Step::Prepared).unwrap());
    assert!(!follow(theirs, old, &next, Step::Prepared).unwrap());
    assert_eq!(step(theirs), Step::Prepared);
    assert_eq!(only(theirs), (of, next.clone()));
    assert_eq!(rotation::phase(theirs).unwrap(), Phase::Prepared { next: new });

    rotation::activate(ours).unwrap();
    assert!(follow(theirs, old, &next, Step::Activated).unwrap());
    assert_eq!((step(ours), step(theirs)), (Step::Activated, Step::Activated));
    assert_eq!(chain(ours), chain(theirs));
    // Going back is not following.
    assert!(!follow(theirs, old, &next, Step::Prepared).unwrap());
    assert_eq!(step(theirs), Step::Activated);

    rotation::retire(ours, Duration::ZERO, now(), true).unwrap();
    assert!(follow(theirs, old, &next, Step::Retired).unwrap());
    assert!(!follow(theirs, old, &next, Step::Retired).unwrap());
    assert_eq!((step(ours), step(theirs)), (Step::Retired, Step::Retired));
    assert_eq!(chain(ours), chain(theirs));
    let files = |directory| super::super::read_all(directory).unwrap();
    let names = |directory| files(directory).into_iter().map(|file| file.name).collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs));
    assert_eq!(Ca::load(theirs).unwrap().hash(), new);
}

#[test]
fn who_has_missed_everything_follows_at_once_and_step_by_step() {
    let (ours, theirs, first) = two();
    let (ours, theirs) = (ours.path(), theirs.path());
    let mut all = Vec::new();
    for _ in 0..3 {
        rotation::prepare(ours, "muster.test", now()).unwrap();
        rotation::activate(ours).unwrap();
        rotation::retire(ours, Duration::ZERO, now(), true).unwrap();
    }
    for (old, next) in list(ours).unwrap() {
        all.push((old, next));
    }
    assert_eq!(all.len(), 3);
    // In the order of the chain, whatever the order of the hashes.
    let mut at = first;
    while let Some((old, next)) = all.iter().find(|(old, _)| *old == at) {
        assert!(follow(theirs, *old, next, Step::Retired).unwrap());
        at = next.new_root();
    }
    assert_eq!(chain(ours), chain(theirs));
    assert_eq!(Here::load(theirs).unwrap(), Here::load(ours).unwrap());
}

#[test]
fn a_step_that_was_cut_off_is_taken_again() {
    let (ours, theirs, old) = two();
    let (ours, theirs) = (ours.path(), theirs.path());
    rotation::prepare(ours, "muster.test", now()).unwrap();
    let (_, next) = only(ours);
    follow(theirs, old, &next, Step::Prepared).unwrap();
    // Everything but the file that counts.
    fs::remove_dir_all(theirs.join("roots")).unwrap();
    assert_eq!(Ca::load(theirs).unwrap().hash(), old);
    assert!(follow(theirs, old, &next, Step::Activated).unwrap());
    assert_eq!(Ca::load(theirs).unwrap().hash(), next.new_root());
}

#[test]
fn who_is_cut_off_while_following_follows_again() {
    for changes in 0.. {
        let (ours, theirs, old) = two();
        let (ours, theirs) = (ours.path(), theirs.path());
        rotation::prepare(ours, "muster.test", now()).unwrap();
        rotation::activate(ours).unwrap();
        rotation::retire(ours, Duration::ZERO, now(), true).unwrap();
        let (_, next) = only(ours);
        let cut = rotation::cut::after(changes, || follow(theirs, old, &next, Step::Retired));
        follow(theirs, old, &next, Step::Retired).unwrap();
        assert_eq!(Here::load(theirs).unwrap(), Here::load(ours).unwrap(), "after {changes} changes");
        assert_eq!(chain(theirs), chain(ours), "after {changes} changes");
        if cut.is_ok() {
            break;
        }
    }
}

#[test]
fn two_rotations_are_followed_in_either_order() {
    for next_first in [true, false] {
        let (ours, theirs, old) = two();
        let (ours, theirs) = (ours.path(), theirs.path());
        let new = rotation::prepare(ours, "muster.test", now()).unwrap();
        let (_, first) = only(ours);
        rotation::activate(ours).unwrap();
        follow(theirs, old, &first, Step::Activated).unwrap();
        rotation::retire(ours, Duration::ZERO, now(), true).unwrap();
        rotation::prepare(ours, "muster.test", now()).unwrap();
        let (_, second) = list(ours).unwrap().into_iter().find(|(of, _)| *of == new).unwrap();

        let mut steps = [(old, &first, Step::Retired), (new, &second, Step::Prepared)];
        if next_first {
            steps.reverse();
        }
        for (old, next, step) in steps {
            assert!(follow(theirs, old, next, step).unwrap());
        }
        assert!(theirs.join("cross.crt").exists());
        rotation::activate(ours).unwrap();
        assert!(follow(theirs, new, &second, Step::Activated).unwrap());
        assert_eq!(Here::load(theirs).unwrap(), Here::load(ours).unwrap());
        assert_eq!(chain(theirs), chain(ours));
        rotation::retire(ours, Duration::ZERO, now(), true).unwrap();
        assert!(follow(theirs, new, &second, Step::Retired).unwrap());
        assert_eq!(chain(theirs), chain(ours));
        assert!(!theirs.join("cross.crt").exists());
    }
}

#[test]
fn of_two_that_prepare_at_once_one_gives_way() {
    let (ours, theirs, old) = two();
    let (ours, theirs) = (ours.path(), theirs.path());
    rotation::prepare(ours, "muster.test", now()).unwrap();
    let dropped = rotation::prepare(theirs, "muster.test", now()).unwrap();
    let (_, next) = only(ours);
    assert!(follow(theirs, old, &next, Step::Prepared).unwrap());
    let ca = Ca::load(theirs).unwrap();
    assert!(ca.roots().iter().all(|root| SpkiHash::of(root).unwrap() != dropped));
    assert_eq!(only(theirs).1, next);
    rotation::activate(theirs).unwrap();
    assert_eq!(Ca::load(theirs).unwrap().hash(), next.new_root());
}

#[test]
fn files_that_came_without_the_old_root_end_nobodys_trust() {
    let (ours, theirs, old) = two();
    let ours = ours.path();
    let new = rotation::prepare(ours, "muster.test", now()).unwrap();
    rotation::activate(ours).unwrap();
    for name in ["ca.key", "ca.crt", "cross.crt"] {
        fs::copy(ours.join(name), theirs.path().join(name)).unwrap();
    }
    assert_eq!(Here::load(theirs.path()).unwrap().step(old, new), Step::Unspecified);
}

#[test]
fn the_key_is_had_only_with_the_old_roots_key_and_its_own_certificates() {
    let (ours, theirs, old) = two();
    let ours = ours.path();
    rotation::prepare(ours, "muster.test", now()).unwrap();
    let (_, next) = only(ours);
    let stranger = tempfile::tempdir().unwrap();
    Ca::create(stranger.path(), "muster.test", now()).unwrap();
    let stranger = read_key(&stranger.path().join("ca.key")).unwrap();
    assert_eq!(next.open(&stranger).unwrap_err(), SuccessionError::Seal(SealError));
    let key = read_key(&theirs.path().join("ca.key")).unwrap();
    let opened = next.open(&key).unwrap();
    assert_eq!(SpkiHash::of_spki(&opened.subject_public_key_info()), next.new_root());
    assert!(!next.sealed_key.windows(32).any(|w| opened.serialize_der().windows(32).any(|k| k == w)));

    // Another root in its place.
    let swapped = Succession { cross: next.certificate.clone(), ..next.clone() };
    assert!(swapped.open(&key).is_err());
    let forgotten = Succession { sealed_key: Vec::new(), ..next.clone() };
    assert_eq!(forgotten.open(&key).unwrap_err(), SuccessionError::Forgotten);
    let error = follow(theirs.path(), old, &forgotten, Step::Retired).unwrap_err().to_string();
    assert!(error.contains("no longer in the store"), "{error}");
    assert_eq!(Ca::load(theirs.path()).unwrap().hash(), old);
}

#[test]
fn what_was_damaged_is_left_out() {
    let (ours, _theirs, old) = two();
    let ours = ours.path();
    rotation::prepare(ours, "muster.test", now()).unwrap();
    let path = Files::new(ours).succession(old);
    let mut octets = fs::read(&path).unwrap();
    let last = octets.len() - 1;
    octets[last] ^= 1;
    fs::write(&path, octets).unwrap();
    assert!(list(ours).unwrap().is_empty() && !path.exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_sealed_key_that_was_cut_or_changed_does_not_open(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let (old, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let root = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let next = Succession::seal(&old, &key, root.der(), root.der()).unwrap();
        prop_assert!(next.open(&old).is_ok());
        let at = at.index(next.sealed_key.len());
        let mut cut = next.clone();
        cut.sealed_key.truncate(at);
        prop_assert!(cut.open(&old).is_err());
        let mut flipped = next;
        flipped.sealed_key[at] ^= 1 << bit;
        prop_assert!(flipped.open(&old).is_err());
    }
}
