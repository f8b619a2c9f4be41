//! The `muster-registrar` command as its users meet it: what it prints, how it exits, and what it leaves.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use muster_common::{
    credential::OperatorCredential,
    grpc,
    identity::Party,
    time::Instant,
    tls::{ALPN_H2, Credentials, SpkiHash, pinned_client_config},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_muster-registrar");
/// Generous: test machines are slow and noisy.
const PATIENCE: Duration = Duration::from_secs(30);

/// A registrar in a directory of its own, on ports of loopback that were free a moment ago.
struct Site {
    directory: tempfile::TempDir,
    grpc: u16,
    http: u16,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [grpc, dns, dot, http] = free_ports();
        let text = format!(
            "data_dir = \"{}\"\n[listen]\ngrpc = \"127.0.0.1:{grpc}\"\ndns = \"127.0.0.1:{dns}\"\n\
             dot = \"127.0.0.1:{dot}\"\nhttp = \"127.0.0.1:{http}\"\n",
            directory.path().join("data").display()
        );
        std::fs::write(directory.path().join("registrar.toml"), text).unwrap();
        Self { directory, grpc, http }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("sh");
        // With a soft limit of open files far below the hard one, as login shells have.
        command.args(["-c", "ulimit -Sn 256; exec \"$@\"", "sh", PROGRAM]).args(arguments);
        command.arg("--config").arg(self.path("registrar.toml"));
        command
    }

    fn init(&self) -> Output {
        self.command(&["init", "--domain", "net.example", "--public-address", "127.0.0.1"])
            .arg("--credential")
            .arg(self.path("operator.toml"))
            .output()
            .unwrap()
    }

    fn serve(&self) -> Running {
        let child = self.command(&["serve"]).stderr(Stdio::piped()).spawn().unwrap();
        Running(child)
    }

    /// The status line of a GET from the HTTP listener; `None` while nobody listens.
    fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.http)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }

    fn wait_ready(&self, running: &mut Running) {
        let begin = Instant::now();
        while !self.get("/readyz").is_some_and(|text| text.starts_with("HTTP/1.1 200")) {
            assert!(Instant::now() - begin < PATIENCE, "not ready in time");
            assert!(running.0.try_wait().unwrap().is_none(), "it has exited");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A process that is killed at the end, whatever happens.
struct Running(Child);

impl Running {
    fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.0.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Its exit code and what it wrote to standard error.
    fn finish(mut self) -> (Option<i32>, String) {
        let mut stderr = self.0.stderr.take().unwrap();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            text
        });
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() - begin < PATIENCE, "it did not exit in time");
            std::thread::sleep(Duration::from_millis(20));
        };
        (status.code(), reader.join().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.each_ref().map(|listener| listener.local_addr().unwrap().port())
}

/// The one line that a failed command may write.
fn only_line(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(text.starts_with("muster-registrar: "), "{text}");
    text
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn init_prints_the_join_command_and_a_second_one_refuses() {
    let site = Site::new();
    let output = site.init();
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    let join = format!("muster-agent join --registrar 127.0.0.1:{} --token muster.", site.grpc);
    assert!(printed.contains(&join) && printed.contains("--ca-hash sha256:"), "{printed}");

    let files = ["data/ca.key", "data/ca.crt", "data/registrar.pem", "data/registry.db", "operator.toml"];
    let before: Vec<_> = files.iter().map(|file| read(&site.path(file))).collect();
    let error = only_line(&site.init());
    assert!(error.contains("nothing was changed"), "{error}");
    let after: Vec<_> = files.iter().map(|file| read(&site.path(file))).collect();
    assert!(before == after);
}

#[test]
fn wrong_usage_exits_with_2_and_help_has_examples() {
    for arguments in [&["serve", "--nonsense"][..], &["nonsense"], &["init", "--domain", "x"], &[]] {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["init", "--help"], &["serve", "--help"], &["ca", "rotate", "--help"]]
    {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8(output.stdout).unwrap().contains("Example"), "{arguments:?}");
    }
}

#[test]
fn the_configuration_is_checked_and_printed() {
    let site = Site::new();
    let output = site.command(&["serve", "--print-config"]).env("MUSTER_DRAIN", "3s").output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("drain = \"3s\"") && printed.contains("device_lifetime = \"30d\""), "{printed}");

    std::fs::write(site.path("registrar.toml"), "[listen]\ngprc = \"[::]:1\"\n").unwrap();
    let error = only_line(&site.command(&["serve"]).output().unwrap());
    assert!(error.contains("registrar.toml") && error.contains("gprc"), "{error}");
    std::fs::remove_file(site.path("registrar.toml")).unwrap();
    let error = only_line(&site.command(&["serve"]).output().unwrap());
    assert!(error.contains("registrar.toml"), "{error}");
}

#[test]
fn what_keeps_it_from_serving_is_named() {
    let site = Site::new();
    let error = only_line(&site.command(&["serve"]).output().unwrap());
    assert!(error.contains("muster-registrar init"), "{error}");
    assert!(site.init().status.success());

    let taken = TcpListener::bind(("127.0.0.1", site.grpc)).unwrap();
    let error = only_line(&site.command(&["serve"]).output().unwrap());
    assert!(error.contains("gRPC") && error.contains(&site.grpc.to_string()), "{error}");
    drop(taken);

    // A truncated database, then a file of somebody else's, both left as they are.
    let database = site.path("data/registry.db");
    let whole = read(&database);
    for contents in [&whole[..whole.len() / 2], b"somebody else's file, and not a small one at that"] {
        std::fs::write(&database, contents).unwrap();
        let error = only_line(&site.command(&["serve"]).output().unwrap());
        assert!(error.contains("registry.db"), "{error}");
        assert!(read(&database) == contents);
    }
    std::fs::write(&database, whole).unwrap();

    std::fs::rename(site.path("data/ca.key"), site.path("data/moved")).unwrap();
    let error = only_line(&site.command(&["serve"]).output().unwrap());
    assert!(error.contains("ca.key"), "{error}");
    std::fs::rename(site.path("data/moved"), site.path("data/ca.key")).unwrap();

    let mut running = site.serve();
    site.wait_ready(&mut running);
}

#[test]
fn it_serves_takes_up_a_rotation_and_stops_when_told() {
    let site = Site::new();
    assert!(site.init().status.success());
    for signal in ["TERM", "INT"] {
        let mut running = site.serve();
        site.wait_ready(&mut running);
        assert!(site.get("/healthz").unwrap().starts_with("HTTP/1.1 200"));
        let metrics = site.get("/metrics").unwrap();
        let pool = "network=\"default\",pool=\"device_pool_v4\"";
        for line in [
            "muster_registrar_devices 0".to_owned(),
            // 2^21 less network and broadcast.
            format!("muster_registrar_pool_addresses{{{pool},state=\"free\"}} 2097150"),
            format!("muster_registrar_pool_addresses{{{pool},state=\"used\"}} 0"),
            "muster_registrar_certificate_expiry_seconds{certificate=\"ca\"}".to_owned(),
            "muster_registrar_certificate_expiry_seconds{certificate=\"registrar\"}".to_owned(),
        ] {
            assert!(metrics.contains(&line), "{line}: {metrics}");
        }
        // As many files as the host allows, whatever the soft limit that it was started with.
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", running.0.id())).unwrap();
        let files: Vec<_> =
            limits.lines().find(|l| l.starts_with("Max open files")).unwrap().split_whitespace().collect();
        assert_eq!(files[3], files[4], "{limits}");
        // A second registrar on the same files finds its ports taken, and changes nothing.
        only_line(&site.command(&["serve"]).output().unwrap());

        running.signal(signal);
        let (code, log) = running.finish();
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("serving") && log.contains("stopped"), "{log}");
    }

    let mut running = site.serve();
    site.wait_ready(&mut running);
    let before = read(&site.path("data/registrar.pem"));
    for step in ["prepare", "activate"] {
        let output = site.command(&["ca", "rotate", step]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    running.signal("HUP");
    let begin = Instant::now();
    while read(&site.path("data/registrar.pem")) == before {
        assert!(Instant::now() - begin < PATIENCE, "the registrar did not take up its new certificate");
        std::thread::sleep(Duration::from_millis(20));
    }
    let error = only_line(&site.command(&["ca", "rotate", "retire"]).output().unwrap());
    assert!(error.contains("--force"), "{error}");
    running.signal("TERM");
    assert_eq!(running.finish().0, Some(0));
}

#[test]
fn operators_get_new_credentials() {
    let site = Site::new();
    assert!(site.init().status.success());
    let made = site.path("alice.toml");
    let output = site
        .command(&["credential", "--name", "alice", "--output", made.to_str().unwrap()])
        .env("MUSTER_ADVERTISE_REGISTRARS", "registrar.example:7500")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let credential = OperatorCredential::load(&made).unwrap();
    assert_eq!(credential.registrar, "registrar.example:7500");
    let identity = credential.key_pair().unwrap().identity().unwrap();
    assert_eq!(identity.to_string(), "spiffe://net.example/operator/alice");
}

#[tokio::test]
async fn health_and_reflection_answer_on_the_grpc_port() {
    let site = Site::new();
    assert!(site.init().status.success());
    let mut running = site.serve();
    site.wait_ready(&mut running);
    let credential = OperatorCredential::load(&site.path("operator.toml")).unwrap();
    let credentials =
        Credentials::new(&credential.key_pair().unwrap(), &credential.trusted().unwrap()).unwrap();
    let tls = credentials.client_config(|party| matches!(party, Party::Registrar { .. }), ALPN_H2).unwrap();
    let channel = grpc::connect(&credential.registrar, Arc::new(tls)).await.unwrap();

    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let answer = health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);

    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    // Strangers may ask for health, and for nothing of this.
    let pin = SpkiHash::of(&credential.trusted().unwrap()[0]).unwrap();
    let tls = Arc::new(pinned_client_config(pin).unwrap());
    let stranger = grpc::connect(&credential.registrar, tls).await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(stranger.clone());
    health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
    let mut reflection = ServerReflectionClient::new(stranger);
    let refused = reflection.server_reflection_info(tokio_stream::once(request.clone())).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);

    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services");
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for name in [
        "muster.enrollment.v1.EnrollmentService",
        "muster.registration.v1.RegistrationService",
        "muster.admin.v1.NetworkService",
        "grpc.health.v1.Health",
    ] {
        assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
    }
}

#[test]
fn two_registrars_share_an_etcd() {
    let directory = tempfile::tempdir().unwrap();
    let [client, peer] = free_ports();
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let etcd = Command::new("etcd")
        .arg("--data-dir")
        .arg(directory.path().join("etcd"))
        .args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)])
        .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
        .args(["--initial-cluster", &format!("default={}", url(peer))])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let etcd = match etcd {
        Ok(etcd) => Running(etcd),
        Err(error) => {
            assert!(std::env::var_os("MUSTER_REQUIRE_ROOT").is_none(), "etcd is missing: {error}");
            let _ = writeln!(std::io::stderr(), "skipped: etcd is not installed ({error})");
            return;
        }
    };
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", client)).is_err() {
        assert!(Instant::now() - begin < PATIENCE, "etcd does not start");
        std::thread::sleep(Duration::from_millis(20));
    }

    let more = format!("[store]\nkind = \"etcd\"\n[store.etcd]\nendpoints = [\"{}\"]\n", url(client));
    let sites = [(); 2].map(|()| {
        let site = Site::new();
        let mut config = String::from_utf8(read(&site.path("registrar.toml"))).unwrap();
        config.push_str(&more);
        std::fs::write(site.path("registrar.toml"), config).unwrap();
        site
    });
    let [first, second] = &sites;
    assert!(first.init().status.success());
    // Another deployment in the same place is refused, and leaves nothing behind.
    let error = only_line(&second.init());
    assert!(error.contains("holds a Muster deployment already"), "{error}");
    assert!(!second.path("data").exists() && !second.path("operator.toml").exists());

    std::fs::create_dir(second.path("data")).unwrap();
    for name in ["ca.key", "ca.crt"] {
        std::fs::copy(first.path("data").join(name), second.path("data").join(name)).unwrap();
    }
    let mut registrars = [first.serve(), second.serve()];
    for (site, registrar) in sites.iter().zip(&mut registrars) {
        site.wait_ready(registrar);
    }
    for registrar in registrars {
        registrar.signal("TERM");
        let (code, log) = registrar.finish();
        assert_eq!(code, Some(0), "{log}");
    }
    drop(etcd);
    let error = only_line(&first.command(&["serve"]).output().unwrap());
    assert!(error.contains("etcd") && error.contains(&client.to_string()), "{error}");
}

#[test]
fn a_deployment_goes_on_from_its_backup() {
    let site = Site::new();
    assert!(site.init().status.success());
    let mut running = site.serve();
    site.wait_ready(&mut running);
    let backup = site.path("backup");
    let output = site.command(&["backup", "--output", backup.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("net.example") && printed.contains("ca.crt, ca.key"), "{printed}");
    let error = only_line(&site.command(&["backup", "--output", backup.to_str().unwrap()]).output().unwrap());
    assert!(error.contains("exists already") && error.contains("--force"), "{error}");

    // In JSON, and without any configuration.
    let verify = ["backup", "--verify", backup.to_str().unwrap(), "-o", "json"];
    let output = Command::new(PROGRAM).args(verify).output().unwrap();
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["trustDomain"], "net.example");
    assert_eq!(told["caFiles"], serde_json::json!(["ca.crt", "ca.key"]));

    // The registrar that runs goes on, and nothing is put where it is.
    let error = only_line(&site.command(&["restore", backup.to_str().unwrap()]).output().unwrap());
    assert!(error.contains("a registrar may be running in") && error.contains("stop it first"), "{error}");
    running.signal("TERM");
    let (code, log) = running.finish();
    assert_eq!(code, Some(0), "{log}");

    // Another host, with nothing but the backup, serves the same deployment with the same CA.
    let other = Site::new();
    let output = other.command(&["restore", backup.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("is restored") && printed.contains("registry.db"), "{printed}");
    let mut running = other.serve();
    other.wait_ready(&mut running);
    assert!(read(&other.path("data/ca.key")) == read(&site.path("data/ca.key")));
    let pool =
        "muster_registrar_pool_addresses{network=\"default\",pool=\"device_pool_v4\",state=\"free\"} 2097150";
    assert!(other.get("/metrics").unwrap().contains(pool));

    for arguments in [
        &["backup"][..],
        &["backup", "--output", "a", "--verify", "b"],
        &["restore"],
        &["migrate", "--from", "sqlite"],
        &["migrate", "--from", "sqlite", "--to", "mysql"],
    ] {
        assert_eq!(Command::new(PROGRAM).args(arguments).output().unwrap().status.code(), Some(2));
    }
}
