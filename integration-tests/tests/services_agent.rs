//! The agent and Services: what a registrar says has changed is answered for differently at once, whatever the time
//! to live; and Services as environment variables, with and without a registrar.

use std::{thread::sleep, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Result, expect,
    muster::{Agent, Registrar},
    process::wait_for,
    scenario,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);

const MANIFEST: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: my-cs, namespace: shop}
spec: {ports: [{name: main, port: 6379}, {name: gossip, port: 6379, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, ports: [{port: 5432}]}
"#;

/// One endpoint of the headless Service.
fn slice(address: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: db-1, namespace: shop, labels: \
         {{kubernetes.io/service-name: db}}}}\naddressType: IPv4\nports: []\nendpoints:\n- {{addresses: [{address}]}}\n"
    )
}

fn network(lab: &Lab, agent_config: &str) -> Result<(Host, Registrar, Agent)> {
    let (hq, host) = (lab.host("hq")?, lab.host("alice")?);
    let switch = lab.switch("core")?;
    switch.plug(&hq, &["192.0.2.1/24"])?;
    switch.plug(&host, &["192.0.2.10/24"])?;
    let mut registrar = Registrar::init(&hq, "net.example", "192.0.2.1", "")?;
    registrar.serve()?;
    registrar.apply(MANIFEST)?;
    registrar.apply(&slice("10.9.0.1"))?;
    let join = registrar.new_join_command(&[])?;
    let mut agent = Agent::new(&host, agent_config)?;
    agent.join(&join, "alice")?;
    agent.run()?;
    Ok((hq, registrar, agent))
}

fn answer(host: &Host) -> Result<String> {
    Ok(host.sh("dig +short db.shop.svc.net.example A @169.254.20.10")?.trim().to_owned())
}

/// Queries so far that the cache did not answer.
fn misses(agent: &Agent) -> Result<u64> {
    let status = agent.ask(&["status", "-o", "json"])?;
    let status: Value = serde_json::from_str(&status).unwrap_or_default();
    let number = |key: &str| -> u64 {
        let value = &status["resolver"][key];
        value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
    };
    Ok(number("queries") - number("cacheHits"))
}

#[test]
fn what_changes_is_answered_at_once_and_otherwise_stays_cached() {
    scenario("changes of Services", |lab| {
        // Without being told, the agent would answer as before for five minutes.
        let (_hq, mut registrar, agent) = network(lab, "[resolver]\nttl_min = 300\n")?;
        let host = agent.host().clone();
        wait_for("an answer", PATIENCE, || match answer(&host) {
            Ok(ip) if ip == "10.9.0.1" => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        for address in ["10.9.0.2", "10.9.0.3"] {
            // The registrar says once of what is new to it that it may have changed; not again and again.
            sleep(Duration::from_secs(1));
            answer(&host)?;
            let before = misses(&agent)?;
            for _ in 0..10 {
                answer(&host)?;
                sleep(Duration::from_millis(150));
            }
            let after = misses(&agent)?;
            expect(after == before, "answers from the cache", &format!("{before} misses, then {after}"))?;
            registrar.apply(&slice(address))?;
            wait_for("the change", Duration::from_secs(2), || match answer(&host) {
                Ok(ip) if ip == address => Ok(()),
                other => Err(format!("{other:?}")),
            })?;
        }
        // Nor is a change missed that is made before there is a session again.
        answer(&host)?;
        registrar.kill();
        registrar.serve()?;
        registrar.apply(&slice("10.9.0.4"))?;
        wait_for("the change", PATIENCE, || match answer(&host) {
            Ok(ip) if ip == "10.9.0.4" => Ok(()),
            other => Err(format!("{other:?}")),
        })
    });
}

#[test]
fn services_as_environment_variables() {
    scenario("muster-agent env", |lab| {
        let (_hq, mut registrar, mut agent) = network(lab, "")?;
        let host = agent.host().clone();
        let text = agent.ask(&["env", "--namespace", "shop"])?;
        let ip = host.sh("dig +short my-cs.shop.svc.net.example A @169.254.20.10")?.trim().to_owned();
        let expected = format!(
            "MY_CS_PORT=tcp://{ip}:6379\nMY_CS_PORT_6379_TCP=tcp://{ip}:6379\nMY_CS_PORT_6379_TCP_ADDR={ip}\n\
             MY_CS_PORT_6379_TCP_PORT=6379\nMY_CS_PORT_6379_TCP_PROTO=tcp\nMY_CS_PORT_6379_UDP=udp://{ip}:6379\n\
             MY_CS_PORT_6379_UDP_ADDR={ip}\nMY_CS_PORT_6379_UDP_PORT=6379\nMY_CS_PORT_6379_UDP_PROTO=udp\n\
             MY_CS_SERVICE_HOST={ip}\nMY_CS_SERVICE_PORT=6379\nMY_CS_SERVICE_PORT_GOSSIP=6379\n\
             MY_CS_SERVICE_PORT_MAIN=6379\n"
        );
        expect(text == expected, &expected, &text)?;
        let json = agent.ask(&["env", "-n", "shop", "-o", "json"])?;
        let json: Value = serde_json::from_str(&json).unwrap_or_default();
        expect(json["MY_CS_SERVICE_HOST"] == ip.as_str(), "the same as JSON", &json.to_string())?;
        // Shells and systemd read it as it is.
        let file = host.directory().join("services.env");
        std::fs::write(&file, &text)
            .map_err(|source| LabError::File { path: file.display().to_string(), source })?;
        let read = format!("set -a; . {}; set +a; env | grep ^MY_CS_ | LC_ALL=C sort", file.display());
        expect(host.sh(&read)? == expected, "as a shell reads it", &text)?;
        // The device's own namespace has none.
        expect(agent.ask(&["env"])?.is_empty(), "none", "some")?;

        registrar.kill();
        expect(agent.ask(&["env", "--namespace", "shop"])? == expected, "the last list", "another")?;
        let error = agent.try_ask(&["env", "--namespace", "other"])?.stderr;
        expect(error.contains("remedy: `muster-agent status`"), "an error with a remedy", &error)?;
        let error = agent.try_ask(&["env", "--namespace", "a b"])?.stderr;
        expect(error.contains("is not a valid name"), "an error", &error)?;
        agent.stop()?;
        let error = agent.try_ask(&["env", "--namespace", "shop"])?.stderr;
        expect(error.contains("the agent is not running"), "an error", &error)
    });
}
