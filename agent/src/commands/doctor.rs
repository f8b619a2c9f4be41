//! `muster-agent doctor`.

use clap::Args;
use muster_proto::agent::GetStatusRequest;

use super::{Output, client, print, print_json};
use crate::{
    config::Config,
    doctor::{self, Check, Fixed, Outcome},
    host_dns::Paths,
};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  muster-agent doctor
  muster-agent doctor --fix

Exit codes: 0 all is well (there may be warnings), 1 something is wrong, 2 wrong usage.")]
pub(super) struct Arguments {
    /// First undo what an agent that was killed has left in this host's DNS; does nothing while an agent runs
    #[arg(long)]
    fix: bool,
    /// Undo, check nothing, and print nothing unless that fails
    #[arg(long, requires = "fix")]
    quiet: bool,
}

pub(super) async fn doctor(config: &Config, arguments: Arguments, output: Output) -> anyhow::Result<()> {
    let paths = Paths::new(&config.state_dir);
    let fixed = arguments.fix.then(|| doctor::fix(config, &paths)).transpose()?;
    if arguments.quiet {
        return Ok(());
    }
    let status = match client::connect(&config.socket).await {
        Ok(mut agent) => match agent.get_status(GetStatusRequest {}).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(client::refused(&status).to_string()),
        },
        Err(error) => Err(error.to_string()),
    };
    let checks = doctor::examine(config, &paths, &status).await;
    match output {
        Output::Json => {
            print_json(&serde_json::json!({ "fixed": fixed == Some(Fixed::Undone), "checks": checks }))?;
        }
        Output::Text => print(&table(fixed, &checks))?,
    }
    let wrong = checks.iter().filter(|check| check.outcome == Outcome::Fail).count();
    anyhow::ensure!(wrong == 0, "{wrong} of {} checks failed", checks.len());
    Ok(())
}

fn table(fixed: Option<Fixed>, checks: &[Check]) -> String {
    let mut text = match fixed {
        None => "",
        Some(Fixed::Undone) => "This host's DNS is as it was before the agent ran.\n",
        Some(Fixed::Nothing) => "There is nothing to undo.\n",
        Some(Fixed::AgentRuns) => "The agent runs: what it has changed stays until it stops.\n",
    }
    .to_owned();
    for check in checks {
        let outcome = match check.outcome {
            Outcome::Ok => "ok",
            Outcome::Warn => "warn",
            Outcome::Fail => "FAIL",
        };
        text.push_str(&format!("{outcome:<5} {:<12} {}\n", check.name, check.message));
        if !check.remedy.is_empty() {
            text.push_str(&format!("{:<18} remedy: {}\n", "", check.remedy));
        }
    }
    text
}
