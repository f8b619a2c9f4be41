//! nftables over netlink: the few messages that tables of maps need. All but [`socket`] is pure.
//! Netlink and not the `nft` program, since that takes longer to start than a change may take, and its language has no way
//! to say "to the endpoint that this client had before" for all Services in one rule.

pub mod attribute;
pub mod expression;
pub mod message;
pub mod socket;

pub use expression::Expression;
pub use message::Batch;
pub use socket::{NftablesError, Socket};
