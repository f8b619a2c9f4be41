//! Hosts without an agent and subnets: who becomes a device, who is reached through whom, and what operators may approve.

use std::net::IpAddr;

use ipnet::IpNet;

use super::*;
use crate::{
    registry::{
        carried::Refusal,
        plan::site::{self, BATCH},
        site::{Carrier, Host},
        state::NetworkState,
        view::{Advertised, By},
    },
    store::Txn,
};

impl World {
    /// A device registers again with what it offers, and gets what it may have.
    pub(crate) fn offer(&mut self, registrar: usize, uid: Uuid, hosts: &[&str], subnets: &[&str]) {
        let host = |(i, name): (usize, &&str)| Host {
            name: (*name).into(),
            lan_address: IpAddr::from([192, 168, 7, u8::try_from(i % 250).unwrap() + 1]),
        };
        self.offer_at(registrar, uid, &hosts.iter().enumerate().map(host).collect::<Vec<_>>(), subnets);
    }

    fn offer_at(&mut self, registrar: usize, uid: Uuid, hosts: &[Host], subnets: &[&str]) {
        let device = self.device(registrar, uid).unwrap().clone();
        let subnets: Vec<IpNet> = subnets.iter().map(|subnet| subnet.parse().unwrap()).collect();
        let now = self.now;
        let register = |index: &mut Index, attempt| {
            let registration = Registration {
                before: None,
                key: device.key.unwrap(),
                endpoints: &device.endpoints,
                outside: None,
                hosts,
                subnets: &subnets,
                aes_256_gcm: device.aes_256_gcm,
                agent_version: "1",
                attempt,
                now,
            };
            plan::register::register(index, "n", uid, &registration)
        };
        self.commit(registrar, register).unwrap();
        self.settle(registrar, uid).unwrap();
    }

    pub(crate) fn settle(&mut self, registrar: usize, uid: Uuid) -> Result<(), DeviceError> {
        let now = self.now;
        loop {
            let uids: [Uuid; BATCH] = std::array::from_fn(|_| self.uid());
            let plan = |index: &mut Index, attempt| site::settle(index, "n", uid, &uids, attempt, now);
            if self.commit(registrar, plan)? {
                return Ok(());
            }
        }
    }

    /// An operator says what a device may carry.
    pub(crate) fn approve(
        &mut self,
        name: &str,
        may_proxy: bool,
        subnets: &[&str],
    ) -> Result<Uuid, AdminError> {
        let mut wanted = device(name, "");
        let spec = wanted.spec.as_mut().unwrap();
        spec.may_proxy = may_proxy;
        spec.subnets = subnets.iter().map(|subnet| (*subnet).to_owned()).collect();
        let mask = mask(&["spec.may_proxy", "spec.subnets"]);
        let uid = self.commit(0, |index, _| plan::device::update(index, &wanted, Some(&mask)))?;
        self.settle(0, uid).unwrap();
        Ok(uid)
    }

    /// Writes that a device carries a subnet.
    pub(crate) fn carry(&mut self, subnet: &str, device: Uuid) {
        let key = keys::carrier("n", &subnet.parse().unwrap());
        let carrier = Carrier { device, registrar: None, revision: 0 };
        self.store.apply_txn(&Txn::new().put(key, carrier.encode())).unwrap();
        self.catch_up(0);
    }

    fn state(&self) -> &NetworkState {
        self.indexes[0].network("n").unwrap()
    }

    fn named(&self, name: &str) -> Device {
        (**self.state().devices.by_name(name).unwrap()).clone()
    }

    fn refusals(&self, uid: Uuid) -> Vec<String> {
        let agent = self.device(0, uid).unwrap();
        self.state().proxied_devices(agent).into_iter().map(|device| device.refused).collect()
    }

    /// The name of the peer that `viewer` finds.
    fn found(&self, viewer: Uuid, by: By<'_>) -> Option<String> {
        let viewer = self.device(0, viewer).unwrap();
        Some(self.state().look_up(viewer, by)?.name.to_string())
    }
}

/// `a`, which looks, and the gates `g` and `h`.
fn world() -> (World, [Uuid; 3]) {
    let mut world = World::with_network(1, "10.0.0.0/20");
    let token = world.reusable_token();
    let uids = ["a", "g", "h"].map(|name| world.join(&token, name));
    for (uid, key) in uids.into_iter().zip(1..) {
        world.register(0, uid, key).unwrap();
    }
    (world, uids)
}

#[test]
fn hosts_become_devices_once_an_operator_allows_it() {
    let (mut world, [a, g, _]) = world();
    world.offer(0, g, &["printer", "tv"], &[]);
    let refusals = world.refusals(g);
    assert!(
        refusals.iter().all(|refusal| refusal.contains("muster approve device g --hosts")),
        "{refusals:?}"
    );
    assert!(world.state().devices.by_name("printer").is_none());

    world.approve("g", true, &[]).unwrap();
    let printer = world.named("printer");
    assert_eq!((&*printer.namespace, printer.proxied_by(), printer.key), ("default", Some(g), None));
    let address = IpAddr::from(printer.ipv4.unwrap());
    for by in [By::Name("printer"), By::Name("PRINTER.n.example"), By::Address(address)] {
        assert_eq!(world.found(a, by).as_deref(), Some("g"), "{by:?}");
    }
    let peer = world.state().peer(world.device(0, g).unwrap(), 1);
    assert_eq!(peer.virtual_addresses.len(), 3);
    assert!(peer.virtual_addresses.contains(&address.to_string()));
    let told = world.state().config(world.device(0, g).unwrap(), &Advertised::default()).proxied_devices;
    assert_eq!((&told[0].virtual_ipv4, &*told[0].refused), (&address.to_string(), ""));

    // Not named any more: nobody reaches it. Named again: it is what it was.
    world.offer(0, g, &["tv"], &[]);
    assert_eq!(world.found(a, By::Name("printer")), None);
    assert_eq!(world.found(a, By::Address(address)), None);
    assert_eq!(world.state().peer(world.device(0, g).unwrap(), 1).virtual_addresses.len(), 2);
    world.offer(0, g, &["printer", "tv"], &[]);
    assert_eq!(world.named("printer").ipv4, printer.ipv4);
    assert_eq!(world.found(a, By::Name("printer")).as_deref(), Some("g"));

    // Taken back, with all that follows from it; and one host alone.
    world.approve("g", false, &[]).unwrap();
    assert_eq!(world.found(a, By::Name("tv")), None);
    world.approve("g", true, &[]).unwrap();
    world.revoke(0, "tv", true).unwrap();
    assert_eq!((world.found(a, By::Name("tv")), world.found(a, By::Name("printer")).is_some()), (None, true));
    assert!(world.refusals(g)[1].contains("revoked tv"), "{:?}", world.refusals(g));
    world.revoke(0, "g", true).unwrap();
    assert_eq!(world.found(a, By::Name("printer")), None, "nobody speaks for it");
}

/// The agent translates one to one: an address of the other family would be one that nobody answers at.
#[test]
fn a_host_has_addresses_of_the_family_in_which_it_is_reached() {
    let mut world = World::new(1);
    let mut wanted = network("n", "n.example", "10.0.0.0/20");
    wanted.spec.as_mut().unwrap().device_pool_v6 = "fd00:9::/64".into();
    world.create_network(&wanted).unwrap();
    let token = world.reusable_token();
    let uids = ["g", "h"].map(|name| world.join(&token, name));
    for (uid, key) in uids.into_iter().zip(1..) {
        world.register(0, uid, key).unwrap();
    }
    world.approve("g", true, &[]).unwrap();
    world.approve("h", true, &[]).unwrap();
    let at = |address: &str| [Host { name: "printer".into(), lan_address: address.parse().unwrap() }];
    world.offer_at(0, uids[0], &at("192.168.7.9"), &[]);
    let before = world.named("printer");
    assert!(before.ipv4.is_some() && before.ipv6.is_none(), "{before:?}");
    // It is reached in the other family from now on; and then by another gate, as before.
    world.offer_at(0, uids[0], &at("fd07::9"), &[]);
    let after = world.named("printer");
    assert_eq!((after.uid, after.ipv4), (before.uid, None));
    assert!(after.ipv6.is_some());
    let old = IpAddr::from(before.ipv4.unwrap());
    assert!(world.state().released().any(|(_, address, _)| address == old), "others may have it later");
    world.offer_at(0, uids[0], &[], &[]);
    world.offer_at(0, uids[1], &at("192.168.7.9"), &[]);
    let last = world.named("printer");
    assert_eq!((last.proxied_by(), last.ipv6, last.ipv4.is_some()), (Some(uids[1]), None, true));
}

#[test]
fn a_name_has_one_owner() {
    let (mut world, [a, g, h]) = world();
    world.approve("g", true, &[]).unwrap();
    world.approve("h", true, &[]).unwrap();
    world.offer(0, g, &["printer"], &[]);
    world.offer(0, h, &["a", "printer"], &[]);
    assert_eq!(world.refusals(h)[0], Refusal::NameTaken.to_string(), "a is a device with an agent");
    assert!(world.refusals(h)[1].starts_with("g speaks for printer"), "{:?}", world.refusals(h));
    assert_eq!(world.found(a, By::Name("printer")).as_deref(), Some("g"));

    // Nobody joins with the name of a host.
    let token = world.create_token("t", proto::TokenSpec { reusable: true, ..Default::default() });
    let joined = world.enroll(0, &token, "printer", &key_hash("x"));
    assert!(matches!(joined, Err(EnrollError::NameTaken { .. })), "{joined:?}");

    // Another agent takes over what nobody speaks for, with its addresses.
    let before = world.named("printer");
    world.delete_device(0, "g").unwrap();
    assert_eq!(world.found(a, By::Name("printer")), None);
    world.settle(0, h).unwrap();
    let after = world.named("printer");
    assert_eq!((after.uid, after.ipv4, after.proxied_by()), (before.uid, before.ipv4, Some(h)));
    assert_eq!(world.found(a, By::Name("printer")).as_deref(), Some("h"));
}

#[test]
fn many_hosts_settle_in_transactions_of_bounded_size_and_full_pools_say_so() {
    let (mut world, [_, g, _]) = world();
    world.approve("g", true, &[]).unwrap();
    let names: Vec<String> = (0..256).map(|n| format!("host-{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    world.offer(0, g, &names, &[]);
    assert_eq!(world.refusals(g), vec![String::new(); 256]);
    assert_eq!(world.state().peer(world.device(0, g).unwrap(), 1).virtual_addresses.len(), 257);
    assert_eq!(world.state().sites().count(), 1, "the hosts themselves carry nothing");

    let mut small = World::with_network(1, "10.0.0.0/29");
    let token = small.reusable_token();
    let g = small.join(&token, "g");
    small.register(0, g, 1).unwrap();
    let wanted: Vec<String> = (0..9).map(|n| format!("h{n}")).collect();
    let hosts =
        wanted.iter().map(|name| Host { name: name.as_str().into(), lan_address: [192, 168, 7, 1].into() });
    let hosts: Vec<Host> = hosts.collect();
    let now = small.now;
    let register = |index: &mut Index, attempt| {
        let registration = Registration {
            before: None,
            key: [1; 32],
            endpoints: &[],
            outside: None,
            hosts: &hosts,
            subnets: &[],
            aes_256_gcm: true,
            agent_version: "1",
            attempt,
            now,
        };
        plan::register::register(index, "n", g, &registration)
    };
    small.commit(0, register).unwrap();
    let mut gate = device("g", "");
    gate.spec.as_mut().unwrap().may_proxy = true;
    let mask = mask(&["spec.may_proxy"]);
    small.commit(0, |index, _| plan::device::update(index, &gate, Some(&mask))).unwrap();
    assert!(matches!(small.settle(0, g), Err(DeviceError::Allocation(_))));
    // As many as there is room for, and none of it is lost to the others.
    let refusals = small.refusals(g);
    let (have, have_not) = refusals.split_at(refusals.iter().filter(|refusal| refusal.is_empty()).count());
    assert!(!have.is_empty() && have.len() + have_not.len() == 9, "{refusals:?}");
    assert!(have_not.iter().all(|refusal| refusal.contains("pool may be used up")), "{refusals:?}");
}

#[test]
fn an_address_in_a_subnet_leads_to_its_carrier() {
    let (mut world, [a, g, h]) = world();
    world.offer(0, g, &[], &["192.168.7.0/24", "192.168.8.0/24"]);
    world.offer(0, h, &[], &["192.168.7.0/24"]);
    world.approve("g", false, &["192.168.7.0/24"]).unwrap();
    world.approve("h", false, &["192.168.7.0/24", "192.168.9.0/24"]).unwrap();
    let inside = By::Address([192, 168, 7, 77].into());
    assert_eq!(world.found(a, inside), None, "nobody carries it yet");
    world.carry("192.168.7.0/24", g);
    assert_eq!(world.found(a, inside).as_deref(), Some("g"));
    let config = |world: &World, uid| {
        let config = world.state().config(world.device(0, uid).unwrap(), &Advertised::default());
        (config.subnets, config.active_subnets, config.site_routes)
    };
    let net = || vec!["192.168.7.0/24".to_owned()];
    assert_eq!(config(&world, a), (vec![], vec![], net()));
    assert_eq!(config(&world, g), (net(), net(), vec![]), "what is not approved is not carried");
    assert_eq!(config(&world, h), (net(), vec![], net()), "what is not offered is not carried");
    let subnets = |world: &World, uid| world.state().peer(world.device(0, uid).unwrap(), 1).subnets;
    assert_eq!((subnets(&world, g), subnets(&world, h)), (net(), vec![]));

    world.carry("192.168.7.0/24", h);
    assert_eq!(world.found(a, inside).as_deref(), Some("h"));
    assert_eq!((subnets(&world, g), subnets(&world, h)), (vec![], net()));
    // Whatever the store says, nobody carries what it may not.
    world.approve("h", false, &[]).unwrap();
    assert_eq!((world.found(a, inside), subnets(&world, h)), (None, vec![]));
    world.approve("h", false, &["192.168.7.0/24"]).unwrap();
    world.revoke(0, "h", true).unwrap();
    assert_eq!(world.found(a, inside), None);

    // The smallest subnet wins; a virtual address is never in one.
    let mut loaded = world.load();
    assert_eq!(loaded.network("n").unwrap().carriers, world.state().carriers);
    assert_eq!(loaded.changes_to(&world.indexes[0]).len(), 0);
    loaded.apply(
        &crate::store::WatchBatch {
            revision: 10_000,
            events: vec![crate::store::Event::Delete {
                key: keys::carrier("n", &"192.168.7.0/24".parse().unwrap()),
            }],
        },
        world.now,
    );
    assert!(loaded.network("n").unwrap().carriers.is_empty());
    assert_eq!(loaded.changes_to(&world.indexes[0]).len(), 1);
}

#[test]
fn operators_approve_what_takes_no_traffic_from_others() {
    let (mut world, [_, g, _]) = world();
    let spec = proto::NetworkSpec { public_addresses: vec!["203.0.113.5".into()], ..Default::default() };
    let mut network = proto::Network { metadata: Some(meta("", "n")), spec: Some(spec), status: None };
    network.metadata.as_mut().unwrap().network = String::new();
    let paths = mask(&["spec.public_addresses"]);
    world.commit(0, |index, _| plan::network::update(index, &network, Some(&paths), None)).unwrap();
    let directors = world.director_token();
    world.director(&directors, "d1", 7);
    world.approve("h", false, &["172.16.0.0/16", "192.168.7.0/24"]).unwrap();
    for (subnet, reason) in [
        ("10.0.0.0/24", "overlaps the network's own"),
        ("10.0.0.0/8", "overlaps the network's own"),
        ("203.0.113.0/24", "203.0.113.5"),
        ("192.0.2.0/24", "192.0.2.7"),
        ("172.16.9.0/24", "172.16.0.0/16, which h may carry"),
        ("192.168.0.0/16", "192.168.7.0/24, which h may carry"),
        ("192.168.7.1/24", "write 192.168.7.0/24"),
        ("0.0.0.0/0", "larger than any site"),
    ] {
        let AdminError::Field(error) = world.approve("g", false, &[subnet]).unwrap_err() else {
            panic!("{subnet}")
        };
        assert!(error.path.starts_with("spec.subnets") && error.reason.contains(reason), "{subnet}: {error}");
    }
    // The same one is a standby; what was approved before stays so.
    world.approve("g", false, &["192.168.7.0/24", "192.168.8.0/24"]).unwrap();
    assert_eq!(world.device(0, g).unwrap().site.as_ref().unwrap().approved.len(), 2);

    world.approve("g", true, &[]).unwrap();
    world.offer(0, g, &["tv"], &[]);
    let AdminError::Field(error) = world.approve("tv", true, &[]).unwrap_err() else {
        panic!("a host is no agent")
    };
    assert!(error.reason.contains("approve the device that speaks for it"), "{error}");
}
