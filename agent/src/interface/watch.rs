//! Notice when somebody else takes the interface down and up again: the kernel drops its routes and IPv6 addresses
//! with it, and they must be set anew.

use futures_util::StreamExt;
use rtnetlink::{
    MulticastGroup,
    packet_core::NetlinkPayload,
    packet_route::{RouteNetlinkMessage, link::LinkFlags},
};
use tokio::sync::watch;

use super::{Interface, InterfaceError, failed};

impl Interface {
    /// Counts how often the interface has come up after being down; each time, [`Interface::update`] is due. While it
    /// is down it is left so: that is the operator's will. Ends when the receiver is dropped or the interface is gone.
    pub fn watch(&self) -> Result<watch::Receiver<u64>, InterfaceError> {
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
            .map_err(failed("listen for changes of interfaces"))?;
        let connection = tokio::spawn(connection);
        let (sender, receiver) = watch::channel(0);
        let index = self.index;
        tokio::spawn(async move {
            let mut was_up = true;
            loop {
                let message = tokio::select! {
                    () = sender.closed() => break,
                    message = messages.next() => message,
                };
                let Some((message, _)) = message else { break };
                match message.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link))
                        if link.header.index == index =>
                    {
                        let is_up = link.header.flags.contains(LinkFlags::Up);
                        if is_up && !was_up {
                            sender.send_modify(|times| *times += 1);
                        }
                        was_up = is_up;
                    }
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link))
                        if link.header.index == index =>
                    {
                        break;
                    }
                    _ => {}
                }
            }
            connection.abort();
        });
        Ok(receiver)
    }
}
