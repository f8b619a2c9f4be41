//! A port of the host's gateway that leads to the tunnel, so that peers reach a device behind a NAT without being
//! introduced: asked for by PCP, NAT-PMP or UPnP, renewed while the agent runs, and given back when it stops. IPv4 only.

mod gateway;
mod plan;
mod protocols;

use std::{collections::BTreeMap, net::SocketAddr, num::NonZeroU16, sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use muster_common::time::Instant;
use tokio::{
    sync::{Notify, oneshot, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

use self::{
    plan::Plan,
    protocols::{Asker, Held},
};
pub use self::{
    plan::{Gateway, Outcome, Protocol},
    protocols::external_address,
};

/// Timers do not run while the host is suspended, so nothing sleeps for longer than this.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// How long giving back a mapping may take.
const GIVE_BACK: Duration = Duration::from_secs(2);

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Whom is asked.
    pub gateway: Option<Gateway>,
    /// What is mapped, and by which protocol.
    pub mapping: Option<(Protocol, SocketAddr)>,
    /// What came of each protocol last; nothing of those that were not needed.
    pub outcomes: BTreeMap<Protocol, Outcome>,
}

/// The task that does it.
#[derive(Debug)]
pub struct PortMapping {
    view: watch::Receiver<View>,
    suspicion: Arc<Notify>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl PortMapping {
    /// Has the gateway's mapping lead to UDP port `port` of this host; `secret` is the device's own. Without a
    /// connection to the kernel's routing there is nothing to be had.
    pub async fn start(port: u16, secret: &[u8; 32]) -> Option<Self> {
        let asker = Asker { port: NonZeroU16::new(port)?, nonce: nonce(secret) };
        let gateways = match gateway::watch().await {
            Ok(gateways) => gateways,
            Err(error) => {
                tracing::warn!(%error, "no port mapping");
                return None;
            }
        };
        let (views, view) = watch::channel(View::default());
        let (stop, stopped) = oneshot::channel();
        let suspicion = Arc::<Notify>::default();
        let task = tokio::spawn(work(asker, gateways, Arc::clone(&suspicion), views, stopped));
        Some(Self { view, suspicion, stop, task })
    }

    /// Waits until something has changed, and says what is mapped now. Safe to be dropped before it is ready.
    pub async fn changed(&mut self) -> Option<SocketAddr> {
        if self.view.changed().await.is_err() {
            // The task has ended; that is no reason to go round in circles.
            std::future::pending::<()>().await;
        }
        self.view.borrow_and_update().mapping.map(|(_, external)| external)
    }

    /// By which protocol there is a mapping.
    pub fn protocol(&self) -> Option<Protocol> {
        self.view.borrow().mapping.map(|(protocol, _)| protocol)
    }

    /// How it stands.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// This host is seen at another address from outside: the gateway may have forgotten the mapping.
    pub fn recheck(&self) {
        self.suspicion.notify_one();
    }

    /// Gives back what is mapped.
    pub async fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.task.await;
    }
}

/// The same at each start: a gateway refuses to renew or change what was mapped under another (RFC 6887, 11.3), and an
/// agent that was killed has given back nothing.
fn nonce(secret: &[u8; 32]) -> [u32; 3] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let tag = hmac::sign(&key, b"muster port mapping nonce");
    let mut words =
        tag.as_ref().chunks_exact(4).filter_map(|word| Some(u32::from_be_bytes(word.try_into().ok()?)));
    std::array::from_fn(|_| words.next().unwrap_or_default())
}

async fn work(
    asker: Asker,
    mut gateways: watch::Receiver<Option<Gateway>>,
    suspicion: Arc<Notify>,
    views: watch::Sender<View>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut plan = Plan::default();
    let mut held: Option<Held> = None;
    let mut watched = true;
    plan.set_gateway(*gateways.borrow_and_update(), Instant::now());
    loop {
        let now = Instant::now();
        let question = plan.poll(now);
        if plan.mapping().is_none() {
            held = None;
        }
        publish(&views, &plan);
        let pause = plan.timeout().map_or(LONGEST_SLEEP, |at| (at - now).min(LONGEST_SLEEP));
        let answer = async {
            match question {
                Some((protocol, gateway)) => (protocol, asker.map(protocol, gateway, held.as_ref()).await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            (protocol, answer) = answer => {
                let answer = match answer {
                    Ok((lease, new)) => {
                        held = Some(new);
                        Ok(lease)
                    }
                    Err(reason) => {
                        tracing::debug!(protocol = protocol.as_str(), reason, "no port mapping");
                        Err(reason)
                    }
                };
                plan.answered(protocol, answer, Instant::now());
            }
            changed = gateways.changed(), if watched => {
                watched = changed.is_ok();
                plan.set_gateway(*gateways.borrow_and_update(), Instant::now());
            }
            () = suspicion.notified(), if question.is_none() => plan.recheck(Instant::now()),
            _ = &mut stopped => break,
            () = sleep(pause), if question.is_none() => {}
        }
    }
    if let Some(held) = held {
        match timeout(GIVE_BACK, held.give_back()).await {
            Ok(Ok(())) => tracing::debug!("port mapping given back"),
            Ok(Err(reason)) => tracing::debug!(reason, "cannot give back the port mapping"),
            Err(_) => tracing::debug!("the gateway does not take back the port mapping"),
        }
    }
}

fn publish(views: &watch::Sender<View>, plan: &Plan) {
    let new = View { gateway: plan.gateway(), mapping: plan.mapping(), outcomes: plan.outcomes().clone() };
    views.send_if_modified(|old| {
        if new.mapping != old.mapping {
            match new.mapping {
                Some((protocol, external)) => {
                    tracing::info!(%external, protocol = protocol.as_str(), "the gateway maps a port to the tunnel");
                }
                None => tracing::info!("the gateway maps no port to the tunnel any more"),
            }
        }
        let is_changed = *old != new;
        *old = new;
        is_changed
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_keeps_its_nonce_and_shares_it_with_nobody() {
        assert_eq!(nonce(&[1; 32]), nonce(&[1; 32]));
        assert_ne!(nonce(&[1; 32]), nonce(&[2; 32]));
        assert!(nonce(&[1; 32]).iter().all(|word| *word != 0));
    }
}
