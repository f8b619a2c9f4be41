//! Registrars.

use muster_common::time::Timestamp;
use muster_proto::admin::{
    DeleteRegistrarRequest, GetRegistrarRequest, ListOptions, ListRegistrarsRequest, ObjectMeta, Registrar,
    WatchRegistrarsRequest, registrar_service_client::RegistrarServiceClient as Client,
};
use pbjson_types::FieldMask;
use tonic::Status;

use super::{Event, Events, Key, Kind, Names, Page, Resource, Scope, Secret, events};
use crate::{
    channel::Channel,
    describe::Description,
    table::{Column, list, or_none},
};

pub(super) const NAMES: Names = Names {
    api_version: super::MUSTER,
    kind: "Registrar",
    singular: "registrar",
    plural: "registrars",
    short: "reg",
    namespaced: false,
    unique_in_namespace: false,
    in_network: false,
};

const COMES_BY_ITSELF: &str =
    "a registrar comes into being when it runs; add one: muster-registrar invite, on the host of another";

impl Resource for Registrar {
    const KIND: Kind = Kind::Registrar;
    const COLUMNS: &'static [Column] = &[
        Column::new("STATUS"),
        Column::new("ADDRESS"),
        Column::new("SESSIONS"),
        Column::wide("DNS"),
        Column::wide("VERSION"),
    ];

    fn metadata(&self) -> Option<&ObjectMeta> {
        self.metadata.as_ref()
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        self.metadata.get_or_insert_default()
    }

    fn cells(&self, _: Timestamp) -> Vec<String> {
        let status = self.status.clone().unwrap_or_default();
        vec![
            status_word(status.running).to_owned(),
            list(&status.addresses),
            status.sessions.to_string(),
            list(&status.dns_servers),
            or_none(&status.version),
        ]
    }

    fn describe(&self, description: &mut Description, _: Timestamp) {
        let status = self.status.clone().unwrap_or_default();
        description.value("Status", status_word(status.running));
        description.values("Addresses", status.addresses);
        description.values("DNS servers", status.dns_servers);
        description.value("Sessions", status.sessions.to_string());
        description.value("Version", &status.version);
    }

    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status> {
        let request = GetRegistrarRequest { name: key.name.clone() };
        Ok(Client::new(channel).get_registrar(request).await?.into_inner().registrar)
    }

    async fn list(channel: Channel, _: &Scope, options: ListOptions) -> Result<Page<Self>, Status> {
        let request = ListRegistrarsRequest { options: Some(options) };
        let page = Client::new(channel).list_registrars(request).await?.into_inner();
        Ok(Page { items: page.registrars, next: page.next_page_token, revision: page.resource_version })
    }

    async fn create(_: Channel, _: Self, _: bool) -> Result<(Option<Self>, Option<Secret>), Status> {
        Err(Status::failed_precondition(COMES_BY_ITSELF))
    }

    async fn update(_: Channel, _: Self, _: FieldMask, _: bool) -> Result<Option<Self>, Status> {
        Err(Status::failed_precondition("a registrar is what its own configuration says; change that"))
    }

    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status> {
        let request = DeleteRegistrarRequest { name: key.name.clone(), resource_version: revision };
        Client::new(channel).delete_registrar(request).await.map(drop)
    }

    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status> {
        let request =
            WatchRegistrarsRequest { label_selector: scope.selector.clone(), resource_version: revision };
        let stream = Client::new(channel).watch_registrars(request).await?.into_inner();
        Ok(events(stream, |r| Event { event: r.r#type(), object: r.registrar, revision: r.resource_version }))
    }
}

/// Running or Away.
fn status_word(running: bool) -> &'static str {
    if running { "Running" } else { "Away" }
}
