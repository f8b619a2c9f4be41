//! The kernel's switches for forwarding: those of single interfaces, since the one for all would make a router of the
//! whole host. What was changed is on disk before it is, so that a later start can take it back.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use muster_common::file;

use super::SiteError;

const SETTINGS: &str = "/proc/sys/net";
/// Tells whether the host has been started anew, and its settings with it.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What is to be switched on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Interfaces of the site that forward for this agent alone, and did not before.
    pub(super) opened: Vec<String>,
    /// The kernel has no switch of IPv6 for single interfaces (before Linux 6.17): the one for all is used, and the
    /// filter closes the other interfaces.
    pub(super) opens_all_ipv6: bool,
    /// Files, and what to write.
    pub(super) switches: Vec<(PathBuf, &'static str)>,
}

pub(super) struct Forwarding {
    state: PathBuf,
    /// What has been changed, and what it was.
    changed: Vec<(PathBuf, String)>,
}

impl Forwarding {
    /// Reads from `state` what an agent that was killed has left.
    pub(super) fn new(state: PathBuf) -> Self {
        let text = fs::read_to_string(&state).unwrap_or_default();
        let mut lines = text.lines();
        let is_of_this_boot = lines.next() == Some(boot_id().as_str());
        let parse = |line: &str| line.split_once(' ').map(|(was, path)| (path.into(), was.to_owned()));
        let changed = if is_of_this_boot { lines.filter_map(parse).collect() } else { Vec::new() };
        if !text.is_empty() && !is_of_this_boot {
            // The kernel has forgotten it all, and so shall we.
            let _ = fs::remove_file(&state);
        }
        Self { state, changed }
    }

    /// Whether something has been changed and not been taken back.
    pub(super) fn is_left_over(&self) -> bool {
        self.state.exists()
    }

    /// What is needed for forwarding between `own` and `links`.
    pub(super) fn plan(&self, own: &str, links: &BTreeSet<String>, ipv4: bool, ipv6: bool) -> Plan {
        let mut plan = Plan::default();
        let switch = |path: PathBuf, to: &'static str, plan: &mut Plan| {
            let changed = self.changed.iter().find(|(p, _)| *p == path);
            let was = changed.map_or_else(|| read(&path), |(_, was)| Some(was.clone()));
            let is_new = was.is_some_and(|was| was == "0" || to == "2" && was == "1");
            if is_new {
                plan.switches.push((path, to));
            }
            is_new
        };
        let mut opened = BTreeSet::new();
        let one_by_one = setting("ipv6", own, "force_forwarding").exists();
        for link in links.iter().map(String::as_str).chain([own]) {
            let mut is_opened = ipv4 && switch(setting("ipv4", link, "forwarding"), "1", &mut plan);
            if ipv6 && one_by_one && read(&setting("ipv6", "all", "forwarding")).as_deref() == Some("0") {
                is_opened |= switch(setting("ipv6", link, "force_forwarding"), "1", &mut plan);
            }
            if is_opened && link != own {
                opened.insert(link.to_owned());
            }
        }
        if ipv6 && !one_by_one {
            // A router does not listen to routers, unless it is told to.
            for link in interfaces("ipv6") {
                switch(setting("ipv6", &link, "accept_ra"), "2", &mut plan);
            }
            plan.opens_all_ipv6 = switch(setting("ipv6", "all", "forwarding"), "1", &mut plan);
            if !plan.opens_all_ipv6 {
                plan.switches.retain(|(path, _)| !path.ends_with("accept_ra"));
            }
        }
        plan.opened = opened.into_iter().collect();
        plan
    }

    /// Switches on what `plan` says, and takes back what it does not.
    pub(super) fn apply(&mut self, plan: &Plan) -> Result<(), SiteError> {
        let is_wanted = |path: &Path| plan.switches.iter().any(|(wanted, _)| wanted == path);
        let (kept, over): (Vec<_>, _) = self.changed.drain(..).partition(|(path, _)| is_wanted(path));
        self.changed = kept;
        undo(over);
        for (path, _) in &plan.switches {
            if !self.changed.iter().any(|(p, _)| p == path)
                && let Some(was) = read(path)
            {
                self.changed.push((path.clone(), was));
            }
        }
        let mut text = boot_id() + "\n";
        for (path, was) in &self.changed {
            text += &format!("{was} {}\n", path.display());
        }
        if read(&self.state).as_deref() != Some(text.trim()) {
            file::write_private(&self.state, text.as_bytes())?;
        }
        for (path, value) in &plan.switches {
            if read(path).is_some_and(|is| is != *value) {
                fs::write(path, value)
                    .map_err(|source| SiteError::Forwarding { path: path.clone(), source })?;
            }
        }
        Ok(())
    }

    /// Makes it as it was.
    pub(super) fn restore(&mut self) {
        undo(std::mem::take(&mut self.changed));
        if let Err(error) = file::remove(&self.state) {
            tracing::warn!(%error, "what has been undone will be undone again");
        }
    }
}

/// The last change first.
fn undo(changed: Vec<(PathBuf, String)>) {
    for (path, was) in changed.into_iter().rev() {
        // An interface that is gone has nothing to undo.
        if path.exists()
            && let Err(error) = fs::write(&path, &was)
        {
            tracing::warn!(%error, setting = %path.display(), was, "cannot undo a setting");
        }
    }
}

fn setting(family: &str, link: &str, name: &str) -> PathBuf {
    [SETTINGS, family, "conf", link, name].iter().collect()
}

fn read(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn interfaces(family: &str) -> BTreeSet<String> {
    let directory: PathBuf = [SETTINGS, family, "conf"].iter().collect();
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name != "all").collect()
}

fn boot_id() -> String {
    read(Path::new(BOOT_ID)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_before_the_host_was_started_anew_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("forwarding");
        fs::write(&state, "another\n0 /proc/sys/net/ipv4/conf/none/forwarding\n").unwrap();
        let forwarding = Forwarding::new(state.clone());
        assert!(forwarding.changed.is_empty() && !forwarding.is_left_over());
        fs::write(&state, boot_id() + "\n0 /proc/sys/net/ipv4/conf/a b/forwarding\n").unwrap();
        let mut forwarding = Forwarding::new(state.clone());
        let path = PathBuf::from("/proc/sys/net/ipv4/conf/a b/forwarding");
        assert_eq!(forwarding.changed, [(path, "0".to_owned())]);
        assert!(forwarding.is_left_over());
        forwarding.restore();
        assert!(!state.exists());
    }
}
