//! FetchInvitation: hands a sealed bundle to the host of a further registrar, once. Invitations are not in the index:
//! the store is asked, and each caller may make it asked only so often.

use std::net::IpAddr;

use muster_common::{
    name::Label,
    time::{Instant, Timestamp},
};
use muster_proto::{
    enrollment::{FetchInvitationRequest, FetchInvitationResponse},
    storage::StoredInvitation,
};
use prost::Message as _;
use tonic::Status;

use super::{Api, lock, status::status};
use crate::{
    invitation::{self, Fetch, InvitationError, PROOF},
    registry::keys,
    store::{Condition, StoreError, Txn, TxnOutcome},
};

/// How often the store is read again when another caller was faster.
const ATTEMPTS: usize = 8;

impl Api {
    /// Hands out what `request` asks for, to a caller at `source` who may ask.
    pub(super) async fn fetch_invitation(
        &self,
        request: FetchInvitationRequest,
        source: IpAddr,
    ) -> Result<FetchInvitationResponse, Status> {
        let FetchInvitationRequest { invitation_id, proof, nonce } = request;
        for (path, octets) in [("proof", &proof), ("nonce", &nonce)] {
            if octets.len() != PROOF {
                return Err(Status::invalid_argument(format!("{path}: must have {PROOF} octets")));
            }
        }
        let id: Label = invitation_id
            .parse()
            .map_err(|_| Status::invalid_argument("invitation_id: is not the id of an invitation"))?;
        let nonce_hash = invitation::hash(&nonce);
        // Counted as a failure before it is one, so that many at once are not many questions to the store. Hosts that become
        // registrars are few.
        if !lock(&self.token_failures).take(source, Instant::now()) {
            return Err(Status::resource_exhausted("too many refused from this address; wait a minute"));
        }
        for _ in 0..ATTEMPTS {
            let key = keys::invitation(id.as_str());
            if !lock(&self.unknown).take((), Instant::now()) {
                return Err(Status::unavailable(
                    "too many ask for what is not known here; try again in a moment",
                ));
            }
            let found = self.registry.store().get(key.clone()).await.map_err(status)?;
            let stored = found.as_ref().and_then(|kv| StoredInvitation::decode(&*kv.value).ok());
            let checked = invitation::check(stored.as_ref(), &proof, &nonce_hash, Timestamp::now());
            let (Some(kv), Some(mut stored)) = (found, stored) else {
                return Err(self.refuse(source, InvitationError::Unknown));
            };
            match checked {
                Err(error) => return Err(self.refuse(source, error)),
                Ok(Fetch::Again) => {
                    tracing::info!(%source, invitation = %id, "an invitation of a registrar was fetched again");
                    return Ok(FetchInvitationResponse { sealed_bundle: stored.sealed_bundle });
                }
                Ok(Fetch::First) => {}
            }
            stored.nonce_hash = nonce_hash.to_vec();
            let bind = Txn::new()
                .when(Condition::ModRevision(key.clone(), kv.mod_revision))
                .put(key, stored.encode_to_vec());
            match self.registry.store().txn(bind).await {
                Ok(TxnOutcome::Committed(_)) => {
                    tracing::info!(%source, invitation = %id, "an invitation of a registrar was fetched");
                    return Ok(FetchInvitationResponse { sealed_bundle: stored.sealed_bundle });
                }
                // It is read again who has it.
                Ok(TxnOutcome::Conflict) | Err(StoreError::Unknown(_)) => {}
                Err(error) => return Err(status(error)),
            }
        }
        Err(Status::unavailable("others ask for the same invitation at the same time; try again in a moment"))
    }

    /// Counts a refusal of `source`.
    fn refuse(&self, source: IpAddr, error: InvitationError) -> Status {
        tracing::info!(%source, reason = %error, "refused an invitation");
        status(error)
    }
}
