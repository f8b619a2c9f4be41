//! The DNS engine that registrar and agent both serve with: [`engine`] turns a query into an answer from a
//! [`directory`], without I/O; [`server`] carries queries to a [`server::Handler`] over UDP, TCP and TLS.
//!
//! Where the specification leaves a choice:
//! - A stranger gets the apex, and `ns.dns.<domain>` too: NS tells its addresses anyway, and a resolver that follows
//!   a delegation asks for them. Everything else, of another network as well, is REFUSED.
//! - Additional of a device's answer has the addresses of both families, whichever was asked for.
//! - The SOA of a reverse zone names server and mailbox of the network's domain. A pool that does not end at an
//!   octet or nibble has several reverse zones, cut at the next one.
//! - Over UDP, no response to a stranger is more than three times as large as its query; the rest goes over TCP.
//! - EDNS options are ignored. Names outside the zones are REFUSED, never passed on; nothing is asked of other
//!   servers for strangers.
//! - An address that a Service has points at the Service alone, not at the device too (specification 7). SRV at an
//!   endpoint's name tells the endpoint's ports, as the reference does.
//! - A Service with external IPs and a host name is known by the IPs in the external zone.
//! - A zone transfer has what the network has, whatever its client may see: the list of peers is the permission.
#![deny(unsafe_code)]

pub mod directory;
pub mod engine;
pub mod fast;
pub mod fixed;
pub mod message;
pub mod options;
mod records;
pub mod reverse;
pub mod server;
pub mod stale;
pub mod wire;
