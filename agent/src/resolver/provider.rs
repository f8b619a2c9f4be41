//! How connections to DNS servers are made: as hickory does, but those to registrars go through the proxy that
//! `HTTPS_PROXY` names, as everything else that the agent asks them.

use std::{io, net::SocketAddr, pin::Pin, time::Duration};

use hickory_resolver::net::runtime::{RuntimeProvider, TokioRuntimeProvider, iocompat::AsyncIoTokioAsStd};
use muster_common::proxy;

use super::pool::Kind;

/// How long a connection may take, unless hickory says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes connections to servers of one kind.
#[derive(Clone)]
pub(super) struct Provider {
    tokio: TokioRuntimeProvider,
    through_proxy: bool,
}

impl Provider {
    pub(super) fn new(kind: &Kind) -> Self {
        Self { tokio: TokioRuntimeProvider::default(), through_proxy: *kind == Kind::Registrars }
    }
}

impl RuntimeProvider for Provider {
    type Handle = <TokioRuntimeProvider as RuntimeProvider>::Handle;
    type Timer = <TokioRuntimeProvider as RuntimeProvider>::Timer;
    type Udp = <TokioRuntimeProvider as RuntimeProvider>::Udp;
    type Tcp = <TokioRuntimeProvider as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Self::Handle {
        self.tokio.create_handle()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        bind: Option<SocketAddr>,
        timeout: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        if !self.through_proxy {
            return self.tokio.connect_tcp(server, bind, timeout);
        }
        Box::pin(async move {
            let stream = proxy::connect(&server.to_string(), timeout.unwrap_or(CONNECT_TIMEOUT)).await?;
            Ok(AsyncIoTokioAsStd(stream))
        })
    }

    fn bind_udp(
        &self,
        local: SocketAddr,
        server: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Udp>>>> {
        self.tokio.bind_udp(local, server)
    }
}
