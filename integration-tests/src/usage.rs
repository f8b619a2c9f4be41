//! What a process uses, as the kernel tells it in `/proc`.

use std::{fs, time::Duration};

use crate::{LabError, Process, Result};

impl Process {
    /// Resident memory, in octets (`VmRSS`).
    pub fn resident(&self) -> Result<f64> {
        resident(&self.id().to_string())
    }

    /// Time on a processor so far, of all threads that live, of the process and those it has started, to the
    /// nanosecond.
    pub fn processor_time(&self) -> Result<Duration> {
        processor_time(self.id())
    }
}

/// Resident memory of this process itself, in octets.
pub fn own_resident() -> Result<f64> {
    resident("self")
}

fn resident(process: &str) -> Result<f64> {
    let path = format!("/proc/{process}/status");
    let status = read(&path)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kibibytes.map(|k| k * 1024.0).ok_or_else(|| odd(&path, &status))
}

fn processor_time(process: u32) -> Result<Duration> {
    let tasks = format!("/proc/{process}/task");
    let entries = fs::read_dir(&tasks).map_err(|source| LabError::File { path: tasks, source })?;
    let mut total = Duration::ZERO;
    for entry in entries.flatten() {
        let path = entry.path().join("schedstat").display().to_string();
        let text = read(&path)?;
        let nanoseconds = text.split_whitespace().next().and_then(|first| first.parse().ok());
        total += Duration::from_nanos(nanoseconds.ok_or_else(|| odd(&path, &text))?);
        let children = read(&entry.path().join("children").display().to_string()).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
            total += processor_time(child)?;
        }
    }
    Ok(total)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).map_err(|source| LabError::File { path: path.to_owned(), source })
}

fn odd(path: &str, text: &str) -> LabError {
    LabError::Command { command: format!("reading {path}"), reason: text.to_owned() }
}
