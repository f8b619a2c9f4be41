//! Namespaces, Services and EndpointSlices of the fake.

use super::*;

use muster_proto::admin::{
    endpoint_slice_service_server::EndpointSliceService, namespace_service_server::NamespaceService,
    service_service_server::ServiceService,
};

/// Namespace and name.
type Key = (String, String);

#[derive(Default)]
pub(super) struct Objects {
    pub(super) namespaces: BTreeMap<Key, Namespace>,
    pub(super) services: BTreeMap<Key, Service>,
    pub(super) slices: BTreeMap<Key, EndpointSlice>,
    /// Names that are refused.
    pub(super) refused: Vec<String>,
}

impl Objects {
    /// What every object has to pass.
    fn admit(&self, meta: &ObjectMeta) -> Result<Key, Status> {
        let namespace = &meta.namespace;
        let there = |name: &str| self.namespaces.contains_key(&(String::new(), name.to_owned()));
        if !namespace.is_empty() && namespace != "default" && !there(namespace) {
            return Err(Status::not_found(format!("namespace {namespace:?} does not exist")));
        }
        if self.refused.contains(&meta.name) {
            return Err(Status::invalid_argument("spec.clusterIP: is outside the network's service pool"));
        }
        Ok((namespace.clone(), meta.name.clone()))
    }
}

macro_rules! service {
    ($api:ident, $Kind:ident, $kind:ident, $kinds:ident, $map:ident, $fill:expr,
     $get:ident $Get:ident $GetR:ident, $list:ident $List:ident $ListR:ident,
     $create:ident $Create:ident $CreateR:ident, $update:ident $Update:ident $UpdateR:ident,
     $delete:ident $Delete:ident $DeleteR:ident, $watch:ident $Watch:ident $WatchR:ident $Stream:ident) => {
        #[tonic::async_trait]
        impl $api for Fake {
            type $Stream = stream::BoxStream<'static, Result<$WatchR, Status>>;

            async fn $get(&self, request: Request<$Get>) -> Result<Response<$GetR>, Status> {
                let request = request.into_inner();
                let state = self.state.lock().unwrap();
                let found = state.objects.$map.get(&Asked::from(&request).key());
                let found = found.ok_or_else(|| Status::not_found("no such object"))?;
                Ok(Response::new($GetR { $kind: Some(found.clone()) }))
            }

            async fn $list(&self, _: Request<$List>) -> Result<Response<$ListR>, Status> {
                let $kinds = self.state.lock().unwrap().objects.$map.values().cloned().collect();
                Ok(Response::new($ListR { $kinds, ..Default::default() }))
            }

            async fn $create(&self, request: Request<$Create>) -> Result<Response<$CreateR>, Status> {
                let $Create { $kind, validate_only } = request.into_inner();
                let mut object = $kind.unwrap();
                let mut state = self.state.lock().unwrap();
                let key = state.objects.admit(object.metadata.as_ref().unwrap())?;
                if state.objects.$map.contains_key(&key) {
                    return Err(Status::already_exists("the name is taken"));
                }
                state.revision += 1;
                let meta = object.metadata.as_mut().unwrap();
                assert_eq!((meta.resource_version, meta.uid.as_str()), (0, ""));
                meta.resource_version = state.revision;
                meta.uid = format!("uid-{}", state.revision);
                let fill: fn(&mut $Kind) = $fill;
                fill(&mut object);
                if !validate_only {
                    state.objects.$map.insert(key, object.clone());
                }
                Ok(Response::new($CreateR { $kind: Some(object) }))
            }

            async fn $update(&self, request: Request<$Update>) -> Result<Response<$UpdateR>, Status> {
                let $Update { $kind, update_mask, validate_only } = request.into_inner();
                let object = $kind.unwrap();
                let mut state = self.state.lock().unwrap();
                let key = state.objects.admit(object.metadata.as_ref().unwrap())?;
                assert!(!update_mask.unwrap().paths.is_empty());
                if !validate_only {
                    state.objects.$map.insert(key, object.clone());
                }
                Ok(Response::new($UpdateR { $kind: Some(object) }))
            }

            async fn $delete(&self, request: Request<$Delete>) -> Result<Response<$DeleteR>, Status> {
                let request = request.into_inner();
                let removed = self.state.lock().unwrap().objects.$map.remove(&Asked::from(&request).key());
                removed.map(|_| Response::new($DeleteR {})).ok_or_else(|| Status::not_found("no such object"))
            }

            async fn $watch(&self, _: Request<$Watch>) -> Result<Response<Self::$Stream>, Status> {
                Err(Status::unimplemented(""))
            }
        }
    };
}

/// Namespace and name that a request asks for.
struct Asked(String, String);

impl Asked {
    fn key(self) -> Key {
        (self.0, self.1)
    }
}

macro_rules! asked {
    ($($Request:ident),*) => {
        $(impl From<&$Request> for Asked {
            fn from(request: &$Request) -> Self {
                Self(request.namespace.clone(), request.name.clone())
            }
        })*
    };
}
asked!(GetServiceRequest, DeleteServiceRequest, GetEndpointSliceRequest, DeleteEndpointSliceRequest);

macro_rules! asked_without {
    ($($Request:ident),*) => {
        $(impl From<&$Request> for Asked {
            fn from(request: &$Request) -> Self {
                Self(String::new(), request.name.clone())
            }
        })*
    };
}
asked_without!(GetNamespaceRequest, DeleteNamespaceRequest);

service!(NamespaceService, Namespace, namespace, namespaces, namespaces,
    |n: &mut Namespace| n.status = Some(NamespaceStatus { phase: "Active".into() }),
    get_namespace GetNamespaceRequest GetNamespaceResponse,
    list_namespaces ListNamespacesRequest ListNamespacesResponse,
    create_namespace CreateNamespaceRequest CreateNamespaceResponse,
    update_namespace UpdateNamespaceRequest UpdateNamespaceResponse,
    delete_namespace DeleteNamespaceRequest DeleteNamespaceResponse,
    watch_namespaces WatchNamespacesRequest WatchNamespacesResponse WatchNamespacesStream);

service!(ServiceService, Service, service, services, services,
    |s: &mut Service| {
        let spec = s.spec.get_or_insert_default();
        if spec.r#type.is_empty() {
            spec.r#type = "ClusterIP".into();
        }
        if spec.cluster_ip.is_empty() && spec.r#type != "ExternalName" {
            spec.cluster_ip = "100.96.1.7".into();
            spec.cluster_ips = vec![spec.cluster_ip.clone()];
        }
        for port in &mut spec.ports {
            if port.protocol.is_empty() {
                port.protocol = "TCP".into();
            }
        }
    },
    get_service GetServiceRequest GetServiceResponse,
    list_services ListServicesRequest ListServicesResponse,
    create_service CreateServiceRequest CreateServiceResponse,
    update_service UpdateServiceRequest UpdateServiceResponse,
    delete_service DeleteServiceRequest DeleteServiceResponse,
    watch_services WatchServicesRequest WatchServicesResponse WatchServicesStream);

service!(EndpointSliceService, EndpointSlice, endpoint_slice, endpoint_slices, slices,
    |_: &mut EndpointSlice| {},
    get_endpoint_slice GetEndpointSliceRequest GetEndpointSliceResponse,
    list_endpoint_slices ListEndpointSlicesRequest ListEndpointSlicesResponse,
    create_endpoint_slice CreateEndpointSliceRequest CreateEndpointSliceResponse,
    update_endpoint_slice UpdateEndpointSliceRequest UpdateEndpointSliceResponse,
    delete_endpoint_slice DeleteEndpointSliceRequest DeleteEndpointSliceResponse,
    watch_endpoint_slices WatchEndpointSlicesRequest WatchEndpointSlicesResponse WatchEndpointSlicesStream);
