//! Services in DNS and the host's resolver, with the clients that people have: dig, kdig, delv, getent, musl's.
//! Sections are those of the specification of DNS service discovery.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a scenario's helpers fail by saying so")]

mod clients;
mod dual_stack;
mod elsewhere;
mod host;
mod records;

use std::time::Duration;

use muster_integration_tests::{
    Host, Lab, LabError, Result, expect,
    muster::{Agent, Registrar},
    process::wait_for,
};
use serde_json::Value;

const DOMAIN: &str = "net.example";
const PATIENCE: Duration = Duration::from_secs(20);

/// A namespace with a Service of each kind, in Kubernetes' own shape.
const MANIFEST: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080, protocol: TCP}
  - {name: dns, port: 53, protocol: UDP}
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: db, namespace: shop}
  spec: {clusterIP: None, ports: [{name: pg, port: 5432}]}
- apiVersion: v1
  kind: Service
  metadata: {name: docs, namespace: shop}
  spec: {type: ExternalName, externalName: web.shop.svc.net.example}
- apiVersion: v1
  kind: Service
  metadata: {name: away, namespace: shop}
  spec: {type: ExternalName, externalName: www.example.org}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: pg, port: 15432, protocol: TCP}]
endpoints:
- {addresses: [10.9.0.1], hostname: primary, conditions: {ready: true}}
- {addresses: [10.9.0.2]}
- {addresses: [10.9.0.3], conditions: {ready: false}}
"#;

/// A registrar whose DNS is open to the lab, with [`MANIFEST`] applied.
fn shop(lab: &Lab, more: &str) -> Result<(Host, Registrar)> {
    let hq = lab.host("hq")?;
    lab.switch("core")?.plug(&hq, &["192.0.2.1/24"])?;
    let open =
        format!("[dns]\nopen_to = [\"192.0.2.0/24\", \"127.0.0.0/8\"]\nresponses_per_second = 0\n{more}");
    let mut registrar = Registrar::init(&hq, DOMAIN, "192.0.2.1", &open)?;
    registrar.serve()?;
    registrar.apply(MANIFEST)?;
    Ok((hq, registrar))
}

/// The registrar of [`shop`], with an agent on a host beside it.
/// It sees the network as strangers do, but for what its agent shows its certificate for.
fn shop_with_agent(lab: &Lab, config: &str, agent_config: &str) -> Result<(Registrar, Agent)> {
    let (hq, host) = (lab.host("hq")?, lab.host("alice")?);
    let switch = lab.switch("core")?;
    switch.plug(&hq, &["192.0.2.1/24"])?;
    switch.plug(&host, &["192.0.2.10/24"])?;
    let mut registrar = Registrar::init(&hq, DOMAIN, "192.0.2.1", config)?;
    registrar.serve()?;
    registrar.apply(MANIFEST)?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let agent = Agent::new(&host, agent_config)?;
    agent.join(&join, "alice")?;
    Ok((registrar, agent))
}

/// A command that asks the registrar over TLS, with the certificate of `agent`.
fn with_certificate(agent: &Agent) -> Result<String> {
    let file = |path: &std::path::Path| {
        let path = path.display().to_string();
        move |source| LabError::File { path, source }
    };
    // What the agent keeps: a line about the file, then JSON.
    let path = agent.state().join("identity");
    let text = std::fs::read_to_string(&path).map_err(file(&path))?;
    let json = text.split_once('\n').map_or("", |(_, json)| json);
    let identity: Value = serde_json::from_str(json).unwrap_or_default();
    let directory = agent.host().directory();
    for (name, key) in [("tls.crt", "certificate_chain"), ("tls.key", "tls_key")] {
        let path = directory.join(name);
        std::fs::write(&path, identity[key].as_str().unwrap_or_default()).map_err(file(&path))?;
    }
    let directory = directory.display();
    Ok(format!("kdig @192.0.2.1 +tls +tls-certfile={directory}/tls.crt +tls-keyfile={directory}/tls.key"))
}

/// Waits until `script` prints exactly `wanted`, lines in any order.
fn prints(host: &Host, script: &str, wanted: &[&str]) -> Result {
    let mut wanted: Vec<&str> = wanted.to_vec();
    wanted.sort_unstable();
    wait_for(script, PATIENCE, || {
        let printed = host.try_sh(script).map_err(|e| e.to_string())?.stdout;
        let mut lines: Vec<&str> = printed.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines.sort_unstable();
        if lines == wanted { Ok(()) } else { Err(format!("{lines:?}")) }
    })
}

/// A command that prints the status of dig's answer.
fn status(question: &str) -> String {
    status_of(&format!("dig @192.0.2.1 {question}"))
}

/// A command that prints the status of the answer that `command`, dig or kdig, gets.
fn status_of(command: &str) -> String {
    format!("{command} | sed -n 's/.*status: \\([A-Z]*\\)[,;].*/\\1/p'")
}
