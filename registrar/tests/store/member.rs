//! Real members of etcd on loopback, that can be killed, frozen and asked how they are.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};
use tempfile::TempDir;

use crate::harness::skip;

/// One member with its own directory; killed when dropped, and when the test's thread ends in whatever way.
pub(crate) struct EtcdProcess {
    /// `None` before it is started.
    child: Option<Child>,
    directory: TempDir,
    name: String,
    client_port: u16,
    peer_port: u16,
    /// All members of its cluster, as etcd takes them.
    cluster: String,
    tls: Option<Tls>,
    /// What else it is started with.
    options: &'static [&'static str],
}

/// Files in PEM.
#[derive(Clone)]
pub(crate) struct Tls {
    pub(crate) ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

impl EtcdProcess {
    /// `None` if etcd is not installed, which is then said.
    pub(crate) fn start() -> Option<Self> {
        Self::start_with(|_| None)
    }

    pub(crate) fn start_with(tls: impl FnOnce(&Path) -> Option<Tls>) -> Option<Self> {
        Self::launch(1, tls, &[])?.pop()
    }

    /// With more options.
    pub(crate) fn start_as(options: &'static [&'static str]) -> Option<Self> {
        Self::start_cluster(1, options)?.pop()
    }

    /// Members of one cluster.
    pub(crate) fn start_cluster(size: usize, options: &'static [&'static str]) -> Option<Vec<Self>> {
        Self::launch(size, |_| None, options)
    }

    fn launch(
        size: usize,
        tls: impl FnOnce(&Path) -> Option<Tls>,
        options: &'static [&'static str],
    ) -> Option<Vec<Self>> {
        if Command::new("etcd").arg("--version").output().is_err() {
            skip("etcd is not installed (on Debian: apt-get install etcd-server)");
            return None;
        }
        let directories: Vec<_> = (0..size).map(|_| TempDir::new().unwrap()).collect();
        let tls = tls(directories[0].path());
        // Held together, so that they differ.
        let listeners: Vec<_> = (0..size * 2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports: Vec<_> = listeners.iter().map(|port| port.local_addr().unwrap().port()).collect();
        drop(listeners);
        let peers = ports.chunks(2).enumerate().map(|(n, ports)| format!("m{n}={}", peer_url(ports[1])));
        let cluster = peers.collect::<Vec<_>>().join(",");
        let launched =
            directories.into_iter().zip(ports.chunks(2)).enumerate().map(|(n, (directory, ports))| {
                let mut member = Self {
                    child: None,
                    directory,
                    name: format!("m{n}"),
                    client_port: ports[0],
                    peer_port: ports[1],
                    cluster: cluster.clone(),
                    tls: tls.clone(),
                    options,
                };
                member.spawn();
                member
            });
        let mut members: Vec<_> = launched.collect();
        members.iter_mut().for_each(Self::wait);
        Some(members)
    }

    fn spawn(&mut self) {
        let directory = self.directory.path();
        let (client, peer) = (self.url(), peer_url(self.peer_port));
        let log = File::options().create(true).append(true).open(directory.join("log")).unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "etcd", "--name", &self.name, "--logger", "zap"])
            .arg("--data-dir")
            .arg(directory.join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.cluster])
            .args(self.options)
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if let Some(tls) = &self.tls {
            command.arg("--client-cert-auth");
            command.arg("--trusted-ca-file").arg(&tls.ca);
            command.arg("--cert-file").arg(&tls.cert).arg("--key-file").arg(&tls.key);
        }
        self.child = Some(command.spawn().unwrap());
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.client_port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.client_port
    }

    pub(crate) fn config(&self) -> EtcdConfig {
        EtcdConfig {
            endpoints: vec![self.url()],
            prefix: "test/".into(),
            ca_file: self.tls.as_ref().map(|tls| tls.ca.clone()),
            cert_file: self.tls.as_ref().map(|tls| tls.cert.clone()),
            key_file: self.tls.as_ref().map(|tls| tls.key.clone()),
            ..EtcdConfig::default()
        }
    }

    pub(crate) fn connect(&self) -> EtcdStore {
        EtcdStore::open(&self.config()).unwrap()
    }

    /// Kills it as hard as can be, and starts it anew on what it kept.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.revive();
    }

    /// Starts what was killed.
    pub(crate) fn revive(&mut self) {
        self.spawn();
        self.wait();
    }

    /// Likewise, with TLS from now on.
    pub(crate) fn restart_with(&mut self, tls: Tls) {
        self.tls = Some(tls);
        self.restart();
    }

    pub(crate) fn kill(&mut self) {
        let child = self.child();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Stops it from doing anything, with its connections open.
    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
    }

    pub(crate) fn thaw(&self) {
        self.signal("-CONT");
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().unwrap()
    }

    fn signal(&self, signal: &str) {
        let sent =
            Command::new("kill").args([signal, &self.child.as_ref().unwrap().id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    fn wait(&mut self) {
        for _ in 0..600 {
            if TcpStream::connect(("127.0.0.1", self.client_port)).is_ok() {
                return;
            }
            assert!(self.child().try_wait().unwrap().is_none(), "etcd ended:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("etcd does not listen:\n{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// One of its metrics; 0 if it does not have it yet.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.http("GET /metrics", "");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    pub(crate) fn leads(&self) -> bool {
        self.metric("etcd_server_is_leader") > 0.0
    }

    /// Calls etcd's API in JSON.
    pub(crate) fn api(&self, path: &str, body: &str) {
        let answer = self.http(&format!("POST /v3/{path}"), body);
        assert!(answer.starts_with("HTTP/1.0 200"), "{path}: {answer}");
    }

    fn http(&self, request: &str, body: &str) -> String {
        let mut connection = TcpStream::connect(("127.0.0.1", self.client_port)).unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        write!(connection, "{request} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

fn peer_url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// A CA, and one certificate for both sides, whose common name is `registrar`.
pub(crate) fn certificates(directory: &Path) -> Tls {
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let mut leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
    leaf.distinguished_name.push(rcgen::DnType::CommonName, "registrar");
    leaf.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = leaf.signed_by(&key, &rcgen::Issuer::from_params(&ca, &ca_key)).unwrap();
    let write = |name: &str, pem: String| {
        let path = directory.join(name);
        fs::write(&path, pem).unwrap();
        path
    };
    Tls {
        ca: write("ca.pem", ca_cert.pem()),
        cert: write("cert.pem", cert.pem()),
        key: write("key.pem", key.serialize_pem()),
    }
}
