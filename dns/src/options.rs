//! What an operator can choose of the engine's behaviour, for all zones alike: the options that the reference
//! server has for the same things.

use std::collections::BTreeSet;

use ipnet::IpNet;
use muster_common::name::{Domain, Label};

/// How names of devices by address are answered (specification 6).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PodMode {
    /// They do not exist.
    #[default]
    Disabled,
    /// The address spelled in the name, whether or not it is in use.
    Insecure,
    /// Only if a live device of the namespace has the address.
    Verified,
}

/// Which zones a name that does not exist is passed on for (specification 16).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Fallthrough {
    /// None.
    #[default]
    Never,
    /// All.
    Always,
    /// Those that are at or below one of these.
    Zones(Vec<Domain>),
}

/// The options.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// How `pod` names are answered.
    pub pods: PodMode,
    /// Whether an endpoint without a hostname is called like its device (specification 3).
    pub endpoint_device_names: bool,
    /// Whether a Service with a cluster IP and no endpoint does not exist (specification 4).
    pub ignore_empty_services: bool,
    /// Whether endpoints are served at all (specification 4).
    pub endpoints: bool,
    /// The namespaces that are served; `None` for all (specification 9).
    pub namespaces: Option<BTreeSet<Label>>,
    /// Who may have a zone transferred (specification 14); nobody if empty.
    pub transfer_to: Vec<IpNet>,
    /// What is passed on (specification 16).
    pub fallthrough: Fallthrough,
    /// Whether search lists are completed here (specification 15).
    pub complete: bool,
    /// The host's own search list, which completion tries after that of the namespace.
    pub host_search: Vec<String>,
    /// Whether the external zone has headless Services (specification 12).
    pub external_headless: bool,
    /// Reverse zones beside those of the pools: endpoints may have any address (specification 7).
    pub reverse_zones: Vec<IpNet>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pods: PodMode::Disabled,
            endpoint_device_names: false,
            ignore_empty_services: false,
            endpoints: true,
            namespaces: None,
            transfer_to: Vec::new(),
            fallthrough: Fallthrough::Never,
            complete: false,
            host_search: Vec::new(),
            external_headless: false,
            reverse_zones: Vec::new(),
        }
    }
}
