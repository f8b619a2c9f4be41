//! `muster drain` and `muster undrain`.

use super::{Context, targets_to_change};
use crate::{
    args::{Drain, Selection},
    error::{Error, Result},
    output::print_change,
    resource::Resource,
    with_resource,
};

pub(super) async fn run(ctx: &mut Context<'_>, args: Drain, drained: bool) -> Result {
    let targets = targets_to_change(&args.targets, &Selection::default(), false)?;
    for target in &targets {
        if !with_resource!(target.kind, R => R::default().drain(drained)) {
            return Err(Error::Usage(format!("{} cannot be drained", target.kind.names().plural)));
        }
    }
    let done = if drained { "drained" } else { "undrained" };
    let client = ctx.client().await?;
    for target in &targets {
        with_resource!(target.kind, R => {
            for mut object in ctx.select::<R>(target, &Selection::default()).await?.objects {
                object.drain(drained);
                // Whatever else has changed meanwhile.
                object.metadata_mut().resource_version = 0;
                match client.update(object, vec!["spec.drained".to_owned()]).await {
                    Ok(object) => print_change(ctx.out, args.printing.output, &object, done)?,
                    Err(error) => ctx.fail(&error),
                }
            }
        });
    }
    Ok(())
}
