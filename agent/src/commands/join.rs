//! `muster-agent join`.

use std::path::Path;

use clap::Args;
use muster_common::tls::SpkiHash;
use muster_enrollment::{Identity as _, Join};
use serde::Serialize;

use super::{Output, print, print_json};
use crate::{config::Config, renewal, state::State};

#[derive(Args)]
#[command(after_help = "Example:
  muster-agent join --registrar registrar.example:7500 --token muster.a1b2c3.… --ca-hash sha256:…

The whole command, with token and hash, is printed by `muster create token`.")]
pub(super) struct Arguments {
    /// Address of a registrar
    #[arg(long, value_name = "HOST:PORT", allow_hyphen_values = true)]
    registrar: String,
    /// Join token, as `muster create token` printed it
    #[arg(long, env = "MUSTER_TOKEN", hide_env_values = true, allow_hyphen_values = true)]
    token: String,
    /// Hash of the CA's public key: sha256: and 64 hexadecimal digits
    #[arg(long, value_name = "HASH", allow_hyphen_values = true)]
    ca_hash: String,
    /// Name of the device, a DNS label [default: the first label of this host's name]
    #[arg(long, default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    name: String,
}

impl std::fmt::Debug for Arguments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arguments").field("registrar", &self.registrar).field("name", &self.name).finish()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Joined {
    network: String,
    domain: String,
    name: String,
    namespace: String,
    device_uid: String,
    certificate_expiry: String,
    state_dir: String,
}

pub(super) async fn join(
    config: &Config,
    config_path: Option<&Path>,
    arguments: Arguments,
    output: Output,
) -> anyhow::Result<()> {
    let ca_hash: SpkiHash = arguments.ca_hash.parse()?;
    let request =
        Join { registrar: arguments.registrar, token: arguments.token, ca_hash, name: arguments.name };
    let identity = Box::pin(muster_enrollment::join(&State::new(&config.state_dir), &request)).await?;
    let validity = renewal::validity(&identity.key_pair()?)?;
    let joined = Joined {
        network: identity.network.clone(),
        domain: identity.domain.clone(),
        name: identity.name.clone(),
        namespace: identity.namespace.clone(),
        device_uid: identity.device_uid.clone(),
        certificate_expiry: validity.not_after.to_string(),
        state_dir: config.state_dir.display().to_string(),
    };
    if output == Output::Json {
        return print_json(&joined);
    }
    let run = match config_path {
        None => "muster-agent run".to_owned(),
        Some(path) => format!("muster-agent run --config {}", path.display()),
    };
    let Joined { network, domain, name, namespace, certificate_expiry, state_dir, .. } = &joined;
    print(&format!(
        "This host has joined network {network} as {name}.{domain} (namespace {namespace}).\n\
         Its certificate is valid until {certificate_expiry} and renews itself.\n\
         Keys and certificate are in {state_dir}.\n\
         \n\
         Start the agent now:\n  \
           systemctl enable --now muster-agent\n\
         or, in the foreground:\n  {run}\n"
    ))
}
