use std::collections::BTreeSet;

use muster_proto::storage::BundleFile;

use super::*;

fn options(directory: &Path, ca_hash: SpkiHash) -> Options {
    Options {
        registrar: "127.0.0.1:1".into(),
        token: InvitationToken::generate(&mut rand::rng()),
        ca_hash,
        config: directory.join("etc/registrar.toml"),
        data_dir: Some(directory.join("data")),
        addresses: vec!["192.0.2.9".parse().unwrap()],
    }
}

/// A CA, packed.
fn packed(config: &str) -> (InvitationBundle, SpkiHash) {
    let dir = tempfile::tempdir().unwrap();
    let hash = Ca::create(dir.path(), "net.example", Timestamp::now()).unwrap().hash();
    let ca_files = crate::ca::read_all(dir.path()).unwrap().into_iter();
    let bundle = InvitationBundle {
        version: bundle::VERSION,
        trust_domain: "net.example".into(),
        config: config.into(),
        ca_files: ca_files
            .map(|file| BundleFile { name: file.name, contents: file.contents.to_vec() })
            .collect(),
        etcd_files: vec![BundleFile { name: "ca_file".into(), contents: b"no PEM".to_vec() }],
    };
    (bundle, hash)
}

/// The files below `directory`.
fn names(directory: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(names(&path));
        }
        all.insert(path);
    }
    all
}

#[test]
fn the_nonce_is_kept_for_the_same_token() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(JOURNAL);
    let options = options(dir.path(), SpkiHash::of_spki(b"ca"));
    let first = nonce(&path, &options).unwrap();
    assert_eq!(nonce(&path, &options).unwrap(), first);
    let other = Options { token: InvitationToken::generate(&mut rand::rng()), ..options.clone() };
    let second = nonce(&path, &other).unwrap();
    assert_ne!(second, first);
    fs::write(&path, "damaged").unwrap();
    assert_ne!(nonce(&path, &other).unwrap(), second);
}

#[test]
fn nothing_that_is_there_is_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let (data, config) = (dir.path().join("data"), dir.path().join("registrar.toml"));
    check_absent(&data, &config).unwrap();
    fs::write(&config, "# nothing\n[listen]\n#grpc = \"[::]:7500\"\n").unwrap();
    check_absent(&data, &config).unwrap();
    fs::write(&config, "drain = \"1s\"\n").unwrap();
    fs::create_dir_all(data.join("roots")).unwrap();
    let error = check_absent(&data, &config).unwrap_err().to_string();
    assert!(
        error.contains("roots") && error.contains("registrar.toml") && error.contains("leave"),
        "{error}"
    );
}

#[tokio::test]
async fn a_failure_leaves_nothing_behind() {
    let etcd = "[store]\nkind = \"etcd\"\n[store.etcd]\nendpoints = [\"https://127.0.0.1:1\"]\n";
    let ((good, hash), (other, _)) = (packed(etcd), packed(etcd));
    let mut mixed = good.clone();
    mixed.ca_files[0] = other.ca_files[0].clone();
    let newer = InvitationBundle { config: "[strange]\n".into(), ..good.clone() };
    for (bundle, says) in [(&good, "store"), (&other, "--ca-hash"), (&mixed, "ca.key"), (&newer, "strange")] {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path(), hash);
        let data_dir = options.data_dir.clone().unwrap();
        let made = set_up(&options, &data_dir, &options.addresses, bundle, Timestamp::now()).await;
        let error = made.unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
        assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
    }
}

#[tokio::test]
async fn a_registrar_that_is_not_there_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), SpkiHash::of_spki(b"ca"));
    let error = join(options, Timestamp::now()).await.unwrap_err().to_string();
    assert!(error.contains("127.0.0.1:1") && error.contains("remedy"), "{error}");
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
}

#[tokio::test]
async fn a_join_that_was_killed_goes_on_and_writes_over_nothing_else() {
    let etcd = "[store]\nkind = \"etcd\"\n[store.etcd]\nendpoints = [\"https://127.0.0.1:1\"]\n";
    let (bundle, hash) = packed(etcd);
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), hash);
    let data_dir = options.data_dir.clone().unwrap();
    file::write_private(&data_dir.join("ca.crt"), &bundle.ca_files[0].contents).unwrap();
    file::write_private(&data_dir.join("etcd/ca_file.pem"), b"an older attempt").unwrap();
    let before = names(dir.path());

    let error = join(options.clone(), Timestamp::now()).await.unwrap_err();
    assert!(matches!(error, JoinError::Exists(_)), "{error}");
    nonce(&data_dir.join(JOURNAL), &options).unwrap();
    let error = join(options.clone(), Timestamp::now()).await.unwrap_err();
    assert!(matches!(error, JoinError::Connect(_)), "{error}");
    let again = async |bundle: &InvitationBundle| {
        set_up(&options, &data_dir, &options.addresses, bundle, Timestamp::now()).await.unwrap_err()
    };
    let error = again(&bundle).await;
    assert!(matches!(error, JoinError::Store(_) | JoinError::Deployment(_)), "{error}");
    file::remove(&data_dir.join(JOURNAL)).unwrap();
    file::remove(&data_dir.join("lock")).unwrap();
    assert_eq!(names(dir.path()), before);

    // What was made meanwhile in the same place is left alone, also where the attempt was the earlier one.
    let (other, _) = packed(etcd);
    let error = again(&other).await;
    assert!(matches!(&error, JoinError::Exists(paths) if *paths == [data_dir.join("ca.crt")]), "{error}");
    file::write_private(&data_dir.join("registry.db"), b"theirs").unwrap();
    file::write_private(&options.config, b"drain = \"1s\"\n").unwrap();
    let error = again(&bundle).await;
    let theirs = [data_dir.join("registry.db"), options.config.clone()];
    assert!(matches!(&error, JoinError::Exists(paths) if *paths == theirs), "{error}");
    assert_eq!(file::read(&data_dir.join("ca.crt")).unwrap(), bundle.ca_files[0].contents);

    // The last of an attempt's steps was taken, but for the end of the journal.
    file::remove(&theirs[0]).unwrap();
    let mut config: Config = config::parse(&bundle.config).unwrap();
    config.data_dir = data_dir.clone();
    write_config(&config, &options.config).unwrap();
    assert!(check_others(&data_dir, &options.config, &config).is_ok());
}
