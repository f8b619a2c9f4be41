//! An etcd with TLS, hosts for registrars and agents on one switch, and a first registrar that serves.

use std::{fs, path::Path, time::Duration};

use muster_integration_tests::{
    Host, Lab, Process, Result, Switch, failed, is_missing,
    muster::{Agent, JoinCommand, Registrar},
    process::wait_for,
    scenario,
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const ETCD: &str = "198.51.100.1";
/// Where the registrars are.
pub(crate) const REGISTRARS: [&str; 3] = ["198.51.100.11", "198.51.100.12", "198.51.100.13"];

pub(crate) struct Site<'a> {
    lab: &'a Lab,
    switch: Switch,
    pub(crate) etcd: Process,
    /// The host that etcd is on.
    pub(crate) core: Host,
    /// Hosts for registrars.
    pub(crate) hosts: Vec<Host>,
    /// The first one.
    pub(crate) first: Registrar,
}

/// Runs `body` in a site of its own.
pub(crate) fn with_site(name: &str, body: impl Fn(&mut Site<'_>) -> Result) {
    scenario(name, |lab| {
        let host = lab.host("core")?;
        if is_missing(&host, "etcd", "etcd-server")? {
            return Ok(());
        }
        body(&mut Site::new(lab, &host)?)
    });
}

impl<'a> Site<'a> {
    fn new(lab: &'a Lab, core: &Host) -> Result<Self> {
        let switch = lab.switch("lan")?;
        switch.plug(core, &[&format!("{ETCD}/24")])?;
        let mut hosts = Vec::new();
        for (n, address) in REGISTRARS.iter().enumerate() {
            let host = lab.host(&format!("r{n}"))?;
            switch.plug(&host, &[&format!("{address}/24")])?;
            hosts.push(host);
        }
        // The first registrar's host alone has the files, as if they had been put there by hand.
        let pems = hosts[0].directory().join("etcd-pems");
        write_pems(&pems).map_err(|error| failed("making etcd's certificates", error))?;
        let etcd = etcd(core, &pems)?;
        let at = |name: &str| format!("{}", pems.join(name).display());
        let more = format!(
            "drain = \"1s\"\n[store]\nkind = \"etcd\"\n[store.etcd]\nendpoints = [\"https://{ETCD}:2379\"]\n\
             ca_file = \"{}\"\ncert_file = \"{}\"\nkey_file = \"{}\"\n",
            at("ca.pem"),
            at("client.pem"),
            at("client.key")
        );
        let mut first = Registrar::init(&hosts[0], "net.example", REGISTRARS[0], &more)?;
        first.serve()?;
        Ok(Self { lab, switch, etcd, core: core.clone(), hosts, first })
    }

    /// An agent on a host of its own, which has joined through the registrar at `address`.
    pub(crate) fn agent(
        &self,
        name: &str,
        address: &str,
        last_octet: u8,
        join: &JoinCommand,
    ) -> Result<Agent> {
        let host = self.lab.host(name)?;
        self.switch.plug(&host, &[&format!("198.51.100.{last_octet}/24")])?;
        let agent = Agent::new(&host, "")?;
        agent.join(&join.with("registrar", &format!("{address}:7500")), name)?;
        Ok(agent)
    }
}

pub(crate) fn wait_connected(agent: &Agent) -> Result {
    wait_for("the agent to be connected", PATIENCE, || {
        let text = agent.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
        if text.contains("\"connected\": true") { Ok(()) } else { Err(text) }
    })
}

/// The names of all files below `directory`.
pub(crate) fn files(host: &Host, directory: &Path) -> Result<Vec<String>> {
    let found =
        host.sh(&format!("cd {} 2>/dev/null && find . -type f | sort || true", directory.display()))?;
    Ok(found.lines().map(|line| line.trim_start_matches("./").to_owned()).collect())
}

fn etcd(host: &Host, pems: &Path) -> Result<Process> {
    let url = format!("https://{ETCD}:2379");
    let mut command = host.command("etcd");
    command.arg("--data-dir").arg(host.directory().join("etcd")).args(["--log-level", "error"]);
    command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url, "--client-cert-auth"]);
    for (option, file) in
        [("--trusted-ca-file", "ca.pem"), ("--cert-file", "server.pem"), ("--key-file", "server.key")]
    {
        command.arg(option).arg(pems.join(file));
    }
    let etcd = host.spawn("etcd", command)?;
    let at = pems.display();
    let health =
        format!("curl -sf --cacert {at}/ca.pem --cert {at}/client.pem --key {at}/client.key {url}/health");
    wait_for("etcd", PATIENCE, || host.sh(&health).map_err(|e| e.to_string()))?;
    Ok(etcd)
}

/// A CA of etcd's own, with certificates for etcd itself and for its clients.
fn write_pems(directory: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
    fs::create_dir_all(directory)?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "etcd CA");
    let key = KeyPair::generate()?;
    fs::write(directory.join("ca.pem"), params.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(params, key);
    for name in ["server", "client"] {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![SanType::IpAddress(ETCD.parse()?)];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        fs::write(directory.join(format!("{name}.pem")), params.signed_by(&key, &issuer)?.pem())?;
        fs::write(directory.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}
