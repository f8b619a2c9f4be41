//! Nebula: certificates of a CA made for the run, and two hosts that know each other's address.

use muster_integration_tests::{Host, Lab, LabError, Process, Result};

use crate::{
    pair::{LEFT, Pair, RIGHT, Tunnel, hosts},
    peers::{Peer, tool},
};

/// Nebula on two hosts, with the MTU that the WireGuards have (Nebula adds as much to a packet).
pub(crate) fn start(lab: &Lab) -> Result<Pair> {
    let (nebula, cert) = (tool("nebula")?, tool("nebula-cert")?);
    let (left, right) = hosts(lab, Peer::Nebula)?;
    let directory = lab.directory().join("nebula");
    let (directory, cert) = (directory.display(), cert.display());
    left.sh(&format!(
        "mkdir -p {directory}; cd {directory}; {cert} ca -name bench; \
         {cert} sign -name left -ip 10.9.0.1/24; {cert} sign -name right -ip 10.9.0.2/24"
    ))?;
    let start = |host: &Host, name: &str, other: &str, endpoint: &str| -> Result<Process> {
        let config = host.directory().join("nebula.yaml");
        let text = format!(
            "pki: {{ca: {directory}/ca.crt, cert: {directory}/{name}.crt, key: {directory}/{name}.key}}\n\
             static_host_map: {{\"{other}\": [\"{endpoint}:4242\"]}}\n\
             lighthouse: {{am_lighthouse: false, hosts: []}}\n\
             listen: {{host: 0.0.0.0, port: 4242}}\n\
             tun: {{dev: nebula0, mtu: 1420}}\n\
             logging: {{level: warning}}\n\
             firewall:\n  outbound: [{{port: any, proto: any, host: any}}]\n  \
             inbound: [{{port: any, proto: any, host: any}}]\n"
        );
        std::fs::create_dir_all(host.directory())
            .and_then(|()| std::fs::write(&config, text))
            .map_err(|source| LabError::File { path: config.display().to_string(), source })?;
        let mut command = host.command(&nebula);
        command.arg("-config").arg(&config);
        host.spawn("nebula", command)
    };
    let processes = vec![start(&left, "left", "10.9.0.2", RIGHT)?, start(&right, "right", "10.9.0.1", LEFT)?];
    Pair::new(Peer::Nebula, (left, right), "10.9.0.2", Tunnel::Processes { processes, sockets: Vec::new() })
}
