//! Small disks of a test's own, which fill up, become read-only, or fail.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use muster_integration_tests::{
    Host, LabError, Process, Result, failed,
    process::{check, run, wait_for},
};
use rustix::process::Signal;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Until processes of other scenarios are gone that have a disk mounted.
const REPAIR: Duration = Duration::from_secs(120);

/// A file system in a directory, unmounted at the end.
pub(crate) struct Disk {
    directory: PathBuf,
}

impl Disk {
    /// In memory, of so many KiB, at `directory`, which is made.
    pub(crate) fn memory(directory: &Path, kibibytes: u32) -> Result<Self> {
        Self::mount(directory, &["-t", "tmpfs", "-o", &format!("size={kibibytes}k,mode=700"), "tmpfs"])
    }

    /// An ext4 in a file beside `directory`. `None` where that is not possible, as in a user namespace.
    pub(crate) fn ext4(directory: &Path) -> Result<Option<Self>> {
        let image = directory.with_extension("img");
        create(directory)?;
        let made = fs::File::create(&image).and_then(|file| file.set_len(16 << 20));
        made.map_err(|source| LabError::File { path: image.display().to_string(), source })?;
        let mut format = Command::new("mkfs.ext4");
        format.arg("-q").arg(&image);
        check(format)?;
        let options = "loop,errors=remount-ro";
        Ok(Self::mount(directory, &["-o", options, &image.display().to_string()]).ok())
    }

    fn mount(directory: &Path, arguments: &[&str]) -> Result<Self> {
        create(directory)?;
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
        fill.args([
            "-c",
            &format!("for b in 64k 4k 1; do dd if=/dev/zero bs=$b >>'{path}' 2>/dev/null; done; exit 0"),
        ]);
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

    /// As [`Self::remount`], for the process `id`, which has mounts of its own.
    pub(crate) fn remount_for(&self, id: u32, options: &str) -> Result {
        let mut mount = Command::new("nsenter");
        mount.args(["-m", "-t", &id.to_string(), "mount", "-o", &format!("remount,{options}")]);
        mount.arg(&self.directory);
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
        // A process of another scenario that began while it was mounted has it in a mount namespace of its own. Until that
        // is gone, one would get the broken file system again.
        wait_for("the disk to be repaired and written", REPAIR, || {
            let mut umount = Command::new("umount");
            umount.arg(&self.directory);
            check(umount).map_err(|error| error.to_string())?;
            let mut repair = Command::new("e2fsck");
            repair.args(["-fy", &image]);
            // 1: it was repaired.
            let output = run(repair).map_err(|error| error.to_string())?;
            let is_repaired = output.status.code().is_some_and(|code| code <= 1);
            let mut mount = Command::new("mount");
            mount.args(["-o", "loop,errors=remount-ro", &image]).arg(&self.directory);
            check(mount).map_err(|error| error.to_string())?;
            if !is_repaired {
                return Err(format!("{output:?}"));
            }
            let probe = self.directory.join("probe");
            fs::write(&probe, "").and_then(|()| fs::remove_file(&probe)).map_err(|error| error.to_string())
        })
    }
}

fn create(directory: &Path) -> Result {
    fs::create_dir_all(directory)
        .map_err(|source| LabError::File { path: directory.display().to_string(), source })
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.directory).status();
    }
}

/// System calls that fail in a process for as long as this is there.
pub(crate) struct Injection(Process);

impl Injection {
    /// Has strace make `calls` of the process `id` fail with `errno`.
    pub(crate) fn start(host: &Host, id: u32, calls: &str, errno: &str) -> Result<Self> {
        let mut command = host.command("strace");
        command.args([
            "-f",
            "-q",
            "-e",
            &format!("trace={calls}"),
            "-e",
            &format!("inject={calls}:error={errno}"),
        ]);
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
                    status
                        .lines()
                        .any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() != "0"))
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
