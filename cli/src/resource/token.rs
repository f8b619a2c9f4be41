//! Join tokens.

use muster_common::time::Timestamp;
use muster_proto::admin::{
    CreateTokenRequest, DeleteTokenRequest, GetTokenRequest, ListOptions, ListTokensRequest, ObjectMeta,
    Token, TokenSpec, UpdateTokenRequest, WatchTokensRequest,
    token_service_client::TokenServiceClient as Client,
};
use pbjson_types::FieldMask;
use serde::Deserialize;
use serde_json::Value;
use tonic::Status;

use super::{Event, Events, Key, Kind, Names, Page, Resource, Scope, events};
use crate::{
    age::{self, moment, timestamp},
    channel::Channel,
    describe::Description,
    table::{Column, labels, or_none},
};

pub(super) const NAMES: Names = Names {
    api_version: super::MUSTER,
    kind: "Token",
    singular: "token",
    plural: "tokens",
    short: "token",
    namespaced: false,
    unique_in_namespace: false,
    in_network: true,
};

/// What is told of a new token, once.
#[derive(Clone, Debug)]
pub struct Secret {
    /// As `muster-agent join --token`, or `muster-director join --token`, takes it.
    pub token: String,
    /// The whole command that joins a host.
    pub join_command: String,
}

impl Resource for Token {
    const KIND: Kind = Kind::Token;
    const COLUMNS: &'static [Column] = &[
        Column::new("STATUS"),
        Column::new("REUSABLE"),
        Column::new("USES"),
        Column::new("EXPIRES"),
        Column::wide("FOR"),
        Column::wide("DEVICE-NAMESPACE"),
        Column::wide("DEVICE-LABELS"),
    ];

    fn metadata(&self) -> Option<&ObjectMeta> {
        self.metadata.as_ref()
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        self.metadata.get_or_insert_default()
    }

    fn cells(&self, now: Timestamp) -> Vec<String> {
        let (spec, status) = (self.spec.clone().unwrap_or_default(), self.status.clone().unwrap_or_default());
        let expires = match timestamp(spec.expires_at.as_ref()) {
            None => "<unknown>".into(),
            Some(at) if at <= now => "expired".into(),
            Some(at) => age::short(at.saturating_duration_since(now).as_secs()),
        };
        vec![
            or_none(&status.phase),
            spec.reusable.to_string(),
            status.uses.to_string(),
            expires,
            party(&spec).into(),
            namespace(&spec),
            labels(&spec.device_labels),
        ]
    }

    fn describe(&self, description: &mut Description, now: Timestamp) {
        let (spec, status) = (self.spec.clone().unwrap_or_default(), self.status.clone().unwrap_or_default());
        description.value("Status", &status.phase);
        description.value("Reusable", spec.reusable.to_string());
        description.value("Uses", status.uses.to_string());
        description.value("Expires", moment(timestamp(spec.expires_at.as_ref()), now));
        description.value("For", party(&spec));
        if party(&spec) == DEVICES {
            description.value("Device namespace", namespace(&spec));
            description.values("Device labels", spec.device_labels.iter().map(|(k, v)| format!("{k}={v}")));
        }
    }

    fn check_spec(value: &Value) -> Result<(), serde_json::Error> {
        TokenSpec::deserialize(value).map(drop)
    }

    fn revoke(&mut self) -> bool {
        self.spec.get_or_insert_default().revoked = true;
        true
    }

    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status> {
        let request = GetTokenRequest { network: key.network.clone(), name: key.name.clone() };
        Ok(Client::new(channel).get_token(request).await?.into_inner().token)
    }

    async fn list(channel: Channel, scope: &Scope, options: ListOptions) -> Result<Page<Self>, Status> {
        let request = ListTokensRequest { network: scope.network.clone(), options: Some(options) };
        let page = Client::new(channel).list_tokens(request).await?.into_inner();
        Ok(Page { items: page.tokens, next: page.next_page_token, revision: page.resource_version })
    }

    async fn create(
        channel: Channel,
        token: Self,
        _: bool,
    ) -> Result<(Option<Self>, Option<Secret>), Status> {
        let request = CreateTokenRequest { token: Some(token) };
        let created = Client::new(channel).create_token(request).await?.into_inner();
        let secret = Secret { token: created.secret, join_command: created.join_command };
        Ok((created.token, Some(secret)))
    }

    async fn update(channel: Channel, token: Self, mask: FieldMask, _: bool) -> Result<Option<Self>, Status> {
        let request = UpdateTokenRequest { token: Some(token), update_mask: Some(mask) };
        Ok(Client::new(channel).update_token(request).await?.into_inner().token)
    }

    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status> {
        let request = DeleteTokenRequest {
            network: key.network.clone(),
            name: key.name.clone(),
            resource_version: revision,
        };
        Client::new(channel).delete_token(request).await.map(drop)
    }

    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status> {
        let request = WatchTokensRequest {
            network: scope.network.clone(),
            label_selector: scope.selector.clone(),
            resource_version: revision,
        };
        let stream = Client::new(channel).watch_tokens(request).await?.into_inner();
        Ok(events(stream, |r| Event { event: r.r#type(), object: r.token, revision: r.resource_version }))
    }
}

const DEVICES: &str = "devices";

/// Whom it lets in.
fn party(spec: &TokenSpec) -> &'static str {
    if is_for_directors(spec) { "directors" } else { DEVICES }
}

/// Whether it lets directors in, and no devices.
pub(crate) fn is_for_directors(spec: &TokenSpec) -> bool {
    spec.party == "director"
}

fn namespace(spec: &TokenSpec) -> String {
    if is_for_directors(spec) {
        return or_none("");
    }
    if spec.device_namespace.is_empty() { "default".into() } else { spec.device_namespace.clone() }
}
