//! EndpointSlices, in the shape of Kubernetes' `discovery.k8s.io/v1 EndpointSlice`.

use muster_common::time::Timestamp;
use muster_proto::admin::{
    CreateEndpointSliceRequest, DeleteEndpointSliceRequest, EndpointSlice, GetEndpointSliceRequest,
    ListEndpointSlicesRequest, ListOptions, ObjectMeta, SliceEndpoint, UpdateEndpointSliceRequest,
    WatchEndpointSlicesRequest, endpoint_slice_service_client::EndpointSliceServiceClient as Client,
};
use pbjson_types::FieldMask;
use tonic::Status;

use super::{Event, Events, Key, Kind, Names, Page, Resource, Scope, Secret, events};
use crate::{
    channel::Channel,
    describe::Description,
    table::{Column, list, or_none, shortened},
};

pub(super) const NAMES: Names = Names {
    api_version: "discovery.k8s.io/v1",
    kind: "EndpointSlice",
    singular: "endpointslice",
    plural: "endpointslices",
    short: "endpointslice",
    namespaced: true,
    unique_in_namespace: true,
    in_network: true,
};

impl Resource for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
    const COLUMNS: &'static [Column] =
        &[Column::new("ADDRESSTYPE"), Column::new("PORTS"), Column::new("ENDPOINTS")];
    const FIXED: &'static [&'static str] = &["addressType"];
    const VALIDATES: bool = true;

    fn metadata(&self) -> Option<&ObjectMeta> {
        self.metadata.as_ref()
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        self.metadata.get_or_insert_default()
    }

    fn cells(&self, _: Timestamp) -> Vec<String> {
        let ports: Vec<_> = self.ports.iter().map(|port| port.port.to_string()).collect();
        let ports = if ports.is_empty() { "<unset>".into() } else { shortened(&ports) };
        let addresses: Vec<_> = self.endpoints.iter().flat_map(|e| e.addresses.iter().cloned()).collect();
        let addresses = if addresses.is_empty() { "<unset>".into() } else { shortened(&addresses) };
        vec![or_none(&self.address_type), ports, addresses]
    }

    fn describe(&self, description: &mut Description, _: Timestamp) {
        description.value("Address type", &self.address_type);
        let port = |port: &muster_proto::admin::EndpointPort| {
            let name = if port.name.is_empty() { "<unnamed>" } else { &port.name };
            let protocol = if port.protocol.is_empty() { "TCP" } else { &port.protocol };
            format!("{name} {}/{protocol}", port.port)
        };
        description.values("Ports", self.ports.iter().map(port));
        description.values("Endpoints", self.endpoints.iter().map(endpoint_line));
    }

    fn fill_defaults(&mut self) {
        for port in &mut self.ports {
            if port.protocol.is_empty() {
                port.protocol = "TCP".into();
            }
        }
    }

    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status> {
        let request = GetEndpointSliceRequest {
            network: key.network.clone(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
        };
        Ok(Client::new(channel).get_endpoint_slice(request).await?.into_inner().endpoint_slice)
    }

    async fn list(channel: Channel, scope: &Scope, options: ListOptions) -> Result<Page<Self>, Status> {
        let request = ListEndpointSlicesRequest {
            network: scope.network.clone(),
            namespace: scope.namespace.clone(),
            options: Some(options),
        };
        let page = Client::new(channel).list_endpoint_slices(request).await?.into_inner();
        Ok(Page { items: page.endpoint_slices, next: page.next_page_token, revision: page.resource_version })
    }

    async fn create(
        channel: Channel,
        endpoint_slice: Self,
        validate_only: bool,
    ) -> Result<(Option<Self>, Option<Secret>), Status> {
        let request = CreateEndpointSliceRequest { endpoint_slice: Some(endpoint_slice), validate_only };
        Ok((Client::new(channel).create_endpoint_slice(request).await?.into_inner().endpoint_slice, None))
    }

    async fn update(
        channel: Channel,
        endpoint_slice: Self,
        mask: FieldMask,
        validate_only: bool,
    ) -> Result<Option<Self>, Status> {
        let request = UpdateEndpointSliceRequest {
            endpoint_slice: Some(endpoint_slice),
            update_mask: Some(mask),
            validate_only,
        };
        Ok(Client::new(channel).update_endpoint_slice(request).await?.into_inner().endpoint_slice)
    }

    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status> {
        let request = DeleteEndpointSliceRequest {
            network: key.network.clone(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            resource_version: revision,
        };
        Client::new(channel).delete_endpoint_slice(request).await.map(drop)
    }

    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status> {
        let request = WatchEndpointSlicesRequest {
            network: scope.network.clone(),
            namespace: scope.namespace.clone(),
            label_selector: scope.selector.clone(),
            resource_version: revision,
        };
        let stream = Client::new(channel).watch_endpoint_slices(request).await?.into_inner();
        Ok(events(stream, |r| Event {
            event: r.r#type(),
            object: r.endpoint_slice,
            revision: r.resource_version,
        }))
    }
}

/// `10.0.0.1 ready host=web-0 target=Device/web`
fn endpoint_line(endpoint: &SliceEndpoint) -> String {
    let conditions = endpoint.conditions.unwrap_or_default();
    let mut line = list(&endpoint.addresses);
    // What is not known counts as ready.
    line += if conditions.ready == Some(false) { " not ready" } else { " ready" };
    if conditions.terminating == Some(true) {
        line += " terminating";
    }
    let target = endpoint.target_ref.as_ref().map(|r| format!("{}/{}", r.kind, r.name)).unwrap_or_default();
    for (key, value) in [
        ("host", &endpoint.hostname),
        ("target", &target),
        ("node", &endpoint.node_name),
        ("zone", &endpoint.zone),
    ] {
        if !value.is_empty() {
            line += &format!(" {key}={value}");
        }
    }
    line
}
