//! One flow, a director at the other end, and a network between them that can be made to lose, rebind and delay.

use super::*;

pub(super) const ID: DirectorId = DirectorId(3);
pub(super) const FIRST: &str = "192.0.2.1:7501";
pub(super) const SECOND: &str = "[2001:db8::1]:7501";

pub(super) fn at(milliseconds: u64) -> Instant {
    Instant::from_boot(Duration::from_secs(1_000) + Duration::from_millis(milliseconds))
}

pub(super) fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(super) fn attachment(session: u32, endpoints: &[&str]) -> Attachment {
    Attachment {
        endpoints: endpoints.iter().map(|text| address(text)).collect(),
        session,
        key: Zeroizing::new([session as u8; 32]),
        hello_interval: Duration::from_secs(15),
    }
}

/// A director with one session.
pub(super) struct Director {
    pub(super) session: Option<u32>,
    pub(super) secret: Key,
    /// Where the attachment was made from.
    pub(super) attached_from: IpAddr,
    pub(super) bound: Option<SocketAddr>,
    pub(super) counter: u64,
    pub(super) is_draining: bool,
}

impl Director {
    pub(super) fn new(session: u32, outside: SocketAddr) -> Self {
        let secret = Key::new(&[99; 32]);
        Self {
            session: Some(session),
            secret,
            attached_from: outside.ip(),
            bound: None,
            counter: 0,
            is_draining: false,
        }
    }

    pub(super) fn handle(&mut self, from: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        match parse(datagram)? {
            Frame::Hello(hello) if Some(hello.session()) != self.session => {
                Some(unbound(hello.session()).to_vec())
            }
            Frame::Hello(hello) => {
                let key = Key::new(&[hello.session() as u8; 32]);
                assert!(hello.is_authentic(&key));
                if hello.counter() <= self.counter {
                    return None;
                }
                self.counter = hello.counter();
                let proof = frame::proof(&self.secret, hello.session(), from);
                let is_bound = from.ip() == self.bound.map_or(self.attached_from, |bound| bound.ip())
                    || hello.proof() == proof;
                if is_bound {
                    self.bound = Some(from);
                }
                let flags = Flags { is_bound, is_draining: self.is_draining };
                Some(frame::welcome(&key, &hello, from, if is_bound { 0 } else { proof }, flags).to_vec())
            }
            Frame::Data(header, _) => {
                let is_known = Some(header.session) == self.session && self.bound == Some(from);
                (!is_known).then(|| unbound(header.session).to_vec())
            }
            _ => panic!("agents send nothing else"),
        }
    }
}

/// One agent, one director, and what is between them.
pub(super) struct World {
    pub(super) flows: Flows,
    pub(super) director: Director,
    pub(super) now: Instant,
    /// Where the director sees the agent.
    pub(super) outside: SocketAddr,
    pub(super) delay: Duration,
    /// Addresses of the director that nothing comes through to or from.
    pub(super) blocked: Vec<SocketAddr>,
    /// To be lost, of the next datagrams: one for each bit from the lowest.
    pub(super) losses: u64,
    pub(super) to_agent: VecDeque<(Instant, SocketAddr, Vec<u8>)>,
    pub(super) to_director: VecDeque<(Instant, SocketAddr, SocketAddr, Vec<u8>)>,
    pub(super) link: Option<DirectorLink>,
    pub(super) events: Vec<FlowEvent>,
    pub(super) hellos: Vec<Instant>,
    pub(super) attachments: u32,
}

impl World {
    pub(super) fn new(endpoints: &[&str]) -> Self {
        let outside = address("198.51.100.1:40000");
        let mut this = Self {
            flows: Flows::new(),
            director: Director::new(1, outside),
            now: at(0),
            outside,
            delay: Duration::from_millis(20),
            blocked: Vec::new(),
            losses: 0,
            to_agent: VecDeque::new(),
            to_director: VecDeque::new(),
            link: None,
            events: Vec::new(),
            hellos: Vec::new(),
            attachments: 1,
        };
        this.flows.attach(ID, attachment(1, endpoints), this.now);
        this.drain();
        this
    }

    pub(super) fn is_lost(&mut self, at: SocketAddr) -> bool {
        let lost = self.losses & 1 != 0;
        self.losses >>= 1;
        lost || self.blocked.contains(&at)
    }

    pub(super) fn send(&mut self, to: SocketAddr, octets: Vec<u8>) {
        if !self.is_lost(to) {
            self.to_director.push_back((self.now + self.delay, self.outside, to, octets));
        }
    }

    pub(super) fn drain(&mut self) {
        while let Some((to, hello)) = self.flows.poll_transmit() {
            self.hellos.push(self.now);
            self.send(to, hello.to_vec());
        }
        while let Some(event) = self.flows.poll_event() {
            if let FlowEvent::Link(id, link) = event {
                assert_eq!(id, ID);
                assert_ne!(link, self.link, "told for nothing");
                self.link = link;
            } else {
                self.events.push(event);
            }
        }
    }

    pub(super) fn send_data(&mut self) {
        if let Some(DirectorLink { session, hop: Hop::Udp(to), .. }) = self.link {
            let header = DataHeader { session, handle: Handle(9) };
            self.send(to, [header.octets().as_slice(), b"sealed"].concat());
        }
    }

    /// Lets everything happen that happens until `end`.
    pub(super) fn run_until(&mut self, end: Instant) {
        for _ in 0..100_000 {
            let arrivals = [self.to_agent.front().map(|a| a.0), self.to_director.front().map(|a| a.0)];
            let timeout = self.flows.poll_timeout();
            let next = arrivals.into_iter().flatten().chain(timeout).min();
            let Some(next) = next.filter(|next| *next <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            if self.to_director.front().is_some_and(|(at, ..)| *at <= self.now)
                && let Some((_, from, to, octets)) = self.to_director.pop_front()
            {
                if let Some(answer) = self.director.handle(from, &octets)
                    && from == self.outside
                    && !self.is_lost(to)
                {
                    assert!(answer.len() <= octets.len(), "amplified");
                    self.to_agent.push_back((self.now + self.delay, to, answer));
                }
            } else if self.to_agent.front().is_some_and(|(at, ..)| *at <= self.now)
                && let Some((_, from, octets)) = self.to_agent.pop_front()
            {
                self.flows.handle(from, &octets, self.now);
            } else {
                self.flows.handle_timeout(self.now);
                let timeout = self.flows.poll_timeout();
                assert!(timeout.is_none_or(|due| due > self.now), "due since {timeout:?}");
            }
            self.drain();
        }
        panic!("too much happens");
    }

    pub(super) fn run_for(&mut self, milliseconds: u64) {
        self.run_until(self.now + Duration::from_millis(milliseconds));
    }

    /// The director knows the session no more.
    pub(super) fn restart(&mut self) {
        self.director = Director { session: None, ..Director::new(0, self.outside) };
    }

    /// Attaches again, as control does on [`FlowEvent::Dead`].
    pub(super) fn attach(&mut self, endpoints: &[&str]) {
        self.attachments += 1;
        self.director = Director::new(self.attachments, self.outside);
        self.flows.attach(ID, attachment(self.attachments, endpoints), self.now);
        self.drain();
    }

    pub(super) fn udp(&self) -> Option<SocketAddr> {
        match self.link {
            Some(DirectorLink { hop: Hop::Udp(via), .. }) => Some(via),
            _ => None,
        }
    }
}
