//! `muster version`.

use serde_json::json;

use super::Context;
use crate::{args::Version, error::Result, output::print_value};

const VERSION: &str = env!("CARGO_PKG_VERSION");

pub(super) async fn run(ctx: &mut Context<'_>, args: Version) -> Result {
    let structured = args.output.map(|output| output == "yaml");
    // The client's version is told even if the registrar cannot be asked.
    if structured.is_none() {
        writeln!(ctx.out, "Client version: {VERSION}")?;
        ctx.out.flush()?;
    }
    let mut value = json!({ "clientVersion": VERSION });
    if !args.client {
        let asked = async {
            let client = ctx.client().await?;
            Ok((client.registrar().to_owned(), client.health().await?.as_str_name()))
        };
        match asked.await {
            Ok((address, health)) if structured.is_none() => {
                writeln!(ctx.out, "Registrar:      {address} ({health})")?;
            }
            Ok((address, health)) => value["registrar"] = json!({ "address": address, "health": health }),
            Err(error) => match structured {
                None => return Err(error),
                Some(_) => ctx.fail(&error),
            },
        }
    }
    structured.map_or(Ok(()), |yaml| print_value(ctx.out, yaml, &value))
}
