//! `muster label` and `muster annotate`.

use super::{Context, apply::ATTEMPTS, targets_to_change};
use crate::{
    args,
    client::{Client, Failure},
    error::{Error, Result},
    output::print_change,
    patch::{self, Change, map_of},
    resource::{Key, Resource},
    target, with_resource,
};

pub(super) async fn run(ctx: &mut Context<'_>, args: args::Change, annotations: bool) -> Result {
    let (words, changes) = target::split_changes(&args.words);
    let targets = targets_to_change(words, &args.selection, args.all)?;
    let changes = patch::parse_changes(changes, annotations).map_err(Error::Usage)?;
    let client = ctx.client().await?;
    for target in &targets {
        with_resource!(target.kind, R => {
            for object in ctx.select::<R>(target, &args.selection).await?.objects {
                match Box::pin(one::<R>(&client, object, &changes, args.overwrite, annotations)).await {
                    Ok((object, done)) => print_change(ctx.out, args.printing.output, &object, done)?,
                    Err(error) => ctx.fail(&error),
                }
            }
        });
    }
    Ok(())
}

/// Changes one object, again if another changed it meanwhile; returns it and what was done.
async fn one<R: Resource>(
    client: &Client,
    mut object: R,
    changes: &[Change],
    overwrite: bool,
    annotations: bool,
) -> Result<(R, &'static str)> {
    let only_removes = changes.iter().all(|change| matches!(change, Change::Remove(_)));
    let (field, done, none) = match (annotations, only_removes) {
        (true, _) => ("metadata.annotations", "annotated", "not annotated"),
        (false, true) => ("metadata.labels", "unlabeled", "not labeled"),
        (false, false) => ("metadata.labels", "labeled", "not labeled"),
    };
    let mut attempts = ATTEMPTS;
    loop {
        attempts -= 1;
        let subject = object.qualified_name();
        let changed = patch::change(map_of(object.metadata_mut(), annotations), changes, overwrite)
            .map_err(|reason| Error::Label(format!("{subject}: {reason}")))?;
        if !changed {
            return Ok((object, none));
        }
        match client.update(object.clone(), vec![field.to_owned()]).await {
            Ok(object) => return Ok((object, done)),
            Err(error) if error.failure == Failure::Conflict && attempts > 0 => {
                object = client.get(&Key::of(&object)).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
