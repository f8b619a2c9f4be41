//! An orderly end: agents are sent elsewhere first, then what is under way is finished.

use std::time::Duration;

use tokio::{task::JoinSet, time};
use tokio_util::sync::CancellationToken;

use super::systemd;
use crate::session::Hub;

/// What the task that balances returns: it ends when draining begins.
pub(super) const BALANCE: &str = "the balance of sessions";
/// What the task that serves gRPC returns.
pub(super) const GRPC: &str = "gRPC";

/// How long requests that are under way may take to finish.
const FINISH: Duration = Duration::from_secs(5);
/// How long agents have that have nowhere to go: they only need to hear of it.
const ALONE: Duration = Duration::from_millis(500);
/// Between looks whether any session is left.
const LOOK: Duration = Duration::from_millis(50);

/// Ends all sessions, then gRPC, then everything in `tasks`. `again` cuts the waiting short.
pub(super) async fn drain(
    within: Duration,
    hub: &Hub,
    stop: &CancellationToken,
    tasks: &mut JoinSet<&'static str>,
    again: impl Future<Output = &'static str>,
) {
    let elsewhere = hub.registry().read().registrars().running().len() > 1;
    let within = if elsewhere { within } else { within.min(ALONE) };
    systemd::stopping(within + 2 * FINISH);
    hub.drain(within);
    let gone = async {
        while !hub.is_empty() {
            time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        _ = time::timeout(within, gone) => {}
        signal = again => tracing::info!(signal, "not waiting any longer"),
    }
    hub.shutdown();
    stop.cancel();
    let finished = async {
        while let Some(ended) = tasks.join_next().await {
            if matches!(ended, Ok(GRPC)) {
                return;
            }
        }
    };
    if time::timeout(FINISH, finished).await.is_err() {
        tracing::warn!("some gRPC requests did not finish in time");
    }
    tasks.shutdown().await;
}
