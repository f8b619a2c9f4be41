//! Who is who on the DNS listeners: a certificate tells more than an address.

use ipnet::IpNet;
use muster_common::identity::{Party, SpiffeId};
use muster_dns::{directory::Viewer, fast::Asker, server::Source};
use uuid::Uuid;

/// Tells who asks.
#[derive(Clone, Debug)]
pub(super) struct Who {
    /// Addresses of those who see every network.
    open_to: Vec<IpNet>,
    trust_domain: Box<str>,
}

impl Who {
    /// Clients in `open_to` see every network; certificates count if they are of `trust_domain`.
    pub(super) fn new(open_to: Vec<IpNet>, trust_domain: &str) -> Self {
        Self { open_to, trust_domain: trust_domain.into() }
    }

    fn party<'a>(&self, source: &'a Source) -> Option<&'a Party> {
        let id: Option<&SpiffeId> = source.identity.as_deref();
        id.filter(|id| *id.trust_domain == *self.trust_domain).map(|id| &id.party)
    }

    fn is_open(&self, source: &Source) -> bool {
        let address = source.address.ip();
        self.open_to.iter().any(|net| net.contains(&address))
    }

    /// Who asks the engine.
    pub(super) fn viewer(&self, source: &Source) -> Viewer {
        match self.party(source) {
            Some(Party::Device { network, uid }) => {
                Viewer::Member { network: network.clone(), uid: uid.clone() }
            }
            Some(Party::Operator { .. }) => Viewer::Open,
            Some(Party::Director { .. } | Party::Registrar { .. }) | None if self.is_open(source) => {
                Viewer::Open
            }
            Some(Party::Director { .. } | Party::Registrar { .. }) | None => Viewer::Stranger,
        }
    }

    /// The same for encoded answers; `None` for strangers, to whom they are not told.
    pub(super) fn asker(&self, source: &Source) -> Option<Asker> {
        match self.party(source) {
            Some(Party::Device { uid, .. }) => {
                Some(Asker::Member { uid: Uuid::try_parse(uid.as_str()).ok()?.into_bytes() })
            }
            Some(Party::Operator { .. }) => Some(Asker::Open),
            Some(Party::Director { .. } | Party::Registrar { .. }) | None => {
                self.is_open(source).then_some(Asker::Open)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use muster_dns::message::Transport;

    use super::*;

    #[test]
    fn certificates_and_open_ranges_decide_who_asks() {
        let open: Vec<IpNet> = vec!["192.0.2.0/24".parse().unwrap(), "fd00::/8".parse().unwrap()];
        let who = Who::new(open, "muster.test");
        let ask = |address: &str, identity: Option<&str>| {
            let identity = identity.map(|id| Arc::new(id.parse().unwrap()));
            let address = format!("{address}:5").parse().unwrap();
            let source = Source { address, transport: Transport::Udp, identity };
            (who.viewer(&source), who.asker(&source))
        };
        let (stranger, open) = ((Viewer::Stranger, None), (Viewer::Open, Some(Asker::Open)));
        assert_eq!(ask("198.51.100.1", None), stranger);
        assert_eq!(ask("192.0.2.1", None), open);
        assert_eq!(ask("[fd00::1]", None), open);
        let uid = "00000000-0000-0000-0000-00000000000d";
        let device = format!("spiffe://muster.test/network/n/device/{uid}");
        let member = Viewer::Member { network: "n".parse().unwrap(), uid: uid.parse().unwrap() };
        let mut octets = [0; 16];
        octets[15] = 13;
        assert_eq!(ask("198.51.100.1", Some(&device)), (member, Some(Asker::Member { uid: octets })));
        assert_eq!(ask("198.51.100.1", Some("spiffe://other.test/network/n/device/d")), stranger);
        assert_eq!(ask("198.51.100.1", Some("spiffe://muster.test/operator/admin")), open);
        assert_eq!(ask("198.51.100.1", Some("spiffe://muster.test/registrar/r")), stranger);
        assert_eq!(ask("192.0.2.1", Some("spiffe://muster.test/registrar/r")), open);
    }
}
