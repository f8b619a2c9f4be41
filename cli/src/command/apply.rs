//! `muster apply`, and `muster create -f`: first everything is read and checked, here and by the registrar; only if all
//! of it can be done is any of it done.

use std::collections::BTreeSet;

use futures_util::{StreamExt, stream};

use super::{Context, create};
use crate::{
    args::{Apply, DryRun, Printing},
    client::{CallError, Client, Failure},
    error::{Error, Result},
    manifest::{self, Manifest, Member},
    output::print_change,
    patch,
    resource::{Key, Kind, Resource, Secret},
    with_resource,
};

/// How often a change is tried again that met another's.
pub(super) const ATTEMPTS: u32 = 5;
/// Requests under way at once.
const CONCURRENCY: usize = 16;

/// What to do with manifests.
#[derive(Clone, Copy)]
pub(super) struct Plan<'a> {
    /// Whether what exists already is an error.
    pub(super) only_create: bool,
    pub(super) dry_run: Option<DryRun>,
    pub(super) printing: &'a Printing,
}

pub(super) async fn run(ctx: &mut Context<'_>, args: Apply) -> Result {
    // Everything is read and checked before anything is changed.
    let manifests = manifest::load(&args.filename).map_err(Error::Manifests)?;
    let plan = Plan { only_create: false, dry_run: args.dry_run, printing: &args.printing };
    Box::pin(all(ctx, manifests, plan)).await
}

/// A manifest with the object that it is about.
struct Item {
    manifest: Manifest,
    key: Key,
    /// In which it is, if any.
    namespace: String,
}

impl Item {
    fn id(&self) -> (Kind, Key) {
        (self.manifest.kind, self.key.clone())
    }
}

/// Checks all manifests, then carries all of them out.
pub(super) async fn all(ctx: &mut Context<'_>, manifests: Vec<Manifest>, plan: Plan<'_>) -> Result {
    for warning in manifest::warnings(&manifests) {
        writeln!(ctx.err, "muster: warning: {warning}")?;
    }
    let client = ctx.client().await?;
    let mut items = Vec::new();
    for manifest in manifests {
        let (key, namespace) = with_resource!(manifest.kind, R => {
            let object = create::complete::<R>(ctx, manifest.object()?).await?;
            let namespace = object.metadata().map(|m| m.namespace.clone()).unwrap_or_default();
            (Key::of(&object), namespace)
        });
        items.push(Item { manifest, key, namespace });
    }
    items.sort_by_key(|item| item.manifest.kind.rank());
    let members = items.iter().map(|item| Member { manifest: &item.manifest, key: &item.key });
    manifest::duplicates(members).map_err(Error::Manifests)?;

    let created: BTreeSet<_> = items.iter().map(Item::id).collect();
    let mut postponed = Vec::new();
    let mut fresh = Vec::new();
    let checked = check_all(&client, &items, plan).await;
    for (item, checked) in items.iter().zip(checked) {
        match checked {
            Ok(Checked { new, text }) => {
                if new {
                    fresh.push(item.id());
                }
                if plan.dry_run.is_some() {
                    ctx.out.write_all(&text)?;
                }
            }
            Err(error) if waits(item, &error, &created) => {
                if plan.dry_run.is_some() {
                    let name = &item.key.name;
                    writeln!(ctx.out, "{}/{name} created (server dry run)", item.manifest.kind)?;
                }
                postponed.push(item);
            }
            Err(error) => tell(ctx, item, error)?,
        }
    }
    if ctx.failed > 0 {
        writeln!(ctx.err, "muster: nothing has been changed")?;
        return Ok(());
    }
    if plan.dry_run.is_some() {
        return Ok(());
    }

    // What lives in a namespace that is only now made could not be checked before: if it fails, the namespace goes again.
    let early =
        |item: &&Item| item.manifest.kind.rank() < 2 && !postponed.is_empty() && fresh.contains(&item.id());
    for item in items.iter().filter(early) {
        carry_out(ctx, &client, item, plan).await?;
    }
    if ctx.failed == 0 && !postponed.is_empty() {
        let still_to_come: BTreeSet<_> =
            created.iter().filter(|(kind, _)| *kind == Kind::Service).cloned().collect();
        for item in &postponed {
            if let Err(error) = check(&client, item, plan).await
                && !waits(item, &error, &still_to_come)
            {
                tell(ctx, item, error)?;
            }
        }
    }
    if ctx.failed > 0 {
        for item in items.iter().filter(early).filter(|item| item.manifest.kind == Kind::Namespace) {
            client.delete::<muster_proto::admin::Namespace>(&item.key).await?;
            writeln!(ctx.err, "muster: namespace/{} deleted again", item.key.name)?;
        }
        return Ok(());
    }
    let done: BTreeSet<_> = items.iter().filter(early).map(Item::id).collect();
    for item in items.iter().filter(|item| !done.contains(&item.id()) || item.key.name.is_empty()) {
        carry_out(ctx, &client, item, plan).await?;
    }
    Ok(())
}

/// Whether a check failed only because of something that the same run creates.
fn waits(item: &Item, error: &Error, created: &BTreeSet<(Kind, Key)>) -> bool {
    let Error::Call(error) = error else { return false };
    let key = |kind: Kind, name: &str| {
        let names = kind.names();
        let namespace = if names.unique_in_namespace { item.namespace.clone() } else { String::new() };
        let network = if names.in_network { item.key.network.clone() } else { String::new() };
        (kind, Key { network, namespace, name: name.to_owned() })
    };
    let service = item.manifest.service_name().unwrap_or_default();
    let missing = error.failure == Failure::NotFound
        || (error.failure == Failure::Precondition && error.to_string().contains("does not exist"));
    missing
        && [
            (Kind::Network, item.key.network.as_str()),
            (Kind::Namespace, &item.namespace),
            (Kind::Service, &service),
        ]
        .into_iter()
        .any(|(kind, name)| kind != item.manifest.kind && created.contains(&key(kind, name)))
}

/// Tells of an object that failed; other errors end the command.
fn tell(ctx: &mut Context<'_>, item: &Item, error: Error) -> Result {
    match error {
        Error::Call(_) => ctx.fail(&At { place: &item.manifest.place, error }),
        Error::Manifest(_) => ctx.fail(&error),
        other => return Err(other),
    }
    Ok(())
}

/// An error with the document that it came from.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {error}")]
struct At<'a> {
    place: &'a str,
    error: Error,
}

/// What the registrar says would happen.
struct Checked {
    /// Whether the object would be created.
    new: bool,
    /// What to print of it.
    text: Vec<u8>,
}

async fn check_all(client: &Client, items: &[Item], plan: Plan<'_>) -> Vec<Result<Checked>> {
    stream::iter(items).map(|item| check(client, item, plan)).buffered(CONCURRENCY).collect().await
}

async fn check(client: &Client, item: &Item, plan: Plan<'_>) -> Result<Checked> {
    with_resource!(item.manifest.kind, R => Box::pin(check_one::<R>(client, item, plan)).await)
}

async fn check_one<R: Resource>(client: &Client, item: &Item, plan: Plan<'_>) -> Result<Checked> {
    let asks = plan.dry_run != Some(DryRun::Client);
    let (object, done) = match step::<R>(client, item, plan.only_create).await? {
        Step::Create(object) if asks => (client.check_create(object).await?, "created"),
        Step::Create(object) => (object, "created"),
        Step::Update(object, mask) if asks => (client.check_update(object, mask).await?, "configured"),
        Step::Update(object, _) => (object, "configured"),
        Step::Nothing(object) => (object, "unchanged"),
    };
    let mut text = Vec::new();
    let said = plan.dry_run.map_or_else(|| done.to_owned(), |dry_run| dry_run.says(done));
    print_change(&mut text, plan.printing.output, &object, &said)?;
    Ok(Checked { new: done == "created", text })
}

/// What is to be done for a manifest.
enum Step<R> {
    Create(R),
    Update(R, Vec<String>),
    Nothing(R),
}

async fn step<R: Resource>(client: &Client, item: &Item, only_create: bool) -> Result<Step<R>> {
    // A token without a name is always a new one.
    let current = if item.key.name.is_empty() || only_create {
        None
    } else {
        match client.get::<R>(&item.key).await {
            Ok(current) => Some(current),
            Err(error) if error.failure == Failure::NotFound => None,
            Err(error) => return Err(error.into()),
        }
    };
    let Some(current) = current else {
        let mut object: R = item.manifest.object()?;
        let meta = object.metadata_mut();
        meta.network.clone_from(&item.key.network);
        meta.namespace.clone_from(&item.namespace);
        // These are of the object that the manifest was printed from.
        meta.uid.clear();
        meta.resource_version = 0;
        meta.creation_timestamp = None;
        return Ok(Step::Create(object));
    };
    let (object, mask) = patch::merge(&current, &item.manifest)?;
    Ok(if mask.is_empty() { Step::Nothing(current) } else { Step::Update(object, mask) })
}

/// Does what a manifest says; another's changes at the same time are taken into account.
async fn carry_out(ctx: &mut Context<'_>, client: &Client, item: &Item, plan: Plan<'_>) -> Result {
    let done = with_resource!(item.manifest.kind, R => match Box::pin(carry_out_one::<R>(client, item, plan)).await {
        Ok((object, secret, "created")) => create::created(ctx, &object, secret.as_ref(), plan.printing),
        Ok((object, _, done)) => print_change(ctx.out, plan.printing.output, &object, done),
        Err(error) => Err(error),
    });
    match done {
        Err(error) => tell(ctx, item, error),
        Ok(()) => Ok(()),
    }
}

async fn carry_out_one<R: Resource>(
    client: &Client,
    item: &Item,
    plan: Plan<'_>,
) -> Result<(R, Option<Secret>, &'static str)> {
    let mut attempts = ATTEMPTS;
    loop {
        attempts -= 1;
        let (failed, pinned): (CallError, bool) = match step::<R>(client, item, plan.only_create).await? {
            Step::Nothing(object) => return Ok((object, None, "unchanged")),
            Step::Create(object) => match client.create(object).await {
                Ok((object, secret)) => return Ok((object, secret, "created")),
                Err(error) if error.failure == Failure::AlreadyExists => (error, plan.only_create),
                Err(error) => return Err(error.into()),
            },
            Step::Update(object, mask) => {
                let now = object.metadata().cloned().unwrap_or_default();
                let then = item.manifest.object::<R>()?.metadata().cloned().unwrap_or_default();
                match client.update(object, mask).await {
                    Ok(object) => return Ok((object, None, "configured")),
                    Err(error) if error.failure == Failure::Conflict => {
                        (error, patch::is_pinned(&then, &now))
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        };
        if attempts == 0 || pinned {
            return Err(failed.into());
        }
    }
}
