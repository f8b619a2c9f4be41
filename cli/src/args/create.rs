//! The grammar of `muster create`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Subcommand};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{DryRun, Printing};
use crate::{duration, manifest, subnet};

/// `muster create`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
#[command(after_help = "Examples:
  muster create token --reusable --ttl 1h -l role=web
  muster create network lab --domain lab.example --device-pool-v4 10.64.0.0/16
  muster create device web --virtual-ipv4 100.64.0.10
  muster create namespace prod
  muster create service clusterip my-cs --tcp=80:8080 -n prod
  muster create -f device.yaml")]
pub struct Create {
    /// Kind and properties
    #[command(subcommand)]
    pub what: Option<CreateWhat>,
    /// File with manifests, a directory of such files, or - for standard input
    #[arg(short, long, value_name = "FILE")]
    pub filename: Vec<PathBuf>,
    /// Show what -f would create, and create nothing
    #[arg(long, value_enum, value_name = "WHERE", num_args = 0..=1, require_equals = true, default_missing_value = "server")]
    pub dry_run: Option<DryRun>,
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
  muster create token -n prod -l role=web          devices that join get namespace and label
  muster create token --director                   one director may join")]
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
    #[command(after_help = "Examples:
  muster create device web --virtual-ipv4 100.64.0.10 -l role=web
  muster create device gate --may-proxy --subnet 10.1.0.0/24     approved before it joins")]
    Device(CreateDevice),
    /// Create a namespace
    #[command(visible_aliases = ["namespaces", "ns"])]
    #[command(after_help = "Example:\n  muster create namespace prod")]
    Namespace(CreateNamespace),
    /// Create a Service
    #[command(subcommand, visible_aliases = ["services", "svc"])]
    #[command(after_help = "Example:\n  muster create service clusterip my-cs --tcp=80:8080")]
    Service(CreateService),
}

/// `muster create namespace`
#[derive(Debug, Args)]
pub struct CreateNamespace {
    /// Name
    pub name: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub labels: Labels,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub making: Making,
}

/// How to create, and what to print.
#[derive(Debug, Args)]
pub struct Making {
    /// Show what would be created, and create nothing
    #[arg(long, value_enum, value_name = "WHERE", num_args = 0..=1, require_equals = true, default_missing_value = "server")]
    pub dry_run: Option<DryRun>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}

/// `muster create service`
#[derive(Debug, Subcommand)]
pub enum CreateService {
    /// Create a Service with an address of its own, or a headless one
    #[command(name = "clusterip")]
    #[command(after_help = "The Service selects devices with the label app=NAME.

Examples:
  muster create service clusterip my-cs --tcp=5678:8080
  muster create service clusterip my-headless --clusterip=None")]
    ClusterIp(ClusterIpService),
    /// Create a Service of type NodePort; there are no node ports here, so that it is as clusterip
    #[command(name = "nodeport")]
    #[command(after_help = "Example:\n  muster create service nodeport my-ns --tcp=5678:8080")]
    NodePort(PortService),
    /// Create a Service of type LoadBalancer
    #[command(name = "loadbalancer")]
    #[command(after_help = "Example:\n  muster create service loadbalancer my-lbs --tcp=5678:8080")]
    LoadBalancer(PortService),
    /// Create a Service that stands for a host name outside
    #[command(name = "externalname")]
    #[command(
        after_help = "Example:\n  muster create service externalname my-ns --external-name db.example.com"
    )]
    ExternalName(ExternalNameService),
}

/// Ports of a Service.
#[derive(Debug, Args)]
pub struct Ports {
    /// TCP port, and the endpoints' port or its name; may be repeated or comma-separated
    #[arg(long, value_name = "PORT[:TARGET]", value_delimiter = ',', value_parser = parse_port)]
    pub tcp: Vec<PortPair>,
    /// UDP port, as --tcp
    #[arg(long, value_name = "PORT[:TARGET]", value_delimiter = ',', value_parser = parse_port)]
    pub udp: Vec<PortPair>,
}

/// `muster create service clusterip`
#[derive(Debug, Args)]
pub struct ClusterIpService {
    /// Name
    pub name: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub ports: Ports,
    /// Address of the network's service pool, or None [default: the registrar chooses]
    #[arg(long = "clusterip", value_name = "ADDRESS", value_parser = parse_cluster_ip)]
    pub cluster_ip: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub making: Making,
}

/// `muster create service nodeport`, `muster create service loadbalancer`
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("ports").args(["tcp", "udp"]).multiple(true).required(true))]
pub struct PortService {
    /// Name
    pub name: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub ports: Ports,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub making: Making,
}

/// `muster create service externalname`
#[derive(Debug, Args)]
pub struct ExternalNameService {
    /// Name
    pub name: String,
    /// Host name that the Service stands for
    #[arg(long, value_name = "HOST")]
    pub external_name: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub ports: Ports,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub making: Making,
}

/// Value of `--tcp` and `--udp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPair {
    /// As written.
    pub text: String,
    /// The Service's port.
    pub port: u16,
    /// The endpoints' port, or its name.
    pub target: String,
}

fn parse_port(text: &str) -> Result<PortPair, String> {
    let bad = || format!("{text:?} is not PORT or PORT:TARGET, such as 80:8080 or 80:http");
    let (port, target) = text.split_once(':').unwrap_or((text, text));
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let port = number(port).ok_or_else(bad)?;
    if number(target).is_none() && !manifest::is_port_name(target) {
        return Err(bad());
    }
    Ok(PortPair { text: text.to_owned(), port, target: target.to_owned() })
}

pub(super) fn parse_cluster_ip(text: &str) -> Result<String, String> {
    match text {
        "None" | "" => Ok(text.to_owned()),
        _ => text
            .parse::<IpAddr>()
            .map(|ip| ip.to_string())
            .map_err(|_| format!("{text:?} is neither an IP address nor None")),
    }
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
    /// Let directors join, not devices
    #[arg(long, conflicts_with = "labels")]
    pub director: bool,
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
    /// Let it speak for hosts without an agent, which become devices of its namespace
    #[arg(long)]
    pub may_proxy: bool,
    /// Subnet that it may carry; may be repeated or comma-separated
    #[arg(long = "subnet", value_name = "CIDR", value_delimiter = ',', value_parser = subnet::parse)]
    pub subnets: Vec<IpNet>,
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
