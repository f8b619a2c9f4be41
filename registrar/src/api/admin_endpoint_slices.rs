//! EndpointSlices, for operators.

use std::sync::Arc;

use muster_common::{labels::Labels, time::Timestamp};
use muster_proto::admin::{
    CreateEndpointSliceRequest, CreateEndpointSliceResponse, DeleteEndpointSliceRequest,
    DeleteEndpointSliceResponse, EndpointSlice, EventType, GetEndpointSliceRequest, GetEndpointSliceResponse,
    ListEndpointSlicesRequest, ListEndpointSlicesResponse, UpdateEndpointSliceRequest,
    UpdateEndpointSliceResponse, WatchEndpointSlicesRequest, WatchEndpointSlicesResponse,
    endpoint_slice_service_server::EndpointSliceService,
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
        plan::{AdminError, slice as plan},
    },
    store::Revision,
};

#[derive(Debug)]
pub(super) struct EndpointSlices(pub(super) Arc<Api>);

fn stored(index: &Index, written: &EndpointSlice) -> Result<EndpointSlice, AdminError> {
    let meta = written.metadata.clone().unwrap_or_default();
    Ok(plan::get(index, &meta.network, &meta.namespace, &meta.name)?.to_proto())
}

#[tonic::async_trait]
impl EndpointSliceService for EndpointSlices {
    type WatchEndpointSlicesStream = Events<WatchEndpointSlicesResponse>;

    async fn get_endpoint_slice(
        &self,
        request: Request<GetEndpointSliceRequest>,
    ) -> Result<Response<GetEndpointSliceResponse>, Status> {
        self.0.operator(&request)?;
        let GetEndpointSliceRequest { network, namespace, name } = request.into_inner();
        let found =
            plan::get(&self.0.registry.read(), &network, &namespace, &name).map_err(status)?.to_proto();
        Ok(Response::new(GetEndpointSliceResponse { endpoint_slice: Some(found) }))
    }

    async fn list_endpoint_slices(
        &self,
        request: Request<ListEndpointSlicesRequest>,
    ) -> Result<Response<ListEndpointSlicesResponse>, Status> {
        self.0.operator(&request)?;
        let ListEndpointSlicesRequest { network, namespace, options } = request.into_inner();
        let listed = self.0.list::<registry::Slice>(&network, &namespace, options)?;
        Ok(Response::new(ListEndpointSlicesResponse {
            endpoint_slices: listed.objects.iter().map(|object| object.to_proto()).collect(),
            next_page_token: listed.next_page_token,
            resource_version: listed.revision,
        }))
    }

    async fn create_endpoint_slice(
        &self,
        request: Request<CreateEndpointSliceRequest>,
    ) -> Result<Response<CreateEndpointSliceResponse>, Status> {
        self.0.operator(&request)?;
        let CreateEndpointSliceRequest { endpoint_slice, validate_only } = request.into_inner();
        let wanted = endpoint_slice.unwrap_or_default();
        let (uid, now) = (random_uid(), Timestamp::now());
        let created =
            self.0.write(validate_only, |index, _| plan::create(index, &wanted, uid, now), stored).await?;

        Ok(Response::new(CreateEndpointSliceResponse { endpoint_slice: Some(created) }))
    }

    async fn update_endpoint_slice(
        &self,
        request: Request<UpdateEndpointSliceRequest>,
    ) -> Result<Response<UpdateEndpointSliceResponse>, Status> {
        self.0.operator(&request)?;
        let UpdateEndpointSliceRequest { endpoint_slice, update_mask: mask, validate_only } =
            request.into_inner();
        let wanted = endpoint_slice.unwrap_or_default();
        let updated = self
            .0
            .write(validate_only, |index, _| plan::update(index, &wanted, mask.as_ref()), stored)
            .await?;

        Ok(Response::new(UpdateEndpointSliceResponse { endpoint_slice: Some(updated) }))
    }

    async fn delete_endpoint_slice(
        &self,
        request: Request<DeleteEndpointSliceRequest>,
    ) -> Result<Response<DeleteEndpointSliceResponse>, Status> {
        self.0.operator(&request)?;
        let DeleteEndpointSliceRequest { network, namespace, name, resource_version } = request.into_inner();
        let plan = |index: &mut Index, _| plan::delete(index, &network, &namespace, &name, resource_version);
        self.0.registry.commit(plan).await.map_err(status)?;
        tracing::info!(network, namespace, name, "EndpointSlice deleted");
        Ok(Response::new(DeleteEndpointSliceResponse {}))
    }

    async fn watch_endpoint_slices(
        &self,
        request: Request<WatchEndpointSlicesRequest>,
    ) -> Result<Response<Self::WatchEndpointSlicesStream>, Status> {
        self.0.operator(&request)?;
        let WatchEndpointSlicesRequest { network, namespace, label_selector, resource_version } =
            request.into_inner();
        let stream = self.0.watch::<registry::Slice>(network, namespace, &label_selector, resource_version);
        Ok(Response::new(stream.await?))
    }
}

impl Object for registry::Slice {
    type Response = WatchEndpointSlicesResponse;

    fn after(state: &NetworkState, after: &str, limit: usize) -> Vec<Arc<Self>> {
        state.services.slices.after(after).take(limit).cloned().collect()
    }

    fn of(change: &Change) -> Option<Versions<'_, Self>> {
        let Change::EndpointSlice { old, new } = change else { return None };
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
    ) -> WatchEndpointSlicesResponse {
        WatchEndpointSlicesResponse {
            r#type: event.into(),
            endpoint_slice: object.map(Self::to_proto),
            resource_version: revision,
        }
    }
}
