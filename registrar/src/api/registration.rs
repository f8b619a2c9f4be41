//! What devices ask for: each for itself alone, and within its own network.

use std::{net::IpAddr, pin::Pin, sync::Arc};

use futures_util::Stream;
use muster_common::{
    name::Label,
    time::{Instant, Timestamp},
};
use muster_proto::{
    admin::TransportCipher,
    registration::{
        DeregisterRequest, DeregisterResponse, ListServicesRequest, ListServicesResponse, LookupRequest,
        LookupResponse, RegisterRequest, RegisterResponse, RenewRequest, RenewResponse, SessionRequest,
        SessionResponse, VisibleService, lookup_request, registration_service_server::RegistrationService,
    },
};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Api, Member,
    enrollment::Issued,
    lock,
    status::{Refusal as _, status},
};
use crate::{
    csr,
    registry::{
        CommitError,
        device::{Device, ENDPOINTS_MAX, Outside, VERSION_MAX, public_key},
        field::{self, FieldError},
        plan::register::{self, DeviceError},
        site,
        token::Joiner,
        view::{self, By},
    },
    session,
};

/// The longest name or address that is looked up, in bytes: that of DNS.
const NAME_MAX: usize = 254;
/// Services in a page.
const SERVICES_PAGE: usize = 500;

#[derive(Debug)]
pub(super) struct Registration(pub(super) Arc<Api>);

#[tonic::async_trait]
impl RegistrationService for Registration {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>;

    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let caller = self.0.device(&request)?;
        self.0.check_writer(&caller).await?;
        let Member { network, uid } = caller;
        let network = network.as_str();
        let request = request.into_inner();
        let key = public_key("public_key", &request.public_key).map_err(status)?;
        let endpoints = field::endpoints("private_endpoints", &request.private_endpoints, ENDPOINTS_MAX)
            .map_err(status)?;
        let outside = request.reachability.as_ref().map(|told| Outside::check("reachability", told));
        let outside = outside.transpose().map_err(status)?;
        let hosts = site::hosts("proxied_hosts", &request.proxied_hosts).map_err(status)?;
        let subnets = site::subnets("offered_subnets", &request.offered_subnets).map_err(status)?;
        if request.agent_version.len() > VERSION_MAX {
            let reason = format!("is longer than {VERSION_MAX} bytes");
            return Err(FieldError::new("agent_version", reason).status());
        }
        let now = Timestamp::now();
        let registry = &self.0.registry;
        let mut before: Option<Arc<Device>> = None;
        // A device that is known does not need the store to be connected.
        let is_known = || {
            let index = registry.read();
            register::find(&index, network, uid)
                .is_ok_and(|d| d.key == Some(key) && d.addresses().next().is_some())
        };
        let registering = registry.commit(|index, attempt| {
            let registration = register::Registration {
                before: before.as_deref(),
                key,
                endpoints: &endpoints,
                outside: outside.as_ref(),
                hosts: &hosts,
                subnets: &subnets,
                aes_256_gcm: request.transport_ciphers().any(|cipher| cipher == TransportCipher::Aes256Gcm),
                agent_version: &request.agent_version,
                attempt,
                now,
            };
            let planned = register::register(index, network, uid, &registration);
            before = before.take().or_else(|| index.device(network, uid).cloned());
            planned
        });
        let saved = match registry.freshness().is_stale() && is_known() {
            true => false,
            false => match registering.await {
                Ok(()) => true,
                Err(CommitError::Store(error)) if is_known() => {
                    tracing::warn!(network, %uid, %error, "a device registers, and the store does not take it");
                    false
                }
                Err(error) => return Err(status(error)),
            },
        };
        if saved {
            self.0.settle(network, uid).await;
        }
        let index = registry.read();
        let device = register::find(&index, network, uid).map_err(status)?;
        let state = index.network(network).ok_or_else(|| status(DeviceError::Gone))?;
        let config = state.config(device, &self.0.hub.advertised());
        let store_epoch = index.format().map_or(0, |format| format.epoch);
        Ok(Response::new(RegisterResponse { config: Some(config), unsaved: !saved, store_epoch }))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let caller = self.0.device(&request)?;
        self.0.check_writer(&caller).await?;
        let Member { network, uid } = caller;
        let key = csr::check(&request.get_ref().certificate_request).map_err(status)?;
        let now = Timestamp::now();
        let expiry = Timestamp::from_epoch(std::time::Duration::from_secs(
            (now + self.0.settings.certificate_lifetime).unix_seconds(),
        ));
        self.0
            .registry
            .commit(|index, _| register::renew(index, network.as_str(), uid, expiry))
            .await
            .map_err(status)?;
        let Issued { chain, roots } = self.0.issue(&key, Joiner::Device, network, uid, now)?;
        Ok(Response::new(RenewResponse { certificate_chain: chain, roots }))
    }

    async fn deregister(
        &self,
        request: Request<DeregisterRequest>,
    ) -> Result<Response<DeregisterResponse>, Status> {
        let caller = self.0.device(&request)?;
        self.0.check_writer(&caller).await?;
        let Member { network, uid } = caller;
        let now = Timestamp::now();
        self.0
            .registry
            .commit(|index, _| register::deregister(index, network.as_str(), uid, now))
            .await
            .map_err(status)?;
        tracing::info!(%network, %uid, "a device has left");
        Ok(Response::new(DeregisterResponse {}))
    }

    async fn lookup(&self, request: Request<LookupRequest>) -> Result<Response<LookupResponse>, Status> {
        let caller = self.0.device(&request)?;
        self.0.check_device(&caller).await?;
        let Member { network, uid } = caller;
        let asked = request.into_inner().by;
        let key;
        let by = match &asked {
            Some(lookup_request::By::VirtualAddress(text)) => By::Address(address(text)?),
            Some(lookup_request::By::PublicKey(octets)) => {
                key = public_key("public_key", octets).map_err(status)?;
                By::Key(&key)
            }
            Some(lookup_request::By::Name(name)) if name.len() <= NAME_MAX => By::Name(name),
            Some(lookup_request::By::Name(_)) => {
                return Err(FieldError::new("name", format!("is longer than {NAME_MAX} bytes")).status());
            }
            None => {
                let reason = "say what to look up: virtual_address, public_key or name";
                return Err(FieldError::new("by", reason).status());
            }
        };
        let (peer, found) = {
            let index = self.0.registry.read();
            let viewer = register::find(&index, network.as_str(), uid).map_err(status)?;
            let state = index.network(network.as_str()).ok_or_else(|| status(DeviceError::Gone))?;
            // One answer for what is not there and for what policy hides.
            let found = state
                .look_up(viewer, by)
                .ok_or_else(|| Status::not_found("there is no such device in this network"))?;
            // A peer can only make use of the introduction once the caller has a key.
            let introduce = viewer.key.is_some() && found.uid != uid;
            (state.peer(found, index.revision()), introduce.then_some(found.uid))
        };
        let now = Instant::now();
        if let Some(found) = found
            && lock(&self.0.introductions).take(uid, now)
        {
            self.0.hub.introduce(found, uid, now);
        }
        Ok(Response::new(LookupResponse { peer: Some(peer) }))
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        let caller = self.0.device(&request)?;
        self.0.check_device(&caller).await?;
        let ListServicesRequest { namespace, page_token } = request.into_inner();
        let index = self.0.registry.read();
        let network = caller.network.as_str();
        let viewer = register::find(&index, network, caller.uid).map_err(status)?;
        let state = index.network(network).ok_or_else(|| status(DeviceError::Gone))?;
        let namespace: Label = match &*namespace {
            "" => field::parse("namespace", &viewer.namespace),
            text => field::parse("namespace", text),
        }
        .map_err(status)?;
        // The token is the name that the page before ended with.
        let after = match &*page_token {
            "" => String::new(),
            text => field::parse::<Label>("page_token", text).map_err(status)?.to_string(),
        };
        let mut services: Vec<VisibleService> = state
            .visible_services(viewer, namespace.as_str(), &after)
            .take(SERVICES_PAGE + 1)
            .map(|service| view::visible_service(service))
            .collect();
        let more = services.len() > SERVICES_PAGE;
        services.truncate(SERVICES_PAGE);
        let last = services.last().filter(|_| more).map(|service| service.name.clone());
        Ok(Response::new(ListServicesResponse { services, next_page_token: last.unwrap_or_default() }))
    }

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = self.0.device(&request)?;
        self.0.check_device(&caller).await?;
        let Member { network, uid } = caller;
        let network =
            register::find(&self.0.registry.read(), network.as_str(), uid).map_err(status)?.network.clone();
        let stream = session::run(self.0.hub.clone(), network, uid, request.into_inner());
        Ok(Response::new(Box::pin(stream)))
    }
}

fn address(text: &str) -> Result<IpAddr, Status> {
    let parsed = field::address::<IpAddr>("virtual_address", text, "IP").map_err(status)?;
    parsed
        .map(|address| address.to_canonical())
        .ok_or_else(|| FieldError::new("virtual_address", "is empty").status())
}
