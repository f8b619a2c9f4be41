//! Ctrl-C and SIGTERM: the benchmark ends after the turn that it is in, and cleans up.

use std::sync::atomic::{AtomicBool, Ordering};

use muster_integration_tests::{LabError, Result};
use tokio::signal::unix::{SignalKind, signal};

static STOPPED: AtomicBool = AtomicBool::new(false);

/// Listens for both signals from now on.
pub(crate) fn listen() {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            STOPPED.store(true, Ordering::Relaxed);
            // Turns are short; whoever asks again does not want to wait.
            std::future::pending::<()>().await;
        });
    });
}

/// An error once a signal has come.
pub(crate) fn check() -> Result {
    if STOPPED.load(Ordering::Relaxed) {
        return Err(LabError::Command {
            command: "bench-tunnel".into(),
            reason: "stopped by a signal".into(),
        });
    }
    Ok(())
}
