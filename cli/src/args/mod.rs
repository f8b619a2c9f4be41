//! The grammar of the command line.

mod approve;
mod create;
pub mod expose;

use std::{path::PathBuf, time::Duration};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser as _},
};

pub use approve::Approve;
pub use create::{
    ClusterIpService, Create, CreateDevice, CreateNamespace, CreateNetwork, CreateService, CreateToken,
    CreateWhat, Director, ExternalNameService, Labels, Making, PortPair, PortService, Ports,
};
pub use expose::Expose;

use crate::duration;

/// Administers Muster networks: devices, join tokens, and the networks themselves.
#[derive(Debug, Parser)]
#[command(name = "muster", version, arg_required_else_help = true, propagate_version = false)]
#[command(after_help = "Examples:
  muster create token --ttl 1h -l role=web     a command that joins one host
  muster get devices -o wide
  muster describe device web
  muster label devices web db zone=a
  muster apply -f network.yaml

Exit codes: 0 done, 1 failed, 2 wrong usage.")]
pub struct Cli {
    /// Options that every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Operator's credential file [default: ~/.config/muster/operator.toml, /etc/muster/operator.toml]
    #[arg(long, global = true, value_name = "FILE", env = "MUSTER_CREDENTIAL")]
    #[arg(value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub credential: Option<PathBuf>,
    /// Registrar to ask, instead of those in the credential file; several with commas between: the first that answers
    #[arg(long, global = true, value_name = "HOST:PORT,…", env = "MUSTER_REGISTRAR")]
    pub registrar: Option<String>,
    /// Network, instead of the one in the credential file
    #[arg(long, global = true, value_name = "NAME", env = "MUSTER_NETWORK")]
    pub network: Option<String>,
    /// Namespace [default: default]
    #[arg(short, long, global = true, value_name = "NAME")]
    pub namespace: Option<String>,
    /// How long the registrar may take over one request
    #[arg(long, global = true, value_name = "TIME", default_value = "30s", value_parser = duration::parse)]
    pub request_timeout: Duration,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show one or several resources
    Get(Get),
    /// Show everything about resources
    Describe(Describe),
    /// Create a resource
    Create(Create),
    /// Create a Service for a device, or for a Service
    Expose(Expose),
    /// Create or change resources as files say
    Apply(Apply),
    /// Delete resources
    Delete(Delete),
    /// Set or remove labels
    #[command(override_usage = "muster label [OPTIONS] TYPE NAME… KEY=VALUE… KEY-…")]
    #[command(after_help = "KEY=VALUE sets, KEY- removes.

Examples:
  muster label device web role=web zone-
  muster label devices -l role=web tier=front --overwrite")]
    Label(Change),
    /// Set or remove annotations
    #[command(override_usage = "muster annotate [OPTIONS] TYPE NAME… KEY=VALUE… KEY-…")]
    #[command(after_help = "KEY=VALUE sets, KEY- removes.

Example:
  muster annotate device web owner='the web team'")]
    Annotate(Change),
    /// Refuse devices, directors or tokens from now on, keeping their record
    Revoke(Revoke),
    /// Have devices leave directors
    #[command(
        after_help = "Devices that have another director leave a drained one, and no new ones come. Nothing is lost on the way.

Example:
  muster drain director d1"
    )]
    Drain(Drain),
    /// Have devices come back to directors
    #[command(after_help = "Example:\n  muster undrain director d1")]
    Undrain(Drain),
    /// Let devices speak for hosts without an agent, and carry subnets
    #[command(
        after_help = "A device asks for what [site] in its agent.toml names, and does none of it before it is approved. What is approved
for several devices one of them carries, and the others stand by.

Examples:
  muster approve device gate                                    what it offers, and how to approve that
  muster approve device gate --hosts                            it may speak for any host it names, now and later
  muster approve devices gate-1 gate-2 --subnet 10.1.0.0/24
  muster approve device gate --all                              all that it offers now"
    )]
    Approve(Approve),
    /// Take back what has been approved
    #[command(
        after_help = "Hosts that nobody speaks for any more keep their names and addresses, and are not reached. Of a subnet, a device that
stands by takes over.

Examples:
  muster disapprove device gate --subnet 10.1.0.0/24
  muster disapprove device gate --all"
    )]
    Disapprove(Approve),
    /// Show changes to resources as they happen
    Watch(Watch),
    /// Show the version of this command and the registrar's health
    Version(Version),
    /// Print the completion script of a shell
    #[command(after_help = "Example:\n  muster completion bash > /etc/bash_completion.d/muster")]
    Completion {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
    /// Write man pages
    #[command(hide = true, after_help = "Example:\n  muster man --dir /usr/local/share/man/man1")]
    Man {
        /// Directory to write to; made if it is missing
        #[arg(long)]
        dir: PathBuf,
    },
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table with more columns
    Wide,
    /// JSON
    Json,
    /// YAML
    Yaml,
    /// TYPE/NAME, a line each
    Name,
}

/// How to print what was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// JSON
    Json,
    /// YAML
    Yaml,
    /// TYPE/NAME, a line each
    Name,
}

/// How to print what was changed.
#[derive(Debug, Args)]
pub struct Printing {
    /// Output format [default: a sentence]
    #[arg(short, long, value_enum)]
    pub output: Option<Format>,
}

/// How far to go without changing anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DryRun {
    /// Do not let the registrar check it
    Client,
    /// Let the registrar check it
    Server,
}

impl DryRun {
    /// `created (server dry run)`
    pub fn says(self, done: &str) -> String {
        match self {
            Self::Client => format!("{done} (dry run)"),
            Self::Server => format!("{done} (server dry run)"),
        }
    }
}

/// How to print tables and objects.
#[derive(Debug, Args)]
pub struct Showing {
    /// Output format [default: a table]
    #[arg(short, long, value_enum)]
    pub output: Option<Output>,
    /// Print a column with the labels
    #[arg(long)]
    pub show_labels: bool,
    /// Print tables without titles
    #[arg(long)]
    pub no_headers: bool,
}

/// Which objects.
#[derive(Debug, Default, Args)]
pub struct Selection {
    /// Label selector, such as role=web,tier in (a,b),!old
    #[arg(short = 'l', long, value_name = "SELECTOR")]
    pub selector: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
}

const TARGETS: &str = "TYPE [NAME…] | TYPE/NAME…";

/// `muster get`
#[derive(Debug, Args)]
#[command(
    after_help = "Resource types: networks (net), devices (dev), directors (dir), tokens, namespaces (ns), services (svc), endpointslices.

Examples:
  muster get devices
  muster get devices -l role=web -o wide
  muster get device web -o yaml
  muster get device/web token/k3v9 -o json
  muster get devices,tokens -A
  muster get directors
  muster get svc -n prod -o wide
  muster get endpointslices -l kubernetes.io/service-name=my-cs
  muster get devices -w"
)]
pub struct Get {
    /// What to show
    #[arg(required = true, value_name = TARGETS)]
    pub targets: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub selection: Selection,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub showing: Showing,
    /// Go on showing changes
    #[arg(short, long)]
    pub watch: bool,
    /// Show changes only, not what is there
    #[arg(long)]
    pub watch_only: bool,
    /// Tell with each change whether it was ADDED, MODIFIED or DELETED
    #[arg(long)]
    pub output_watch_events: bool,
}

/// `muster watch`
#[derive(Debug, Args)]
#[command(after_help = "The same as: muster get TYPE --watch-only --output-watch-events

Example:
  muster watch devices -l role=web")]
pub struct Watch {
    /// What to watch
    #[arg(required = true, value_name = TARGETS)]
    pub targets: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub selection: Selection,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub showing: Showing,
}

/// `muster describe`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  muster describe device web
  muster describe devices -l role=web
  muster describe network/net")]
pub struct Describe {
    /// What to describe
    #[arg(required = true, value_name = TARGETS)]
    pub targets: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub selection: Selection,
}

/// `muster apply`
#[derive(Debug, Args)]
#[command(
    after_help = "What a manifest says is set, and what it leaves out stays as it is; labels are added to those
that are there. Services, EndpointSlices and Namespaces are Kubernetes' own, as they are. Nothing is changed
unless everything can be.

Examples:
  muster apply -f network.yaml
  muster apply -f manifests/
  kubectl get svc my-cs -o yaml | muster apply -f - --dry-run
  muster get device web -o yaml | sed s/role:.*/role:\\ db/ | muster apply -f -"
)]
pub struct Apply {
    /// File with manifests, YAML or JSON; a directory of such files; or - for standard input
    #[arg(short, long, required = true, value_name = "FILE")]
    pub filename: Vec<PathBuf>,
    /// Show what would be done, and change nothing
    #[arg(long, value_enum, value_name = "WHERE", num_args = 0..=1, require_equals = true, default_missing_value = "server")]
    pub dry_run: Option<DryRun>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// `muster delete`
#[derive(Debug, Args)]
#[command(
    after_help = "Deleting a device revokes its certificate, and releases its name and addresses; deleting a director
revokes its certificate, and releases its name.

Examples:
  muster delete device web
  muster delete tokens --all
  muster delete devices -l role=old
  muster delete -f device.yaml"
)]
pub struct Delete {
    /// What to delete
    #[arg(required_unless_present = "filename", conflicts_with = "filename", value_name = TARGETS)]
    pub targets: Vec<String>,
    /// File with manifests of what to delete, a directory, or - for standard input
    #[arg(short, long, value_name = "FILE")]
    pub filename: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub selection: Selection,
    /// Delete all of the type
    #[arg(long, conflicts_with = "selector")]
    pub all: bool,
    /// What does not exist is no error
    #[arg(long)]
    pub ignore_not_found: bool,
    /// Output format [default: a sentence]
    #[arg(short, long, value_parser = ["name"])]
    pub output: Option<String>,
}

/// `muster label`, `muster annotate`
#[derive(Debug, Args)]
pub struct Change {
    /// What to change, then KEY=VALUE to set or KEY- to remove
    #[arg(required = true, value_name = "TYPE NAME… KEY=VALUE… KEY-…")]
    pub words: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub selection: Selection,
    /// Change all of the type
    #[arg(long, conflicts_with = "selector")]
    pub all: bool,
    /// Replace values that are there
    #[arg(long)]
    pub overwrite: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// `muster revoke`
#[derive(Debug, Args)]
#[command(
    after_help = "A revoked device is refused by the registrar and unknown to other devices, and keeps its name. A revoked director is
refused likewise, and devices leave it.

Examples:
  muster revoke device web
  muster revoke director d1
  muster revoke token k3v9"
)]
pub struct Revoke {
    /// What to revoke
    #[arg(required = true, value_name = "TYPE NAME… | TYPE/NAME…")]
    pub targets: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// `muster drain`, `muster undrain`
#[derive(Debug, Args)]
pub struct Drain {
    /// Which directors
    #[arg(required = true, value_name = "TYPE NAME… | TYPE/NAME…")]
    pub targets: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// `muster version`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  muster version --client")]
pub struct Version {
    /// Do not ask the registrar
    #[arg(long)]
    pub client: bool,
    /// Output format [default: text]
    #[arg(short, long, value_parser = ["json", "yaml"])]
    pub output: Option<String>,
}

#[cfg(test)]
mod tests;
