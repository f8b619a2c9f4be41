//! `muster delete`.

use super::{Context, create, targets_to_change};
use crate::{
    args::Delete,
    client::{Client, Failure},
    error::{Error, Result},
    manifest,
    resource::{Key, Resource},
    with_resource,
};

pub(super) async fn run(ctx: &mut Context<'_>, args: Delete) -> Result {
    if !args.filename.is_empty() {
        let mut manifests = manifest::load(&args.filename).map_err(Error::Manifests)?;
        let client = ctx.client().await?;
        // In reverse, so that networks and namespaces go after what is in them.
        manifests.sort_by_key(|manifest| manifest.kind.rank());
        for manifest in manifests.iter().rev() {
            with_resource!(manifest.kind, R => {
                let object = create::complete::<R>(ctx, manifest.object()?).await?;
                one::<R>(ctx, &args, &client, &Key::of(&object)).await?;
            });
        }
        return Ok(());
    }
    let targets = targets_to_change(&args.targets, &args.selection, args.all)?;
    let client = ctx.client().await?;
    for target in &targets {
        with_resource!(target.kind, R => {
            // Named objects are looked at first only if they must be in a certain namespace.
            let names = target.kind.names();
            let check = ctx.global.namespace.is_some() && names.namespaced && !names.unique_in_namespace;
            let keys: Vec<Key> = if target.names.is_empty() || (check && !args.ignore_not_found) {
                let selected = ctx.select::<R>(target, &args.selection).await?;
                selected.objects.iter().map(Key::of).collect()
            } else {
                target.names.iter().map(|name| ctx.key::<R>(&client, name)).collect()
            };
            for key in &keys {
                one::<R>(ctx, &args, &client, key).await?;
            }
            if keys.is_empty() && ctx.failed == 0 {
                writeln!(ctx.err, "No resources found")?;
            }
        });
    }
    Ok(())
}

async fn one<R: Resource>(ctx: &mut Context<'_>, args: &Delete, client: &Client, key: &Key) -> Result {
    let name = &key.name;
    match client.delete::<R>(key, 0).await {
        Ok(()) if args.output.is_some() => writeln!(ctx.out, "{}/{name}", R::KIND)?,
        Ok(()) => writeln!(ctx.out, "{} {name:?} deleted", R::KIND)?,
        Err(error) if error.failure == Failure::NotFound && args.ignore_not_found => {}
        Err(error) => ctx.fail(&error),
    }
    Ok(())
}
