//! `muster-agent leave`: through the agent, or without it if it does not run.

use clap::Args;
use muster_proto::agent::{LeaveRequest, LeaveResponse};

use super::{
    Output,
    client::{self, ClientError},
    print, print_json,
};
use crate::{
    config::Config,
    host_dns, interface, run,
    session::{self, DeregisterError},
    state::State,
};

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  muster-agent leave")]
pub(super) struct Arguments {
    /// Leave even if no registrar can be told; the operator then deletes the device
    #[arg(long)]
    force: bool,
}

pub(super) async fn leave(config: &Config, arguments: Arguments, output: Output) -> anyhow::Result<()> {
    let left = match client::connect(&config.socket).await {
        Ok(mut agent) => {
            let answer = agent.leave(LeaveRequest { force: arguments.force }).await;
            answer.map_err(|status| client::refused(&status))?.into_inner()
        }
        Err(ClientError::NotRunning(_)) => Box::pin(without_agent(config, arguments.force)).await?,
        Err(error) => return Err(error.into()),
    };
    if output == Output::Json {
        return print_json(&left);
    }
    print(if left.deregistered {
        "This host has left the network. Its name and addresses are free again.\n"
    } else {
        "This host has left the network, but no registrar knows: ask the operator to delete the device (muster delete device).\n"
    })
}

async fn without_agent(config: &Config, force: bool) -> anyhow::Result<LeaveResponse> {
    let state = State::new(&config.state_dir);
    let deregistered = match state.identity() {
        Ok(identity) => {
            let _lock = state.lock()?;
            let (_, tls, _) = run::credentials(&identity)?;
            let known = state.config().map(|config| config.registrars).unwrap_or_default();
            let registrars: Vec<String> = known.into_iter().chain([identity.registrar.clone()]).collect();
            session::deregister(None, &registrars, &tls).await
        }
        // With --force, an identity that cannot be read is no reason to keep it.
        Err(error @ crate::state::StateError::Identity { .. }) if force => {
            Err(DeregisterError::Unavailable(error.to_string()))
        }
        Err(error) => return Err(error.into()),
    };
    let deregistered = match deregistered {
        Ok(()) => true,
        Err(error) if force => {
            tracing::warn!(%error, "leaving although the registrar could not be told");
            false
        }
        Err(error) => anyhow::bail!(
            "cannot leave: {error}\nremedy: try again later, or leave all the same with --force; the operator then deletes the device"
        ),
    };
    if let Err(error) = host_dns::Paths::new(&config.state_dir).file().restore() {
        tracing::warn!(%error, "cannot undo what an agent may have left in resolv.conf");
    }
    state.remove()?;
    // Without the right to it there is nothing of ours to sweep either: only root runs agents.
    if let Err(error) = interface::sweep().await {
        tracing::warn!(%error, "cannot remove what an agent may have left on this host's interfaces");
    }
    Ok(LeaveResponse { deregistered })
}
