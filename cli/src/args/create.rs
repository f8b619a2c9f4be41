//! The grammar of `muster create`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Subcommand};
use ipnet::{Ipv4Net, Ipv6Net};

use super::Printing;
use crate::duration;

/// `muster create`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
#[command(after_help = "Examples:
  muster create token --reusable --ttl 1h -l role=web
  muster create network lab --domain lab.example --device-pool-v4 10.64.0.0/16
  muster create device web --virtual-ipv4 100.64.0.10
  muster create -f device.yaml")]
pub struct Create {
    /// Kind and properties
    #[command(subcommand)]
    pub what: Option<CreateWhat>,
    /// File with manifests, a directory of such files, or - for standard input
    #[arg(short, long, value_name = "FILE")]
    pub filename: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// What `muster create` creates.
#[derive(Debug, Subcommand)]
pub enum CreateWhat {
    /// Create a join token, and print the command that joins a host with it
    #[command(visible_alias = "tokens")]
    #[command(after_help = "The command is printed to standard output, once; nothing can show it again.

Examples:
  muster create token                              one host may join, within 24 hours
  muster create token web --reusable --ttl 7d      any number of hosts may join, for a week
  muster create token -n prod -l role=web          devices that join get namespace and label")]
    Token(CreateToken),
    /// Create a network
    #[command(visible_aliases = ["networks", "net"])]
    #[command(after_help = "Example:
  muster create network lab --domain lab.example --public-address 198.51.100.10 \\
      --device-pool-v4 10.64.0.0/16 --device-pool-v6 fd12:3456:789a::/64

Blocks of different networks must not overlap.")]
    Network(CreateNetwork),
    /// Reserve name and addresses for a device that has yet to join
    #[command(visible_aliases = ["devices", "dev"])]
    #[command(after_help = "Example:\n  muster create device web --virtual-ipv4 100.64.0.10 -l role=web")]
    Device(CreateDevice),
}

/// Labels of what is created.
#[derive(Debug, Args)]
pub struct Labels {
    /// Label, KEY=VALUE; may be repeated or comma-separated
    #[arg(short = 'l', long = "label", alias = "labels", value_name = "KEY=VALUE", value_delimiter = ',')]
    pub labels: Vec<String>,
}

/// `muster create token`
#[derive(Debug, Args)]
pub struct CreateToken {
    /// Name [default: the registrar chooses one]
    pub name: Option<String>,
    /// Let any number of devices join, not just one
    #[arg(long)]
    pub reusable: bool,
    /// For how long devices may join with it [default: 24h]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    pub ttl: Option<Duration>,
    /// Labels of the devices that join
    #[command(flatten)]
    pub labels: Labels,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// `muster create network`
#[derive(Debug, Args)]
pub struct CreateNetwork {
    /// Name
    pub name: String,
    /// Domain that defines the network
    #[arg(long, value_name = "DOMAIN")]
    pub domain: String,
    /// Address that the domain itself resolves to; may be repeated
    #[arg(long = "public-address", value_name = "ADDRESS")]
    pub public_addresses: Vec<IpAddr>,
    /// Block that devices' IPv4 addresses come from [default: 100.64.0.0/11 if no block is given, else none]
    #[arg(long, value_name = "CIDR")]
    pub device_pool_v4: Option<Ipv4Net>,
    /// Block that devices' IPv6 addresses come from [default: a random one if no block is given, else none]
    #[arg(long, value_name = "CIDR")]
    pub device_pool_v6: Option<Ipv6Net>,
    /// Block kept for ClusterIPs [default: 100.96.0.0/12 if no block is given, else none]
    #[arg(long, value_name = "CIDR")]
    pub service_pool_v4: Option<Ipv4Net>,
    /// Block kept for IPv6 ClusterIPs [default: a random one if no block is given, else none]
    #[arg(long, value_name = "CIDR")]
    pub service_pool_v6: Option<Ipv6Net>,
    /// Director, best first; may be repeated
    #[arg(long = "director", value_name = "NAME=ADDRESS:PORT", value_parser = parse_director)]
    pub directors: Vec<Director>,
    /// Time to live of DNS records [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = duration::parse_or_zero)]
    pub record_ttl: Option<Duration>,
    /// For how long a released address is not given to another device [default: 24h]
    #[arg(long, value_name = "TIME", value_parser = duration::parse_or_zero)]
    pub address_quarantine: Option<Duration>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub labels: Labels,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// `muster create device`
#[derive(Debug, Args)]
pub struct CreateDevice {
    /// Name
    pub name: String,
    /// Virtual IPv4 address [default: the registrar chooses]
    #[arg(long, value_name = "ADDRESS")]
    pub virtual_ipv4: Option<Ipv4Addr>,
    /// Virtual IPv6 address [default: the registrar chooses]
    #[arg(long, value_name = "ADDRESS")]
    pub virtual_ipv6: Option<Ipv6Addr>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub labels: Labels,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// Value of `--director`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Director {
    /// Its name.
    pub name: String,
    /// Its address and UDP port.
    pub address: SocketAddr,
}

fn parse_director(text: &str) -> Result<Director, String> {
    let bad = || format!("{text:?} is not NAME=ADDRESS:PORT, such as d1=198.51.100.10:7570");
    let (name, address) = text.split_once('=').ok_or_else(bad)?;
    Ok(Director { name: name.to_owned(), address: address.parse().map_err(|_| bad())? })
}
