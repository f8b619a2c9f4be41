//! The command as a process: help, configuration, exit codes.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::process::{Command, Output};

fn director(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster-director"));
    command.env_clear().args(arguments).output().unwrap()
}

fn text(octets: &[u8]) -> String {
    String::from_utf8_lossy(octets).into_owned()
}

#[test]
fn help_has_examples_and_exit_codes() {
    for arguments in [["--help"].as_slice(), &["join", "--help"], &["run", "--help"]] {
        let output = director(arguments);
        assert!(output.status.success());
        assert!(text(&output.stdout).contains("Example"), "{arguments:?}");
    }
    assert!(text(&director(&["--help"]).stdout).contains("Exit codes: 0 done, 1 failed, 2 wrong usage."));
    for wrong in [["frobnicate"].as_slice(), &[], &["join"]] {
        assert_eq!(director(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn the_configuration_is_printed_whole_and_loads_again() {
    let printed = director(&["--print-config", "--config", "/dev/null"]);
    assert!(printed.status.success(), "{}", text(&printed.stderr));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("director.toml");
    std::fs::write(&path, &printed.stdout).unwrap();
    let again = director(&["run", "--print-config", "--config", path.to_str().unwrap()]);
    assert_eq!(text(&again.stdout), text(&printed.stdout));
    assert!(text(&printed.stdout).contains("device_rate = 125000000"));
}

#[test]
fn errors_say_what_to_do_and_fail() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("director.toml");
    std::fs::write(&path, "threads = 99\n").unwrap();
    let wrong = director(&["run", "--config", path.to_str().unwrap()]);
    let error = text(&wrong.stderr);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(error.contains("threads") && error.contains("write 1 to 64"), "{error}");

    let state = directory.path().join("state");
    std::fs::write(&path, format!("state_dir = \"{}\"\n", state.display())).unwrap();
    let not_joined = director(&["run", "--config", path.to_str().unwrap()]);
    let error = text(&not_joined.stderr);
    assert_eq!(not_joined.status.code(), Some(1));
    assert!(error.contains("has not joined") && error.contains("create token --director"), "{error}");
    assert!(!state.exists(), "a director that has not joined leaves nothing behind");
}
