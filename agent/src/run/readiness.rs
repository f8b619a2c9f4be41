//! Whether the agent is ready, for systemd and for health checks.

use std::time::Duration;

use muster_common::time::Instant;
use sd_notify::NotifyState;

use super::Agent;

/// With addresses from disk and no registrar, the agent is ready after this: the names it knows are answered.
const READY_WITHOUT_REGISTRAR: Duration = Duration::from_secs(3);

impl Agent {
    /// When the agent counts as ready although no registrar has answered for its names.
    pub(super) fn ready_at(&self) -> Option<Instant> {
        let waits = !self.names_resolve && self.control.settings().is_some() && !self.control.is_connected();
        waits
            .then(|| self.control.registrar().since + READY_WITHOUT_REGISTRAR)
            .filter(|at| *at > Instant::now())
    }

    pub(super) fn update_readiness(&mut self) {
        let registrar = self.control.registrar();
        let patience_over =
            !registrar.connected && Instant::now() - registrar.since >= READY_WITHOUT_REGISTRAR;
        // Who has been told that names resolve as far as they can is not told otherwise once a registrar is there.
        let names = self.names_resolve || patience_over || self.notified;
        let ready = self.control.settings().is_some() && names && !registrar.refused;
        if ready != self.readiness.get() {
            self.readiness.set(ready);
            tracing::info!(ready, "readiness");
        }
        if ready && !self.notified {
            self.notified = true;
            let _ = sd_notify::notify(&[NotifyState::Ready]);
        }
    }
}
