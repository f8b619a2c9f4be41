//! Goes on showing changes, across restarts of the registrar.

use std::{io::Write, time::Duration};

use futures_util::StreamExt;
use muster_common::time::Timestamp;
use muster_proto::admin::EventType;
use serde_json::json;

use super::Context;
use crate::{
    args::{Get, Output},
    client::{CallError, Client, Failure, whole},
    error::Result,
    manifest,
    output::{Style, print_document},
    resource::{Event, Resource, Scope},
    table::Layout,
    target::Target,
};

/// First and longest wait before the registrar is asked again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

pub(super) async fn run<R: Resource>(ctx: &mut Context<'_>, target: &Target, args: &Get) -> Result {
    let client = ctx.client().await?;
    let mut scope = ctx.scope::<R>(client.network(), &args.selection);
    if !target.names.is_empty() && ctx.global.namespace.is_none() && !R::KIND.names().unique_in_namespace {
        // Names are unique in a network.
        scope.namespace.clear();
    }
    let mut screen = Screen::new::<R>(args);

    let mut revision = if args.watch_only {
        client.revision::<R>(&scope).await?
    } else {
        let selected = ctx.select::<R>(target, &args.selection).await?;
        if ctx.failed > 0 {
            return Ok(());
        }
        for object in &selected.objects {
            screen.show(ctx.out, "ADDED", object, ctx.now)?;
        }
        ctx.out.flush()?;
        selected.revision
    };
    let wanted = |object: &R| target.names.first().is_none_or(|name| object.name() == name);
    let mut pause = RETRY.0;
    loop {
        let ended = follow::<R>(&client, &scope, &mut revision, |event| {
            pause = RETRY.0;
            match event {
                Event { event, object: Some(object), .. } if wanted(&object) => {
                    screen.show(ctx.out, word(event), &object, Timestamp::now())?;
                    Ok(ctx.out.flush()?)
                }
                _ => Ok(()),
            }
        })
        .await?;
        if let Some(error) = ended {
            match error.failure {
                // Too long away: begin again with everything that there is.
                Failure::Expired => revision = 0,
                Failure::Unavailable => {}
                _ => return Err(error.into()),
            }
            if pause == RETRY.0 {
                writeln!(ctx.err, "muster: {error}; trying again")?;
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

/// Follows one stream of events to its end. Keeps `revision` at where to go on from.
async fn follow<R: Resource>(
    client: &Client,
    scope: &Scope,
    revision: &mut u64,
    mut handle: impl FnMut(Event<R>) -> Result,
) -> Result<Option<CallError>> {
    let mut events = match client.watch::<R>(scope, *revision).await {
        Ok(events) => events,
        Err(error) => return Ok(Some(error)),
    };
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                *revision = event.revision.max(*revision);
                handle(event)?;
            }
            Err(status) => {
                return Ok(Some(client.explain(Some(R::KIND.names()), "watch", &whole(scope), &status)));
            }
        }
    }
    Ok(None)
}

fn word(event: EventType) -> &'static str {
    match event {
        EventType::Added => "ADDED",
        EventType::Modified => "MODIFIED",
        EventType::Deleted => "DELETED",
        EventType::Bookmark => "BOOKMARK",
        EventType::Unspecified => "UNKNOWN",
    }
}

/// Shows objects one after another: as rows of one table, or as documents.
struct Screen {
    output: Option<Output>,
    style: Style,
    layout: Layout,
    /// Whether titles are still to come.
    titles: bool,
}

impl Screen {
    fn new<R: Resource>(args: &Get) -> Self {
        let mut style = Style::new(&args.showing);
        style.namespace = args.selection.all_namespaces && R::KIND.names().namespaced;
        style.event = args.output_watch_events;
        Self {
            output: args.showing.output,
            style,
            layout: Layout::with_widths(
                args.output_watch_events.then_some("MODIFIED".len()).into_iter().collect(),
            ),
            titles: !args.showing.no_headers,
        }
    }

    fn show<R: Resource>(&mut self, out: &mut dyn Write, event: &str, object: &R, now: Timestamp) -> Result {
        match self.output {
            Some(format @ (Output::Json | Output::Yaml)) => {
                let value = manifest::value(object);
                let value = if self.style.event { json!({ "type": event, "object": value }) } else { value };
                print_document(out, format == Output::Yaml, &value)
            }
            Some(Output::Name) => Ok(writeln!(out, "{}", object.qualified_name())?),
            _ => {
                let titles = std::mem::take(&mut self.titles).then(|| self.style.titles::<R>());
                let rows: Vec<_> = titles.into_iter().chain([self.style.row(event, object, now)]).collect();
                Ok(out.write_all(self.layout.lines(&rows).as_bytes())?)
            }
        }
    }
}
