//! Routers between switches: forwarding, NAT with the behaviours of RFC 4787, blocked UDP, and loss, made with
//! nftables in the router's own namespace.

use std::cell::Cell;

use crate::{Host, LabError, Result};

/// Ports that a NAT takes in turn when it is rebound; each has so many.
const REBOUND_PORTS: (u16, u16) = (30_000, 1_000);
/// Has the kernel forget all connections that it tracks (IPCTNL_MSG_CT_DELETE without a filter).
const FORGET_CONNECTIONS: &str = "import socket, struct; s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12); \
    s.send(struct.pack('=IHHIIBBH', 20, 0x102, 5, 1, 0, 0, 0, 0)); \
    error, = struct.unpack_from('=i', s.recv(999), 16); assert error == 0, error";

/// How a router translates what it forwards from inside to outside (RFC 4787, 4 and 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nat {
    /// Forwards only.
    None,
    /// Endpoint-independent mapping and filtering, for one host inside: whatever comes to a port of the outer
    /// address reaches the same port of that host.
    FullCone,
    /// Endpoint-independent mapping, for one host inside; lets in what comes from an address that this host has sent
    /// to in the last two minutes, from whichever port.
    AddressRestricted,
    /// Keeps the port, so that the mapping is the same to every destination; lets in only what answers
    /// (address and port-dependent filtering).
    PortRestricted,
    /// A random port for every destination (address and port-dependent mapping): hole punching fails.
    Symmetric,
}

/// A host that forwards between its interfaces.
pub struct Router {
    host: Host,
    rebound: Cell<u16>,
}

impl Router {
    /// Makes `host` forward IPv4 and IPv6.
    pub fn new(host: Host) -> Result<Self> {
        host.sh("echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")?;
        Ok(Self { host, rebound: Cell::new(0) })
    }

    /// The host that the router is.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Translates what leaves through interface `outside`. `inside` is the one host behind a full cone or an
    /// address-restricted NAT.
    pub fn nat(&self, nat: Nat, outside: &str, inside: Option<&str>) -> Result {
        let inside = || {
            inside.ok_or_else(|| LabError::Command {
                command: format!("{nat:?} NAT"),
                reason: "name the host inside".into(),
            })
        };
        let masquerade = match nat {
            Nat::None => return Ok(()),
            Nat::Symmetric => "masquerade fully-random",
            Nat::FullCone | Nat::AddressRestricted | Nat::PortRestricted => "masquerade",
        };
        match nat {
            Nat::FullCone => self.nft(&format!(
                "table ip cone {{ chain pre {{ type nat hook prerouting priority dstnat; \
                 iifname {outside} ip protocol udp dnat to {}; }}; }}",
                inside()?
            ))?,
            Nat::AddressRestricted => self.nft(&format!(
                "table ip cone {{ set seen {{ type ipv4_addr; flags dynamic,timeout; timeout 2m; }}; \
                 chain forward {{ type filter hook forward priority filter; \
                 oifname {outside} meta l4proto udp update @seen {{ ip daddr }}; }}; \
                 chain pre {{ type nat hook prerouting priority dstnat; \
                 iifname {outside} meta l4proto udp ip saddr @seen dnat to {}; }}; }}",
                inside()?
            ))?,
            Nat::None | Nat::PortRestricted | Nat::Symmetric => {}
        }
        // What is not for anybody inside is dropped before the kernel keeps a connection of it. A kept one, to the
        // router itself, would have the same addresses as the answer to what the host inside sends later, which would
        // therefore get another port: the NAT would turn symmetric just when both sides knock at the same time.
        self.nft(&format!(
            "table ip nat {{ chain post {{ type nat hook postrouting priority srcnat; \
             oifname {outside} {masquerade}; }}; \
             chain in {{ type filter hook input priority filter; \
             iifname {outside} meta l4proto udp ct state new drop; }}; }}"
        ))
    }

    /// Has a port-restricted or symmetric NAT towards `outside` forget its mappings, and take other ports for those
    /// to come: what a home router does when it is switched off and on.
    pub fn rebind(&self, nat: Nat, outside: &str) -> Result {
        if nat == Nat::PortRestricted {
            let (first, each) = REBOUND_PORTS;
            let from = first + self.rebound.get() % 30 * each;
            self.rebound.set(self.rebound.get() + 1);
            self.nft(&format!(
                "flush chain ip nat post; \
                 add rule ip nat post oifname {outside} meta l4proto udp masquerade to :{from}-{}; \
                 add rule ip nat post oifname {outside} masquerade",
                from + each - 1
            ))?;
        } else if nat != Nat::Symmetric {
            let reason = "this kind has fixed ports, and cannot be rebound".into();
            return Err(LabError::Command { command: format!("rebind {nat:?} NAT"), reason });
        }
        self.host.sh(&format!("python3 -c \"{FORGET_CONNECTIONS}\"")).map(drop)
    }

    /// Drops all UDP that would be forwarded, as strict company networks do.
    pub fn block_udp(&self) -> Result {
        self.nft("table inet noudp { chain forward { type filter hook forward priority filter; meta l4proto udp counter drop; }; }")
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
