//! Why a pool, or an address from it, was refused.

use std::net::IpAddr;

use ipnet::IpNet;
use muster_common::time::Timestamp;

use super::PoolKind;

/// Why no address was given out.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum AllocationError {
    /// Nothing is left.
    #[error(
        "the address pool {net} is exhausted: of its {size} addresses, {used} are in use and {quarantined} in \
         quarantine after their release; delete devices that are gone (muster delete device NAME), shorten the \
         network's address quarantine, or give the network a larger pool"
    )]
    Exhausted {
        /// The pool.
        net: IpNet,
        /// How many addresses it can hand out.
        size: u128,
        /// How many of them have an owner, or are being given one at this moment.
        used: u64,
        /// How many of them wait for the end of their quarantine.
        quarantined: u64,
    },
    /// A chosen address is not in the pool.
    #[error("{address} is not in the address pool {net}; choose an address from it")]
    Outside {
        /// As chosen.
        address: IpAddr,
        /// The pool.
        net: IpNet,
    },
    /// A chosen address is the network's own, its broadcast, or its subnet-router anycast address.
    #[error("{address} cannot be given to anybody: it stands for the block {net} itself; choose another")]
    NotAssignable {
        /// As chosen.
        address: IpAddr,
        /// The pool.
        net: IpNet,
    },
    /// A chosen address has an owner.
    #[error("{address} is in use; choose another, or leave the choice to the registrar")]
    InUse {
        /// As chosen.
        address: IpAddr,
    },
    /// A chosen address was released a short time ago.
    #[error("{address} was released a short time ago and is in quarantine until {until}; choose another")]
    Quarantined {
        /// As chosen.
        address: IpAddr,
        /// End of the quarantine.
        until: Timestamp,
    },
}

/// Why a block cannot be a pool.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PoolError {
    /// Not CIDR notation.
    #[error("the {kind} {text:?} is not a block of addresses: write for example {}", kind.example())]
    Syntax {
        /// Which pool.
        kind: PoolKind,
        /// As it was given.
        text: String,
    },
    /// IPv4 where IPv6 belongs, or the other way round.
    #[error("the {kind} {net} is of the wrong family: write for example {}", kind.example())]
    Family {
        /// Which pool.
        kind: PoolKind,
        /// The block.
        net: IpNet,
    },
    /// Bits are set to the right of the prefix.
    #[error("{net} has bits set beyond its prefix length; write {}", net.trunc())]
    HostBits {
        /// The block.
        net: IpNet,
    },
    /// Fewer than two addresses are left in it.
    #[error(
        "{net} is too small for a pool: the smallest are /30 for IPv4 and /126 for IPv6; choose a larger block"
    )]
    TooSmall {
        /// The block.
        net: IpNet,
    },
    /// Larger than any network needs.
    #[error(
        "{net} is too large for a pool: the largest are /8 for IPv4 and /32 for IPv6; choose a smaller block"
    )]
    TooLarge {
        /// The block.
        net: IpNet,
    },
    /// Loopback, link-local, multicast and the like.
    #[error(
        "{net} is reserved for other uses (loopback, link-local, multicast …); choose a private block, such as \
         100.64.0.0/11 or one below fd00::/8"
    )]
    Special {
        /// The block.
        net: IpNet,
    },
    /// The network has no device pool at all.
    #[error("the network has no device pool; give it an IPv4 or an IPv6 one, or both")]
    NoDevicePool,
    /// Two pools share addresses.
    #[error(
        "the {} {} of network {:?} overlaps the {} {} of network {:?}; choose blocks that share no address",
        .0.1, .0.2, .0.0, .1.1, .1.2, .1.0
    )]
    Overlap(Box<(String, PoolKind, IpNet)>, Box<(String, PoolKind, IpNet)>),
}
