//! Sums against a plain implementation, and the virtio header's octets.

use super::*;

#[test]
fn every_length_and_offset() {
    let octets = payload(1000, 1);
    for len in 0..600 {
        for start in [0, 1, 3, 8] {
            let part = &octets[start..start + len];
            let sum = plain_sum(part);
            assert_eq!(Sum::of(part).folded(), sum.to_be_bytes(), "{len} octets at {start}");
            assert_eq!(Sum::of(part).checksum(), (!sum).to_be_bytes());
            let mut copy = vec![0; len];
            assert_eq!(
                Sum::ZERO.copy(part, &mut copy).folded(),
                sum.to_be_bytes(),
                "{len} octets at {start}"
            );
            assert_eq!(copy, part);
        }
    }
}

#[test]
fn carries_are_kept() {
    for len in [2, 32, 64, 1400, 65_534] {
        let octets = vec![0xff; len];
        assert_eq!(Sum::of(&octets).folded(), [0xff, 0xff], "{len} octets");
        assert!(Sum::of(&octets).is_valid());
        assert_eq!(Sum::of(&octets).checksum(), [0, 0]);
        assert_eq!(Sum::of(&octets).nonzero_checksum(), [0xff, 0xff], "RFC 768: zero says none");
    }
    assert_eq!(Sum::ZERO.checksum(), [0xff, 0xff]);
    assert_eq!(Sum::ZERO.u32(u32::MAX).u32(u32::MAX).u16(2).folded(), [0, 2]);
}

/// The example of RFC 1071 §3.
#[test]
fn the_specified_example() {
    assert_eq!(Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]).folded(), [0xdd, 0xf2]);
}

proptest! {
    #[test]
    fn parts_add_up(
        octets in prop::collection::vec(prop_oneof![Just(0u8), Just(0xff), any::<u8>()], 0..500),
        cut in any::<prop::sample::Index>(),
        (word, half) in any::<(u32, u16)>(),
    ) {
        let cut = cut.index(octets.len() + 1) & !1;
        let mut all = octets.clone();
        if all.len() % 2 == 1 {
            all.push(0);
        }
        all.extend(word.to_be_bytes());
        all.extend(half.to_be_bytes());
        let mut copy = vec![0; octets.len() - cut];
        let sum = Sum::of(&octets[..cut]).u32(word).copy(&octets[cut..], &mut copy).u16(half);
        prop_assert_eq!(sum.folded(), plain_sum(&all).to_be_bytes());
        prop_assert_eq!(sum.is_valid(), plain_sum(&all) == 0xffff);
        prop_assert_eq!(&copy[..], &octets[cut..]);
    }

    /// Virtio 1.2, 5.1.6: all fields little endian, in this order.
    #[test]
    fn virtio_headers(octets in any::<[u8; 12]>()) {
        let header = VirtioHeader::parse(&octets).unwrap();
        prop_assert_eq!((header.flags, header.gso_type), (octets[0], octets[1]));
        prop_assert_eq!(header.csum_offset, u16::from_le_bytes([octets[8], octets[9]]));
        prop_assert_eq!(&header.octets()[..], &octets[..10]);
        prop_assert_eq!(VirtioHeader::parse(&octets[..9]), None);
    }
}
