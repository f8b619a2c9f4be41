use std::collections::BTreeMap;

use muster_common::tls::certificate_identity;

use super::*;

/// Every file below `directory` with its contents, and every directory.
fn snapshot(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut rest = vec![directory.to_owned()];
    while let Some(path) = rest.pop() {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                all.insert(path.clone(), Vec::new());
                rest.push(path);
            } else {
                all.insert(path.clone(), std::fs::read(path).unwrap());
            }
        }
    }
    all
}

fn options(directory: &Path) -> Options {
    Options {
        config: directory.join("etc/registrar.toml"),
        domain: "net.example".parse().unwrap(),
        public_addresses: vec!["192.0.2.7".parse().unwrap()],
        network: "default".parse().unwrap(),
        credential: directory.join("etc/operator.toml"),
    }
}

fn write_config_file(directory: &Path, more: &str) {
    std::fs::create_dir_all(directory.join("etc")).unwrap();
    let text = format!("data_dir = \"{}\"\n{more}", directory.join("data").display());
    std::fs::write(directory.join("etc/registrar.toml"), text).unwrap();
}

#[tokio::test]
async fn everything_is_made_and_a_second_time_nothing() {
    let dir = tempfile::tempdir().unwrap();
    write_config_file(dir.path(), "");
    let report = init(options(dir.path()), Timestamp::now()).await.unwrap();
    let ca = Ca::load(&dir.path().join("data")).unwrap();
    let printed = report.to_string();
    let expected = format!("muster-agent join --registrar 192.0.2.7:7500 --token muster.{}", "");
    assert!(printed.contains(&expected), "{printed}");
    assert!(printed.contains(&format!("--ca-hash {}", ca.hash())), "{printed}");

    let credential = OperatorCredential::load(&dir.path().join("etc/operator.toml")).unwrap();
    assert_eq!((&*credential.registrar, &*credential.network), ("192.0.2.7:7500", "default"));
    assert_eq!(
        credential.key_pair().unwrap().identity().unwrap().to_string(),
        "spiffe://net.example/operator/admin"
    );
    assert_eq!(credential.trusted().unwrap(), ca.roots());
    let own = own_certificate::load(&dir.path().join("data").join(own_certificate::FILE)).unwrap();
    let identity = certificate_identity(&own.chain[0]).unwrap();
    assert!(matches!(identity.party, Party::Registrar { .. }));

    // The registry holds the network and a token that admits.
    {
        let store = SqliteStore::open(dir.path().join("data/registry.db")).unwrap();
        let registry = Registry::load(Arc::new(store)).await.unwrap();
        assert!(registry.store().get(keys::root(1)).await.unwrap().is_some());
        let index = registry.read();
        let state = index.network("default").unwrap();
        assert_eq!(state.network.domain.as_str(), "net.example");
        assert_eq!(state.network.stored.spec.as_ref().unwrap().device_pool_v4, "100.64.0.0/11");
        let token = report.join_command.split_whitespace().nth(5).unwrap().parse::<JoinToken>().unwrap();
        let stored = &state.tokens[token.id().as_str()].stored;
        let key = SpkiHash::of_spki(b"key");
        assert!(crate::token::check(Some(stored), &token, Timestamp::now(), &key).is_ok());
    }

    let before = snapshot(dir.path());
    let error = init(options(dir.path()), Timestamp::now()).await.unwrap_err().to_string();
    assert!(error.contains("nothing was changed") && error.contains("ca.key"), "{error}");
    assert_eq!(snapshot(dir.path()), before);
}

#[tokio::test]
async fn a_missing_configuration_is_written_and_loads() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: dir.path().join("da\"ta"), ..Config::default() };
    advertise(&mut config, &["2001:db8::7".parse().unwrap()]);
    let path = dir.path().join("registrar.toml");
    write_config(&config, &path).unwrap();
    let loaded: Config = muster_common::config::load_with(Some(&path), |_| None).unwrap();
    assert_eq!(loaded, config);
    assert_eq!(loaded.advertise.registrars, ["[2001:db8::7]:7500"]);
    assert_eq!(loaded.advertise.dns, ["[2001:db8::7]:853"]);
}

#[tokio::test]
async fn a_failure_leaves_nothing_behind() {
    for (more, says) in [
        // The store is made last of all.
        ("[store]\npath = \"/proc/registry.db\"\n", "/proc"),
        (
            "[store]\nkind = \"etcd\"\n[store.etcd]\nca_file = \"/none.pem\"\nendpoints = [\"https://127.0.0.1:1\"]\n",
            "none.pem",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_config_file(dir.path(), more);
        let before = snapshot(dir.path());
        let error = init(options(dir.path()), Timestamp::now()).await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert_eq!(snapshot(dir.path()), before);
    }
}

#[tokio::test]
async fn bad_configurations_make_nothing() {
    let dir = tempfile::tempdir().unwrap();
    write_config_file(dir.path(), "[listne]\n");
    let before = snapshot(dir.path());
    let error = init(options(dir.path()), Timestamp::now()).await.unwrap_err().to_string();
    assert!(error.contains("registrar.toml") && error.contains("listne"), "{error}");
    assert_eq!(snapshot(dir.path()), before);
}
