//! A module per verb, and what they share: the connection, made when it is first needed, and the choice of the
//! objects that a command is about.

mod apply;
mod approve;
mod change;
mod create;
mod delete;
mod describe;
mod drain;
mod expose;
mod get;
mod revoke;
mod service;
mod undo;
mod version;
mod watch;

use std::{io::Write, sync::Arc};

use clap::CommandFactory;
use muster_common::{
    credential::OperatorCredential,
    identity::Party,
    labels::Selector,
    time::Timestamp,
    tls::{ALPN_H2, Credentials, certificate_validity},
};

use crate::{
    args::{Cli, Command, Global, Selection},
    client::{CallError, Client},
    error::{Error, Result},
    generate,
    resource::{Key, Resource, Scope},
    target::{self, Target},
};

/// The namespace that is meant when none is given.
pub const DEFAULT_NAMESPACE: &str = "default";

/// What every command works with.
pub struct Context<'a> {
    global: Global,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    now: Timestamp,
    client: Option<Arc<Client>>,
    failed: usize,
}

/// Runs one command. Without a `client`, it connects as the command line and the credential say, if it needs to.
pub async fn run(
    cli: Cli,
    client: Option<Client>,
    out: &mut dyn Write,
    err: &mut dyn Write,
    now: Timestamp,
) -> Result {
    let mut context = Context { global: cli.global, out, err, now, client: client.map(Arc::new), failed: 0 };
    let ctx = &mut context;
    match cli.command {
        Command::Get(args) => get::run(ctx, args).await?,
        Command::Watch(args) => get::run(ctx, args.into()).await?,
        Command::Describe(args) => describe::run(ctx, args).await?,
        Command::Create(args) => Box::pin(create::run(ctx, args)).await?,
        Command::Apply(args) => apply::run(ctx, args).await?,
        Command::Delete(args) => delete::run(ctx, args).await?,
        Command::Label(args) => change::run(ctx, args, false).await?,
        Command::Annotate(args) => change::run(ctx, args, true).await?,
        Command::Expose(args) => Box::pin(expose::run(ctx, args)).await?,
        Command::Revoke(args) => Box::pin(revoke::run(ctx, args)).await?,
        Command::Drain(args) => Box::pin(drain::run(ctx, args, true)).await?,
        Command::Undrain(args) => Box::pin(drain::run(ctx, args, false)).await?,
        Command::Approve(args) => approve::run(ctx, args, true).await?,
        Command::Disapprove(args) => approve::run(ctx, args, false).await?,
        Command::Version(args) => version::run(ctx, args).await?,
        Command::Completion { shell } => generate::completion(Cli::command(), shell, ctx.out)?,
        Command::Man { dir } => generate::man_pages(Cli::command(), &dir)?,
    }
    ctx.out.flush()?;
    ctx.tell_stale();
    match context.failed {
        0 => Ok(()),
        failed => Err(Error::Several(failed)),
    }
}

/// Objects of one kind that a command is about.
struct Selected<R> {
    objects: Vec<R>,
    /// To watch from.
    revision: u64,
}

impl Context<'_> {
    /// The connection to the registrar.
    async fn client(&mut self) -> Result<Arc<Client>> {
        if let Some(client) = &self.client {
            return Ok(Arc::clone(client));
        }
        let client = Arc::new(connect(&self.global).await?);
        self.client = Some(Arc::clone(&client));
        Ok(client)
    }

    /// Tells of an object that failed, so that the others can go on; the exit code will be 1.
    fn fail(&mut self, error: &dyn std::error::Error) {
        self.failed += 1;
        // If standard error is gone, the exit code still tells.
        let _ = writeln!(self.err, "muster: {error}");
    }

    /// Says so if what was shown may be out of date.
    fn tell_stale(&mut self) {
        if let Some(client) = &self.client
            && let Some(seconds) = client.stale_for()
        {
            let registrar = client.registrar();
            let _ = writeln!(
                self.err,
                "muster: the store of the registrar {registrar} has not answered for {seconds} s: what is shown may be out of date"
            );
        }
    }

    /// Namespace of what is created.
    fn namespace(&self) -> String {
        self.global.namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned())
    }

    /// What finds the object with `name`.
    fn key<R: Resource>(&self, client: &Client, name: &str) -> Key {
        let names = R::KIND.names();
        Key {
            network: if names.in_network { client.network().to_owned() } else { String::new() },
            namespace: if names.unique_in_namespace { self.namespace() } else { String::new() },
            name: name.to_owned(),
        }
    }

    /// What a list of `R` covers.
    fn scope<R: Resource>(&self, network: &str, selection: &Selection) -> Scope {
        let names = R::KIND.names();
        let everywhere = selection.all_namespaces || !names.namespaced;
        Scope {
            network: if names.in_network { network.to_owned() } else { String::new() },
            namespace: if everywhere { String::new() } else { self.namespace() },
            selector: selection.selector.clone().unwrap_or_default(),
        }
    }

    /// The objects named, each that fails being told of; or, with no names, those that are selected.
    async fn select<R: Resource>(&mut self, target: &Target, selection: &Selection) -> Result<Selected<R>> {
        let client = self.client().await?;
        if target.names.is_empty() {
            let scope = self.scope::<R>(client.network(), selection);
            let (objects, revision) = client.list(&scope).await?;
            return Ok(Selected { objects, revision });
        }
        let mut selected = Selected { objects: Vec::new(), revision: 0 };
        for name in &target.names {
            match self.find::<R>(&client, name).await {
                Ok(object) => {
                    let revision = object.metadata().map_or(0, |m| m.resource_version);
                    selected.revision = selected.revision.max(revision);
                    selected.objects.push(object);
                }
                Err(error) => self.fail(&error),
            }
        }
        Ok(selected)
    }

    /// The object with `name`; with `-n`, only if it is in that namespace.
    async fn find<R: Resource>(&self, client: &Client, name: &str) -> std::result::Result<R, CallError> {
        let object: R = client.get(&self.key::<R>(client, name)).await?;
        match &self.global.namespace {
            Some(wanted) if R::KIND.names().namespaced => {
                let found = object.metadata().map_or("", |m| m.namespace.as_str());
                let place = format!(" in namespace {wanted:?}; there is one in {found:?}");
                if found == wanted {
                    Ok(object)
                } else {
                    Err(CallError::not_found(R::KIND.names(), name, &place))
                }
            }
            _ => Ok(object),
        }
    }
}

/// Reads what a command is about, and checks it against the way objects are selected.
fn targets(words: &[String], selection: &Selection) -> Result<Vec<Target>> {
    let targets = target::parse(words).map_err(Error::Usage)?;
    if let Some(selector) = &selection.selector {
        selector.parse::<Selector>().map_err(|e| Error::Usage(e.to_string()))?;
        if targets.iter().any(|t| !t.names.is_empty()) {
            return Err(Error::Usage("give names or a selector (-l), not both".into()));
        }
    }
    let by_name = |t: &&Target| t.kind.names().unique_in_namespace && !t.names.is_empty();
    if selection.all_namespaces
        && let Some(target) = targets.iter().find(by_name)
    {
        let plural = target.kind.names().plural;
        let reason = format!("{plural} of one name can be in several namespaces; give -n NAMESPACE, not -A");
        return Err(Error::Usage(reason));
    }
    Ok(targets)
}

/// As [`targets`], for commands that change: without names, they need a selector or `--all`.
fn targets_to_change(words: &[String], selection: &Selection, all: bool) -> Result<Vec<Target>> {
    let targets = targets(words, selection)?;
    let selects = all || selection.selector.as_ref().is_some_and(|s| !s.trim().is_empty());
    if targets.iter().any(|t| t.names.is_empty() != selects) {
        return Err(Error::Usage("give names, a selector (-l), or --all".into()));
    }
    Ok(targets)
}

async fn connect(global: &Global) -> Result<Client> {
    // An environment variable that is set to nothing counts as unset.
    let given = global.credential.as_deref().filter(|path| !path.as_os_str().is_empty());
    let set = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let path = OperatorCredential::find(given)?;
    let credential = OperatorCredential::load(&path)?;
    let unusable = |source| Error::Tls { path: path.clone(), source };
    let roots = credential.trusted().map_err(unusable)?;
    let pair = credential.key_pair().map_err(unusable)?;
    if let Some(certificate) = pair.chain.first() {
        let (_, expiry) = certificate_validity(certificate).map_err(unusable)?;
        if expiry <= Timestamp::now() {
            return Err(Error::Expired { path, expiry });
        }
    }
    let credentials = Credentials::new(&pair, &roots).map_err(unusable)?;
    let registrar = set(&global.registrar).unwrap_or(credential.registrar);
    let network = set(&global.network).unwrap_or(credential.network);
    let config = credentials
        .client_config(|party| matches!(party, Party::Registrar { .. }), ALPN_H2)
        .map_err(unusable)?;
    Client::connect(config, &registrar, network, global.request_timeout).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    fn selector(text: &str) -> Selection {
        Selection { selector: Some(text.into()), all_namespaces: false }
    }

    #[test]
    fn commands_that_change_never_take_all_by_accident() {
        let none = Selection::default();
        assert!(targets_to_change(&words("devices"), &none, false).is_err());
        assert!(targets_to_change(&words("devices"), &selector(""), false).is_err());
        assert!(targets_to_change(&words("devices web"), &none, true).is_err());
        assert!(targets_to_change(&words("devices web"), &selector("a=b"), false).is_err());
        assert!(targets_to_change(&words("devices"), &selector("a=b"), false).is_ok());
        assert!(targets_to_change(&words("devices"), &none, true).is_ok());
        assert!(targets_to_change(&words("device/web token/x"), &none, false).is_ok());
    }

    #[test]
    fn selectors_are_checked_before_anything_is_asked() {
        assert!(targets(&words("devices"), &selector("a in b")).is_err());
        assert!(targets(&words("devices"), &selector("a in (b)")).is_ok());
    }
}
