//! A backup is read as it was written, in whatever pieces, and anything else is noticed.

use proptest::prelude::*;

use super::*;

type Keys = Vec<(Vec<u8>, Vec<u8>)>;

fn header() -> BackupHeader {
    BackupHeader { layout_version: 1, trust_domain: "net.example".into(), revision: 42, taken_at: None }
}

fn files() -> Vec<CaFile> {
    vec![ca_file("ca.crt", b"certificate"), ca_file("roots/00ff.crt", b"root"), ca_file("ca.key", b"key")]
}

fn keys() -> Keys {
    vec![(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), Vec::new()), (b"b/c".to_vec(), vec![0xff; 300])]
}

fn encode(files: &[CaFile], keys: &Keys) -> (Vec<u8>, Summary) {
    let mut out = Vec::new();
    let mut encoder = Encoder::new(&header(), &mut out);
    for file in files {
        encoder.ca_file(file, &mut out).unwrap();
    }
    for (key, value) in keys {
        encoder.key(key, value, &mut out).unwrap();
    }
    let summary = encoder.end(&mut out);
    (out, summary)
}

fn decode(octets: &[u8], piece: usize) -> Result<Vec<Item>, FormatError> {
    let (mut decoder, mut items) = (Decoder::default(), Vec::new());
    for octets in octets.chunks(piece) {
        decoder.feed(octets);
        while let Some(item) = decoder.item()? {
            items.push(item);
        }
    }
    decoder.finish()?;
    Ok(items)
}

/// With a trailer that fits whatever comes before it.
fn sealed(mut octets: Vec<u8>, keys: u64) -> Vec<u8> {
    octets.push(Kind::Trailer as u8);
    octets.extend_from_slice(&(TRAILER as u32).to_be_bytes());
    octets.extend_from_slice(&keys.to_be_bytes());
    let mut hasher = Hasher::default();
    hasher.update(&octets);
    octets.extend_from_slice(&hasher.finish());
    octets
}

#[test]
fn what_is_written_is_read() {
    let (octets, summary) = encode(&files(), &keys());
    let mut expected = vec![Item::Header(header())];
    expected.extend(files().into_iter().map(Item::CaFile));
    expected
        .extend(keys().into_iter().map(|(key, value)| Item::Key { key: key.into(), value: value.into() }));
    expected.push(Item::End(summary));
    for piece in [1, 7, octets.len()] {
        assert_eq!(decode(&octets, piece).unwrap(), expected);
    }
    // The digest is of the keys alone.
    assert_eq!(encode(&[], &keys()).1, summary);
    assert_ne!(encode(&[], &Vec::new()).1, summary);
}

#[test]
fn every_truncation_is_noticed() {
    let (octets, _) = encode(&files(), &keys());
    for length in 0..octets.len() {
        let error = decode(&octets[..length], 64).unwrap_err();
        let expected = if length == 0 { FormatError::Foreign } else { FormatError::Truncated };
        assert_eq!(error, expected, "{length}");
    }
    assert!(matches!(decode(&[&octets[..], b"x"].concat(), 64), Err(FormatError::Damaged(_))));
}

#[test]
fn every_flipped_bit_is_noticed() {
    let (mut octets, _) = encode(&files(), &keys());
    for bit in 0..octets.len() * 8 {
        octets[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&octets, 64).is_err(), "bit {bit}");
        octets[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(decode(&octets, 64).is_ok());
}

#[test]
fn other_files_and_newer_ones_are_told_apart() {
    assert_eq!(decode(b"SQLite format 3\0", 64), Err(FormatError::Foreign));
    assert_eq!(decode(b"M", 64), Err(FormatError::Truncated));
    let (mut octets, _) = encode(&[], &keys());
    octets[11] = 2;
    let error = decode(&octets, 64).unwrap_err();
    assert_eq!(error, FormatError::Newer(2));
    assert!(error.to_string().contains("install the newer version"));
    octets[11] = 0;
    assert!(matches!(decode(&octets, 64), Err(FormatError::Damaged(_))));
}

#[test]
fn absurd_lengths_are_refused_before_anything_is_kept() {
    let mut out = Vec::new();
    Encoder::new(&header(), &mut out);
    for (kind, length) in [
        (Kind::CaFile, SMALL_MAX as u32 + 1),
        (Kind::Key, BODY_MAX as u32 + 1),
        (Kind::Key, u32::MAX),
        (Kind::Trailer, 0),
        (Kind::Trailer, TRAILER as u32 + 1),
    ] {
        let mut decoder = Decoder::default();
        decoder.feed(&out);
        decoder.feed(&[&[kind as u8][..], &length.to_be_bytes()].concat());
        assert!(matches!(decoder.item(), Ok(Some(Item::Header(_)))));
        assert_eq!(decoder.item(), Err(FormatError::Damaged("a length is out of bounds")), "{kind:?}");
    }
    let mut encoder = Encoder::new(&header(), &mut out);
    assert!(encoder.key(&[b'k'; MAX_KEY + 1], b"", &mut out).is_err());
    assert!(encoder.key(b"k", &vec![0; MAX_TXN_BYTES + 1], &mut out).is_err());
    assert!(encoder.ca_file(&ca_file("ca.key", &vec![0; SMALL_MAX]), &mut out).is_err());
}

#[test]
fn what_no_encoder_writes_is_refused_though_the_checksum_fits() {
    let begun = |frames: &[(Kind, &[u8])], keys: u64| {
        let mut out = Vec::new();
        let mut encoder = Encoder::new(&header(), &mut out);
        for (kind, body) in frames {
            encoder.frame(*kind, &[body], &mut out);
        }
        decode(&sealed(out, keys), 64)
    };
    assert!(begun(&[(Kind::Key, b"\0\x01av")], 1).is_ok());
    for (frames, keys) in [
        // One key fewer than the trailer says, and one more.
        (&[(Kind::Key, &b"\0\x01av"[..])][..], 2),
        (&[(Kind::Key, b"\0\x01av")], 0),
        // Twice, in the wrong order, without a key, with a key longer than all.
        (&[(Kind::Key, b"\0\x01av"), (Kind::Key, b"\0\x01av")], 2),
        (&[(Kind::Key, b"\0\x01bv"), (Kind::Key, b"\0\x01av")], 2),
        (&[(Kind::Key, b"\0\0v")], 1),
        (&[(Kind::Key, b"\0\x09av")], 1),
        (&[(Kind::Key, b"")], 1),
        (&[(Kind::Header, b"")], 0),
        (&[(Kind::Key, b"\0\x01av"), (Kind::CaFile, b"\0\x06ca.keyx")], 1),
        // Where no file of a CA is.
        (&[(Kind::CaFile, b"\0\x09../ca.keyx")], 0),
        (&[(Kind::CaFile, b"\0\x0droots/../a.crt")], 0),
        (&[(Kind::CaFile, b"\0\x0b/etc/passwd")], 0),
    ] {
        assert!(matches!(begun(frames, keys), Err(FormatError::Damaged(_))), "{frames:?}");
    }
}

proptest! {
    #[test]
    fn any_contents_survive(
        keys in proptest::collection::btree_map(
            proptest::collection::vec(any::<u8>(), 1..40), proptest::collection::vec(any::<u8>(), 0..200), 0..40),
        piece in 1_usize..300,
    ) {
        let keys: Keys = keys.into_iter().collect();
        let (octets, summary) = encode(&[], &keys);
        let items = decode(&octets, piece).unwrap();
        let expected = keys.into_iter().map(|(key, value)| Item::Key { key: key.into(), value: value.into() });
        prop_assert_eq!(&items[1..items.len() - 1], &expected.collect::<Vec<_>>()[..]);
        prop_assert_eq!(&items[items.len() - 1], &Item::End(summary));
    }

    #[test]
    fn no_octets_make_it_panic_or_keep_much(
        octets in proptest::collection::vec(any::<u8>(), 0..200), at in 0_usize..500, piece in 1_usize..50,
    ) {
        let _ = decode(&octets, piece);
        let (mut damaged, _) = encode(&files(), &keys());
        let at = at.min(damaged.len());
        damaged.splice(at.., octets);
        let _ = decode(&damaged, piece);
    }
}
