//! Commands and processes of a lab: each with its output in a file, each ended with the lab.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};

use crate::{LabError, Result, failed};

/// How often a condition is looked at again.
const POLL: Duration = Duration::from_millis(20);

/// What a finished command left.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs `command` to its end, whatever that is.
pub fn run(mut command: Command) -> Result<Output> {
    let line = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().map_err(|e| failed(&line, e))?;
    Ok(Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs `command` and returns its standard output; an error unless it succeeds.
pub fn check(command: Command) -> Result<String> {
    let line = format!("{command:?}");
    let output = run(command)?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(LabError::Command {
            command: line,
            reason: format!("{}\n{}{}", output.status, output.stdout, output.stderr),
        })
    }
}

/// Looks at `condition` until it is `Ok`; gives up after `limit`. This is the one wait of the harness: tests
/// wait for what they need, and never for a time.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<T, String>,
) -> Result<T> {
    let start = muster_now();
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(last) if muster_now().saturating_sub(start) > limit => {
                return Err(LabError::Timeout { what: what.into(), seconds: limit.as_secs(), last });
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

fn muster_now() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(t.tv_sec.try_into().unwrap_or(0), t.tv_nsec.try_into().unwrap_or(0))
}

/// A process in the background, in a process group of its own, killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with standard output and error appended to `log`.
    pub fn spawn(name: &str, mut command: Command, log: PathBuf) -> Result<Self> {
        use std::os::unix::process::CommandExt;
        let line = format!("{command:?}");
        let open = || -> io::Result<(File, File)> {
            let file = fs::OpenOptions::new().create(true).append(true).open(&log)?;
            Ok((file.try_clone()?, file))
        };
        let (out, err) = open().map_err(|e| LabError::File { path: log.display().to_string(), source: e })?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0)
            .spawn()
            .map_err(|e| failed(&line, e))?;
        Ok(Self { name: name.into(), child, log })
    }

    /// Its process ID.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has printed so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Where its output goes.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Sends `signal` to the process itself.
    pub fn signal(&self, signal: Signal) -> Result {
        let pid = self.pid();
        kill_process(pid, signal).map_err(|e| failed(&format!("kill {}", self.name), io::Error::from(e)))
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        let child = &mut self.child;
        wait_for(&what, limit, || match child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err("still running".into()),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// `kill -9` to it and all that it has started, and waits for the end.
    pub fn kill(&mut self) {
        let group = self.pid();
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.child.wait();
        // A process that it started, as a wrapper does, holds its files and locks until it is gone, too.
        let _ = wait_for("the whole process group to end", Duration::from_secs(10), || {
            if test_kill_process_group(group).is_err() { Ok(()) } else { Err(self.name.clone()) }
        });
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
