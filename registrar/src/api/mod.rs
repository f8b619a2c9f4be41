//! The gRPC services: who may call, what they may send, and how refusals are told. What they do is in
//! [`crate::registry`] and [`crate::session`].

mod admin_devices;
mod admin_directors;
mod admin_endpoint_slices;
mod admin_namespaces;
mod admin_networks;
mod admin_registrars;
mod admin_services;
mod admin_tokens;
mod directors;
mod enrollment;
mod invitations;
pub mod limit;
mod list;
mod object;
mod registration;
mod status;
mod watch;

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use muster_common::{
    grpc::Caller,
    identity::{Party, SpiffeId},
    name::Label,
    time::{Instant, Timestamp},
};
use muster_proto::{
    admin::{
        device_service_server::DeviceServiceServer,
        director_service_server::DirectorServiceServer as DirectorAdminServer,
        endpoint_slice_service_server::EndpointSliceServiceServer,
        namespace_service_server::NamespaceServiceServer, network_service_server::NetworkServiceServer,
        registrar_service_server::RegistrarServiceServer, service_service_server::ServiceServiceServer,
        token_service_server::TokenServiceServer,
    },
    director::director_service_server::DirectorServiceServer,
    enrollment::enrollment_service_server::EnrollmentServiceServer,
    registration::registration_service_server::RegistrationServiceServer,
};
use tonic::{Request, Status, service::Routes};
use uuid::Uuid;

use self::{
    limit::{Rate, RateLimit},
    status::status,
};
use crate::{
    ca::SharedCa,
    registry::{
        Device, Index, Registry,
        plan::{
            register::{self, DeviceError},
            site,
        },
    },
    session::Hub,
};

/// What the services are told at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The deployment's trust domain.
    pub trust_domain: String,
    /// Lifetime of devices' certificates.
    pub certificate_lifetime: Duration,
    /// The largest message that is read, in octets.
    pub message_octets: usize,
    /// Requests to join, by source address.
    pub enroll: Rate,
    /// Refused tokens, by source address.
    pub token_failures: Rate,
    /// Unknown tokens and devices that the store is asked about, in all: another registrar may have just made them.
    pub unknown: Rate,
    /// Calls of a device or director that write.
    pub writes: Rate,
    /// Introductions that a device causes; beyond these, peers find out by themselves who calls.
    pub introductions: Rate,
}

impl Settings {
    /// The defaults for a trust domain.
    pub fn new(trust_domain: impl Into<String>) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            certificate_lifetime: Duration::from_secs(30 * 24 * 3600),
            message_octets: 256 * 1024,
            // Many devices can be behind one address, and an installation starts many at once.
            enroll: Rate { per_second: 200.0, burst: 2000.0 },
            // 160 bits cannot be guessed; this keeps those who try from costing much.
            token_failures: Rate { per_second: 0.5, burst: 20.0 },
            unknown: Rate { per_second: 200.0, burst: 2000.0 },
            // An agent writes when its addresses change. Nobody fills the disk with more.
            writes: Rate { per_second: 5.0, burst: 5000.0 },
            introductions: Rate { per_second: 200.0, burst: 5000.0 },
        }
    }
}

/// What the services share.
#[derive(Debug)]
pub struct Api {
    registry: Arc<Registry>,
    hub: Arc<Hub>,
    ca: Arc<SharedCa>,
    settings: Settings,
    enroll: Mutex<RateLimit<IpAddr>>,
    token_failures: Mutex<RateLimit<IpAddr>>,
    unknown: Mutex<RateLimit<()>>,
    writes: Mutex<RateLimit<Uuid>>,
    introductions: Mutex<RateLimit<Uuid>>,
}

/// A device or director that calls, from its certificate.
#[derive(Clone, Debug)]
struct Member {
    network: Label,
    uid: Uuid,
}

impl Api {
    /// The services of `registry`, whose certificates `ca` issues.
    pub fn new(registry: Arc<Registry>, hub: Arc<Hub>, ca: Arc<SharedCa>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            registry,
            hub,
            ca,
            enroll: Mutex::new(RateLimit::new(settings.enroll)),
            token_failures: Mutex::new(RateLimit::new(settings.token_failures)),
            unknown: Mutex::new(RateLimit::new(settings.unknown)),
            writes: Mutex::new(RateLimit::new(settings.writes)),
            introductions: Mutex::new(RateLimit::new(settings.introductions)),
            settings,
        })
    }

    /// All services, to be served with [`muster_common::grpc::incoming`], which tells who calls.
    pub fn routes(self: &Arc<Self>) -> Routes {
        let limit = self.settings.message_octets;
        let mut routes = Routes::builder();
        routes
            .add_service(
                EnrollmentServiceServer::new(enrollment::Enrollment(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                RegistrationServiceServer::new(registration::Registration(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                DirectorServiceServer::new(directors::Directors(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                DirectorAdminServer::new(admin_directors::Directors(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                NetworkServiceServer::new(admin_networks::Networks(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                RegistrarServiceServer::new(admin_registrars::Registrars(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                DeviceServiceServer::new(admin_devices::Devices(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                NamespaceServiceServer::new(admin_namespaces::Namespaces(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                ServiceServiceServer::new(admin_services::Services(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                EndpointSliceServiceServer::new(admin_endpoint_slices::EndpointSlices(self.clone()))
                    .max_decoding_message_size(limit),
            )
            .add_service(
                TokenServiceServer::new(admin_tokens::Tokens(self.clone())).max_decoding_message_size(limit),
            );
        routes.routes()
    }

    /// The party that calls.
    fn party<'a, T>(&self, request: &'a Request<T>) -> Result<&'a Party, Status> {
        let caller = caller(request)?;
        let Some(SpiffeId { trust_domain, party }) = &caller.identity else {
            return Err(Status::unauthenticated(
                "this call needs a client certificate of this deployment; devices get theirs with muster-agent join, \
                 directors with muster-director join, operators with muster-registrar init or credential",
            ));
        };
        if *trust_domain != self.settings.trust_domain {
            return Err(Status::permission_denied(format!(
                "the certificate is of the deployment {trust_domain:?}, and this is {:?}",
                self.settings.trust_domain
            )));
        }
        Ok(party)
    }

    /// Lets through whoever has a certificate of this deployment.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` for strangers.
    pub fn known(&self, request: Request<()>) -> Result<Request<()>, Status> {
        self.party(&request)?;
        Ok(request)
    }

    /// Lets operators through.
    fn operator<T>(&self, request: &Request<T>) -> Result<(), Status> {
        match self.party(request)? {
            Party::Operator { .. } => Ok(()),
            party => {
                Err(Status::permission_denied(format!("only operators may call this, and this is {party}")))
            }
        }
    }

    /// Lets devices through, and says which one it is.
    fn device<T>(&self, request: &Request<T>) -> Result<Member, Status> {
        let party = self.party(request)?;
        let refused =
            || Status::permission_denied(format!("only devices may call this, and this is {party}"));
        let Party::Device { network, uid } = party else { return Err(refused()) };
        let uid = Uuid::try_parse(uid.as_str()).map_err(|_| refused())?;
        Ok(Member { network: network.clone(), uid })
    }

    /// Lets directors through, and says which one it is.
    fn director<T>(&self, request: &Request<T>) -> Result<Member, Status> {
        let party = self.party(request)?;
        let refused =
            || Status::permission_denied(format!("only directors may call this, and this is {party}"));
        let Party::Director { network, uid } = party else { return Err(refused()) };
        let uid = Uuid::try_parse(uid.as_str()).map_err(|_| refused())?;
        Ok(Member { network: network.clone(), uid })
    }
}

impl Api {
    /// Refuses a device that is gone or revoked. One that another registrar has just let in is waited for.
    async fn check_device(&self, caller: &Member) -> Result<(), Status> {
        let find = || register::find(&self.registry.read(), caller.network.as_str(), caller.uid).map(|_| ());
        match find() {
            Err(DeviceError::Gone) => {
                self.ask_store().await?;
                find().map_err(status)
            }
            other => other.map_err(status),
        }
    }

    /// Catches up with the store for what the index does not know; not more often than the store can bear.
    async fn ask_store(&self) -> Result<(), Status> {
        if !lock(&self.unknown).take((), Instant::now()) {
            return Err(Status::unavailable(
                "too many ask for what is not known here; try again in a moment",
            ));
        }
        // Whoever is not known although the store was not caught up with may well be there.
        self.registry.refresh().await.map_err(status)
    }

    /// Makes devices of the hosts that a device may speak for. What cannot be done now is tried again when it registers.
    async fn settle(&self, network: &str, device: Uuid) {
        // Hardly any device has hosts to speak for, and what is not to be written costs a question to the store.
        let may_have = |device: &Arc<Device>| {
            device.site.as_deref().is_some_and(|site| site.may_proxy && !site.hosts.is_empty())
        };
        if !self.registry.read().device(network, device).is_some_and(may_have) {
            return;
        }
        let now = Timestamp::now();
        loop {
            let uids = std::array::from_fn(|_| random_uid());
            let plan = |index: &mut Index, attempt| site::settle(index, network, device, &uids, attempt, now);
            match self.registry.commit(plan).await {
                Ok(false) => {}
                Ok(true) => return,
                Err(error) => {
                    tracing::warn!(network, %device, %error, "cannot add hosts without an agent");
                    return;
                }
            }
        }
    }

    /// Lets a device through that is known and does not write too often.
    async fn check_writer(&self, caller: &Member) -> Result<(), Status> {
        if !lock(&self.writes).take(caller.uid, Instant::now()) {
            return Err(Status::resource_exhausted("this device calls too often; wait a few seconds"));
        }
        self.check_device(caller).await
    }
}

/// Who calls, as the connection knows it.
fn caller<T>(request: &Request<T>) -> Result<&Caller, Status> {
    request.extensions().get().ok_or_else(|| Status::internal("the connection does not say who calls"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A uid that nobody else has.
fn random_uid() -> Uuid {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid()
}

#[cfg(test)]
mod tests;
