//! `muster-registrar join`: makes this host a further registrar, with what an invitation hands over. Either all of it is
//! there afterwards, or nothing but the nonce of an attempt whose answer was lost. One that was killed goes on when it
//! is run again.

mod adapt;

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use muster_common::{
    config::{self, ConfigError},
    file::{self, DocumentError, FileError, Format, LockError},
    grpc::{self, ChannelError},
    time::Timestamp,
    tls::{SpkiHash, TlsError, pinned_client_config},
};
use muster_proto::{
    enrollment::{FetchInvitationRequest, enrollment_service_client::EnrollmentServiceClient},
    storage::InvitationBundle,
};
use tonic::Code;

use self::adapt::adapt;
use crate::{
    ca::{
        Ca, CaError, CaFile,
        copy::{self, CopyError},
    },
    config::{Advertise, Config},
    init::{self, list, make_parent, undo::Undo},
    invitation::{
        self, InvitationToken, PROOF,
        bundle::{self, BundleError},
    },
    own_certificate,
    seal::SealError,
    serve::{self, ServeError},
    store::{StoreError, etcd::EtcdStore},
};

/// How long the registrar may take to hand the bundle over.
const FETCH: Duration = Duration::from_secs(30);
/// The nonce of an attempt under way.
const JOURNAL: &str = "joining";
const DOCUMENT: Format = Format { program: "muster-registrar", prefix: "# ", version: 1 };
/// Where the files with which etcd is reached are put.
pub(crate) const ETCD_DIRECTORY: &str = "etcd";

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Options {
    /// A registrar that runs, `HOST:PORT`.
    pub registrar: String,
    /// As `muster-registrar invite` printed it.
    pub token: InvitationToken,
    /// Of the CA.
    pub ca_hash: SpkiHash,
    /// The configuration file to write.
    pub config: PathBuf,
    /// Where the CA goes; `None` for the default.
    pub data_dir: Option<PathBuf>,
    /// Addresses that agents reach this host at; empty: that of the default route.
    pub addresses: Vec<IpAddr>,
}

/// Why this host has not become a registrar.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// There is something already.
    #[error(
        "this host is a registrar already, or was one: {} exists; nothing was changed. Run `muster-registrar leave` \
         first, or choose other paths (--data-dir, --config)", list(.0)
    )]
    Exists(Vec<PathBuf>),
    /// A registrar runs in the data directory, or another join.
    #[error("cannot use the data directory {}: {source}; stop that one first", directory.display())]
    Busy {
        /// The data directory.
        directory: PathBuf,
        /// Who has it.
        source: LockError,
    },
    /// The host's address is not known.
    #[error("cannot find out this host's address ({0}); name the one that agents reach it at: --address A")]
    Address(io::Error),
    /// The configuration that is there.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file cannot be read or made.
    #[error(transparent)]
    File(#[from] FileError),
    /// No connection, or one to somebody else.
    #[error("cannot join: {0}{remedy}", remedy = .0.remedy())]
    Connect(ChannelError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The registrar said no.
    #[error("registrar {registrar} refused: {}", .status.message())]
    Refused {
        /// Its address.
        registrar: String,
        /// Its words.
        status: Box<tonic::Status>,
    },
    /// No answer came.
    #[error(
        "no answer from registrar {registrar}: {reason}; run the same command again on this host: it goes on where it \
         stopped"
    )]
    Lost {
        /// Its address.
        registrar: String,
        /// What was seen instead.
        reason: String,
    },
    /// Nothing can be derived from the token.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// What was handed over cannot be used.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The configuration that was handed over cannot be used.
    #[error(
        "cannot use the configuration of the inviting registrar: {0}; correct it there, install the same version of \
         muster-registrar here, and invite again"
    )]
    Inherited(String),
    /// The CA's files cannot be used.
    #[error("cannot use the CA that was handed over: {0}")]
    Ca(#[from] CaError),
    /// It is another CA.
    #[error(
        "the CA that was handed over is {found}, and not {expected}, as --ca-hash says; nothing was changed"
    )]
    Pin {
        /// Its hash.
        found: SpkiHash,
        /// The one that was given.
        expected: SpkiHash,
    },
    /// The store cannot be opened.
    #[error("cannot use the store from this host: {0}; once it can be, run the same command again here")]
    Store(#[from] StoreError),
    /// The store does not answer as it should.
    #[error("cannot use the store from this host: {0}; once it can be, run the same command again here")]
    Deployment(#[from] Box<ServeError>),
    /// The store is another deployment's.
    #[error(
        "the store that this host reaches is of the trust domain {found:?}, and the invitation of {expected:?}: the \
         endpoints of etcd mean another etcd here; nothing was changed"
    )]
    Domain {
        /// That of the store.
        found: String,
        /// That of the invitation.
        expected: String,
    },
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Report {
    data_dir: PathBuf,
    config: PathBuf,
    store: String,
    trust_domain: String,
    advertise: Advertise,
    notes: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (data_dir, config) = (self.data_dir.display(), self.config.display());
        writeln!(f, "This host is a registrar of {}.\n", self.trust_domain)?;
        writeln!(f, "  CA           {data_dir}/ca.crt, with its key")?;
        writeln!(f, "  store        {}", self.store)?;
        writeln!(f, "  config       {config}")?;
        writeln!(f, "  agents       {}", self.advertise.registrars.join(", "))?;
        writeln!(f, "  DNS          {}", self.advertise.dns.join(", "))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "  note         {note}"))?;
        writeln!(f, "\nStart it:\n\n  muster-registrar serve --config {config}")
    }
}

/// Makes this host a registrar.
///
/// # Errors
/// See [`JoinError`]. What was made by then is removed again.
pub async fn join(options: Options, now: Timestamp) -> Result<Report, JoinError> {
    let data_dir = match &options.data_dir {
        Some(directory) => directory.clone(),
        None => config::load::<Config>(None)?.data_dir,
    };
    let journal = data_dir.join(JOURNAL);
    // What an attempt with the same token has left is gone on with, once it is known what it should be.
    let check = || match earlier(&journal, &options)? {
        Some(_) => Ok(()),
        None => check_absent(&data_dir, &options.config),
    };
    check()?;
    let addresses = match &options.addresses[..] {
        [] => vec![init::default_address().map_err(JoinError::Address)?],
        given => given.to_vec(),
    };

    // The nonce is on disk before the registrar is asked: if the answer gets lost, the same is asked again.
    let mut undo = Undo::default();
    undo.make_directory(&data_dir)?;
    undo.will_make(&data_dir.join("lock"));
    undo.will_make(&journal);
    let _lock =
        file::lock(&data_dir).map_err(|source| JoinError::Busy { directory: data_dir.clone(), source })?;
    check()?;
    let nonce = nonce(&journal, &options)?;
    let sealed = match fetch(&options, &nonce).await {
        Ok(sealed) => sealed,
        Err(error @ JoinError::Lost { .. }) => {
            undo.keep();
            return Err(error);
        }
        Err(error) => {
            if matches!(&error, JoinError::Refused { status, .. } if status.code() == Code::Unauthenticated) {
                file::remove(&journal)?;
            }
            return Err(error);
        }
    };
    // Whatever comes now, the invitation is this host's.
    undo.keep();
    let bundle = bundle::open(&sealed, &options.token)?;
    let report = set_up(&options, &data_dir, &addresses, &bundle, now).await?;
    file::remove(&journal)?;
    Ok(report)
}

/// Refuses to touch what a registrar needs. A configuration that sets nothing, as one that has just been installed, is
/// not in the way.
fn check_absent(data_dir: &Path, config: &Path) -> Result<(), JoinError> {
    let names = ["ca.key", "ca.crt", "cross.crt", "next.key", "roots", "retired", "registry.db"];
    let paths: Vec<PathBuf> = names
        .into_iter()
        .chain([own_certificate::FILE, ETCD_DIRECTORY])
        .map(|name| data_dir.join(name))
        .filter(|path| path.symlink_metadata().is_ok())
        .chain(settings(config, &Config::default())?)
        .collect();
    if paths.is_empty() { Ok(()) } else { Err(JoinError::Exists(paths)) }
}

/// Refuses to touch what no attempt to join with this configuration can have left.
fn check_others(data_dir: &Path, config: &Path, wanted: &Config) -> Result<(), JoinError> {
    let registry = Some(data_dir.join("registry.db")).filter(|path| path.symlink_metadata().is_ok());
    let paths: Vec<PathBuf> = registry.into_iter().chain(settings(config, wanted)?).collect();
    if paths.is_empty() { Ok(()) } else { Err(JoinError::Exists(paths)) }
}

/// The configuration file, if it is there and sets other things than `wanted` does.
fn settings(config: &Path, wanted: &Config) -> Result<Option<PathBuf>, ConfigError> {
    if config.symlink_metadata().is_err() {
        return Ok(None);
    }
    let found: Config = config::load_with(Some(config), |_| None)?;
    Ok((found != Config::default() && found != *wanted).then(|| config.to_owned()))
}

/// What the file of a key of `[store.etcd]` is called in [`ETCD_DIRECTORY`].
pub(crate) fn etcd_file(key: &str) -> String {
    key.replace("_file", ".pem")
}

/// The nonce of this join: that of an earlier attempt with the very same token, or a new one, on disk.
fn nonce(journal: &Path, options: &Options) -> Result<[u8; PROOF], JoinError> {
    if let Some(nonce) = earlier(journal, options)? {
        return Ok(nonce);
    }
    let nonce: [u8; PROOF] = rand::random();
    DOCUMENT.write(journal, JOURNAL, &[purpose(options), nonce].concat())?;
    Ok(nonce)
}

/// What tells an attempt from those with other tokens.
fn purpose(options: &Options) -> [u8; 32] {
    invitation::hash(format!("{} {}", options.token, options.ca_hash).as_bytes())
}

/// The nonce of an earlier attempt with the very same token.
fn earlier(journal: &Path, options: &Options) -> Result<Option<[u8; PROOF]>, JoinError> {
    let found = match DOCUMENT.read(journal, JOURNAL) {
        Ok(found) => found,
        Err(DocumentError::File(error)) => return Err(error.into()),
        Err(DocumentError::Damaged(_)) => None,
    };
    Ok(found.and_then(|body| {
        let (of, nonce) = body.split_first_chunk::<32>()?;
        if *of == purpose(options) { nonce.try_into().ok() } else { None }
    }))
}

/// Asks the registrar, whose CA is pinned before anything is sent.
async fn fetch(options: &Options, nonce: &[u8; PROOF]) -> Result<Vec<u8>, JoinError> {
    let tls = Arc::new(pinned_client_config(options.ca_hash)?);
    let channel = grpc::connect(&options.registrar, tls).await.map_err(JoinError::Connect)?;
    let request = FetchInvitationRequest {
        invitation_id: options.token.id().to_string(),
        proof: options.token.proof()?.to_vec(),
        nonce: nonce.to_vec(),
    };
    let mut client = EnrollmentServiceClient::new(channel);
    let registrar = options.registrar.clone();
    match tokio::time::timeout(FETCH, Box::pin(client.fetch_invitation(request))).await {
        Ok(Ok(answer)) => Ok(answer.into_inner().sealed_bundle),
        Ok(Err(status)) if grpc::is_definite(status.code()) => {
            Err(JoinError::Refused { registrar, status: Box::new(status) })
        }
        Ok(Err(status)) => Err(JoinError::Lost { registrar, reason: grpc::words(&status) }),
        Err(_) => {
            let reason = format!("nothing came within {} s", FETCH.as_secs());
            Err(JoinError::Lost { registrar, reason })
        }
    }
}

/// Writes everything, the configuration last, and removes it again unless all of it can be used.
async fn set_up(
    options: &Options,
    data_dir: &Path,
    addresses: &[IpAddr],
    bundle: &InvitationBundle,
    now: Timestamp,
) -> Result<Report, JoinError> {
    let mut config: Config = config::parse(&bundle.config).map_err(JoinError::Inherited)?;
    config.data_dir = data_dir.to_owned();
    let notes = adapt(&mut config, addresses);

    // An attempt that was cut off has left a part of the same; anything else is not written over.
    let ca_files: Vec<CaFile> = bundle
        .ca_files
        .iter()
        .map(|file| CaFile { name: file.name.clone(), contents: file.contents.clone().into() })
        .collect();
    copy::check(data_dir, &ca_files).map_err(|error| match error {
        CopyError::Other(path) => JoinError::Exists(vec![path]),
        CopyError::Ca(error) => error.into(),
    })?;
    let mut undo = Undo::default();
    for file in &ca_files {
        let path = data_dir.join(&file.name);
        make_parent(&mut undo, &path)?;
        undo.will_make(&path);
    }
    copy::write(data_dir, &ca_files)?;
    let ca = Ca::load(data_dir)?;
    if ca.hash() != options.ca_hash {
        return Err(JoinError::Pin { found: ca.hash(), expected: options.ca_hash });
    }
    for (name, path) in config.store.etcd.files_mut() {
        if let Some(file) = bundle.etcd_files.iter().find(|file| file.name == name) {
            *path = data_dir.join(ETCD_DIRECTORY).join(etcd_file(name));
            make_parent(&mut undo, path)?;
            undo.will_make(path);
            file::write_private(path, &file.contents)?;
        }
    }
    config.check().map_err(|error| JoinError::Inherited(error.to_string()))?;
    check_others(data_dir, &options.config, &config)?;

    let store = EtcdStore::open(&config.etcd())?;
    let place = config.place(config.store.kind);
    let format = serve::read_format(&store, &place).await.map_err(Box::new)?;
    if format.trust_domain != bundle.trust_domain {
        let expected = bundle.trust_domain.clone();
        return Err(JoinError::Domain { found: format.trust_domain, expected });
    }
    let (path, lifetime) =
        (data_dir.join(own_certificate::FILE), config.certificates.registrar_lifetime.get());
    undo.will_make(&path);
    own_certificate::issue(&path, &ca, &format.trust_domain, None, lifetime, now)?;

    make_parent(&mut undo, &options.config)?;
    write_config(&config, &options.config)?;
    undo.keep();
    Ok(Report {
        data_dir: data_dir.to_owned(),
        config: options.config.clone(),
        store: place,
        trust_domain: format.trust_domain,
        advertise: config.advertise,
        notes,
    })
}

/// Writes the keys that differ from their defaults, in the place of a file that sets nothing; it may be read by all.
fn write_config(config: &Config, path: &Path) -> Result<(), FileError> {
    let text = format!(
        "# Configuration of muster-registrar, as taken over from the registrar that invited this one.\n\
         # All keys: muster-registrar serve --print-config\n{}",
        config::print_changed(config)
    );
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    file::remove(&temporary)?;
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        FileError::new("write", path, source)
    })
}

#[cfg(test)]
mod tests;
