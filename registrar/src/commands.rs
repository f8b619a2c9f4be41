//! The commands that carry a deployment from store to store: `backup`, `restore` and `migrate`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use muster_common::{file::hex, time::Timestamp};
use muster_registrar::{
    config::{Config, StoreKind},
    transfer::{
        archive::{self, Contents},
        backup, migrate,
        progress::Progress,
        restore,
    },
};
use serde_json::json;

use crate::ConfigArg;

const BACKUP_EXAMPLES: &str = "Examples:
  muster-registrar backup --output /backup/muster-$(date +%F)
  muster-registrar backup --verify /backup/muster-2026-11-27

The registrar goes on meanwhile. The file holds the CA's key, unless --without-ca:
keep it as private as that key.";

const RESTORE_EXAMPLES: &str = "Examples:
  muster-registrar restore /backup/muster-2026-11-27

The store that the configuration names must be empty. If it is cut off, run the same
command again: it goes on where it was, and no registrar serves the store before that.";

const MIGRATE_EXAMPLES: &str = "Examples:
  muster-registrar migrate --from sqlite --to etcd
  muster-registrar migrate --from sqlite --undo      # serve the old store after all

Stop all registrars before, and set store.kind after. Both stores are those of [store] in
the configuration, whichever of them store.kind names. If it is cut off, run the same
command again: it goes on where it was.";

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

#[derive(Args)]
#[command(after_help = BACKUP_EXAMPLES, group = clap::ArgGroup::new("what").required(true).args(["output", "verify"]))]
pub(crate) struct BackupArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Check a backup, and print what is in it.
    #[arg(long, value_name = "FILE")]
    verify: Option<PathBuf>,
    /// Replace a file that is there.
    #[arg(long, conflicts_with = "verify")]
    force: bool,
    /// Leave the CA out.
    #[arg(long, conflicts_with = "verify")]
    without_ca: bool,
    /// How to print the result.
    #[arg(short = 'o', long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Args)]
#[command(after_help = RESTORE_EXAMPLES)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// The backup.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Leave the CA in the data directory as it is.
    #[arg(long)]
    without_ca: bool,
    /// How to print the result.
    #[arg(short = 'o', long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Args)]
#[command(after_help = MIGRATE_EXAMPLES)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// The store to read.
    #[arg(long, value_enum, value_name = "KIND")]
    from: StoreKind,
    /// The store to write, which must be empty.
    #[arg(long, value_enum, value_name = "KIND", required_unless_present = "undo")]
    to: Option<StoreKind>,
    /// Go on although registrars are said to run on the store.
    #[arg(long, conflicts_with = "undo")]
    force: bool,
    /// Have a store that was migrated be served again. What has changed in the other one since is not in it.
    #[arg(long, conflicts_with = "to")]
    undo: bool,
    /// How to print the result.
    #[arg(short = 'o', long, value_enum, default_value_t)]
    format: Format,
}

impl BackupArgs {
    pub(crate) fn run(self) -> anyhow::Result<String> {
        let Self { config, output, verify, force, without_ca, format } = self;
        let mut progress = Progress::to_stderr();
        let Some(output) = output else {
            let path = verify.unwrap_or_default();
            let contents = archive::verify(&path, &mut progress)?;
            return Ok(describe(&path, &contents, "is whole", format));
        };
        let config = crate::load(&config.config)?;
        let options = backup::Options { output, overwrite: force, with_ca: !without_ca };
        let made = backup::backup(&config, &options, Timestamp::now(), &mut progress);
        let contents = crate::runtime()?.block_on(made)?;
        Ok(describe(&options.output, &contents, "is written, and has been read again", format))
    }
}

impl RestoreArgs {
    pub(crate) fn run(self) -> anyhow::Result<String> {
        let config = crate::load(&self.config.config)?;
        let mut progress = Progress::to_stderr();
        let restored = restore::restore(&config, &self.file, !self.without_ca, &mut progress);
        let contents = crate::runtime()?.block_on(restored)?;
        let mut text = describe(&self.file, &contents, "is restored", self.format);
        if self.format == Format::Text {
            let place = config.place(config.store.kind);
            text +=
                &format!("  into         {place}\n\nStart the registrar: systemctl start muster-registrar\n");
            if (contents.ca.is_empty() || self.without_ca) && !config.data_dir.join("ca.key").exists() {
                text += &format!("Before that, put the CA's files into {}.\n", config.data_dir.display());
            }
        }
        Ok(text)
    }
}

impl MigrateArgs {
    pub(crate) fn run(self) -> anyhow::Result<String> {
        let Self { config, from, to, force, undo, format } = self;
        let config = crate::load(&config.config)?;
        let runtime = crate::runtime()?;
        let Some(to) = to.filter(|_| !undo) else {
            runtime.block_on(migrate::undo(&config, from))?;
            return Ok(match format {
                Format::Json => json_text(&json!({ "undone": config.place(from) })),
                Format::Text => format!("{} can be served again.\n", config.place(from)),
            });
        };
        let options = migrate::Options { from, to, force };
        let mut progress = Progress::to_stderr();
        let migrated = migrate::migrate(&config, options, Timestamp::now(), &mut progress);
        let summary = runtime.block_on(migrated)?;
        Ok(match format {
            Format::Json => json_text(&json!({
                "from": config.place(from),
                "to": config.place(to),
                "keys": summary.keys,
                "digest": format!("sha256:{}", hex(&summary.digest)),
            })),
            Format::Text => after_migration(&config, from, to, summary.keys),
        })
    }
}

fn after_migration(config: &Config, from: StoreKind, to: StoreKind, keys: u64) -> String {
    format!(
        "{} now holds the {keys} keys of {}, which is left as it was but not served any more.\n\n\
         Set `kind = \"{to}\"` in [store] of the configuration, on every registrar, then start:\n\n  \
         systemctl start muster-registrar\n\n\
         To go back instead: muster-registrar migrate --from {from} --undo\n",
        config.place(to),
        config.place(from)
    )
}

/// What a backup holds.
fn describe(path: &Path, contents: &Contents, state: &str, format: Format) -> String {
    let Contents { header, ca, summary } = contents;
    let names: Vec<&str> = ca.iter().map(|file| &*file.name).collect();
    let taken = archive::taken_at(header).map(|at| at.to_string()).unwrap_or_default();
    let digest = format!("sha256:{}", hex(&summary.digest));
    match format {
        Format::Json => json_text(&json!({
            "file": path.display().to_string(),
            "layoutVersion": header.layout_version,
            "trustDomain": header.trust_domain,
            "revision": header.revision,
            "takenAt": taken,
            "keys": summary.keys,
            "digest": digest,
            "caFiles": names,
        })),
        Format::Text => format!(
            "{} {state}.\n  taken at     {taken}\n  deployment   {}\n  revision     {}\n  keys         {}\n  \
             digest       {digest}\n  CA           {}\n",
            path.display(),
            header.trust_domain,
            header.revision,
            summary.keys,
            if names.is_empty() { "left out".to_owned() } else { names.join(", ") }
        ),
    }
}

fn json_text(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}
