//! Enroll, and the way in for all calls of strangers. The cheap checks come first: a stranger who has no token costs a hash.

use std::{net::IpAddr, sync::Arc};

use muster_common::{
    census::network_of,
    identity::{Party, SpiffeId},
    name::Label,
    time::{Instant, Timestamp},
};
use muster_proto::{
    enrollment::{
        EnrollRequest, EnrollResponse, FetchInvitationRequest, FetchInvitationResponse,
        enrollment_service_server::EnrollmentService,
    },
    storage::Claim,
};
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::{Api, caller, lock, random_uid, status::status};
use crate::{
    csr,
    registry::{
        CommitError, keys,
        plan::enroll::{self, EnrollError, Enrolled},
        token::Joiner,
    },
    token::{JoinToken, TokenError},
};

/// The longest token and name, in bytes, that are looked at.
const TEXT_MAX: usize = 256;

#[derive(Debug)]
pub(super) struct Enrollment(pub(super) Arc<Api>);

#[tonic::async_trait]
impl EnrollmentService for Enrollment {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let source = self.admit(&request)?;
        let answer = self.0.enroll(request.into_inner(), source).await;
        if let Err(Refused::Token(status)) = &answer {
            tracing::info!(%source, reason = status.message(), "refused to enroll");
        }
        answer.map(Response::new).map_err(|(Refused::Token(status) | Refused::Other(status))| status)
    }

    async fn fetch_invitation(
        &self,
        request: Request<FetchInvitationRequest>,
    ) -> Result<Response<FetchInvitationResponse>, Status> {
        let source = self.admit(&request)?;
        self.0.fetch_invitation(request.into_inner(), source).await.map(Response::new)
    }
}

impl Enrollment {
    /// Where a stranger calls from, who has not called, or guessed, too often.
    fn admit<T>(&self, request: &Request<T>) -> Result<IpAddr, Status> {
        let source = network_of(caller(request)?.address.ip());
        let now = Instant::now();
        if !lock(&self.0.enroll).take(source, now) || !lock(&self.0.token_failures).may(source, now) {
            return Err(too_many());
        }
        Ok(source)
    }
}

fn too_many() -> Status {
    Status::resource_exhausted("too many requests to join from this address; try again in a minute")
}

/// Refuses whoever is something else than the token lets in, before there is anything to delete again.
fn check_party(party: &str, joiner: Joiner) -> Result<(), Status> {
    let reason = match (party, joiner) {
        ("", _) | ("device", Joiner::Device) | ("director", Joiner::Director) => return Ok(()),
        ("device", Joiner::Director) => {
            "this token lets a director join (muster-director join), not a device; nothing has been changed\n\
             remedy: ask the operator for a token for devices (muster create token)"
        }
        ("director", Joiner::Device) => {
            "this token lets a device join (muster-agent join), not a director; nothing has been changed\n\
             remedy: ask the operator for a token for directors (muster create token --director)"
        }
        _ => return Err(Status::invalid_argument("party: is neither \"device\" nor \"director\"")),
    };
    Err(Status::failed_precondition(reason))
}

/// A certificate, DER.
pub(super) struct Issued {
    /// With what is needed to verify it.
    pub(super) chain: Vec<Vec<u8>>,
    /// The roots to trust.
    pub(super) roots: Vec<Vec<u8>>,
}

/// A refusal; those of the token are counted.
enum Refused {
    Token(Status),
    Other(Status),
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self::Other(status)
    }
}

impl Api {
    async fn enroll(&self, request: EnrollRequest, source: IpAddr) -> Result<EnrollResponse, Refused> {
        for (path, text) in [("token", &request.token), ("name", &request.name)] {
            if text.len() > TEXT_MAX {
                let reason = format!("{path}: is longer than {TEXT_MAX} bytes");
                return Err(Status::invalid_argument(reason).into());
            }
        }
        let failed = || lock(&self.token_failures).take(source, Instant::now());
        let token: JoinToken = request.token.parse().map_err(|error| {
            failed();
            Refused::Token(status(error))
        })?;
        let now = Timestamp::now();
        let joiner = self.check_token(&token, now, failed).await?;
        check_party(&request.party, joiner)?;
        let key = csr::check(&request.certificate_request).map_err(status)?;
        let lifetime = self.settings.certificate_lifetime;
        let (uid, mut claim) = (random_uid(), None::<Claim>);
        let enrolled = loop {
            let planned = self.registry.commit(|index, _| {
                let request = enroll::Enrollment {
                    token: &token,
                    key: key.key_hash(),
                    name: &request.name,
                    uid,
                    certificate_expiry: now + lifetime,
                    now,
                    claim: claim.as_ref(),
                };
                enroll::plan(index, &request)
            });
            match planned.await {
                Ok(enrolled) => break enrolled,
                Err(CommitError::Refused(EnrollError::NameTaken { joiner, network, name }))
                    if claim.is_none() =>
                {
                    claim = Some(self.name_claim(joiner, &network, &name).await?);
                }
                Err(error @ CommitError::Refused(EnrollError::Token(_))) => {
                    failed();
                    return Err(Refused::Token(status(error)));
                }
                Err(error) => return Err(status(error).into()),
            }
        };
        let Enrolled { joiner, network, uid, counts_for } = enrolled;
        let (mut response, label) = {
            let index = self.registry.read();
            let gone = || {
                Status::aborted(format!("the {} was deleted while it joined; join again", joiner.as_str()))
            };
            let state = index.network(&network).ok_or_else(gone)?;
            let mut response = EnrollResponse {
                network: network.to_string(),
                domain: state.network.domain.to_string(),
                ..EnrollResponse::default()
            };
            match joiner {
                Joiner::Device => {
                    let device = state.devices.by_uid(uid).ok_or_else(gone)?;
                    response.device_uid = uid.to_string();
                    response.name = device.name.to_string();
                    response.namespace = device.namespace.to_string();
                }
                Joiner::Director => {
                    let director = state.directors.by_uid(uid).ok_or_else(gone)?;
                    response.director_uid = uid.to_string();
                    response.name = director.name.to_string();
                }
            }
            (response, state.network.label.clone())
        };
        let issued = self.issue(&key, joiner, label, uid, now)?;
        (response.certificate_chain, response.roots) = (issued.chain, issued.roots);
        if let Some(token) = counts_for {
            self.registry.count_use(network.clone(), token);
        }
        tracing::info!(%network, name = response.name, %uid, "a {} has joined", joiner.as_str());
        Ok(response)
    }

    /// Refuses a token before anything that costs more. One that another registrar has just made is waited for: that
    /// counts as a failure before, so that many at once are not many guesses.
    async fn check_token(
        &self,
        token: &JoinToken,
        now: Timestamp,
        failed: impl Fn() -> bool,
    ) -> Result<Joiner, Refused> {
        let check = || enroll::check_token(&self.registry.read(), token, now);
        let mut checked = check();
        if checked.is_err() && !failed() {
            return Err(too_many().into());
        }
        if checked == Err(TokenError::Unknown) {
            self.ask_store().await?;
            checked = check();
        }
        checked.map_err(|error| Refused::Token(status(EnrollError::from(error))))
    }

    /// What the store has under the name of a device or director. It stays as it is for as long as that has the name.
    async fn name_claim(&self, joiner: Joiner, network: &str, name: &str) -> Result<Claim, Status> {
        let key = match joiner {
            Joiner::Device => keys::device_name(network, name),
            Joiner::Director => keys::director_name(network, name),
        };
        let found = self.registry.store().get(key).await.map_err(status)?;
        Ok(found.and_then(|kv| Claim::decode(&*kv.value).ok()).unwrap_or_default())
    }

    /// Issues a certificate to a device or director.
    pub(super) fn issue(
        &self,
        key: &csr::CheckedRequest,
        joiner: Joiner,
        network: Label,
        uid: uuid::Uuid,
        now: Timestamp,
    ) -> Result<Issued, Status> {
        let uid = uid.to_string().parse().map_err(|_| Status::internal("a uid is not a label"))?;
        let party = match joiner {
            Joiner::Device => Party::Device { network, uid },
            Joiner::Director => Party::Director { network, uid },
        };
        let identity = SpiffeId::new(&*self.settings.trust_domain, party);
        let ca = self.ca.current();
        let chain = ca.issue(key, &identity, now, self.settings.certificate_lifetime).map_err(status)?;
        let der = |certificates: &[rustls::pki_types::CertificateDer<'_>]| {
            certificates.iter().map(|certificate| certificate.to_vec()).collect()
        };
        Ok(Issued { chain: der(&chain), roots: der(ca.roots()) })
    }
}
