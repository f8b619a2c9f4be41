//! Virtual IPs of Services on this host: what the registrar tells of them, which endpoint each is translated to, and the
//! table of nftables that does it, kept by a thread of its own.

mod conntrack;
pub mod known;
mod metrics;
pub mod ruleset;
pub mod table;
mod worker;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use muster_common::telemetry;
use muster_proto::registration::{VirtualServicesChanged, WatchVirtualServices};
use prost::Message as _;
use tokio::{io::unix::AsyncFd, sync::watch};

use self::{
    known::Known,
    metrics::Metrics,
    ruleset::Ruleset,
    table::Place,
    worker::{Input, Worker},
};
use crate::{
    nftables::{NftablesError, Socket},
    writer::Writer,
};

/// Between looks at what others do to nftables.
const LISTEN_INTERVAL: Duration = Duration::from_millis(100);

/// Why there are no virtual IPs.
#[derive(Debug, thiserror::Error)]
pub enum VirtualIpError {
    /// nftables cannot be spoken to.
    #[error(transparent)]
    Nftables(#[from] NftablesError),
    /// There is no thread.
    #[error("cannot start the thread that keeps virtual IPs: {0}")]
    Thread(#[source] io::Error),
}

/// What there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Virtual IPs, each with a port and protocol.
    pub frontends: usize,
    /// The endpoints that all of them have together.
    pub endpoints: usize,
    /// Why the kernel does not have them; empty if it does.
    pub error: String,
}

/// The thread. Dropping it removes the table.
#[derive(Debug)]
pub struct VirtualIps {
    view: Arc<Mutex<View>>,
    inputs: mpsc::Sender<Input>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread begins with, and what it tells.
#[derive(Debug)]
pub struct Started {
    /// The thread.
    pub virtual_ips: VirtualIps,
    /// Up to where the registrar's Services are known, from disk.
    pub known: WatchVirtualServices,
    /// Changes when all of them have to be asked for anew.
    pub lost: watch::Receiver<u64>,
}

impl VirtualIps {
    /// Starts with what is on disk (`stored`); nothing is translated before [`Self::move_to`] is called. Has to be called
    /// from within a tokio runtime.
    ///
    /// # Errors
    /// If nftables cannot be used here.
    pub fn start(
        interface: &str,
        stored: Option<&[u8]>,
        writer: Arc<Writer>,
        registries: &telemetry::Metrics,
    ) -> Result<Started, VirtualIpError> {
        let (inputs, receiver) = mpsc::channel();
        let (lost_sender, lost) = watch::channel(0);
        let ruleset = Ruleset::new(interface);
        let socket = Socket::new(ruleset.name())?;
        let known = read(stored);
        let watch = known.watch();
        let listening = socket.changes().try_clone_to_owned().map_err(NftablesError::Socket)?;
        #[expect(
            deprecated,
            reason = "the descriptor is owned, and closed after its registration; the successor is unsafe"
        )]
        let events = AsyncFd::new(listening).map_err(NftablesError::Socket)?;
        tokio::spawn(listen(events, inputs.clone()));
        let (metrics, view) = (Metrics::register(registries), Arc::<Mutex<View>>::default());
        let worker =
            Worker::new(socket, receiver, known, ruleset, writer, metrics, view.clone(), lost_sender);
        let thread = std::thread::Builder::new().name("virtual-ips".into()).spawn(move || worker.run());
        let thread = Some(thread.map_err(VirtualIpError::Thread)?);
        Ok(Started { virtual_ips: Self { view, inputs, thread }, known: watch, lost })
    }

    /// Removes what an agent of this interface that was killed has left.
    ///
    /// # Errors
    /// If nftables cannot be used here.
    pub fn sweep(interface: &str) -> Result<(), VirtualIpError> {
        let mut ruleset = Ruleset::new(interface);
        Ok(Socket::new(ruleset.name())?.commit("remove what there is", ruleset.remove())?)
    }

    /// What there is at present.
    pub fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has the table removed, and waits until it is.
    pub async fn stop(self) {
        // The thread is joined in its drop.
        let _ = tokio::task::spawn_blocking(move || drop(self)).await;
    }

    /// The registrar has told of changes.
    pub fn take(&self, changed: VirtualServicesChanged) {
        self.tell(Input::Changed(Box::new(changed)));
    }

    /// The interface has these addresses now.
    pub fn move_to(&self, place: Place) {
        self.tell(Input::Place(place));
    }

    fn tell(&self, input: Input) {
        // The thread ends when this is dropped, and not before.
        let _ = self.inputs.send(input);
    }
}

impl Drop for VirtualIps {
    fn drop(&mut self) {
        self.tell(Input::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps virtual IPs has panicked");
        }
    }
}

/// What is known from disk; nothing if that cannot be used.
fn read(stored: Option<&[u8]>) -> Known {
    let mut known = Known::default();
    let Some(stored) = stored else { return known };
    let taken = match VirtualServicesChanged::decode(stored) {
        Ok(snapshot) => known.take(snapshot).map(drop).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match taken {
        Ok(()) => known,
        Err(error) => {
            tracing::warn!(error, "the Services on disk cannot be used; they come from the registrar");
            Known::default()
        }
    }
}

/// Tells the thread when its socket has something for it, until the thread ends.
async fn listen(events: AsyncFd<OwnedFd>, inputs: mpsc::Sender<Input>) {
    while let Ok(mut ready) = events.readable().await {
        ready.clear_ready();
        if inputs.send(Input::Readable).is_err() {
            return;
        }
        // A flood of changes by others is looked at now and then.
        tokio::time::sleep(LISTEN_INTERVAL).await;
    }
}
