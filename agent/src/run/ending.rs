//! What the local API asks of the run loop, and how the run loop ends: told to stop, or having left the network.

use std::sync::Arc;

use muster_proto::agent::LeaveResponse;
use tokio::sync::oneshot;

use super::{API_GRACE, Agent, End, Inputs};
use crate::{
    local_api::Query,
    port_mapping::PortMapping,
    service_list::Registrar,
    session::{self, DeregisterError},
    state::Peers,
    writer::Write,
};

impl Agent {
    pub(super) fn answer(&mut self, query: Query, inputs: &mut Inputs) {
        match query {
            // Whoever asked may have gone.
            Query::Status(answer) => drop(answer.send(self.status())),
            Query::Netcheck(answer) => {
                let port_mapping = inputs.port_mapping.as_ref().map(PortMapping::view);
                let _ = answer.send(self.surroundings(port_mapping));
            }
            Query::Registrar(answer) => {
                let status = self.control.registrar();
                let namespace = self.control.settings().map_or(&self.identity.namespace, |s| &s.namespace);
                let _ = answer.send(Registrar {
                    channel: inputs.session.channel(),
                    refused: status.refused,
                    last_error: status.last_error,
                    namespace: namespace.clone(),
                });
            }
            Query::Leave { answer, .. } if self.leave.is_some() => {
                let _ = answer.send(Err("the device is leaving already".into()));
            }
            Query::Leave { force, answer } => {
                tracing::info!(force, "leaving the network");
                self.leave = Some((force, answer));
                let (done, leaving) = oneshot::channel();
                inputs.leaving = Some(leaving);
                let (channel, tls) = (inputs.session.channel(), Arc::clone(&self.tls));
                let registrars = self.registrars();
                self.tasks.spawn(async move {
                    let _ = done.send(session::deregister(channel, &registrars, &tls).await);
                });
            }
        }
    }

    fn registrars(&self) -> Vec<String> {
        let known = self.control.settings().map(|s| s.registrars.clone()).unwrap_or_default();
        known.into_iter().chain([self.identity.registrar.clone()]).collect()
    }

    /// The registrar has been told, or not. `None` if the device stays.
    pub(super) fn left(&mut self, result: Result<(), DeregisterError>) -> Option<End> {
        let force = self.leave.as_ref().is_some_and(|(force, _)| *force);
        match result {
            Ok(()) => Some(End::Left { deregistered: true }),
            Err(error) if force => {
                tracing::warn!(%error, "leaving although the registrar could not be told");
                Some(End::Left { deregistered: false })
            }
            Err(error) => {
                if let Some((_, answer)) = self.leave.take() {
                    let remedy = "try again later, or leave all the same with --force; the operator then deletes the device";
                    let _ = answer.send(Err(format!("cannot leave: {error}\nremedy: {remedy}")));
                }
                None
            }
        }
    }

    /// Takes everything down in order, and tells whoever asked for it.
    pub(super) async fn finish(mut self, end: anyhow::Result<End>) -> anyhow::Result<()> {
        let left = match &end {
            Ok(End::Left { deregistered }) => Some(*deregistered),
            _ => None,
        };
        if left.is_none() {
            self.save_names();
            let (epoch, revision, peers) = self.control.held_peers();
            self.writer.write(Write::Peers(Peers { epoch, revision, peers }));
        }
        if let Some(virtual_ips) = self.virtual_ips.take() {
            virtual_ips.stop().await;
        }
        self.host.remove().await;
        let writer = self.writer;
        let _ = tokio::task::spawn_blocking(move || drop(writer)).await;
        let removed = if left.is_some() { self.state.remove().map_err(anyhow::Error::from) } else { Ok(()) };
        if let Some((_, answer)) = self.leave {
            let _ = answer.send(match (left, &removed) {
                (Some(deregistered), Ok(())) => Ok(LeaveResponse { deregistered }),
                (Some(_), Err(error)) => Err(error.to_string()),
                (None, _) => Err("the agent was stopped before the registrar answered".into()),
            });
        }
        drop(self.stop_api);
        let _ = tokio::time::timeout(API_GRACE, self.api).await;
        tracing::info!("stopped");
        end.map(drop).and(removed)
    }
}
