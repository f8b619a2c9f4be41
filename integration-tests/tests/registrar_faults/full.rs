//! The registrar's disk is full: it goes on with what needs no room, and writes again as soon as there is some.

use muster_integration_tests::{expect, muster::Agent, process::wait_for, scenario};
use tonic::Code;

use crate::{
    disk::{Disk, PATIENCE},
    served::{Served, data},
};

#[test]
fn a_registrar_whose_disk_is_full_goes_on_and_recovers() {
    scenario("full disk", |lab| {
        let lan = lab.switch("lan")?;
        let (hq, alice, bob) = (lab.host("hq")?, lab.host("alice")?, lab.host("bob")?);
        for (host, address) in [(&hq, "10.1.0.1/24"), (&alice, "10.1.0.10/24"), (&bob, "10.1.0.20/24")] {
            lan.plug(host, &[address])?;
        }
        let disk = Disk::memory(&data(&hq), 2048)?;
        let mut served = Served::start(&hq)?;
        let mut agents = [Agent::new(&alice, "")?, Agent::new(&bob, "")?];
        for agent in &mut agents {
            agent.join(&served.registrar.new_join_command(&[])?, agent.host().name())?;
            agent.run()?;
        }
        served.writes()?;
        served.shows(None)?;
        let process = served.process()?;

        disk.fill()?;
        served.refuses(Code::ResourceExhausted, &["is full", "free or add space"])?;
        served.shows(Some(("full", "is full")))?;
        served.reads(&["alice", "bob"])?;
        served.sound()?;
        // Names that no agent has asked for yet, and sessions of agents that come again.
        let reaches = |from: &Agent, name: &str| {
            wait_for(&format!("{name} to be reached"), PATIENCE, || {
                from.host().sh(&format!("ping -c 1 -W 1 {name}.net.example")).map_err(|e| e.to_string())
            })
        };
        let [alice, bob] = &mut agents;
        reaches(alice, "bob")?;
        bob.stop()?;
        bob.run()?;
        reaches(bob, "alice")?;
        served.refuses(Code::ResourceExhausted, &["is full"])?;

        disk.clear()?;
        // By itself, before anybody writes.
        served.shows(None)?;
        served.writes()?;
        served.holds()?;
        expect(served.process()? == process, "it is the same process", "")?;
        served.restarts()?;

        // Started while there is no room, it serves all the same.
        served.registrar.kill();
        disk.fill()?;
        served.registrar.serve()?;
        served.shows(Some(("full", "is full")))?;
        served.reads(&["alice", "bob"])?;
        served.holds()?;
        disk.clear()?;
        served.shows(None)?;
        served.writes()?;
        served.restarts()
    });
}
