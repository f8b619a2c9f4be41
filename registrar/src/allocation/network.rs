//! The blocks of one network, and that no two blocks of a deployment overlap.

use std::{fmt, net::Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use muster_proto::admin::NetworkSpec;

use super::PoolError;

/// What a pool is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PoolKind {
    /// Virtual IPv4 addresses of devices.
    DeviceV4,
    /// Virtual IPv6 addresses of devices.
    DeviceV6,
    /// IPv4 ClusterIPs.
    ServiceV4,
    /// IPv6 ClusterIPs.
    ServiceV6,
}

impl PoolKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::DeviceV4, Self::DeviceV6, Self::ServiceV4, Self::ServiceV6];

    pub(super) fn example(self) -> &'static str {
        match self {
            Self::DeviceV4 => "100.64.0.0/11",
            Self::ServiceV4 => "100.96.0.0/12",
            Self::DeviceV6 => "fd5e:9b20:4c11::/64",
            Self::ServiceV6 => "fd5e:9b20:4c11:1::/64",
        }
    }

    fn is_v4(self) -> bool {
        matches!(self, Self::DeviceV4 | Self::ServiceV4)
    }
}

impl fmt::Display for PoolKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DeviceV4 => "device_pool_v4",
            Self::DeviceV6 => "device_pool_v6",
            Self::ServiceV4 => "service_pool_v4",
            Self::ServiceV6 => "service_pool_v6",
        })
    }
}

/// The pools of a network, each good in itself. A network can do without a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkPools {
    /// Virtual IPv4 addresses of devices.
    pub device_v4: Option<IpNet>,
    /// Virtual IPv6 addresses of devices.
    pub device_v6: Option<IpNet>,
    /// IPv4 ClusterIPs.
    pub service_v4: Option<IpNet>,
    /// IPv6 ClusterIPs.
    pub service_v6: Option<IpNet>,
}

impl NetworkPools {
    /// The defaults (design §5): `100.64.0.0/11` and `100.96.0.0/12`, and of the ULA /48 that `random` gives the
    /// global ID of (RFC 4193, 3.2.1), the first /64 for devices and the second for services.
    pub fn with_global_id(random: [u8; 5]) -> Self {
        let [a, b, c, d, e] = random.map(u16::from);
        let v6 = |subnet| {
            let network = Ipv6Addr::new(0xfd00 | a, b << 8 | c, d << 8 | e, subnet, 0, 0, 0, 0);
            Ipv6Net::new(network, 64).ok().map(IpNet::V6)
        };
        let v4 = |network: [u8; 4], length| Ipv4Net::new(network.into(), length).ok().map(IpNet::V4);
        Self {
            device_v4: v4([100, 64, 0, 0], 11),
            device_v6: v6(0),
            service_v4: v4([100, 96, 0, 0], 12),
            service_v6: v6(1),
        }
    }

    /// The pools that `spec` names, checked one by one and against each other; empty texts mean no pool.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn parse(spec: &NetworkSpec) -> Result<Self, PoolError> {
        let pools = Self {
            device_v4: block(PoolKind::DeviceV4, &spec.device_pool_v4)?,
            device_v6: block(PoolKind::DeviceV6, &spec.device_pool_v6)?,
            service_v4: block(PoolKind::ServiceV4, &spec.service_pool_v4)?,
            service_v6: block(PoolKind::ServiceV6, &spec.service_pool_v6)?,
        };
        if pools.device_v4.is_none() && pools.device_v6.is_none() {
            return Err(PoolError::NoDevicePool);
        }
        check_overlaps([("this", &pools)])?;
        Ok(pools)
    }

    /// Writes the pools into `spec`.
    pub fn write(&self, spec: &mut NetworkSpec) {
        let text = |pool: Option<IpNet>| pool.map(|net| net.to_string()).unwrap_or_default();
        spec.device_pool_v4 = text(self.device_v4);
        spec.device_pool_v6 = text(self.device_v6);
        spec.service_pool_v4 = text(self.service_v4);
        spec.service_pool_v6 = text(self.service_v6);
    }

    /// The pool of a kind.
    pub fn get(&self, kind: PoolKind) -> Option<IpNet> {
        match kind {
            PoolKind::DeviceV4 => self.device_v4,
            PoolKind::DeviceV6 => self.device_v6,
            PoolKind::ServiceV4 => self.service_v4,
            PoolKind::ServiceV6 => self.service_v6,
        }
    }

    /// The pools that there are.
    pub fn iter(&self) -> impl Iterator<Item = (PoolKind, IpNet)> + '_ {
        PoolKind::ALL.into_iter().filter_map(|kind| Some((kind, self.get(kind)?)))
    }
}

/// Checks that no two pools of all networks, given by name, share an address.
///
/// # Errors
/// [`PoolError::Overlap`].
pub fn check_overlaps<'a>(
    networks: impl IntoIterator<Item = (&'a str, &'a NetworkPools)>,
) -> Result<(), PoolError> {
    let mut blocks: Vec<(IpNet, PoolKind, &str)> = networks
        .into_iter()
        .flat_map(|(name, pools)| pools.iter().map(move |(kind, net)| (net, kind, name)))
        .collect();
    // Blocks either nest or are apart; so if any two overlap, then two neighbours do in this order.
    blocks.sort_unstable_by_key(|(net, ..)| (net.network(), net.prefix_len()));
    for pair in blocks.windows(2) {
        if let [(a, kind_a, network_a), (b, kind_b, network_b)] = pair
            && a.contains(b)
        {
            return Err(PoolError::Overlap(
                Box::new(((*network_a).to_owned(), *kind_a, *a)),
                Box::new(((*network_b).to_owned(), *kind_b, *b)),
            ));
        }
    }
    Ok(())
}

fn block(kind: PoolKind, text: &str) -> Result<Option<IpNet>, PoolError> {
    if text.is_empty() {
        return Ok(None);
    }
    let net: IpNet =
        text.parse().map_err(|_| PoolError::Syntax { kind, text: text.chars().take(80).collect() })?;
    if net.addr().is_ipv4() != kind.is_v4() {
        return Err(PoolError::Family { kind, net });
    }
    check_block(net)?;
    Ok(Some(net))
}

/// Checks that `net` can be a pool.
pub(super) fn check_block(net: IpNet) -> Result<(), PoolError> {
    if net.trunc() != net {
        return Err(PoolError::HostBits { net });
    }
    let (largest, smallest) = if net.addr().is_ipv4() { (8, 30) } else { (32, 126) };
    if net.prefix_len() < largest {
        return Err(PoolError::TooLarge { net });
    }
    if net.prefix_len() > smallest {
        return Err(PoolError::TooSmall { net });
    }
    let special = match net {
        IpNet::V4(net) => {
            let [first, second, ..] = net.network().octets();
            matches!(first, 0 | 127 | 224..) || (first, second) == (169, 254)
        }
        IpNet::V6(net) => {
            let first = net.network().segments()[0];
            first < 0x0100 || first & 0xffc0 == 0xfe80 || first & 0xff00 == 0xff00
        }
    };
    if special { Err(PoolError::Special { net }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn parse(device_v4: &str, device_v6: &str, service_v4: &str) -> Result<NetworkPools, PoolError> {
        NetworkPools::parse(&NetworkSpec {
            device_pool_v4: device_v4.into(),
            device_pool_v6: device_v6.into(),
            service_pool_v4: service_v4.into(),
            ..NetworkSpec::default()
        })
    }

    #[test]
    fn defaults_are_good_and_written_as_they_are_read() {
        let pools = NetworkPools::with_global_id([0x5e, 0x9b, 0x20, 0x4c, 0x11]);
        let mut spec = NetworkSpec::default();
        pools.write(&mut spec);
        for (kind, text) in PoolKind::ALL.into_iter().zip([
            &spec.device_pool_v4,
            &spec.device_pool_v6,
            &spec.service_pool_v4,
            &spec.service_pool_v6,
        ]) {
            assert_eq!(text, kind.example());
        }
        assert_eq!(NetworkPools::parse(&spec), Ok(pools));
    }

    #[test]
    fn bad_blocks_are_refused_with_a_remedy() {
        for (text, says) in [
            ("100.64.0.0", "write for example 100.64.0.0/11"),
            ("100.64.0.1/11", "write 100.64.0.0/11"),
            ("fd00::/64", "wrong family"),
            ("10.0.0.0/31", "too small"),
            ("10.0.0.1/32", "too small"),
            ("0.0.0.0/0", "too large"),
            ("127.0.0.0/8", "reserved"),
            ("169.254.0.0/16", "reserved"),
            ("224.0.0.0/8", "reserved"),
        ] {
            let error = parse(text, "", "").unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        for (text, says) in [
            ("fd00::/127", "too small"),
            ("::/8", "too large"),
            ("fe80::/64", "reserved"),
            ("ff02::/64", "reserved"),
        ] {
            let error = parse("", text, "").unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert_eq!(parse("", "", "10.0.0.0/8"), Err(PoolError::NoDevicePool));
        assert!(parse("10.0.0.0/30", "fd00::/126", "").is_ok());
    }

    #[test]
    fn overlaps_are_found_within_and_between_networks() {
        let error = parse("10.0.0.0/8", "", "10.3.0.0/16").unwrap_err().to_string();
        assert!(error.contains("10.0.0.0/8") && error.contains("service_pool_v4 10.3.0.0/16"), "{error}");

        let pools = |v4| NetworkPools { device_v4: Some(net(v4)), ..NetworkPools::default() };
        let (a, b, c) = (pools("10.0.0.0/8"), pools("9.0.0.0/8"), pools("10.255.0.0/16"));
        assert_eq!(check_overlaps([("a", &a), ("b", &b)]), Ok(()));
        let error = check_overlaps([("c", &c), ("b", &b), ("a", &a)]).unwrap_err().to_string();
        assert!(error.contains("\"a\"") && error.contains("\"c\""), "{error}");
        assert!(check_overlaps([("a", &a), ("also", &a)]).is_err());
    }
}
