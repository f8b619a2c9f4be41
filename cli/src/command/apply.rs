//! `muster apply`, and `muster create -f`: first everything is read and checked, here and by the registrar; only if all
//! of it can be done is any of it done.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
};

use futures_util::{StreamExt, stream};
use muster_proto::admin::{Device, EndpointSlice, Service};

use super::{Context, create, undo::Undo};
use crate::{
    args::{Apply, DryRun, Printing},
    client::{CallError, Client, Failure},
    error::{Error, Result},
    manifest::{self, Manifest, Member},
    output::print_change,
    patch,
    resource::{Key, Kind, Resource, Scope, Secret},
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
    let mut changing = BTreeSet::new();
    let checked = check_all(&client, &items, plan).await;
    for (item, checked) in items.iter().zip(checked) {
        match checked {
            Ok(Checked { changes, text }) => {
                if changes {
                    changing.insert(item.id());
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
                changing.insert(item.id());
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
        return warn_of_selectors(ctx, &client, &items, &changing).await;
    }

    warn_of_selectors(ctx, &client, &items, &changing).await?;
    let mut carried = Carried::default();
    let mut rest = &*items;
    let mut unchecked = !postponed.is_empty();
    while let Some(first) = rest.first().filter(|_| ctx.failed == 0) {
        let rank = first.manifest.kind.rank();
        // What lives in a namespace that was only now made could not be checked before.
        if unchecked && rank > Kind::Namespace.rank() {
            unchecked = false;
            let still_to_come = created.iter().filter(|(kind, _)| *kind == Kind::Service).cloned().collect();
            let checks = stream::iter(&postponed).map(|item| check(&client, item, plan));
            let checked: Vec<_> = checks.buffered(CONCURRENCY).collect().await;
            for (item, checked) in postponed.iter().zip(checked) {
                if let Err(error) = checked
                    && !waits(item, &error, &still_to_come)
                {
                    tell(ctx, item, error)?;
                }
            }
            continue;
        }
        let (same, later) = rest.split_at(rest.partition_point(|item| item.manifest.kind.rank() <= rank));
        rest = later;
        carry_out_all(ctx, &client, same, plan, &mut carried).await?;
    }
    if ctx.failed > 0 { undo(ctx, &client, carried).await } else { Ok(()) }
}

/// What has been carried out.
#[derive(Default)]
struct Carried {
    /// How to undo it, in order.
    undo: Vec<Undo>,
    /// Objects of which nobody can tell whether they have been changed.
    unsure: Vec<String>,
}

/// Carries out manifests that do not need each other, several at once; after a failure no more are begun.
async fn carry_out_all(
    ctx: &mut Context<'_>,
    client: &Client,
    items: &[Item],
    plan: Plan<'_>,
    carried: &mut Carried,
) -> Result {
    let stop = Cell::new(false);
    let one = |item| {
        let stop = &stop;
        async move {
            if stop.get() {
                return None;
            }
            let done = carry_out(client, item, plan).await;
            stop.set(stop.get() || done.is_err());
            Some((item, done))
        }
    };
    let mut all = stream::iter(items).map(one).buffered(CONCURRENCY);
    let mut told = Ok(());
    // Also after a failure, those that are under way are waited for: they may have to be undone.
    while let Some(next) = all.next().await {
        match next {
            None => {}
            Some((_, Ok(done))) => {
                carried.undo.extend(done.undo);
                told = told.and(ctx.out.write_all(&done.out)).and(ctx.err.write_all(&done.err));
            }
            Some((item, Err(error))) => {
                if matches!(&error, Error::Call(error) if error.failure == Failure::Unavailable) {
                    carried.unsure.push(format!("{}/{}", item.manifest.kind, item.key.name));
                }
                ctx.fail(&At { place: item.manifest.position(), error });
            }
        }
    }
    Ok(told?)
}

/// Undoes what has been carried out, and tells what is left.
async fn undo(ctx: &mut Context<'_>, client: &Client, carried: Carried) -> Result {
    let mut left = carried.unsure.len();
    for undo in carried.undo.into_iter().rev() {
        match undo.run(client).await {
            Ok(told) => writeln!(ctx.err, "muster: {told}")?,
            Err(told) => {
                left += 1;
                writeln!(ctx.err, "muster: {told}")?;
            }
        }
    }
    for name in carried.unsure {
        writeln!(ctx.err, "muster: nobody can tell whether {name} was written; look with muster get")?;
    }
    if left == 0 {
        writeln!(ctx.err, "muster: nothing has been changed")?;
    } else {
        writeln!(
            ctx.err,
            "muster: {left} of the objects may stay changed; correct the manifests and apply again"
        )?;
    }
    Ok(())
}

/// Most selectors that are tried out.
const SELECTORS_MAX: usize = 200;

/// Warns of Services whose selector finds no device, and which have no EndpointSlice either.
async fn warn_of_selectors(
    ctx: &mut Context<'_>,
    client: &Client,
    items: &[Item],
    changing: &BTreeSet<(Kind, Key)>,
) -> Result {
    let slices: BTreeSet<_> = items
        .iter()
        .filter_map(|item| Some((&item.key.network, &item.namespace, item.manifest.service_name()?)))
        .collect();
    let mut found: BTreeMap<(String, String, String), bool> = BTreeMap::new();
    for item in items.iter().filter(|item| item.manifest.kind == Kind::Service) {
        let service: Service = item.manifest.object()?;
        let spec = service.spec.unwrap_or_default();
        let network = item.key.network.clone();
        if !changing.contains(&item.id())
            || spec.selector.is_empty()
            || spec.r#type == "ExternalName"
            || slices.contains(&(&network, &item.namespace, item.key.name.clone()))
        {
            continue;
        }
        let selector = spec.selector.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",");
        let key = (network.clone(), item.namespace.clone(), selector.clone());
        let devices = match found.get(&key) {
            Some(any) => *any,
            None if found.len() >= SELECTORS_MAX => break,
            None => {
                let scope =
                    Scope { network: key.0.clone(), namespace: key.1.clone(), selector: key.2.clone() };
                let any = client.any::<Device>(&scope).await?;
                found.insert(key, any);
                any
            }
        };
        let of_service = format!("kubernetes.io/service-name={}", item.key.name);
        let scope = Scope { network, namespace: item.namespace.clone(), selector: of_service };
        if devices || client.any::<EndpointSlice>(&scope).await? {
            continue;
        }
        writeln!(
            ctx.err,
            "muster: warning: {}: spec.selector: {selector} selects no device in namespace {:?}, and there is no EndpointSlice, so service/{} has no endpoints; label a device, or write an EndpointSlice",
            item.manifest.position(),
            item.namespace,
            item.key.name
        )?;
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
        Error::Call(_) => ctx.fail(&At { place: item.manifest.position(), error }),
        Error::Manifest(_) => ctx.fail(&error),
        other => return Err(other),
    }
    Ok(())
}

/// An error with the document that it came from.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {error}")]
struct At {
    place: String,
    error: Error,
}

/// What the registrar says would happen.
struct Checked {
    /// Whether the object would be created or changed.
    changes: bool,
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
        Step::Update(object, mask, _) if asks => (client.check_update(object, mask).await?, "configured"),
        Step::Update(object, ..) => (object, "configured"),
        Step::Nothing(object) => (object, "unchanged"),
    };
    let mut text = Vec::new();
    let said = plan.dry_run.map_or_else(|| done.to_owned(), |dry_run| dry_run.says(done));
    print_change(&mut text, plan.printing.output, &object, &said)?;
    Ok(Checked { changes: done != "unchanged", text })
}

/// What is to be done for a manifest.
enum Step<R> {
    Create(R),
    /// To what, in which fields, and what is there.
    Update(R, Vec<String>, R),
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
    Ok(if mask.is_empty() { Step::Nothing(current) } else { Step::Update(object, mask, current) })
}

/// What carrying out a manifest comes to.
struct Done {
    /// To print to standard output, and to standard error.
    out: Vec<u8>,
    err: Vec<u8>,
    undo: Option<Undo>,
}

/// Does what a manifest says; another's changes at the same time are taken into account.
async fn carry_out(client: &Client, item: &Item, plan: Plan<'_>) -> Result<Done> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let undo = with_resource!(item.manifest.kind, R => {
        let (object, secret, done, undo) = Box::pin(carry_out_one::<R>(client, item, plan)).await?;
        if done == "created" {
            create::created(&mut out, &mut err, &object, secret.as_ref(), plan.printing)?;
        } else {
            print_change(&mut out, plan.printing.output, &object, done)?;
        }
        undo
    });
    Ok(Done { out, err, undo })
}

async fn carry_out_one<R: Resource>(
    client: &Client,
    item: &Item,
    plan: Plan<'_>,
) -> Result<(R, Option<Secret>, &'static str, Option<Undo>)> {
    let mut attempts = ATTEMPTS;
    loop {
        attempts -= 1;
        let (failed, pinned): (CallError, bool) = match step::<R>(client, item, plan.only_create).await? {
            Step::Nothing(object) => return Ok((object, None, "unchanged", None)),
            Step::Create(object) => match client.create(object).await {
                Ok((object, secret)) => {
                    let undo = Undo::created(&object);
                    return Ok((object, secret, "created", Some(undo)));
                }
                Err(error) if error.failure == Failure::AlreadyExists => (error, plan.only_create),
                Err(error) => return Err(error.into()),
            },
            Step::Update(object, mask, before) => {
                let now = object.metadata().cloned().unwrap_or_default();
                let then = item.manifest.object::<R>()?.metadata().cloned().unwrap_or_default();
                match client.update(object, mask.clone()).await {
                    Ok(object) => {
                        let undo = Undo::changed(&before, &object, mask);
                        return Ok((object, None, "configured", Some(undo)));
                    }
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
