//! Small disks of a test's own, which fill up, fail or become read-only, and what is asked of a registrar on one.

use std::{fs, path::Path, process::Command, time::Duration};

use muster_integration_tests::{
    Host, LabError, Process, Result, expect, failed,
    muster::Registrar,
    process::{check, wait_for},
};
use rustix::process::Signal;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A file system in a directory, unmounted at the end.
pub(crate) struct Disk {
    directory: std::path::PathBuf,
}

impl Disk {
    /// In memory, of so many KiB, at `directory`, which is made.
    pub(crate) fn memory(directory: &Path, kibibytes: u32) -> Result<Self> {
        Self::mount(directory, &["-t", "tmpfs", "-o", &format!("size={kibibytes}k,mode=700"), "tmpfs"])
    }

    /// An ext4 in a file beside `directory`. `None` where that is not possible, as in a user namespace.
    pub(crate) fn ext4(directory: &Path) -> Result<Option<Self>> {
        let image = directory.with_extension("img");
        let made = fs::File::create(&image).and_then(|file| file.set_len(16 << 20));
        made.map_err(|source| LabError::File { path: image.display().to_string(), source })?;
        let mut format = Command::new("mkfs.ext4");
        format.arg("-q").arg(&image);
        check(format)?;
        let options = "loop,errors=remount-ro";
        Ok(Self::mount(directory, &["-o", options, &image.display().to_string()]).ok())
    }

    fn mount(directory: &Path, arguments: &[&str]) -> Result<Self> {
        fs::create_dir_all(directory)
            .map_err(|source| LabError::File { path: directory.display().to_string(), source })?;
        let mut mount = Command::new("mount");
        mount.args(arguments).arg(directory);
        check(mount)?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Takes all of the room that is left.
    pub(crate) fn fill(&self) -> Result {
        let ballast = self.directory.join("ballast");
        let path = ballast.display();
        let mut fill = Command::new("sh");
        // In ever smaller blocks, until not even an octet finds room.
        fill.args(["-c", &format!("for b in 64k 4k 1; do dd if=/dev/zero bs=$b >>'{path}' 2>/dev/null; done; exit 0")]);
        check(fill).map(drop)
    }

    /// Gives that room back.
    pub(crate) fn clear(&self) -> Result {
        let ballast = self.directory.join("ballast");
        fs::remove_file(&ballast)
            .map_err(|source| LabError::File { path: ballast.display().to_string(), source })
    }

    /// Mounts it anew with these options.
    pub(crate) fn remount(&self, options: &str) -> Result {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,{options}")]).arg(&self.directory);
        check(mount).map(drop)
    }

    /// Has the kernel find an error in it, so that it becomes read-only although files are open.
    pub(crate) fn break_ext4(&self) -> Result {
        let mut find = Command::new("findmnt");
        find.args(["-no", "SOURCE"]).arg(&self.directory);
        let source = check(find)?;
        let device = source.trim().trim_start_matches("/dev/").to_owned();
        let path = format!("/sys/fs/ext4/{device}/trigger_fs_error");
        fs::write(&path, "1").map_err(|source| LabError::File { path, source })
    }

    /// Takes it away and mounts it again, repaired.
    pub(crate) fn repair(&self) -> Result {
        let image = self.directory.with_extension("img").display().to_string();
        let mut unmount = Command::new("umount");
        unmount.arg(&self.directory);
        wait_for("the disk to be free", PATIENCE, || {
            let mut again = Command::new("umount");
            again.arg(&self.directory);
            check(again).map_err(|error| error.to_string())
        })?;
        let mut repair = Command::new("e2fsck");
        repair.args(["-fy", &image]);
        // 1: it was repaired.
        let output = muster_integration_tests::process::run(repair)?;
        expect(output.status.code().is_some_and(|code| code <= 1), "it is repaired", &format!("{output:?}"))?;
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,errors=remount-ro", &image]).arg(&self.directory);
        check(mount).map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.directory).status();
    }
}

/// Writes labels by an operator until one is refused; returns the last that was taken, and the refusal.
pub(crate) fn write_until_refused(registrar: &Registrar, device: &str) -> Result<(Option<u32>, String)> {
    let mut last = None;
    for number in 0..200 {
        let output = registrar.try_muster(&["label", "device", device, &format!("n={number}"), "--overwrite"])?;
        if !output.status.success() {
            return Ok((last, output.stderr));
        }
        last = Some(number);
    }
    Err(failed("writing until it is refused", "it never was"))
}

/// Waits until a write succeeds.
pub(crate) fn writes(registrar: &Registrar, device: &str, value: &str) -> Result {
    wait_for("a write to succeed", PATIENCE, || {
        registrar
            .muster(&["label", "device", device, &format!("n={value}"), "--overwrite"])
            .map(drop)
            .map_err(|error| error.to_string())
    })
}

/// The label that operators have set.
pub(crate) fn label(registrar: &Registrar, device: &str) -> Result<String> {
    let text = registrar.muster(&["get", "device", device, "-o", "json"])?;
    let shown: serde_json::Value = serde_json::from_str(&text).map_err(|error| failed("reading JSON", error))?;
    Ok(shown.pointer("/metadata/labels/n").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned())
}

/// Whether health and metrics tell that the store is writable, and if not, why.
pub(crate) fn shows(registrar: &Registrar, trouble: Option<(&str, &str)>) -> Result {
    wait_for("health and metrics to show the store's condition", PATIENCE, || {
        let told = |error: LabError| error.to_string();
        let metrics = registrar.metrics().map_err(told)?;
        let ready = registrar.host().sh("curl -sf http://127.0.0.1:7580/readyz").map_err(told)?;
        let writable = metrics.lines().any(|line| line == "muster_registrar_store_writable 1");
        let as_expected = match trouble {
            None => writable && ready == "ready\n",
            Some((reason, part)) => {
                let counted = format!("muster_registrar_store_failures_total{{reason=\"{reason}\"}} ");
                let count = metrics.lines().find_map(|line| line.strip_prefix(counted.as_str()));
                !writable && count.is_some_and(|count| count != "0") && ready.contains(part)
            }
        };
        if as_expected { Ok(()) } else { Err(format!("{ready}\n{metrics}")) }
    })
}

/// SQLite finds nothing wrong with the registrar's database.
pub(crate) fn sound(registrar: &Registrar) -> Result {
    let database = registrar.data().join("registry.db");
    let check = format!("sqlite3 -readonly '{}' 'pragma integrity_check'", database.display());
    let found = registrar.host().sh(&check)?;
    expect(found.trim() == "ok", "the database is sound", &found)
}

/// `kill -9`, and up again.
pub(crate) fn kill_and_serve(registrar: &mut Registrar) -> Result {
    registrar.kill();
    registrar.serve()
}

/// It still runs, as the process that it was.
pub(crate) fn is_process(registrar: &mut Registrar, id: Option<u32>) -> Result {
    let running = registrar.process().filter(|_| id.is_some()).map(|process| (process.is_running(), process.id()));
    expect(running == id.map(|id| (true, id)), "it is still the same process", &format!("{running:?}"))
}

/// A registrar on `host` whose data directory is on `disk`, serving.
pub(crate) fn registrar(host: &Host) -> Result<Registrar> {
    let mut registrar = Registrar::init(host, "net.example", "10.1.0.1", "[log]\nlevel = \"info\"")?;
    registrar.serve()?;
    Ok(registrar)
}

/// Where the registrar's data will be on `host`.
pub(crate) fn data(host: &Host) -> std::path::PathBuf {
    host.directory().join("registrar/data")
}

/// A system call that fails from now on, in the process `id`, until this is dropped.
pub(crate) struct Injection(Process);

impl Injection {
    /// Has strace make `calls` fail with `errno`; `None` where it may not.
    pub(crate) fn start(host: &Host, id: u32, calls: &str, errno: &str) -> Result<Self> {
        let mut command = host.command("strace");
        command.args(["-f", "-q", "-e", &format!("trace={calls}"), "-e", &format!("inject={calls}:error={errno}")]);
        command.args(["-o", "/dev/null", "-p", &id.to_string()]);
        let mut strace = host.spawn("strace", command)?;
        wait_for("strace to have every thread", PATIENCE, || {
            if !strace.is_running() {
                return Ok(Err(failed("strace", strace.log())));
            }
            let mut traced = fs::read_dir(format!("/proc/{id}/task")).map_err(|error| error.to_string())?;
            let all = traced.all(|task| {
                let status = task.ok().and_then(|task| fs::read_to_string(task.path().join("status")).ok());
                status.is_some_and(|status| {
                    status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() != "0"))
                })
            });
            if all { Ok(Ok(())) } else { Err("not yet".into()) }
        })??;
        Ok(Self(strace))
    }

    /// Lets the calls succeed again.
    pub(crate) fn stop(mut self) -> Result {
        self.0.signal(Signal::INT)?;
        self.0.wait(PATIENCE).map(drop)
    }
}
