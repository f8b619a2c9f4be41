//! Services at work, as an operator and the programs on hosts see them: created with `muster`, filled by labels, reached by
//! name and virtual IP from hosts, from containers on them, and while no registrar runs.

#![allow(clippy::expect_used, reason = "what tests do, in functions that they share")]

mod grpc;
mod named;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use muster_integration_tests::{
    Host, Lab, Result, expect, failed,
    muster::{Agent, Registrar},
    process::{Process, wait_for},
    scenario,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
/// Connections after which one may say who serves: that one of two endpoints is missed by all has a chance of 1 in 16 million.
const DRAWS: usize = 24;

/// Says its name to whoever asks, over HTTP and over UDP, both on port 8080.
const SERVER: &str = r#"
import http.server, os, socket, sys, threading
name = sys.argv[1].encode()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        broken = self.path == "/ready" and os.path.exists(sys.argv[2])
        self.send_response(503 if broken else 200)
        self.send_header("Content-Length", str(len(name)))
        self.end_headers()
        self.wfile.write(name)
    def log_message(self, *arguments):
        pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128
def udp():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.bind(("::", 8080))
        while True:
            _, who = s.recvfrom(100)
            s.sendto(name, who)
threading.Thread(target=udp, daemon=True).start()
Server(("::", 8080), Handler).serve_forever()
"#;

struct World {
    registrar: Registrar,
    agents: Vec<Agent>,
    _servers: Vec<Process>,
}

/// While there is this file, the server of a host says that it is not ready.
fn broken(host: &Host) -> PathBuf {
    host.directory().join("broken")
}

/// A registrar, and devices each with a server.
fn world(lab: &Lab, names: &[&str]) -> Result<World> {
    let (hq, switch) = (lab.host("hq")?, lab.switch("core")?);
    switch.plug(&hq, &["192.0.2.1/24"])?;
    let mut registrar = Registrar::init(&hq, "net.example", "192.0.2.1", "")?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let (mut agents, mut servers) = (Vec::new(), Vec::new());
    for (i, name) in names.iter().enumerate() {
        let host = lab.host(name)?;
        switch.plug(&host, &[&format!("192.0.2.{}/24", 10 + i)])?;
        let mut agent = Agent::new(&host, "")?;
        agent.join(&join, name)?;
        agent.run()?;
        agents.push(agent);
        let mut command = host.command("python3");
        command.args(["-c", SERVER, name]).arg(broken(&host));
        servers.push(host.spawn("server", command)?);
    }
    Ok(World { registrar, agents, _servers: servers })
}

impl World {
    fn host(&self, name: &str) -> Host {
        let agent = self.agents.iter().find(|agent| agent.host().name() == name);
        agent.map(|agent| agent.host().clone()).expect("a host of this name")
    }
}

/// Who answers `count` connections to a Service, or what curl says.
fn answers(host: &Host, url: &str, count: usize) -> Result<BTreeSet<String>, String> {
    let script = format!("for i in $(seq {count}); do curl -sS --max-time 3 {url}; echo; done");
    let output = host.try_sh(&script).map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(format!("{}{}", output.stdout, output.stderr));
    }
    Ok(output.stdout.lines().map(str::to_owned).collect())
}

/// Waits until those answer, and no others; shows the host's table and interface if that does not come about.
fn served_by(host: &Host, url: &str, wanted: &[&str]) -> Result {
    let all: BTreeSet<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
    let outcome =
        wait_for(
            &format!("{} to be served by {wanted:?} at {url}", host.name()),
            PATIENCE,
            || match answers(host, url, DRAWS) {
                Ok(found) if found == all => Ok(()),
                other => Err(format!("{other:?}")),
            },
        );
    outcome.map_err(|error| {
        let state = host.try_sh("nft list table inet muster_muster0_services; ip addr show muster0");
        failed(&error.to_string(), state.map_or_else(|error| error.to_string(), |output| output.stdout))
    })
}

/// Waits until connections are refused, and sees to it that this takes no time.
fn refused(host: &Host, url: &str) -> Result {
    wait_for(&format!("{url} to refuse {}", host.name()), PATIENCE, || {
        let output =
            host.try_sh(&format!("curl -sS --max-time 1 {url}")).map_err(|error| error.to_string())?;
        let text = format!("{}{}", output.stdout, output.stderr);
        // 7: refused; 28 would be a timeout.
        if output.status.code() == Some(7) { Ok(()) } else { Err(text) }
    })
}

#[test]
fn a_service_is_reached_by_name_wherever_its_devices_are() {
    scenario("a Service with a virtual IP", |lab| {
        let mut world = world(lab, &["a", "b", "c"])?;
        let (a, b) = (world.host("a"), world.host("b"));
        let registrar = &world.registrar;
        registrar.muster(&["create", "service", "clusterip", "web", "--tcp=80:8080", "--udp=80:8080"])?;
        let url = "http://web.default.svc.net.example";
        // It has a name and an address before it has a device.
        refused(&a, url)?;
        registrar.muster(&["label", "device", "b", "app=web"])?;
        served_by(&a, url, &["b"])?;
        registrar.muster(&["label", "device", "c", "app=web"])?;
        served_by(&a, url, &["b", "c"])?;
        // A device reaches itself, and the others, by its own Service.
        served_by(&b, url, &["b", "c"])?;
        let slices = registrar.muster(&["get", "endpointslices"])?;
        expect(
            slices.contains("web-") && slices.contains("8080"),
            "an EndpointSlice of the Service",
            &slices,
        )?;
        let udp = "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); \
                   s.sendto(b\"x\", (\"web.default.svc.net.example\", 80)); print(s.recv(100).decode())'";
        let answer = a.sh(udp)?;
        expect(["b", "c"].contains(&answer.trim()), "an answer over UDP", &answer)?;

        // Taken out by a label, and back.
        registrar.muster(&["label", "device", "c", "app-"])?;
        served_by(&a, url, &["b"])?;
        registrar.muster(&["label", "device", "c", "app=web"])?;
        served_by(&a, url, &["b", "c"])?;
        // One whose agent is gone is not asked for long, and comes back with it.
        let c = world.agents.iter_mut().find(|agent| agent.host().name() == "c");
        let c = c.expect("a host of this name");
        c.kill();
        served_by(&a, url, &["b"])?;
        c.run()?;
        served_by(&a, url, &["b", "c"])?;
        registrar.muster(&["revoke", "device", "c"])?;
        served_by(&a, url, &["b"])?;
        // None of it is left.
        registrar.muster(&["delete", "service", "web"])?;
        wait_for("the virtual IP to go", PATIENCE, || {
            let rules = a.sh("nft list ruleset").map_err(|error| error.to_string())?;
            if rules.contains("goto ipv4-") { Err(rules) } else { Ok(()) }
        })
    });
}

#[test]
fn virtual_ips_live_without_a_registrar() {
    scenario("virtual IPs without a registrar", |lab| {
        let mut world = world(lab, &["a", "b"])?;
        let (a, b) = (world.host("a"), world.host("b"));
        world.registrar.muster(&["label", "device", "b", "app=web"])?;
        world.registrar.muster(&["create", "service", "clusterip", "web", "--tcp=80:8080"])?;
        let ip = world.registrar.muster(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"]);
        let ip = match ip {
            Ok(ip) => ip.trim().to_owned(),
            Err(_) => a.sh("dig +short web.default.svc.net.example A")?.trim().to_owned(),
        };
        let url = format!("http://{ip}");
        served_by(&a, &url, &["b"])?;
        // From a container on the host, too, whose address nobody else knows.
        let container = lab.host("container")?;
        let bridge = lab.switch("bridge")?;
        let link = bridge.plug(&a, &["172.30.0.1/24"])?;
        bridge.plug(&container, &["172.30.0.2/24"])?;
        container.route("default via 172.30.0.1")?;
        a.sh(&format!("sysctl -qw net.ipv4.conf.{link}.forwarding=1 net.ipv4.conf.muster0.forwarding=1"))?;
        served_by(&container, &url, &["b"])?;

        std::thread::sleep(Duration::from_secs(3));
        world.registrar.kill();
        let agent = &mut world.agents[0];
        agent.kill();
        agent.start()?;
        served_by(&a, &url, &["b"])?;
        served_by(&b, &url, &["b"])?;
        // What others do to it is undone.
        a.sh("nft flush ruleset")?;
        served_by(&a, &url, &["b"])?;
        // A host that leaves off keeps nothing.
        let agent = &mut world.agents[0];
        agent.stop()?;
        let tables = a.sh("nft list tables")?;
        expect(!tables.contains("muster"), "no table is left", &tables)
    });
}

const PROBED: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
  readinessProbe:
    httpGet: {path: /ready, port: 8080}
    periodSeconds: 1
    failureThreshold: 2
"#;

#[test]
fn what_is_not_ready_is_not_asked() {
    scenario("a Service with a readiness probe", |lab| {
        let mut world = world(lab, &["a", "b", "c"])?;
        let (a, b) = (world.host("a"), world.host("b"));
        world.registrar.muster(&["label", "device", "b", "app=web"])?;
        world.registrar.muster(&["label", "device", "c", "app=web"])?;
        world.registrar.apply(PROBED)?;
        let url = "http://web.default.svc.net.example";
        served_by(&a, url, &["b", "c"])?;
        b.sh(&format!("touch {}", broken(&b).display()))?;
        served_by(&a, url, &["c"])?;
        let slices = world.registrar.muster(&["get", "endpointslices", "-o", "yaml"])?;
        expect(slices.contains("ready: false"), "an endpoint that is not ready", &slices)?;
        // A restart of the agent changes nothing of what is known, and what changes meanwhile is found out.
        let agent = world.agents.iter_mut().find(|agent| agent.host().name() == "b");
        let agent = agent.expect("a host of this name");
        agent.kill();
        agent.run()?;
        served_by(&a, url, &["c"])?;
        b.sh(&format!("rm {}", broken(&b).display()))?;
        served_by(&a, url, &["b", "c"])?;
        // Another probe, which fails everywhere: nobody is asked.
        world.registrar.apply(&PROBED.replace("port: 8080}\n    period", "port: 9}\n    period"))?;
        refused(&a, url)?;
        world.registrar.apply(PROBED)?;
        served_by(&a, url, &["b", "c"])
    });
}

/// The endpoints of each frontend in the table, by what they are translated to; an error if the table does not fit together.
fn endpoints(host: &Host) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let text = host.sh("nft -j list table inet muster_muster0_services")?;
    let table: Value = serde_json::from_str(&text).unwrap_or_default();
    let elements = |name: &str| -> Vec<(Vec<String>, Value)> {
        let objects = table["nftables"].as_array().into_iter().flatten();
        let map = objects.filter_map(|object| object.get("map")).find(|map| map["name"] == *name);
        let elements = map.and_then(|map| map["elem"].as_array()).into_iter().flatten();
        let parts =
            |key: &Value| key["concat"].as_array().into_iter().flatten().map(Value::to_string).collect();
        elements.map(|element| (parts(&element[0]), element[1].clone())).collect()
    };
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (mut key, endpoint) in elements("endpoints4") {
        key.pop();
        found.entry(key.join(" ")).or_default().insert(endpoint.to_string());
    }
    for (key, decision) in elements("services4") {
        let count = found.get(&key.join(" ")).map_or(0, BTreeSet::len);
        let chain = format!("ipv4-{count}");
        expect(decision["goto"]["target"] == *chain, &chain, &format!("{decision}: {text}"))?;
    }
    expect(found.len() == elements("services4").len(), "frontends with endpoints", &text)?;
    for (key, _) in elements("refused4") {
        found.insert(key.join(" "), BTreeSet::new());
    }
    Ok(found)
}

#[test]
fn an_agent_that_is_killed_leaves_one_state_or_the_other() {
    const SERVICES: usize = 20;
    scenario("an agent killed in the middle of changes", |lab| {
        let mut world = world(lab, &["a", "b", "c"])?;
        let a = world.host("a");
        // One label puts a device into all of them: at no time do they differ.
        for n in 0..SERVICES {
            let spec = "selector: {app: web}, ports: [{port: 80, targetPort: 8080}]";
            let manifest =
                format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s{n}}}\nspec: {{{spec}}}\n");
            world.registrar.apply(&manifest)?;
        }
        let flip = |device, label| world.registrar.muster_command(&["label", "device", device, label]);
        let mut flips =
            [flip("b", "app=web")?, flip("c", "app=web")?, flip("b", "app-")?, flip("c", "app-")?];
        for command in &mut flips {
            command.stdout(Stdio::null());
        }
        let agent = &mut world.agents[0];
        let is_over = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| -> Result<BTreeSet<usize>> {
            let flips = scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let statuses = flips.iter_mut().map(Command::status);
                    statuses.for_each(|status| assert!(status.is_ok_and(|status| status.success())));
                }
            });
            let mut work = || -> Result<BTreeSet<usize>> {
                let mut seen = BTreeSet::new();
                for round in 0..12_u64 {
                    // At another moment each time.
                    std::thread::sleep(Duration::from_millis(150 + round * 37 % 90));
                    agent.kill();
                    let found = endpoints(&a)?;
                    expect(found.len() == SERVICES, "all Services", &format!("{found:?}"))?;
                    let different: BTreeSet<&BTreeSet<String>> = found.values().collect();
                    expect(different.len() == 1, "one state", &format!("{found:?}"))?;
                    seen.extend(found.values().map(BTreeSet::len));
                    agent.start()?;
                    wait_for("the agent to work again", PATIENCE, || {
                        let metrics = agent.metrics().map_err(|error| error.to_string())?;
                        match metrics.contains("muster_agent_registrar_connected 1") {
                            true => Ok(()),
                            false => Err(metrics),
                        }
                    })?;
                }
                Ok(seen)
            };
            let seen = work();
            is_over.store(true, Ordering::Relaxed);
            flips.join().expect("all labels are taken");
            seen
        })?;
        expect(seen.len() > 1, "states with and without an endpoint", &format!("{seen:?}"))?;
        // In the end all is as the registrar has it.
        world.registrar.muster(&["label", "device", "b", "app=web"])?;
        world.registrar.muster(&["label", "device", "c", "app=web"])?;
        wait_for("all endpoints", PATIENCE, || match endpoints(&a) {
            Ok(found) if found.values().all(|endpoints| endpoints.len() == 2) => Ok(()),
            other => Err(format!("{other:?}")),
        })
    });
}
