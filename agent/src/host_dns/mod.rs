//! The hook into the host's own DNS: once the agent's resolver answers, systemd-resolved or `/etc/resolv.conf` names
//! it; if it answers no longer, or the agent stops, it is as it was before. The agent itself never depends on it.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt;
use ipnet::IpNet;
use muster_common::time::Instant;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

pub mod file;
pub mod resolv_conf;
pub mod resolved;
mod turns;
mod watch_file;

use file::{EditError, ResolvConf};
use resolved::{Link, Resolved};
use turns::Turns;
use watch_file::Watch;

/// Name of the backup in the state directory.
const BACKUP: &str = "resolv.conf.backup";
/// How often the resolver is asked for a sign of life; until its first, and then.
const PROBE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How long an agent that starts waits for its hook.
const FIRST: Duration = Duration::from_secs(1);
/// How long it may take for one; it has to ask nobody.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);
/// After so many questions in a row without an answer the host goes without it.
const PROBES_FAILED: u32 = 3;
/// An empty file is one that somebody is writing, for so long.
const EMPTY: Duration = Duration::from_secs(1);
/// Before a hook that failed is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// How programs on the host are led to the resolver.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Mode {
    /// Through systemd-resolved where it serves this host, else through `/etc/resolv.conf`.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// Through systemd-resolved.
    #[serde(rename = "resolved")]
    Resolved,
    /// Through `/etc/resolv.conf`.
    #[serde(rename = "resolv.conf")]
    ResolvConf,
    /// Not at all: the operator sees to it.
    #[serde(rename = "none")]
    None,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Resolved => "resolved",
            Self::ResolvConf => "resolv.conf",
            Self::None => "none",
        })
    }
}

/// Where things are on the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Paths {
    /// The resolv.conf that programs read.
    pub resolv_conf: PathBuf,
    /// Where its original is kept while it is edited.
    pub backup: PathBuf,
    /// Directory of systemd-resolved's files.
    pub resolved: PathBuf,
    /// D-Bus address of the system bus; empty for the usual one.
    pub bus: String,
}

impl Paths {
    /// The usual ones, with the backup in `state_dir`.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            resolv_conf: "/etc/resolv.conf".into(),
            backup: state_dir.join(BACKUP),
            resolved: "/run/systemd/resolve".into(),
            bus: String::new(),
        }
    }

    /// The resolv.conf and its backup.
    pub fn file(&self) -> ResolvConf {
        ResolvConf {
            path: self.resolv_conf.clone(),
            backup: self.backup.clone(),
            resolved: self.resolved.clone(),
        }
    }
}

/// What there is to hook in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// How.
    pub mode: Mode,
    /// Where our resolver listens.
    pub server: SocketAddr,
    /// Name of our interface.
    pub interface: String,
    /// The network's domain.
    pub domain: String,
    /// The network's pools.
    pub routes: Vec<IpNet>,
    /// Domains that complete short names, if resolved is to do that.
    pub search: Vec<String>,
    /// Where things are on the host.
    pub paths: Paths,
}

/// Of the addresses that the resolver listens on, the one that programs can be told: resolv.conf knows port 53 alone.
pub fn server(listen: &[SocketAddr]) -> Option<SocketAddr> {
    let mut server = *listen.iter().find(|address| address.port() == 53)?;
    if server.ip().is_unspecified() {
        server.set_ip(match server.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    Some(server)
}

/// The hook. Without [`HostDns::stop`] it stays until the next start, or `muster-agent doctor --fix`.
pub struct HostDns {
    settings: Settings,
    way: Way,
    running: Option<(watch::Sender<bool>, JoinHandle<()>)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Resolved,
    File,
    None,
}

impl HostDns {
    /// Decides which way to go, and keeps the host's own servers where the resolver finds them. To be called before
    /// the resolver starts; nothing on the host is changed yet.
    pub async fn prepare(settings: Settings) -> Self {
        let file = settings.paths.file();
        let way = match settings.mode {
            Mode::None => Way::None,
            Mode::Resolved => Way::Resolved,
            Mode::ResolvConf => Way::File,
            Mode::Auto if serves(&settings).await => Way::Resolved,
            Mode::Auto => Way::File,
        };
        if way == Way::File
            && let Err(error) = blocking(move || file.save()).await
        {
            tracing::debug!(%error, "no backup of resolv.conf");
        }
        tracing::debug!(mode = %settings.mode, ?way, "the host's DNS");
        Self { settings, way, running: None }
    }

    /// The file that names the host's own servers while this is in use. It may not exist.
    pub fn resolv_conf(&self) -> &Path {
        if self.way == Way::File { &self.settings.paths.backup } else { &self.settings.paths.resolv_conf }
    }

    /// Hooks the resolver in as soon as it answers, and sees to it in the background that it stays so. Returns when it
    /// has been tried for the first time, or that takes too long.
    pub async fn start(&mut self) {
        if self.way == Way::None || self.running.is_some() {
            return;
        }
        let (stop, stopped) = watch::channel(false);
        let (settings, way) = (self.settings.clone(), self.way);
        let tried = Arc::new(Notify::new());
        let tell = Arc::clone(&tried);
        let task = tokio::spawn(async move {
            match way {
                Way::Resolved => through_resolved(&settings, &tell, stopped).await,
                Way::File => through_file(&settings, &tell, stopped).await,
                Way::None => {}
            }
        });
        self.running = Some((stop, task));
        // Who is told that the agent is ready, may ask for names at once.
        let _ = timeout(FIRST, tried.notified()).await;
    }

    /// Makes the host's DNS what it was.
    pub async fn stop(&mut self) {
        let Some((stop, task)) = self.running.take() else { return };
        let _ = stop.send(true);
        if let Err(error) = task.await {
            tracing::warn!(%error, "cannot undo the change of the host's DNS\nremedy: muster-agent doctor --fix");
        }
    }
}

/// Undoes what an agent that was killed has left.
pub async fn sweep(paths: &Paths) {
    let file = paths.file();
    match blocking(move || file.restore()).await {
        Ok(true) => {
            tracing::info!(path = %paths.resolv_conf.display(), "undid what an agent that was killed had left");
        }
        Ok(false) => {}
        Err(error) => tracing::warn!(%error, "cannot undo what an agent may have left in resolv.conf"),
    }
}

/// Whether systemd-resolved serves this host's programs.
async fn serves(settings: &Settings) -> bool {
    let file = settings.paths.file();
    let stub = IpAddr::from([127, 0, 0, 53]);
    let named = || file.original().is_ok_and(|text| resolv_conf::servers(&text).contains(&stub));
    if file.is_of_resolved() {
        return true;
    }
    if !named() {
        return false;
    }
    match Resolved::connect(&settings.paths.bus).await {
        Ok(resolved) => resolved.is_running().await.unwrap_or(false),
        Err(error) => {
            tracing::debug!(%error, "no systemd-resolved");
            false
        }
    }
}

/// File operations reach the disk; they must not hold up the data plane's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EditError> + Send + 'static,
) -> Result<T, EditError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(muster_common::file::FileError::new(
            "edit",
            Path::new("resolv.conf"),
            std::io::Error::other(error),
        )
        .into()),
    }
}

/// Whether the resolver at `server` answers. It is asked what it need not look up.
pub async fn answers(server: SocketAddr) -> bool {
    // Header with one question: `muster.`, TXT, class CHAOS, which is refused.
    const QUESTION: &[u8] = b"\x01\0\0\x01\0\0\0\0\0\0\x06muster\0\0\x10\0\x03";
    matches!(timeout(PROBE_PATIENCE, ask(server, QUESTION)).await, Ok(Some(())))
}

/// Asks `question`, a message but for its identifier, and waits for any answer.
pub(crate) async fn ask(server: SocketAddr, question: &[u8]) -> Option<()> {
    let id: [u8; 2] = rand::random();
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = tokio::net::UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(server).await.ok()?;
    socket.send(&[&id, question].concat()).await.ok()?;
    let mut answer = [0; 512];
    loop {
        let length = socket.recv(&mut answer).await.ok()?;
        if length >= 12 && answer.starts_with(&id) {
            return Some(());
        }
    }
}

/// Follows whether the resolver answers.
struct Pulse {
    server: SocketAddr,
    alive: bool,
    failed: u32,
    /// Before the next question.
    pause: Duration,
}

impl Pulse {
    const fn new(server: SocketAddr) -> Self {
        Self { server, alive: false, failed: 0, pause: Duration::ZERO }
    }

    /// Returns when the resolver has begun to answer, or has ceased to. It may be dropped and called again.
    async fn changed(&mut self) -> bool {
        loop {
            sleep(self.pause).await;
            let answers = answers(self.server).await;
            self.pause = if answers { PROBE.1 } else { PROBE.0 };
            self.failed = if answers { 0 } else { self.failed.saturating_add(1) };
            if answers != self.alive && (answers || self.failed >= PROBES_FAILED) {
                self.alive = answers;
                return answers;
            }
        }
    }
}

/// Until told to stop, keeps `/etc/resolv.conf` naming the resolver.
async fn through_file(settings: &Settings, tried: &Notify, mut stopped: watch::Receiver<bool>) {
    let file = settings.paths.file();
    let (watch, mut turns) = (Watch::new(), Turns::default());
    let mut pulse = Pulse::new(settings.server);
    let mut complaint = String::new();
    loop {
        tokio::select! {
            () = told(&mut stopped) => break,
            alive = pulse.changed() => {
                if !alive {
                    tracing::warn!(server = %settings.server, "the resolver does not answer: the host goes without it");
                    restore(&file).await;
                    // The resolver may need the host's own servers to come back.
                    let file = file.clone();
                    let _ = blocking(move || file.save()).await;
                    continue;
                }
            }
            () = watch.changed() => {}
        }
        watch.follow(&file.path);
        if !pulse.alive {
            let file = file.clone();
            let _ = blocking(move || file.save()).await;
            continue;
        }
        if file.read().is_ok_and(|text| text.is_empty()) {
            sleep(EMPTY).await;
        }
        let wait = turns.wait(Instant::now());
        if !wait.is_zero() {
            // The upstream servers are followed all the same.
            let saved = file.clone();
            let _ = blocking(move || saved.save()).await;
            tokio::select! {
                () = told(&mut stopped) => break,
                () = sleep(wait) => {}
            }
        }
        let (edited, server) = (file.clone(), settings.server.ip());
        let result = blocking(move || edited.edit(server)).await;
        tried.notify_one();
        match result {
            Ok(true) => {
                tracing::info!(path = %file.path.display(), server = %settings.server, "programs on this host ask the resolver");
                if turns.taken(Instant::now()) {
                    tracing::warn!(path = %file.path.display(), "another program keeps rewriting the file: leaving it alone for a minute. Configure that program to name {}, and set resolver.host = \"none\"", settings.server.ip());
                }
                complaint.clear();
            }
            Ok(false) => complaint.clear(),
            Err(error) => {
                // Said once, not at every look.
                let said = error.to_string();
                if said != complaint {
                    tracing::warn!(
                        error = said,
                        "programs on this host do not ask the resolver; the agent works without"
                    );
                    complaint = said;
                }
                let saved = file.clone();
                let _ = blocking(move || saved.save()).await;
            }
        }
    }
    restore(&file).await;
}

async fn restore(file: &ResolvConf) {
    let restored = file.clone();
    match blocking(move || restored.restore()).await {
        Ok(true) => tracing::info!(path = %file.path.display(), "the host's DNS is as it was"),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(%error, "cannot restore resolv.conf\nremedy: muster-agent doctor --fix");
        }
    }
}

/// Until told to stop, has systemd-resolved ask the resolver.
async fn through_resolved(settings: &Settings, tried: &Notify, mut stopped: watch::Receiver<bool>) {
    let mut pulse = Pulse::new(settings.server);
    let mut complaint = String::new();
    loop {
        let error = match tell_resolved(settings, &mut pulse, tried, &mut stopped).await {
            Ok(()) => return,
            Err(error) => error.to_string(),
        };
        tried.notify_one();
        if error != complaint {
            tracing::warn!(
                error,
                "systemd-resolved does not ask the resolver; the agent works without, and tries again"
            );
            complaint = error;
        }
        tokio::select! {
            () = told(&mut stopped) => return,
            () = sleep(RETRY) => {}
        }
    }
}

async fn tell_resolved(
    settings: &Settings,
    pulse: &mut Pulse,
    tried: &Notify,
    stopped: &mut watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let resolved = Resolved::connect(&settings.paths.bus).await?;
    let mut changes = resolved.changes().await?;
    let mut link: Option<Link> = None;
    loop {
        if pulse.alive && link.is_none() {
            let told = Link {
                index: interface_index(&settings.interface)?,
                server: settings.server,
                domains: resolved::domains(&settings.domain, &settings.routes, &settings.search),
            };
            resolved.apply(&told).await?;
            tried.notify_one();
            tracing::info!(
                interface = settings.interface,
                domain = settings.domain,
                "systemd-resolved asks the resolver for the network's names"
            );
            link = Some(told);
        }
        tokio::select! {
            () = told(stopped) => break,
            change = changes.next() => {
                let message = change.transpose()?;
                let message = message.ok_or_else(|| anyhow::anyhow!("the system bus has gone"))?;
                let (_, _, owner): (String, String, String) = message.body().deserialize()?;
                if owner.is_empty() {
                    tracing::info!("systemd-resolved has stopped");
                } else {
                    tracing::info!("systemd-resolved has started");
                    link = None;
                }
            }
            alive = pulse.changed() => {
                if let (false, Some(told)) = (alive, link.take()) {
                    tracing::warn!(server = %settings.server, "the resolver does not answer: systemd-resolved goes without it");
                    resolved.revert(told.index).await?;
                }
            }
        }
    }
    if let Some(told) = link
        && let Err(error) = resolved.revert(told.index).await
    {
        // It forgets with the interface.
        tracing::debug!(%error, "cannot revert the interface");
    }
    Ok(())
}

/// Waits to be told to stop.
async fn told(stopped: &mut watch::Receiver<bool>) {
    // Without the hook nobody can tell any more.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

fn interface_index(name: &str) -> anyhow::Result<i32> {
    // Any socket will do to ask with.
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let index = rustix::net::netdevice::name_to_index(&socket, name);
    let index = index.map_err(|error| anyhow::anyhow!("there is no interface {name}: {error}"))?;
    Ok(i32::try_from(index)?)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
