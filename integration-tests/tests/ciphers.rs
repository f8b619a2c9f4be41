//! Which cipher the packets between two agents are sealed with, and that everybody is told of it.

use std::time::Duration;

use muster_agent::cpu;
use muster_integration_tests::{
    Host, LabError, Result, expect,
    muster::{Agent, JoinCommand, Registrar},
    process::wait_for,
    scenario,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(150);
const WITHOUT: &str = "[tunnel]\naes = false\n";
const PLAIN: &str = "chacha20-poly1305";

/// What agents use between each other on this machine.
fn fast() -> &'static str {
    if cpu::has_aes() { "aes-256-gcm" } else { PLAIN }
}

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text)
        .map_err(|e| LabError::Command { command: "reading JSON".into(), reason: format!("{e}: {text}") })
}

/// Waits until `agent` has reached the peer and says that it does so by `cipher`.
fn expect_cipher(agent: &Agent, peer: &str, cipher: &str) -> Result {
    wait_for(&format!("{cipher} with {peer}"), PATIENCE, || {
        let reached = agent.host().sh(&format!("ping -c 1 -W 1 {peer}.net.example"));
        reached.map_err(|e| e.to_string())?;
        let status = agent.ask(&["status", "--peer", peer, "-o", "json"]).map_err(|e| e.to_string())?;
        let status = json(&status).map_err(|e| e.to_string())?;
        if status["cipher"] == cipher { Ok(()) } else { Err(status.to_string()) }
    })?;
    let text = agent.ask(&["status", "--peer", peer])?;
    expect(text.contains(&format!("\nCipher       {cipher}\n")), "the cipher for people", &text)
}

/// Sends a megabyte each way, in super-packets.
fn transfer(from: &Host, to: &Host, name: &str) -> Result {
    let mut server = to.command("iperf3");
    server.args(["-s", "-1"]);
    let _server = to.spawn("iperf3", server)?;
    wait_for("iperf3", PATIENCE, || {
        to.sh("ss -Hltn sport = :5201 | grep -q 5201").map_err(|e| e.to_string())
    })?;
    from.sh(&format!("iperf3 -c {name}.net.example -n 1M --bidir")).map(drop)
}

fn member(host: &Host, join: &JoinCommand, name: &str, config: &str) -> Result<Agent> {
    let mut agent = Agent::new(host, config)?;
    agent.join(join, name)?;
    agent.run()?;
    Ok(agent)
}

/// The same device, with another configuration.
fn restarted(mut agent: Agent, config: &str) -> Result<Agent> {
    agent.stop()?;
    let mut agent = Agent::new(agent.host(), config)?;
    agent.run()?;
    Ok(agent)
}

/// The ciphers of each device beside WireGuard's, as operators see them.
fn told(registrar: &Registrar) -> Result<Vec<(String, Value)>> {
    let listed = json(&registrar.muster(&["get", "devices", "-o", "json"])?)?;
    let devices = listed["items"].as_array().cloned().unwrap_or_default();
    let of = |device: &Value| {
        let name = device["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        (name, device["status"]["transportCiphers"].clone())
    };
    Ok(devices.iter().map(of).collect())
}

#[test]
fn agents_use_aes_between_each_other_and_wireguard_with_others() {
    scenario("ciphers", |lab| {
        let lan = lab.switch("lan")?;
        let hosts = ["hq", "alice", "bob", "carol"].map(|name| lab.host(name));
        let [hq, a, b, c] = hosts;
        let (hq, a, b, c) = (hq?, a?, b?, c?);
        for (host, address) in
            [(&hq, "10.1.0.1/24"), (&a, "10.1.0.10/24"), (&b, "10.1.0.20/24"), (&c, "10.1.0.30/24")]
        {
            lan.plug(host, &[address])?;
        }
        let mut registrar = Registrar::init(&hq, "net.example", "10.1.0.1", "")?;
        registrar.serve()?;
        let join = registrar.new_join_command(&["--reusable"])?;
        let alice = member(&a, &join, "alice", "")?;
        let bob = member(&b, &join, "bob", "")?;
        let carol = member(&c, &join, "carol", WITHOUT)?;

        expect_cipher(&alice, "bob", fast())?;
        expect_cipher(&bob, "alice", fast())?;
        transfer(&a, &b, "bob")?;
        // Whoever begins: with carol there is nothing but WireGuard.
        expect_cipher(&alice, "carol", PLAIN)?;
        expect_cipher(&carol, "alice", PLAIN)?;
        expect_cipher(&carol, "bob", PLAIN)?;
        expect_cipher(&bob, "carol", PLAIN)?;
        transfer(&a, &c, "carol")?;

        let aes = serde_json::json!(["TRANSPORT_CIPHER_AES_256_GCM"]);
        let aes = if cpu::has_aes() { aes } else { Value::Null };
        let shown = told(&registrar)?;
        let expected = [("alice", &aes), ("bob", &aes), ("carol", &Value::Null)];
        let expected = expected.map(|(name, list)| (name.to_owned(), list.clone()));
        expect(shown == expected, "what operators see", &format!("{shown:?}"))?;
        let yaml = registrar.muster(&["get", "device", "alice", "-o", "yaml"])?;
        expect(yaml.contains("transportCiphers:") == cpu::has_aes(), "the same in YAML", &yaml)?;
        let text = registrar.muster(&["describe", "device", "alice"])?;
        expect(text.contains("aes-256-gcm") == cpu::has_aes(), "the same for people", &text)?;

        // It is switched off, and on again, at bob's: alice hears of it from the registrar.
        let bob = restarted(bob, WITHOUT)?;
        expect_cipher(&alice, "bob", PLAIN)?;
        expect_cipher(&bob, "alice", PLAIN)?;
        transfer(&b, &a, "alice")?;
        let bob = restarted(bob, "")?;
        expect_cipher(&bob, "alice", fast())?;
        expect_cipher(&alice, "bob", fast())?;
        transfer(&b, &a, "alice")
    });
}
