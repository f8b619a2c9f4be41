//! The command line: `muster-director join|run`.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use muster_common::{
    telemetry,
    tls::{SpkiHash, certificate_validity},
};
use muster_enrollment::{Identity as _, Join};
use serde::Serialize;

use crate::{config::Config, identity::State};

/// What a failed command returns to the shell. (2, for wrong usage, comes from the parser.)
pub const FAILED: u8 = 1;

const EXAMPLES: &str = "Examples:
  muster-director join --registrar registrar.example:7500 --token … --ca-hash sha256:…
  muster-director run
  muster-director --print-config

Exit codes: 0 done, 1 failed, 2 wrong usage.";

/// A director of a Muster network: relays sealed messages between devices that have no direct path.
#[derive(Debug, Parser)]
#[command(name = "muster-director", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// Configuration file [default: /etc/muster/director.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    config: Option<PathBuf>,
    /// Print the configuration in use, every key with its value, and do nothing else
    #[arg(long, global = true, help_heading = "Global options")]
    print_config: bool,
    /// How to print results
    #[arg(short, long, global = true, value_enum, default_value_t, help_heading = "Global options")]
    output: Output,
    #[command(subcommand)]
    command: Option<Command>,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a network: make this host a director of it
    Join(Arguments),
    /// Run the director, until SIGTERM; then devices are sent to another one first
    #[command(after_help = "Example:\n  muster-director run --config /etc/muster/director.toml")]
    Run,
    /// Print the completion script of a shell
    #[command(
        after_help = "Example:\n  muster-director completion bash > /etc/bash_completion.d/muster-director"
    )]
    Completion {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
    /// Write man pages
    #[command(hide = true, after_help = "Example:\n  muster-director man --dir /usr/local/share/man/man1")]
    Man {
        /// Directory to write to; made if it is missing
        #[arg(long)]
        dir: PathBuf,
    },
}

#[derive(Args)]
#[command(after_help = "Example:
  muster-director join --registrar registrar.example:7500 --token muster.a1b2c3.… --ca-hash sha256:…

The whole command, with token and hash, is printed by `muster create token --director`.")]
struct Arguments {
    /// Address of a registrar
    #[arg(long, value_name = "HOST:PORT", allow_hyphen_values = true)]
    registrar: String,
    /// Join token, as `muster create token --director` printed it
    #[arg(long, env = "MUSTER_TOKEN", hide_env_values = true, allow_hyphen_values = true)]
    token: String,
    /// Hash of the CA's public key: sha256: and 64 hexadecimal digits
    #[arg(long, value_name = "HASH", allow_hyphen_values = true)]
    ca_hash: String,
    /// Name of the director, a DNS label [default: the first label of this host's name]
    #[arg(long, default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    name: String,
}

impl std::fmt::Debug for Arguments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arguments").field("registrar", &self.registrar).field("name", &self.name).finish()
    }
}

/// The whole command, for completions and man pages.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Does what the command line says.
///
/// # Errors
/// What could not be done, why, and what to do.
pub async fn main(cli: Cli) -> anyhow::Result<()> {
    // These two are about the command itself, whatever the configuration.
    match cli.command {
        Some(Command::Completion { shell }) => return completion(shell),
        Some(Command::Man { dir }) => return man_pages(&dir),
        _ => {}
    }
    let config = Config::load(cli.config.as_deref())?;
    if cli.print_config {
        return print(&muster_common::config::print(&config));
    }
    match cli.command {
        Some(Command::Run) => {
            telemetry::init_logs(&config.log)?;
            Box::pin(crate::run::run(&config)).await
        }
        Some(Command::Join(arguments)) => {
            // What goes wrong is said in the error; logs are for the director that runs.
            let quiet = telemetry::LogConfig { level: "warn".into(), ..config.log.clone() };
            telemetry::init_logs(&quiet)?;
            Box::pin(join(&config, cli.config.as_deref(), arguments, cli.output)).await
        }
        Some(Command::Completion { .. } | Command::Man { .. }) => Ok(()),
        None => print(&command().render_help().to_string()),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Joined {
    network: String,
    name: String,
    director_uid: String,
    certificate_expiry: String,
    state_dir: String,
}

async fn join(
    config: &Config,
    config_path: Option<&Path>,
    arguments: Arguments,
    output: Output,
) -> anyhow::Result<()> {
    let ca_hash: SpkiHash = arguments.ca_hash.parse()?;
    let request =
        Join { registrar: arguments.registrar, token: arguments.token, ca_hash, name: arguments.name };
    let identity = Box::pin(muster_enrollment::join(&State::new(&config.state_dir), &request)).await?;
    let pair = identity.key_pair()?;
    let own = pair.chain.first().context("there is no certificate")?;
    let (_, expiry) = certificate_validity(own)?;
    let joined = Joined {
        network: identity.network.clone(),
        name: identity.name.clone(),
        director_uid: identity.director_uid.clone(),
        certificate_expiry: expiry.to_string(),
        state_dir: config.state_dir.display().to_string(),
    };
    if output == Output::Json {
        let mut text = serde_json::to_string_pretty(&joined).context("cannot print as JSON")?;
        text.push('\n');
        return print(&text);
    }
    let run = match config_path {
        None => "muster-director run".to_owned(),
        Some(path) => format!("muster-director run --config {}", path.display()),
    };
    let Joined { network, name, certificate_expiry, state_dir, .. } = &joined;
    print(&format!(
        "This host has joined network {network} as director {name}.\n\
         Its certificate is valid until {certificate_expiry} and renews itself.\n\
         Key and certificate are in {state_dir}.\n\
         \n\
         Devices reach it at port {port}, over UDP and TCP: open both in the firewall.\n\
         Start the director now:\n  \
           systemctl enable --now muster-director\n\
         or, in the foreground:\n  {run}\n",
        port = config.port()
    ))
}

fn completion(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "muster-director", &mut script);
    print(&String::from_utf8_lossy(&script))
}

fn man_pages(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(command(), directory))
        .with_context(|| format!("cannot write man pages to {}", directory.display()))
}

/// Prints `text`. A reader that has gone, as `head` does, is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("cannot print"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound_and_every_command_has_an_example() {
        let command = command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", sub.get_name());
            assert!(sub.get_about().is_some(), "{}", sub.get_name());
        }
    }

    #[test]
    fn completions_and_man_pages_need_no_configuration() {
        let directory = tempfile::tempdir().unwrap();
        man_pages(&directory.path().join("man1")).unwrap();
        let page = std::fs::read_to_string(directory.path().join("man1/muster-director-join.1")).unwrap();
        assert!(page.contains("ca\\-hash"), "{page}");
    }

    #[test]
    fn a_token_is_never_printed() {
        let line =
            ["muster-director", "join", "--registrar", "r:1", "--token", "secret", "--ca-hash", "sha256:0"];
        let cli = Cli::try_parse_from(line).unwrap();
        assert!(!format!("{cli:?}").contains("secret"));
        assert_eq!(Cli::try_parse_from(["muster-director", "join"]).unwrap_err().exit_code(), 2);
    }
}
