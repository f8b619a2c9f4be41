//! What this host forwards for: hosts without an agent, whose addresses are translated one to one, and subnets. Done by the
//! kernel, with an nftables table of the agent's own, and forwarding on the interfaces concerned alone. All of it is gone
//! after [`Site::remove`]; what a crash leaves is swept at the next start.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Stdio,
};

use ipnet::IpNet;
use muster_common::file::FileError;
use tokio::{io::AsyncWriteExt, process::Command};

use self::{forwarding::Forwarding, rules::Rules};
use crate::{
    control::Settings,
    interface::{InterfaceError, failed, netlink::Netlink},
    nftables::table_name,
};

mod forwarding;
mod rules;
pub mod status;

/// File in the state directory that says what forwarding has been switched on.
const STATE_FILE: &str = "forwarding";

/// What is carried at present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Hosts without an agent: the virtual address, and that on the LAN, of one family.
    pub hosts: Vec<(IpAddr, IpAddr)>,
    /// Networks that are reached as they are.
    pub subnets: Vec<IpNet>,
    /// Where packets for them come from: all that is routed into the agent's interface.
    pub network: Vec<IpNet>,
}

impl Carried {
    /// What the registrar has decided, within what this host offers.
    pub fn new(settings: &Settings) -> Self {
        let hosts = settings.proxied.iter().filter_map(|host| Some((host.translated()?, host.lan_address)));
        Self {
            hosts: hosts.collect(),
            subnets: settings.active_subnets.clone(),
            network: settings.routes.clone(),
        }
    }

    /// Whether there is nothing to forward.
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty() && self.subnets.is_empty()
    }
}

/// Why a host cannot forward.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// The program nft cannot be started.
    #[error("cannot run nft, which translates addresses for [site]: {0}; install the package nftables")]
    Nft(io::Error),
    /// The program nft does not take the rules.
    #[error("cannot set nftables rules for [site]: {0}")]
    Rules(String),
    /// A setting of the kernel's cannot be written.
    #[error("cannot switch on forwarding in {path}: {source}; let the agent write below /proc/sys/net")]
    Forwarding {
        /// The setting's file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// What has been changed cannot be kept on disk, and would be left over after a crash.
    #[error(transparent)]
    State(#[from] FileError),
    /// The host's interfaces and routes cannot be read.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
}

/// See the module.
pub struct Site {
    interface: String,
    masquerade: bool,
    forwarding: Forwarding,
    /// The rules in force.
    applied: Option<Rules>,
}

impl Site {
    /// For the agent whose interface is `interface` and whose state is in `state_dir`. Takes away what an agent that was
    /// killed has left.
    pub async fn sweep(interface: &str, masquerade: bool, state_dir: &Path) -> Self {
        let forwarding = Forwarding::new(state_dir.join(STATE_FILE));
        let mut site = Self { interface: interface.to_owned(), masquerade, forwarding, applied: None };
        if site.forwarding.is_left_over() {
            tracing::info!("removing the forwarding that an agent that was killed had left");
            site.remove().await;
        }
        site
    }

    /// Whether this host can do what it is configured for; to be called where there is a `[site]`.
    pub async fn check(&self) -> Result<(), SiteError> {
        let output = Command::new("nft").arg("--version").stdin(Stdio::null()).output().await;
        output.map(drop).map_err(SiteError::Nft)
    }

    /// Makes the host forward for `carried`, and for nothing else. To be called again whenever the host's interfaces have
    /// changed. After an error nothing is forwarded.
    pub async fn update(&mut self, carried: &Carried) -> Result<(), SiteError> {
        let result = self.try_update(carried).await;
        if result.is_err() {
            self.remove().await;
        }
        result
    }

    async fn try_update(&mut self, carried: &Carried) -> Result<(), SiteError> {
        if carried.is_empty() {
            self.remove().await;
            return Ok(());
        }
        let links = links(&self.interface, carried).await?;
        let has = |is_ipv4: bool| {
            carried.hosts.iter().any(|(_, lan)| lan.is_ipv4() == is_ipv4)
                || carried.subnets.iter().any(|subnet| subnet.addr().is_ipv4() == is_ipv4)
        };
        let plan = self.forwarding.plan(&self.interface, &links, has(true), has(false));
        let rules = Rules::new(&self.interface, carried, self.masquerade, &plan);
        if self.applied.as_ref() != Some(&rules) || !self.has_table().await {
            // Nothing is forwarded without rules: they are the first to come, and the last to go.
            nft(rules.text()).await?;
            tracing::info!(
                hosts = carried.hosts.len(), subnets = ?carried.subnets, interfaces = ?links,
                "forwarding for hosts without an agent"
            );
            self.applied = Some(rules);
        }
        self.forwarding.apply(&plan)
    }

    /// Somebody may have flushed all rules, as reloading a firewall does.
    async fn has_table(&self) -> bool {
        let table = table_name(&self.interface);
        let mut command = Command::new("nft");
        command.args(["list", "chain", "inet", &table, "forward"]).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null()).status().await.is_ok_and(|status| status.success())
    }

    /// Takes everything back. What fails is said in the log.
    pub async fn remove(&mut self) {
        if self.applied.is_none() && !self.forwarding.is_left_over() {
            return;
        }
        self.forwarding.restore();
        if let Err(error) = nft(&rules::removal(&self.interface)).await {
            tracing::warn!(%error, "cannot remove the agent's nftables table");
        }
        self.applied = None;
    }
}

/// Has nft take `rules`, all or none.
async fn nft(rules: &str) -> Result<(), SiteError> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(SiteError::Nft)?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it ends early, it says why itself.
        let _ = stdin.write_all(rules.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(SiteError::Nft)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(SiteError::Rules(said.lines().next().unwrap_or("it failed without a word").to_owned()))
}

/// The interfaces through which `carried` is reached.
async fn links(own: &str, carried: &Carried) -> Result<BTreeSet<String>, SiteError> {
    let mut netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    let links = netlink.links().await.map_err(failed("list the host's interfaces"))?;
    let addresses = netlink.addresses().await.map_err(failed("list the host's addresses"))?;
    let in_subnet = |address: &IpAddr| carried.subnets.iter().any(|subnet| subnet.contains(address));
    let mut indices: BTreeSet<u32> =
        addresses.iter().filter(|a| in_subnet(&a.address)).map(|a| a.link).collect();
    let hosts = carried.hosts.iter().map(|(_, lan)| *lan);
    let inside = carried.subnets.iter().flat_map(|subnet| subnet.hosts().take(2));
    for address in hosts.chain(inside) {
        let route = netlink.route_to(address).await;
        indices.extend(route.map_err(failed(format!("look up the route to {address}")))?);
    }
    // Names that nft would take for something else are no interface's in practice.
    let is_plain = |name: &str| name != own && !name.contains(['"', '*', '\\']);
    let found = links.iter().filter(|link| indices.contains(&link.index) && !link.loopback);
    Ok(found.map(|link| link.name.clone()).filter(|name| is_plain(name)).collect())
}
