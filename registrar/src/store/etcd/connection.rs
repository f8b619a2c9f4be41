//! Asks etcd's members until one answers, for a bounded time; never twice for what must not be done twice.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::Semaphore;
use tonic::{Code, Response, Status};

use super::auth::{Auth, Token};
use super::failure::{Failure, Kind, failure, wants_authentication};
use super::members::{Client, Members};
use super::{EtcdConfig, bad, proto};
use crate::store::StoreError;

/// How long any request may take. Shorter than the 7 s after which etcd itself gives up: that answer would be
/// that it does not know either.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a member may be silent before another one is asked as well, if what is asked can be done twice; and how
/// long a member may take to show that it is there before it is sent something that cannot.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How many requests wait for an answer at once. etcd writes whatever waits in one go, so more of them are not faster; but
/// those that a store long away finds waiting must not all be on their way when it fails again.
const CALLS: usize = 512;
/// Between rounds while the members choose a leader.
const PAUSE: Duration = Duration::from_millis(200);

/// All of etcd, to one user.
#[derive(Debug)]
pub(super) struct Connection {
    members: Members,
    auth: Auth,
    calls: Semaphore,
    /// What all keys begin with.
    prefix: String,
}

impl Connection {
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let members = Members::new(config)?;
        Ok(Self {
            members,
            auth: Auth::new(config)?,
            calls: Semaphore::new(CALLS),
            prefix: config.prefix.clone(),
        })
    }

    /// Notes that a member has told something.
    pub(super) fn heard(&self, member: usize) {
        self.members.heard(member);
    }

    /// Moves on from a member that has failed, unless somebody has done so already.
    pub(super) fn leave(&self, member: usize) {
        self.members.leave(member);
    }

    /// Asks once there are few enough requests under way; see [`Self::ask`].
    pub(super) async fn call<T>(
        &self,
        kind: Kind,
        ask: impl Fn(Client) -> BoxFuture<'static, Result<Response<T>, Status>> + Sync,
    ) -> Result<T, StoreError>
    where
        T: Send,
    {
        let _permit = match tokio::time::timeout(LIMIT, self.calls.acquire()).await {
            Ok(permit) => permit.map_err(|_| StoreError::Closed)?,
            Err(_) => {
                let reason = format!(
                    "{CALLS} requests wait for an answer, and none came within {} s",
                    LIMIT.as_secs()
                );
                return Err(self.error(Failure::Away(reason)));
            }
        };
        self.ask(kind, ask).await
    }

    /// Asks the member in use, and the others if it certainly did not do what it was asked, or may do it as well.
    pub(super) async fn ask<T>(
        &self,
        kind: Kind,
        ask: impl Fn(Client) -> BoxFuture<'static, Result<Response<T>, Status>> + Sync,
    ) -> Result<T, StoreError>
    where
        T: Send,
    {
        let sent = AtomicBool::new(false);
        let attempt = |member| self.attempt(kind, member, &ask, &sent).boxed();
        self.race(kind, &sent, attempt).await.map_err(|failure| self.error(failure))
    }

    /// Makes attempts at members until one succeeds, or more are of no use.
    async fn race<'a, T>(
        &self,
        kind: Kind,
        sent: &AtomicBool,
        attempt: impl Fn(usize) -> BoxFuture<'a, Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let after = |pause: Duration, member: usize| {
            let attempt = attempt(member);
            async move {
                // To sleep for no time takes up to a millisecond.
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                (member, attempt.await)
            }
        };
        let limit = tokio::time::sleep(LIMIT);
        tokio::pin!(limit);
        // The members that are being asked, and the number of those that have failed since the last pause.
        let (mut busy, mut failed) = (vec![self.members.next(&[])], 0);
        let mut attempts = FuturesUnordered::from_iter([after(Duration::ZERO, busy[0])]);
        let (mut leaderless, mut last) = (false, None);
        loop {
            let may_ask_another = matches!(kind, Kind::Read(_)) && busy.len() < self.members.count();
            tokio::select! {
                biased;
                Some((member, result)) = attempts.next() => {
                    busy.retain(|busy| *busy != member);
                    match result {
                        Ok(answer) => {
                            self.members.heard(member);
                            return Ok(answer);
                        }
                        Err(Failure::Leaderless) => {
                            self.members.heard(member);
                            leaderless = true;
                        }
                        Err(Failure::Away(reason)) => last = Some(reason),
                        Err(other) => {
                            if matches!(other, Failure::Unknown(_)) {
                                self.members.leave(member);
                            }
                            return Err(other);
                        }
                    }
                    self.members.leave(member);
                    failed += 1;
                    let all = failed >= self.members.count() - busy.len();
                    let next = self.members.next(&busy);
                    match (all, leaderless) {
                        (false, _) => attempts.push(after(Duration::ZERO, next)),
                        (true, true) => {
                            failed = 0;
                            attempts.push(after(PAUSE, next));
                        }
                        (true, false) if busy.is_empty() => break,
                        (true, false) => continue,
                    }
                    busy.push(next);
                }
                () = tokio::time::sleep(PATIENCE), if may_ask_another => {
                    if let Some(silent) = busy.last() {
                        self.members.leave(*silent);
                    }
                    let next = self.members.next(&busy);
                    busy.push(next);
                    attempts.push(after(Duration::ZERO, next));
                }
                () = &mut limit => {
                    let silence = format!("no answer within {} s", LIMIT.as_secs());
                    busy.iter().for_each(|silent| self.members.leave(*silent));
                    if sent.load(Ordering::Relaxed) {
                        return Err(Failure::Unknown(silence));
                    }
                    last = last.or(Some(silence));
                    break;
                }
            }
        }
        Err(if leaderless { Failure::Leaderless } else { Failure::Away(last.unwrap_or_default()) })
    }

    /// Asks one member. `sent` says, at all times, whether it may be doing now what cannot be done twice.
    async fn attempt<T>(
        &self,
        kind: Kind,
        member: usize,
        ask: &(impl Fn(Client) -> BoxFuture<'static, Result<Response<T>, Status>> + Sync),
        sent: &AtomicBool,
    ) -> Result<T, Failure> {
        let mut refused: Option<Token> = None;
        loop {
            let token = self.token(refused.as_ref()).await?;
            let client = self.members.client(member, token.clone());
            let answer = async {
                let Kind::Write = kind else { return ask(client).await };
                // Where there is no other one to ask, waiting is all that can be done.
                if self.members.count() > 1 && !self.members.heard_lately(member) {
                    self.probe(&client).await?;
                }
                sent.store(true, Ordering::Relaxed);
                ask(client).await
            };
            let status = match answer.await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            let kind = match kind {
                Kind::Write if !sent.load(Ordering::Relaxed) => Kind::Read(None),
                kind => kind,
            };
            if wants_authentication(&status) {
                sent.store(false, Ordering::Relaxed);
                if self.auth.user().is_none() || refused.is_some() {
                    return Err(Failure::Denied(status.message().into()));
                }
                refused = Some(token);
                continue;
            }
            let failure = failure(kind, &status);
            if !matches!(failure, Failure::Unknown(_)) {
                sent.store(false, Ordering::Relaxed);
            }
            return Err(failure);
        }
    }

    /// Finds out whether a member is there, before it is sent something that cannot be sent again to another.
    async fn probe(&self, client: &Client) -> Result<(), Status> {
        let nothing = proto::RangeRequest {
            key: self.prefix.clone().into(),
            serializable: true,
            count_only: true,
            ..proto::RangeRequest::default()
        };
        match tokio::time::timeout(PATIENCE, client.kv().range(nothing)).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(Status::unavailable(format!("no sign of life within {} ms", PATIENCE.as_millis()))),
        }
    }

    async fn token(&self, refused: Option<&Token>) -> Result<Token, Failure> {
        self.auth.token(refused, async |name, password| self.authenticate(name, password).await).await
    }

    /// Asks for a token; says why the password is refused, or that none is needed.
    async fn authenticate(
        &self,
        name: &str,
        password: &str,
    ) -> Result<Result<Option<String>, String>, Failure> {
        let attempt = |member| {
            let mut client = self.members.client(member, Token::default()).auth();
            let request = proto::AuthenticateRequest { name: name.into(), password: password.into() };
            let asked = async move {
                match client.authenticate(request).await {
                    Ok(answer) => Ok(Ok(Some(answer.into_inner().token))),
                    Err(status) if status.message().contains("authentication is not enabled") => Ok(Ok(None)),
                    Err(status) if status.code() == Code::InvalidArgument => {
                        Ok(Err(status.message().to_owned()))
                    }
                    Err(status) => Err(failure(Kind::Read(None), &status)),
                }
            };
            asked.boxed()
        };
        self.race(Kind::Read(None), &AtomicBool::new(false), attempt).await
    }

    /// Says it to those who have asked.
    fn error(&self, failure: Failure) -> StoreError {
        let members = self.members.names();
        match failure {
            Failure::Away(reason) => StoreError::Unavailable(format!("etcd ({members}): {reason}")),
            Failure::Leaderless => StoreError::Unavailable(format!(
                "etcd ({members}) has no leader: more than half of its members must run and reach each other"
            )),
            Failure::Unknown(reason) => StoreError::Unknown(format!("etcd ({members}): {reason}")),
            Failure::Refused(error) => error,
            Failure::Denied(reason) => {
                let who = match self.auth.user() {
                    Some(user) => format!("the user {user:?}"),
                    None => {
                        "the user that the common name of etcd.cert_file is, or nobody without one,".into()
                    }
                };
                let prefix = &self.prefix;
                let reason = format!(
                    "etcd refuses {who} access ({reason}); a user is needed who has a role with the permission \
                     readwrite for the prefix {prefix:?}: etcdctl role grant-permission --prefix=true ROLE \
                     readwrite {prefix}"
                );
                bad("etcd.username", reason)
            }
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Refused(error)
    }
}
