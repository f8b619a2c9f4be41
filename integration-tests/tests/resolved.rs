//! The agent beside a real systemd-resolved: its binary from Debian's package, unpacked, on a D-Bus of the lab's host.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use muster_integration_tests::{
    Host, Lab, LabError, Process, Result, expect,
    muster::{Agent, Registrar, binary},
    process::{check, wait_for},
    scenario,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
/// Of the network namespace, as abstract sockets are.
const BUS: &str = "unix:abstract=/muster-test/bus";
const STUB: &str = "nameserver 127.0.0.53\n";
/// Runs resolved; what it keeps between runs is gone with its mount of /run, so that the agent must tell it anew.
const RUN: &str = "mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/resolved.conf.d
printf '[Resolve]\\nDNS=10.1.0.53\\nFallbackDNS=\\nLLMNR=no\\nMulticastDNS=no\\nDNSSEC=allow-downgrade\\nDNSOverTLS=opportunistic\\n' >/run/systemd/resolved.conf.d/lab.conf
exec \"$0\"";

struct Site {
    host: Host,
    agent: Agent,
    package: PathBuf,
    _registrar: Registrar,
    upstream: Process,
    _bus: Process,
}

/// Where the package is unpacked. Without it the test fails: it says what it could not have.
fn package() -> Result<PathBuf> {
    let agent = binary("muster-agent")?;
    let target = agent.ancestors().nth(2).unwrap_or(Path::new("/"));
    let package = target.join("tools/resolved");
    let mut fetch = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fetch-resolved.sh"));
    fetch.arg(&package);
    check(fetch)?;
    Ok(package)
}

fn write(path: &Path, text: &str) -> Result {
    fs::write(path, text).map_err(|source| LabError::File { path: path.display().to_string(), source })
}

/// The host's own user database, with resolved's user; it has root's number as a user namespace has no other.
fn users(host: &Host) -> Result {
    for (file, line) in
        [("passwd", "systemd-resolve:x:0:0::/:/bin/false\n"), ("group", "systemd-resolve:x:0:\n")]
    {
        let text = host.sh(&format!("grep -v ^systemd-resolve: /etc/{file}"))?;
        host.write_etc(file, &format!("{text}{line}"))?;
    }
    Ok(())
}

fn bus(host: &Host, package: &Path) -> Result<Process> {
    let config = host.directory().join("bus.conf");
    let policy = package.join("usr/share/dbus-1/system.d/org.freedesktop.resolve1.conf");
    let text = format!(
        "<!DOCTYPE busconfig PUBLIC '-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN' \
         'http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd'>
<busconfig><type>system</type><listen>{BUS}</listen><auth>EXTERNAL</auth>
<policy context='default'><allow user='*'/><deny own='*'/><deny send_type='method_call'/><allow send_type='signal'/>
<allow send_requested_reply='true' send_type='method_return'/><allow send_requested_reply='true' send_type='error'/>
<allow receive_type='method_call'/><allow receive_type='method_return'/><allow receive_type='error'/>
<allow receive_type='signal'/><allow send_destination='org.freedesktop.DBus'/></policy>
<include>{}</include></busconfig>\n",
        policy.display()
    );
    write(&config, &text)?;
    let mut command = host.command("dbus-daemon");
    command.arg(format!("--config-file={}", config.display())).args(["--nofork", "--nopidfile"]);
    let bus = host.spawn("dbus-daemon", command)?;
    wait_for("the bus", PATIENCE, || {
        let sockets = host.sh("ss -lx").map_err(|e| e.to_string())?;
        if sockets.contains("@/muster-test/bus") { Ok(()) } else { Err(sockets) }
    })?;
    Ok(bus)
}

fn site(lab: &Lab) -> Result<Site> {
    let package = package()?;
    let lan = lab.switch("lan")?;
    let (hq, host, up) = (lab.host("hq")?, lab.host("alice")?, lab.host("up")?);
    lan.plug(&hq, &["10.1.0.1/24"])?;
    lan.plug(&host, &["10.1.0.10/24"])?;
    lan.plug(&up, &["10.1.0.53/24"])?;
    let mut dnsmasq = up.command("dnsmasq");
    dnsmasq.args(["--no-daemon", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--user=root"]);
    dnsmasq.args(["--pid-file=", "--log-queries", "--address=/corp.example/10.9.9.9"]);
    let upstream = up.spawn("dnsmasq", dnsmasq)?;
    let mut registrar = Registrar::init(&hq, "net.example", "10.1.0.1", "")?;
    registrar.serve()?;
    let agent = Agent::new(&host, "")?;
    agent.join(&registrar.join_command()?, "web")?;
    users(&host)?;
    host.write_etc("resolv.conf", STUB)?;
    let bus = bus(&host, &package)?;
    Ok(Site { host, agent, package, _registrar: registrar, upstream, _bus: bus })
}

impl Site {
    fn of_package(&self, mut command: Command) -> Result<Command> {
        let library = check({
            let mut find = Command::new("find");
            find.arg(&self.package).args(["-name", "libsystemd-shared-*.so", "-printf", "%h"]);
            find
        })?;
        command.env("LD_LIBRARY_PATH", library).env("DBUS_SYSTEM_BUS_ADDRESS", BUS);
        Ok(command)
    }

    fn resolved(&self) -> Result<Process> {
        let mut command = self.host.command("sh");
        command.args(["-ec", RUN]).arg(self.package.join("lib/systemd/systemd-resolved"));
        command.env("SYSTEMD_LOG_LEVEL", "debug").env("SYSTEMD_LOG_TARGET", "console");
        let process = self.host.spawn("systemd-resolved", self.of_package(command)?)?;
        wait_for("systemd-resolved", PATIENCE, || {
            self.resolvectl(&["status"]).map(drop).map_err(|e| e.to_string())
        })?;
        Ok(process)
    }

    fn resolvectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.host.command(self.package.join("usr/bin/resolvectl"));
        command.args(arguments);
        check(self.of_package(command)?)
    }

    /// What resolved has of one kind for our interface.
    fn has(&self, kind: &str) -> Result<String> {
        self.has_for("muster0", kind)
    }

    fn has_for(&self, interface: &str, kind: &str) -> Result<String> {
        let text = self.resolvectl(&[kind, interface])?;
        Ok(text.split_once("): ").map_or("", |(_, value)| value).trim().to_owned())
    }

    fn start(&self) -> Result<Process> {
        let mut command = self.host.command(binary("muster-agent")?);
        command.arg("run").arg("--config").arg(self.agent.config());
        command.env("MUSTER_RESOLVER_HOST", "auto").env("DBUS_SYSTEM_BUS_ADDRESS", BUS);
        self.host.spawn("muster-agent", command)
    }

    fn told(&self) -> Result {
        wait_for("resolved to know of the agent", PATIENCE, || {
            let domains = self.has("domain").map_err(|e| e.to_string())?;
            if domains.contains("~net.example") { Ok(()) } else { Err(domains) }
        })?;
        let domains = self.has("domain")?;
        expect(domains.contains(".in-addr.arpa"), "the pool's reverse zones", &domains)?;
        expect(!domains.split(' ').any(|domain| domain == "~."), "nothing else", &domains)?;
        for (kind, value) in
            [("dns", "169.254.20.10"), ("default-route", "no"), ("dnssec", "no"), ("dnsovertls", "no")]
        {
            let seen = self.has(kind)?;
            expect(seen == value, &format!("{kind} = {value}"), &seen)?;
        }
        // The interface has it from us, not from the host's own settings.
        for (kind, value) in [("dnssec", "allow-downgrade"), ("dnsovertls", "opportunistic")] {
            let seen = self.has_for("eth0", kind)?;
            expect(seen == value, &format!("{kind} = {value} elsewhere"), &seen)?;
        }
        Ok(())
    }

    fn names(&self) -> Result {
        let address = wait_for("a name of the network", PATIENCE, || {
            let found = self.dig("web.net.example A").map_err(|e| e.to_string())?;
            if found.starts_with("100.") { Ok(found) } else { Err(found) }
        })?;
        let reverse = self.dig(&format!("-x {address}"))?;
        expect(reverse == "web.net.example.", "the address' name", &reverse)?;
        let found = self.host.sh("getent ahostsv4 web.net.example | cut -d' ' -f1 | sort -u")?;
        expect(found.trim() == address, "glibc's answer", &found)?;
        // Other names are no business of the agent's.
        let before = self.queries()?;
        for number in 0..50 {
            let found = self.dig(&format!("name{number}.corp.example A"))?;
            expect(found == "10.9.9.9", "a name elsewhere", &found)?;
        }
        let after = self.queries()?;
        expect(after - before < 25, "no queries for them", &format!("{before}, then {after}"))
    }

    fn dig(&self, question: &str) -> Result<String> {
        Ok(self.host.sh(&format!("dig +short +tries=1 {question} @127.0.0.53"))?.trim().to_owned())
    }

    /// How many the agent has had so far; its own questions for signs of life are among them.
    fn queries(&self) -> Result<u64> {
        let status: Value =
            serde_json::from_str(&self.agent.ask(&["status", "-o", "json"])?).unwrap_or_default();
        let value = &status["resolver"]["queries"];
        let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
        number.ok_or_else(|| LabError::Command { command: "queries".into(), reason: status.to_string() })
    }
}

#[test]
fn systemd_resolved_asks_the_agent_for_names_of_the_network_alone() {
    scenario("systemd-resolved", |lab| {
        let site = site(lab)?;
        let mut resolved = site.resolved()?;
        let mut agent = site.start()?;
        site.told()?;
        site.names()?;
        // Nor does the host's own server hear of the network's names.
        let log = site.upstream.log();
        expect(log.contains("name49.corp.example"), "queries upstream", &log)?;
        expect(!log.contains("net.example"), "none for the network's names", &log)?;
        let file = site.host.sh("cat /etc/resolv.conf")?;
        expect(file == STUB, "resolv.conf as it was", &file)?;
        // One that starts anew knows nothing.
        resolved.kill();
        let resolved = site.resolved()?;
        site.told()?;
        site.names()?;
        agent.signal(rustix::process::Signal::TERM)?;
        expect(agent.wait(PATIENCE)?.success(), "a clean end", &agent.log())?;
        let log = resolved.log();
        let after = log.rsplit_once("member=RevertLink").map_or("type=error", |(_, after)| after);
        let done = after.contains("type=method_return") && !after.contains("type=error");
        expect(done, "that it be forgotten", &log)?;
        let left = site.resolvectl(&["status"])?;
        let gone = !left.contains("169.254.20.10") && !left.contains("net.example");
        expect(gone, "nothing left", &left)?;
        let found = site.dig("web.net.example A")?;
        expect(found.is_empty(), "no answer", &found)
    });
}
