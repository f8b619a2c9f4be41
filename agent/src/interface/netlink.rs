//! rtnetlink in the few words that Muster needs: dumps as plain structs, errors as `io::Error`.
//!
//! One dump at a time: the kernel answers a second one on the same socket with EBUSY, so all of them take `&mut self`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope},
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo,
            LinkMessage,
        },
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
};

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// `None` for hardware, and for what a hypervisor passes off as such.
    pub(crate) kind: Option<InfoKind>,
    pub(crate) loopback: bool,
    /// Set up by the administrator.
    pub(crate) up: bool,
    /// Has a cable, so to speak; a TUN device has one while a process holds it.
    pub(crate) carrier: bool,
    /// The bridge or bond that it is a port of.
    pub(crate) controller: Option<u32>,
    /// Octets in the largest packet.
    pub(crate) mtu: u32,
}

/// An address of an interface.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    pub(crate) link: u32,
    pub(crate) address: IpAddr,
    /// Usable anywhere, as opposed to on the link or the host only.
    pub(crate) global: bool,
    /// Neither in duplicate detection, nor refused by it, nor deprecated, nor a temporary one (RFC 8981).
    pub(crate) lasting: bool,
    /// Who has set it, as routes have it; kernels before 5.18 do not say.
    pub(crate) protocol: Option<u8>,
    /// As the kernel wants to see it again when the address is removed.
    pub(crate) message: AddressMessage,
}

/// A route of one of the host's tables.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) destination: IpNet,
    /// The interface that it leads to, for a route with only one.
    pub(crate) link: Option<u32>,
    pub(crate) protocol: u8,
    pub(crate) unicast: bool,
    /// The kernel's own table of the host's addresses.
    pub(crate) local_table: bool,
    pub(crate) source: Option<IpAddr>,
    /// As the kernel wants to see it again when the route is removed.
    pub(crate) message: RouteMessage,
}

/// A connection to the kernel's routing subsystem, in the network namespace of the thread that opened it.
pub(crate) struct Netlink {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// Opens a connection; must be called within a tokio runtime.
    pub(crate) fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    pub(crate) async fn links(&mut self) -> io::Result<Vec<Link>> {
        let messages: Vec<_> = self.handle.link().get().execute().try_collect().await.map_err(io_error)?;
        Ok(messages.into_iter().map(link).collect())
    }

    pub(crate) async fn link_named(&mut self, name: &str) -> io::Result<Link> {
        let request = self.handle.link().get().match_name(name);
        let messages: Vec<_> = request.execute().try_collect().await.map_err(io_error)?;
        messages.into_iter().map(link).next().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(crate) async fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let messages: Vec<_> = self.handle.address().get().execute().try_collect().await.map_err(io_error)?;
        Ok(messages.into_iter().filter_map(address).collect())
    }

    /// All routes of all tables of both families.
    pub(crate) async fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let messages: Vec<_> =
                self.handle.route().get(request).execute().try_collect().await.map_err(io_error)?;
            routes.extend(messages.into_iter().filter_map(route));
        }
        Ok(routes)
    }

    /// The interface through which packets to `destination` would leave, if any.
    pub(crate) async fn route_to(&mut self, destination: IpAddr) -> io::Result<Option<u32>> {
        Ok(self.best_route(destination).await?.and_then(|route| route.link))
    }

    /// The route that packets to `destination` would take, with the source address that they would get, if any.
    pub(crate) async fn best_route(&mut self, destination: IpAddr) -> io::Result<Option<Route>> {
        let bits = if destination.is_ipv4() { 32 } else { 128 };
        let request = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination, bits)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?
            .table_id(0)
            .build();
        let answer: Result<Vec<_>, _> = self.handle.route().get(request).execute().try_collect().await;
        match answer.map_err(io_error) {
            Ok(messages) => Ok(messages.into_iter().find_map(route)),
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES)
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    pub(crate) async fn set_mtu(&mut self, link: u32, mtu: u32) -> io::Result<()> {
        self.set_link(LinkUnspec::new_with_index(link).mtu(mtu).build()).await
    }

    /// Bounds the segments of a TCP super-packet that leaves through the interface.
    pub(crate) async fn set_segments_max(&mut self, link: u32, segments: u32) -> io::Result<()> {
        let attribute = LinkAttribute::GsoMaxSegs(segments);
        self.set_link(LinkUnspec::new_with_index(link).append_extra_attribute(attribute).build()).await
    }

    /// Keeps the kernel from giving the interface a link-local IPv6 address; to be called before it goes up.
    pub(crate) async fn no_generated_addresses(&mut self, link: u32) -> io::Result<()> {
        let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_index(link)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![none]))
            .build();
        self.set_link(message).await
    }

    pub(crate) async fn set_up(&mut self, link: u32) -> io::Result<()> {
        self.set_link(LinkUnspec::new_with_index(link).up().build()).await
    }

    async fn set_link(&mut self, message: LinkMessage) -> io::Result<()> {
        self.handle.link().set(message).execute().await.map_err(io_error)
    }

    /// Adds `address` alone (/32 or /128), ready at once, or leaves it as it is. `host_only` ones are never chosen
    /// as the source of a packet to elsewhere.
    pub(crate) async fn add_address(
        &mut self,
        link: u32,
        address: IpAddr,
        protocol: u8,
        host_only: bool,
    ) -> io::Result<()> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let mut request = self.handle.address().add(link, address, bits).replace();
        let message = request.message_mut();
        if address.is_ipv6() {
            // Duplicate detection has nobody to ask on this link, and would make the address wait.
            message.header.flags |= AddressHeaderFlags::Nodad;
        }
        if host_only {
            message.header.scope = AddressScope::Host;
        }
        message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(protocol)));
        request.execute().await.map_err(io_error)
    }

    /// Removes an address; one that is gone already is fine.
    pub(crate) async fn remove_address(&mut self, address: Address) -> io::Result<()> {
        let result = self.handle.address().del(address.message).execute().await.map_err(io_error);
        ignore(result, &[libc::EADDRNOTAVAIL, libc::ENODEV])
    }

    /// Adds a route through `link` to the main table. `AlreadyExists` if there is one to the same destination.
    pub(crate) async fn add_route(
        &mut self,
        link: u32,
        destination: IpNet,
        source: Option<IpAddr>,
        metric: u32,
        protocol: u8,
    ) -> io::Result<()> {
        let invalid = |e| io::Error::new(io::ErrorKind::InvalidInput, e);
        let mut route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination.network(), destination.prefix_len())
            .map_err(invalid)?
            .output_interface(link)
            .protocol(RouteProtocol::Other(protocol));
        if metric != 0 {
            route = route.priority(metric);
        }
        if let Some(source) = source {
            route = route.pref_source(source).map_err(invalid)?;
        }
        if destination.network().is_ipv4() {
            route = route.scope(RouteScope::Link);
        }
        self.handle.route().add(route.build()).execute().await.map_err(io_error)
    }

    /// Removes a route; one that is gone already is fine.
    pub(crate) async fn remove_route(&mut self, route: Route) -> io::Result<()> {
        let result = self.handle.route().del(route.message).execute().await.map_err(io_error);
        ignore(result, &[libc::ESRCH, libc::ENODEV])
    }
}

fn ignore(result: io::Result<()>, errors: &[i32]) -> io::Result<()> {
    match result {
        Err(e) if e.raw_os_error().is_some_and(|code| errors.contains(&code)) => Ok(()),
        other => other,
    }
}

pub(super) fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        // The kernel's codes are negative; `to_io` turns them round.
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

fn link(message: LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        loopback: flags.contains(LinkFlags::Loopback),
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        controller: None,
        mtu: 0,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::LinkInfo(info) => {
                link.kind = info.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn address(message: AddressMessage) -> Option<Address> {
    let (mut address, mut local, mut protocol) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(a) => address = Some(*a),
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Protocol(p) => protocol = Some((*p).into()),
            _ => {}
        }
    }
    let v6 = message.header.family == AddressFamily::Inet6;
    let flags = message.header.flags;
    let unusable =
        AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed | AddressHeaderFlags::Deprecated;
    Some(Address {
        link: message.header.index,
        // Of a point-to-point interface, `Address` is the other end.
        address: local.or(address)?,
        global: message.header.scope == AddressScope::Universe,
        // "Secondary" is "temporary" in IPv6.
        lasting: !flags.intersects(if v6 { unusable | AddressHeaderFlags::Secondary } else { unusable }),
        protocol,
        message,
    })
}

fn route(message: RouteMessage) -> Option<Route> {
    const RT_TABLE_LOCAL: u32 = 255;
    let header = &message.header;
    let (mut destination, any): (_, IpAddr) = match header.address_family {
        AddressFamily::Inet => (None, Ipv4Addr::UNSPECIFIED.into()),
        AddressFamily::Inet6 => (None, Ipv6Addr::UNSPECIFIED.into()),
        _ => return None,
    };
    let (mut link, mut source, mut table) = (None, None, u32::from(header.table));
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(a) => destination = ip(a),
            RouteAttribute::PrefSource(a) => source = ip(a),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Table(id) => table = *id,
            _ => {}
        }
    }
    Some(Route {
        destination: IpNet::new(destination.unwrap_or(any), header.destination_prefix_length).ok()?.trunc(),
        link,
        protocol: header.protocol.into(),
        unicast: header.kind == RouteType::Unicast,
        local_table: table == RT_TABLE_LOCAL,
        source,
        message,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some((*a).into()),
        RouteAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod fixtures {
    //! Links, addresses and routes for tests of what is decided from them.

    use super::*;

    pub(crate) fn link(index: u32, name: &str, kind: Option<InfoKind>) -> Link {
        Link {
            index,
            name: name.into(),
            kind,
            loopback: false,
            up: true,
            carrier: true,
            controller: None,
            mtu: 1500,
        }
    }

    pub(crate) fn address(link: u32, address: &str) -> Address {
        Address {
            link,
            address: address.parse().expect("an address"),
            global: true,
            lasting: true,
            protocol: None,
            message: AddressMessage::default(),
        }
    }

    pub(crate) fn route(destination: &str, link: Option<u32>, protocol: u8) -> Route {
        Route {
            destination: destination.parse().expect("a prefix"),
            link,
            protocol,
            unicast: true,
            local_table: false,
            source: None,
            message: RouteMessage::default(),
        }
    }
}
