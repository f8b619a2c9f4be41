//! Join tokens, for operators.

use std::{ops::Bound, sync::Arc};

use muster_common::{labels::Labels, name::Label, time::Timestamp};
use muster_proto::admin::{
    CreateTokenRequest, CreateTokenResponse, DeleteTokenRequest, DeleteTokenResponse, EventType,
    GetTokenRequest, GetTokenResponse, ListTokensRequest, ListTokensResponse, Token, UpdateTokenRequest,
    UpdateTokenResponse, WatchTokensRequest, WatchTokensResponse, token_service_server::TokenService,
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
    init,
    registry::{self, Change, field, index::NetworkState, plan, token::Joiner},
    store::Revision,
    token::JoinToken,
};

#[derive(Debug)]
pub(super) struct Tokens(pub(super) Arc<Api>);

impl Tokens {
    fn get(&self, network: &str, name: &str) -> Result<Token, Status> {
        let index = self.0.registry.read();
        let token = plan::token::get(&index, network, name).map_err(status)?;
        Ok(token.to_proto(Timestamp::now()))
    }

    fn join_command(&self, token: &Token, secret: &JoinToken) -> String {
        let registrar = self.0.hub.own().registrars.first().map_or("HOST:PORT", String::as_str);
        let director = token.spec.as_ref().is_some_and(|spec| spec.party == Joiner::Director.as_str());
        let program = if director { "muster-director" } else { "muster-agent" };
        init::join_command(program, registrar, secret, self.0.ca.current().hash())
    }
}

fn network_of(token: &Token) -> String {
    token.metadata.as_ref().map(|meta| meta.network.clone()).unwrap_or_default()
}

#[tonic::async_trait]
impl TokenService for Tokens {
    type WatchTokensStream = Events<WatchTokensResponse>;

    async fn get_token(
        &self,
        request: Request<GetTokenRequest>,
    ) -> Result<Response<GetTokenResponse>, Status> {
        self.0.operator(&request)?;
        let GetTokenRequest { network, name } = request.get_ref();
        Ok(Response::new(GetTokenResponse { token: Some(self.get(network, name)?) }))
    }

    async fn list_tokens(
        &self,
        request: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        self.0.operator(&request)?;
        let ListTokensRequest { network, options } = request.into_inner();
        let listed = self.0.list::<registry::Token>(&network, "", options)?;
        let now = Timestamp::now();
        Ok(Response::new(ListTokensResponse {
            tokens: listed.objects.iter().map(|token| token.to_proto(now)).collect(),
            next_page_token: listed.next_page_token,
            resource_version: listed.revision,
        }))
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        self.0.operator(&request)?;
        let token = request.into_inner().token.unwrap_or_default();
        let name = token.metadata.as_ref().map_or("", |meta| &meta.name);
        let secret = match name {
            "" => JoinToken::generate(&mut rand::rng()),
            name => {
                let label: Label = field::parse("metadata.name", name).map_err(status)?;
                JoinToken::with_id(label, &mut rand::rng())
            }
        };
        let (uid, now) = (random_uid(), Timestamp::now());
        let created =
            self.0.registry.commit(|index, _| plan::token::create(index, &token, &secret, uid, now)).await;
        let (network, name) = (network_of(&token), created.map_err(status)?);
        tracing::info!(network, %name, "token created");
        Ok(Response::new(CreateTokenResponse {
            token: Some(self.get(&network, &name)?),
            secret: secret.to_string(),
            join_command: self.join_command(&token, &secret),
        }))
    }

    async fn update_token(
        &self,
        request: Request<UpdateTokenRequest>,
    ) -> Result<Response<UpdateTokenResponse>, Status> {
        self.0.operator(&request)?;
        let UpdateTokenRequest { token, update_mask: mask } = request.into_inner();
        let (token, now) = (token.unwrap_or_default(), Timestamp::now());
        let updated =
            self.0.registry.commit(|index, _| plan::token::update(index, &token, mask.as_ref(), now)).await;
        let name = updated.map_err(status)?;
        Ok(Response::new(UpdateTokenResponse { token: Some(self.get(&network_of(&token), &name)?) }))
    }

    async fn delete_token(
        &self,
        request: Request<DeleteTokenRequest>,
    ) -> Result<Response<DeleteTokenResponse>, Status> {
        self.0.operator(&request)?;
        let DeleteTokenRequest { network, name, resource_version } = request.into_inner();
        self.0
            .registry
            .commit(|index, _| plan::token::delete(index, &network, &name, resource_version))
            .await
            .map_err(status)?;
        tracing::info!(network, name, "token deleted");
        Ok(Response::new(DeleteTokenResponse {}))
    }

    async fn watch_tokens(
        &self,
        request: Request<WatchTokensRequest>,
    ) -> Result<Response<Self::WatchTokensStream>, Status> {
        self.0.operator(&request)?;
        let WatchTokensRequest { network, label_selector, resource_version } = request.into_inner();
        let namespace = String::new();
        Ok(Response::new(
            self.0.watch::<registry::Token>(network, namespace, &label_selector, resource_version).await?,
        ))
    }
}

impl Object for registry::Token {
    type Response = WatchTokensResponse;

    fn after(state: &NetworkState, after: &str, limit: usize) -> Vec<Arc<Self>> {
        let range = (Bound::Excluded(after), Bound::Unbounded);
        state.tokens.range::<str, _>(range).take(limit).map(|(_, token)| token.clone()).collect()
    }

    fn of(change: &Change) -> Option<Versions<'_, Self>> {
        let Change::Token { old, new } = change else { return None };
        Some((old.as_ref(), new.as_ref()))
    }

    fn network(&self) -> &str {
        &self.network
    }

    fn namespace(&self) -> &str {
        ""
    }

    fn key(&self) -> &str {
        &self.name
    }

    fn labels(&self) -> &Labels {
        labels(self.stored.token.as_ref().and_then(|token| token.metadata.as_ref()))
    }

    fn revision(&self) -> Revision {
        self.revision
    }

    fn response(_: &Api, event: EventType, token: Option<&Self>, revision: Revision) -> WatchTokensResponse {
        WatchTokensResponse {
            r#type: event.into(),
            token: token.map(|token| token.to_proto(Timestamp::now())),
            resource_version: revision,
        }
    }
}
