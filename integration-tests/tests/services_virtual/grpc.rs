//! Servers of gRPC, probed by their health service and called through a virtual IP.

use std::collections::BTreeSet;

use muster_integration_tests::{Host, Process, Result, expect, process::wait_for, scenario};
use rustix::process::Signal;
use serde_json::Value;

use super::{PATIENCE, refused, world};

const STORE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: store}
spec:
  selector: {app: store}
  ports: [{port: 2379}]
  readinessProbe:
    grpc: {port: 2379}
    periodSeconds: 1
    failureThreshold: 2
"#;

/// A server of gRPC with a health service of its own.
fn etcd(host: &Host) -> Result<Process> {
    let mut command = host.command("etcd");
    command.arg("--data-dir").arg(host.directory().join("etcd")).args(["--log-level", "error"]);
    command.args(["--listen-client-urls", "http://0.0.0.0:2379"]);
    // Without it, all would be the same member of the same cluster.
    command.args(["--initial-cluster-token", host.name()]);
    command.args(["--advertise-client-urls", "http://127.0.0.1:2379"]);
    host.spawn("etcd", command)
}

/// Waits until so many servers of the Service `store` answer, and no other.
fn members(host: &Host, wanted: usize) -> Result {
    let url = "http://store.default.svc.net.example:2379/v3/maintenance/status";
    let script =
        format!("for i in 1 2 3 4 5 6 7 8 9 10; do curl -sS --max-time 3 -d '{{}}' {url}; echo; done");
    wait_for(&format!("{wanted} servers to answer {}", host.name()), PATIENCE, || {
        let output = host.try_sh(&script).map_err(|error| error.to_string())?;
        let answers =
            output.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap_or_default());
        let ids = answers.map(|answer| answer["header"]["member_id"].as_str().map(str::to_owned));
        let ids = ids.collect::<Option<BTreeSet<String>>>().filter(|_| output.status.success());
        match ids {
            Some(ids) if ids.len() == wanted => Ok(()),
            _ => Err(format!("{}{}", output.stdout, output.stderr)),
        }
    })
}

#[test]
fn servers_of_grpc_are_asked_while_they_are_healthy() {
    scenario("a Service of gRPC servers", |lab| {
        let world = world(lab, &["a", "b", "c"])?;
        let (a, b, c) = (world.host("a"), world.host("b"), world.host("c"));
        world.registrar.muster(&["label", "device", "b", "app=store"])?;
        world.registrar.muster(&["label", "device", "c", "app=store"])?;
        world.registrar.apply(STORE)?;
        let name = "http://store.default.svc.net.example:2379";
        refused(&a, name)?;
        let (_b, c) = (etcd(&b)?, etcd(&c)?);
        members(&a, 2)?;
        // A call as any client of gRPC makes it: a message without fields, and one that says SERVING.
        let call = format!(
            "printf '\\0\\0\\0\\0\\0' | curl -sS --max-time 3 --http2-prior-knowledge -H 'te: trailers' \
             -H 'content-type: application/grpc' --data-binary @- {name}/grpc.health.v1.Health/Check | od -An -tu1"
        );
        let answer = a.sh(&call)?;
        expect(answer.split_whitespace().eq("0 0 0 0 2 8 1".split(' ')), "SERVING", &answer)?;
        // One that hangs takes connections still, and is not asked all the same.
        c.signal(Signal::STOP)?;
        members(&a, 1)?;
        c.signal(Signal::CONT)?;
        members(&a, 2)
    });
}
