//! Namespaces of a network.

use muster_common::time::Timestamp;
use muster_proto::admin::{
    CreateNamespaceRequest, DeleteNamespaceRequest, GetNamespaceRequest, ListNamespacesRequest, ListOptions,
    Namespace, ObjectMeta, UpdateNamespaceRequest, WatchNamespacesRequest,
    namespace_service_client::NamespaceServiceClient as Client,
};
use pbjson_types::FieldMask;
use tonic::Status;

use super::{Event, Events, Key, Kind, Names, Page, Resource, Scope, Secret, events};
use crate::{
    channel::Channel,
    describe::Description,
    table::{Column, or_none},
};

pub(super) const NAMES: Names = Names {
    api_version: "v1",
    kind: "Namespace",
    singular: "namespace",
    plural: "namespaces",
    short: "ns",
    namespaced: false,
    unique_in_namespace: false,
    in_network: true,
};

impl Resource for Namespace {
    const KIND: Kind = Kind::Namespace;
    const COLUMNS: &'static [Column] = &[Column::new("STATUS")];
    const VALIDATES: bool = true;

    fn metadata(&self) -> Option<&ObjectMeta> {
        self.metadata.as_ref()
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        self.metadata.get_or_insert_default()
    }

    fn cells(&self, _: Timestamp) -> Vec<String> {
        vec![or_none(&self.status.clone().unwrap_or_default().phase)]
    }

    fn describe(&self, description: &mut Description, _: Timestamp) {
        description.value("Status", &self.status.clone().unwrap_or_default().phase);
    }

    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status> {
        let request = GetNamespaceRequest { network: key.network.clone(), name: key.name.clone() };
        Ok(Client::new(channel).get_namespace(request).await?.into_inner().namespace)
    }

    async fn list(channel: Channel, scope: &Scope, options: ListOptions) -> Result<Page<Self>, Status> {
        let request = ListNamespacesRequest { network: scope.network.clone(), options: Some(options) };
        let page = Client::new(channel).list_namespaces(request).await?.into_inner();
        Ok(Page { items: page.namespaces, next: page.next_page_token, revision: page.resource_version })
    }

    async fn create(
        channel: Channel,
        namespace: Self,
        validate_only: bool,
    ) -> Result<(Option<Self>, Option<Secret>), Status> {
        let request = CreateNamespaceRequest { namespace: Some(namespace), validate_only };
        Ok((Client::new(channel).create_namespace(request).await?.into_inner().namespace, None))
    }

    async fn update(
        channel: Channel,
        namespace: Self,
        mask: FieldMask,
        validate_only: bool,
    ) -> Result<Option<Self>, Status> {
        let request =
            UpdateNamespaceRequest { namespace: Some(namespace), update_mask: Some(mask), validate_only };
        Ok(Client::new(channel).update_namespace(request).await?.into_inner().namespace)
    }

    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status> {
        let request = DeleteNamespaceRequest {
            network: key.network.clone(),
            name: key.name.clone(),
            resource_version: revision,
        };
        Client::new(channel).delete_namespace(request).await.map(drop)
    }

    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status> {
        let request = WatchNamespacesRequest {
            network: scope.network.clone(),
            label_selector: scope.selector.clone(),
            resource_version: revision,
        };
        let stream = Client::new(channel).watch_namespaces(request).await?.into_inner();
        Ok(events(stream, |r| Event { event: r.r#type(), object: r.namespace, revision: r.resource_version }))
    }
}
