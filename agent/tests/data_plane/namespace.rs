//! Network namespaces that vanish at the end of a test, and threads in them.

use std::{
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Whether the test may run. Says why not, or fails if root is required.
pub(crate) fn have_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert_ne!(std::env::var("MUSTER_REQUIRE_ROOT").as_deref(), Ok("1"), "this test needs root");
    eprintln!("skipped: makes network namespaces, for which it needs root");
    false
}

/// A network namespace with its loopback up, deleted on drop.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = Self { name: format!("muster-{}-{number}", std::process::id()) };
        run("ip", &["netns", "add", &namespace.name]);
        namespace.ip("link set lo up");
        namespace
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` with these words in the namespace and returns what it prints.
    pub(crate) fn ip(&self, words: &str) -> String {
        let mut arguments = vec!["-n", &self.name];
        arguments.extend(words.split_whitespace());
        run("ip", &arguments)
    }

    /// Runs a command in the namespace, whatever comes of it.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).args(line.split_whitespace());
        command
    }

    /// Runs a command in the namespace that must succeed, and returns what it prints.
    pub(crate) fn run(&self, line: &str) -> String {
        check(line, self.command(line).output().expect("ip runs"))
    }

    /// Calls `test` on a thread in the namespace, within a tokio runtime.
    pub(crate) fn enter<T: Send>(&self, test: impl AsyncFnOnce() -> T + Send) -> T {
        let result = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let file =
                        std::fs::File::open(format!("/run/netns/{}", self.name)).expect("namespace exists");
                    move_into_link_name_space(
                        std::os::fd::AsFd::as_fd(&file),
                        Some(LinkNameSpaceType::Network),
                    )
                    .expect("may enter");
                    let runtime =
                        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
                    runtime.block_on(test())
                })
                .join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Joins two namespaces with a cable: `eth0` at both ends, 10.9.0.1 and fd09::1 at the first, 10.9.0.2 and fd09::2
/// at the second.
pub(crate) fn connect(a: &Namespace, b: &Namespace) {
    a.ip(&format!("link add eth0 type veth peer name eth0 netns {}", b.name));
    for (namespace, number) in [(a, 1), (b, 2)] {
        namespace.ip(&format!("addr add 10.9.0.{number}/24 dev eth0"));
        namespace.ip(&format!("addr add fd09::{number}/64 dev eth0 nodad"));
        namespace.ip("link set eth0 up");
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("program is installed");
    check(&format!("{program} {}", arguments.join(" ")), output)
}

fn check(line: &str, output: Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "`{line}` failed: {}{text}", String::from_utf8_lossy(&output.stderr));
    text
}
