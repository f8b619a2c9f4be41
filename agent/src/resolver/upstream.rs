//! The servers that the host had before: those that its resolv.conf names.

use std::net::{IpAddr, SocketAddr};

/// Port of DNS.
const PORT: u16 = 53;
/// resolv.conf(5) allows three; some have more, nobody has so many.
const SERVERS_MAX: usize = 16;

/// The `nameserver` lines of a resolv.conf, as glibc reads them: what is no address is passed over.
/// Link-local IPv6 addresses with a zone are left out.
pub(super) fn name_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in resolv_conf.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        let server = SocketAddr::new(address, PORT);
        if !servers.contains(&server) && servers.len() < SERVERS_MAX {
            servers.push(server);
        }
    }
    servers
}

/// `servers` without the addresses in `own`, on which we listen ourselves: a query must not come back to us.
pub(super) fn without_own(servers: Vec<SocketAddr>, own: &[SocketAddr]) -> Vec<SocketAddr> {
    let is_own = |server: &SocketAddr| {
        own.iter().any(|own| {
            let ip = own.ip();
            let same = ip == server.ip()
                || ip.is_unspecified() && (server.ip().is_loopback() || server.ip().is_unspecified());
            same && own.port() == server.port()
        })
    };
    servers.into_iter().filter(|server| !is_own(server)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_glibc_reads_them() {
        let text = "# nameserver 192.0.2.9\n; x\n\tnameserver\t192.0.2.1  # primary\nsearch example\n\
                    nameserver 2001:db8::1\r\nnameserver nonsense\nnameserver\nnameserver 192.0.2.1\n\
                    nameserver fe80::1%eth0\nnameservers 192.0.2.8\noptions edns0\n";
        let servers: Vec<String> = name_servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
        assert_eq!(name_servers(&"nameserver 1.1.1.1\n".repeat(9)).len(), 1);
        let many: String = (0..99).map(|i| format!("nameserver 10.0.0.{i}\n")).collect();
        assert_eq!(name_servers(&many).len(), SERVERS_MAX);
    }

    #[test]
    fn own_addresses_are_left_out() {
        let parse = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let servers = parse(&["169.254.20.10:53", "127.0.0.53:53", "192.0.2.1:53", "127.0.0.1:5353"]);
        let left = without_own(servers.clone(), &parse(&["169.254.20.10:53"]));
        assert_eq!(left, parse(&["127.0.0.53:53", "192.0.2.1:53", "127.0.0.1:5353"]));
        let left = without_own(servers, &parse(&["0.0.0.0:53"]));
        assert_eq!(left, parse(&["169.254.20.10:53", "192.0.2.1:53", "127.0.0.1:5353"]));
    }
}
