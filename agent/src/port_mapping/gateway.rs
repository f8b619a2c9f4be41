//! The gateway that this host's packets to the rest of the world leave by, and when it changes.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use futures_util::StreamExt;
use rtnetlink::{
    MulticastGroup,
    packet_route::route::{RouteAddress, RouteAttribute},
};
use tokio::sync::watch;

use super::plan::Gateway;
use crate::interface::{InterfaceError, failed, netlink::Netlink};

/// How long the host's routes must have been quiet before a change is looked at.
const QUIET: Duration = Duration::from_millis(300);
/// Of a network kept for documentation (RFC 5737), so only a default route leads there. Nothing is sent.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// The gateway now; `None` if IPv4 leads nowhere, or to no router, or if this host needs no mapping.
async fn find() -> Result<Option<Gateway>, InterfaceError> {
    let mut netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    let route = netlink.best_route(OUTSIDE.into()).await.map_err(failed("look up the default route"))?;
    Ok(route.and_then(|route| {
        let gateway = route.message.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        });
        let Some(IpAddr::V4(own)) = route.source else { return None };
        Some(Gateway { address: gateway?, own }).filter(|_| is_translated(own))
    }))
}

/// Whether there must be a NAT between `own` and the internet: servers with public addresses leave their gateways alone.
fn is_translated(own: Ipv4Addr) -> bool {
    let [first, second, ..] = own.octets();
    // Of a provider's own (RFC 6598).
    let is_shared = first == 100 && (64..128).contains(&second);
    own.is_private() || is_shared
}

/// The gateway, now and after each change. Ends when the receiver is dropped.
pub(super) async fn watch() -> Result<watch::Receiver<Option<Gateway>>, InterfaceError> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv4Route];
    let (connection, _, mut messages) =
        rtnetlink::new_multicast_connection(&groups).map_err(failed("listen for changes of routes"))?;
    let connection = tokio::spawn(connection);
    let (sender, receiver) = watch::channel(find().await?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => break,
                message = messages.next() => if message.is_none() { break },
            }
            tokio::time::sleep(QUIET).await;
            while messages.try_recv().is_ok() {}
            match find().await {
                Ok(gateway) => {
                    sender.send_if_modified(|old| std::mem::replace(old, gateway) != gateway);
                }
                Err(error) => tracing::debug!(%error, "the gateway is as it was"),
            }
        }
        connection.abort();
    });
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_addresses_need_no_mapping() {
        let translated = |text: &str| is_translated(text.parse().unwrap());
        assert!(
            ["10.1.2.3", "172.31.0.1", "192.168.1.7", "100.64.0.1", "100.127.255.1"].map(translated)
                == [true; 5]
        );
        assert!(
            ["8.8.8.8", "100.63.0.1", "100.128.0.1", "172.32.0.1", "169.254.1.1"].map(translated)
                == [false; 5]
        );
    }
}
