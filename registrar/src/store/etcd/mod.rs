//! The store that several registrars share: etcd, through the small part of its v3 API that is needed. [`connection`]
//! asks the [`members`] as the user that [`auth`] is, and [`failure`] says what errors mean; [`watch`] follows changes;
//! [`lease`] keeps a key. Any number of stores, and other programs, can use one etcd with different prefixes.

mod auth;
mod connection;
mod failure;
mod lease;
mod members;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use self::connection::Connection;
use self::failure::Kind;
use super::{
    Announcement, Condition, KeyRange, KeyValue, Op, RangeResult, Revision, Store, StoreError, Txn,
    TxnOutcome, WatchStream,
};

/// What `proto/etcd.proto` describes.
#[expect(unreachable_pub, reason = "generated")]
mod proto {
    tonic::include_proto!("etcdserverpb");
}

/// Where etcd is and how to speak to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EtcdConfig {
    /// The members' client URLs, such as `https://etcd-1.example:2379`; the first that answers is used.
    pub endpoints: Vec<String>,
    /// What all keys begin with in etcd; stores with different prefixes do not see each other.
    pub prefix: String,
    /// The CA that signed etcd's certificates, in PEM; needed for `https`.
    pub ca_file: Option<PathBuf>,
    /// The certificate to show etcd, in PEM.
    pub cert_file: Option<PathBuf>,
    /// Its private key, in PEM.
    pub key_file: Option<PathBuf>,
    /// The user to be, if etcd has authentication enabled; without one, the certificate's common name is.
    pub username: Option<String>,
    /// Holds the user's password in its first line; only its owner may read it.
    pub password_file: Option<PathBuf>,
}

impl Default for EtcdConfig {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:2379".into()],
            prefix: "muster/".into(),
            ca_file: None,
            cert_file: None,
            key_file: None,
            username: None,
            password_file: None,
        }
    }
}

/// A store in etcd.
#[derive(Debug)]
pub struct EtcdStore {
    connection: Arc<Connection>,
    prefix: Bytes,
}

impl EtcdStore {
    /// Prepares the connections; they are made when first needed. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`StoreError::Config`] or [`StoreError::Io`] if the settings cannot be used.
    pub fn open(config: &EtcdConfig) -> Result<Self, StoreError> {
        if config.prefix.is_empty() {
            return Err(bad("etcd.prefix", "it is empty"));
        }
        let connection = Arc::new(Connection::new(config)?);
        Ok(Self { connection, prefix: Bytes::from(config.prefix.clone()) })
    }

    fn stored(&self, key: &[u8]) -> Bytes {
        let mut stored = BytesMut::with_capacity(self.prefix.len() + key.len());
        stored.extend_from_slice(&self.prefix);
        stored.extend_from_slice(key);
        stored.freeze()
    }

    /// The range's start and end in etcd.
    fn stored_range(&self, range: &KeyRange) -> (Bytes, Bytes) {
        let end = match &range.end {
            Some(end) => self.stored(end),
            // A prefix is text, which has no byte 0xff, and so there always is a key after it.
            None => KeyRange::prefix(self.prefix.clone()).end.unwrap_or_default(),
        };
        (self.stored(&range.start), end)
    }

    fn compare(&self, condition: &Condition) -> proto::Compare {
        use proto::compare::{CompareResult, CompareTarget, TargetUnion};
        let (result, target, union) = match condition {
            Condition::Absent(_) => {
                (CompareResult::Equal, CompareTarget::Create, TargetUnion::CreateRevision(0))
            }
            Condition::Exists(_) => {
                (CompareResult::Greater, CompareTarget::Create, TargetUnion::CreateRevision(0))
            }
            Condition::ModRevision(_, revision) => {
                (CompareResult::Equal, CompareTarget::Mod, TargetUnion::ModRevision(revision.cast_signed()))
            }
        };
        proto::Compare {
            result: result.into(),
            target: target.into(),
            key: self.stored(condition.key()),
            target_union: Some(union),
        }
    }

    fn request(&self, op: &Op) -> proto::RequestOp {
        use proto::request_op::Request;
        let request = match op {
            Op::Put { key, value } => {
                Request::Put(proto::PutRequest { key: self.stored(key), value: value.clone(), lease: 0 })
            }
            Op::Delete { key } => Request::DeleteRange(proto::DeleteRangeRequest { key: self.stored(key) }),
        };
        proto::RequestOp { request: Some(request) }
    }

    /// A read of nothing, which makes etcd answer from its latest state: a transaction that only has conditions
    /// would otherwise be answered from what this member happens to know.
    fn barrier(&self) -> Vec<proto::RequestOp> {
        let range = proto::RangeRequest {
            key: self.prefix.clone(),
            count_only: true,
            ..proto::RangeRequest::default()
        };
        vec![proto::RequestOp { request: Some(proto::request_op::Request::Range(range)) }]
    }
}

/// A key and value as etcd tells them, without the prefix. Copied, or each would keep the whole answer in memory.
fn key_value(kv: &proto::KeyValue, prefix: usize) -> KeyValue {
    KeyValue {
        key: Bytes::copy_from_slice(kv.key.get(prefix..).unwrap_or_default()),
        value: Bytes::copy_from_slice(&kv.value),
        create_revision: kv.create_revision.cast_unsigned(),
        mod_revision: kv.mod_revision.cast_unsigned(),
    }
}

fn bad(setting: &'static str, reason: impl ToString) -> StoreError {
    StoreError::Config { setting, reason: reason.to_string() }
}

fn revision(header: Option<proto::ResponseHeader>) -> Result<Revision, StoreError> {
    let header = header.ok_or_else(|| StoreError::Unavailable("etcd answered without a header".into()))?;
    Ok(header.revision.cast_unsigned())
}

#[async_trait]
impl Store for EtcdStore {
    async fn range(
        &self,
        range: KeyRange,
        at: Option<Revision>,
        limit: usize,
    ) -> Result<RangeResult, StoreError> {
        if limit == 0 {
            return Err(StoreError::Invalid("a range was asked for with the limit 0".into()));
        }
        let (key, range_end) = self.stored_range(&range);
        let request = proto::RangeRequest {
            key,
            range_end,
            // 0 is no limit, which is what does not fit comes to.
            limit: i64::try_from(limit).unwrap_or(0),
            revision: at.unwrap_or(0).cast_signed(),
            ..proto::RangeRequest::default()
        };
        let answer = self
            .connection
            .call(Kind::Read(at), move |client| {
                let request = request.clone();
                Box::pin(async move { client.kv().range(request).await })
            })
            .await?;
        let latest = revision(answer.header)?;
        let kvs = answer.kvs.iter().map(|kv| key_value(kv, self.prefix.len())).collect();
        let count = usize::try_from(answer.count).ok();
        Ok(RangeResult { kvs, revision: at.unwrap_or(latest), more: answer.more, count })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let request = proto::TxnRequest {
            compare: txn.conditions.iter().map(|condition| self.compare(condition)).collect(),
            success: match &txn.ops[..] {
                [] => self.barrier(),
                ops => ops.iter().map(|op| self.request(op)).collect(),
            },
            failure: if txn.ops.is_empty() { self.barrier() } else { Vec::new() },
        };
        let answer = self
            .connection
            .call(Kind::Write, move |client| {
                let request = request.clone();
                Box::pin(async move { client.kv().txn(request).await })
            })
            .await?;
        if !answer.succeeded {
            return Ok(TxnOutcome::Conflict);
        }
        revision(answer.header).map(TxnOutcome::Committed)
    }

    async fn watch(&self, range: KeyRange, from: Revision) -> Result<WatchStream, StoreError> {
        if range.is_empty() {
            return Ok(Box::pin(futures_util::stream::pending()));
        }
        let (key, end) = self.stored_range(&range);
        watch::stream(Arc::clone(&self.connection), key, end, self.prefix.len(), from).await
    }

    async fn compact(&self, up_to: Revision) -> Result<(), StoreError> {
        let request = proto::CompactionRequest { revision: up_to.cast_signed() };
        let result = self
            .connection
            // Compacting twice does no harm, so that it can be repeated like a read.
            .call(Kind::Read(Some(up_to)), move |client| {
                Box::pin(async move { client.kv().compact(request).await })
            })
            .await;
        match result {
            Ok(_) | Err(StoreError::Compacted { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        let request = proto::RangeRequest {
            key: self.prefix.clone(),
            count_only: true,
            ..proto::RangeRequest::default()
        };
        let answer = self
            .connection
            .call(Kind::Read(None), move |client| {
                let request = request.clone();
                Box::pin(async move { client.kv().range(request).await })
            })
            .await?;
        revision(answer.header)
    }

    async fn announce(&self, key: Bytes) -> Result<Announcement, StoreError> {
        lease::announce(Arc::clone(&self.connection), self.stored(&key)).await
    }
}
