//! The control planes of many agents in one process, each with the control core and the connection of a real agent: they
//! join, register and hold sessions over real mutual TLS. They have no data plane.

mod agent;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use muster_agent::control::{LookupBy, RegistrarStatus};
use muster_common::time::Instant;
use muster_proto::registration::Peer;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};

use self::agent::{Agent, Order};
use crate::{
    Result as Checked,
    device::{Device, Error},
    failed,
    muster::JoinCommand,
};

/// Agents that join at a time.
const JOINING: usize = 32;
/// For this long without anything new, those that are missing are waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two lookups of a name that is not there yet.
const AGAIN: Duration = Duration::from_millis(2);

/// What all agents share.
struct Shared {
    join: JoinCommand,
    news: mpsc::UnboundedSender<News>,
    /// Messages that have come on sessions.
    messages: AtomicU64,
}

/// Something has happened at an agent.
struct News {
    agent: usize,
    at: Instant,
    what: What,
}

enum What {
    /// Its session is open, or has ended.
    Connected(bool),
    /// It has been told of the virtual IPs as of a revision.
    Told(u64),
    /// A peer that it holds has these endpoints now.
    Changed(Vec<SocketAddr>),
    /// It could not join.
    Failed(Error),
}

/// What is known of an agent.
#[derive(Clone, Copy, Default)]
struct Known {
    is_connected: bool,
    revision: u64,
}

/// Agents that run until this is dropped.
pub struct Swarm {
    shared: Arc<Shared>,
    news: mpsc::UnboundedReceiver<News>,
    known: Vec<Known>,
    members: Vec<Member>,
    tasks: JoinSet<()>,
}

/// One agent of a swarm, to give orders to.
#[derive(Clone)]
pub struct Member {
    orders: mpsc::UnboundedSender<Order>,
    number: usize,
}

impl Swarm {
    /// Has agents join as `swarm0` and so on, with a token that serves them all.
    pub fn start(join: &JoinCommand, agents: usize) -> Self {
        let (sender, news) = mpsc::unbounded_channel();
        let shared = Shared { join: join.clone(), news: sender, messages: AtomicU64::new(0) };
        let (known, members, tasks) = (Vec::new(), Vec::new(), JoinSet::new());
        let mut swarm = Self { shared: Arc::new(shared), news, known, members, tasks };
        let joining = Arc::new(Semaphore::new(JOINING));
        for _ in 0..agents {
            swarm.add_after(Some(Arc::clone(&joining)));
        }
        swarm
    }

    /// Has one more agent join, at once.
    pub fn add(&mut self) -> Member {
        self.add_after(None)
    }

    fn add_after(&mut self, joining: Option<Arc<Semaphore>>) -> Member {
        let (orders, receiver) = mpsc::unbounded_channel();
        let member = Member { orders, number: self.members.len() };
        let (shared, name, number) = (Arc::clone(&self.shared), member.name(), member.number);
        self.tasks.spawn(async move {
            let become_agent = async {
                let permit = match joining {
                    Some(joining) => Some(joining.acquire_owned().await?),
                    None => None,
                };
                let device = Device::join(&shared.join, &name).await?;
                let registrar = shared.join.option("registrar").unwrap_or_default();
                Agent::new(number, &device, registrar, Arc::clone(&shared), receiver, permit)
            };
            match become_agent.await {
                Ok(agent) => agent.run().await,
                Err(error) => {
                    let what = What::Failed(format!("{name}: {error}").into());
                    let _nobody_listens = shared.news.send(News { agent: number, at: Instant::now(), what });
                }
            }
        });
        self.known.push(Known::default());
        self.members.push(member.clone());
        member
    }

    /// The agents, in the order in which they were made.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Messages that have come on all sessions so far.
    pub fn messages(&self) -> u64 {
        self.shared.messages.load(Ordering::Relaxed)
    }

    /// Waits until all have been told of the virtual IPs as of `revision`; returns when the last one was.
    ///
    /// # Errors
    /// If an agent could not join, or there is nothing new for two minutes.
    pub async fn all_told(&mut self, revision: u64) -> Result<Instant, Error> {
        self.until(&format!("agents are not told of revision {revision}"), |known| revision <= known.revision)
            .await
    }

    /// Waits until the sessions of all are open; returns when the last one was.
    ///
    /// # Errors
    /// As [`Self::all_told`].
    pub async fn all_connected(&mut self) -> Result<Instant, Error> {
        self.until("agents are not connected", |known| known.is_connected).await
    }

    /// Waits until the sessions of all have ended.
    ///
    /// # Errors
    /// As [`Self::all_told`].
    pub async fn all_disconnected(&mut self) -> Result<Instant, Error> {
        self.until("agents are still connected", |known| !known.is_connected).await
    }

    async fn until(&mut self, missing: &str, is_there: impl Fn(&Known) -> bool) -> Result<Instant, Error> {
        let mut last = Instant::now();
        let mut waiting = self.known.iter().filter(|known| !is_there(known)).count();
        while waiting > 0 {
            let (before, news) = self.next(|| format!("{waiting} {missing}")).await?;
            let after = self.known.get(news.agent).copied().unwrap_or_default();
            match (is_there(&before), is_there(&after)) {
                (false, true) => (waiting, last) = (waiting - 1, news.at),
                (true, false) => waiting += 1,
                _ => {}
            }
        }
        Ok(last)
    }

    /// Waits until `holders` agents have been told of a peer that is at `endpoint` now; returns when each of them was.
    ///
    /// # Errors
    /// As [`Self::all_told`].
    pub async fn told_of(&mut self, endpoint: SocketAddr, holders: usize) -> Result<Vec<Instant>, Error> {
        let mut times = Vec::new();
        while times.len() < holders {
            let missing = holders - times.len();
            let (_, news) = self.next(|| format!("{missing} agents are not told of {endpoint}")).await?;
            if let What::Changed(endpoints) = news.what
                && endpoints.contains(&endpoint)
            {
                times.push(news.at);
            }
        }
        Ok(times)
    }

    /// The next news, and what was known of the agent before.
    async fn next(&mut self, missing: impl Fn() -> String) -> Result<(Known, News), Error> {
        let news = tokio::time::timeout(PATIENCE, self.news.recv()).await.map_err(|_| missing())?;
        let news = news.ok_or("the swarm has ended")?;
        let known = self.known.get_mut(news.agent).ok_or("there is no such agent")?;
        let before = *known;
        match news.what {
            What::Connected(is_connected) => known.is_connected = is_connected,
            What::Told(revision) => known.revision = revision,
            What::Changed(_) => {}
            What::Failed(error) => return Err(error),
        }
        Ok((before, news))
    }
}

impl Member {
    /// The name that it joins with.
    pub fn name(&self) -> String {
        format!("swarm{}", self.number)
    }

    /// Its first virtual address, once its session is open.
    ///
    /// # Errors
    /// If it could not join.
    pub async fn address(&self) -> Result<IpAddr, Error> {
        self.ask(Order::Address).await
    }

    /// Has it send a packet to `address`; returns when its data plane knew the peer. One that it holds already is no
    /// reason to ask anybody.
    ///
    /// # Errors
    /// If its data plane was told that there is no such device.
    pub async fn reach(&self, address: IpAddr) -> Result<Instant, Error> {
        self.ask(|answer| Order::Reach(LookupBy::Address(address), answer)).await?
    }

    /// Has a handshake come from `caller`; returns when its data plane knew the peer. One that has been introduced is no
    /// reason to ask anybody.
    ///
    /// # Errors
    /// If its data plane was told that there is no such device.
    pub async fn called_by(&self, caller: &Self) -> Result<Instant, Error> {
        let key = agent::public_key(caller.number)?;
        self.ask(|answer| Order::Reach(LookupBy::PublicKey(key), answer)).await?
    }

    /// Has its data plane find the peer at `address` idle, so that it is forgotten.
    pub fn forget(&self, address: IpAddr) {
        let _has_ended = self.orders.send(Order::Forget(address));
    }

    /// Looks up the device `name` over its connection, again and again until it is there.
    ///
    /// # Errors
    /// If the registrar says anything else than that there is no such device.
    pub async fn find(&self, name: &str) -> Result<Peer, Error> {
        loop {
            let error = match self.ask(|answer| Order::Find(name.to_owned(), answer)).await? {
                Ok(peer) => return Ok(peer),
                Err(error) => error,
            };
            let status = error.downcast_ref::<tonic::Status>();
            if status.is_none_or(|status| status.code() != tonic::Code::NotFound) {
                return Err(error);
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// The host has one more address beside the one that it always has; returns where its tunnel is reached there.
    pub fn also_at(&self, address: IpAddr) -> SocketAddr {
        let home = agent::home(self.number);
        let also = SocketAddr::new(address, home.port());
        let _has_ended = self.orders.send(Order::Endpoints(vec![home, also]));
        also
    }

    /// How it stands with its registrar.
    ///
    /// # Errors
    /// If it could not join.
    pub async fn status(&self) -> Result<RegistrarStatus, Error> {
        self.ask(Order::Status).await
    }

    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let ended = || Error::from(format!("{} has ended", self.name()));
        self.orders.send(order(answer)).map_err(|_| ended())?;
        answered.await.map_err(|_| ended())
    }
}

/// Lets this process, and those that it starts, have `files` open at a time.
///
/// # Errors
/// If the system does not allow so many.
pub fn allow_open_files(files: u64) -> Checked {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= files) {
        return Ok(());
    }
    // Root may go beyond the hard limit.
    let maximum = maximum.map(|maximum| maximum.max(files));
    let needed = Rlimit { current: maximum.or(Some(files)), maximum };
    setrlimit(Resource::Nofile, needed).map_err(|error| {
        failed("having many connections", format!("{error}; run `ulimit -Hn {files}` before"))
    })
}
