//! Keeps a key in etcd for as long as this process runs, with a lease that is kept alive, and anew after it was lost.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use tokio::sync::oneshot;
use tonic::Status;

use super::connection::{Connection, Kind};
use super::proto;
use crate::store::{Announcement, LIFETIME, StoreError};

/// Between signs of life: two may be lost.
const INTERVAL: Duration = Duration::from_millis(1250);

/// How long etcd may take to answer one, before another member is asked.
const PATIENCE: Duration = Duration::from_millis(2500);

/// Sets `key` until the announcement is dropped.
pub(super) async fn announce(connection: Arc<Connection>, key: Bytes) -> Result<Announcement, StoreError> {
    let lease = put(&connection, &key).await?;
    let (end, mut ended) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let mut lease = Some(lease);
        loop {
            tokio::select! {
                // Also when the announcement was dropped.
                _ = &mut ended => break,
                () = tokio::time::sleep(INTERVAL) => {}
            }
            let (_, member) = connection.current();
            let told = async {
                let alive = match lease {
                    Some(lease) => keep_alive(&connection, lease).await?,
                    None => false,
                };
                if !alive {
                    lease = None;
                    lease = Some(put(&connection, &key).await?);
                    tracing::info!("announced anew that this registrar runs");
                }
                Ok::<_, StoreError>(())
            };
            match tokio::time::timeout(PATIENCE, told).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot tell etcd that this registrar runs; trying again")
                }
                Err(_) => {
                    connection.leave(member);
                    tracing::warn!(
                        "etcd does not answer that it knows that this registrar runs; trying again"
                    );
                }
            }
        }
        if let Some(lease) = lease {
            // It expires otherwise.
            let revoked = tokio::time::timeout(PATIENCE, revoke(&connection, lease)).await;
            if !matches!(revoked, Ok(Ok(()))) {
                tracing::debug!("could not tell etcd that this registrar stops");
            }
        }
    });
    Ok(Announcement::new(move || drop(end)).and_then(task))
}

/// Sets the key with a new lease.
async fn put(connection: &Connection, key: &Bytes) -> Result<i64, StoreError> {
    let ttl = i64::try_from(LIFETIME.as_secs()).unwrap_or(i64::MAX);
    // A lease too many expires.
    let granted = connection.call(Kind::Read(None), move |mut client| {
        Box::pin(async move { client.lease.lease_grant(proto::LeaseGrantRequest { ttl }).await })
    });
    let lease = granted.await?.id;
    let put = proto::PutRequest { key: key.clone(), value: Bytes::new(), lease };
    let request = proto::RequestOp { request: Some(proto::request_op::Request::Put(put)) };
    let request = proto::TxnRequest { success: vec![request], ..proto::TxnRequest::default() };
    // To set it twice does no harm.
    connection
        .call(Kind::Read(None), move |mut client| {
            let request = request.clone();
            Box::pin(async move { client.kv.txn(request).await })
        })
        .await?;
    Ok(lease)
}

/// Whether the lease is still there.
async fn keep_alive(connection: &Connection, lease: i64) -> Result<bool, StoreError> {
    let told = connection.call(Kind::Read(None), move |mut client| {
        Box::pin(async move {
            let request = stream::iter([proto::LeaseKeepAliveRequest { id: lease }]);
            let mut answers = client.lease.lease_keep_alive(request).await?.into_inner();
            let answer = answers.message().await?;
            answer.map(tonic::Response::new).ok_or_else(|| Status::unavailable("etcd ended the stream"))
        })
    });
    Ok(told.await?.ttl > 0)
}

async fn revoke(connection: &Connection, lease: i64) -> Result<(), StoreError> {
    let revoked = connection.call(Kind::Read(None), move |mut client| {
        Box::pin(async move { client.lease.lease_revoke(proto::LeaseRevokeRequest { id: lease }).await })
    });
    revoked.await.map(drop)
}
