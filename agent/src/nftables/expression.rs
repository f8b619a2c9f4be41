//! The steps of a rule, as nf_tables has them. Registers are numbered in steps of 4 bytes, 0 to 15.

use std::time::Duration;

use super::attribute::{attribute, nested, number, text};

/// A register of 4 bytes, 0 to 15; longer values go on in those behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register(pub u8);

impl Register {
    /// As nf_tables numbers them.
    fn number(self) -> u32 {
        8 + u32::from(self.0)
    }
}

/// Which header of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Of IP.
    Network,
    /// Of TCP, UDP or SCTP.
    Transport,
}

/// What is known of a packet beside its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meta {
    /// Name of the interface that it leaves through.
    OutInterface,
    /// The family: 2 for IPv4, 10 for IPv6.
    Family,
    /// The transport protocol.
    Protocol,
}

/// What is known of a packet's connection, a number of 32 bits each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// Its state: 8 for a new one.
    State,
    /// Its flags: 32 if its destination has been translated.
    Status,
}

/// A step of a rule. One that fails ends the rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression<'a> {
    /// Loads bytes of the packet.
    Payload {
        /// Of this header.
        base: Base,
        /// From here on.
        offset: u32,
        /// So many.
        length: u32,
        /// Into this register.
        to: Register,
    },
    /// Loads what is known of the packet.
    Meta(Meta, Register),
    /// Loads what is known of its connection.
    Connection(Connection, Register),
    /// Loads a random number below a limit.
    Random(u32, Register),
    /// Keeps the bits of a register that are set in a mask.
    Mask(Register, u32),
    /// Goes on if what is in a register is this.
    Equals(Register, &'a [u8]),
    /// Goes on if what is in a register is not this.
    Differs(Register, &'a [u8]),
    /// Goes on if the key in a register is in the map, with its value in another.
    Lookup {
        /// Name of the map.
        map: &'a str,
        /// Where the key begins.
        key: Register,
        /// Where the value goes.
        to: Register,
    },
    /// Does with the packet what the map says of the key in a register, and goes on with the next rule if it says nothing.
    Decide {
        /// Name of the map.
        map: &'a str,
        /// Where the key begins.
        key: Register,
    },
    /// Puts an element into a map of which rules add elements, or makes it last anew. Fails if the map is full.
    Remember {
        /// Name of the map.
        map: &'a str,
        /// Where the key begins.
        key: Register,
        /// Where the value begins.
        value: Register,
        /// For how long.
        timeout: Duration,
    },
    /// Translates the destination to an address and, behind it, a port.
    TranslateDestination {
        /// Whether they are IPv4.
        is_ipv4: bool,
        /// Where the address begins.
        address: Register,
        /// Where the port is.
        port: Register,
    },
    /// Translates the source to the address of the interface that the packet leaves through.
    Masquerade,
    /// Answers with "port unreachable".
    Reject,
    /// Drops the packet.
    Drop,
}

impl Expression<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::Payload { .. } => "payload",
            Self::Meta(..) => "meta",
            Self::Connection(..) => "ct",
            Self::Random(..) => "numgen",
            Self::Mask(..) => "bitwise",
            Self::Equals(..) | Self::Differs(..) => "cmp",
            Self::Lookup { .. } | Self::Decide { .. } => "lookup",
            Self::Remember { .. } => "dynset",
            Self::TranslateDestination { .. } => "nat",
            Self::Masquerade => "masq",
            Self::Reject => "reject",
            Self::Drop => "immediate",
        }
    }

    pub(super) fn write(&self, bytes: &mut Vec<u8>) {
        text(bytes, 1, self.name());
        nested(bytes, 2, |bytes| self.write_data(bytes));
    }

    fn write_data(&self, bytes: &mut Vec<u8>) {
        match *self {
            Self::Payload { base, offset, length, to } => {
                number(bytes, 1, to.number());
                number(bytes, 2, if base == Base::Network { 1 } else { 2 });
                number(bytes, 3, offset);
                number(bytes, 4, length);
            }
            Self::Meta(meta, to) => {
                number(bytes, 1, to.number());
                let key = match meta {
                    Meta::OutInterface => 7,
                    Meta::Family => 15,
                    Meta::Protocol => 16,
                };
                number(bytes, 2, key);
            }
            Self::Connection(connection, to) => {
                number(bytes, 1, to.number());
                number(bytes, 2, if connection == Connection::State { 0 } else { 2 });
            }
            Self::Random(limit, to) => {
                number(bytes, 1, to.number());
                number(bytes, 2, limit);
                number(bytes, 3, 1);
            }
            Self::Mask(register, mask) => {
                number(bytes, 1, register.number());
                number(bytes, 2, register.number());
                number(bytes, 3, 4);
                nested(bytes, 4, |bytes| attribute(bytes, 1, &mask.to_ne_bytes()));
                nested(bytes, 5, |bytes| attribute(bytes, 1, &[0; 4]));
            }
            Self::Equals(register, value) | Self::Differs(register, value) => {
                number(bytes, 1, register.number());
                number(bytes, 2, u32::from(matches!(self, Self::Differs(..))));
                nested(bytes, 3, |bytes| attribute(bytes, 1, value));
            }
            Self::Lookup { map, key, to } => {
                text(bytes, 1, map);
                number(bytes, 2, key.number());
                number(bytes, 3, to.number());
            }
            Self::Decide { map, key } => {
                text(bytes, 1, map);
                number(bytes, 2, key.number());
                number(bytes, 3, 0);
            }
            Self::Remember { map, key, value, timeout } => {
                const UPDATE: u32 = 1;
                text(bytes, 1, map);
                number(bytes, 3, UPDATE);
                number(bytes, 4, key.number());
                number(bytes, 5, value.number());
                let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
                attribute(bytes, 6, &milliseconds.to_be_bytes());
            }
            Self::TranslateDestination { is_ipv4, address, port } => {
                number(bytes, 1, 1);
                number(bytes, 2, if is_ipv4 { 2 } else { 10 });
                number(bytes, 3, address.number());
                number(bytes, 5, port.number());
            }
            Self::Masquerade => {}
            Self::Reject => {
                // By the family's own way of saying it.
                number(bytes, 1, 2);
                attribute(bytes, 2, &[1]);
            }
            Self::Drop => {
                number(bytes, 1, 0);
                nested(bytes, 2, |bytes| nested(bytes, 2, |bytes| number(bytes, 1, 0)));
            }
        }
    }
}
