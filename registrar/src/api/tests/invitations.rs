//! Invitations of further registrars: who gets what they hold, how often, and who does not.

use muster_proto::{
    enrollment::{FetchInvitationRequest, FetchInvitationResponse},
    storage::StoredInvitation,
};
use prost::Message as _;

use super::*;
use crate::{
    invitation::{self, InvitationToken},
    registry::{keys, plan},
    store::Txn,
};

const BUNDLE: &[u8] = b"sealed";

/// Puts an invitation into the store that is over in so many seconds.
async fn invite(fixture: &Fixture, seconds: i64) -> InvitationToken {
    let token = InvitationToken::generate(&mut rand::rng());
    let now = i64::try_from(Timestamp::now().unix_seconds()).unwrap();
    let stored = StoredInvitation {
        sealed_bundle: BUNDLE.to_vec(),
        proof_hash: invitation::hash(&token.proof().unwrap()[..]).to_vec(),
        expires_at: Some(pbjson_types::Timestamp { seconds: now + seconds, nanos: 0 }),
        nonce_hash: Vec::new(),
    };
    let put = Txn::new().put(keys::invitation(token.id().as_str()), stored.encode_to_vec());
    fixture.api.registry.store().txn(put).await.unwrap();
    token
}

fn request(token: &InvitationToken, nonce: u8) -> FetchInvitationRequest {
    FetchInvitationRequest {
        invitation_id: token.id().to_string(),
        proof: token.proof().unwrap().to_vec(),
        nonce: vec![nonce; 32],
    }
}

async fn fetch(
    fixture: &Fixture,
    request: FetchInvitationRequest,
) -> Result<FetchInvitationResponse, Status> {
    let answered = enrollment::Enrollment(fixture.api.clone()).fetch_invitation(stranger(request)).await;
    answered.map(Response::into_inner)
}

#[tokio::test]
async fn the_first_host_gets_it_again_and_others_do_not() {
    let fixture = fixture().await;
    let token = invite(&fixture, 60).await;
    for _ in 0..2 {
        assert_eq!(fetch(&fixture, request(&token, 1)).await.unwrap().sealed_bundle, BUNDLE);
    }
    let refused = fetch(&fixture, request(&token, 2)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("another host"), "{refused}");
    assert_eq!(fetch(&fixture, request(&token, 1)).await.unwrap().sealed_bundle, BUNDLE);
}

#[tokio::test]
async fn of_many_at_once_one_gets_it() {
    let fixture = fixture().await;
    let token = invite(&fixture, 60).await;
    let all = (1..=8).map(|nonce| fetch(&fixture, request(&token, nonce)));
    let answers = futures_util::future::join_all(all).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
    let refused = answers.iter().filter_map(|answer| answer.as_ref().err());
    assert!(refused.into_iter().all(|status| status.code() == Code::Unauthenticated));
}

#[tokio::test]
async fn what_is_unknown_wrong_or_over_looks_the_same() {
    let fixture = fixture().await;
    let (token, over) = (invite(&fixture, 60).await, invite(&fixture, 0).await);
    let unknown = InvitationToken::generate(&mut rand::rng());
    let wrong = FetchInvitationRequest { proof: vec![0; 32], ..request(&token, 1) };
    let mut told = Vec::new();
    for request in [request(&unknown, 1), wrong, request(&over, 1)] {
        let refused = fetch(&fixture, request).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        told.push(refused.message().to_owned());
    }
    assert!(told[0].contains("muster-registrar invite"), "{told:?}");
    assert!(told.iter().all(|message| *message == told[0]), "{told:?}");
    // Nobody has used it up by guessing.
    fetch(&fixture, request(&token, 1)).await.unwrap();
}

#[tokio::test]
async fn requests_of_another_form_are_refused_before_the_store_is_asked() {
    let fixture = fixture().await;
    let token = invite(&fixture, 60).await;
    for (request, says) in [
        (FetchInvitationRequest { proof: vec![0; 31], ..request(&token, 1) }, "proof"),
        (FetchInvitationRequest { nonce: Vec::new(), ..request(&token, 1) }, "nonce"),
        (FetchInvitationRequest { invitation_id: "../meta".into(), ..request(&token, 1) }, "invitation_id"),
        (FetchInvitationRequest { invitation_id: "a".repeat(10_000), ..request(&token, 1) }, "invitation_id"),
    ] {
        let refused = fetch(&fixture, request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(says), "{refused}");
    }
}

#[tokio::test]
async fn who_guesses_is_slowed_down_and_others_are_not() {
    let fixture = fixture().await;
    let token = invite(&fixture, 60).await;
    let wrong = FetchInvitationRequest { proof: vec![0; 32], ..request(&token, 1) };
    let mut refused = Vec::new();
    for _ in 0..30 {
        refused.push(fetch(&fixture, wrong.clone()).await.unwrap_err().code());
    }
    assert_eq!(refused[0], Code::Unauthenticated);
    assert_eq!(refused[29], Code::ResourceExhausted);
    let elsewhere = call(request(&token, 1), "198.51.100.9", None);
    enrollment::Enrollment(fixture.api.clone()).fetch_invitation(elsewhere).await.unwrap();
}

#[tokio::test]
async fn the_store_forgets_what_is_over() {
    let fixture = fixture().await;
    let (token, over) = (invite(&fixture, 60).await, invite(&fixture, -1).await);
    let store = fixture.api.registry.store();
    let damaged = keys::invitation("damaged");
    store.txn(Txn::new().put(damaged.clone(), "\u{1}")).await.unwrap();
    let all = store.range_all(keys::invitations()).await.unwrap().0;
    let txn = plan::sweep::invitations(&all, Timestamp::now()).unwrap();
    store.txn(txn).await.unwrap();
    let left = store.range_all(keys::invitations()).await.unwrap().0;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].key, keys::invitation(token.id().as_str()));
    assert!(plan::sweep::invitations(&left, Timestamp::now()).is_none());
    assert!(fetch(&fixture, request(&over, 1)).await.is_err());
}
