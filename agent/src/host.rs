//! What a running agent puts on its host: the interface, the data plane behind it, and the resolver. All of it is gone
//! again after [`Host::remove`]; what a crash leaves is swept at the next start.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    sync::Arc,
};

use anyhow::Context;
use ipnet::IpNet;
use muster_common::{telemetry, tls::Credentials};
use tokio::sync::{mpsc, watch};
use zeroize::Zeroizing;

use crate::{
    config::{self, Config},
    control::{Proxied, Settings},
    datapath::{Command, Datapath, DatapathConfig, Event, Handle},
    host_dns::{self, HostDns},
    interface::{self, Interface, InterfaceConfig},
    keys,
    local_api::Shared,
    private_addresses,
    resolver::{self, Resolver},
    site::{Carried, Site},
    tun::{self, Tun},
    udp::UdpSockets,
};

/// See the module.
pub struct Host {
    config: Config,
    private_key: Zeroizing<[u8; 32]>,
    credentials: Arc<Credentials>,
    metrics: telemetry::Metrics,
    shared: Arc<Shared>,
    port: u16,
    /// Until the data plane takes them.
    queues: Vec<(Tun, UdpSockets)>,
    interface: Option<Interface>,
    datapath: Option<(Datapath, Handle)>,
    dns_servers: watch::Sender<Vec<String>>,
    settings: Option<Settings>,
    /// Of the interface, in octets; once it is there.
    mtu: u32,
    host_dns: Option<HostDns>,
    site: Site,
    /// Why nothing is forwarded for the site; empty while it is, or there is nothing to forward.
    site_error: String,
    /// What the data plane has been told of it.
    carried: (Vec<IpAddr>, Vec<IpNet>),
    /// Hosts that the log has said to be refused.
    refused: Vec<Proxied>,
}

/// What a host tells once it is configured for the first time.
pub struct Started {
    /// From the data plane.
    pub events: mpsc::Receiver<Event>,
    /// Virtual addresses that have been resolved; never anything if the resolver is switched off.
    pub resolved: mpsc::Receiver<IpAddr>,
    /// Changes whenever somebody else has changed the interface, and [`Host::repair`] is due.
    pub disturbed: watch::Receiver<u64>,
}

impl Host {
    /// Sweeps what a crash has left, and takes TUN device and UDP port.
    pub async fn take(
        config: &Config,
        private_key: Zeroizing<[u8; 32]>,
        credentials: Arc<Credentials>,
        metrics: telemetry::Metrics,
        shared: Arc<Shared>,
    ) -> anyhow::Result<Self> {
        let swept = interface::sweep().await?;
        if swept.routes + swept.addresses > 0 {
            tracing::info!(?swept, "removed what an agent that was killed had left");
        }
        host_dns::sweep(&host_dns::Paths::new(&config.state_dir)).await;
        let site = Site::sweep(&config.interface.name, config.site.masquerade, &config.state_dir).await;
        if config.site != config::Site::default() {
            site.check().await?;
        }
        let threads = NonZeroUsize::new(config.tunnel.threads).unwrap_or_else(Datapath::threads);
        let sockets = UdpSockets::bind_many(config.tunnel.port, threads)?;
        let port = sockets.first().map_or(0, UdpSockets::port);
        let queues = Tun::create_queues(&config.interface.name, threads)?;
        let mut queues: Vec<_> = queues.into_iter().zip(sockets).collect();
        if !config.tunnel.offloads {
            for (tun, sockets) in &mut queues {
                sockets.forgo_offloads();
                tun.set_offloads(tun::Offloads::default())
                    .context("cannot switch off offloads of the TUN device")?;
            }
        }
        Ok(Self {
            config: config.clone(),
            private_key,
            credentials,
            metrics,
            shared,
            port,
            queues,
            interface: None,
            datapath: None,
            dns_servers: watch::Sender::new(Vec::new()),
            settings: None,
            mtu: config.interface.mtu,
            host_dns: None,
            site,
            site_error: String::new(),
            carried: Default::default(),
            refused: Vec::new(),
        })
    }

    /// UDP port of the tunnel.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// MTU of the interface, in octets; `None` until that is programmed.
    pub fn mtu(&self) -> Option<u32> {
        self.interface.as_ref().map(|_| self.mtu)
    }

    /// Makes the host what `settings` say; `names` is the resolver's cache from before. The first time, data plane and
    /// resolver are started. If the interface of a host that is configured already cannot be changed, everything else
    /// is, and [`Host::repair`] tries again.
    pub async fn configure(
        &mut self,
        settings: &Settings,
        names: Option<Vec<u8>>,
    ) -> anyhow::Result<Option<Started>> {
        let queues = std::mem::take(&mut self.queues);
        if !queues.is_empty() {
            if self.config.interface.mtu == 0 {
                self.mtu = self.inner_mtu(settings).await;
            }
            self.program(settings).await?;
            let started = self.start(settings, queues, names).await?;
            self.settings = Some(settings.clone());
            self.update_site().await;
            return Ok(Some(started));
        }
        self.update(settings).await;
        self.dns_servers.send_replace(settings.dns_servers.clone());
        self.settings = Some(settings.clone());
        self.update_site().await;
        self.program(settings).await?;
        Ok(None)
    }

    /// Whether the data plane has been started.
    pub const fn is_configured(&self) -> bool {
        self.settings.is_some()
    }

    /// Makes the interface what it was told to be, after somebody else has changed it.
    pub async fn repair(&mut self) -> anyhow::Result<()> {
        let Some(settings) = self.settings.clone() else { return Ok(()) };
        self.program(&settings).await
    }

    /// This host has another address: peers are told so.
    pub async fn roam(&self) {
        if let Some((_, handle)) = &self.datapath {
            let _ = handle.roam().await;
        }
    }

    /// Forwards for what this device carries. To be called again from time to time: interfaces come and go, and firewalls
    /// are reloaded.
    pub async fn update_site(&mut self) {
        let Some(settings) = &self.settings else { return };
        let refused: Vec<Proxied> =
            settings.proxied.iter().filter(|host| !host.refused.is_empty()).cloned().collect();
        for host in refused.iter().filter(|host| !self.refused.contains(host)) {
            let Proxied { name, lan_address, refused: reason, .. } = host;
            tracing::warn!(name, %lan_address, reason, "the registrar does not let this device speak for a host");
        }
        self.refused = refused;
        let carried = Carried::new(settings);
        let error = match self.site.update(&carried).await {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        if error != self.site_error {
            if !error.is_empty() {
                tracing::error!(error, "this host does not forward for its site; trying again");
            }
            self.site_error = error;
        }
        let told = (settings.proxied_addresses(), carried.subnets);
        if told != self.carried {
            let (addresses, subnets) = told.clone();
            self.tell(Command::SetCarried { addresses, subnets }).await;
            self.carried = told;
        }
    }

    /// Why nothing is forwarded for the site; empty while it is, or there is nothing to forward.
    pub fn site_error(&self) -> &str {
        &self.site_error
    }

    /// What fits into the host's other interfaces.
    async fn inner_mtu(&self, settings: &Settings) -> u32 {
        let exclusions = private_addresses::Exclusions {
            interface: self.config.interface.name.clone(),
            pools: settings.pools.clone(),
        };
        private_addresses::inner_mtu(&exclusions).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "the interface gets the usual MTU");
            interface::MTU_DEFAULT
        })
    }

    async fn program(&mut self, settings: &Settings) -> anyhow::Result<()> {
        let link_local = |address: &IpAddr| matches!(address, IpAddr::V4(v4) if v4.is_link_local());
        let listen = self.config.resolver.listen.iter().map(|address| address.ip());
        let config = InterfaceConfig {
            mtu: self.mtu,
            addresses: settings.virtual_addresses(),
            routes: settings.routes.clone(),
            resolver_address: listen.filter(|_| self.config.resolver.enabled).find(link_local),
        };
        let warnings = match &mut self.interface {
            Some(interface) => interface.update(&config).await?,
            None => {
                let (interface, warnings) = Interface::program(&self.config.interface.name, &config).await?;
                self.interface = Some(interface);
                warnings
            }
        };
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let addresses = settings.virtual_addresses();
        tracing::info!(interface = self.config.interface.name, ?addresses, "address bound");
        Ok(())
    }

    async fn start(
        &mut self,
        settings: &Settings,
        queues: Vec<(Tun, UdpSockets)>,
        names: Option<Vec<u8>>,
    ) -> anyhow::Result<Started> {
        let disturbed = self.interface.as_ref().context("there is no interface")?.watch()?;
        let (datapath, events) = Datapath::start(DatapathConfig {
            queues,
            private_key: self.private_key.clone(),
            seed: Zeroizing::new(keys::seed()?),
            mtu: self.mtu,
            accepts_aes: self.config.accepts_aes(),
            local_addresses: settings.virtual_addresses(),
            pools: settings.routes.clone(),
        })?;
        let handle = datapath.handle();
        self.shared.datapath.store(Some(Arc::new(handle.clone())));
        self.datapath = Some((datapath, handle));
        let resolved = if self.config.resolver.enabled {
            self.start_resolver(settings, names).await?
        } else {
            mpsc::channel(1).1
        };
        Ok(Started { events, resolved, disturbed })
    }

    async fn start_resolver(
        &mut self,
        settings: &Settings,
        names: Option<Vec<u8>>,
    ) -> anyhow::Result<mpsc::Receiver<IpAddr>> {
        let mut hook = self.host_dns(settings).await;
        let own = resolver::Settings {
            resolv_conf: hook.resolv_conf().to_owned(),
            ..self.config.resolver.settings()?
        };
        let network = resolver::Network { domain: settings.domain.clone(), routes: settings.pools.clone() };
        self.dns_servers.send_replace(settings.dns_servers.clone());
        let servers = self.dns_servers.subscribe();
        let mut started = None;
        self.metrics.register(|registry| {
            let resolver = Resolver::start(&own, network, &self.credentials, servers, registry);
            started = Some(resolver);
        });
        let (resolver, resolved) = started.context("the resolver was not started")??;
        if let Some(names) = names
            && let Err(error) = resolver.restore(&names)
        {
            tracing::warn!(%error, "cannot use the names that were kept on disk; going on without them");
        }
        resolver.listen_also(&settings.virtual_addresses());
        self.shared.resolver.store(Some(Arc::new(resolver)));
        hook.start().await;
        self.host_dns = Some(hook);
        Ok(resolved)
    }

    /// What leads the host's programs to the resolver, once that answers.
    async fn host_dns(&self, settings: &Settings) -> HostDns {
        let listen = &self.config.resolver.listen;
        let (mode, server) = match host_dns::server(listen) {
            Some(server) => (self.config.resolver.host, server),
            None => (host_dns::Mode::None, SocketAddr::from((interface::RESOLVER_ADDRESS, 53))),
        };
        if mode != self.config.resolver.host {
            tracing::warn!(
                ?listen,
                "programs ask port 53 alone, where the resolver does not listen: the host's DNS is left as it is"
            );
        }
        // As the resolver completes names, so does systemd-resolved, which asks for nothing but whole ones.
        let absolute = |suffix: &String| match suffix.strip_suffix('.') {
            Some(absolute) => absolute.to_owned(),
            None if suffix.is_empty() => settings.domain.to_string(),
            None => format!("{suffix}.{}", settings.domain),
        };
        HostDns::prepare(host_dns::Settings {
            mode,
            server,
            interface: self.config.interface.name.clone(),
            domain: settings.domain.to_string(),
            routes: settings.pools.clone(),
            search: self.config.resolver.search.iter().map(absolute).collect(),
            paths: host_dns::Paths::new(&self.config.state_dir),
        })
        .await
    }

    async fn update(&self, settings: &Settings) {
        let Some(old) = &self.settings else { return };
        if old.virtual_addresses() != settings.virtual_addresses() {
            self.tell(Command::SetLocalAddresses(settings.virtual_addresses())).await;
            if let Some(resolver) = self.shared.resolver.load_full() {
                resolver.listen_also(&settings.virtual_addresses());
            }
        }
        if old.routes != settings.routes {
            if let Some((_, handle)) = &self.datapath {
                let _ = handle.set_pools(settings.routes.clone()).await;
            }
            if let Some(resolver) = self.shared.resolver.load_full() {
                resolver.set_routes(settings.pools.clone());
            }
        }
        if old.domain != settings.domain {
            tracing::warn!(old = %old.domain, new = %settings.domain, "the network has another domain: restart the agent to resolve its names");
        }
    }

    /// Tells the data plane. Without one there is nobody to tell.
    pub async fn tell(&self, command: Command) {
        if let Some((_, handle)) = &self.datapath {
            // A data plane that has stopped says so itself, by its last event.
            let _ = handle.send(command).await;
        }
    }

    /// Takes everything off the host again.
    pub async fn remove(mut self) {
        // While the resolver still answers.
        if let Some(mut hook) = self.host_dns.take() {
            hook.stop().await;
        }
        self.site.remove().await;
        self.shared.resolver.store(None);
        self.shared.datapath.store(None);
        if let Some(interface) = self.interface.take()
            && let Err(error) = interface.remove().await
        {
            tracing::warn!(%error, "cannot clean up the interface; it vanishes with the agent");
        }
        let datapath = self.datapath.take();
        // Joins the thread, and closes the TUN device: the interface is gone when this is done.
        let _ = tokio::task::spawn_blocking(move || drop(datapath)).await;
        self.queues.clear();
    }
}
