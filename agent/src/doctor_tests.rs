use std::{fs, path::Path};

use super::*;

const TEXT: &str = "nameserver 127.0.0.2\n";

fn host(directory: &Path) -> (Config, Paths) {
    let config = Config { state_dir: directory.join("state"), ..Config::default() };
    let paths = Paths {
        resolv_conf: directory.join("resolv.conf"),
        backup: directory.join("state/resolv.conf.backup"),
        resolved: directory.join("resolve"),
        bus: "unix:path=/nowhere".into(),
    };
    fs::write(&paths.resolv_conf, TEXT).unwrap();
    (config, paths)
}

fn find<'a>(checks: &'a [Check], name: &str) -> &'a Check {
    checks.iter().find(|check| check.name == name).unwrap()
}

#[tokio::test]
async fn an_edit_without_an_agent_is_found_and_undone() {
    let directory = tempfile::tempdir().unwrap();
    let (config, paths) = host(directory.path());
    let gone = Err("the agent is not running\nremedy: start it".to_owned());
    assert_eq!(fix(&config, &paths).unwrap(), Fixed::Nothing);
    paths.file().edit("169.254.20.10".parse().unwrap()).unwrap();
    let checks = examine(&config, &paths, &gone).await;
    assert_eq!(
        (find(&checks, "agent").outcome, find(&checks, "agent").remedy.as_str()),
        (Outcome::Fail, "start it")
    );
    let dns = find(&checks, "host's DNS");
    assert_eq!((dns.outcome, dns.remedy.as_str()), (Outcome::Fail, FIX));
    assert_eq!(find(&checks, "backup").outcome, Outcome::Ok);
    assert_eq!(find(&checks, "other names").outcome, Outcome::Fail, "nobody answers at 127.0.0.2");
    assert_eq!(fix(&config, &paths).unwrap(), Fixed::Undone);
    assert_eq!(fs::read_to_string(&paths.resolv_conf).unwrap(), TEXT);
    let checks = examine(&config, &paths, &gone).await;
    assert_eq!(find(&checks, "host's DNS").outcome, Outcome::Ok);
    assert!(checks.iter().all(|check| check.name != "backup"));
}

#[tokio::test]
async fn the_edit_of_an_agent_that_runs_stays() {
    let directory = tempfile::tempdir().unwrap();
    let (config, paths) = host(directory.path());
    let _lock = State::new(&config.state_dir).lock().unwrap();
    paths.file().edit("169.254.20.10".parse().unwrap()).unwrap();
    assert_eq!(fix(&config, &paths).unwrap(), Fixed::AgentRuns);
    let status = GetStatusResponse {
        name: "alice".into(),
        virtual_ipv4: "127.0.0.1".into(),
        ready: true,
        ..GetStatusResponse::default()
    };
    let checks = examine(&config, &paths, &Ok(status.clone())).await;
    for name in ["agent", "interface", "host's DNS", "backup"] {
        assert_eq!(find(&checks, name).outcome, Outcome::Ok, "{name}: {checks:?}");
    }
    // Nobody listens at 169.254.20.10 here, and no such address is on this host.
    assert_eq!(find(&checks, "resolver").outcome, Outcome::Fail);
    let elsewhere = GetStatusResponse { virtual_ipv4: "192.0.2.77".into(), ..status.clone() };
    fs::write(&paths.resolv_conf, TEXT).unwrap();
    let checks = examine(&config, &paths, &Ok(elsewhere)).await;
    assert_eq!(find(&checks, "interface").outcome, Outcome::Fail);
    let dns = find(&checks, "host's DNS");
    assert!(dns.outcome == Outcome::Fail && dns.message.contains("does not name"), "{dns:?}");
    // As the operator wants it.
    let mut by_hand = config.clone();
    by_hand.resolver.host = Mode::None;
    assert_eq!(find(&examine(&by_hand, &paths, &Ok(status)).await, "host's DNS").outcome, Outcome::Ok);
}
