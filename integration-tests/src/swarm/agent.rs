//! One agent of the swarm: the control core and the connection that every agent has, and a data plane that only
//! remembers who waits for what.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering},
};

use muster_agent::{
    control::{Action, Control, LookupBy, RegistrarStatus, Start},
    datapath::{Command, Event as Datapath, PeerConfig, PublicKey},
    run::is_registrar,
    session::{Event, Session},
};
use muster_common::{
    time::{self, Instant},
    tls::ALPN_H2,
};
use muster_proto::registration::{
    LookupRequest, Peer, WatchVirtualServices, lookup_request::By,
    registration_service_client::RegistrationServiceClient,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{News, Shared, What};
use crate::device::{Device, Error, register_request};

/// The first agent's number, as [`register_request`] has it: those of other devices are lower.
const FIRST: u64 = 1 << 40;

/// What an agent is to do.
pub(super) enum Order {
    /// Say what its first virtual address is, once it is connected.
    Address(oneshot::Sender<IpAddr>),
    /// A packet is to go to this address, or a handshake has come from this key: say when the data plane knew the peer.
    Reach(LookupBy, oneshot::Sender<Reached>),
    /// The peer with this address has been idle.
    Forget(IpAddr),
    /// Look up a name over the connection that there is, in the place of a resolver.
    Find(String, oneshot::Sender<Result<Peer, Error>>),
    /// The host has these addresses.
    Endpoints(Vec<SocketAddr>),
    /// Say how it stands with the registrar.
    Status(oneshot::Sender<RegistrarStatus>),
}

/// When the data plane had the peer; an error if it was told that there is no such device.
pub(super) type Reached = Result<Instant, Error>;

/// An agent at work.
pub(super) struct Agent {
    number: usize,
    shared: Arc<Shared>,
    control: Control,
    session: Session,
    orders: mpsc::UnboundedReceiver<Order>,
    is_connected: bool,
    /// Given back once it has been told of all virtual IPs: those of many Services take memory while they come.
    joining: Option<OwnedSemaphorePermit>,
    addressed: Vec<oneshot::Sender<IpAddr>>,
    expected: Vec<(LookupBy, oneshot::Sender<Reached>)>,
}

impl Agent {
    /// An agent of a device that has joined through `registrar`.
    pub(super) fn new(
        number: usize,
        device: &Device,
        registrar: &str,
        shared: Arc<Shared>,
        orders: mpsc::UnboundedReceiver<Order>,
        joining: Option<OwnedSemaphorePermit>,
    ) -> Result<Self, Error> {
        let start = Start {
            device_uid: device.enrolled.device_uid.clone(),
            public_key: public_key(number)?,
            agent_version: "swarm".into(),
            accepts_aes: true,
            registrar: registrar.to_owned(),
            private_endpoints: vec![home(number)],
            virtual_services: Some(WatchVirtualServices::default()),
            ..Start::default()
        };
        let tls = Arc::new(device.credentials.client_config(is_registrar, ALPN_H2)?);
        Ok(Self {
            number,
            shared,
            control: Control::new(start, number as u64, Instant::now()),
            session: Session::new(tls),
            orders,
            is_connected: false,
            joining,
            addressed: Vec::new(),
            expected: Vec::new(),
        })
    }

    /// Feeds the core, and does what it says, until nobody can give orders any more.
    pub(super) async fn run(mut self) {
        loop {
            self.perform();
            self.notice();
            let due = self.control.poll_timeout();
            tokio::select! {
                event = self.session.next() => self.handle(event),
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => return,
                },
                () = time::until(due) => {}
            }
            let now = Instant::now();
            if self.control.poll_timeout().is_some_and(|due| due <= now) {
                self.control.handle_timeout(now);
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Registered { attempt, result } => {
                self.control.handle_registered(attempt, result.map(|response| *response), now);
            }
            Event::Opened { attempt } => self.control.handle_session_opened(attempt, now),
            Event::Message { attempt, message } => {
                self.shared.messages.fetch_add(1, Ordering::Relaxed);
                self.control.handle_session_message(attempt, *message, now);
            }
            Event::Closed { attempt, failure } => self.control.handle_session_closed(attempt, failure, now),
            Event::LookedUp { id, result } => self.control.handle_looked_up(id, result, now),
            // No certificate ends during a benchmark.
            Event::Renewed(_) => {}
        }
    }

    fn perform(&mut self) {
        while let Some(action) = self.control.poll_action() {
            match action {
                Action::Register { attempt, registrar, request } => {
                    self.session.register(attempt, registrar, request);
                }
                Action::OpenSession { attempt, hello } => self.session.open(attempt, hello),
                Action::Send(message) => self.session.send(message),
                Action::Disconnect { attempt } => self.session.disconnect(attempt),
                Action::Lookup { id, by } => self.session.look_up(id, by),
                Action::Datapath(command) => self.tell_datapath(command),
                Action::VirtualServices(changed) => {
                    self.joining = None;
                    self.tell(What::Told(changed.revision));
                }
                // There is no interface, no resolver, no director and no disk.
                _ => {}
            }
        }
    }

    fn tell_datapath(&mut self, command: Command) {
        match command {
            Command::AddPeer(PeerConfig { public_key, virtual_addresses, .. }) => {
                let now = Instant::now();
                let is_it = |by| match by {
                    LookupBy::Address(address) => virtual_addresses.contains(&address),
                    LookupBy::PublicKey(key) => key == public_key,
                };
                self.answer(is_it, || Ok(now));
            }
            Command::UpdatePeer(PeerConfig { endpoints, .. }) => self.tell(What::Changed(endpoints)),
            Command::NoSuchDevice(address) => self.deny(LookupBy::Address(address)),
            Command::UnknownKey(key) => self.deny(LookupBy::PublicKey(key)),
            _ => {}
        }
    }

    fn obey(&mut self, order: Order) {
        let now = Instant::now();
        match order {
            Order::Address(answer) => self.addressed.push(answer),
            Order::Reach(by, answer) => {
                self.expected.push((by, answer));
                let wanted = match by {
                    LookupBy::Address(address) => Datapath::LookupAddress(address),
                    LookupBy::PublicKey(key) => Datapath::LookupKey(key),
                };
                self.control.handle_datapath(&wanted, now);
            }
            Order::Forget(address) => {
                let of = |peer: &PeerConfig| peer.virtual_addresses.contains(&address);
                let key = self.control.peers().map(|peer| &peer.config).find(|peer| of(peer));
                if let Some(key) = key.map(|peer| peer.public_key) {
                    self.control.handle_datapath(&Datapath::PeerIdle(key), now);
                }
            }
            Order::Find(name, answer) => self.find(name, answer),
            Order::Endpoints(endpoints) => self.control.handle_private_endpoints(endpoints, now),
            Order::Status(answer) => drop(answer.send(self.control.registrar())),
        }
    }

    fn find(&self, name: String, answer: oneshot::Sender<Result<Peer, Error>>) {
        let channel = self.session.channel();
        tokio::spawn(async move {
            let asking = async {
                let channel = channel.ok_or("it is not connected")?;
                let request = LookupRequest { by: Some(By::Name(name)) };
                let found = RegistrationServiceClient::new(channel).lookup(request).await?.into_inner();
                found.peer.ok_or_else(|| "the answer is empty".into())
            };
            let _nobody_asks = answer.send(asking.await);
        });
    }

    /// Answers those that wait for a peer that `is_it`.
    fn answer(&mut self, is_it: impl Fn(LookupBy) -> bool, outcome: impl Fn() -> Reached) {
        for (_, waiting) in self.expected.extract_if(.., |(by, _)| is_it(*by)) {
            let _nobody_waits = waiting.send(outcome());
        }
    }

    fn deny(&mut self, by: LookupBy) {
        self.answer(|waited| waited == by, || Err(format!("there is no {by:?}").into()));
    }

    /// Tells of connections that have come or gone.
    fn notice(&mut self) {
        let is_connected = self.control.is_connected();
        if is_connected != self.is_connected {
            self.is_connected = is_connected;
            self.tell(What::Connected(is_connected));
        }
        if is_connected
            && let Some(address) =
                self.control.settings().and_then(|s| s.virtual_addresses().first().copied())
        {
            for answer in self.addressed.drain(..) {
                let _nobody_waits = answer.send(address);
            }
        }
    }

    fn tell(&self, what: What) {
        let _nobody_listens = self.shared.news.send(News { agent: self.number, at: Instant::now(), what });
    }
}

/// The key that this agent has.
pub(super) fn public_key(number: usize) -> Result<PublicKey, Error> {
    let request = register_request(FIRST + number as u64, 0);
    Ok(request.public_key.as_slice().try_into()?)
}

/// The address that the host of this agent has on its LAN.
pub(super) fn home(number: usize) -> SocketAddr {
    let [.., a, b, c] = number.to_be_bytes();
    SocketAddr::from(([10, a, b, c], 7551))
}
