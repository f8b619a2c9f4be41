//! `muster delete`.

use super::{Context, create, targets_to_change};
use crate::{
    args::Delete,
    client::{Client, Failure},
    error::{Error, Result},
    manifest,
    resource::Resource,
    with_resource,
};

pub(super) async fn run(ctx: &mut Context<'_>, args: Delete) -> Result {
    if !args.filename.is_empty() {
        let manifests = manifest::load(&args.filename).map_err(Error::Manifests)?;
        let client = ctx.client().await?;
        // In reverse, so that networks go after what is in them.
        for manifest in manifests.iter().rev() {
            with_resource!(manifest.kind, R => {
                let object = create::complete::<R>(ctx, manifest.object()?).await?;
                let network = object.metadata().map(|m| m.network.clone()).unwrap_or_default();
                one::<R>(ctx, &args, &client, &network, object.name()).await?;
            });
        }
        return Ok(());
    }
    let targets = targets_to_change(&args.targets, &args.selection, args.all)?;
    let client = ctx.client().await?;
    for target in &targets {
        with_resource!(target.kind, R => {
            // Named objects are looked at first only if they must be in a certain namespace.
            let check = ctx.global.namespace.is_some() && target.kind.names().namespaced;
            let names = if target.names.is_empty() || (check && !args.ignore_not_found) {
                let selected = ctx.select::<R>(target, &args.selection).await?;
                selected.objects.iter().map(|object| object.name().to_owned()).collect()
            } else {
                target.names.clone()
            };
            for name in &names {
                one::<R>(ctx, &args, &client, client.network(), name).await?;
            }
            if names.is_empty() && ctx.failed == 0 {
                writeln!(ctx.err, "No resources found")?;
            }
        });
    }
    Ok(())
}

async fn one<R: Resource>(
    ctx: &mut Context<'_>,
    args: &Delete,
    client: &Client,
    network: &str,
    name: &str,
) -> Result {
    match client.delete::<R>(network, name).await {
        Ok(()) if args.output.is_some() => writeln!(ctx.out, "{}/{name}", R::KIND)?,
        Ok(()) => writeln!(ctx.out, "{} {name:?} deleted", R::KIND)?,
        Err(error) if error.failure == Failure::NotFound && args.ignore_not_found => {}
        Err(error) => ctx.fail(&error),
    }
    Ok(())
}
