//! The `muster-registrar` command.
#![forbid(unsafe_code)]

mod commands;

use std::{
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use muster_common::{
    config as toml_config,
    credential::SYSTEM_PATH,
    grpc,
    name::{Domain, Label},
    telemetry,
    time::Timestamp,
};
use muster_registrar::{
    ca::{
        Ca,
        rotation::{self, Phase},
    },
    config::{Config, DEFAULT_PATH, Period},
    init::{self, Options},
    invite, join, leave, own_certificate, serve,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXAMPLES: &str = "Examples:
  muster-registrar init --domain net.example --public-address 198.51.100.10
  muster-registrar serve
  muster-registrar ca status
  muster-registrar backup --output /backup/muster-$(date +%F)
  muster-registrar invite          # prints the command that makes another host a registrar, too

Exit codes: 0 done, 1 failed, 2 wrong usage.";

const INIT_EXAMPLES: &str = "Examples:
  muster-registrar init
  muster-registrar init --config /srv/muster/registrar.toml --domain net.example \\
      --public-address 198.51.100.10 --credential ~/.config/muster/operator.toml

Set data_dir in the configuration file, or MUSTER_DATA_DIR in the environment, to keep the CA and the store
elsewhere than in /var/lib/muster/registrar.";

const ROTATE_EXAMPLES: &str = "Examples:
  muster-registrar ca rotate prepare     # everybody is told to trust the next root as well
  muster-registrar ca rotate activate    # the next root issues; at once, or some hours later
  muster-registrar ca rotate retire      # a certificate lifetime later: the old root is no longer trusted

The running registrar takes each step up within 30 seconds, or at once with SIGHUP (systemctl reload). Devices stay
connected throughout. With several registrars, take each step on one of them, whichever: the others take it within
another 30 seconds, through the store. One that was away follows when it is back, if that is within a day of `retire`.";

const INVITE_EXAMPLES: &str = "Examples:
  muster-registrar invite
  muster-registrar invite --ttl 10m -o json

On the host of a registrar that runs, as root. What the new registrar needs (the CA's files and key, this configuration,
the files with which etcd is reached) is put into the store, sealed with a key that is in the printed command alone.";

const JOIN_EXAMPLES: &str = "Example:
  muster-registrar join --registrar registrar.example:7500 --token a1b2c3d4e5.… --ca-hash sha256:…

The whole command, with token and hash, is printed by `muster-registrar invite` on the host of a registrar that runs.";

const LEAVE_EXAMPLES: &str = "Example:
  systemctl disable --now muster-registrar && muster-registrar leave

The registrar on this host must have been stopped. The registry stays as it is, and the other registrars go on. Removed are
the CA's files and key, the registrar's certificate, and the files with which etcd is reached that `join` has made; the
configuration file is renamed.";

/// The registrar of a Muster network: CA, registry, addresses, DNS and API.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct ConfigArg {
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Make a deployment: CA, store, first network, operator's credential. Prints the command that joins a device.
    #[command(after_help = INIT_EXAMPLES)]
    Init {
        #[command(flatten)]
        config: ConfigArg,
        /// Domain of the first network.
        #[arg(long, value_name = "DOMAIN", default_value = "muster.internal")]
        domain: Domain,
        /// Address that agents reach this host at; may be given twice, for IPv4 and IPv6. Default: this host's
        /// address of its default route.
        #[arg(long, value_name = "ADDRESS")]
        public_address: Vec<IpAddr>,
        /// Name of the first network.
        #[arg(long, value_name = "NAME", default_value = "default")]
        network: Label,
        /// Where to put the operator's credential.
        #[arg(long, value_name = "FILE", default_value = SYSTEM_PATH)]
        credential: PathBuf,
    },
    /// Run the registrar.
    #[command(after_help = "Example:\n  muster-registrar serve --config /etc/muster/registrar.toml")]
    Serve {
        #[command(flatten)]
        config: ConfigArg,
        /// Print the whole configuration, with file and environment applied, and exit.
        #[arg(long)]
        print_config: bool,
    },
    /// Let another host become a registrar of this deployment. Prints the command that it runs.
    #[command(after_help = INVITE_EXAMPLES)]
    Invite {
        #[command(flatten)]
        config: ConfigArg,
        /// How long the command is good for, up to 24h.
        #[arg(long, value_name = "TIME", default_value = "1h")]
        ttl: Period,
        /// How to print it.
        #[arg(long, short, value_enum, value_name = "FORMAT", default_value = "text")]
        output: Output,
    },
    /// Make this host a further registrar of a deployment, by an invitation.
    #[command(after_help = JOIN_EXAMPLES)]
    Join(JoinArgs),
    /// Make this host a registrar no more.
    #[command(after_help = LEAVE_EXAMPLES)]
    Leave {
        #[command(flatten)]
        config: ConfigArg,
        /// Leave even if the store cannot be told, or if nobody else is known to have the CA's key.
        #[arg(long)]
        force: bool,
    },
    /// Look at the CA, or replace its root.
    #[command(
        subcommand,
        after_help = "Examples:\n  muster-registrar ca status\n  muster-registrar ca rotate prepare"
    )]
    Ca(CaCommand),
    /// Write the store, as it is at one moment, and the CA into one file, while the registrar runs; or check such a file.
    Backup(commands::BackupArgs),
    /// Put a backup into an empty store.
    Restore(commands::RestoreArgs),
    /// Move the deployment from one kind of store to the other.
    Migrate(commands::MigrateArgs),
    /// Make a credential for an operator, on the registrar's host.
    #[command(after_help = "Example:\n  muster-registrar credential --name alice --output alice.toml")]
    Credential {
        #[command(flatten)]
        config: ConfigArg,
        /// The operator's name.
        #[arg(long, value_name = "NAME", default_value = init::OPERATOR)]
        name: Label,
        /// The network that the operator's commands are about unless told otherwise.
        #[arg(long, value_name = "NAME", default_value = "default")]
        network: Label,
        /// The file to write; what is there is replaced.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Print the completion script of a shell.
    #[command(
        after_help = "Example:\n  muster-registrar completion bash > /etc/bash_completion.d/muster-registrar"
    )]
    Completion {
        /// bash, zsh, fish, elvish or powershell.
        shell: clap_complete::Shell,
    },
    /// Write man pages.
    #[command(hide = true, after_help = "Example:\n  muster-registrar man --dir /usr/local/share/man/man1")]
    Man {
        /// Directory to write to; made if it is missing.
        #[arg(long)]
        dir: PathBuf,
    },
}

#[derive(Args)]
struct JoinArgs {
    /// Address of a registrar that runs.
    #[arg(long, value_name = "HOST:PORT")]
    registrar: String,
    /// The invitation's token, as `muster-registrar invite` printed it.
    #[arg(long, env = "MUSTER_TOKEN", hide_env_values = true, value_name = "ID.SECRET")]
    token: String,
    /// Hash of the CA's public key: sha256: and 64 hexadecimal digits.
    #[arg(long, value_name = "HASH")]
    ca_hash: String,
    /// The configuration file to write; one that sets nothing is replaced.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Where to keep the CA. Default: as of a registrar without configuration.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address that agents reach this host at; may be given twice, for IPv4 and IPv6. Default: this host's address of
    /// its default route.
    #[arg(long, value_name = "ADDRESS")]
    address: Vec<IpAddr>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Subcommand)]
enum CaCommand {
    /// Tell which root issues, which are trusted, and what the next step of a rotation is.
    #[command(after_help = "Example:\n  muster-registrar ca status")]
    Status {
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Take a step of replacing the root.
    #[command(after_help = ROTATE_EXAMPLES)]
    Rotate {
        #[command(flatten)]
        config: ConfigArg,
        /// The step; without one, the next step that can be taken.
        #[arg(value_enum)]
        step: Option<Step>,
        /// Retire although certificates by the old root may still be in use.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Step {
    Prepare,
    Activate,
    Retire,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is to be done if even this fails.
            let _ = writeln!(std::io::stderr(), "muster-registrar: {}", grpc::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Init { config, domain, public_address, network, credential } => {
            let options = Options {
                config: config.config,
                domain,
                public_addresses: public_address,
                network,
                credential,
            };
            let report = runtime()?.block_on(init::init(options, Timestamp::now()))?;
            print(&report.to_string())
        }
        Command::Serve { config, print_config } => {
            let config = load(&config.config)?;
            if print_config {
                return print(&toml_config::print(&config));
            }
            telemetry::init_logs(&config.log)?;
            Ok(runtime()?.block_on(serve::serve(config))?)
        }
        Command::Invite { config, ttl, output } => {
            let config = load(&config.config)?;
            let invited = runtime()?.block_on(invite::invite(&config, ttl.get(), Timestamp::now()))?;
            match output {
                Output::Text => print(&invited.to_string()),
                Output::Json => print(&format!("{}\n", serde_json::to_string_pretty(&invited)?)),
            }
        }
        Command::Join(arguments) => {
            let options = join::Options {
                registrar: arguments.registrar,
                token: arguments.token.parse()?,
                ca_hash: arguments.ca_hash.parse()?,
                config: arguments.config,
                data_dir: arguments.data_dir,
                addresses: arguments.address,
            };
            let report = runtime()?.block_on(join::join(options, Timestamp::now()))?;
            print(&report.to_string())
        }
        Command::Leave { config, force } => {
            let loaded = load(&config.config)?;
            if !force {
                let seconds = leave::SETTLED.as_secs();
                // Nothing is to be done if this fails.
                let _ =
                    writeln!(std::io::stderr(), "Looking for {seconds} s whether another registrar runs …");
            }
            let left = leave::leave(&config.config, &loaded, force, Timestamp::now());
            print(&runtime()?.block_on(left)?.to_string())
        }
        Command::Ca(CaCommand::Status { config }) => {
            print(&status(&rotation::phase(&load(&config.config)?.data_dir)?))
        }
        Command::Ca(CaCommand::Rotate { config, step, force }) => rotate(&load(&config.config)?, step, force),
        Command::Backup(arguments) => print(&arguments.run()?),
        Command::Restore(arguments) => print(&arguments.run()?),
        Command::Migrate(arguments) => print(&arguments.run()?),
        Command::Credential { config, name, network, output } => {
            let mut config = load(&config.config)?;
            let ca = Ca::load(&config.data_dir)?;
            if config.advertise.registrars.is_empty() {
                let address = init::default_address().context(
                    "cannot find out this host's address; set advertise.registrars in the configuration",
                )?;
                init::advertise(&mut config, &[address]);
            }
            let registrar = config.advertise.registrars.first().map_or("", String::as_str);
            let credential = init::operator_credential(
                &ca,
                &trust_domain(&config)?,
                &name,
                config.certificates.operator_lifetime.get(),
                registrar,
                network.as_str(),
                Timestamp::now(),
            )?;
            credential.save(&output)?;
            print(&format!("{} is a credential of operator {name}; keep it private.\n", output.display()))
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "muster-registrar", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Command::Man { dir } => std::fs::create_dir_all(&dir)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &dir))
            .with_context(|| format!("cannot write man pages to {}", dir.display())),
    }
}

fn rotate(config: &Config, step: Option<Step>, force: bool) -> anyhow::Result<()> {
    let (directory, now) = (&config.data_dir, Timestamp::now());
    let step = match (step, rotation::phase(directory)?) {
        (Some(step), _) => step,
        (None, Phase::Settled) => Step::Prepare,
        (None, Phase::Prepared { .. }) => Step::Activate,
        (None, Phase::Activated { .. }) => Step::Retire,
    };
    match step {
        Step::Prepare => drop(rotation::prepare(directory, &trust_domain(config)?, now)?),
        Step::Activate => drop(rotation::activate(directory)?),
        Step::Retire => {
            rotation::retire(directory, config.certificates.device_lifetime.get(), now, force)?;
        }
    }
    print(&status(&rotation::phase(directory)?))
}

fn status(phase: &Phase) -> String {
    match phase {
        Phase::Settled => {
            "One root issues and is trusted. To replace it: muster-registrar ca rotate prepare\n".into()
        }
        Phase::Prepared { next } => format!(
            "The next root, {next}, is trusted but does not issue yet. Next step: muster-registrar ca rotate activate\n"
        ),
        Phase::Activated { since, old } => {
            let old: Vec<String> = old.iter().map(ToString::to_string).collect();
            format!(
                "A new root issues since {since}. Still trusted: {}.\n\
                 Operators need new credentials before the old root is retired: muster-registrar credential\n\
                 Next step, once all devices have renewed: muster-registrar ca rotate retire\n",
                old.join(", ")
            )
        }
    }
}

fn load(path: &Path) -> anyhow::Result<Config> {
    let config: Config = toml_config::load(Some(path))?;
    config.check()?;
    Ok(config)
}

/// The deployment's trust domain, without the store, which a running registrar keeps to itself.
fn trust_domain(config: &Config) -> anyhow::Result<String> {
    let own = own_certificate::load(&config.data_dir.join(own_certificate::FILE))?;
    Ok(own.identity()?.trust_domain)
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to standard output")
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_help_with_an_example() {
        fn check(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", command.get_name());
            assert!(command.get_about().is_some(), "{}", command.get_name());
            command.get_subcommands().for_each(check);
        }
        Cli::command().debug_assert();
        check(&Cli::command());
    }
}
