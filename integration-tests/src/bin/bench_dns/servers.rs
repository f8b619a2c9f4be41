//! The servers that Muster is compared with, each with the same names, on the same processor.

use std::{fmt::Write as _, fs};

use muster_integration_tests::{Host, LabError, Process, Result, process::check};

use crate::DOMAIN;

/// A server under load.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    /// Where it answers over UDP.
    pub(crate) udp: String,
    /// Where it answers over TLS, if it does.
    pub(crate) tls: Option<String>,
    pub(crate) process: Process,
}

/// Starts all that are installed; what is not is told.
pub(crate) fn start(host: &Host, names: u32) -> Result<Vec<Server>> {
    let directory = host.directory().join("servers");
    let path = directory.display().to_string();
    let write = |file: &str, text: String| {
        let path = directory.join(file);
        fs::write(&path, text).map_err(|source| LabError::File { path: path.display().to_string(), source })
    };
    fs::create_dir_all(&directory).map_err(|source| LabError::File { path: path.clone(), source })?;
    write("zone", zone(names))?;
    let mut certificate = host.command("openssl");
    certificate.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    certificate.args(["-subj", "/CN=dns", "-days", "2", "-keyout"]).arg(directory.join("key"));
    check({
        certificate.arg("-out").arg(directory.join("crt"));
        certificate
    })?;
    write(
        "knot.conf",
        format!(
            "server:\n  listen: 127.0.0.1@5301\n  rundir: {path}\n  udp-workers: 1\n  tcp-workers: 1\n  \
             background-workers: 1\ndatabase:\n  storage: {path}\nzone:\n  - domain: {DOMAIN}\n    file: {path}/zone\n    \
             zonefile-sync: -1\n    journal-content: none\n"
        ),
    )?;
    write(
        "nsd.conf",
        format!(
            "server:\n  ip-address: 127.0.0.1@5302\n  ip-address: 127.0.0.1@8532\n  server-count: 1\n  username: \"\"\n  \
             chroot: \"\"\n  pidfile: \"{path}/nsd.pid\"\n  xfrdfile: \"\"\n  zonelistfile: \"{path}/nsd.list\"\n  \
             database: \"\"\n  tls-service-key: \"{path}/key\"\n  tls-service-pem: \"{path}/crt\"\n  tls-port: 8532\n  \
             rrl-ratelimit: 0\n  tcp-count: 2000\n  tcp-query-count: 0\nremote-control:\n  control-enable: no\nzone:\n  \
             name: {DOMAIN}\n  zonefile: \"{path}/zone\"\n"
        ),
    )?;
    let mut unbound = format!(
        "server:\n  interface: 127.0.0.1@5303\n  interface: 127.0.0.1@8533\n  tls-port: 8533\n  tls-service-key: \
         \"{path}/key\"\n  tls-service-pem: \"{path}/crt\"\n  num-threads: 1\n  username: \"\"\n  chroot: \"\"\n  \
         directory: \"{path}\"\n  pidfile: \"{path}/unbound.pid\"\n  use-syslog: no\n  incoming-num-tcp: 2000\n  \
         access-control: 127.0.0.0/8 allow\n  local-zone: \"{DOMAIN}.\" static\n"
    );
    let mut hosts = String::new();
    for number in 0..names {
        let address = address(number);
        let _ = writeln!(unbound, "  local-data: \"d{number}.{DOMAIN}. 5 IN A {address}\"");
        let _ = writeln!(hosts, "{address} d{number}.{DOMAIN}");
    }
    unbound.push_str("remote-control:\n  control-enable: no\n");
    write("unbound.conf", unbound)?;
    write("hosts", hosts)?;
    let dnsmasq = format!(
        "dnsmasq -k -p 5304 --listen-address=127.0.0.1 --bind-interfaces -R -h --local=/{DOMAIN}/ -C /dev/null \
         --addn-hosts={path}/hosts --user= --pid-file="
    );
    let all = [
        ("knot", "knotd", format!("knotd -c {path}/knot.conf"), 5301, 0),
        ("nsd", "nsd", format!("nsd -d -c {path}/nsd.conf"), 5302, 8532),
        ("unbound", "unbound", format!("unbound -d -c {path}/unbound.conf"), 5303, 8533),
        ("dnsmasq", "dnsmasq", dnsmasq, 5304, 0),
    ];
    let mut servers = Vec::new();
    for (name, binary, line, udp, tls) in all {
        if !host.has(binary)? {
            continue;
        }
        let mut command = host.command("sh");
        command.args(["-c", &format!("exec taskset -c {} {line}", crate::SERVER_CPU)]);
        servers.push(Server {
            name,
            udp: format!("127.0.0.1:{udp}"),
            tls: (tls != 0).then(|| format!("127.0.0.1:{tls}")),
            process: host.spawn(name, command)?,
        });
    }
    Ok(servers)
}

fn zone(names: u32) -> String {
    let mut zone = format!(
        "$ORIGIN {DOMAIN}.\n$TTL 5\n@ SOA ns.dns hostmaster 1 7200 1800 86400 5\n@ NS ns.dns\nns.dns A 127.0.0.1\n"
    );
    for number in 0..names {
        let _ = writeln!(zone, "d{number} A {}", address(number));
    }
    zone
}

fn address(number: u32) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::from(0x6440_0400 + number)
}
