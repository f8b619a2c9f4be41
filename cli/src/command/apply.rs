//! `muster apply`: creates what is missing, and changes what differs.

use super::{Context, create};
use crate::{
    args::{Apply, Printing},
    client::Failure,
    error::{Error, Result},
    manifest::{self, Manifest},
    output::print_change,
    patch,
    resource::{Key, Kind, Resource},
    with_resource,
};

/// How often a change is tried again that met another's.
pub(super) const ATTEMPTS: u32 = 5;

pub(super) async fn run(ctx: &mut Context<'_>, args: Apply) -> Result {
    // Everything is read and checked before anything is changed.
    let mut manifests = manifest::load(&args.filename).map_err(Error::Manifests)?;
    // Networks first: the others live in them.
    manifests.sort_by_key(|manifest| manifest.kind != Kind::Network);
    for manifest in &manifests {
        let applied =
            with_resource!(manifest.kind, R => Box::pin(one::<R>(ctx, manifest, &args.printing)).await);
        match applied {
            Err(error @ Error::Call(_)) => ctx.fail(&At { place: &manifest.place, error }),
            Err(error @ Error::Manifest(_)) => ctx.fail(&error),
            other => other?,
        }
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

async fn one<R: Resource>(ctx: &mut Context<'_>, manifest: &Manifest, printing: &Printing) -> Result {
    let client = ctx.client().await?;
    let wanted = create::complete::<R>(ctx, manifest.object()?).await?;
    let pinned = manifest.object::<R>()?.metadata().is_some_and(|m| m.resource_version > 0);
    let mut attempts = if pinned { 1 } else { ATTEMPTS };
    loop {
        attempts -= 1;
        // A token without a name is always a new one.
        let current = match wanted.name() {
            "" => None,
            _ => match client.get::<R>(&Key::of(&wanted)).await {
                Ok(current) => Some(current),
                Err(error) if error.failure == Failure::NotFound => None,
                Err(error) => return Err(error.into()),
            },
        };
        let again = match current {
            None => match client.create(wanted.clone()).await {
                Ok((object, secret)) => return create::created(ctx, &object, secret.as_ref(), printing),
                Err(error) if error.failure == Failure::AlreadyExists => error,
                Err(error) => return Err(error.into()),
            },
            Some(current) => {
                let (object, mask) = patch::merge(&current, manifest)?;
                if mask.is_empty() {
                    return print_change(ctx.out, printing.output, &current, "unchanged");
                }
                match client.update(object, mask).await {
                    Ok(object) => return print_change(ctx.out, printing.output, &object, "configured"),
                    Err(error) if error.failure == Failure::Conflict => error,
                    Err(error) => return Err(error.into()),
                }
            }
        };
        if attempts == 0 {
            return Err(again.into());
        }
    }
}
