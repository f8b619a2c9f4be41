//! Directors.

use muster_common::time::Timestamp;
use muster_proto::admin::{
    DeleteDirectorRequest, Director, DirectorSpec, GetDirectorRequest, ListDirectorsRequest, ListOptions,
    ObjectMeta, UpdateDirectorRequest, WatchDirectorsRequest,
    director_service_client::DirectorServiceClient as Client,
};
use pbjson_types::FieldMask;
use serde::Deserialize;
use serde_json::Value;
use tonic::Status;

use super::{Event, Events, Key, Kind, Names, Page, Resource, Scope, Secret, device::endpoint, events};
use crate::{
    age::{moment, timestamp},
    channel::Channel,
    describe::Description,
    table::{Column, list, or_none},
};

pub(super) const NAMES: Names = Names {
    api_version: super::MUSTER,
    kind: "Director",
    singular: "director",
    plural: "directors",
    short: "dir",
    namespaced: false,
    unique_in_namespace: false,
    in_network: true,
};

impl Resource for Director {
    const KIND: Kind = Kind::Director;
    const COLUMNS: &'static [Column] = &[
        Column::new("STATUS"),
        Column::new("REGION"),
        Column::new("ENDPOINT"),
        Column::new("ATTACHED"),
        Column::wide("TCP-PORTS"),
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
            status_word(self),
            or_none(&status.region),
            list(status.endpoints.iter().map(endpoint)),
            attached(self),
            list(status.tcp_ports.iter().map(ToString::to_string)),
            or_none(&status.version),
        ]
    }

    fn describe(&self, description: &mut Description, now: Timestamp) {
        let status = self.status.clone().unwrap_or_default();
        description.value("Status", status_word(self));
        description.value("Drained", self.spec.is_some_and(|spec| spec.drained).to_string());
        description.value("Region", &status.region);
        description.values("Endpoints", status.endpoints.iter().map(endpoint));
        description.values("TCP ports", status.tcp_ports.iter().map(ToString::to_string));
        description.value("Attached devices", attached(self));
        description.value("Version", &status.version);
        if let Some(expiry) = timestamp(status.certificate_expiry.as_ref()) {
            description.value("Certificate expiry", moment(Some(expiry), now));
        }
    }

    fn check_spec(value: &Value) -> Result<(), serde_json::Error> {
        DirectorSpec::deserialize(value).map(drop)
    }

    fn revoke(&mut self) -> bool {
        self.spec.get_or_insert_default().revoked = true;
        true
    }

    fn drain(&mut self, drained: bool) -> bool {
        self.spec.get_or_insert_default().drained = drained;
        true
    }

    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status> {
        let request = GetDirectorRequest { network: key.network.clone(), name: key.name.clone() };
        Ok(Client::new(channel).get_director(request).await?.into_inner().director)
    }

    async fn list(channel: Channel, scope: &Scope, options: ListOptions) -> Result<Page<Self>, Status> {
        let request = ListDirectorsRequest { network: scope.network.clone(), options: Some(options) };
        let page = Client::new(channel).list_directors(request).await?.into_inner();
        Ok(Page { items: page.directors, next: page.next_page_token, revision: page.resource_version })
    }

    async fn create(_: Channel, _: Self, _: bool) -> Result<(Option<Self>, Option<Secret>), Status> {
        Err(Status::failed_precondition(
            "a director comes into being when it joins; make a token for it: muster create token --director",
        ))
    }

    async fn update(
        channel: Channel,
        director: Self,
        mask: FieldMask,
        _: bool,
    ) -> Result<Option<Self>, Status> {
        let request = UpdateDirectorRequest { director: Some(director), update_mask: Some(mask) };
        Ok(Client::new(channel).update_director(request).await?.into_inner().director)
    }

    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status> {
        let request = DeleteDirectorRequest {
            network: key.network.clone(),
            name: key.name.clone(),
            resource_version: revision,
        };
        Client::new(channel).delete_director(request).await.map(drop)
    }

    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status> {
        let request = WatchDirectorsRequest {
            network: scope.network.clone(),
            label_selector: scope.selector.clone(),
            resource_version: revision,
        };
        let stream = Client::new(channel).watch_directors(request).await?.into_inner();
        Ok(events(stream, |r| Event { event: r.r#type(), object: r.director, revision: r.resource_version }))
    }
}

/// Pending, Revoked, Draining, or Ready; the last one Offline while no session with the registrar is open.
fn status_word(director: &Director) -> String {
    let status = director.status.clone().unwrap_or_default();
    match status.phase.as_str() {
        "" => "Pending".into(),
        "Ready" if !status.online => "Offline".into(),
        phase => phase.to_owned(),
    }
}

/// How many devices are attached, as far as this registrar is told.
fn attached(director: &Director) -> String {
    match director.status.as_ref().filter(|status| status.online) {
        Some(status) => status.attached.to_string(),
        None => "<unknown>".into(),
    }
}
