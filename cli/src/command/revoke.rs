//! `muster revoke`.

use super::{Context, targets_to_change};
use crate::{
    args::{Revoke, Selection},
    error::{Error, Result},
    output::print_change,
    resource::Resource,
    with_resource,
};

pub(super) async fn run(ctx: &mut Context<'_>, args: Revoke) -> Result {
    let targets = targets_to_change(&args.targets, &Selection::default(), false)?;
    for target in &targets {
        if !with_resource!(target.kind, R => R::default().revoke()) {
            return Err(Error::Usage(format!("{} cannot be revoked", target.kind.names().plural)));
        }
    }
    let client = ctx.client().await?;
    for target in &targets {
        with_resource!(target.kind, R => {
            for mut object in ctx.select::<R>(target, &Selection::default()).await?.objects {
                object.revoke();
                // Whatever else has changed meanwhile: revocation must not fail for that.
                object.metadata_mut().resource_version = 0;
                match client.update(object, vec!["spec.revoked".to_owned()]).await {
                    Ok(object) => print_change(ctx.out, args.printing.output, &object, "revoked")?,
                    Err(error) => ctx.fail(&error),
                }
            }
        });
    }
    Ok(())
}
