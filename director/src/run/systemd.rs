//! What the director tells systemd, if it was started by it (`Type=notify`).

use std::time::Duration;

use sd_notify::NotifyState;

/// All sockets are open.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// The shutdown has begun, and may take so long.
pub(super) fn stopping(within: Duration) {
    let within = u32::try_from(within.as_micros()).unwrap_or(u32::MAX);
    notify(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(within)]);
}

/// Tells the watchdog, as often as it wants to hear it, that the runtime still runs.
pub(super) async fn watchdog() {
    let Some(timeout) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut ticks = tokio::time::interval(timeout / 2);
    loop {
        ticks.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "cannot notify systemd");
    }
}
