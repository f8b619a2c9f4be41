//! The command line: `muster-agent join|run|status|ping|netcheck|resolve|env|doctor|leave`.

mod client;
mod doctor;
mod env;
mod join;
mod leave;
mod netcheck;
mod ping;
mod resolve;
mod status;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use muster_common::telemetry;

use crate::config::Config;

/// What a failed command returns to the shell. (2, for wrong usage, comes from the parser.)
pub const FAILED: u8 = 1;

const EXAMPLES: &str = "Examples:
  muster-agent join --registrar registrar.example:7500 --token … --ca-hash sha256:…
  muster-agent run
  muster-agent status
  muster-agent ping bob

Exit codes: 0 done, 1 failed, 2 wrong usage.";

/// The agent of a Muster network: gives this host a virtual address, and reaches other devices by name.
#[derive(Debug, Parser)]
#[command(name = "muster-agent", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// Configuration file [default: /etc/muster/agent.toml, if it exists]
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
pub enum Output {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a network: make this host a device of it
    Join(join::Arguments),
    /// Run the agent, until SIGTERM
    #[command(after_help = "Example:\n  muster-agent run --config /etc/muster/agent.toml")]
    Run,
    /// Show what the running agent is and does
    Status(status::Arguments),
    /// Measure round trips to a device, and show the path to it
    Ping(ping::Arguments),
    /// Show what lies between this host and the internet: NAT, port mapping, UDP, IPv6, and the way to each director
    Netcheck(netcheck::Arguments),
    /// Resolve a name as programs on this host see it, with a device's private addresses and route director
    Resolve(resolve::Arguments),
    /// Print the Services of a namespace as environment variables, as Kubernetes sets them
    Env(env::Arguments),
    /// Check what the agent needs of this host; undo what an agent that was killed has left
    Doctor(doctor::Arguments),
    /// Leave the network: give name and addresses back, and take everything off this host
    Leave(leave::Arguments),
    /// Print the completion script of a shell
    #[command(after_help = "Example:\n  muster-agent completion bash > /etc/bash_completion.d/muster-agent")]
    Completion {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
    /// Write man pages
    #[command(hide = true, after_help = "Example:\n  muster-agent man --dir /usr/local/share/man/man1")]
    Man {
        /// Directory to write to; made if it is missing
        #[arg(long)]
        dir: PathBuf,
    },
}

/// The whole command, for completions and man pages.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Does what the command line says.
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
        None => {
            let help = Cli::command().render_help();
            print(&help.to_string())
        }
        Some(Command::Run) => {
            telemetry::init_logs(&config.log)?;
            Box::pin(crate::run::run(&config)).await
        }
        Some(command) => {
            // What goes wrong is said in the error; logs are for the agent that runs.
            let quiet = telemetry::LogConfig { level: "warn".into(), ..config.log.clone() };
            telemetry::init_logs(&quiet)?;
            match command {
                Command::Join(arguments) => {
                    join::join(&config, cli.config.as_deref(), arguments, cli.output).await
                }
                Command::Status(arguments) => status::status(&config, arguments, cli.output).await,
                Command::Ping(arguments) => ping::ping(&config, arguments, cli.output).await,
                Command::Netcheck(arguments) => netcheck::netcheck(&config, arguments, cli.output).await,
                Command::Resolve(arguments) => resolve::resolve(&config, arguments, cli.output).await,
                Command::Env(arguments) => env::env(&config, arguments, cli.output).await,
                Command::Doctor(arguments) => doctor::doctor(&config, arguments, cli.output).await,
                Command::Leave(arguments) => leave::leave(&config, arguments, cli.output).await,
                Command::Run | Command::Completion { .. } | Command::Man { .. } => Ok(()),
            }
        }
    }
}

fn completion(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "muster-agent", &mut script);
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

/// Prints `value` as JSON.
fn print_json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value).context("cannot print as JSON")?;
    text.push('\n');
    print(&text)
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
        }
    }

    #[test]
    fn completions_and_man_pages_need_no_configuration() {
        let directory = tempfile::tempdir().unwrap();
        man_pages(&directory.path().join("man1")).unwrap();
        let page = std::fs::read_to_string(directory.path().join("man1/muster-agent-join.1")).unwrap();
        assert!(page.contains("ca\\-hash"), "{page}");
        assert!(Cli::try_parse_from(["muster-agent", "completion", "bash"]).is_ok());
        assert_eq!(Cli::try_parse_from(["muster-agent", "completion", "tcsh"]).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn global_options_may_stand_anywhere() {
        for line in [
            ["muster-agent", "--config", "f", "status", "-o", "json"],
            ["muster-agent", "status", "-o", "json", "--config", "f"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!((cli.output, cli.config), (Output::Json, Some("f".into())));
        }
        assert_eq!(Cli::try_parse_from(["muster-agent", "statsu"]).unwrap_err().exit_code(), 2);
        assert_eq!(Cli::try_parse_from(["muster-agent", "join"]).unwrap_err().exit_code(), 2);
    }
}
