//! The channel to the registrar that all calls go over. It notices when the registrar says that its answers are stale.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{self, Poll},
};

use muster_common::grpc::STALE_HEADER;
use tonic::{
    body::Body,
    codegen::{Service, http},
    transport,
};

/// A channel; clones share what they notice.
#[derive(Clone, Debug)]
pub struct Channel {
    inner: transport::Channel,
    stale: Arc<OnceLock<u64>>,
}

impl Channel {
    /// Calls go over `inner`.
    pub fn new(inner: transport::Channel) -> Self {
        Self { inner, stale: Arc::default() }
    }

    /// For how many seconds the registrar's store had not answered when the registrar said so for the first time.
    pub fn stale_for(&self) -> Option<u64> {
        self.stale.get().copied()
    }
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Body>;
    type Error = transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (calling, stale) = (self.inner.call(request), self.stale.clone());
        Box::pin(async move {
            let response = calling.await?;
            let told = response.headers().get(STALE_HEADER).and_then(|value| value.to_str().ok());
            if let Some(seconds) = told.and_then(|seconds| seconds.parse().ok()) {
                // The first answer counts.
                let _ = stale.set(seconds);
            }
            Ok(response)
        })
    }
}
