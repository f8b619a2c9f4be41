//! The registrars of a deployment as the index holds them: which ones there are, where they are reached, and which run.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use muster_common::labels::Labels;
use muster_proto::admin;
use prost::Message as _;
use uuid::Uuid;

use super::{device::uid_of, field::FieldError, view::Advertised};
use crate::store::Revision;

/// The most addresses of one kind of a registrar.
pub const ADDRESSES_MAX: usize = 8;
/// The most registrars that devices are told of: as many as agents keep.
pub const TOLD_MAX: usize = 16;

/// A registrar. A value is never changed: a change makes a new one.
#[derive(Clone, Debug, PartialEq)]
pub struct Registrar {
    /// As in its certificate.
    pub uid: Uuid,
    /// Its name.
    pub name: Box<str>,
    /// What it announces itself by while it runs; another one each time.
    pub run: Option<Uuid>,
    /// The message, as it is stored.
    pub stored: admin::Registrar,
    /// Revision of its last change.
    pub revision: Revision,
}

impl Registrar {
    /// Reads what is stored under the uid.
    ///
    /// # Errors
    /// If it does not decode or something in it cannot be.
    pub fn decode(value: &[u8], uid: Uuid, revision: Revision) -> Result<Self, FieldError> {
        let stored = admin::Registrar::decode(value).map_err(|error| FieldError::new("registrar", error))?;
        Self::check(stored, uid, revision)
    }

    /// # Errors
    /// If something in `stored` cannot be.
    pub fn check(stored: admin::Registrar, uid: Uuid, revision: Revision) -> Result<Self, FieldError> {
        let meta = stored.metadata.as_ref().ok_or_else(|| FieldError::new("metadata", "is missing"))?;
        let status = stored.status.as_ref().ok_or_else(|| FieldError::new("status", "is missing"))?;
        for (path, addresses) in
            [("status.addresses", &status.addresses), ("status.dns_servers", &status.dns_servers)]
        {
            if addresses.len() > ADDRESSES_MAX {
                return Err(FieldError::new(path, format!("has more than {ADDRESSES_MAX}")));
            }
        }
        let (name, run) =
            (meta.name.as_str().into(), uid_of("status.run_uid", &status.run_uid, "registrar")?);
        Ok(Self { uid, name, run, stored, revision })
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        self.stored.encode_to_vec()
    }

    /// Its labels.
    pub fn labels(&self) -> &Labels {
        static NONE: Labels = Labels::new();
        self.stored.metadata.as_ref().map_or(&NONE, |meta| &meta.labels)
    }

    /// Open sessions of devices, as it has told lately.
    pub fn sessions(&self) -> u64 {
        self.stored.status.as_ref().map_or(0, |status| status.sessions)
    }

    /// `host:port` that agents reach it at.
    pub fn addresses(&self) -> &[String] {
        self.stored.status.as_ref().map_or(&[], |status| &status.addresses)
    }

    fn dns_servers(&self) -> &[String] {
        self.stored.status.as_ref().map_or(&[], |status| &status.dns_servers)
    }

    /// As operators are told of it.
    pub fn to_proto(&self, runs: bool) -> admin::Registrar {
        let mut shown = self.stored.clone();
        shown.metadata.get_or_insert_default().resource_version = self.revision;
        let status = shown.status.get_or_insert_default();
        status.running = runs;
        status.run_uid.clear();
        if !runs {
            status.sessions = 0;
        }
        shown
    }
}

/// Whether devices have to be told.
pub fn is_told_differently(old: Option<&Registrar>, new: Option<&Registrar>) -> bool {
    let told = |registrar: Option<&Registrar>| {
        registrar.map(|registrar| (registrar.addresses().to_vec(), registrar.dns_servers().to_vec()))
    };
    told(old) != told(new)
}

/// The address in `host:port`, if it is one.
pub fn name_server(server: &str) -> Option<IpAddr> {
    server.parse::<SocketAddr>().ok().map(|server| server.ip())
}

/// All registrars.
#[derive(Clone, Debug, Default)]
pub struct Registrars {
    /// What those that run announce themselves by.
    pub(super) running: BTreeSet<Uuid>,
    by_uid: BTreeMap<Uuid, Arc<Registrar>>,
    name_servers: Arc<[IpAddr]>,
}

impl Registrars {
    /// Uids of those that run, another one for each run.
    pub fn running(&self) -> &BTreeSet<Uuid> {
        &self.running
    }

    /// Whether it runs.
    pub fn runs(&self, registrar: &Registrar) -> bool {
        registrar.run.is_some_and(|run| self.running.contains(&run))
    }

    /// All that have ever run and have not left, by uid.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Registrar>> {
        self.by_uid.values()
    }

    /// By uid.
    pub fn by_uid(&self, uid: Uuid) -> Option<&Arc<Registrar>> {
        self.by_uid.get(&uid)
    }

    /// By name, or by uid.
    pub fn find(&self, name: &str) -> Option<&Arc<Registrar>> {
        let by_name = self.iter().find(|registrar| registrar.name.eq_ignore_ascii_case(name));
        by_name.or_else(|| self.by_uid(Uuid::try_parse(name).ok()?))
    }

    /// At most `limit` whose names come after `after`, by name.
    pub fn after(&self, after: &str, limit: usize) -> Vec<Arc<Registrar>> {
        let mut found: Vec<_> = self.iter().filter(|registrar| &*registrar.name > after).cloned().collect();
        found.sort_by(|one, other| one.name.cmp(&other.name));
        found.truncate(limit);
        found
    }

    /// The one that announces itself by `run`.
    pub(super) fn by_run(&self, run: Uuid) -> Option<&Arc<Registrar>> {
        self.iter().find(|registrar| registrar.run == Some(run))
    }

    pub(super) fn insert(&mut self, registrar: &Arc<Registrar>) -> Option<Arc<Registrar>> {
        let old = self.by_uid.insert(registrar.uid, registrar.clone());
        self.find_name_servers();
        old
    }

    pub(super) fn remove(&mut self, uid: Uuid) -> Option<Arc<Registrar>> {
        let old = self.by_uid.remove(&uid);
        self.find_name_servers();
        old
    }

    /// Where they all answer DNS, each address once and in order. Host names among them are not resolved: that is what
    /// these servers are for.
    pub fn name_servers(&self) -> &Arc<[IpAddr]> {
        &self.name_servers
    }

    fn find_name_servers(&mut self) {
        let servers = self.iter().flat_map(|registrar| registrar.dns_servers());
        let found: BTreeSet<IpAddr> = servers.filter_map(|server| name_server(server)).collect();
        // What a zone was made from is compared with it: the same ones remain the same value.
        if !found.iter().take(TOLD_MAX).eq(self.name_servers.iter()) {
            self.name_servers = found.into_iter().take(TOLD_MAX).collect();
        }
    }

    /// What devices are told, with `own` first: all addresses of all registrars, each once.
    pub fn advertised(&self, own: &Advertised) -> Advertised {
        let all = |own: &[String], of: fn(&Registrar) -> &[String]| {
            let mut all: Vec<String> = own.to_vec();
            for address in self.iter().flat_map(|registrar| of(registrar)) {
                if !all.contains(address) {
                    all.push(address.clone());
                }
            }
            all.truncate(TOLD_MAX);
            all
        };
        Advertised {
            registrars: all(&own.registrars, Registrar::addresses),
            dns_servers: all(&own.dns_servers, Registrar::dns_servers),
        }
    }
}
