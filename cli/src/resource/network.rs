//! Networks.

use muster_common::time::Timestamp;
use muster_proto::admin::{
    CreateNetworkRequest, DeleteNetworkRequest, GetNetworkRequest, ListNetworksRequest, ListOptions, Network,
    NetworkSpec, ObjectMeta, UpdateNetworkRequest, WatchNetworksRequest,
    network_service_client::NetworkServiceClient as Client,
};
use pbjson_types::FieldMask;
use serde::Deserialize;
use serde_json::Value;
use tonic::Status;

use super::{Event, Events, Key, Kind, Names, Page, Resource, Scope, Secret, events};
use crate::{
    age,
    channel::Channel,
    describe::Description,
    table::{Column, list, or_none},
};

pub(super) const NAMES: Names = Names {
    api_version: super::MUSTER,
    kind: "Network",
    singular: "network",
    plural: "networks",
    short: "net",
    namespaced: false,
    unique_in_namespace: false,
    in_network: false,
};

impl Resource for Network {
    const KIND: Kind = Kind::Network;
    const COLUMNS: &'static [Column] = &[
        Column::new("DOMAIN"),
        Column::new("DEVICES"),
        Column::wide("PUBLIC-ADDRESSES"),
        Column::wide("DEVICE-POOLS"),
        Column::wide("SERVICE-POOLS"),
        Column::wide("DIRECTORS"),
    ];

    fn metadata(&self) -> Option<&ObjectMeta> {
        self.metadata.as_ref()
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        self.metadata.get_or_insert_default()
    }

    fn cells(&self, _: Timestamp) -> Vec<String> {
        let spec = self.spec.clone().unwrap_or_default();
        let pools = |pools: [&String; 2]| list(pools.into_iter().filter(|p| !p.is_empty()));
        vec![
            or_none(&spec.domain),
            self.status.unwrap_or_default().devices.to_string(),
            list(&spec.public_addresses),
            pools([&spec.device_pool_v4, &spec.device_pool_v6]),
            pools([&spec.service_pool_v4, &spec.service_pool_v6]),
            list(spec.directors.iter().map(|d| &d.name)),
        ]
    }

    fn describe(&self, description: &mut Description, _: Timestamp) {
        let spec = self.spec.clone().unwrap_or_default();
        let seconds = |d: Option<pbjson_types::Duration>, default: &str| {
            d.map_or_else(|| default.to_owned(), |d| age::short(d.seconds.try_into().unwrap_or(0)))
        };
        description.value("Domain", &spec.domain);
        description.values("Public addresses", spec.public_addresses);
        description.value("Device pool IPv4", &spec.device_pool_v4);
        description.value("Device pool IPv6", &spec.device_pool_v6);
        description.value("Service pool IPv4", &spec.service_pool_v4);
        description.value("Service pool IPv6", &spec.service_pool_v6);
        description.values(
            "Directors",
            spec.directors
                .iter()
                .map(|d| format!("{} {}", d.name, super::device::socket_address(&d.address, d.port))),
        );
        description.value("Record TTL", seconds(spec.record_ttl, "5s (default)"));
        description.value("Address quarantine", seconds(spec.address_quarantine, "24h (default)"));
        description.value("Devices", self.status.unwrap_or_default().devices.to_string());
    }

    fn check_spec(value: &Value) -> Result<(), serde_json::Error> {
        NetworkSpec::deserialize(value).map(drop)
    }

    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status> {
        let request = GetNetworkRequest { name: key.name.clone() };
        Ok(Client::new(channel).get_network(request).await?.into_inner().network)
    }

    async fn list(channel: Channel, _: &Scope, options: ListOptions) -> Result<Page<Self>, Status> {
        let request = ListNetworksRequest { options: Some(options) };
        let page = Client::new(channel).list_networks(request).await?.into_inner();
        Ok(Page { items: page.networks, next: page.next_page_token, revision: page.resource_version })
    }

    async fn create(
        channel: Channel,
        network: Self,
        _: bool,
    ) -> Result<(Option<Self>, Option<Secret>), Status> {
        let request = CreateNetworkRequest { network: Some(network) };
        Ok((Client::new(channel).create_network(request).await?.into_inner().network, None))
    }

    async fn update(
        channel: Channel,
        network: Self,
        mask: FieldMask,
        _: bool,
    ) -> Result<Option<Self>, Status> {
        let request = UpdateNetworkRequest { network: Some(network), update_mask: Some(mask) };
        Ok(Client::new(channel).update_network(request).await?.into_inner().network)
    }

    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status> {
        let request = DeleteNetworkRequest { name: key.name.clone(), resource_version: revision };
        Client::new(channel).delete_network(request).await.map(drop)
    }

    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status> {
        let request =
            WatchNetworksRequest { label_selector: scope.selector.clone(), resource_version: revision };
        let stream = Client::new(channel).watch_networks(request).await?.into_inner();
        Ok(events(stream, |r| Event { event: r.r#type(), object: r.network, revision: r.resource_version }))
    }
}
