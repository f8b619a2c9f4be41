//! `muster describe`.

use super::{Context, targets};
use crate::{args::Describe, describe::Description, error::Result, resource::Resource, with_resource};

pub(super) async fn run(ctx: &mut Context<'_>, args: Describe) -> Result {
    let mut first = true;
    for target in &targets(&args.targets, &args.selection)? {
        with_resource!(target.kind, R => {
            for object in ctx.select::<R>(target, &args.selection).await?.objects {
                if !std::mem::take(&mut first) {
                    writeln!(ctx.out)?;
                }
                let mut description = Description::default();
                if let Some(meta) = object.metadata() {
                    description.metadata(meta, ctx.now);
                }
                object.describe(&mut description, ctx.now);
                ctx.out.write_all(description.render().as_bytes())?;
            }
        });
    }
    if first && ctx.failed == 0 {
        writeln!(ctx.err, "No resources found")?;
    }
    Ok(())
}
