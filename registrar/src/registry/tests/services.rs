//! Services and EndpointSlices: what is valid, who gets which ClusterIP, and what DNS answers from.

use muster_dns::directory::{ExternalAddress, ServiceKind};

use super::{admin::path_of, *};
use crate::store::Txn;

fn spec(service: &mut proto::Service) -> &mut proto::ServiceSpec {
    service.spec.as_mut().unwrap()
}

fn with(name: &str, change: impl FnOnce(&mut proto::ServiceSpec)) -> proto::Service {
    let mut wanted = service(name);
    change(spec(&mut wanted));
    wanted
}

fn cluster_ips(service: &proto::Service) -> Vec<String> {
    service.spec.as_ref().unwrap().cluster_ips.clone()
}

fn serials(world: &World) -> (u32, u32, u32) {
    let state = world.indexes[0].network("n").unwrap();
    (state.serial, state.external_serial, state.headless_serial)
}

/// Whether each of the three serials moves when `change` is made.
fn moved(world: &mut World, change: impl FnOnce(&mut World)) -> [bool; 3] {
    world.now = world.now + Duration::from_secs(10);
    let before = serials(world);
    change(world);
    let after = serials(world);
    [before.0 != after.0, before.1 != after.1, before.2 != after.2]
}

#[test]
fn bad_fields_are_named_as_in_manifests() {
    type Break = fn(&mut proto::ServiceSpec);
    fn second(spec: &mut proto::ServiceSpec, name: &str, port: u32) {
        spec.ports.push(proto::ServicePort { name: name.into(), port, ..Default::default() });
    }
    let cases: [(&str, Break); 34] = [
        ("spec.ports", |s| s.ports.clear()),
        ("spec.type", |s| s.r#type = "Cluster".into()),
        ("spec.ports[0].port", |s| s.ports[0].port = 0),
        ("spec.ports[0].port", |s| s.ports[0].port = 65_536),
        ("spec.ports[0].protocol", |s| s.ports[0].protocol = "DCCP".into()),
        ("spec.ports[0].name", |s| s.ports[0].name = "_http".into()),
        ("spec.ports[0].targetPort", |s| s.ports[0].target_port = "70000".into()),
        ("spec.ports[0].appProtocol", |s| s.ports[0].app_protocol = "a b".into()),
        ("spec.ports[1].name", |s| second(s, "", 81)),
        ("spec.ports[1].name", |s| second(s, "HTTP", 81)),
        ("spec.ports[1].port", |s| second(s, "other", 80)),
        ("spec.clusterIP", |s| s.cluster_ip = "x".into()),
        ("spec.clusterIP", |s| s.cluster_ip = "10.9.0.1".into()),
        ("spec.clusterIP", |s| s.cluster_ip = "10.1.0.0".into()),
        ("spec.clusterIPs", |s| {
            s.cluster_ip = "10.1.0.1".into();
            s.cluster_ips = vec!["10.1.0.2".into()];
        }),
        ("spec.clusterIPs", |s| s.cluster_ips = vec!["10.1.0.1".into(), "10.1.0.2".into()]),
        ("spec.clusterIPs", |s| s.cluster_ips = vec!["None".into(), "10.1.0.2".into()]),
        ("spec.ipFamilies[0]", |s| s.ip_families = vec!["IPv5".into()]),
        ("spec.ipFamilies[1]", |s| s.ip_families = vec!["IPv4".into(), "IPv4".into()]),
        ("spec.ipFamilies[0]", |s| {
            s.cluster_ip = "10.1.0.1".into();
            s.ip_families = vec!["IPv6".into()];
        }),
        ("spec.ipFamilyPolicy", |s| s.ip_family_policy = "Dual".into()),
        ("spec.ipFamilyPolicy", |s| {
            s.ip_family_policy = "SingleStack".into();
            s.ip_families = vec!["IPv4".into(), "IPv6".into()];
        }),
        ("spec.externalName", |s| s.external_name = "a.example".into()),
        ("spec.externalName", |s| s.r#type = "ExternalName".into()),
        ("spec.externalName", |s| {
            s.r#type = "ExternalName".into();
            s.external_name = "a_b".into();
        }),
        ("spec.clusterIP", |s| {
            s.r#type = "ExternalName".into();
            s.external_name = "a.example".into();
            s.cluster_ip = "10.1.0.1".into();
        }),
        ("spec.externalIPs[0]", |s| s.external_ips = vec!["x".into()]),
        ("spec.externalIPs[1]", |s| s.external_ips = vec!["192.0.2.1".into(), "127.0.0.1".into()]),
        ("spec.externalIPs[0]", |s| s.external_ips = vec!["ff02::1".into()]),
        ("spec.sessionAffinity", |s| s.session_affinity = "Cookie".into()),
        ("spec.sessionAffinityConfig", |s| {
            let client_ip = Some(proto::ClientIpConfig { timeout_seconds: 1 });
            s.session_affinity_config = Some(proto::SessionAffinityConfig { client_ip });
        }),
        ("spec.internalTrafficPolicy", |s| s.internal_traffic_policy = "Near".into()),
        ("spec.trafficDistribution", |s| s.traffic_distribution = "Near".into()),
        ("spec.selector", |s| drop(s.selector.insert("a b".into(), String::new()))),
    ];
    let mut world = World::with_services(1);
    for (path, make_bad) in cases {
        let error = world.create_service(0, &with("a", make_bad)).unwrap_err();
        assert_eq!(path_of(&error), path, "{error}");
    }
    for name in ["", "a_b", "a.b", &"a".repeat(64)] {
        let error = world.create_service(0, &service(name)).unwrap_err();
        assert_eq!(path_of(&error), "metadata.name", "{name}");
    }
    // Nothing has been kept for what was refused.
    let pool = |world: &World| {
        let counts = world.indexes[0].network("n").unwrap().pools().map(|(_, pool)| pool.counts(world.now));
        counts.map(|counts| counts.reserved + counts.used).sum::<u64>()
    };
    assert_eq!(pool(&world), 0);
}

#[test]
fn bad_slices_are_named_as_in_manifests() {
    type Break = fn(&mut proto::EndpointSlice);
    let cases: [(&str, Break); 12] = [
        ("addressType", |s| s.address_type = "FQDN".into()),
        ("addressType", |s| s.address_type.clear()),
        ("endpoints[0].addresses[0]", |s| s.address_type = "IPv6".into()),
        ("endpoints[0].addresses[0]", |s| s.endpoints[0].addresses[0] = "0.0.0.0".into()),
        ("endpoints[0].addresses", |s| s.endpoints[0].addresses.clear()),
        ("endpoints[0].hostname", |s| s.endpoints[0].hostname = "a.b".into()),
        ("endpoints", |s| s.endpoints = vec![s.endpoints[0].clone(); 1001]),
        ("ports[0].port", |s| s.ports[0].port = 0),
        ("ports[0].protocol", |s| s.ports[0].protocol = "tcp".into()),
        ("ports[1].name", |s| s.ports.push(s.ports[0].clone())),
        ("metadata.name", |s| s.metadata.as_mut().unwrap().name = "a..b".into()),
        ("metadata.labels[kubernetes.io/service-name]", |s| {
            let labels = &mut s.metadata.as_mut().unwrap().labels;
            labels.insert("kubernetes.io/service-name".into(), "a.b".into());
        }),
    ];
    let mut world = World::with_services(1);
    for (path, make_bad) in cases {
        let mut wanted = slice("a", "web", &["10.0.0.1"]);
        make_bad(&mut wanted);
        let error = world.create_slice(&wanted).unwrap_err();
        assert_eq!(path_of(&error), path, "{error}");
    }
    let mut long = slice("a", "web", &["10.0.0.1"]);
    long.endpoints = vec![long.endpoints[0].clone(); 1000];
    long.endpoints.iter_mut().for_each(|endpoint| endpoint.node_name = "x".repeat(253));
    assert_eq!(path_of(&world.create_slice(&long).unwrap_err()), "endpointSlice");
    assert!(world.create_slice(&slice("web.example.1", "web", &["10.0.0.1"])).is_ok());
}

#[test]
fn defaults_are_those_of_kubernetes() {
    let mut world = World::with_services(1);
    let created = world.create_service(0, &service("Web")).unwrap();
    let spec = created.spec.clone().unwrap();
    assert_eq!(created.metadata.as_ref().unwrap().name, "web");
    assert_eq!(created.metadata.as_ref().unwrap().namespace, "default");
    assert_eq!((&*spec.r#type, &*spec.session_affinity), ("ClusterIP", "None"));
    assert_eq!((&*spec.ip_family_policy, &*spec.internal_traffic_policy), ("SingleStack", "Cluster"));
    assert_eq!(
        (spec.ip_families, spec.cluster_ips.clone()),
        (vec!["IPv4".to_owned()], vec![spec.cluster_ip])
    );
    assert_eq!((&*spec.ports[0].protocol, &*spec.ports[0].target_port), ("TCP", "80"));
    let address: std::net::Ipv4Addr = spec.cluster_ips[0].parse().unwrap();
    assert!(address.octets()[3] > 16, "from the dynamic band: {address}");
    let affine = with("b", |s| s.session_affinity = "ClientIP".into());
    let affine = world.create_service(0, &affine).unwrap().spec.unwrap();
    let client = affine.session_affinity_config.unwrap().client_ip.unwrap();
    assert_eq!(client.timeout_seconds, 10_800);
    assert!(matches!(world.create_service(0, &service("web")), Err(AdminError::Exists { .. })));
}

#[test]
fn families_follow_policy_and_pools() {
    let mut world = World::with_services(1);
    let mut families = |name: &str, change: fn(&mut proto::ServiceSpec)| -> Result<Vec<String>, String> {
        let created = world.create_service(0, &with(name, change));
        created
            .map(|created| spec(&mut created.clone()).ip_families.clone())
            .map_err(|e| path_of(&e).to_owned())
    };
    let both = Ok(vec!["IPv4".to_owned(), "IPv6".to_owned()]);
    assert_eq!(families("a", |s| s.ip_family_policy = "PreferDualStack".into()), both);
    assert_eq!(families("b", |s| s.ip_family_policy = "RequireDualStack".into()), both);
    assert_eq!(families("c", |s| s.ip_families = vec!["IPv4".into(), "IPv6".into()]), both);
    assert_eq!(families("d", |s| s.cluster_ip = "fd00:1::5".into()), Ok(vec!["IPv6".to_owned()]));
    let mut world = World::new(1);
    let mut network = service_network();
    network.spec.as_mut().unwrap().service_pool_v6.clear();
    world.create_network(&network).unwrap();
    let mut families = |name: &str, change: fn(&mut proto::ServiceSpec)| -> Result<Vec<String>, String> {
        let created = world.create_service(0, &with(name, change));
        created
            .map(|created| spec(&mut created.clone()).ip_families.clone())
            .map_err(|e| path_of(&e).to_owned())
    };
    assert_eq!(families("a", |s| s.ip_family_policy = "PreferDualStack".into()), Ok(vec!["IPv4".to_owned()]));
    let refused = |path: &str| Err(path.to_owned());
    assert_eq!(
        families("b", |s| s.ip_family_policy = "RequireDualStack".into()),
        refused("spec.ipFamilyPolicy")
    );
    assert_eq!(families("c", |s| s.ip_families = vec!["IPv6".into()]), refused("spec.ipFamilies"));
    assert_eq!(families("d", |s| s.cluster_ip = "fd00:1::5".into()), refused("spec.clusterIP"));
}

#[test]
fn a_chosen_cluster_ip_has_one_owner_and_rests_after_it() {
    let mut world = World::with_services(2);
    let chosen = |name: &str| with(name, |s| s.cluster_ip = "10.1.0.5".into());
    world.create_service(0, &chosen("a")).unwrap();
    // The other registrar has not seen it.
    assert_eq!(path_of(&world.create_service(1, &chosen("b")).unwrap_err()), "spec.clusterIP");
    world.delete_service(1, "a").unwrap();
    let error = world.create_service(0, &chosen("b")).unwrap_err();
    assert!(error.to_string().contains("quarantine"), "{error}");
    world.now = world.now + Duration::from_secs(25 * 3600);
    assert_eq!(cluster_ips(&world.create_service(0, &chosen("b")).unwrap()), ["10.1.0.5"]);
    world.restart(0);
    assert_eq!(path_of(&world.create_service(0, &chosen("c")).unwrap_err()), "spec.clusterIP");
}

#[test]
fn the_pool_runs_dry_without_harm() {
    let mut world = World::with_services(2);
    let mut seen = std::collections::BTreeSet::new();
    for n in 0..30 {
        let created = world.create_service(n % 2, &service(&format!("s{n}"))).unwrap();
        assert!(seen.insert(cluster_ips(&created)));
    }
    let error = world.create_service(0, &service("more")).unwrap_err();
    assert!(
        error.to_string().starts_with("spec.clusterIP: the address pool 10.1.0.0/27 is exhausted"),
        "{error}"
    );
    // With two families, the first one's reservation is given up when the second one fails.
    let dual = with("dual", |s| s.ip_families = vec!["IPv6".into(), "IPv4".into()]);
    assert!(world.create_service(0, &dual).is_err());
    let reserved = |world: &World| {
        let pools = world.indexes[0].network("n").unwrap().pools();
        pools.map(|(_, pool)| pool.counts(world.now).reserved).sum::<u64>()
    };
    assert_eq!(reserved(&world), 0);
}

#[test]
fn types_change_and_addresses_come_and_go_with_them() {
    let mut world = World::with_services(1);
    let first = cluster_ips(&world.create_service(0, &service("a")).unwrap());
    let external = with("a", |s| {
        s.r#type = "ExternalName".into();
        s.external_name = "db.example.com".into();
    });
    assert!(cluster_ips(&world.update_service(0, &external, &[]).unwrap()).is_empty());
    let released = world.indexes[0].network("n").unwrap().released().count();
    assert_eq!(released, 1);
    // Back: the name goes with the type, and the address is another one, as the old one rests.
    let again = world.update_service(0, &service("a"), &["spec.type"]).unwrap();
    assert_eq!(again.spec.as_ref().unwrap().external_name, "");
    assert_eq!(cluster_ips(&again).len(), 1);
    assert_ne!(cluster_ips(&again), first);
    // A second family, and away with it.
    let dual = with("a", |s| s.ip_family_policy = "PreferDualStack".into());
    let dual = world.update_service(0, &dual, &["spec.ip_family_policy"]).unwrap();
    assert_eq!((cluster_ips(&dual).len(), &cluster_ips(&dual)[0]), (2, &cluster_ips(&again)[0]));
    let single = with("a", |s| s.ip_family_policy = "SingleStack".into());
    let single = world.update_service(0, &single, &["spec.ip_family_policy"]).unwrap();
    assert_eq!(cluster_ips(&single), cluster_ips(&again));
    assert_eq!(world.indexes[0].network("n").unwrap().released().count(), 2);
    // What does not change.
    let other = with("a", |s| s.cluster_ip = "10.1.0.9".into());
    assert_eq!(path_of(&world.update_service(0, &other, &[]).unwrap_err()), "spec.clusterIP");
    let headless = with("a", |s| s.cluster_ip = "None".into());
    assert_eq!(path_of(&world.update_service(0, &headless, &[]).unwrap_err()), "spec.clusterIP");
    let v6 = with("a", |s| s.ip_families = vec!["IPv6".into()]);
    assert_eq!(
        path_of(&world.update_service(0, &v6, &["spec.ip_families"]).unwrap_err()),
        "spec.ipFamilies[0]"
    );
    assert_eq!(path_of(&world.update_service(0, &v6, &["spec.cluster_ip"]).unwrap_err()), "update_mask");
    // As it was: nothing is written.
    let revision = world.indexes[0].revision();
    world.update_service(0, &service("a"), &[]).unwrap();
    assert_eq!(world.indexes[0].revision(), revision);
    let mut stale = service("a");
    stale.metadata.as_mut().unwrap().resource_version = 1;
    assert!(matches!(world.update_service(0, &stale, &[]), Err(AdminError::Changed { .. })));
}

#[test]
fn status_is_changed_by_its_mask_alone_and_on_load_balancers_alone() {
    let mut world = World::with_services(1);
    let mut wanted = with("a", |s| s.r#type = "LoadBalancer".into());
    let ingress = vec![
        proto::LoadBalancerIngress { ip: "192.0.2.7".into(), hostname: String::new() },
        proto::LoadBalancerIngress { ip: String::new(), hostname: "lb.example.com".into() },
    ];
    wanted.status = Some(proto::ServiceStatus { load_balancer: Some(proto::LoadBalancerStatus { ingress }) });
    world.create_service(0, &wanted).unwrap();
    let external = |world: &World| {
        world.indexes[0].network("n").unwrap().service("default", "a").unwrap().external.clone()
    };
    assert!(external(&world).is_empty());
    world.update_service(0, &wanted, &[]).unwrap();
    assert!(external(&world).is_empty());
    world.update_service(0, &wanted, &["status.load_balancer"]).unwrap();
    let expected =
        [ExternalAddress::Ip("192.0.2.7".parse().unwrap()), ExternalAddress::Host("lb.example.com".into())];
    assert_eq!(external(&world), expected);
    world.update_service(0, &service("a"), &["spec.type"]).unwrap();
    assert!(external(&world).is_empty());
    let error = world.update_service(0, &wanted, &["status.load_balancer"]).unwrap_err();
    assert_eq!(path_of(&error), "status.loadBalancer");
}

#[test]
fn dns_answers_from_services_merged_with_their_slices() {
    let mut world = World::with_services(1);
    // Slices may come before their Service.
    let mut one = slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]);
    one.endpoints[0].hostname = "First".into();
    one.endpoints[0].target_ref =
        Some(proto::ObjectReference { kind: "Device".into(), name: "dev".into(), ..Default::default() });
    one.endpoints[1].conditions =
        Some(proto::EndpointConditions { ready: Some(false), ..Default::default() });
    world.create_slice(&one).unwrap();
    assert!(world.indexes[0].network("n").unwrap().service("default", "web").is_none());
    world.create_service(0, &with("web", |s| s.external_ips = vec!["192.0.2.9".into()])).unwrap();
    world.create_slice(&slice("web-0", "web", &["10.0.0.3"])).unwrap();
    world.create_service(0, &with("other", |s| s.cluster_ip = "None".into())).unwrap();
    world.create_slice(&slice("x", "other", &["10.0.0.1"])).unwrap();
    let state = world.indexes[0].network("n").unwrap();
    let web = state.service("default", "web").unwrap();
    let addresses: Vec<String> = web.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    assert_eq!(addresses, ["10.0.0.3", "10.0.0.1"]);
    assert_eq!(web.endpoints[1].hostname.as_ref().unwrap().as_str(), "first");
    assert_eq!(web.endpoints[1].device.as_ref().unwrap().as_str(), "dev");
    assert_eq!((web.endpoints[0].ports[0].number, web.ports[0].number), (8080, 80));
    assert_eq!(state.service("default", "other").unwrap().kind, ServiceKind::Headless);
    let at = |state: &crate::registry::index::NetworkState, text: &str| -> Vec<String> {
        state.services_at(text.parse().unwrap()).map(|found| found.name.to_string()).collect()
    };
    assert_eq!(at(state, "10.0.0.1"), ["other", "web"]);
    assert_eq!((at(state, "10.0.0.2"), at(state, "192.0.2.9")), (vec![], vec!["web".to_owned()]));
    let ServiceKind::ClusterIp(own) = &web.kind else { panic!("{web:?}") };
    assert_eq!(at(state, &own[0].to_string()), ["web"]);
    assert_eq!(state.services().map(|view| view.name.to_string()).collect::<Vec<_>>(), ["other", "web"]);
    // A slice that goes over to another Service, and one that goes.
    let mut moved = slice("web-1", "other", &[]);
    moved.endpoints = one.endpoints;
    let mask = mask(&["metadata.labels"]);
    world.commit(0, |index, _| plan::slice::update(index, &moved, Some(&mask))).unwrap();
    world.commit(0, |index, _| plan::slice::delete(index, "n", "", "x", 0)).unwrap();
    let state = world.indexes[0].network("n").unwrap();
    let count = |name: &str| state.service("default", name).unwrap().endpoints.len();
    assert_eq!((count("web"), count("other")), (1, 1));
    assert_eq!(at(state, "10.0.0.1"), ["other"]);
    let mut other = moved.clone();
    other.address_type = "IPv6".into();
    let error = world.commit(0, |index, _| plan::slice::update(index, &other, None)).unwrap_err();
    assert_eq!(path_of(&error), "addressType");
}

#[test]
fn views_are_made_anew_only_when_they_change() {
    let mut world = World::with_services(1);
    world.create_service(0, &service("a")).unwrap();
    world.create_service(0, &service("b")).unwrap();
    let view = |world: &World, name: &str| {
        world.indexes[0].network("n").unwrap().service("default", name).unwrap().clone()
    };
    let (a, b) = (view(&world, "a"), view(&world, "b"));
    world.create_slice(&slice("a-1", "a", &["10.0.0.1"])).unwrap();
    let mut labelled = service("b");
    labelled.metadata.as_mut().unwrap().labels.insert("tier".into(), "x".into());
    world.update_service(0, &labelled, &["metadata.labels"]).unwrap();
    assert!(!std::sync::Arc::ptr_eq(&a, &view(&world, "a")));
    assert!(std::sync::Arc::ptr_eq(&b, &view(&world, "b")));
}

/// Specification 10 and 12.
#[test]
fn serials_move_with_served_records_alone() {
    let mut world = World::with_services(1);
    let (zone, zone_and_external, nothing) = ([true, false, false], [true, true, false], [false; 3]);
    let external = with("ext", |s| s.external_ips = vec!["192.0.2.1".into()]);
    assert_eq!(moved(&mut world, |w| drop(w.create_service(0, &service("a")))), zone);
    assert_eq!(moved(&mut world, |w| drop(w.create_service(0, &external))), zone_and_external);
    let headless = with("h", |s| s.cluster_ip = "None".into());
    assert_eq!(moved(&mut world, |w| drop(w.create_service(0, &headless))), [true, false, true]);
    assert_eq!(moved(&mut world, |w| drop(w.create_slice(&slice("a-1", "a", &["10.0.0.1"])))), zone);
    assert_eq!(
        moved(&mut world, |w| drop(w.create_slice(&slice("h-1", "h", &["10.0.0.1"])))),
        [true, false, true]
    );
    assert_eq!(moved(&mut world, |w| drop(w.create_slice(&slice("o-1", "nobody", &["10.0.0.1"])))), nothing);
    let mut labelled = service("a");
    labelled.metadata.as_mut().unwrap().annotations.insert("note".into(), "x".into());
    spec(&mut labelled).selector.insert("role".into(), "web".into());
    let paths = ["metadata.annotations", "spec.selector"];
    assert_eq!(moved(&mut world, |w| drop(w.update_service(0, &labelled, &paths))), nothing);
    let port = with("a", |s| s.ports[0].port = 81);
    assert_eq!(moved(&mut world, |w| drop(w.update_service(0, &port, &["spec.ports"]))), zone);
    let port = with("ext", |s| s.ports[0].port = 81);
    assert_eq!(moved(&mut world, |w| drop(w.update_service(0, &port, &["spec.ports"]))), zone_and_external);
    let others = with("ext", |s| s.external_ips = vec!["192.0.2.2".into()]);
    let paths = ["spec.external_ips"];
    assert_eq!(moved(&mut world, |w| drop(w.update_service(0, &others, &paths))), [false, true, false]);
    let mut not_ready = slice("a-1", "a", &["10.0.0.1"]);
    not_ready.endpoints[0].conditions =
        Some(proto::EndpointConditions { serving: Some(true), ..Default::default() });
    let update = |w: &mut World, slice: &proto::EndpointSlice| {
        w.commit(0, |index, _| plan::slice::update(index, slice, None)).unwrap();
    };
    assert_eq!(moved(&mut world, |w| update(w, &not_ready)), nothing);
    not_ready.endpoints[0].conditions =
        Some(proto::EndpointConditions { ready: Some(false), ..Default::default() });
    assert_eq!(moved(&mut world, |w| update(w, &not_ready)), zone);
    not_ready.endpoints[0].addresses[0] = "10.0.0.9".into();
    assert_eq!(moved(&mut world, |w| update(w, &not_ready)), nothing);
    assert_eq!(moved(&mut world, |w| drop(w.create_namespace("team"))), zone);
    assert_eq!(moved(&mut world, |w| w.delete_service(0, "ext").unwrap()), zone_and_external);
    // Nor with what the network's zones do not show.
    let mut network = service_network();
    network.metadata.as_mut().unwrap().labels.insert("a".into(), "b".into());
    let paths = mask(&["metadata.labels"]);
    let relabel = |w: &mut World| {
        w.commit(0, |index, _| plan::network::update(index, &network, Some(&paths), None)).unwrap();
    };
    assert_eq!(moved(&mut world, relabel), nothing);
}

#[test]
fn a_service_is_deleted_with_its_slices_however_many() {
    let mut world = World::with_services(1);
    world.create_service(0, &service("a")).unwrap();
    world.create_service(0, &service("b")).unwrap();
    for n in 0..200 {
        world.create_slice(&slice(&format!("a-{n}"), "a", &["10.0.0.1"])).unwrap();
    }
    world.create_slice(&slice("b-1", "b", &["10.0.0.1"])).unwrap();
    let now = world.now;
    // A registrar that dies over it leaves the Service there, to be deleted again; what a change is made to stays.
    let delete = |world: &mut World, version| {
        world.commit(0, |index, _| plan::service::delete(index, "n", "", "a", version, now))
    };
    let version = delete(&mut world, 0).unwrap().unwrap();
    let state = world.indexes[0].network("n").unwrap();
    assert!(state.service("default", "a").is_some());
    assert!((1..150).contains(&state.services.slices_of("default", "a").count()));
    assert!(matches!(delete(&mut world, version + 1), Err(AdminError::Changed { .. })));
    world.delete_service(0, "a").unwrap();
    let state = world.indexes[0].network("n").unwrap();
    let left: Vec<&str> = state.services.slices.iter().map(|slice| &*slice.name).collect();
    assert_eq!(left, ["b-1"]);
    assert!(matches!(world.delete_service(0, "a"), Err(AdminError::NotFound { .. })));
}

#[test]
fn what_is_damaged_or_lost_is_told_and_left_alone() {
    let mut world = World::with_services(1);
    world.create_service(0, &service("a")).unwrap();
    let valid = world.store.range_sync(&KeyRange::key(keys::service("n", "default", "a")), None, 1).unwrap();
    let value = valid.kvs[0].value.clone();
    let txn = Txn::new()
        .put(keys::service("n", "default", "b"), value.clone())
        .put(keys::service("n", "nowhere", "a"), value.clone())
        .put(keys::service("other", "default", "a"), value)
        .put(keys::service("n", "default", "c"), &b"\xff"[..])
        .put(keys::endpoint_slice("n", "default", "c"), &b"\xff"[..])
        .put(keys::namespace("n", "c"), &b"\xff"[..]);
    world.store.apply_txn(&txn).unwrap();
    let changes = world.store.changes_sync(&KeyRange::all(), world.indexes[0].revision() + 1).unwrap();
    let applied = world.indexes[0].apply(&changes.batches[0], world.now);
    assert_eq!((applied.bad.len(), applied.changes.len()), (6, 0));
    assert_eq!(world.indexes[0].network("n").unwrap().services.services.len(), 1);
    let mut index = Index::new();
    let mut bad = 0;
    for range in keys::loaded() {
        let page = world.store.range_sync(&range, None, usize::MAX).unwrap();
        bad += index.load(&page.kvs, world.now).len();
    }
    assert_eq!((bad, index.network("n").unwrap().services.services.len()), (6, 1));
}
