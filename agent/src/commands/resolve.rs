//! `muster-agent resolve`.

use clap::Args;
use muster_proto::agent::ResolveRequest;

use super::{Output, client, ping::to_std, print, print_json};
use crate::config::Config;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  muster-agent resolve bob")]
pub(super) struct Arguments {
    /// Device name, or any DNS name
    name: String,
}

pub(super) async fn resolve(config: &Config, arguments: Arguments, output: Output) -> anyhow::Result<()> {
    let mut agent = client::connect(&config.socket).await?;
    let answer = agent.resolve(ResolveRequest { name: arguments.name }).await;
    let answer = answer.map_err(|status| client::refused(&status))?.into_inner();
    if output == Output::Json {
        return print_json(&answer);
    }
    let mut text = format!("Name      {}\n", answer.name);
    for (title, addresses) in [
        ("Address", &answer.addresses),
        ("Private", &answer.private_addresses),
        ("Director", &answer.director_addresses),
    ] {
        if !addresses.is_empty() {
            text.push_str(&format!("{title:<10}{}\n", addresses.join(", ")));
        }
    }
    let ttl = answer.ttl.as_ref().map(to_std).unwrap_or_default();
    text.push_str(&format!("TTL       {} s\n", ttl.as_secs()));
    print(&text)
}
