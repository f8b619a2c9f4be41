//! The root is replaced on one registrar alone, and all others follow: those that run, and one that was away meanwhile.

use muster_integration_tests::{
    Result, expect,
    muster::{Agent, Registrar},
    process::wait_for,
};
use rustix::process::Signal;

use crate::site::{PATIENCE, REGISTRARS, wait_connected, with_site};

/// What `ca status` says on the host of `registrar`.
fn status(registrar: &Registrar) -> Result<String, String> {
    registrar.ask(&["ca", "status"]).map_err(|error| error.to_string())
}

fn wait_status(registrar: &Registrar, what: &str, says: &str) -> Result {
    wait_for(what, PATIENCE, || {
        let said = status(registrar)?;
        if said.contains(says) { Ok(()) } else { Err(said) }
    })
}

/// The root that issues on the host of `registrar`.
fn root(registrar: &Registrar) -> Result<String> {
    let key = registrar.data().join("ca.key");
    registrar.host().sh(&format!("openssl pkey -in {} -pubout -outform DER | sha256sum", key.display()))
}

fn step(first: &mut Registrar, step: &[&str]) -> Result {
    first.ask(&[&["ca", "rotate"], step].concat())?;
    match first.process() {
        Some(process) => process.signal(Signal::HUP),
        None => Ok(()),
    }
}

/// Whether the agent has had one session since it was started.
fn one_session(agent: &mut Agent) -> Result {
    let log = agent.process().map(|process| process.log()).unwrap_or_default();
    expect(log.matches("connected registrar=").count() == 1, "one session throughout", &log)
}

#[test]
fn a_rotation_on_one_registrar_reaches_all_while_agents_stay_connected() {
    with_site("a rotation reaches all registrars", |site| {
        let mut second = Registrar::invited(&site.first, &site.hosts[1], REGISTRARS[1])?;
        second.serve()?;
        // It has joined, and does not run until all is over.
        let mut away = Registrar::invited(&site.first, &site.hosts[2], REGISTRARS[2])?;
        let old = root(&site.first)?;
        let join = site.first.new_join_command(&["--reusable"])?;
        let mut agent = site.agent("alice", REGISTRARS[1], 20, &join)?;
        agent.run()?;
        wait_connected(&agent)?;

        step(&mut site.first, &["prepare"])?;
        wait_status(&second, "the second registrar to have the next root", "does not issue yet")?;
        step(&mut site.first, &["activate"])?;
        wait_status(&second, "the second registrar to issue by the new root", "A new root issues")?;
        let new = root(&site.first)?;
        expect(new != old && root(&second)? == new, "the same root on both", &new)?;
        one_session(&mut agent)?;

        // By the second registrar's new root, with a command from before.
        let mut bob = site.agent("bob", REGISTRARS[1], 21, &join)?;
        bob.run()?;
        wait_connected(&bob)?;

        // As operators do before the old root retires.
        let credential = site.first.credential().display().to_string();
        site.first.ask(&["credential", "--output", &credential])?;
        step(&mut site.first, &["retire", "--force"])?;
        wait_status(&second, "the second registrar to have retired the old root", "One root issues")?;
        wait_connected(&agent)?;
        one_session(&mut agent)?;
        bob.stop()?;
        bob.run()?;
        wait_connected(&bob)?;

        expect(root(&away)? == old, "one that is away has the old root", "")?;
        away.serve()?;
        expect(status(&away).is_ok_and(|said| said.contains("One root issues")), "it has followed", "")?;
        expect(root(&away)? == new, "to the new root", &root(&away)?)?;
        let join = site.first.new_join_command(&[])?;
        site.agent("carol", REGISTRARS[2], 22, &join).map(drop)
    });
}
