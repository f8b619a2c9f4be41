//! Reverse names: `in-addr.arpa` and `ip6.arpa` (RFC 1035, 3.5; RFC 3596, 2.5), and where reverse zones are cut.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A name under `in-addr.arpa` or `ip6.arpa`, read from the right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReverseName {
    /// The addresses at or below the name: a single one if the name is a full address.
    pub prefix: IpNet,
    /// Whether labels are left of the prefix that belong to no address. Such a name does not exist.
    pub excess: bool,
}

impl ReverseName {
    /// Reads `name`, in lower case and without a trailing dot; `None` if it is no reverse name.
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.strip_suffix(".arpa")?;
        let mut labels = name.rsplit('.').peekable();
        let prefix = match labels.next()? {
            "in-addr" => {
                let (mut octets, mut length) = ([0; 4], 0);
                for octet in &mut octets {
                    let Some(value) = labels.next_if(|l| is_octet(l)).and_then(|l| l.parse().ok()) else {
                        break;
                    };
                    *octet = value;
                    length += 8;
                }
                IpNet::V4(Ipv4Net::new(Ipv4Addr::from(octets), length).ok()?)
            }
            "ip6" => {
                let (mut bits, mut length) = (0_u128, 0_u8);
                while length < 128 {
                    let Some(nibble) = labels.next_if(|l| nibble(l).is_some()).and_then(nibble) else {
                        break;
                    };
                    length += 4;
                    bits |= nibble << (128 - u32::from(length));
                }
                IpNet::V6(Ipv6Net::new(Ipv6Addr::from(bits), length).ok()?)
            }
            _ => return None,
        };
        Some(Self { prefix, excess: labels.next().is_some() })
    }

    /// Whether the name is that of one address.
    pub fn is_address(&self) -> bool {
        !self.excess && self.prefix.prefix_len() == self.prefix.max_prefix_len()
    }
}

/// Decimal, 0 to 255, without leading zeros or signs: one spelling per address.
fn is_octet(label: &str) -> bool {
    label.bytes().all(|b| b.is_ascii_digit())
        && (label.len() == 1 || !label.starts_with('0'))
        && label.parse::<u8>().is_ok()
}

/// One hexadecimal digit.
fn nibble(label: &str) -> Option<u128> {
    let digit = label.chars().next().filter(|_| label.len() == 1)?;
    digit.to_digit(16).map(u128::from)
}

/// Number of labels of the reverse zone that `pool`'s addresses are in, `in-addr.arpa` or `ip6.arpa` included.
/// A pool that does not end at an octet or nibble has several zones, cut at the next one.
pub fn zone_labels(pool: IpNet) -> u8 {
    let unit = match pool {
        IpNet::V4(_) => 8,
        IpNet::V6(_) => 4,
    };
    pool.prefix_len().div_ceil(unit) + 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Option<(String, bool)> {
        ReverseName::parse(name).map(|r| (r.prefix.to_string(), r.excess))
    }

    #[test]
    fn reverse_names_are_read() {
        let some = |prefix: &str, excess| Some((prefix.to_owned(), excess));
        assert_eq!(parse("4.3.64.100.in-addr.arpa"), some("100.64.3.4/32", false));
        assert_eq!(parse("64.100.in-addr.arpa"), some("100.64.0.0/16", false));
        assert_eq!(parse("in-addr.arpa"), some("0.0.0.0/0", false));
        assert_eq!(parse("x.64.100.in-addr.arpa"), some("100.64.0.0/16", true));
        assert_eq!(parse("1.4.3.64.100.in-addr.arpa"), some("100.64.3.4/32", true));
        for bad in ["04", "+4", "256", "", "-1", "4 "] {
            assert_eq!(parse(&format!("{bad}.64.100.in-addr.arpa")), some("100.64.0.0/16", true), "{bad}");
        }
        assert_eq!(parse("d.f.ip6.arpa"), some("fd00::/8", false));
        assert_eq!(parse("g.d.f.ip6.arpa"), some("fd00::/8", true));
        assert_eq!(parse("00.d.f.ip6.arpa"), some("fd00::/8", true));
        let full = format!("1.{}d.f.ip6.arpa", "0.".repeat(29));
        assert_eq!(parse(&full), some("fd00::1/128", false));
        assert!(ReverseName::parse(&full).unwrap().is_address());
        assert_eq!(parse("home.arpa"), None);
        assert_eq!(parse("arpa"), None);
        assert_eq!(parse("in-addr.arpa.example"), None);
    }

    #[test]
    fn zones_are_cut_at_octets_and_nibbles() {
        for (pool, labels) in
            [("100.64.0.0/11", 4), ("10.0.0.0/8", 3), ("192.0.2.0/28", 6), ("fd00::/48", 14), ("fd00::/7", 4)]
        {
            assert_eq!(zone_labels(pool.parse().unwrap()), labels, "{pool}");
        }
    }
}
