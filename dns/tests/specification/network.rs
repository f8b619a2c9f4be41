//! A network with Services of every kind to ask about, and how its answers are shown.

use std::sync::Arc;

use hickory_proto::{
    op::{Message, MessageType, OpCode, ResponseCode},
    rr::{Name, Record, RecordType},
};
use muster_dns::{
    directory::{Endpoint, ExternalAddress, Port, Protocol, Service, ServiceKind, Viewer, Zone},
    engine::{Engine, QueryContext, Step, Upstream},
    fixed::FixedDirectory,
    message::Transport,
    options::Options,
};

use crate::support::{self, label, member, query};

pub(crate) fn port(name: &str, protocol: Protocol, number: u16) -> Port {
    Port { name: name.to_owned(), protocol, number }
}

/// Endpoints of one slice: `hostname@device=address`, where the first two may be missing.
pub(crate) fn slice(ports: &[Port], endpoints: &[&str]) -> Vec<Endpoint> {
    let ports: Arc<[Port]> = ports.into();
    let endpoint = |text: &&str| {
        let (names, address) = text.rsplit_once('=').unwrap_or(("", text));
        let (hostname, device) = names.split_once('@').unwrap_or((names, ""));
        let some = |name: &str| (!name.is_empty()).then(|| label(name));
        Endpoint {
            hostname: some(hostname),
            device: some(device),
            address: address.parse().unwrap(),
            ports: ports.clone(),
        }
    };
    endpoints.iter().map(endpoint).collect()
}

fn service(namespace: &str, name: &str, kind: ServiceKind, ports: &[Port], at: Vec<Endpoint>) -> Service {
    Service {
        name: label(name),
        namespace: label(namespace),
        kind,
        ports: ports.to_vec(),
        endpoints: at,
        external: Vec::new(),
    }
}

fn cluster(addresses: &[&str]) -> ServiceKind {
    ServiceKind::ClusterIp(addresses.iter().map(|a| a.parse().unwrap()).collect())
}

fn external(name: &str, target: &str) -> Service {
    service("default", name, ServiceKind::ExternalName(target.to_owned()), &[], Vec::new())
}

fn services() -> Vec<Service> {
    use Protocol::{Tcp, Udp};
    use ServiceKind::Headless;
    let (http, pg) = (port("http", Tcp, 80), port("pg", Tcp, 5432));
    let mut list = vec![
        service(
            "default",
            "web",
            cluster(&["100.96.0.10", "fd00:1:2:ff::10"]),
            std::slice::from_ref(&http),
            slice(&[port("http", Tcp, 8080)], &["@web=100.64.1.7", "www@web=fd00:1:2::7"]),
        ),
        service("default", "bare", cluster(&["100.96.0.11"]), &[port("", Tcp, 5678)], Vec::new()),
        service("default", "portless", cluster(&["100.96.0.12"]), &[], slice(&[], &["100.64.1.30"])),
        service(
            "default",
            "many",
            cluster(&["100.96.0.13"]),
            &[http.clone(), port("dns", Udp, 53), port("dns", Tcp, 53)],
            Vec::new(),
        ),
        external("out", "WWW.example.org"),
        external("inner", "web.default.svc.net.example."),
        external("self", "self.default.svc.net.example"),
        external("address", "192.0.2.1"),
        external("six", "2001:db8::1"),
        external("away", "out.default.svc.net.example"),
        external("gone", "nothing.default.svc.net.example"),
        external("foreign", "web.other.example"),
        external("device", "web.net.example"),
        external("hop10", "hop9.default.svc.net.example"),
        external("round", "about.default.svc.net.example"),
        external("about", "round.default.svc.net.example"),
        service(
            "prod",
            "db",
            Headless,
            std::slice::from_ref(&pg),
            [
                slice(&[port("pg", Tcp, 15432)], &["db-0=100.64.1.8", "@vault=100.64.1.9"]),
                slice(&[port("pg", Tcp, 15433)], &["db-0=fd00:1:2::8"]),
            ]
            .concat(),
        ),
        service(
            "prod",
            "crew",
            Headless,
            &[],
            slice(
                &[port("http", Tcp, 80)],
                &["a=10.9.0.1", "b=10.9.0.2", "c=10.9.0.3", "d=10.9.0.4", "e=10.9.0.5", "e=10.9.0.6"],
            ),
        ),
        service("prod", "none", Headless, std::slice::from_ref(&pg), Vec::new()),
        service("prod", "quiet", Headless, &[], slice(&[], &["100.64.1.31", "2001:db8::"])),
        service("prod", "twin", Headless, &[], slice(&[port("", Tcp, 9)], &["100.64.1.9", "100.64.1.9"])),
    ];
    // Nine hops behind hop10: ten CNAMEs from there, eleven from hop11.
    list.push(external("hop11", "hop10.default.svc.net.example"));
    for hop in 2..10 {
        list.push(external(&format!("hop{hop}"), &format!("hop{}.default.svc.net.example", hop - 1)));
    }
    list.push(external("hop1", "web.default.svc.net.example"));
    let mut lb = service("default", "lb", cluster(&["100.96.0.20"]), std::slice::from_ref(&http), Vec::new());
    lb.external = ["198.51.100.5", "2001:db8:5::5"].map(|a| ExternalAddress::Ip(a.parse().unwrap())).to_vec();
    let mut host = service("default", "lbhost", cluster(&["100.96.0.21"]), &[http], Vec::new());
    host.external = vec![ExternalAddress::Host("LB.example.org".to_owned())];
    list.extend([lb, host]);
    list.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    list
}

pub(crate) fn directory() -> FixedDirectory {
    let mut directory = support::directory();
    let net = label("net");
    for (zone, _) in &mut directory.zones {
        if zone.network == net {
            let mut changed: Zone = (**zone).clone();
            changed.pools.push("100.96.0.0/12".parse().unwrap());
            changed.external_domain = Some("ext.example".parse().unwrap());
            changed.external_serial = 77;
            *zone = Arc::new(changed);
        }
    }
    directory.namespaces = ["default", "prod", "empty"].map(|name| (net.clone(), label(name))).to_vec();
    directory.services = services().into_iter().map(|s| (net.clone(), Arc::new(s))).collect();
    for (address, namespace) in
        [("100.64.1.7", "default"), ("fd00:1:2::7", "default"), ("100.64.1.8", "prod")]
    {
        directory.device_namespaces.push((net.clone(), address.parse().unwrap(), label(namespace)));
    }
    directory
}

/// Asks one engine.
pub(crate) struct Asking {
    pub(crate) engine: Engine<FixedDirectory>,
    pub(crate) context: QueryContext,
}

impl Asking {
    pub(crate) fn with(change: impl FnOnce(&mut Options)) -> Self {
        Self::of(directory(), change)
    }

    pub(crate) fn of(directory: FixedDirectory, change: impl FnOnce(&mut Options)) -> Self {
        let mut options = Options::default();
        change(&mut options);
        let source = Some("100.64.1.7".parse().unwrap());
        let context = QueryContext { viewer: member("net", "d2"), transport: Transport::Tls, source };
        Self { engine: Engine::with_options(directory, options), context }
    }

    pub(crate) fn viewer(mut self, viewer: Viewer) -> Self {
        self.context.viewer = viewer;
        self
    }

    pub(crate) fn message(&self, message: &Message) -> Message {
        let mut out = Vec::new();
        self.engine.answer(&message.to_vec().unwrap(), &self.context, &mut out);
        Message::from_vec(&out).unwrap()
    }

    pub(crate) fn ask(&self, name: &str, record_type: RecordType) -> Message {
        let mut message = query(name, record_type);
        message.metadata.id = 0;
        self.message(&message)
    }

    /// The Answer section, in its order.
    pub(crate) fn answers(&self, name: &str, record_type: RecordType) -> Vec<String> {
        let response = self.ask(name, record_type);
        assert_eq!(response.metadata.response_code, ResponseCode::NoError, "{response}");
        assert!(!response.answers.is_empty(), "{name} {record_type}: no answer");
        assert!(response.metadata.authoritative, "{response}");
        shown(&response.answers)
    }

    pub(crate) fn begin(&self, name: &str, record_type: RecordType) -> Result<Message, Upstream> {
        let (mut out, query) = (Vec::new(), query(name, record_type).to_vec().unwrap());
        match self.engine.begin(&query, &self.context, &mut out) {
            Step::Done(_) => Ok(Message::from_vec(&out).unwrap()),
            Step::Ask(upstream) => Err(upstream),
        }
    }

    pub(crate) fn resume(&self, upstream: Upstream, reply: Option<&Message>) -> Result<Message, Upstream> {
        let mut out = Vec::new();
        match self.engine.resume(upstream, reply, &mut out) {
            Step::Done(_) => Ok(Message::from_vec(&out).unwrap()),
            Step::Ask(upstream) => Err(upstream),
        }
    }

    pub(crate) fn nodata(&self, name: &str, record_type: RecordType) {
        denied(&self.ask(name, record_type), ResponseCode::NoError);
    }

    pub(crate) fn nxdomain(&self, name: &str, record_type: RecordType) {
        denied(&self.ask(name, record_type), ResponseCode::NXDomain);
    }

    pub(crate) fn refused(&self, name: &str, record_type: RecordType) {
        let response = self.ask(name, record_type);
        assert_eq!(response.metadata.response_code, ResponseCode::Refused, "{response}");
        assert!(response.answers.is_empty() && response.authorities.is_empty(), "{response}");
    }
}

/// Section 8: AA, and the zone's SOA in Authority; nothing else.
pub(crate) fn denied(response: &Message, code: ResponseCode) {
    assert_eq!(response.metadata.response_code, code, "{response}");
    assert!(response.metadata.authoritative && response.answers.is_empty(), "{response}");
    assert_eq!(response.authorities.len(), 1, "{response}");
    assert_eq!(response.authorities[0].record_type(), RecordType::SOA, "{response}");
    assert!(response.additionals.is_empty(), "{response}");
}

pub(crate) fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

/// Records as in a zone file, without TTL and class.
pub(crate) fn shown(records: &[Record]) -> Vec<String> {
    let show = |r: &Record| format!("{} {} {}", r.name, r.record_type(), r.data);
    records.iter().map(show).collect()
}

pub(crate) fn sorted(records: &[Record]) -> Vec<String> {
    let mut shown = shown(records);
    shown.sort();
    shown
}

/// Another server's reply.
pub(crate) fn reply(code: ResponseCode, answers: Vec<Record>) -> Message {
    let mut message = Message::new(1, MessageType::Response, OpCode::Query);
    message.metadata.response_code = code;
    message.metadata.recursion_available = true;
    message.answers = answers;
    message
}
