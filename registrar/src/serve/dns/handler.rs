//! What the registrar does with a query: who asks, the encoded answer if there is one, else the engine's, and other
//! servers for what is elsewhere.

use std::{net::SocketAddr, sync::Arc};

use muster_dns::{
    directory::{Directory, Viewer},
    engine::{Engine, Outcome, QueryContext, Step},
    message::{self, Parsed},
    server::{Handler, Handling, Source, transfer},
    stale,
};

use super::{published::Published, upstream::Resolver, who::Who};
use crate::{registry::Registry, zone::Zones};

/// Answers queries; `who` tells who may see what.
pub(super) struct Queries {
    registry: Arc<Registry>,
    engine: Arc<Engine<Zones>>,
    published: Published,
    who: Who,
    upstream: Option<Resolver>,
    log: bool,
}

impl Queries {
    /// `who` is asked at every query, so that what it takes back holds from the next query on. What is elsewhere is
    /// asked of `upstream`. With `log`, every query is logged.
    pub(super) fn new(
        registry: &Arc<Registry>,
        engine: Arc<Engine<Zones>>,
        published: Published,
        who: Who,
        upstream: Vec<SocketAddr>,
        log: bool,
    ) -> Self {
        let upstream = (!upstream.is_empty()).then(|| Resolver::new(upstream));
        Self { registry: registry.clone(), engine, published, who, upstream, log }
    }

    fn context(&self, source: &Source) -> QueryContext {
        // Who is no member any more must not learn even which namespaces, pools and zones there are.
        let viewer = self.who.viewer(source);
        let outsider = self.engine.directory().is_outsider(&viewer);
        QueryContext {
            viewer: if outsider { Viewer::Stranger } else { viewer },
            transport: source.transport,
            source: Some(source.address.ip()),
        }
    }

    /// One line with what is asked, and what CoreDNS calls a query's metadata.
    fn log(&self, query: &[u8], source: &Source, context: &QueryContext) {
        let about = self.engine.metadata(query, context);
        // Both empty for what is no query.
        let (name, record_type) = match message::parse(query) {
            Parsed::Request(request) => {
                (message::plain_name(&request.question.name), request.record_type().to_string())
            }
            Parsed::Silence | Parsed::Rejected(_) => Default::default(),
        };
        tracing::info!(
            name,
            r#type = record_type,
            client = %source.address,
            transport = ?source.transport,
            octets = query.len(),
            service = about.service,
            namespace = about.namespace,
            kind = about.kind,
            endpoint = about.endpoint,
            port_name = about.port_name,
            protocol = about.protocol,
            client_namespace = about.client_namespace,
            client_device = about.client_device,
            "query"
        );
    }
}

impl Handler for Queries {
    fn expect<'a>(&self, queries: impl Iterator<Item = &'a [u8]>) {
        self.published.expect(queries);
    }

    fn handle(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling {
        let handling = self.answer(query, source, out);
        // What is asked of others, later, does not come from the store.
        if self.registry.freshness().is_stale() && matches!(handling, Handling::Done(_)) {
            stale::mark(query, source.transport, out);
        }
        handling
    }
}

impl Queries {
    fn answer(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling {
        if self.log {
            self.log(query, source, &self.context(source));
        }
        // Without allocation, which telling a viewer takes.
        let encoded = self
            .who
            .asker(source)
            .and_then(|asker| self.published.answer(query, asker, source.transport, out));
        if let Some(outcome) = encoded {
            return Handling::Done(outcome);
        }
        let context = self.context(source);
        if let Some(several) = transfer(&self.engine, query, &context) {
            return several;
        }
        // Strangers see nothing that leads elsewhere, and must not make the registrar ask for them.
        let Some(upstream) = self.upstream.as_ref().filter(|_| context.viewer != Viewer::Stranger) else {
            return Handling::Done(self.engine.answer(query, &context, out));
        };
        match self.engine.begin(query, &context, out) {
            Step::Done(outcome) => Handling::Done(outcome),
            Step::Ask(first) => {
                let (engine, upstream) = (self.engine.clone(), upstream.clone());
                Handling::Later(Box::pin(async move { ask(&engine, &upstream, first).await }))
            }
        }
    }
}

/// Asks other servers until the engine has what it needs.
async fn ask<D: Directory>(
    engine: &Engine<D>,
    upstream: &Resolver,
    mut next: muster_dns::engine::Upstream,
) -> (Outcome, Vec<u8>) {
    let mut out = Vec::new();
    loop {
        // The target of an ExternalName is told as truncated as it came; what is passed on whole is not.
        let reply = upstream.ask(next.name.clone(), next.record_type, next.whole).await;
        match engine.resume(next, reply.as_ref(), &mut out) {
            Step::Done(outcome) => return (outcome, out),
            Step::Ask(more) => next = more,
        }
    }
}
