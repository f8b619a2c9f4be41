//! `muster get`, and `muster watch`, which is a way of saying `get`.

use serde_json::Value;

use super::{Context, targets, watch};
use crate::{
    args::{Get, Output, Watch},
    error::{Error, Result},
    manifest,
    output::{Style, print_value},
    resource::Resource,
    target::Target,
    with_resource,
};

impl From<Watch> for Get {
    fn from(watch: Watch) -> Self {
        let Watch { targets, selection, showing } = watch;
        Self { targets, selection, showing, watch: true, watch_only: true, output_watch_events: true }
    }
}

pub(super) async fn run(ctx: &mut Context<'_>, args: Get) -> Result {
    let targets = targets(&args.targets, &args.selection)?;
    if args.watch || args.watch_only {
        return match targets.as_slice() {
            [target] if target.names.len() <= 1 => {
                with_resource!(target.kind, R => Box::pin(watch::run::<R>(ctx, target, &args)).await)
            }
            _ => Err(Error::Usage("one resource type, or one name, can be watched at a time".into())),
        };
    }
    let mut style = Style::new(&args.showing);
    style.namespace = args.selection.all_namespaces;
    style.qualified = targets.len() > 1;
    let mut values = Vec::new();
    let mut tables = 0;
    for target in &targets {
        with_resource!(target.kind, R => {
            let objects = ctx.select::<R>(target, &args.selection).await?.objects;
            match args.showing.output {
                Some(Output::Json | Output::Yaml) => values.extend(objects.iter().map(manifest::value)),
                Some(Output::Name) => names(ctx, &objects)?,
                _ => table(ctx, &objects, style, !args.showing.no_headers, &mut tables)?,
            }
        });
    }
    match args.showing.output {
        Some(Output::Json) => print(ctx, false, &targets, values),
        Some(Output::Yaml) => print(ctx, true, &targets, values),
        Some(Output::Name) => Ok(()),
        _ if tables == 0 && ctx.failed == 0 => nothing(ctx, &targets, args.selection.all_namespaces),
        _ => Ok(()),
    }
}

fn names<R: Resource>(ctx: &mut Context<'_>, objects: &[R]) -> Result {
    objects.iter().try_for_each(|object| Ok(writeln!(ctx.out, "{}", object.qualified_name())?))
}

fn table<R: Resource>(
    ctx: &mut Context<'_>,
    objects: &[R],
    style: Style,
    headers: bool,
    tables: &mut usize,
) -> Result {
    if objects.is_empty() {
        return Ok(());
    }
    if *tables > 0 {
        writeln!(ctx.out)?;
    }
    *tables += 1;
    // Only kinds that are in namespaces have the column.
    let style = Style { namespace: style.namespace && R::KIND.names().namespaced, ..style };
    Ok(ctx.out.write_all(style.table(objects, headers, ctx.now).as_bytes())?)
}

/// The object itself if one was asked for by name, else a list.
fn print(ctx: &mut Context<'_>, yaml: bool, targets: &[Target], mut values: Vec<Value>) -> Result {
    let one = matches!(targets, [target] if target.names.len() == 1);
    match values.pop() {
        Some(value) if one => print_value(ctx.out, yaml, &value),
        None if one => Ok(()),
        last => {
            values.extend(last);
            print_value(ctx.out, yaml, &manifest::list(values))
        }
    }
}

fn nothing(ctx: &mut Context<'_>, targets: &[Target], all_namespaces: bool) -> Result {
    let in_namespace = !all_namespaces && targets.iter().any(|t| t.kind.names().namespaced);
    if in_namespace {
        let namespace = ctx.namespace();
        Ok(writeln!(ctx.err, "No resources found in {namespace} namespace.")?)
    } else {
        Ok(writeln!(ctx.err, "No resources found")?)
    }
}
