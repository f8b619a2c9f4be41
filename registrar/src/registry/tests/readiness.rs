//! Readiness probes: what is valid, who has to run which, and what comes of what they find.

use muster_common::labels::Labels;
use muster_proto::registration::EndpointProbe;

use super::{
    admin::path_of,
    selected::{labels, selecting},
    *,
};
use crate::registry::named;

fn http(port: &str) -> proto::Probe {
    let get = proto::HttpGetAction { port: port.into(), ..Default::default() };
    proto::Probe { http_get: Some(get), ..Default::default() }
}

fn probing(name: &str, probe: proto::Probe) -> proto::Service {
    let mut wanted = selecting(name, &[("app", "web")]);
    wanted.spec.as_mut().unwrap().readiness_probe = Some(probe);
    wanted
}

impl World {
    fn probes(&self, uid: Uuid) -> Vec<EndpointProbe> {
        let state = self.indexes[0].network("n").unwrap();
        state.probes(state.devices.by_uid(uid).unwrap())
    }

    fn find(&mut self, agent: Uuid, found: &[(&str, Uuid, bool)]) -> Result<(), DeviceError> {
        let found: Vec<_> = found
            .iter()
            .map(|(service, uid, ready)| (named::key("default", service), *uid, *ready))
            .collect();
        while !self.commit(0, |index, _| plan::readiness::report(index, "n", agent, &found))? {}
        Ok(())
    }

    /// Whether each endpoint of a Service is ready, and serving, by name.
    fn conditions(&self, service: &str) -> Vec<(String, bool, bool)> {
        let slices = self.indexes[0].network("n").unwrap().services.slices_of("default", service);
        let endpoints = slices.flat_map(|slice| &slice.stored.endpoints);
        let of = |endpoint: &proto::SliceEndpoint| {
            let conditions = endpoint.conditions.unwrap();
            (endpoint.node_name.clone(), conditions.ready.unwrap(), conditions.serving.unwrap())
        };
        let mut all: Vec<_> = endpoints.map(of).collect();
        all.sort_unstable();
        all
    }
}

#[test]
fn bad_probes_are_named_as_in_manifests() {
    type Break = fn(&mut proto::Probe);
    fn get(probe: &mut proto::Probe) -> &mut proto::HttpGetAction {
        probe.http_get.as_mut().unwrap()
    }
    let header = |name: &str| vec![proto::HttpHeader { name: name.into(), value: String::new() }];
    let cases: [(&str, Break); 11] = [
        ("", |p| p.http_get = None),
        ("", |p| p.exec = Some(proto::ExecAction { command: vec!["true".into()] })),
        (".periodSeconds", |p| p.period_seconds = 86_401),
        (".failureThreshold", |p| p.failure_threshold = 86_401),
        (".httpGet.port", |p| get(p).port.clear()),
        (".httpGet.port", |p| get(p).port = "0".into()),
        (".httpGet.scheme", |p| get(p).scheme = "FTP".into()),
        (".httpGet.path", |p| get(p).path = "x".into()),
        (".httpGet.path", |p| get(p).path = "/a\nb".into()),
        (".exec.command", |p| *p = proto::Probe { exec: Some(Default::default()), ..Default::default() }),
        (".grpc.port", |p| *p = proto::Probe { grpc: Some(Default::default()), ..Default::default() }),
    ];
    let mut world = World::with_services(1);
    for (path, make_bad) in cases {
        let mut probe = http("80");
        make_bad(&mut probe);
        let error = world.create_service(0, &probing("s", probe)).unwrap_err();
        assert_eq!(path_of(&error), format!("spec.readinessProbe{path}"), "{error}");
    }
    let mut probe = http("80");
    get(&mut probe).http_headers = header("a b");
    let error = world.create_service(0, &probing("s", probe)).unwrap_err();
    assert_eq!(path_of(&error), "spec.readinessProbe.httpGet.httpHeaders");
    // What is left out has kubelet's defaults.
    let created = world.create_service(0, &probing("s", http("80"))).unwrap();
    let probe = created.spec.unwrap().readiness_probe.unwrap();
    let numbers =
        (probe.timeout_seconds, probe.period_seconds, probe.success_threshold, probe.failure_threshold);
    assert_eq!((numbers, &*probe.http_get.unwrap().path), ((1, 10, 1, 3), "/"));
}

#[test]
fn an_endpoint_is_ready_once_its_probe_says_so() {
    let mut world = World::with_services(1);
    let web = labels(&[("app", "web"), ("port.muster/http", "8080")]);
    let a = world.add("a", 1, web.clone());
    let b = world.add("b", 2, web);
    let mut wanted = probing("s", http("http"));
    wanted.spec.as_mut().unwrap().ports[0].target_port = "http".into();
    world.create_service(0, &wanted).unwrap();
    world.create_service(0, &selecting("plain", &[("app", "web")])).unwrap();
    let all = |a: bool, b: bool| vec![("a".to_owned(), a, a), ("b".to_owned(), b, b)];
    assert_eq!((world.conditions("s"), world.conditions("plain")), (all(false, false), all(true, true)));
    // Each probes itself, where it is reached, and at the number of the port.
    let probes = world.probes(a);
    assert_eq!((probes.len(), &*probes[0].service, &*probes[0].device_uid), (1, "s", &*a.to_string()));
    let address = world.device(0, a).unwrap().ipv4.unwrap().to_string();
    let port = &probes[0].probe.as_ref().unwrap().http_get.as_ref().unwrap().port;
    assert_eq!((&probes[0].address, &**port), (&address, "8080"));

    world.find(a, &[("s", a, true)]).unwrap();
    assert_eq!(world.conditions("s"), all(true, false));
    // Nobody speaks for another, nor of Services that do not ask.
    world.find(a, &[("s", b, true), ("plain", a, false), ("none", a, true)]).unwrap();
    assert_eq!((world.conditions("s"), world.conditions("plain")), (all(true, false), all(true, true)));
    world.find(b, &[("s", b, true)]).unwrap();
    // What is not told stays.
    world.find(a, &[]).unwrap();
    assert_eq!(world.conditions("s"), all(true, true));
    let loaded = world.load();
    assert!(world.indexes[0].changes_to(&loaded).is_empty());
    world.find(a, &[("s", a, false)]).unwrap();
    assert_eq!(world.conditions("s"), all(false, true));
    let mut wanted = service("s");
    wanted.spec.as_mut().unwrap().publish_not_ready_addresses = true;
    world.update_service(0, &wanted, &["spec.publish_not_ready_addresses"]).unwrap();
    assert_eq!(world.conditions("s"), all(true, true));
    world.update_service(0, &service("s"), &["spec.publish_not_ready_addresses"]).unwrap();
    // Without a probe, all are ready again, and nobody probes.
    world.update_service(0, &service("s"), &["spec.readiness_probe"]).unwrap();
    assert_eq!((world.conditions("s"), world.probes(a).len()), (all(true, true), 0));
    world.delete_device(0, "a").unwrap();
    assert!(world.indexes[0].network("n").unwrap().readiness.contains_key(&b));
    assert!(!world.indexes[0].network("n").unwrap().readiness.contains_key(&a));
    assert!(matches!(world.find(a, &[("s", a, true)]), Err(DeviceError::Gone)));
}

#[test]
fn a_gate_probes_the_hosts_that_it_speaks_for() {
    let mut world = World::with_services(1);
    let gate = world.add("gate", 1, Labels::new());
    let other = world.add("other", 2, Labels::new());
    world.approve("gate", true, &[]).unwrap();
    world.offer(0, gate, &["tv"], &[]);
    world.label("tv", labels(&[("app", "web")]));
    world.create_service(0, &probing("s", http("80"))).unwrap();
    let probes = world.probes(gate);
    assert_eq!((probes.len(), &*probes[0].address), (1, "192.168.7.1"));
    let tv = Uuid::try_parse(&probes[0].device_uid).unwrap();
    world.find(other, &[("s", tv, true)]).unwrap();
    assert_eq!(world.conditions("s"), [("tv".to_owned(), false, false)]);
    world.find(gate, &[("s", tv, true)]).unwrap();
    assert_eq!(world.conditions("s"), [("tv".to_owned(), true, true)]);
}
