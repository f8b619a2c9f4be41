//! Notice when somebody else changes the interface: takes it down and up again, so that the kernel drops its routes and
//! IPv6 addresses, or removes an address or a route by hand. They must be set anew then.

use std::{pin::Pin, time::Duration};

use futures_util::StreamExt;
use rtnetlink::{
    MulticastGroup,
    packet_core::NetlinkPayload,
    packet_route::{RouteNetlinkMessage, link::LinkFlags, route::RouteAttribute},
};
use tokio::{
    sync::watch,
    time::{Sleep, sleep},
};

use super::{Interface, InterfaceError, failed};

/// After a removal, before it counts: taking the interface down removes routes and addresses first.
const QUIET: Duration = Duration::from_millis(300);

const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];

/// What a message says of the interface.
enum Change {
    Up(bool),
    /// An address or a route of it is gone, or messages have been lost.
    Removed,
    Deleted,
}

impl Interface {
    /// Counts how often the interface has come up after being down, or has lost an address or a route while it was
    /// up; each time, [`Interface::update`] is due. While it is down it is left so: that is the operator's will. Ends
    /// when the receiver is dropped or the interface is gone.
    pub fn watch(&self) -> Result<watch::Receiver<u64>, InterfaceError> {
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&GROUPS)
            .map_err(failed("listen for changes of interfaces"))?;
        let connection = tokio::spawn(connection);
        let (sender, receiver) = watch::channel(0);
        let index = self.index;
        tokio::spawn(async move {
            let mut was_up = true;
            let mut pause: Option<Pin<Box<Sleep>>> = None;
            loop {
                let message = tokio::select! {
                    () = sender.closed() => break,
                    message = messages.next() => message,
                    () = over(&mut pause) => {
                        pause = None;
                        if was_up {
                            sender.send_modify(|times| *times += 1);
                        }
                        continue;
                    }
                };
                let Some((message, _)) = message else { break };
                match change(message.payload, index) {
                    Some(Change::Up(is_up)) => {
                        if is_up != was_up {
                            pause = None;
                        }
                        if is_up && !was_up {
                            sender.send_modify(|times| *times += 1);
                        }
                        was_up = is_up;
                    }
                    Some(Change::Removed) => {
                        pause.get_or_insert_with(|| Box::pin(sleep(QUIET)));
                    }
                    Some(Change::Deleted) => break,
                    None => {}
                }
            }
            connection.abort();
        });
        Ok(receiver)
    }
}

async fn over(pause: &mut Option<Pin<Box<Sleep>>>) {
    match pause {
        Some(pause) => pause.await,
        None => std::future::pending().await,
    }
}

fn change(payload: NetlinkPayload<RouteNetlinkMessage>, index: u32) -> Option<Change> {
    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(Change::Removed),
        _ => return None,
    };
    match message {
        RouteNetlinkMessage::NewLink(link) if link.header.index == index => {
            Some(Change::Up(link.header.flags.contains(LinkFlags::Up)))
        }
        RouteNetlinkMessage::DelLink(link) if link.header.index == index => Some(Change::Deleted),
        RouteNetlinkMessage::DelAddress(address) if address.header.index == index => Some(Change::Removed),
        RouteNetlinkMessage::DelRoute(route) => {
            let ours = |a: &RouteAttribute| matches!(a, RouteAttribute::Oif(i) if *i == index);
            route.attributes.iter().any(ours).then_some(Change::Removed)
        }
        _ => None,
    }
}
