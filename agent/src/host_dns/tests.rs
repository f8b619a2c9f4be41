use std::{fs, net::UdpSocket as StdSocket, sync::Arc, thread};

use super::*;

const TEXT: &str = "search corp.example\nnameserver 192.0.2.53\n";

/// Answers whatever it is asked, until it is dropped.
struct Answering(SocketAddr, tokio::task::JoinHandle<()>);

impl Answering {
    async fn at(address: &str) -> Self {
        let socket = tokio::net::UdpSocket::bind(address).await.unwrap();
        let bound = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut query = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut query).await {
                let _ = socket.send_to(&query[..length], from).await;
            }
        });
        Self(bound, task)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.1.abort();
    }
}

fn settings(directory: &Path, server: SocketAddr, mode: Mode) -> Settings {
    Settings {
        mode,
        server,
        interface: "lo".into(),
        domain: "net.example".into(),
        routes: vec!["100.64.0.0/16".parse().unwrap()],
        search: Vec::new(),
        paths: Paths {
            resolv_conf: directory.join("resolv.conf"),
            backup: directory.join("state/resolv.conf.backup"),
            resolved: directory.join("resolve"),
            bus: "unix:path=/nowhere".into(),
        },
    }
}

async fn until(path: &Path, what: &str, good: impl Fn(&str) -> bool) {
    for _ in 0..600 {
        if good(&fs::read_to_string(path).unwrap_or_default()) {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("{what}: {:?}", fs::read_to_string(path));
}

fn names(text: &str, server: SocketAddr) -> bool {
    resolv_conf::servers(text.as_bytes()) == [server.ip()]
}

#[test]
fn programs_are_told_a_server_at_port_53() {
    let listen = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<SocketAddr>>();
    assert_eq!(
        server(&listen(&["127.0.0.1:5353", "169.254.20.10:53"])),
        Some(listen(&["169.254.20.10:53"])[0])
    );
    assert_eq!(server(&listen(&["0.0.0.0:53"])), Some(listen(&["127.0.0.1:53"])[0]));
    assert_eq!(server(&listen(&["127.0.0.1:5353"])), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_names_the_resolver_once_it_answers_and_until_it_stops() {
    let directory = tempfile::tempdir().unwrap();
    let reserved = StdSocket::bind("127.0.0.1:0").unwrap();
    let server = reserved.local_addr().unwrap();
    let settings = settings(directory.path(), server, Mode::Auto);
    let path = settings.paths.resolv_conf.clone();
    fs::write(&path, TEXT).unwrap();
    let mut hook = HostDns::prepare(settings.clone()).await;
    // The resolver finds the host's own servers in what is never edited.
    assert_eq!(hook.resolv_conf(), settings.paths.backup);
    assert_eq!(fs::read_to_string(hook.resolv_conf()).unwrap(), TEXT);
    hook.start().await;
    assert_eq!(fs::read_to_string(&path).unwrap(), TEXT, "nobody answers yet");
    drop(reserved);
    let _resolver = Answering::at(&server.to_string()).await;
    until(&path, "the edit", |text| names(text, server)).await;
    // Another program writes the file anew, in place and by renaming.
    let second = TEXT.replace(".53", ".54");
    fs::write(&path, &second).unwrap();
    until(&path, "the edit after a write", |text| names(text, server) && text.contains("192.0.2.54")).await;
    let third = TEXT.replace(".53", ".55");
    fs::write(directory.path().join("new"), &third).unwrap();
    fs::rename(directory.path().join("new"), &path).unwrap();
    until(&path, "the edit after a rename", |text| names(text, server) && text.contains("192.0.2.55")).await;
    assert_eq!(fs::read_to_string(hook.resolv_conf()).unwrap(), third);
    hook.stop().await;
    assert_eq!(fs::read_to_string(&path).unwrap(), third);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_goes_without_a_resolver_that_is_silent() {
    let directory = tempfile::tempdir().unwrap();
    let resolver = Answering::at("127.0.0.1:0").await;
    let settings = settings(directory.path(), resolver.0, Mode::ResolvConf);
    let path = settings.paths.resolv_conf.clone();
    fs::write(&path, TEXT).unwrap();
    let mut hook = HostDns::prepare(settings).await;
    hook.start().await;
    let server = resolver.0;
    assert!(names(&fs::read_to_string(&path).unwrap(), server), "a start waits for the edit");
    drop(resolver);
    until(&path, "the host's own text", |text| text == TEXT).await;
    let _resolver = Answering::at(&server.to_string()).await;
    until(&path, "the edit again", |text| names(text, server)).await;
    hook.stop().await;
    assert_eq!(fs::read_to_string(&path).unwrap(), TEXT);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_agent_left_is_swept() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(directory.path(), "127.0.0.1:53".parse().unwrap(), Mode::None);
    let path = settings.paths.resolv_conf.clone();
    fs::write(&path, TEXT).unwrap();
    settings.paths.file().edit(settings.server.ip()).unwrap();
    sweep(&settings.paths).await;
    assert_eq!(fs::read_to_string(&path).unwrap(), TEXT);
    let mut hook = HostDns::prepare(settings).await;
    hook.start().await;
    hook.stop().await;
    assert_eq!(fs::read_to_string(&path).unwrap(), TEXT);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_programs_do_not_fight_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let resolver = Answering::at("127.0.0.1:0").await;
    let settings = settings(directory.path(), resolver.0, Mode::ResolvConf);
    let path = Arc::new(settings.paths.resolv_conf.clone());
    fs::write(&*path, TEXT).unwrap();
    let mut hook = HostDns::prepare(settings).await;
    hook.start().await;
    let server = resolver.0;
    // As long as it is edited, it is written again.
    let other = Arc::clone(&path);
    let fight = thread::spawn(move || {
        let (mut rounds, mut idle) = (0, 0);
        while idle < 40 {
            thread::sleep(Duration::from_millis(50));
            if names(&fs::read_to_string(&*other).unwrap(), server) {
                fs::write(&*other, TEXT).unwrap();
                (rounds, idle) = (rounds + 1, 0);
            } else {
                idle += 1;
            }
        }
        rounds
    });
    let rounds = tokio::task::spawn_blocking(|| fight.join().unwrap()).await.unwrap();
    assert_eq!(rounds, 10);
    hook.stop().await;
    assert_eq!(fs::read_to_string(&*path).unwrap(), TEXT);
}
