//! A configuration moves to another host: its own addresses take the place of the other's.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{
    config::{Advertise, Config, DnsListen},
    init,
};

/// Port of DNS that [`DnsListen::Auto`] means.
const DNS: u16 = 53;

/// Makes another host's configuration this host's; says what is not as it was there.
pub(super) fn adapt(config: &mut Config, addresses: &[IpAddr]) -> Vec<String> {
    config.advertise = Advertise::default();
    init::advertise(config, addresses);
    let mut notes = Vec::new();
    let mut note = |key: &str, was: SocketAddr, now: &dyn fmt::Display| {
        notes.push(format!("{key} is {now} here, since {was} is an address of the inviting host"));
    };
    let theirs = |address: &SocketAddr| !address.ip().is_unspecified() && !address.ip().is_loopback();
    let listen = &mut config.listen;
    for (key, address) in [("listen.grpc", &mut listen.grpc), ("listen.dot", &mut listen.dot)] {
        if theirs(address) {
            let was = *address;
            address.set_ip(any(was.ip()));
            note(key, was, address);
        }
    }
    // Without authentication, not to be opened to everybody.
    if theirs(&listen.http) {
        let was = listen.http;
        listen.http.set_ip(Ipv4Addr::LOCALHOST.into());
        note("listen.http", was, &listen.http);
    }
    if let DnsListen::At(was) = listen.dns
        && theirs(&was)
    {
        listen.dns = match was.port() {
            DNS => DnsListen::Auto,
            port => DnsListen::At(SocketAddr::new(any(was.ip()), port)),
        };
        note("listen.dns", was, &listen.dns);
    }
    notes
}

fn any(family: IpAddr) -> IpAddr {
    match family {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests {
    use muster_common::config;

    use super::*;

    #[test]
    fn what_is_another_hosts_becomes_this_ones() {
        let mut config: Config = config::parse(
            "[listen]\ngrpc = \"198.51.100.1:7500\"\ndns = \"198.51.100.1:53\"\ndot = \"[::]:853\"\n\
             http = \"198.51.100.1:7580\"\n[advertise]\nregistrars = [\"198.51.100.1:7500\"]\n",
        )
        .unwrap();
        let notes = adapt(&mut config, &["192.0.2.9".parse().unwrap(), "2001:db8::9".parse().unwrap()]);
        assert_eq!(notes.len(), 3, "{notes:?}");
        assert_eq!(config.listen.grpc, "0.0.0.0:7500".parse().unwrap());
        assert_eq!(config.listen.http, "127.0.0.1:7580".parse().unwrap());
        assert_eq!((config.listen.dns, config.listen.dot), (DnsListen::Auto, "[::]:853".parse().unwrap()));
        assert_eq!(config.advertise.registrars, ["192.0.2.9:7500", "[2001:db8::9]:7500"]);
        assert_eq!(config.advertise.dns, ["192.0.2.9:853", "[2001:db8::9]:853"]);

        for kept in ["127.0.0.1:53", "[::]:53", "0.0.0.0:5353"] {
            let dns = DnsListen::At(kept.parse().unwrap());
            config.listen.dns = dns;
            assert!(adapt(&mut config, &[]).is_empty());
            assert_eq!(config.listen.dns, dns);
        }
        config.listen.dns = DnsListen::At("198.51.100.1:5353".parse().unwrap());
        adapt(&mut config, &[]);
        assert_eq!(config.listen.dns, DnsListen::At("0.0.0.0:5353".parse().unwrap()));
    }
}
