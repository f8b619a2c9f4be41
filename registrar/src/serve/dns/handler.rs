//! What the registrar does with a query: who asks, the engine's answer, and other servers for what is elsewhere.

use std::{net::SocketAddr, sync::Arc};

use muster_dns::{
    directory::{Directory, Viewer},
    engine::{Engine, Outcome, QueryContext, Step},
    server::{Handler, Handling, Source, transfer},
};

use super::upstream::Resolver;

/// Answers queries from an engine; `who` tells who may see what.
pub(super) struct Queries<D, V> {
    engine: Arc<Engine<D>>,
    who: V,
    upstream: Option<Resolver>,
    log: bool,
}

impl<D, V> Queries<D, V>
where
    D: Directory + 'static,
    V: Fn(&Source) -> Viewer + Send + Sync + 'static,
{
    /// `who` is asked at every query, so that what it takes back holds from the next query on. What is elsewhere is
    /// asked of `upstream`. With `log`, every query is logged.
    pub(super) fn new(engine: Engine<D>, who: V, upstream: Vec<SocketAddr>, log: bool) -> Self {
        let upstream = (!upstream.is_empty()).then(|| Resolver::new(upstream));
        Self { engine: Arc::new(engine), who, upstream, log }
    }

    /// One line with what CoreDNS calls a query's metadata.
    fn log(&self, query: &[u8], source: &Source, context: &QueryContext) {
        let about = self.engine.metadata(query, context);
        tracing::info!(
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

impl<D, V> Handler for Queries<D, V>
where
    D: Directory + 'static,
    V: Fn(&Source) -> Viewer + Send + Sync + 'static,
{
    fn handle(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling {
        let context = QueryContext {
            viewer: (self.who)(source),
            transport: source.transport,
            source: Some(source.address.ip()),
        };
        if self.log {
            self.log(query, source, &context);
        }
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
