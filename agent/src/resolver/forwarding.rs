//! Which servers are asked for which names: stub domains by their longest suffix, and what is known of queries under way,
//! by which one that has come back to us is noticed.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use hickory_proto::{op::Message, rr::Name};
use muster_common::tls::ALPN_DOT;
use muster_dns::wire::encode_name;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use super::{
    ResolverError,
    key::is_below,
    metrics::Forward,
    pool::{Kind, Pool},
    settings::{Health, Settings, Stub, StubTransport},
};

/// A stub domain's servers.
pub(super) struct StubPool {
    zone: Box<[u8]>,
    pub(super) stub: Stub,
    pub(super) pool: Pool,
}

/// Servers for names below certain domains, longest domains first.
#[derive(Default)]
pub(super) struct Stubs(Vec<StubPool>);

impl Stubs {
    /// `plain` is what hickory is given where there is no TLS.
    pub(super) fn new(
        settings: &Settings,
        plain: &ClientConfig,
        forward: &Forward,
        sent: &Arc<Sent>,
    ) -> Result<Self, ResolverError> {
        let mut stubs = Vec::new();
        for stub in &settings.stubs {
            let zone = encode_name(&stub.domain).ok_or_else(|| ResolverError::Stub(stub.domain.clone()))?;
            stubs.push(StubPool {
                zone: zone.into(),
                pool: stub_pool(stub, plain, settings.health, forward, sent)?,
                stub: stub.clone(),
            });
        }
        stubs.sort_by_key(|stub| std::cmp::Reverse(stub.zone.len()));
        Ok(Self(stubs))
    }

    /// The servers for `name`, which is on the wire and in lower case.
    pub(super) fn find(&self, name: &[u8]) -> Option<&Pool> {
        self.0.iter().find(|stub| is_below(name, &stub.zone)).map(|stub| &stub.pool)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &StubPool> {
        self.0.iter()
    }
}

fn stub_pool(
    stub: &Stub,
    plain: &ClientConfig,
    health: Health,
    forward: &Forward,
    sent: &Arc<Sent>,
) -> Result<Pool, ResolverError> {
    let (kind, tls) = match stub.transport {
        StubTransport::Udp => (Kind::Udp, plain.clone()),
        StubTransport::Tcp => (Kind::Tcp, plain.clone()),
        StubTransport::Tls => (Kind::Tls(stub.server_name.as_str().into()), trusting(&stub.ca)?),
    };
    Ok(Pool::new(kind, tls, health, forward.clone(), Arc::clone(sent)))
}

/// A client that trusts the CA certificates in `ca`.
fn trusting(ca: &Path) -> Result<ClientConfig, ResolverError> {
    let error = |reason: String| ResolverError::Ca { path: ca.to_owned(), reason };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(|e| error(e.to_string()))? {
        // Of the hundreds that a system trusts, one that cannot be read does no harm.
        let _ = roots.add(certificate.map_err(|e| error(e.to_string()))?);
    }
    if roots.is_empty() {
        return Err(error("it has no CA certificate".into()));
    }
    let mut config = ClientConfig::builder_with_provider(muster_common::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| error(e.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_DOT.to_vec()];
    Ok(config)
}

/// Names of queries under way over UDP, each spelled in capitals and small letters at random. A query that comes in
/// spelled the same is our own, passed on by a server that we asked.
#[derive(Debug, Default)]
pub(super) struct Sent(Mutex<HashMap<Vec<u8>, usize>>);

impl Sent {
    /// Remembers the query until what is returned is dropped.
    pub(super) fn note(self: &Arc<Self>, query: &Message) -> Option<Underway> {
        let spelled = spelled(&query.queries.first()?.name)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(spelled.clone()).or_default() += 1;
        Some(Underway { sent: Arc::clone(self), spelled })
    }

    /// Whether a query for `name`, spelled like this, is one of ours.
    pub(super) fn is_own(&self, name: &Name) -> bool {
        spelled(name).is_some_and(|s| self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&s))
    }
}

/// The name as it is spelled, unless there are too few letters of either kind to tell our spelling from a client's.
fn spelled(name: &Name) -> Option<Vec<u8>> {
    let capitals = name.iter().flatten().filter(|octet| octet.is_ascii_uppercase()).count();
    let small = name.iter().flatten().filter(|octet| octet.is_ascii_lowercase()).count();
    (capitals >= 2 && small >= 2).then(|| name.iter().flat_map(|label| [label, b"."].concat()).collect())
}

/// A query under way.
pub(super) struct Underway {
    sent: Arc<Sent>,
    spelled: Vec<u8>,
}

impl Drop for Underway {
    fn drop(&mut self) {
        let mut sent = self.sent.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sent.get_mut(&self.spelled) {
            *count -= 1;
            if *count == 0 {
                sent.remove(&self.spelled);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn the_longest_suffix_wins() {
        let stub = |domain: &str, server: &str| Stub {
            domain: domain.into(),
            servers: vec![server.parse().unwrap()],
            transport: StubTransport::Udp,
            server_name: String::new(),
            ca: "/".into(),
        };
        let stubs = vec![stub("example.", "192.0.2.1:53"), stub("Corp.example", "192.0.2.2:53")];
        let settings = Settings { stubs, ..Settings::default() };
        let plain = ClientConfig::builder_with_provider(muster_common::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let forward = super::super::metrics::Metrics::register(&mut Registry::default()).forward;
        let stubs = Stubs::new(&settings, &plain, &forward, &Arc::default()).unwrap();
        stubs.iter().for_each(|stub| stub.pool.set(&stub.stub.servers));
        let find = |name: &str| {
            stubs.find(&encode_name(name).unwrap()).map(|pool| pool.addresses()[0].ip().to_string())
        };
        for (name, server) in [
            ("example", Some("192.0.2.1")),
            ("www.example", Some("192.0.2.1")),
            ("corp.example", Some("192.0.2.2")),
            ("a.b.corp.example", Some("192.0.2.2")),
            ("xcorp.example", Some("192.0.2.1")),
            ("anexample", None),
            ("org", None),
        ] {
            assert_eq!(find(name).as_deref(), server, "{name}");
        }
    }

    #[test]
    fn own_queries_are_known_while_they_are_under_way() {
        let sent = Arc::<Sent>::default();
        let name = |text: &str| Name::from_ascii(text).unwrap();
        let mut query = Message::query();
        query.add_query(Query::query(name("wWw.ExaMple."), hickory_proto::rr::RecordType::A));
        let underway = sent.note(&query);
        assert!(sent.is_own(&name("wWw.ExaMple.")) && !sent.is_own(&name("www.example.")));
        assert!(!sent.is_own(&name("wwW.ExaMple.")));
        drop(underway);
        assert!(!sent.is_own(&name("wWw.ExaMple.")));
    }
}
