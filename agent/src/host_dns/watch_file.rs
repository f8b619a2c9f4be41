//! Tells when somebody may have changed a file: by inotify on it and its directory, or else by looking now and then.

use std::{mem::MaybeUninit, os::fd::OwnedFd, path::Path, time::Duration};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::{
    io::unix::AsyncFd,
    time::{sleep, timeout},
};

/// After the first sign of a change, so that whoever writes may finish.
const SETTLE: Duration = Duration::from_millis(100);
/// How often to look although there was no sign.
const LOOK: Duration = Duration::from_secs(30);
/// How often to look where there can be no sign.
const LOOK_BLIND: Duration = Duration::from_secs(2);

/// See the module.
pub(super) struct Watch(Option<AsyncFd<OwnedFd>>);

impl Watch {
    /// Watches nothing yet.
    pub(super) fn new() -> Self {
        let inotify =
            inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(std::io::Error::from);
        #[expect(
            deprecated,
            reason = "the descriptor is owned, and closed after its registration; the successor is unsafe"
        )]
        let inotify = inotify.and_then(AsyncFd::new);
        Self(
            inotify
                .inspect_err(|error| tracing::debug!(%error, "no inotify: looking at resolv.conf every 2 s"))
                .ok(),
        )
    }

    /// Watches `path`, and what it links to. Files come and go: call it before each look.
    pub(super) fn follow(&self, path: &Path) {
        let Some(inotify) = &self.0 else { return };
        let entries = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE;
        let content = WatchFlags::CLOSE_WRITE | WatchFlags::MODIFY | WatchFlags::MOVE_SELF;
        let target = path.canonicalize().ok();
        let directories = [Some(path), target.as_deref()].into_iter().flatten().filter_map(Path::parent);
        for directory in directories {
            // What cannot be watched is looked at.
            let _ = inotify::add_watch(inotify.get_ref(), directory, entries);
        }
        if let Some(target) = target {
            let _ = inotify::add_watch(inotify.get_ref(), target, content);
        }
    }

    /// Waits until it is time for a look.
    pub(super) async fn changed(&self) {
        let Some(inotify) = &self.0 else { return sleep(LOOK_BLIND).await };
        // The sign itself does not matter.
        let Ok(Ok(mut ready)) = timeout(LOOK, inotify.readable()).await else { return };
        sleep(SETTLE).await;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(inotify.get_ref(), &mut buffer);
        while events.next().is_ok() {}
        ready.clear_ready();
    }
}
