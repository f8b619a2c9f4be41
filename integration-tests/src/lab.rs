//! Hosts and switches, each in a network namespace of its own, joined by veth pairs.

use std::{
    cell::{Cell, RefCell},
    fs,
    os::{fd::AsFd as _, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{
    LabError, Output, Process, Result,
    device::Error,
    failed,
    process::{self, check},
};

/// Namespaces of labs are called `mt<pid>-<name>`.
const PREFIX: &str = "mt";

/// A network of namespaces. Dropping it ends every process and removes every namespace; when the test has
/// panicked, the logs are printed first.
pub struct Lab {
    shared: Rc<Shared>,
}

struct Shared {
    prefix: String,
    directory: tempfile::TempDir,
    namespaces: RefCell<Vec<String>>,
    logs: RefCell<Vec<(String, PathBuf)>>,
    links: Cell<u32>,
}

/// A switch: every host that is plugged into it is on one Ethernet segment.
pub struct Switch {
    lab: Rc<Shared>,
    namespace: String,
}

/// A host: a network namespace, with a mount namespace's `/etc/resolv.conf` and `/etc/hosts` of its own.
#[derive(Clone)]
pub struct Host {
    lab: Rc<Shared>,
    name: String,
    namespace: String,
    interfaces: Rc<Cell<u32>>,
}

impl Lab {
    /// An empty lab. Removes what labs of processes that are gone have left behind.
    pub fn new() -> Result<Self> {
        sweep()?;
        let directory = tempfile::tempdir()
            .map_err(|e| LabError::File { path: "temporary directory".into(), source: e })?;
        static LABS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = LABS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let shared = Shared {
            prefix: format!("{PREFIX}{}-{number}-", std::process::id()),
            directory,
            namespaces: RefCell::default(),
            logs: RefCell::default(),
            links: Cell::new(0),
        };
        Ok(Self { shared: Rc::new(shared) })
    }

    /// Adds a switch.
    pub fn switch(&self, name: &str) -> Result<Switch> {
        let namespace = self.shared.add_namespace(&format!("sw-{name}"))?;
        ip(&["-n", &namespace, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &namespace, "link", "set", "br0", "up"])?;
        Ok(Switch { lab: Rc::clone(&self.shared), namespace })
    }

    /// Adds a host with nothing but its loopback interface.
    pub fn host(&self, name: &str) -> Result<Host> {
        let namespace = self.shared.add_namespace(name)?;
        ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        let host =
            Host { lab: Rc::clone(&self.shared), name: name.into(), namespace, interfaces: Rc::default() };
        let etc = host.etc();
        fs::create_dir_all(&etc)
            .map_err(|e| LabError::File { path: etc.display().to_string(), source: e })?;
        host.write_etc("resolv.conf", "# no name server\n")?;
        host.write_etc("hosts", &format!("127.0.0.1 localhost\n127.0.1.1 {name}\n"))?;
        Ok(host)
    }

    /// A directory of the lab's own, removed with it.
    pub fn directory(&self) -> &Path {
        self.shared.directory.path()
    }
}

impl Shared {
    fn add_namespace(&self, name: &str) -> Result<String> {
        let namespace = format!("{}{name}", self.prefix);
        ip(&["netns", "add", &namespace])?;
        self.namespaces.borrow_mut().push(namespace.clone());
        Ok(namespace)
    }
}

#[expect(clippy::print_stderr, reason = "shows the logs of a failed test")]
impl Drop for Shared {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (name, path) in self.logs.borrow().iter() {
                let text = fs::read(path).unwrap_or_default();
                let start = text.len().saturating_sub(16_384);
                let tail = String::from_utf8_lossy(text.get(start..).unwrap_or_default());
                eprintln!("---- {name} ----\n{tail}");
            }
        }
        for namespace in self.namespaces.borrow().iter() {
            remove_namespace(namespace);
        }
    }
}

impl Switch {
    /// Plugs `host` in and gives its new interface `addresses` (with prefix lengths). Returns the interface's
    /// name, `eth0` for the host's first.
    pub fn plug(&self, host: &Host, addresses: &[&str]) -> Result<String> {
        let port = self.lab.links.get();
        self.lab.links.set(port + 1);
        let (port, interface) = (format!("p{port}"), host.next_interface());
        ip(&[
            "-n",
            &self.namespace,
            "link",
            "add",
            &port,
            "type",
            "veth",
            "peer",
            "name",
            &interface,
            "netns",
            &host.namespace,
        ])?;
        ip(&["-n", &self.namespace, "link", "set", &port, "master", "br0", "up"])?;
        ip(&["-n", &host.namespace, "link", "set", &interface, "up"])?;
        for address in addresses {
            let mut arguments = vec!["-n", &host.namespace, "addr", "add", address, "dev", &interface];
            if address.contains(':') {
                arguments.push("nodad");
            }
            ip(&arguments)?;
        }
        Ok(interface)
    }
}

impl Host {
    /// Its name in the lab.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// A directory for the host's files, removed with the lab.
    pub fn directory(&self) -> PathBuf {
        self.lab.directory.path().join(&self.name)
    }

    /// A command that runs on the host: `program` in its namespaces.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        // Scenarios write the host's resolv.conf themselves, unless they say otherwise.
        command.env("MUSTER_RESOLVER_HOST", "none");
        // Nor does whatever this machine's own network needs.
        for proxy in ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"] {
            if std::env::var_os(proxy).is_some() {
                command.env_remove(proxy);
            }
        }
        command
    }

    /// Runs a shell script on the host and returns what it prints; an error unless it succeeds.
    pub fn sh(&self, script: &str) -> Result<String> {
        let mut command = self.command("sh");
        command.args(["-ec", script]);
        check(command)
    }

    /// Runs a shell script on the host to its end, whatever that is.
    pub fn try_sh(&self, script: &str) -> Result<Output> {
        let mut command = self.command("sh");
        command.args(["-ec", script]);
        process::run(command)
    }

    /// Whether `program` is installed.
    pub fn has(&self, program: &str) -> Result<bool> {
        Ok(!self.try_sh(&format!("command -v {program}"))?.stdout.is_empty())
    }

    /// Starts `command` (made by [`Host::command`]) in the background.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        let directory = self.directory();
        fs::create_dir_all(&directory)
            .map_err(|e| LabError::File { path: directory.display().to_string(), source: e })?;
        let log = directory.join(format!("{name}.log"));
        self.lab.logs.borrow_mut().push((format!("{} on {}", name, self.name), log.clone()));
        let mut process = Process::spawn(name, command, log)?;
        // It enters the namespace by itself. Cleaning up finds processes by it, so a lab that ends at once
        // would overlook one that is still on its way there.
        let inside = Path::new("/run/netns").join(&self.namespace);
        let seen_from_outside = format!("/proc/{}/ns/net", process.id());
        process::wait_for(&format!("{name} to enter {}", self.name), Duration::from_secs(10), || {
            let there = match (fs::metadata(&seen_from_outside), fs::metadata(&inside)) {
                (Ok(its), Ok(hosts)) => (its.dev(), its.ino()) == (hosts.dev(), hosts.ino()),
                _ => false,
            };
            if there || !process.is_running() { Ok(()) } else { Err("not in it yet".into()) }
        })?;
        Ok(process)
    }

    /// Calls `body` on a thread that is in the host's network namespace: sockets that it opens are there, wherever
    /// they are used.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
        let path = Path::new("/run/netns").join(&self.namespace);
        let run = || {
            let namespace = fs::File::open(&path)?;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            body()
        };
        let outcome = std::thread::scope(|scope| scope.spawn(run).join());
        let outcome = outcome.unwrap_or_else(|_| Err(std::io::Error::other("it panicked")));
        outcome.map_err(|error| failed(&format!("a thread on {}", self.name), error))
    }

    /// A runtime whose tasks are in the host's network namespace; not so what it blocks on itself: see [`run_on`].
    pub fn runtime(&self) -> Result<tokio::runtime::Runtime> {
        // Its threads are where the one is that makes them.
        self.enter(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build())
    }

    /// Adds a route on the host, as in `ip route add`.
    pub fn route(&self, route: &str) -> Result {
        let mut arguments = vec!["-n", &self.namespace];
        if route.contains("::") {
            arguments.push("-6");
        }
        arguments.extend(["route", "add"]);
        arguments.extend(route.split_whitespace());
        ip(&arguments)
    }

    /// Replaces the host's own `/etc/<file>`.
    pub fn write_etc(&self, file: &str, contents: &str) -> Result {
        let path = self.etc().join(file);
        fs::write(&path, contents).map_err(|e| LabError::File { path: path.display().to_string(), source: e })
    }

    fn etc(&self) -> PathBuf {
        Path::new("/etc/netns").join(&self.namespace)
    }

    fn next_interface(&self) -> String {
        let number = self.interfaces.get();
        self.interfaces.set(number + 1);
        format!("eth{number}")
    }
}

fn ip(arguments: &[&str]) -> Result {
    let mut command = Command::new("ip");
    command.args(arguments);
    check(command).map(drop)
}

/// Ends what runs in `namespace` and removes it. Never fails: it runs while cleaning up.
fn remove_namespace(namespace: &str) {
    let run = |program: &str, arguments: &[&str]| {
        Command::new(program).args(arguments).stderr(std::process::Stdio::null()).output().ok()
    };
    if let Some(output) = run("ip", &["netns", "pids", namespace]) {
        let pids = String::from_utf8_lossy(&output.stdout).into_owned();
        let pids: Vec<&str> = pids.split_whitespace().collect();
        if !pids.is_empty() {
            run("kill", &[&["-9"], pids.as_slice()].concat());
        }
    }
    run("ip", &["netns", "del", namespace]);
    let _ = fs::remove_dir_all(Path::new("/etc/netns").join(namespace));
}

/// Removes the namespaces of labs whose process is gone.
fn sweep() -> Result {
    let mut list = Command::new("ip");
    list.args(["netns", "list"]);
    for line in check(list)?.lines() {
        let namespace = line.split_whitespace().next().unwrap_or_default();
        let owner =
            namespace.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            remove_namespace(namespace);
        }
    }
    Ok(())
}

/// Runs `task` to its end where the tasks of `runtime` are.
pub fn run_on<T: Send + 'static>(
    runtime: &tokio::runtime::Runtime,
    task: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T> {
    let outcome = runtime.block_on(runtime.spawn(task)).map_err(|error| failed("a task", error))?;
    outcome.map_err(|error| failed("a task", error))
}
