//! The servers that the host had before: those that its resolv.conf names.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    path::Path,
};

use super::settings::{PORT, Settings};

/// Where systemd-resolved listens.
const RESOLVED: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)];
/// resolv.conf(5) allows three; some have more, nobody has so many.
const SERVERS_MAX: usize = 16;

/// The `nameserver` lines of a resolv.conf, as glibc reads them: what is no address is passed over.
/// Link-local IPv6 addresses have a zone, the name or number of an interface, as routers' own addresses do.
pub(super) fn name_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in resolv_conf.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(server) = words.next().and_then(server) else { continue };
        if !servers.contains(&server) && servers.len() < SERVERS_MAX {
            servers.push(server);
        }
    }
    servers
}

fn server(word: &str) -> Option<SocketAddr> {
    let Some((address, zone)) = word.split_once('%') else {
        return Some(SocketAddr::new(word.parse().ok()?, PORT));
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let index = || {
        // No interface has such a name, and no other file is meant to be read.
        if zone.contains('/') || zone.starts_with('.') {
            return None;
        }
        std::fs::read_to_string(format!("/sys/class/net/{zone}/ifindex")).ok()?.trim().parse().ok()
    };
    let scope = zone.parse::<u32>().ok().or_else(index)?;
    Some(SocketAddrV6::new(address, PORT, 0, scope).into())
}

/// The host's servers without ourselves. `None` while they cannot be told: the files cannot be read, or name nobody but
/// us, who have been put there in place of others.
pub(super) fn host_servers(settings: &Settings, own: &[SocketAddr]) -> Option<Vec<SocketAddr>> {
    let named = read(&settings.resolv_conf)?;
    let is_resolved = |server: &SocketAddr| RESOLVED.iter().any(|resolved| server.ip() == *resolved);
    let mut servers = named.clone();
    if named.iter().any(is_resolved)
        && let Some(behind) = read(&settings.resolved_conf).filter(|servers| !servers.is_empty())
    {
        servers.retain(|server| !is_resolved(server));
        servers.extend(behind);
    }
    let servers = without_own(servers, own);
    (named.is_empty() || !servers.is_empty()).then_some(servers)
}

fn read(path: &Path) -> Option<Vec<SocketAddr>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Some(name_servers(&text)),
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "cannot read the host's DNS servers");
            None
        }
    }
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
                    nameserver fe80::1%nowhere\nnameserver fe80::1%../lo\nnameservers 192.0.2.8\noptions edns0\n";
        let servers: Vec<String> = name_servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
        for zone in ["7", "lo"] {
            let servers = name_servers(&format!("nameserver fe80::1%{zone}\n"));
            let scope = if zone == "lo" { 1 } else { 7 };
            assert_eq!(servers, [SocketAddrV6::new("fe80::1".parse().unwrap(), PORT, 0, scope).into()]);
        }
        assert_eq!(name_servers(&"nameserver 1.1.1.1\n".repeat(9)).len(), 1);
        let many: String = (0..99).map(|i| format!("nameserver 10.0.0.{i}\n")).collect();
        assert_eq!(name_servers(&many).len(), SERVERS_MAX);
    }

    #[test]
    fn servers_behind_resolved_are_asked_and_nobody_is_not_taken_for_an_answer() {
        let directory = tempfile::tempdir().unwrap();
        let (resolv_conf, resolved_conf) = (directory.path().join("a"), directory.path().join("b"));
        let settings = Settings {
            resolv_conf: resolv_conf.clone(),
            resolved_conf: resolved_conf.clone(),
            ..Settings::default()
        };
        let own = settings.listen.clone();
        let servers = || {
            let servers = host_servers(&settings, &own)?;
            Some(servers.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(servers(), None);
        std::fs::write(&resolv_conf, "nameserver 127.0.0.53\n").unwrap();
        assert_eq!(servers(), Some(vec!["127.0.0.53:53".into()]));
        std::fs::write(&resolved_conf, "nameserver 192.0.2.1\nnameserver 169.254.20.10\n").unwrap();
        assert_eq!(servers(), Some(vec!["192.0.2.1:53".into()]));
        std::fs::write(&resolv_conf, "nameserver 169.254.20.10\n").unwrap();
        assert_eq!(servers(), None);
        std::fs::write(&resolv_conf, "").unwrap();
        assert_eq!(servers(), Some(Vec::new()));
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
