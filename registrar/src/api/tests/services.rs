//! Namespaces, Services and EndpointSlices through the admin API, and Services as devices list them.

use muster_proto::{
    admin::{
        CreateEndpointSliceRequest, CreateNamespaceRequest, CreateServiceRequest, DeleteNamespaceRequest,
        DeleteServiceRequest, GetServiceRequest, ListEndpointSlicesRequest, ListNamespacesRequest,
        ListServicesRequest, UpdateServiceRequest, WatchServicesRequest,
        endpoint_slice_service_server::EndpointSliceService as _,
        namespace_service_server::NamespaceService as _, service_service_server::ServiceService as _,
    },
    registration,
};

use super::*;
use crate::registry::tests::{service, slice};

impl Fixture {
    fn namespaces(&self) -> admin_namespaces::Namespaces {
        admin_namespaces::Namespaces(self.api.clone())
    }

    fn services(&self) -> admin_services::Services {
        admin_services::Services(self.api.clone())
    }

    fn slices(&self) -> admin_endpoint_slices::EndpointSlices {
        admin_endpoint_slices::EndpointSlices(self.api.clone())
    }

    async fn create_namespace(&self, name: &str) -> Result<proto::Namespace, Status> {
        let namespace = Some(proto::Namespace { metadata: Some(meta("n", name)), status: None });
        let request = CreateNamespaceRequest { namespace, validate_only: false };
        let created = self.namespaces().create_namespace(operator(request)).await?;
        Ok(created.into_inner().namespace.unwrap())
    }

    async fn create_service(&self, wanted: proto::Service, only: bool) -> Result<proto::Service, Status> {
        let request = CreateServiceRequest { service: Some(wanted), validate_only: only };
        let created = self.services().create_service(operator(request)).await?;
        Ok(created.into_inner().service.unwrap())
    }

    async fn create_slice(&self, wanted: proto::EndpointSlice) {
        let request = CreateEndpointSliceRequest { endpoint_slice: Some(wanted), validate_only: false };
        self.slices().create_endpoint_slice(operator(request)).await.unwrap();
    }

    async fn list(&self, namespace: &str, options: ListOptions) -> (Vec<String>, String) {
        let request =
            ListServicesRequest { network: "n".into(), namespace: namespace.into(), options: Some(options) };
        let listed = self.services().list_services(operator(request)).await.unwrap().into_inner();
        let names = listed.services.into_iter().map(|service| {
            let meta = service.metadata.unwrap();
            format!("{}/{}", meta.namespace, meta.name)
        });
        (names.collect(), listed.next_page_token)
    }

    /// Names that a device lists, and the next page's token.
    async fn listed_by(
        &self,
        uid: &str,
        namespace: &str,
        token: &str,
    ) -> Result<(Vec<registration::VisibleService>, String), Status> {
        let request =
            registration::ListServicesRequest { namespace: namespace.into(), page_token: token.into() };
        let listed = self.registration().list_services(by_device(request, uid)).await?.into_inner();
        Ok((listed.services, listed.next_page_token))
    }
}

fn named(name: &str, namespace: &str) -> proto::Service {
    let mut wanted = service(name);
    wanted.metadata.as_mut().unwrap().namespace = namespace.into();
    wanted
}

#[tokio::test]
async fn operators_alone_administer_services() {
    let registrar = fixture_of(World::with_services(1)).await;
    let request = || CreateServiceRequest { service: Some(service("a")), validate_only: true };
    let refused = async |request| registrar.services().create_service(request).await.unwrap_err().code();
    assert_eq!(refused(stranger(request())).await, Code::Unauthenticated);
    let device = "00000000-0000-0000-0000-000000000001";
    assert_eq!(refused(by_device(request(), device)).await, Code::PermissionDenied);
    let list = ListNamespacesRequest { network: "n".into(), options: None };
    assert_eq!(
        registrar.namespaces().list_namespaces(stranger(list)).await.unwrap_err().code(),
        Code::Unauthenticated
    );
    let list = ListEndpointSlicesRequest { network: "n".into(), ..Default::default() };
    let listed = registrar.slices().list_endpoint_slices(by_device(list, device)).await;
    assert_eq!(listed.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn refusals_have_their_codes() {
    let registrar = fixture_of(World::with_services(1)).await;
    registrar.create_service(service("a"), false).await.unwrap();
    let mut taken = service("b");
    let found = registrar.api.registry.read().network("n").unwrap().services().next().unwrap().clone();
    let muster_dns::directory::ServiceKind::ClusterIp(addresses) = &found.kind else { panic!("{found:?}") };
    taken.spec.as_mut().unwrap().cluster_ip = addresses[0].to_string();
    let mut outside = service("b");
    outside.spec.as_mut().unwrap().cluster_ip = "192.0.2.1".into();
    let mut elsewhere = service("b");
    elsewhere.metadata.as_mut().unwrap().network = "nowhere".into();
    for (wanted, code, says) in [
        (service("a"), Code::AlreadyExists, "exists already"),
        (
            named("b", "team"),
            Code::NotFound,
            "metadata.namespace: namespace \"team\" does not exist; create it",
        ),
        (elsewhere, Code::NotFound, "network \"nowhere\""),
        (taken, Code::AlreadyExists, "spec.clusterIP: "),
        (outside, Code::InvalidArgument, "choose an address from it"),
    ] {
        for only in [true, false] {
            let error = registrar.create_service(wanted.clone(), only).await.unwrap_err();
            assert_eq!(error.code(), code, "{error}");
            assert!(error.message().contains(says), "{error}");
        }
    }
}

#[tokio::test]
async fn what_is_only_validated_is_not_written() {
    let registrar = fixture_of(World::with_services(1)).await;
    let revision = registrar.api.registry.read().revision();
    let mut dual = service("a");
    dual.spec.as_mut().unwrap().ip_family_policy = "RequireDualStack".into();
    dual.spec.as_mut().unwrap().cluster_ip = "10.1.0.3".into();
    for _ in 0..300 {
        let planned = registrar.create_service(dual.clone(), true).await.unwrap().spec.unwrap();
        assert_eq!(planned.cluster_ips, ["10.1.0.3"], "the other one is not kept");
        assert_eq!(planned.ip_families, ["IPv4", "IPv6"]);
    }
    let namespace = Some(proto::Namespace { metadata: Some(meta("n", "team")), status: None });
    let request = CreateNamespaceRequest { namespace, validate_only: true };
    let created = registrar.namespaces().create_namespace(operator(request)).await.unwrap().into_inner();
    assert_eq!(created.namespace.unwrap().status.unwrap().phase, "Active");
    assert_eq!(registrar.api.registry.read().revision(), revision);
    let created = registrar.create_service(dual, false).await.unwrap();
    let cluster_ips = created.spec.unwrap().cluster_ips;
    assert_eq!((cluster_ips.len(), &*cluster_ips[0]), (2, "10.1.0.3"));
    assert!(created.metadata.unwrap().resource_version > revision);
    let mut external = service("a");
    external.spec.as_mut().unwrap().external_ips = vec!["192.0.2.1".into()];
    let mask = Some(mask(&["spec.external_ips"]));
    let request = UpdateServiceRequest { service: Some(external), update_mask: mask, validate_only: true };
    let updated = registrar.services().update_service(operator(request)).await.unwrap().into_inner();
    let spec = updated.service.unwrap().spec.unwrap();
    assert_eq!((spec.cluster_ips, spec.external_ips), (cluster_ips, vec!["192.0.2.1".to_owned()]));
    let request = GetServiceRequest { network: "n".into(), namespace: String::new(), name: "A".into() };
    let stored = registrar.services().get_service(operator(request)).await.unwrap().into_inner();
    assert!(stored.service.unwrap().spec.unwrap().external_ips.is_empty());
}

#[tokio::test]
async fn services_are_listed_by_namespace_and_name() {
    let registrar = fixture_of(World::with_services(1)).await;
    registrar.create_namespace("a").await.unwrap();
    registrar.create_namespace("a-b").await.unwrap();
    for (name, namespace) in [("z", "a"), ("y", "a"), ("x", "a-b"), ("w", "")] {
        registrar.create_service(named(name, namespace), false).await.unwrap();
    }
    let all = ["a/y", "a/z", "a-b/x", "default/w"];
    assert_eq!(registrar.list("", ListOptions::default()).await.0, all);
    assert_eq!(registrar.list("a", ListOptions::default()).await.0, all[..2]);
    let (mut found, mut token) = (Vec::new(), String::new());
    loop {
        let options = ListOptions { page_size: 1, page_token: token, ..Default::default() };
        let (names, next) = registrar.list("", options).await;
        assert_eq!(names.len(), 1);
        found.extend(names);
        token = next;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(found, all);
}

#[tokio::test]
async fn a_watch_of_services_follows_one_namespace() {
    let registrar = fixture_of(World::with_services(1)).await;
    registrar.create_namespace("team").await.unwrap();
    registrar.create_service(named("a", "team"), false).await.unwrap();
    registrar.create_service(named("a", ""), false).await.unwrap();
    let request =
        WatchServicesRequest { network: "n".into(), namespace: "team".into(), ..Default::default() };
    let mut watch = registrar.services().watch_services(operator(request)).await.unwrap().into_inner();
    let mut next = async || {
        let event = watch.next().await.unwrap().unwrap();
        (event.r#type(), event.service.map(|service| service.metadata.unwrap().name).unwrap_or_default())
    };
    assert_eq!(next().await, (EventType::Added, "a".into()));
    assert_eq!(next().await, (EventType::Bookmark, String::new()));
    registrar.create_service(named("b", ""), false).await.unwrap();
    registrar.create_service(named("b", "team"), false).await.unwrap();
    assert_eq!(next().await, (EventType::Added, "b".into()));
    let request = DeleteNamespaceRequest { network: "n".into(), name: "Team".into(), resource_version: 0 };
    registrar.namespaces().delete_namespace(operator(request)).await.unwrap();
    assert_eq!(next().await, (EventType::Deleted, "a".into()));
    assert_eq!(next().await, (EventType::Deleted, "b".into()));
    assert_eq!(registrar.list("", ListOptions::default()).await.0, ["default/a", "default/b"]);
    let request = DeleteNamespaceRequest { network: "n".into(), name: "default".into(), resource_version: 0 };
    let error = registrar.namespaces().delete_namespace(operator(request)).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_service_takes_its_slices_with_it() {
    let registrar = fixture_of(World::with_services(1)).await;
    registrar.create_service(service("web"), false).await.unwrap();
    for n in 0..150 {
        registrar.create_slice(slice(&format!("web-{n}"), "web", &["10.0.0.1"])).await;
    }
    registrar.create_slice(slice("db-1", "db", &["10.0.0.1"])).await;
    let request = DeleteServiceRequest { network: "n".into(), name: "web".into(), ..Default::default() };
    registrar.services().delete_service(operator(request.clone())).await.unwrap();
    assert_eq!(
        registrar.services().delete_service(operator(request)).await.unwrap_err().code(),
        Code::NotFound
    );
    let request = ListEndpointSlicesRequest { network: "n".into(), ..Default::default() };
    let listed = registrar.slices().list_endpoint_slices(operator(request)).await.unwrap().into_inner();
    assert_eq!(listed.endpoint_slices.len(), 1);
}

#[tokio::test]
async fn devices_list_the_services_of_their_network() {
    let registrar = fixture_of(World::with_services(1)).await;
    let (_, token) = registrar.token(true).await;
    let uid = registrar.join(&token, "dev", 1).await;
    registrar.create_namespace("team").await.unwrap();
    registrar.create_service(named("a", ""), false).await.unwrap();
    let mut headless = named("b", "team");
    headless.spec.as_mut().unwrap().cluster_ip = "None".into();
    for n in 0..501 {
        headless.metadata.as_mut().unwrap().name = format!("s{n:03}");
        registrar.create_service(headless.clone(), false).await.unwrap();
    }
    let (own, next) = registrar.listed_by(&uid, "", "").await.unwrap();
    assert_eq!((own.len(), &*own[0].name, own[0].ports[0].port, &*next), (1, "a", 80, ""));
    assert_eq!(own[0].cluster_ips.len(), 1);
    let (first, next) = registrar.listed_by(&uid, "Team", "").await.unwrap();
    assert_eq!((first.len(), &*next), (500, "s499"));
    let (rest, next) = registrar.listed_by(&uid, "team", &next).await.unwrap();
    assert_eq!((rest.len(), &*rest[0].name, rest[0].cluster_ips.len(), &*next), (1, "s500", 0, ""));
    assert!(registrar.listed_by(&uid, "nowhere", "").await.unwrap().0.is_empty());
    assert_eq!(registrar.listed_by(&uid, "a_b", "").await.unwrap_err().code(), Code::InvalidArgument);
    registrar.revoke("dev").await;
    assert_eq!(registrar.listed_by(&uid, "", "").await.unwrap_err().code(), Code::PermissionDenied);
}
