//! What is asked of nf_tables in one transaction: all of it is done, or nothing. Numbers are those of
//! `linux/netfilter/nf_tables.h`.

use super::{
    attribute::{
        Message, acknowledge, attribute, attributes, begin, end, end_message, find, nested, number,
        open_nested, text,
    },
    expression::Expression,
};

/// nf_tables among the subsystems of nfnetlink; it stands where others have the number of a resource.
const SUBSYSTEM: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;
/// The family of tables that see IPv4 and IPv6.
const NFPROTO_INET: u8 = 1;
/// The most bytes of elements in one message: the length of an attribute has 16 bits.
const ELEMENTS_MAX: usize = 60_000;
/// The header of a message, and that of nfnetlink behind it.
const HEADERS: usize = 20;

/// Where a base chain looks at packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// On the way from one interface to another.
    Forward,
    /// Out of this host.
    Output,
    /// After routing.
    Postrouting,
}

/// What a base chain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The first packet of each connection, whose addresses may be translated.
    Nat,
    /// Every packet.
    Filter,
}

/// A set, or a map.
#[derive(Clone, Copy, Debug)]
pub struct Set<'a> {
    /// Its name.
    pub name: &'a str,
    /// What its keys consist of.
    pub key: &'a [Type],
    /// What its values consist of.
    pub value: Value<'a>,
    /// Whether rules add elements, which time out; at most so many.
    pub dynamic: Option<u32>,
}

/// What a map's values are.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// What becomes of the packet.
    Verdict,
    /// Something that goes into registers.
    Data(&'a [Type]),
}

/// A part of a key or value; each begins at a multiple of 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// An IPv4 address.
    Ipv4,
    /// An IPv6 address.
    Ipv6,
    /// The number of a transport protocol, in one byte.
    Protocol,
    /// A port, in network order.
    Port,
    /// A number in the order of the processor.
    Mark,
}

impl Type {
    /// As `nft` numbers it.
    fn id(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::Mark => 19,
        }
    }

    /// Its length in bytes, padding included.
    pub fn length(self) -> u32 {
        if self == Self::Ipv6 { 16 } else { 4 }
    }
}

fn type_id(parts: &[Type]) -> u32 {
    parts.iter().fold(0, |id, part| id << 6 | part.id())
}

fn length(parts: &[Type]) -> u32 {
    parts.iter().map(|part| part.length()).sum()
}

/// What a map has for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Datum<'a> {
    /// Nothing: for removal.
    None,
    /// Go to a chain, and do not come back.
    Goto(&'a str),
    /// Drop the packet.
    Drop,
    /// A value.
    Value(&'a [u8]),
}

/// Messages that make one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    bytes: Vec<u8>,
    table: String,
    sets: u32,
    /// Where the last message begins that is whole.
    last: usize,
    open: Option<Open>,
}

/// A message that elements are being collected into.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Open {
    /// Where it begins.
    start: usize,
    /// Where its list of elements begins.
    elements: usize,
    message: i32,
    set: String,
}

impl Batch {
    /// An empty transaction on the table called `table`.
    pub fn new(table: &str) -> Self {
        let mut bytes = Vec::new();
        let start = begin(&mut bytes, libc::NFNL_MSG_BATCH_BEGIN, libc::NLM_F_REQUEST, 0, SUBSYSTEM);
        end_message(&mut bytes, start);
        Self { bytes, table: table.to_owned(), sets: 0, last: 0, open: None }
    }

    /// The table's name.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == HEADERS
    }

    /// Makes the table unless it is there.
    pub fn add_table(&mut self) {
        self.request(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE, |table, bytes| {
            text(bytes, 1, table);
        });
    }

    /// Removes the table, which must be there, with all that is in it.
    pub fn delete_table(&mut self) {
        self.request(libc::NFT_MSG_DELTABLE, 0, |table, bytes| text(bytes, 1, table));
    }

    /// Makes a chain that packets come to of themselves.
    pub fn add_base_chain(&mut self, name: &str, kind: Kind, hook: Hook, priority: i32) {
        self.request(libc::NFT_MSG_NEWCHAIN, libc::NLM_F_CREATE, |table, bytes| {
            text(bytes, 1, table);
            text(bytes, 3, name);
            nested(bytes, 4, |bytes| {
                let hook = match hook {
                    Hook::Prerouting => 0,
                    Hook::Forward => 2,
                    Hook::Output => 3,
                    Hook::Postrouting => 4,
                };
                number(bytes, 1, hook);
                attribute(bytes, 2, &priority.to_be_bytes());
            });
            text(bytes, 7, if kind == Kind::Nat { "nat" } else { "filter" });
        });
    }

    /// Makes a chain that others send packets to.
    pub fn add_chain(&mut self, name: &str) {
        self.request(libc::NFT_MSG_NEWCHAIN, libc::NLM_F_CREATE, |table, bytes| {
            text(bytes, 1, table);
            text(bytes, 3, name);
        });
    }

    /// Adds a rule at the end of a chain.
    pub fn add_rule(&mut self, chain: &str, expressions: &[Expression]) {
        self.request(libc::NFT_MSG_NEWRULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, |table, bytes| {
            text(bytes, 1, table);
            text(bytes, 2, chain);
            nested(bytes, 4, |bytes| {
                for expression in expressions {
                    nested(bytes, 1, |bytes| expression.write(bytes));
                }
            });
        });
    }

    /// Makes a set or map.
    pub fn add_set(&mut self, set: Set<'_>) {
        const MAP: u32 = 0x8;
        const TIMEOUT: u32 = 0x10;
        const EVAL: u32 = 0x20;
        const VERDICT: u32 = 0xffff_ff00;
        self.sets += 1;
        let id = self.sets;
        self.request(libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE, |table, bytes| {
            text(bytes, 1, table);
            text(bytes, 2, set.name);
            let dynamic = if set.dynamic.is_some() { TIMEOUT | EVAL } else { 0 };
            number(bytes, 3, MAP | dynamic);
            number(bytes, 4, type_id(set.key));
            number(bytes, 5, length(set.key));
            match set.value {
                Value::Verdict => number(bytes, 6, VERDICT),
                Value::Data(parts) => {
                    number(bytes, 6, type_id(parts));
                    number(bytes, 7, length(parts));
                }
            }
            number(bytes, 10, id);
            if let Some(size) = set.dynamic {
                nested(bytes, 9, |bytes| number(bytes, 1, size));
            }
        });
    }

    /// Adds an element to a map.
    pub fn add_element(&mut self, set: &str, key: &[u8], datum: &Datum<'_>) {
        self.element(libc::NFT_MSG_NEWSETELEM, set, key, datum);
    }

    /// Removes an element of a map, which must be there.
    pub fn delete_element(&mut self, set: &str, key: &[u8]) {
        self.element(libc::NFT_MSG_DELSETELEM, set, key, &Datum::None);
    }

    fn element(&mut self, message: i32, set: &str, key: &[u8], datum: &Datum<'_>) {
        let fits = |open: &Open| {
            open.message == message && open.set == set && self.bytes.len() - open.elements < ELEMENTS_MAX
        };
        if !self.open.as_ref().is_some_and(fits) {
            self.close();
            let create = if message == libc::NFT_MSG_NEWSETELEM { libc::NLM_F_CREATE } else { 0 };
            let start =
                begin(&mut self.bytes, nftables(message), libc::NLM_F_REQUEST | create, NFPROTO_INET, 0);
            text(&mut self.bytes, 1, &self.table);
            text(&mut self.bytes, 2, set);
            let elements = open_nested(&mut self.bytes, 3);
            self.open = Some(Open { start, elements, message, set: set.to_owned() });
        }
        nested(&mut self.bytes, 1, |bytes| {
            nested(bytes, 1, |bytes| attribute(bytes, 1, key));
            match datum {
                Datum::None => {}
                Datum::Value(value) => nested(bytes, 2, |bytes| attribute(bytes, 1, value)),
                Datum::Goto(_) | Datum::Drop => nested(bytes, 2, |bytes| {
                    nested(bytes, 2, |bytes| {
                        const GOTO: i32 = -4;
                        let (code, chain) = match datum {
                            Datum::Goto(chain) => (GOTO, Some(chain)),
                            _ => (0, None),
                        };
                        attribute(bytes, 1, &code.to_be_bytes());
                        if let Some(chain) = chain {
                            text(bytes, 2, chain);
                        }
                    });
                }),
            }
        });
    }

    /// The transaction as it is sent. Its last message but the end, which not every kernel acknowledges, is to be
    /// acknowledged with `sequence`.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        self.close();
        acknowledge(&mut self.bytes, self.last, sequence);
        let start = begin(&mut self.bytes, libc::NFNL_MSG_BATCH_END, libc::NLM_F_REQUEST, 0, SUBSYSTEM);
        end_message(&mut self.bytes, start);
        self.bytes
    }

    fn request(&mut self, message: i32, flags: i32, write: impl FnOnce(&str, &mut Vec<u8>)) {
        self.close();
        let start = begin(&mut self.bytes, nftables(message), libc::NLM_F_REQUEST | flags, NFPROTO_INET, 0);
        write(&self.table, &mut self.bytes);
        end_message(&mut self.bytes, start);
        self.last = start;
    }

    /// Ends the message that elements are collected into.
    fn close(&mut self) {
        if let Some(open) = self.open.take() {
            end(&mut self.bytes, open.elements);
            end_message(&mut self.bytes, open.start);
            self.last = open.start;
        }
    }
}

/// Asks for all elements of a map.
pub fn list_elements(table: &str, set: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    let start = begin(&mut bytes, nftables(libc::NFT_MSG_GETSETELEM), flags, NFPROTO_INET, 0);
    text(&mut bytes, 1, table);
    text(&mut bytes, 2, set);
    end_message(&mut bytes, start);
    bytes
}

/// Keys and values in an answer to [`list_elements`].
pub fn elements<'a>(message: &Message<'a>) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
    let list = message.body.get(4..).and_then(|attributes| find(attributes, 3)).unwrap_or_default();
    let data = |element: &'a [u8], kind| find(find(element, kind)?, 1);
    attributes(list).filter_map(move |(_, element)| Some((data(element, 1)?, data(element, 2)?)))
}

/// Whether `message` tells of a change to `table` or what is in it.
pub fn is_about(message: &Message<'_>, table: &str) -> bool {
    if i32::from(message.kind >> 8) != libc::NFNL_SUBSYS_NFTABLES {
        return false;
    }
    let is_change = !matches!(i32::from(message.kind & 0xff), libc::NFT_MSG_NEWGEN | libc::NFT_MSG_GETGEN);
    let name = message.body.get(4..).and_then(|attributes| find(attributes, 1));
    is_change && name.and_then(|name| name.strip_suffix(&[0])) == Some(table.as_bytes())
}

/// A message of nf_tables.
fn nftables(message: i32) -> i32 {
    libc::NFNL_SUBSYS_NFTABLES << 8 | message
}
