//! A [`Table`] as nf_tables has it: one map says which chain deals with a virtual IP and port, one chain there is for each
//! number of endpoints that a frontend can have, and one map says what its endpoints are. So a frontend costs a few elements
//! of maps, and no rule.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::table::{Change, Frontend, Place, Table, Target, endpoints};
use crate::nftables::{
    Batch, Expression,
    expression::{Base, Connection, Meta, Register},
    message::{Datum, Hook, Kind, Set, Type, Value},
    table_name,
};

/// What a new connection's state is.
const NEW: u32 = 8;
/// What a connection's status has if its destination is translated.
const TRANSLATED: u32 = 1 << 5;
/// Clients that are remembered for Services with session affinity, in each family.
const CLIENTS_MAX: u32 = 1 << 18;
/// Refuses what comes to it.
const REFUSE: &str = "refuse";

/// The priorities of destination and source translation, and of filters, as `nft` names them. Sources are translated after
/// all others have had their turn.
const DSTNAT: i32 = -100;
const SRCNAT_LAST: i32 = 101;
const FILTER: i32 = 0;

/// A family, and what differs between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Family {
    is_ipv4: bool,
}

const FAMILIES: [Family; 2] = [Family { is_ipv4: true }, Family { is_ipv4: false }];

impl Family {
    fn of(address: &SocketAddr) -> Self {
        Self { is_ipv4: address.is_ipv4() }
    }

    fn pick<T>(self, ipv4: T, ipv6: T) -> T {
        if self.is_ipv4 { ipv4 } else { ipv6 }
    }

    fn address(self) -> Type {
        self.pick(Type::Ipv4, Type::Ipv6)
    }

    /// Registers that an address takes.
    fn registers(self) -> u8 {
        self.pick(1, 4)
    }

    /// By virtual IP, protocol and port: the chain.
    fn services(self) -> &'static str {
        self.pick("services4", "services6")
    }

    /// By virtual IP, protocol, port and number: an endpoint.
    fn endpoints(self) -> &'static str {
        self.pick("endpoints4", "endpoints6")
    }

    /// By client, virtual IP, protocol and port: the endpoint that the client had last.
    fn clients(self) -> &'static str {
        self.pick("clients4", "clients6")
    }

    /// By virtual IP, protocol and port: what becomes of connections for which there is no endpoint.
    fn refused(self) -> &'static str {
        self.pick("refused4", "refused6")
    }

    /// Goes on with packets of this family.
    fn only(self) -> [Expression<'static>; 2] {
        let family: &[u8] = self.pick(&[2], &[10]);
        [Expression::Meta(Meta::Family, Register(0)), Expression::Equals(Register(0), family)]
    }

    fn has(self, address: &IpAddr) -> bool {
        address.is_ipv4() == self.is_ipv4
    }

    fn source(self, to: Register) -> Expression<'static> {
        Expression::Payload {
            base: Base::Network,
            offset: self.pick(12, 8),
            length: self.address().length(),
            to,
        }
    }

    fn destination(self, to: Register) -> Expression<'static> {
        Expression::Payload {
            base: Base::Network,
            offset: self.pick(16, 24),
            length: self.address().length(),
            to,
        }
    }

    /// Loads destination, protocol and port into registers from `to` on.
    fn frontend(self, to: u8) -> [Expression<'static>; 3] {
        let behind = to + self.registers();
        [
            self.destination(Register(to)),
            Expression::Meta(Meta::Protocol, Register(behind)),
            Expression::Payload { base: Base::Transport, offset: 2, length: 2, to: Register(behind + 1) },
        ]
    }

    /// Where an endpoint is held.
    fn endpoint(self) -> Register {
        Register(self.pick(8, 10))
    }

    /// Chooses one of `count` endpoints.
    fn choose(self, count: u32) -> Vec<Expression<'static>> {
        let number = Register(self.registers() + 2);
        let map = self.endpoints();
        let choice = [
            Expression::Random(count, number),
            Expression::Lookup { map, key: Register(0), to: self.endpoint() },
        ];
        self.frontend(0).into_iter().chain(choice).collect()
    }

    fn translate(self) -> Expression<'static> {
        let Register(address) = self.endpoint();
        let port = Register(address + self.registers());
        Expression::TranslateDestination { is_ipv4: self.is_ipv4, address: Register(address), port }
    }

    /// Loads the key of a client's endpoint.
    fn client(self) -> Vec<Expression<'static>> {
        [self.source(Register(0))].into_iter().chain(self.frontend(self.registers())).collect()
    }
}

/// A chain that deals with all frontends that have so many endpoints, and the same affinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Chain {
    is_ipv4: bool,
    endpoints: u32,
    affinity: Option<Duration>,
}

impl Chain {
    fn name(self) -> String {
        let (family, endpoints) = (if self.is_ipv4 { "ipv4" } else { "ipv6" }, self.endpoints);
        match self.affinity {
            None => format!("{family}-{endpoints}"),
            Some(affinity) => format!("{family}-{endpoints}-{}s", affinity.as_secs()),
        }
    }

    fn add(self, batch: &mut Batch) {
        let (name, family) = (self.name(), Family { is_ipv4: self.is_ipv4 });
        batch.add_chain(&name);
        let choose = family.choose(self.endpoints);
        if let Some(timeout) = self.affinity {
            let map = family.clients();
            let remember = Expression::Remember { map, key: Register(0), value: family.endpoint(), timeout };
            let look_up = Expression::Lookup { map, key: Register(0), to: family.endpoint() };
            let then = [remember, family.translate()];
            let known: Vec<_> = family.client().into_iter().chain([look_up]).chain(then.clone()).collect();
            batch.add_rule(&name, &known);
            let new: Vec<_> = choose.iter().cloned().chain(family.client()).chain(then).collect();
            batch.add_rule(&name, &new);
            // If no more clients can be remembered, they are served all the same.
        }
        let any: Vec<_> = choose.into_iter().chain([family.translate()]).collect();
        batch.add_rule(&name, &any);
    }
}

/// The table in nf_tables: what it is called, and the chains that it has.
#[derive(Clone, Debug)]
pub struct Ruleset {
    name: String,
    interface: String,
    chains: BTreeSet<Chain>,
}

impl Ruleset {
    /// Of the agent whose interface is `interface`.
    pub fn new(interface: &str) -> Self {
        Self {
            name: format!("{}_services", table_name(interface)),
            interface: interface.to_owned(),
            chains: BTreeSet::new(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Removes the table, if it is there.
    pub fn remove(&mut self) -> Batch {
        self.chains.clear();
        let mut batch = Batch::new(&self.name);
        batch.add_table();
        batch.delete_table();
        batch
    }

    /// Makes the table anew, whatever is there.
    pub fn load(&mut self, table: &Table, place: &Place) -> Batch {
        let mut batch = self.remove();
        batch.add_table();
        for family in FAMILIES {
            add_maps(&mut batch, family);
        }
        batch.add_chain(REFUSE);
        batch.add_rule(REFUSE, &[Expression::Reject]);
        self.add_base_chains(&mut batch, place);
        let mut edits = Edits::default();
        table.iter().for_each(|(frontend, target)| edits.add(frontend, None, Some(target)));
        self.write(edits, &mut batch);
        batch
    }

    /// Makes these changes to the table, which is as it was left.
    pub fn change(&mut self, changes: &[Change]) -> Batch {
        let (mut batch, mut edits) = (Batch::new(&self.name), Edits::default());
        for Change { frontend, old, new } in changes {
            edits.add(frontend, old.as_ref(), new.as_ref());
        }
        self.write(edits, &mut batch);
        batch
    }

    /// Writes edits, and first the chains that they need and that are not there yet.
    fn write(&mut self, edits: Edits, batch: &mut Batch) {
        for (.., element) in &edits.new {
            if let Element::Decision(Decision::Choose(chain)) = element
                && self.chains.insert(*chain)
            {
                chain.add(batch);
            }
        }
        edits.write(batch);
    }

    fn add_base_chains(&self, batch: &mut Batch, place: &Place) {
        for (name, hook) in [("prerouting", Hook::Prerouting), ("output", Hook::Output)] {
            batch.add_base_chain(name, Kind::Nat, hook, DSTNAT);
            for family in FAMILIES {
                let decide = Expression::Decide { map: family.services(), key: Register(0) };
                let rule: Vec<_> =
                    family.only().into_iter().chain(family.frontend(0)).chain([decide]).collect();
                batch.add_rule(name, &rule);
            }
        }
        batch.add_base_chain("postrouting", Kind::Nat, Hook::Postrouting, SRCNAT_LAST);
        let mut interface = self.interface.clone().into_bytes();
        interface.push(0);
        interface.resize(interface.len().next_multiple_of(16), 0);
        let through = |through: bool| {
            let own = if through { Expression::Equals } else { Expression::Differs };
            vec![
                Expression::Meta(Meta::OutInterface, Register(0)),
                own(Register(0), &interface),
                Expression::Connection(Connection::Status, Register(0)),
                Expression::Mask(Register(0), TRANSLATED),
                Expression::Differs(Register(0), &[0; 4]),
            ]
        };
        for family in FAMILIES {
            // Others take packets from this device under its own addresses alone.
            let own: Vec<Vec<u8>> = place.own.iter().filter(|ip| family.has(ip)).map(address).collect();
            let mut rule = through(true);
            rule.extend(family.only());
            rule.push(family.source(Register(0)));
            rule.extend(own.iter().map(|own| Expression::Differs(Register(0), own)));
            rule.push(Expression::Masquerade);
            batch.add_rule("postrouting", &rule);
            // Hosts that this one speaks for answer to what is on their LAN.
            for host in place.hosts.values().filter(|ip| family.has(ip)).map(address) {
                let mut rule = through(false);
                rule.extend(family.only());
                rule.push(family.destination(Register(0)));
                rule.extend([Expression::Equals(Register(0), &host), Expression::Masquerade]);
                batch.add_rule("postrouting", &rule);
            }
        }
        let new = NEW.to_ne_bytes();
        for (name, hook) in [("forwarded", Hook::Forward), ("sent", Hook::Output)] {
            batch.add_base_chain(name, Kind::Filter, hook, FILTER);
            for family in FAMILIES {
                let mut rule = vec![
                    Expression::Connection(Connection::State, Register(0)),
                    Expression::Equals(Register(0), &new),
                ];
                rule.extend(family.only().into_iter().chain(family.frontend(0)));
                rule.push(Expression::Decide { map: family.refused(), key: Register(0) });
                batch.add_rule(name, &rule);
            }
        }
    }
}

fn add_maps(batch: &mut Batch, family: Family) {
    let frontend = [family.address(), Type::Protocol, Type::Port];
    let place = [family.address(), Type::Protocol, Type::Port, Type::Mark];
    let client = [family.address(), family.address(), Type::Protocol, Type::Port];
    let endpoint = [family.address(), Type::Port];
    for name in [family.services(), family.refused()] {
        batch.add_set(Set { name, key: &frontend, value: Value::Verdict, dynamic: None });
    }
    batch.add_set(Set {
        name: family.endpoints(),
        key: &place,
        value: Value::Data(&endpoint),
        dynamic: None,
    });
    let clients = Set {
        name: family.clients(),
        key: &client,
        value: Value::Data(&endpoint),
        dynamic: Some(CLIENTS_MAX),
    };
    batch.add_set(clients);
}

/// The map of the clients of a family.
pub(super) fn clients(is_ipv4: bool) -> &'static str {
    Family { is_ipv4 }.clients()
}

/// The part of a client's key that [`frontend_key`] makes: what is behind the client's address.
pub(super) fn frontend_of(is_ipv4: bool, client: &[u8]) -> Option<&[u8]> {
    client.get(if is_ipv4 { 4 } else { 16 }..)
}

/// What becomes of new connections to a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// This chain chooses an endpoint.
    Choose(Chain),
    Refuse,
    Drop,
}

impl Decision {
    fn of(frontend: &Frontend, target: &Target) -> Self {
        match target {
            Target::Endpoints { endpoints, affinity } => Self::Choose(Chain {
                is_ipv4: frontend.address.is_ipv4(),
                // There is no room for more in memory.
                endpoints: u32::try_from(endpoints.len()).unwrap_or(u32::MAX),
                affinity: *affinity,
            }),
            Target::Refuse => Self::Refuse,
            Target::Drop => Self::Drop,
        }
    }

    /// The map that it stands in.
    fn map(self, family: Family) -> &'static str {
        match self {
            Self::Choose(_) => family.services(),
            Self::Refuse | Self::Drop => family.refused(),
        }
    }
}

/// What a map has for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Element {
    Decision(Decision),
    /// Address and port.
    Endpoint(Vec<u8>),
}

/// Elements to be removed from maps, and to be added to them after that.
#[derive(Debug, Default)]
struct Edits {
    gone: Vec<(&'static str, Vec<u8>)>,
    new: Vec<(&'static str, Vec<u8>, Element)>,
}

impl Edits {
    /// What has to be done for a frontend.
    fn add(&mut self, frontend: &Frontend, old: Option<&Target>, new: Option<&Target>) {
        let family = Family::of(&frontend.address);
        let (before, after) = (endpoints(old), endpoints(new));
        for place in 0..before.len().max(after.len()) {
            let (before, after) = (before.get(place), after.get(place));
            if before == after {
                continue;
            }
            let (map, key) = (family.endpoints(), place_key(frontend, place));
            if before.is_some() {
                self.gone.push((map, key.clone()));
            }
            self.new.extend(after.map(|endpoint| (map, key, Element::Endpoint(value(endpoint)))));
        }
        let decision = |target: Option<&Target>| target.map(|target| Decision::of(frontend, target));
        let (before, after) = (decision(old), decision(new));
        if before != after {
            let key = || frontend_key(frontend);
            self.gone.extend(before.map(|before| (before.map(family), key())));
            self.new.extend(after.map(|after| (after.map(family), key(), Element::Decision(after))));
        }
    }

    /// One map after the other, so that few messages are needed: the kernel walks through the verdict maps for each.
    fn write(mut self, batch: &mut Batch) {
        self.gone.sort_by_key(|(map, _)| *map);
        self.new.sort_by_key(|(map, ..)| *map);
        for (map, key) in &self.gone {
            batch.delete_element(map, key);
        }
        for (map, key, element) in &self.new {
            match element {
                Element::Endpoint(value) => batch.add_element(map, key, &Datum::Value(value)),
                Element::Decision(Decision::Choose(chain)) => {
                    batch.add_element(map, key, &Datum::Goto(&chain.name()));
                }
                Element::Decision(Decision::Refuse) => batch.add_element(map, key, &Datum::Goto(REFUSE)),
                Element::Decision(Decision::Drop) => batch.add_element(map, key, &Datum::Drop),
            }
        }
    }
}

fn address(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Address, protocol and port, each padded.
pub(super) fn frontend_key(frontend: &Frontend) -> Vec<u8> {
    let Frontend { address: socket, protocol } = frontend;
    let mut key = address(&socket.ip());
    key.extend([protocol.number(), 0, 0, 0]);
    key.extend(socket.port().to_be_bytes());
    key.extend([0; 2]);
    key
}

fn place_key(frontend: &Frontend, place: usize) -> Vec<u8> {
    let mut key = frontend_key(frontend);
    key.extend(u32::try_from(place).unwrap_or(u32::MAX).to_ne_bytes());
    key
}

/// Address and port, padded.
pub(super) fn value(endpoint: &SocketAddr) -> Vec<u8> {
    let mut value = address(&endpoint.ip());
    value.extend(endpoint.port().to_be_bytes());
    value.extend([0; 2]);
    value
}
