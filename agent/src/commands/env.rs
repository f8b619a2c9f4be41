//! `muster-agent env`.

use clap::Args;
use muster_proto::agent::ListServicesRequest;

use super::{Output, client, print, print_json};
use crate::{config::Config, env};

/// The agent's answer may be as long as this.
const ANSWER_MAX: usize = 64 << 20;

const EXAMPLES: &str = "Examples:
  muster-agent env
  muster-agent env --namespace shop > /run/shop.env    # for a unit's EnvironmentFile=
  set -a; . <(muster-agent env); set +a                # in bash
  export $(muster-agent env)                           # in any shell, if there is any Service";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Namespace of the Services [default: this device's own]
    #[arg(short, long, default_value = "", hide_default_value = true)]
    namespace: String,
}

pub(super) async fn env(config: &Config, arguments: Arguments, output: Output) -> anyhow::Result<()> {
    let mut agent = client::connect(&config.socket).await?.max_decoding_message_size(ANSWER_MAX);
    let answer = agent.list_services(ListServicesRequest { namespace: arguments.namespace }).await;
    let services = answer.map_err(|status| client::refused(&status))?.into_inner().services;
    let variables = env::variables(&services);
    match output {
        Output::Json => print_json(&variables),
        Output::Text => print(&env::lines(&variables)),
    }
}
