//! Waiting for what arrives in the run loop, where there may be nobody yet that it could come from.

use std::net::SocketAddr;

use tokio::sync::{mpsc, oneshot, watch};

use crate::port_mapping::PortMapping;

/// The next of what comes, if anything can.
pub(super) async fn receive<T>(receiver: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => None,
    }
}

/// What the gateway maps to the tunnel, once that has changed.
pub(super) async fn mapping(port_mapping: &mut Option<PortMapping>) -> Option<SocketAddr> {
    match port_mapping {
        Some(port_mapping) => port_mapping.changed().await,
        None => None,
    }
}

/// The next change, if there can be any.
pub(super) async fn change<T>(receiver: &mut Option<watch::Receiver<T>>) -> Option<()> {
    receiver.as_mut()?.changed().await.ok()
}

/// What comes once.
pub(super) async fn completion<T>(receiver: &mut Option<oneshot::Receiver<T>>) -> Option<T> {
    let outcome = receiver.as_mut()?.await.ok();
    *receiver = None;
    outcome
}
