//! The grammar of `muster approve` and `muster disapprove`.

use clap::Args;
use ipnet::IpNet;

use super::Printing;
use crate::subnet;

/// `muster approve`, `muster disapprove`
#[derive(Debug, Args)]
pub struct Approve {
    /// Which devices
    #[arg(required = true, value_name = "TYPE NAME… | TYPE/NAME…")]
    pub targets: Vec<String>,
    /// Speaking for hosts without an agent, which become devices of its namespace
    #[arg(long)]
    pub hosts: bool,
    /// Carrying this subnet; may be repeated or comma-separated
    #[arg(long = "subnet", value_name = "CIDR", value_delimiter = ',', value_parser = subnet::parse)]
    pub subnets: Vec<IpNet>,
    /// All that the device offers now, or, taken back, all that is approved
    #[arg(long, conflicts_with_all = ["hosts", "subnets"])]
    pub all: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub printing: Printing,
}
