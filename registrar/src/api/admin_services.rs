//! Services, for operators.

use std::sync::Arc;

use muster_common::{labels::Labels, time::Timestamp};
use muster_proto::admin::{
    CreateServiceRequest, CreateServiceResponse, DeleteServiceRequest, DeleteServiceResponse, EventType,
    GetServiceRequest, GetServiceResponse, ListServicesRequest, ListServicesResponse, Service,
    UpdateServiceRequest, UpdateServiceResponse, WatchServicesRequest, WatchServicesResponse,
    service_service_server::ServiceService,
};
use tonic::{Request, Response, Status};

use super::{
    Api,
    object::{Events, Object, labels},
    random_uid,
    status::status,
    watch::Versions,
};
use crate::{
    registry::{
        self, Change, Index,
        index::NetworkState,
        named::Keyed,
        plan::{
            AdminError,
            service::{self as plan, Attempt},
        },
    },
    store::Revision,
};

#[derive(Debug)]
pub(super) struct Services(pub(super) Arc<Api>);

fn stored(index: &Index, written: &Service) -> Result<Service, AdminError> {
    let meta = written.metadata.clone().unwrap_or_default();
    Ok(plan::get(index, &meta.network, &meta.namespace, &meta.name)?.to_proto())
}

impl Services {
    /// `planned` without the ClusterIPs that were found for it, but are not kept: only those that are asked for or
    /// there already.
    fn without_allocated(&self, mut planned: Service, wanted: &Service) -> Service {
        let chosen = wanted.spec.clone().unwrap_or_default();
        let owned = stored(&self.0.registry.read(), &planned).ok().and_then(|service| service.spec);
        let owned = owned.map(|spec| spec.cluster_ips).unwrap_or_default();
        let spec = planned.spec.get_or_insert_default();
        spec.cluster_ips.retain(|text| {
            *text == chosen.cluster_ip || chosen.cluster_ips.contains(text) || owned.contains(text)
        });
        spec.cluster_ip = spec.cluster_ips.first().cloned().unwrap_or_default();
        planned
    }
}

#[tonic::async_trait]
impl ServiceService for Services {
    type WatchServicesStream = Events<WatchServicesResponse>;

    async fn get_service(
        &self,
        request: Request<GetServiceRequest>,
    ) -> Result<Response<GetServiceResponse>, Status> {
        self.0.operator(&request)?;
        let GetServiceRequest { network, namespace, name } = request.into_inner();
        let found =
            plan::get(&self.0.registry.read(), &network, &namespace, &name).map_err(status)?.to_proto();
        Ok(Response::new(GetServiceResponse { service: Some(found) }))
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        self.0.operator(&request)?;
        let ListServicesRequest { network, namespace, options } = request.into_inner();
        let listed = self.0.list::<registry::Service>(&network, &namespace, options)?;
        Ok(Response::new(ListServicesResponse {
            services: listed.objects.iter().map(|object| object.to_proto()).collect(),
            next_page_token: listed.next_page_token,
            resource_version: listed.revision,
        }))
    }

    async fn create_service(
        &self,
        request: Request<CreateServiceRequest>,
    ) -> Result<Response<CreateServiceResponse>, Status> {
        self.0.operator(&request)?;
        let CreateServiceRequest { service, validate_only } = request.into_inner();
        let wanted = service.unwrap_or_default();
        let (uid, now) = (random_uid(), Timestamp::now());
        let created = self
            .0
            .write(
                validate_only,
                |index, number| plan::create(index, &wanted, uid, Attempt { number, now }),
                stored,
            )
            .await?;
        let created = if validate_only { self.without_allocated(created, &wanted) } else { created };
        Ok(Response::new(CreateServiceResponse { service: Some(created) }))
    }

    async fn update_service(
        &self,
        request: Request<UpdateServiceRequest>,
    ) -> Result<Response<UpdateServiceResponse>, Status> {
        self.0.operator(&request)?;
        let UpdateServiceRequest { service, update_mask: mask, validate_only } = request.into_inner();
        let wanted = service.unwrap_or_default();
        let now = Timestamp::now();
        let updated = self
            .0
            .write(
                validate_only,
                |index, number| plan::update(index, &wanted, mask.as_ref(), Attempt { number, now }),
                stored,
            )
            .await?;
        let updated = if validate_only { self.without_allocated(updated, &wanted) } else { updated };
        Ok(Response::new(UpdateServiceResponse { service: Some(updated) }))
    }

    async fn delete_service(
        &self,
        request: Request<DeleteServiceRequest>,
    ) -> Result<Response<DeleteServiceResponse>, Status> {
        self.0.operator(&request)?;
        let DeleteServiceRequest { network, namespace, name, resource_version } = request.into_inner();
        let (registry, now) = (&self.0.registry, Timestamp::now());
        let mut version = resource_version;
        loop {
            let plan = |index: &mut Index, _| plan::delete(index, &network, &namespace, &name, version, now);
            match registry.commit(plan).await.map_err(status)? {
                Some(revision) => version = revision,
                None => break,
            }
        }
        tracing::info!(network, namespace, name, "Service deleted");
        Ok(Response::new(DeleteServiceResponse {}))
    }

    async fn watch_services(
        &self,
        request: Request<WatchServicesRequest>,
    ) -> Result<Response<Self::WatchServicesStream>, Status> {
        self.0.operator(&request)?;
        let WatchServicesRequest { network, namespace, label_selector, resource_version } =
            request.into_inner();
        let stream = self.0.watch::<registry::Service>(network, namespace, &label_selector, resource_version);
        Ok(Response::new(stream.await?))
    }
}

impl Object for registry::Service {
    type Response = WatchServicesResponse;

    fn after(state: &NetworkState, after: &str, limit: usize) -> Vec<Arc<Self>> {
        state.services.services.after(after).take(limit).cloned().collect()
    }

    fn of(change: &Change) -> Option<Versions<'_, Self>> {
        let Change::Service { old, new } = change else { return None };
        Some((old.as_ref(), new.as_ref()))
    }

    fn network(&self) -> &str {
        &self.network
    }

    fn namespace(&self) -> &str {
        self.namespace.as_str()
    }

    fn key(&self) -> &str {
        Keyed::key(self)
    }

    fn labels(&self) -> &Labels {
        labels(self.stored.metadata.as_ref())
    }

    fn revision(&self) -> Revision {
        self.revision
    }

    fn response(
        _: &Api,
        event: EventType,
        object: Option<&Self>,
        revision: Revision,
    ) -> WatchServicesResponse {
        WatchServicesResponse {
            r#type: event.into(),
            service: object.map(Self::to_proto),
            resource_version: revision,
        }
    }
}
