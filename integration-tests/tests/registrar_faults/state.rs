//! Agents and directors whose state directories are on a disk that is full or read-only: they go on, say so, and write
//! what is missing once they can.

use std::{fs, path::PathBuf};

use muster_integration_tests::{
    Host, Lab, LabError, Result, Switch, expect, failed,
    muster::{Agent, Director, Registrar},
    process::wait_for,
    scenario,
};

use crate::disk::{Disk, PATIENCE};

const ROOM: u32 = 512;

/// A registrar, `alice`, whose state is on a disk of its own, and peers that she has not met.
struct Site {
    lan: Switch,
    registrar: Registrar,
    disk: Disk,
    alice: Agent,
    peers: Vec<Agent>,
}

fn site(lab: &Lab, peers: &[&str]) -> Result<Site> {
    let lan = lab.switch("lan")?;
    let hq = lab.host("hq")?;
    lan.plug(&hq, &["10.1.0.1/24"])?;
    let mut registrar = Registrar::init(&hq, "net.example", "10.1.0.1", "")?;
    registrar.serve()?;
    let up = |agent: Agent| {
        let mut agent = agent;
        agent.join(&registrar.new_join_command(&[])?, agent.host().name())?;
        agent.run()?;
        Ok::<_, LabError>(agent)
    };
    let host = lab.host("alice")?;
    lan.plug(&host, &["10.1.0.10/24"])?;
    let disk = Disk::memory(&host.directory().join("agent/state"), ROOM)?;
    let alice = up(Agent::new(&host, "")?)?;
    let mut others = Vec::new();
    for (number, name) in peers.iter().enumerate() {
        let host = lab.host(name)?;
        lan.plug(&host, &[&format!("10.1.0.{}/24", 20 + number)])?;
        others.push(up(Agent::new(&host, "")?)?);
    }
    Ok(Site { lan, registrar, disk, alice, peers: others })
}

fn reaches(from: &Host, name: &str) -> Result {
    wait_for(&format!("{name} to be reached"), PATIENCE, || {
        from.sh(&format!("ping -c 1 -W 1 {name}.net.example")).map_err(|error| error.to_string())
    })
    .map(drop)
}

/// Waits until the agent tells that its state is on disk, or that it is not, with this in the reason.
fn shows(agent: &Agent, trouble: Option<&str>) -> Result {
    wait_for("health and metrics to show the condition of the state", PATIENCE, || {
        let told = |error: LabError| error.to_string();
        let metrics = agent.metrics().map_err(told)?;
        let ready = agent.host().sh("curl -sf http://127.0.0.1:7581/readyz").map_err(told)?;
        let unsaved = metrics.lines().any(|line| line == "muster_agent_state_unsaved 1");
        let as_expected = match trouble {
            None => !unsaved && ready == "ready\n",
            Some(part) => unsaved && ready.contains(part),
        };
        if as_expected { Ok(()) } else { Err(format!("{ready}\n{metrics}")) }
    })
}

/// The peers that are on disk.
fn peers_on_disk(agent: &Agent) -> Result<String> {
    let path = agent.state().join("peers");
    fs::read_to_string(&path).map_err(|source| LabError::File { path: path.display().to_string(), source })
}

fn log(agent: &mut Agent) -> String {
    agent.process().map(|process| process.log()).unwrap_or_default()
}

#[test]
fn an_agent_whose_disk_is_full_serves_tunnels_and_writes_later() {
    scenario("agent on a full disk", |lab| {
        let mut site = site(lab, &["bob", "carol"])?;
        let host = site.alice.host().clone();
        reaches(&host, "bob")?;
        wait_for("bob to be on disk", PATIENCE, || match peers_on_disk(&site.alice) {
            Ok(peers) if peers.contains("bob") => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        shows(&site.alice, None)?;

        site.disk.fill()?;
        reaches(&host, "carol")?;
        shows(&site.alice, Some("No space left on device"))?;
        let told = log(&mut site.alice);
        expect(
            told.contains("cannot keep state on disk") && told.contains("free some disk space"),
            "it says so",
            &told,
        )?;
        reaches(&host, "bob")?;

        // Killed and started again in this state, it has what it had before, whole.
        site.alice.kill();
        site.alice.run()?;
        let told = log(&mut site.alice);
        expect(!told.contains("set it aside"), "nothing is half-written", &told)?;
        reaches(&host, "bob")?;
        reaches(&host, "carol")?;
        shows(&site.alice, Some("No space left on device"))?;

        site.disk.clear()?;
        shows(&site.alice, None)?;
        let peers = peers_on_disk(&site.alice)?;
        expect(peers.contains("bob") && peers.contains("carol"), "what was missing is written", &peers)?;
        // And that is enough to come up without a registrar.
        site.registrar.kill();
        site.alice.kill();
        site.alice.run()?;
        reaches(&host, "carol")?;
        let told = log(&mut site.alice);
        expect(!told.contains("set it aside"), "nothing was damaged", &told)?;
        let files = host.sh(&format!("ls -A {}", site.alice.state().display()))?;
        expect(!files.contains("tmp-"), "no temporary files pile up", &files)
    });
}

#[test]
fn an_agent_whose_disk_is_read_only_serves_tunnels_and_writes_later() {
    scenario("agent on a read-only disk", |lab| {
        let mut site = site(lab, &["bob"])?;
        let host = site.alice.host().clone();
        // Its lock is open for writing: only between two runs can it be mounted so.
        site.alice.stop()?;
        site.disk.remount("ro")?;
        site.alice.start()?;
        let ended = wait_for("the agent to be ready or to end", PATIENCE, || {
            if !site.alice.process().is_some_and(|process| process.is_running()) {
                return Ok(true);
            }
            host.sh("curl -sf http://127.0.0.1:7581/readyz").map(|_| false).map_err(|error| error.to_string())
        })?;
        if ended {
            let told = log(&mut site.alice);
            return Err(failed("an agent on a read-only disk", told));
        }
        reaches(&host, "bob")?;
        shows(&site.alice, Some("Read-only file system"))?;
        site.disk.remount("rw")?;
        let id = site.alice.process().map_or(0, |process| process.id());
        site.disk.remount_for(id, "rw")?;
        shows(&site.alice, None)?;
        let peers = peers_on_disk(&site.alice)?;
        expect(peers.contains("bob"), "what was missing is written", &peers)
    });
}

#[test]
fn a_director_whose_disk_is_full_or_read_only_relays() {
    scenario("director on a full disk", |lab| {
        let site = site(lab, &["bob"])?;
        let host = lab.host("relay")?;
        site.lan.plug(&host, &["10.1.0.5/24"])?;
        let state: PathBuf = host.directory().join("director/state");
        let disk = Disk::memory(&state, ROOM)?;
        let mut director =
            Director::serve(&host, &site.registrar, "[advertise]\nendpoints = [\"10.1.0.5:7501\"]")?;
        director.wait_attached(2)?;
        disk.fill()?;
        director.kill();
        director.run()?;
        director.wait_attached(2)?;
        disk.clear()?;
        // Not stopped: it would wait until the agents have gone elsewhere.
        director.kill();
        disk.remount("ro")?;
        director.run()?;
        director.wait_attached(2)?;
        reaches(site.peers.first().map_or(site.alice.host(), |bob| bob.host()), "alice")?;
        director.kill();
        disk.remount("rw")
    });
}
