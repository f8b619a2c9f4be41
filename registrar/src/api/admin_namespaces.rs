//! Namespaces, for operators.

use std::{ops::Bound, sync::Arc};

use muster_common::{labels::Labels, time::Timestamp};
use muster_proto::admin::{
    CreateNamespaceRequest, CreateNamespaceResponse, DeleteNamespaceRequest, DeleteNamespaceResponse,
    EventType, GetNamespaceRequest, GetNamespaceResponse, ListNamespacesRequest, ListNamespacesResponse,
    Namespace, UpdateNamespaceRequest, UpdateNamespaceResponse, WatchNamespacesRequest,
    WatchNamespacesResponse, namespace_service_server::NamespaceService,
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
        plan::{AdminError, namespace as plan},
    },
    store::Revision,
};

#[derive(Debug)]
pub(super) struct Namespaces(pub(super) Arc<Api>);

fn stored(index: &Index, written: &Namespace) -> Result<Namespace, AdminError> {
    let meta = written.metadata.clone().unwrap_or_default();
    Ok(plan::get(index, &meta.network, &meta.name)?.to_proto())
}

#[tonic::async_trait]
impl NamespaceService for Namespaces {
    type WatchNamespacesStream = Events<WatchNamespacesResponse>;

    async fn get_namespace(
        &self,
        request: Request<GetNamespaceRequest>,
    ) -> Result<Response<GetNamespaceResponse>, Status> {
        self.0.operator(&request)?;
        let GetNamespaceRequest { network, name } = request.into_inner();
        let found = plan::get(&self.0.registry.read(), &network, &name).map_err(status)?.to_proto();
        Ok(Response::new(GetNamespaceResponse { namespace: Some(found) }))
    }

    async fn list_namespaces(
        &self,
        request: Request<ListNamespacesRequest>,
    ) -> Result<Response<ListNamespacesResponse>, Status> {
        self.0.operator(&request)?;
        let ListNamespacesRequest { network, options } = request.into_inner();
        let listed = self.0.list::<registry::Namespace>(&network, "", options)?;
        Ok(Response::new(ListNamespacesResponse {
            namespaces: listed.objects.iter().map(|object| object.to_proto()).collect(),
            next_page_token: listed.next_page_token,
            resource_version: listed.revision,
        }))
    }

    async fn create_namespace(
        &self,
        request: Request<CreateNamespaceRequest>,
    ) -> Result<Response<CreateNamespaceResponse>, Status> {
        self.0.operator(&request)?;
        let CreateNamespaceRequest { namespace, validate_only } = request.into_inner();
        let wanted = namespace.unwrap_or_default();
        let (uid, now) = (random_uid(), Timestamp::now());
        let created =
            self.0.write(validate_only, |index, _| plan::create(index, &wanted, uid, now), stored).await?;

        Ok(Response::new(CreateNamespaceResponse { namespace: Some(created) }))
    }

    async fn update_namespace(
        &self,
        request: Request<UpdateNamespaceRequest>,
    ) -> Result<Response<UpdateNamespaceResponse>, Status> {
        self.0.operator(&request)?;
        let UpdateNamespaceRequest { namespace, update_mask: mask, validate_only } = request.into_inner();
        let wanted = namespace.unwrap_or_default();
        let updated = self
            .0
            .write(validate_only, |index, _| plan::update(index, &wanted, mask.as_ref()), stored)
            .await?;

        Ok(Response::new(UpdateNamespaceResponse { namespace: Some(updated) }))
    }

    async fn delete_namespace(
        &self,
        request: Request<DeleteNamespaceRequest>,
    ) -> Result<Response<DeleteNamespaceResponse>, Status> {
        self.0.operator(&request)?;
        let DeleteNamespaceRequest { network, name, resource_version } = request.into_inner();
        let registry = &self.0.registry;
        let plan = |index: &mut Index, _| plan::terminate(index, &network, &name, resource_version);
        registry.commit(plan).await.map_err(status)?;
        registry.empty_namespace(&network, &name.to_ascii_lowercase()).await.map_err(status)?;
        tracing::info!(network, name, "namespace deleted");
        Ok(Response::new(DeleteNamespaceResponse {}))
    }

    async fn watch_namespaces(
        &self,
        request: Request<WatchNamespacesRequest>,
    ) -> Result<Response<Self::WatchNamespacesStream>, Status> {
        self.0.operator(&request)?;
        let WatchNamespacesRequest { network, label_selector, resource_version } = request.into_inner();
        let stream =
            self.0.watch::<registry::Namespace>(network, String::new(), &label_selector, resource_version);
        Ok(Response::new(stream.await?))
    }
}

impl Object for registry::Namespace {
    type Response = WatchNamespacesResponse;

    fn after(state: &NetworkState, after: &str, limit: usize) -> Vec<Arc<Self>> {
        let range = (Bound::Excluded(after), Bound::Unbounded);
        let namespaces = state.services.namespaces.range::<str, _>(range).take(limit);
        namespaces.map(|(_, namespace)| namespace.clone()).collect()
    }

    fn of(change: &Change) -> Option<Versions<'_, Self>> {
        let Change::Namespace { old, new } = change else { return None };
        Some((old.as_ref(), new.as_ref()))
    }

    fn network(&self) -> &str {
        &self.network
    }

    fn namespace(&self) -> &str {
        ""
    }

    fn key(&self) -> &str {
        self.name.as_str()
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
    ) -> WatchNamespacesResponse {
        WatchNamespacesResponse {
            r#type: event.into(),
            namespace: object.map(Self::to_proto),
            resource_version: revision,
        }
    }
}
