//! `muster-registrar init`: a deployment from nothing. Either all of it is there afterwards, or nothing is.

pub(crate) mod undo;

use std::{
    fmt, io,
    net::{IpAddr, UdpSocket},
    path::{Path, PathBuf},
    sync::Arc,
};

use muster_common::{
    config::{self, ConfigError},
    credential::{CredentialError, OperatorCredential},
    file::{self, FileError},
    identity::{Party, SpiffeId},
    name::{Domain, Label, NameError},
    time::Timestamp,
    tls::{SpkiHash, certificates_to_pem},
};
use muster_proto::{
    admin::{DirectorAddress, Network, NetworkSpec, ObjectMeta, Token, TokenSpec},
    storage::StoredRoot,
};
use prost::Message as _;

use self::undo::Undo;
use crate::{
    ca::{Ca, CaError},
    config::{Config, StoreKind},
    layout, own_certificate,
    registry::{
        CommitError, Registry, keys,
        plan::{self, AdminError},
    },
    store::{
        Condition, KeyRange, Store, StoreError, Txn, TxnOutcome, etcd::EtcdStore, memory::MemoryStore,
        sqlite::SqliteStore,
    },
    token::{DEFAULT_TTL, JoinToken},
};

/// Name of the first operator.
pub const OPERATOR: &str = "admin";
/// Where a director listens unless it is told otherwise.
pub const DIRECTOR_PORT: u16 = 7501;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file; made if there is none.
    pub config: PathBuf,
    /// The domain of the first network, and the trust domain of the deployment.
    pub domain: Domain,
    /// Addresses that agents reach this host at; empty: that of the default route.
    pub public_addresses: Vec<IpAddr>,
    /// Name of the first network.
    pub network: Label,
    /// Where the operator's credential goes.
    pub credential: PathBuf,
}

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is something already.
    #[error(
        "this registrar has been initialised before, or is not alone here: {} exists; nothing was changed. Start \
         it with `muster-registrar serve`, or choose other paths", list(.0)
    )]
    Exists(Vec<PathBuf>),
    /// The shared store holds a deployment.
    #[error(
        "the etcd at {0} holds a Muster deployment already; nothing was changed. To add this host to it as a further \
         registrar, run `muster-registrar invite` on the host of one that runs, and what that prints here; for another \
         deployment, set another store.etcd.prefix"
    )]
    StoreInUse(String),
    /// The host's address is not known.
    #[error(
        "cannot find out this host's address ({0}); name the one that agents reach it at: --public-address A"
    )]
    Address(io::Error),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file cannot be made.
    #[error(transparent)]
    File(#[from] FileError),
    /// The CA cannot be made.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The store cannot be made.
    #[error("cannot make the store: {0}")]
    Store(#[from] StoreError),
    /// The network or the token is refused.
    #[error("cannot make the first network: {0}")]
    Network(#[from] CommitError<AdminError>),
    /// A name cannot be used.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The credential cannot be written.
    #[error(transparent)]
    Credential(#[from] CredentialError),
}

/// Paths, for sentences.
pub(crate) fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Report {
    options: Options,
    data_dir: PathBuf,
    store: String,
    wrote_config: bool,
    spec: NetworkSpec,
    /// The whole command with which the first device joins.
    pub join_command: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options, data_dir, store, spec, .. } = self;
        let config = options.config.display();
        let pools = |v4: &str, v6: &str| [v4, v6].join(", ");
        writeln!(f, "The registrar is initialised.\n")?;
        writeln!(f, "  CA           {}", data_dir.join("ca.crt").display())?;
        writeln!(f, "  store        {store}")?;
        writeln!(f, "  network      {}, domain {}", options.network, options.domain)?;
        writeln!(f, "    devices    {}", pools(&spec.device_pool_v4, &spec.device_pool_v6))?;
        writeln!(f, "    services   {}", pools(&spec.service_pool_v4, &spec.service_pool_v6))?;
        if !spec.directors.is_empty() {
            writeln!(f, "    director   {}", directors(spec))?;
        }
        writeln!(f, "  credential   {} (for `muster`; keep it private)", options.credential.display())?;
        writeln!(f, "  config       {config}{}", if self.wrote_config { "" } else { " (as it was)" })?;
        writeln!(f, "\nStart it:\n\n  muster-registrar serve --config {config}")?;
        writeln!(f, "\nThen join the first device, within 24 hours, by running this on it:\n")?;
        writeln!(f, "  {}", self.join_command)?;
        writeln!(f, "\nFor further devices: muster create token")
    }
}

fn directors(spec: &NetworkSpec) -> String {
    let addresses: Vec<String> =
        spec.directors.iter().map(|d| host_port(&d.address, u16::try_from(d.port).unwrap_or(0))).collect();
    addresses.join(", ")
}

/// Makes a deployment.
///
/// # Errors
/// See [`InitError`]. Whatever was made by then is removed again.
pub async fn init(options: Options, now: Timestamp) -> Result<Report, InitError> {
    let has_config = options.config.symlink_metadata().is_ok();
    let mut config: Config = config::load(has_config.then_some(options.config.as_path()))?;
    config.check()?;
    let addresses = match &options.public_addresses[..] {
        [] => vec![default_address().map_err(InitError::Address)?],
        given => given.to_vec(),
    };
    advertise(&mut config, &addresses);

    check_absent(&config, &options)?;
    let mut undo = Undo::default();
    undo.make_directory(&config.data_dir)?;
    for name in ["ca.crt", "ca.key", own_certificate::FILE] {
        undo.will_make(&config.data_dir.join(name));
    }
    let trust_domain = options.domain.as_str();
    let ca = Ca::create(&config.data_dir, trust_domain, now)?;
    let certificates = &config.certificates;
    let lifetime = certificates.registrar_lifetime.get();
    let path = config.data_dir.join(own_certificate::FILE);
    own_certificate::issue(&path, &ca, trust_domain, None, lifetime, now)?;

    let credential = operator_credential(
        &ca,
        trust_domain,
        &OPERATOR.parse()?,
        certificates.operator_lifetime.get(),
        &config.advertise.registrars[0],
        options.network.as_str(),
        now,
    )?;
    make_parent(&mut undo, &options.credential)?;
    undo.will_make(&options.credential);
    credential.create(&options.credential)?;

    if !has_config {
        make_parent(&mut undo, &options.config)?;
        undo.will_make(&options.config);
        write_config(&config, &options.config)?;
    }

    let token = JoinToken::generate(&mut rand::rng());
    let (txn, spec) = contents(&options, &addresses, &ca, &token, now).await?;
    let store = write_store(&config, &mut undo, txn).await?;
    undo.keep();

    Ok(Report {
        join_command: join_command("muster-agent", &config.advertise.registrars[0], &token, ca.hash()),
        data_dir: config.data_dir.clone(),
        store,
        wrote_config: !has_config,
        spec,
        options,
    })
}

/// The command with which a device joins, or a director, as `program` says.
pub fn join_command(program: &str, registrar: &str, token: &JoinToken, ca: SpkiHash) -> String {
    format!("{program} join --registrar {registrar} --token {token} --ca-hash {ca}")
}

/// A new credential for an operator.
///
/// # Errors
/// As [`Ca::issue`].
pub fn operator_credential(
    ca: &Ca,
    trust_domain: &str,
    name: &Label,
    lifetime: std::time::Duration,
    registrar: &str,
    network: &str,
    now: Timestamp,
) -> Result<OperatorCredential, CaError> {
    let identity = SpiffeId::new(trust_domain, Party::Operator { name: name.clone() });
    let issued = ca.issue_new(&identity, now, lifetime)?;
    Ok(OperatorCredential {
        registrar: registrar.to_owned(),
        network: network.to_owned(),
        certificate: issued.chain,
        key: issued.key.to_string(),
        roots: certificates_to_pem(ca.roots()),
    })
}

/// Fills in the addresses that agents are given, where the configuration names none.
pub fn advertise(config: &mut Config, addresses: &[IpAddr]) {
    let with = |port: u16| addresses.iter().map(|a| host_port(&a.to_string(), port)).collect::<Vec<_>>();
    if config.advertise.registrars.is_empty() {
        config.advertise.registrars = with(config.listen.grpc.port());
    }
    if config.advertise.dns.is_empty() {
        config.advertise.dns = with(config.listen.dot.port());
    }
}

/// The host's address of its default route. Connecting a UDP socket asks the kernel for the route, and sends nothing.
///
/// # Errors
/// If there is no default route.
pub fn default_address() -> io::Result<IpAddr> {
    let local = |bind: &str, to: &str| {
        let socket = UdpSocket::bind(bind)?;
        socket.connect(to)?;
        socket.local_addr().map(|address| address.ip())
    };
    // Addresses that are kept for documentation (RFC 5737, RFC 3849).
    local("0.0.0.0:0", "192.0.2.1:9").or_else(|_| local("[::]:0", "[2001:db8::1]:9"))
}

fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn check_absent(config: &Config, options: &Options) -> Result<(), InitError> {
    let mut paths: Vec<PathBuf> =
        ["ca.key", "ca.crt", own_certificate::FILE].map(|name| config.data_dir.join(name)).into();
    paths.push(options.credential.clone());
    if config.store.kind == StoreKind::Sqlite {
        paths.push(config.sqlite_path());
    }
    paths.retain(|path| path.symlink_metadata().is_ok());
    if paths.is_empty() { Ok(()) } else { Err(InitError::Exists(paths)) }
}

/// Makes the directory that `path` is to be in.
pub(crate) fn make_parent(undo: &mut Undo, path: &Path) -> Result<(), FileError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => undo.make_directory(parent),
        _ => Ok(()),
    }
}

/// What the store holds at first, as one transaction, and the network as it was made. It is put together by the
/// registry itself, over a store in memory.
async fn contents(
    options: &Options,
    addresses: &[IpAddr],
    ca: &Ca,
    token: &JoinToken,
    now: Timestamp,
) -> Result<(Txn, NetworkSpec), InitError> {
    let format = layout::format(options.domain.to_string());
    let root = StoredRoot { certificate: ca.roots()[0].to_vec() };
    let memory = MemoryStore::new();
    memory.apply_txn(
        &Txn::new().put(keys::format(), format.encode_to_vec()).put(keys::root(1), root.encode_to_vec()),
    )?;
    let registry = Registry::load(Arc::new(memory.clone())).await?;
    let meta = |name: &str, network: &str| ObjectMeta {
        name: name.to_owned(),
        network: network.to_owned(),
        ..ObjectMeta::default()
    };
    let network = Network {
        metadata: Some(meta(options.network.as_str(), "")),
        spec: Some(NetworkSpec {
            domain: options.domain.to_string(),
            public_addresses: addresses.iter().map(ToString::to_string).collect(),
            // On loopback, as when trying things out, nobody would find it.
            directors: addresses
                .iter()
                .filter(|address| !address.is_loopback())
                .zip(1..)
                .map(|(address, number)| DirectorAddress {
                    name: format!("director-{number}"),
                    address: address.to_string(),
                    port: DIRECTOR_PORT.into(),
                    ..DirectorAddress::default()
                })
                .collect(),
            ..NetworkSpec::default()
        }),
        status: None,
    };
    let random: [u8; 5] = rand::random();
    let uid = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
    registry.commit(|index, _| plan::network::create(index, &network, uid, random, now)).await?;
    let expires = i64::try_from((now + DEFAULT_TTL).unix_seconds()).unwrap_or(i64::MAX);
    let request = Token {
        metadata: Some(meta(token.id().as_str(), options.network.as_str())),
        spec: Some(TokenSpec {
            expires_at: Some(pbjson_types::Timestamp { seconds: expires, nanos: 0 }),
            ..TokenSpec::default()
        }),
        status: None,
    };
    let uid = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
    registry.commit(|index, _| plan::token::create(index, &request, token, uid, now)).await?;

    let made = registry.read().network(options.network.as_str()).map(|state| state.network.stored.clone());
    let spec = made.and_then(|network| network.spec).unwrap_or_default();
    let (all, _) = memory.range_all(KeyRange::all()).await?;
    // Nor while something else is being put there.
    let nothing = Txn::new().when(Condition::Absent(keys::restoring()));
    let txn = all
        .into_iter()
        .fold(nothing, |txn, kv| txn.when(Condition::Absent(kv.key.clone())).put(kv.key, kv.value));
    Ok((txn, spec))
}

/// Writes the store's first contents; says where it is.
async fn write_store(config: &Config, undo: &mut Undo, txn: Txn) -> Result<String, InitError> {
    match config.store.kind {
        StoreKind::Sqlite => {
            let path = config.sqlite_path();
            make_parent(undo, &path)?;
            let files = SqliteStore::files(&path);
            files.iter().for_each(|file| undo.will_make(file));
            SqliteStore::create(&path)?;
            let outcome = SqliteStore::open(path.clone())?.txn(txn).await?;
            // By now the database is closed, and has all the files that it keeps.
            for file in files.iter().filter(|file| file.exists()) {
                file::adopt(file)?;
            }
            match outcome {
                TxnOutcome::Committed(_) => Ok(format!("sqlite, {}", path.display())),
                TxnOutcome::Conflict => Err(InitError::Exists(vec![path])),
            }
        }
        StoreKind::Etcd => {
            let etcd = config.etcd();
            let place = format!("{} (prefix {})", etcd.endpoints.join(", "), etcd.prefix);
            match EtcdStore::open(&etcd)?.txn(txn).await? {
                TxnOutcome::Committed(_) => Ok(format!("etcd, {place}")),
                TxnOutcome::Conflict => Err(InitError::StoreInUse(place)),
            }
        }
    }
}

/// Writes the keys that this deployment needs; the file may be read by all.
fn write_config(config: &Config, path: &Path) -> Result<(), FileError> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let quoted = |list: &[String]| list.iter().map(|a| format!("{a:?}")).collect::<Vec<_>>().join(", ");
    let text = format!(
        "# Configuration of muster-registrar. All keys: muster-registrar serve --print-config\n\
         data_dir = {:?}\n\n\
         # What agents are given to reach this registrar.\n\
         [advertise]\nregistrars = [{}]\ndns = [{}]\n",
        config.data_dir.display().to_string(),
        quoted(&config.advertise.registrars),
        quoted(&config.advertise.dns),
    );
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| FileError::new("create", path, source))
}

#[cfg(test)]
mod tests;
