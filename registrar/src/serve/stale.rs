//! Says in the headers of answers that the store has not confirmed them.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use muster_common::{grpc::STALE_HEADER, time::Instant};
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use crate::registry::Registry;

/// Marks all answers of what it is laid around while the registry is stale.
#[derive(Clone, Debug)]
pub(super) struct Stale(Arc<Registry>);

impl Stale {
    pub(super) fn new(registry: &Arc<Registry>) -> Self {
        Self(registry.clone())
    }
}

impl<S> Layer<S> for Stale {
    type Service = Marking<S>;

    fn layer(&self, inner: S) -> Marking<S> {
        Marking { inner, registry: self.0.clone() }
    }
}

/// A service whose answers are marked.
#[derive(Clone, Debug)]
pub(super) struct Marking<S> {
    inner: S,
    registry: Arc<Registry>,
}

impl<S, In, Out> Service<Request<In>> for Marking<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
{
    type Response = Response<Out>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<In>) -> Self::Future {
        let (answering, registry) = (self.inner.call(request), self.registry.clone());
        Box::pin(async move {
            let mut response = answering.await?;
            let freshness = registry.freshness();
            if freshness.is_stale() {
                let seconds = freshness.age(Instant::now()).as_secs();
                response.headers_mut().insert(STALE_HEADER, seconds.into());
            }
            Ok(response)
        })
    }
}
