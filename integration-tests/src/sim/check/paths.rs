//! What must hold of paths: who talks does so directly where the NATs allow it, and through a director elsewhere; and
//! nobody keeps more than there is reason for.

use std::{net::IpAddr, time::Duration};

use muster_tunnel::{PublicKey, Why};
use uuid::Uuid;

use super::NEWS;
use crate::sim::{Checked, Scenario, internet::direct_possible, must, world::World};

/// Data flows for so long before the path that it has is looked at: rounds are a minute apart.
const FLOWS_FOR: u32 = 30;
const EVERY: Duration = Duration::from_secs(5);
/// Mappings that one host may have in a NAT: one for each candidate of each peer, and directors.
const MAPPINGS: usize = 400;

impl World {
    /// What must hold of directors and NATs at any time.
    pub(super) fn check_directors(&self) -> Checked {
        for (d, director) in self.directors.iter().enumerate().filter(|(_, director)| director.is_up) {
            let now = director.relay.snapshot();
            let most = self.model.devices.len() + self.model.gone.len();
            must(now.devices <= most && now.sessions <= 4 * now.devices, || format!("d{d} has {now:?}"))?;
            must(now.refused <= most, || format!("d{d} refuses {now:?}"))?;
            let Some(r) = self.director_session(d) else { continue };
            let attached = director.relay.devices();
            let since = |uid: &Uuid| director.attached.get(uid).copied().unwrap_or_default();
            for (uid, revision) in &self.model.gone {
                let Some((_, reached)) = self.registrars[r].progress.range(revision..).next() else {
                    continue;
                };
                let known = self.now.saturating_sub(director.since.max(*reached).max(since(uid)));
                must(known < NEWS || !attached.contains(uid), || {
                    format!("{uid} is attached to d{d}, {known:?} after its registrar knew that it is gone")
                })?;
            }
        }
        for (number, site) in self.internet.sites.iter().enumerate() {
            let mappings = site.nats.iter().map(crate::sim::nat::Nat::len).max().unwrap_or(0);
            must(mappings <= MAPPINGS * self.hosts.len(), || {
                format!("site {number} has {mappings} mappings")
            })?;
        }
        Ok(())
    }

    /// Pairs that talk do so directly exactly where that is possible.
    pub(super) fn check_paths(&mut self, pairs: &[(usize, IpAddr)]) -> Checked {
        if self.scenario == Scenario::Lives {
            return Ok(());
        }
        for _ in 0..FLOWS_FOR {
            for (from, to) in pairs {
                self.send_packet(*from, *to)?;
            }
            self.advance(EVERY)?;
        }
        for (a, to) in pairs {
            // A host whose device is gone may have the address still.
            let owner = self.model.addresses.get(to);
            let is_it = |h: &usize| self.hosts[*h].disk.as_ref().map(|disk| &disk.uid) == owner;
            let Some(b) = (0..self.hosts.len()).find(is_it).filter(|_| owner.is_some()) else { continue };
            let (one, other) = (self.path(*a, b), self.path(b, *a));
            let wanted = direct_possible(&self.hosts[*a].place, &self.hosts[b].place);
            must(one.0 == Some(wanted), || {
                let places = (&self.hosts[*a].place, &self.hosts[b].place);
                format!(
                    "h{a} to h{b}: direct {one:?}, the other way {other:?}, possible: {wanted}; {places:?}"
                )
            })?;
            if wanted {
                self.counts.direct += 1;
            } else {
                self.counts.by_director += 1;
            }
        }
        Ok(())
    }

    /// Whether `a` reaches `b` directly, and why.
    fn path(&self, a: usize, b: usize) -> (Option<bool>, Option<Why>) {
        let now = self.host_now(a);
        let key = self.hosts[b].disk.as_ref().and_then(|disk| self.model.devices.get(&disk.uid));
        let key: Option<[u8; 32]> = key.and_then(|known| known.key.as_slice().try_into().ok());
        let running = self.hosts[a].running.as_ref();
        let path = key.zip(running).and_then(|(key, running)| {
            running.tunnel.peer(&PublicKey::from_bytes(key), now).and_then(|peer| peer.path)
        });
        (path.map(|path| !path.endpoint.is_relay()), path.map(|path| path.why))
    }
}
