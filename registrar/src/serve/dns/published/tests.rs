//! Encoded answers are the engine's, whatever happens in the registry.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use hickory_proto::rr::RecordType;
use muster_common::telemetry::Readiness;
use muster_dns::{
    directory::Viewer,
    engine::QueryContext,
    options::{Fallthrough, Options},
};
use muster_proto::admin::DirectorSpec;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use super::*;
use crate::{
    registry::{
        device::Outside,
        plan,
        tests::{World, mask, network, service, service_network, slice},
    },
    token::JoinToken,
};

struct Site {
    world: World,
    registry: Arc<Registry>,
    engine: Arc<Engine<Zones>>,
    published: Published,
    publisher: Publisher,
    token: JoinToken,
    directors: JoinToken,
    uids: Vec<Uuid>,
    keys: u8,
}

impl Site {
    async fn new(options: Options) -> Self {
        let mut world = World::with_services(1);
        let (token, directors) = (world.reusable_token(), world.director_token());
        let registry = Registry::load(Arc::new(world.store.clone())).await.unwrap();
        let loaded = Readiness::default();
        loaded.set(true);
        let zones = Zones::new(registry.clone(), loaded, vec!["192.0.2.53".parse().unwrap()]);
        let engine = Arc::new(Engine::with_options(zones, options));
        let (published, publisher) = Published::new(&registry, engine.clone());
        Self { world, registry, engine, published, publisher, token, directors, uids: Vec::new(), keys: 0 }
    }

    /// Has the registry see what the world did, and everything encoded.
    async fn settle(&mut self) {
        self.registry.refresh().await.unwrap();
        self.world.catch_up(0);
        while self.publisher.run(false) {}
    }

    fn join(&mut self, name: &str) {
        let uid = self.world.join(&self.token, name);
        self.keys += 1;
        self.world.register(0, uid, self.keys).unwrap();
        self.uids.push(uid);
    }

    /// Compares every answer that is encoded; how many are, and how many are not, for those who see everything.
    fn compare(&self, names: &[String]) -> (usize, usize) {
        let mut askers = vec![(Viewer::Open, Asker::Open)];
        for uid in &self.uids {
            let viewer =
                Viewer::Member { network: "n".parse().unwrap(), uid: uid.to_string().parse().unwrap() };
            askers.push((viewer, Asker::Member { uid: uid.into_bytes() }));
        }
        let (mut encoded, mut rest) = (0, 0);
        for name in names {
            for kind in
                [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::SVCB, RecordType::CNAME]
            {
                let mut query = vec![0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
                query.extend(muster_dns::wire::encode_name(name).unwrap());
                query.extend(u16::from(kind).to_be_bytes());
                query.extend([0, 1]);
                for (viewer, asker) in &askers {
                    let mut fast = Vec::new();
                    let Some(outcome) = self.published.answer(&query, *asker, Transport::Tcp, &mut fast)
                    else {
                        // Devices that are gone or revoked are the engine's.
                        rest += usize::from(*asker == Asker::Open);
                        continue;
                    };
                    let context =
                        QueryContext { viewer: viewer.clone(), transport: Transport::Tcp, source: None };
                    let mut slow = Vec::new();
                    assert_eq!(outcome, self.engine.answer(&query, &context, &mut slow), "{name} {kind}");
                    assert_eq!(fast, slow, "{name} {kind} for {viewer:?}");
                    encoded += usize::from(*asker == Asker::Open);
                }
            }
        }
        (encoded, rest)
    }
}

fn names() -> Vec<String> {
    let mut names: Vec<String> = (0..4).map(|n| format!("d{n}.n.example")).collect();
    names.extend(
        ["sub", "svc", "default.svc", "a.svc", "nothing", "x.sub"].map(|left| format!("{left}.n.example")),
    );
    for namespace in ["default", "a"] {
        for service in 0..3 {
            for below in ["", "10-9-0-1.", "10-9-0-2.", "10-9-0-3.", "_http._tcp."] {
                names.push(format!("{below}s{service}.{namespace}.svc.n.example"));
            }
        }
    }
    names
}

/// One change of some kind, if it is possible just now.
async fn change(site: &mut Site, random: &mut SmallRng) {
    let (pick, namespace) = (random.random_range(0..3_u8), ["default", "a"][random.random_range(0..2)]);
    let world = &mut site.world;
    let now = world.now;
    match random.random_range(0..14_u8) {
        0 => {
            let name = format!("d{pick}");
            if world.indexes[0].network("n").unwrap().devices.by_name(&name).is_none() && site.keys < 200 {
                site.join(&name);
            }
        }
        1 => drop(world.delete_device(0, &format!("d{pick}"))),
        2 => drop(world.revoke(0, &format!("d{pick}"), random.random())),
        3 | 4 => {
            let mut service = service(&format!("s{pick}"));
            service.metadata.as_mut().unwrap().namespace = namespace.into();
            let spec = service.spec.as_mut().unwrap();
            match random.random_range(0..3_u8) {
                0 => spec.cluster_ip = "None".into(),
                1 => {
                    spec.r#type = "ExternalName".into();
                    spec.external_name = "d1.n.example".into();
                    spec.ports.clear();
                }
                _ => {}
            }
            drop(world.create_service(0, &service));
        }
        5 => {
            let name = format!("s{pick}");
            let mut version = 0;
            while let Ok(Some(revision)) =
                world.commit(0, |index, _| plan::service::delete(index, "n", namespace, &name, version, now))
            {
                version = revision;
            }
        }
        6 | 7 => {
            let addresses = ["10.9.0.1", "10.9.0.2", "10.9.0.3"];
            let some = &addresses[random.random_range(0..3)..];
            let mut slice = slice(&format!("e{}", random.random_range(0..9_u8)), &format!("s{pick}"), some);
            slice.metadata.as_mut().unwrap().namespace = namespace.into();
            drop(world.create_slice(&slice));
        }
        8 => {
            let name = format!("e{}", random.random_range(0..9_u8));
            drop(world.commit(0, |index, _| plan::slice::delete(index, "n", namespace, &name, 0)));
        }
        9 => {
            let mut changed = service_network();
            changed.spec.as_mut().unwrap().record_ttl =
                Some(pbjson_types::Duration { seconds: random.random_range(1..60), nanos: 0 });
            let mask = mask(&["spec.record_ttl"]);
            drop(world.commit(0, |index, _| plan::network::update(index, &changed, Some(&mask), None)));
        }
        10 => {
            let (token, name) = (site.directors.clone(), format!("m{pick}"));
            let found =
                world.indexes[0].network("n").unwrap().directors.by_name(&name).map(|found| found.uid);
            let uid = found.unwrap_or_else(|| world.join(&token, &name));
            drop(world.register_director(0, uid, random.random_range(1..5)));
        }
        11 => {
            let name = format!("m{pick}");
            if random.random() {
                drop(world.delete_director(0, &name));
            } else {
                let spec = DirectorSpec { revoked: random.random(), drained: random.random() };
                drop(world.update_director(0, &name, spec));
            }
        }
        12 => {
            let state = world.indexes[0].network("n").unwrap();
            let home = state.directors.iter().nth(usize::from(pick)).map(|director| director.uid);
            if let Some(uid) = state.devices.by_name("d1").map(|device| device.uid) {
                drop(world.set_outside(uid, &Outside { home, ..Outside::default() }));
            }
        }
        _ => {
            if world.indexes[0].network("o").is_none() {
                drop(world.create_network(&network("o", "sub.n.example", "10.2.0.0/24")));
            } else {
                while let Ok(false) = world.commit(0, |index, _| plan::network::delete(index, "o", 0)) {}
            }
        }
    }
}

#[tokio::test]
async fn answers_stay_the_engines_after_any_changes() {
    let names = names();
    for seed in 0..8 {
        let mut random = SmallRng::seed_from_u64(seed);
        let options = match seed % 4 {
            1 => Options { ignore_empty_services: true, ..Options::default() },
            2 => Options { namespaces: Some(["a".parse().unwrap()].into()), ..Options::default() },
            3 => Options { fallthrough: Fallthrough::Always, endpoints: false, ..Options::default() },
            _ => Options::default(),
        };
        let mut site = Site::new(options).await;
        site.world.create_namespace("a").unwrap();
        site.settle().await;
        let (mut encoded, mut rest) = (0, 0);
        for _ in 0..40 {
            for _ in 0..random.random_range(1..4_u8) {
                change(&mut site, &mut random).await;
            }
            // Also while not everything is encoded.
            site.registry.refresh().await.unwrap();
            site.publisher.run(false);
            site.settle().await;
            let (some, others) = site.compare(&names);
            (encoded, rest) = (encoded + some, rest + others);
        }
        let ordinary = seed % 4 == 0;
        assert!(!ordinary || encoded > 4 * rest, "seed {seed}: {encoded} encoded, {rest} not");
    }
}

#[tokio::test]
async fn what_is_encoded_of_a_host_without_an_agent_follows_the_device_that_speaks_for_it() {
    let mut site = Site::new(Options::default()).await;
    site.join("a");
    site.join("g");
    let director = site.world.director(&site.directors.clone(), "d", 7);
    let gate = site.uids[1];
    site.world.approve("g", true, &[]).unwrap();
    let names =
        ["printer.n.example", "private.printer.n.example", "director.printer.n.example", "g.n.example"];
    let names: Vec<String> = names.map(str::to_owned).into();
    for step in 0..5 {
        match step {
            0 => site.world.offer(0, gate, &["printer"], &[]),
            1 => {
                let outside = Outside { home: Some(director), ..Outside::default() };
                site.world.set_outside(gate, &outside).unwrap();
            }
            2 => drop(site.world.approve("g", false, &[]).unwrap()),
            3 => drop(site.world.approve("g", true, &[]).unwrap()),
            _ => site.world.offer(0, gate, &["camera", "printer"], &[]),
        }
        site.settle().await;
        assert!(site.compare(&names).0 > 0, "some are encoded");
    }
}
