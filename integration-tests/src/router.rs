//! Routers between switches: forwarding, NAT with the behaviours of RFC 4787, blocked UDP, and loss, made with
//! nftables in the router's own namespace.

use crate::{Host, LabError, Result};

/// How a router translates what it forwards from inside to outside (RFC 4787, 4 and 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nat {
    /// Forwards only.
    None,
    /// Endpoint-independent mapping and filtering, for one host inside: whatever comes to a port of the outer
    /// address reaches the same port of that host.
    FullCone,
    /// Keeps the port, so that the mapping is the same to every destination; lets in only what answers
    /// (address and port-dependent filtering).
    PortRestricted,
    /// A random port for every destination (address and port-dependent mapping): hole punching fails.
    Symmetric,
}

/// A host that forwards between its interfaces.
pub struct Router {
    host: Host,
}

impl Router {
    /// Makes `host` forward IPv4 and IPv6.
    pub fn new(host: Host) -> Result<Self> {
        host.sh("echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")?;
        Ok(Self { host })
    }

    /// The host that the router is.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Translates what leaves through interface `outside`. `inside` is the one host behind a full cone.
    pub fn nat(&self, nat: Nat, outside: &str, inside: Option<&str>) -> Result {
        let rules = match nat {
            Nat::None => return Ok(()),
            Nat::PortRestricted => format!("oifname {outside} masquerade"),
            Nat::Symmetric => format!("oifname {outside} masquerade fully-random"),
            Nat::FullCone => {
                let inside = inside.ok_or_else(|| LabError::Command {
                    command: "full-cone NAT".into(),
                    reason: "name the host inside".into(),
                })?;
                self.nft(&format!(
                    "table ip cone {{ chain pre {{ type nat hook prerouting priority dstnat; iifname {outside} ip protocol udp dnat to {inside}; }}; }}"
                ))?;
                format!("oifname {outside} masquerade")
            }
        };
        self.nft(&format!(
            "table ip nat {{ chain post {{ type nat hook postrouting priority srcnat; {rules}; }}; }}"
        ))
    }

    /// Drops all UDP that would be forwarded, as strict company networks do.
    pub fn block_udp(&self) -> Result {
        self.nft("table inet noudp { chain forward { type filter hook forward priority filter; meta l4proto udp drop; }; }")
    }

    /// Drops `percent` of the forwarded packets at random; 0 stops dropping.
    pub fn loss(&self, percent: u8) -> Result {
        self.nft("table inet loss; delete table inet loss")?;
        if percent == 0 {
            return Ok(());
        }
        self.nft(&format!(
            "table inet loss {{ chain forward {{ type filter hook forward priority filter; numgen random mod 100 < {percent} drop; }}; }}"
        ))
    }

    /// Drops everything that would be forwarded, or lets it through again: a cut cable.
    pub fn cut(&self, cut: bool) -> Result {
        self.nft("table inet cut; delete table inet cut")?;
        if !cut {
            return Ok(());
        }
        self.nft(
            "table inet cut { chain forward { type filter hook forward priority filter; policy drop; }; }",
        )
    }

    fn nft(&self, rules: &str) -> Result {
        self.host.sh(&format!("nft -f - <<'RULES'\n{rules}\nRULES")).map(drop)
    }
}
