//! Agents spread over registrars that come, and go to the others when one leaves.

use std::time::Duration;

use muster_integration_tests::{
    Result, expect,
    muster::Registrar,
    process::{self, wait_for},
    run_on,
    swarm::Swarm,
};

use crate::site::{PATIENCE, REGISTRARS, with_site};

const AGENTS: usize = 120;
/// A registrar looks once a minute, and agents take half of one to go.
const BALANCED: Duration = Duration::from_secs(200);

/// Open sessions at a registrar, as it counts them itself.
fn sessions(registrar: &Registrar) -> Result<usize, String> {
    let text = registrar.metrics().map_err(|e| e.to_string())?;
    let line = text.lines().find_map(|line| line.strip_prefix("muster_registrar_sessions "));
    line.and_then(|number| number.trim().parse().ok()).ok_or(text)
}

#[test]
fn agents_move_to_a_registrar_that_comes_and_back_when_it_goes() {
    with_site("balance", |site| {
        let join = site.first.new_join_command(&["--reusable"])?;
        let runtime = site.core.runtime()?;
        let swarm = run_on(&runtime, async move {
            let mut swarm = Swarm::start(&join, AGENTS);
            swarm.all_connected().await?;
            Ok(swarm)
        })?;
        let mut second = Registrar::empty(&site.hosts[1])?;
        process::check(second.join_deployment(&site.first.invite()?, REGISTRARS[1])?)?;
        second.serve()?;
        wait_for("half of the agents to be at each", BALANCED, || {
            let both = [sessions(&site.first)?, sessions(&second)?];
            let is_even = both.iter().all(|count| count.abs_diff(AGENTS / 2) <= 16);
            if is_even && both.iter().sum::<usize>() == AGENTS { Ok(()) } else { Err(format!("{both:?}")) }
        })?;
        let shown = site.first.muster(&["get", "registrars"])?;
        expect(shown.matches("Running").count() == 2, "operators see both", &shown)?;
        expect(REGISTRARS[..2].iter().all(|at| shown.contains(&format!("{at}:7500"))), "and where", &shown)?;

        second.stop()?;
        wait_for("all agents to be at the first", PATIENCE, || {
            let count = sessions(&site.first)?;
            if count == AGENTS { Ok(()) } else { Err(count.to_string()) }
        })?;
        let shown = site.first.muster(&["get", "registrars"])?;
        expect(shown.contains("Away"), "operators see that it is away", &shown)?;
        drop(swarm);
        runtime.shutdown_background();
        Ok(())
    });
}
