use std::{
    os::unix::fs::symlink,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::*;

const SERVER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 20, 10));
const TEXT: &str = "# ours\nsearch corp.example\nnameserver 192.0.2.53\noptions timeout:1\n";

fn resolv_conf(directory: &Path) -> ResolvConf {
    fs::create_dir_all(directory.join("etc")).unwrap();
    ResolvConf {
        path: directory.join("etc/resolv.conf"),
        backup: directory.join("state/resolv.conf.backup"),
        resolved: directory.join("resolved"),
    }
}

fn with(directory: &Path, text: &str) -> ResolvConf {
    let file = resolv_conf(directory);
    fs::write(&file.path, text).unwrap();
    file
}

fn text(file: &ResolvConf) -> String {
    fs::read_to_string(&file.path).unwrap()
}

#[test]
fn an_edit_keeps_mode_and_owner_and_is_undone_exactly() {
    if !have_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    fs::set_permissions(&file.path, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&file.path, Some(1), Some(2)).unwrap();
    assert!(file.edit(SERVER).unwrap());
    assert_eq!(resolv_conf::servers(text(&file).as_bytes()), [SERVER]);
    assert_eq!(fs::read_to_string(&file.backup).unwrap(), TEXT);
    let metadata = fs::metadata(&file.path).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o640, 1, 2));
    assert!(!file.edit(SERVER).unwrap());
    assert!(file.restore().unwrap());
    assert_eq!(text(&file), TEXT);
    assert!(!file.backup.exists());
    assert!(!file.restore().unwrap());
    assert_eq!(fs::read_dir(file.path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn a_link_stays_one_and_the_file_behind_it_is_edited() {
    let directory = tempfile::tempdir().unwrap();
    let file = resolv_conf(directory.path());
    let target = directory.path().join("managed");
    fs::write(&target, TEXT).unwrap();
    symlink("../managed", &file.path).unwrap();
    assert!(file.edit(SERVER).unwrap());
    assert!(fs::symlink_metadata(&file.path).unwrap().is_symlink());
    assert!(fs::read_to_string(&target).unwrap().contains("169.254.20.10"));
    assert!(file.restore().unwrap());
    assert_eq!(fs::read_to_string(&target).unwrap(), TEXT);
}

#[test]
fn files_of_resolved_and_files_that_are_not_there_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let file = resolv_conf(directory.path());
    assert!(matches!(file.edit(SERVER), Err(EditError::Missing(_))));
    assert!(!file.restore().unwrap());
    fs::create_dir(&file.resolved).unwrap();
    fs::write(file.resolved.join("stub-resolv.conf"), "nameserver 127.0.0.53\n").unwrap();
    symlink("../resolved/stub-resolv.conf", &file.path).unwrap();
    assert!(file.is_of_resolved());
    let error = file.edit(SERVER).unwrap_err().to_string();
    assert!(error.contains("resolver.host"), "{error}");
    assert_eq!(text(&file), "nameserver 127.0.0.53\n");
}

#[test]
fn what_others_write_is_the_new_original() {
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    file.edit(SERVER).unwrap();
    let new = "nameserver 192.0.2.54\n";
    fs::write(&file.path, new).unwrap();
    assert!(file.edit(SERVER).unwrap());
    assert_eq!(fs::read_to_string(&file.backup).unwrap(), new);
    file.restore().unwrap();
    assert_eq!(text(&file), new);
    // Not edited again before the stop: it is not ours to touch, whatever the backup says.
    file.edit(SERVER).unwrap();
    fs::write(&file.path, TEXT).unwrap();
    assert!(!file.restore().unwrap());
    assert_eq!(text(&file), TEXT);
}

#[test]
fn a_damaged_edit_is_undone_from_the_backup() {
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    file.edit(SERVER).unwrap();
    let damaged = text(&file).replace("# END Muster\n", "");
    fs::write(&file.path, damaged).unwrap();
    assert!(file.restore().unwrap());
    assert_eq!(text(&file), TEXT);
}

#[test]
fn an_edit_without_a_backup_is_undone_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    file.edit(SERVER).unwrap();
    fs::remove_file(&file.backup).unwrap();
    assert!(file.restore().unwrap());
    assert_eq!(text(&file), TEXT);
}

/// Whether the test may run. Says why not, or fails if root is required.
#[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
fn have_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert_ne!(std::env::var("MUSTER_REQUIRE_ROOT").as_deref(), Ok("1"), "this test needs root");
    eprintln!("skipped: mounts or gives files away, for which it needs root");
    false
}

/// A file that is a mount of its own; gone with the guard.
struct Mounted(PathBuf);

impl Mounted {
    fn new(file: &ResolvConf, directory: &Path) -> Self {
        let source = directory.join("bound");
        fs::copy(&file.path, &source).unwrap();
        let status = Command::new("mount").arg("--bind").args([&source, &file.path]).status().unwrap();
        assert!(status.success(), "cannot mount");
        Self(file.path.clone())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_mounted_file_is_written_in_place() {
    if !have_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    let _mounted = Mounted::new(&file, directory.path());
    assert!(is_mount(&file.path));
    assert!(file.edit(SERVER).unwrap());
    assert_eq!(resolv_conf::servers(text(&file).as_bytes()), [SERVER]);
    assert_eq!(fs::read_dir(file.path.parent().unwrap()).unwrap().count(), 1);
    // Killed after the write and before the cut.
    let length = text(&file).len();
    let mut padded = TEXT.to_owned();
    padded.push_str(&"\n".repeat(length - TEXT.len()));
    fs::write(&file.path, &padded).unwrap();
    assert!(file.restore().unwrap());
    assert_eq!(text(&file), TEXT);
    file.edit(SERVER).unwrap();
    assert!(file.restore().unwrap());
    assert_eq!(text(&file), TEXT);
    let large = format!("# {}\n", "x".repeat(IN_PLACE_MAX));
    fs::write(&file.path, &large).unwrap();
    assert!(matches!(file.edit(SERVER), Err(EditError::Size(..))));
    assert_eq!(text(&file), large);
}

#[test]
fn a_file_that_cannot_be_written_is_kept_and_its_servers_are_known() {
    if !have_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    let _mounted = Mounted::new(&file, directory.path());
    let read_only = Command::new("mount").args(["-o", "remount,bind,ro"]).arg(&file.path).status().unwrap();
    assert!(read_only.success());
    let error = file.edit(SERVER).unwrap_err().to_string();
    assert!(error.contains("cannot edit") && error.contains("read-write"), "{error}");
    assert_eq!((text(&file).as_str(), fs::read_to_string(&file.backup).unwrap().as_str()), (TEXT, TEXT));
}

/// Whoever reads while the file is edited and restored sees something good.
fn at_any_time(file: &ResolvConf, good: impl Fn(&[u8]) -> bool + Send + 'static) {
    let done = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let (path, done) = (file.path.clone(), Arc::clone(&done));
        move || {
            let mut seen = 0_u32;
            while !done.load(Ordering::Relaxed) {
                let text = fs::read(&path).unwrap();
                assert!(good(&text), "{}", String::from_utf8_lossy(&text));
                seen += 1;
            }
            seen
        }
    });
    for _ in 0..50 {
        file.edit(SERVER).unwrap();
        file.restore().unwrap();
    }
    done.store(true, Ordering::Relaxed);
    assert!(reader.join().unwrap() > 0);
}

#[test]
fn readers_see_whole_texts() {
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    let edited = resolv_conf::edit(TEXT.as_bytes(), SERVER);
    at_any_time(&file, move |text| text == edited || text == TEXT.as_bytes());
}

#[test]
fn readers_of_a_mounted_file_never_see_less_than_the_shorter_text() {
    if !have_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    let _mounted = Mounted::new(&file, directory.path());
    at_any_time(&file, |text| text.len() >= TEXT.len());
}

/// The process that is killed: runs only as a child of the test below.
#[test]
fn killed_child() {
    let Some(directory) = std::env::var_os("MUSTER_TEST_KILLED") else { return };
    let file = resolv_conf(Path::new(&directory));
    loop {
        file.edit(SERVER).unwrap();
        file.restore().unwrap();
    }
}

fn survives_kills(file: &ResolvConf, directory: &Path) {
    for kill in 0..100_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "host_dns::file::tests::killed_child"])
            .env("MUSTER_TEST_KILLED", directory)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5 + kill % 17));
        child.kill().unwrap();
        child.wait().unwrap();
        let left = text(file);
        assert!(!resolv_conf::servers(left.as_bytes()).is_empty(), "kill {kill}: {left:?}");
        file.restore().unwrap();
        assert_eq!(text(file), TEXT, "kill {kill}, which left {left:?}");
    }
}

#[test]
fn a_hundred_kills_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    survives_kills(&file, directory.path());
    assert_eq!(fs::read_dir(file.path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn a_hundred_kills_lose_nothing_of_a_mounted_file() {
    if !have_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = with(directory.path(), TEXT);
    let _mounted = Mounted::new(&file, directory.path());
    survives_kills(&file, directory.path());
}
