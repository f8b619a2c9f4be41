//! The grammar of `muster expose`.

use std::net::IpAddr;

use clap::{Args, ValueEnum};

use super::create::{Labels, Making, parse_cluster_ip};

/// `muster expose`
#[derive(Debug, Args)]
#[command(
    after_help = "A device is exposed by its labels: the Service has all devices that have them. A Service is exposed under another name, by
its selector and, unless --port is given, with its ports.

Examples:
  muster expose device web --port=80 --target-port=8080
  muster expose device web --name=shop --port=80 --selector=app=shop
  muster expose service my-cs --name=my-cs-2"
)]
pub struct Expose {
    /// What to expose: a device, or a Service
    #[arg(required = true, value_name = "TYPE NAME | TYPE/NAME", num_args = 1..=2)]
    pub target: Vec<String>,
    /// Name of the new Service [default: the name of what is exposed]
    #[arg(long)]
    pub name: Option<String>,
    /// The Service's port
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// The endpoints' port, or its name [default: --port]
    #[arg(long, value_name = "PORT")]
    pub target_port: Option<String>,
    /// The port's protocol
    #[arg(long, value_enum, ignore_case = true, default_value = "TCP")]
    pub protocol: Protocol,
    /// Labels that endpoints must have, in the place of those of what is exposed
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',')]
    pub selector: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub labels: Labels,
    /// Type of the new Service
    #[arg(long = "type", value_name = "TYPE", default_value = "ClusterIP")]
    pub kind: String,
    /// Address of the network's service pool, or None [default: the registrar chooses]
    #[arg(long = "cluster-ip", value_name = "ADDRESS", value_parser = parse_cluster_ip)]
    pub cluster_ip: Option<String>,
    /// An address outside of the network that leads to it, too
    #[arg(long = "external-ip", value_name = "ADDRESS")]
    pub external_ip: Option<IpAddr>,
    /// Keep each client with its endpoint
    #[arg(long, value_enum, value_name = "AFFINITY")]
    pub session_affinity: Option<Affinity>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub making: Making,
}

/// Value of `--protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// TCP
    #[value(name = "TCP")]
    Tcp,
    /// UDP
    #[value(name = "UDP")]
    Udp,
    /// SCTP
    #[value(name = "SCTP")]
    Sctp,
}

/// Value of `--session-affinity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Affinity {
    /// Any endpoint
    #[value(name = "None")]
    None,
    /// The endpoint that the client had last
    #[value(name = "ClientIP")]
    ClientIp,
}
