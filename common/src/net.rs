//! Errors of sockets, worded for people.

use std::{io, net::SocketAddr};

/// Why a socket could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {purpose}: {source}{}", remedy(source))]
pub struct BindError {
    purpose: &'static str,
    address: SocketAddr,
    source: io::Error,
}

impl BindError {
    /// Wraps what the system said when `address` was bound for `purpose`, such as "DNS over UDP".
    pub fn new(purpose: &'static str, address: SocketAddr, source: io::Error) -> Self {
        Self { purpose, address, source }
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another program has this port: stop it (find it with `ss -lptun`) or configure another port"
        }
        io::ErrorKind::AddrNotAvailable => {
            "; no interface of this host has this address: configure one that it has, or [::]"
        }
        io::ErrorKind::PermissionDenied => "; ports below 1024 need root or CAP_NET_BIND_SERVICE",
        _ => "",
    }
}
