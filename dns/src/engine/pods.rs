//! Names of devices by address, under `pod` (specification 6).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    Engine,
    lookup::{Content, Place, Question},
};
use crate::{directory::Directory, options::PodMode};

impl<D: Directory> Engine<D> {
    /// The content of `labels`, right to left, under `pod`.
    pub(super) fn pod_name(&self, question: &Question<'_>, place: &Place, labels: &[&str]) -> Content {
        let zone = &*place.zone;
        let mode = self.options.pods;
        match labels {
            [] => Content::NoData,
            _ if mode == PodMode::Disabled => Content::NoName,
            [namespace, rest @ ..] if self.serves(zone, namespace) => match rest {
                [] => Content::NoData,
                [address] => {
                    let Some(address) = undashed(address) else { return Content::NoName };
                    let verified = || {
                        self.directory.namespace_of(zone, address).is_some_and(|n| n.as_str() == *namespace)
                            && self.directory.device_at(zone, question.viewer, address).is_some()
                    };
                    if mode == PodMode::Insecure || verified() {
                        Content::addresses(question, place.ttl(), &[address])
                    } else {
                        Content::NoName
                    }
                }
                _ => Content::NoName,
            },
            _ => Content::NoName,
        }
    }
}

/// The address that a label spells: three single dashes make IPv4.
pub(super) fn undashed(label: &str) -> Option<IpAddr> {
    if label.matches('-').count() == 3 && !label.contains("--") {
        label.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::V4)
    } else {
        label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_become_addresses() {
        for (label, address) in [
            ("10-0-0-1", Some("10.0.0.1")),
            ("2001-db8--0", Some("2001:db8::")),
            ("1--2-3", Some("1::2:3")),
            ("1-2-3-4-5-6-7-8", Some("1:2:3:4:5:6:7:8")),
            ("--1", Some("::1")),
            ("10-0-0-256", None),
            ("10-0-0", None),
            ("web", None),
            ("1--2--3", None),
        ] {
            assert_eq!(undashed(label), address.map(|a| a.parse().unwrap()), "{label}");
        }
    }
}
