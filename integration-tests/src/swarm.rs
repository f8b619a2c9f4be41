//! The control planes of many agents in one process: they join, register and hold sessions over real mutual TLS, and take
//! what the registrar tells of virtual IPs. They have no data plane.

use std::{sync::Arc, time::Duration};

use muster_common::time::Instant;
use muster_proto::registration::{
    SessionHello, SessionRequest, SessionResponse, WatchVirtualServices, session_request, session_response,
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use crate::{
    device::{Device, Error, register_request},
    muster::JoinCommand,
};

/// Agents that join at a time.
const JOINING: usize = 32;
/// For this long without anything new, those that have not been told are waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// An agent has been told of the virtual IPs as of a revision.
struct Told {
    agent: usize,
    revision: u64,
    at: Instant,
}

/// Agents that run until this is dropped.
pub struct Swarm {
    told: mpsc::UnboundedReceiver<Result<Told, Error>>,
    /// By agent, the revision that it was last told of.
    revisions: Vec<u64>,
    _agents: JoinSet<()>,
}

impl Swarm {
    /// Has agents join as `swarm0` and so on, with a token that serves them all.
    pub fn start(join: &JoinCommand, agents: usize) -> Self {
        let joining = Arc::new(Semaphore::new(JOINING));
        let (sender, told) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        for agent in 0..agents {
            let (join, joining, sender) = (join.clone(), joining.clone(), sender.clone());
            tasks.spawn(async move {
                let Err(error) = run(agent, &join, &joining, &sender).await;
                let _nobody_asks = sender.send(Err(format!("agent {agent} of the swarm: {error}").into()));
            });
        }
        Self { told, revisions: vec![0; agents], _agents: tasks }
    }

    /// Waits until all have been told of the virtual IPs as of `revision`; returns when the last one was.
    ///
    /// # Errors
    /// If a session has ended, or nobody is told of anything for two minutes.
    pub async fn all_told(&mut self, revision: u64) -> Result<Instant, Error> {
        let mut last = Instant::now();
        let mut waiting = self.revisions.iter().filter(|told| **told < revision).count();
        while waiting > 0 {
            let told = tokio::time::timeout(PATIENCE, self.told.recv()).await;
            let told = told.map_err(|_| format!("{waiting} agents are not told of revision {revision}"))?;
            let told = told.ok_or("the swarm has ended")??;
            if let Some(known) = self.revisions.get_mut(told.agent) {
                waiting -= usize::from(*known < revision && revision <= told.revision);
                *known = told.revision;
                last = told.at;
            }
        }
        Ok(last)
    }
}

/// One agent; it ends with an error alone.
async fn run(
    agent: usize,
    join: &JoinCommand,
    joining: &Semaphore,
    sender: &mpsc::UnboundedSender<Result<Told, Error>>,
) -> Result<std::convert::Infallible, Error> {
    let permit = joining.acquire().await?;
    let device = Device::join(join, &format!("swarm{agent}")).await?;
    let mut client = device.connect().await?;
    client.register(register_request(agent as u64 + (1 << 40), u32::try_from(agent)?)).await?;
    let hello =
        SessionHello { watch_virtual_services: Some(WatchVirtualServices::default()), ..Default::default() };
    // Kept, so that the session stays open.
    let (requests, stream) = mpsc::channel(1);
    requests.send(SessionRequest { message: Some(session_request::Message::Hello(hello)) }).await?;
    let mut session = client.session(ReceiverStream::new(stream)).await?.into_inner();
    drop(permit);
    while let Some(SessionResponse { message }) = session.next().await.transpose()? {
        if let Some(session_response::Message::VirtualServicesChanged(changed)) = message
            && changed.revision > 0
        {
            sender.send(Ok(Told { agent, revision: changed.revision, at: Instant::now() }))?;
        }
    }
    drop(requests);
    Err("the registrar has ended its session".into())
}
