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

/// Name of the table of the agent whose interface is `interface`: two agents on a host have one each.
pub fn table_name(interface: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-') { c } else { '_' };
    format!("muster_{}", interface.chars().map(plain).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tables_are_plain() {
        assert_eq!(table_name("muster0"), "muster_muster0");
        assert_eq!(table_name("a b;{"), "muster_a_b__");
    }
}
