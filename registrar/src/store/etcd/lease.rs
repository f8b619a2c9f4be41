//! Keeps a key in etcd for as long as this process runs, with a lease that is kept alive, and anew after it was lost.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use tokio::sync::oneshot;
use tonic::{Response, Status};

use super::connection::Connection;
use super::failure::Kind;
use super::proto;
use crate::store::{Announcement, LIFETIME, StoreError};

/// Between signs of life: two may be lost.
const INTERVAL: Duration = Duration::from_millis(1250);

/// How long etcd may take to be told that it is over.
const FAREWELL: Duration = Duration::from_millis(2500);

/// Sets `key` until the announcement is dropped.
pub(super) async fn announce(connection: Arc<Connection>, key: Bytes) -> Result<Announcement, StoreError> {
    let mut held = Held { connection, key, lease: None, set: false };
    held.renew().await?;
    let (end, mut ended) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        loop {
            tokio::select! {
                // Also when the announcement was dropped.
                _ = &mut ended => break,
                () = tokio::time::sleep(INTERVAL) => {}
            }
            // Asking for long is of no use once it is over.
            let told = tokio::select! {
                _ = &mut ended => break,
                told = held.renew() => told,
            };
            match told {
                Ok(false) => {}
                Ok(true) => tracing::info!("announced anew that this registrar runs"),
                Err(error) => {
                    tracing::warn!(%error, "cannot tell etcd that this registrar runs; trying again");
                }
            }
        }
        // It expires otherwise.
        let revoked = tokio::time::timeout(FAREWELL, held.revoke()).await;
        if !matches!(revoked, Ok(Ok(()))) {
            tracing::debug!("could not tell etcd that this registrar stops");
        }
    });
    Ok(Announcement::new(move || drop(end)).and_then(task))
}

/// A key and the lease that it has. Its requests do not wait for others: a registrar that is busy is there.
struct Held {
    connection: Arc<Connection>,
    key: Bytes,
    lease: Option<i64>,
    /// Whether the key is known to be there for as long as the lease is.
    set: bool,
}

impl Held {
    /// Shows that this process runs; returns whether the key had to be set for that.
    async fn renew(&mut self) -> Result<bool, StoreError> {
        if let Some(lease) = self.lease
            && !self.keep_alive(lease).await?
        {
            (self.lease, self.set) = (None, false);
        }
        if self.set {
            return Ok(false);
        }
        // The same lease until it is known to be gone: a request that is carried out late must not give the key to a
        // lease that nobody keeps alive.
        let lease = match self.lease {
            Some(lease) => lease,
            None => *self.lease.insert(self.grant().await?),
        };
        self.put(lease).await?;
        self.set = true;
        Ok(true)
    }

    async fn grant(&self) -> Result<i64, StoreError> {
        let ttl = i64::try_from(LIFETIME.as_secs()).unwrap_or(i64::MAX);
        // A lease too many expires.
        let granted = self.connection.ask(Kind::Read(None), move |client| {
            Box::pin(async move { client.lease().lease_grant(proto::LeaseGrantRequest { ttl }).await })
        });
        granted.await.map(|granted| granted.id)
    }

    async fn put(&self, lease: i64) -> Result<(), StoreError> {
        let put = proto::PutRequest { key: self.key.clone(), value: Bytes::new(), lease };
        let request = proto::RequestOp { request: Some(proto::request_op::Request::Put(put)) };
        let request = proto::TxnRequest { success: vec![request], ..proto::TxnRequest::default() };
        // To set it twice does no harm.
        let set = self.connection.ask(Kind::Read(None), move |client| {
            let request = request.clone();
            Box::pin(async move { client.kv().txn(request).await })
        });
        set.await.map(drop)
    }

    /// Whether the lease is still there.
    async fn keep_alive(&self, lease: i64) -> Result<bool, StoreError> {
        let told = self.connection.ask(Kind::Read(None), move |client| {
            Box::pin(async move {
                let request = stream::iter([proto::LeaseKeepAliveRequest { id: lease }]);
                let mut answers = client.lease().lease_keep_alive(request).await?.into_inner();
                let answer = answers.message().await?;
                answer.map(Response::new).ok_or_else(|| Status::unavailable("etcd ended the stream"))
            })
        });
        Ok(told.await?.ttl > 0)
    }

    async fn revoke(&self) -> Result<(), StoreError> {
        let Some(lease) = self.lease else { return Ok(()) };
        let revoked = self.connection.ask(Kind::Read(None), move |client| {
            Box::pin(
                async move { client.lease().lease_revoke(proto::LeaseRevokeRequest { id: lease }).await },
            )
        });
        revoked.await.map(drop)
    }
}
