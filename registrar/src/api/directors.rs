//! What directors ask for: each for itself alone, and within its own network.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use muster_common::time::{Instant, Timestamp};
use muster_proto::director::{
    RegisterRequest, RegisterResponse, RenewRequest, RenewResponse, SessionRequest, SessionResponse,
    director_service_server::DirectorService,
};
use tonic::{Request, Response, Status, Streaming};

use super::{Api, Member, enrollment::Issued, lock, status::status};
use crate::{
    csr,
    registry::{
        CommitError, Index,
        director::ADDRESSES_MAX,
        field,
        plan::director::{self as plan, DirectorError},
        token::Joiner,
    },
    session,
};

#[derive(Debug)]
pub(super) struct Directors(pub(super) Arc<Api>);

impl Api {
    /// Refuses a director that is gone or revoked. One that another registrar has just let in is waited for.
    async fn check_director(&self, caller: &Member) -> Result<(), Status> {
        let find = || plan::find(&self.registry.read(), caller.network.as_str(), caller.uid).map(|_| ());
        match find() {
            Err(DirectorError::Gone) => {
                self.ask_store().await?;
                find().map_err(status)
            }
            other => other.map_err(status),
        }
    }

    /// Lets a director through that is known and does not write too often.
    async fn check_writing_director(&self, caller: &Member) -> Result<(), Status> {
        if !lock(&self.writes).take(caller.uid, Instant::now()) {
            return Err(Status::resource_exhausted("this director calls too often; wait a few seconds"));
        }
        self.check_director(caller).await
    }
}

#[tonic::async_trait]
impl DirectorService for Directors {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>;

    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let caller = self.0.director(&request)?;
        self.0.check_writing_director(&caller).await?;
        let Member { network, uid } = caller;
        let network = network.as_str();
        let RegisterRequest { region, endpoints, tcp_ports, version, capacity: _ } = request.into_inner();
        let endpoints = field::endpoints("endpoints", &endpoints, ADDRESSES_MAX).map_err(status)?;
        let registry = &self.0.registry;
        let registration = plan::Registration {
            region: &region,
            endpoints: &endpoints,
            tcp_ports: &tcp_ports,
            version: &version,
        };
        let plan = |index: &mut Index, _| plan::register(index, network, uid, &registration);
        match registry.commit(plan).await {
            // One that is known as it is does not need the store to be connected.
            Err(CommitError::Store(error)) if registry.is_done(plan) => {
                tracing::warn!(network, %uid, %error, "a director registers as before, and the store does not answer");
            }
            other => other.map_err(status)?,
        }
        let index = registry.read();
        let director = plan::find(&index, network, uid).map_err(status)?;
        tracing::info!(network, name = &*director.name, %uid, ?endpoints, "a director has registered");
        let config = director.config(&self.0.hub.advertised());
        Ok(Response::new(RegisterResponse { config: Some(config) }))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let caller = self.0.director(&request)?;
        self.0.check_writing_director(&caller).await?;
        let Member { network, uid } = caller;
        let key = csr::check(&request.get_ref().certificate_request).map_err(status)?;
        let now = Timestamp::now();
        let expiry = Timestamp::from_epoch(Duration::from_secs(
            (now + self.0.settings.certificate_lifetime).unix_seconds(),
        ));
        self.0
            .registry
            .commit(|index, _| plan::renew(index, network.as_str(), uid, expiry))
            .await
            .map_err(status)?;
        let Issued { chain, roots } = self.0.issue(&key, Joiner::Director, network, uid, now)?;
        Ok(Response::new(RenewResponse { certificate_chain: chain, roots }))
    }

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = self.0.director(&request)?;
        self.0.check_director(&caller).await?;
        let hub = self.0.hub.clone();
        let stream =
            session::run_director(hub, caller.network.as_str().into(), caller.uid, request.into_inner());
        Ok(Response::new(Box::pin(stream)))
    }
}
