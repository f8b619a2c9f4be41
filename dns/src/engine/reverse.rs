//! Reverse names (specification 7): of cluster IPs, endpoints, external addresses and devices.

use std::{net::IpAddr, sync::Arc};

use hickory_proto::{
    ProtoError,
    rr::{Name, RecordType},
};
use ipnet::IpNet;

use super::{
    Engine,
    lookup::{Content, Found, Place, Question, sees},
};
use crate::{
    directory::{Directory, ExternalAddress, ServiceKind, Viewer, Zone},
    records,
    reverse::{self, ReverseName},
};

impl<D: Directory> Engine<D> {
    /// Finds a reverse name.
    pub(super) fn look_reverse(
        &self,
        question: &Question<'_>,
        reverse: ReverseName,
    ) -> Result<Found, ProtoError> {
        let Some((net, zones)) = self.reverse_zones(question.viewer, reverse.prefix) else {
            return Ok(Found::Outside);
        };
        let Some(first) = zones.first() else { return Ok(Found::Outside) };
        let depth = usize::from(reverse::zone_labels(net));
        let apex = question.name.trim_to(depth);
        let origin = records::domain(&first.domain)?;
        let place = Place { zone: first.clone(), apex, origin, external: false };
        let is_apex = question.name.iter().count() == depth;
        let content = if reverse.is_address() && question.record_type == RecordType::PTR {
            let mut content = Content::NoName;
            for zone in &zones {
                let (ttl, targets) = self.names_of(zone, question.viewer, reverse.prefix.addr())?;
                if !targets.is_empty() {
                    let pointer = |target| records::pointer(question.name, ttl, target);
                    content = Content::of(targets.into_iter().map(pointer).collect(), Vec::new());
                    break;
                }
            }
            content
        } else if is_apex && !reverse.is_address() {
            self.apex(question, &place, &[])?
        } else {
            Content::NoName
        };
        Ok(Found::In(place, content))
    }

    /// The reverse zone that has all of `prefix`, and the forward zones that its addresses are looked for in.
    fn reverse_zones(&self, viewer: &Viewer, prefix: IpNet) -> Option<(IpNet, Vec<Arc<Zone>>)> {
        if *viewer == Viewer::Stranger {
            return None;
        }
        if let Some(zone) = self.directory.reverse_zone(viewer, prefix).filter(|zone| sees(viewer, zone)) {
            let pool = zone.pools.iter().find(|pool| pool.contains(&prefix)).copied();
            if let Some(pool) = pool {
                return Some((pool, vec![zone]));
            }
        }
        let configured = self.options.reverse_zones.iter().filter(|net| net.contains(&prefix));
        let net = configured.max_by_key(|net| net.prefix_len()).copied()?;
        let zones = self.directory.zones(viewer).into_iter().filter(|zone| sees(viewer, zone));
        Some((net, zones.collect()))
    }

    /// The names that have `address` in `zone`, and their records' time to live.
    fn names_of(
        &self,
        zone: &Zone,
        viewer: &Viewer,
        address: IpAddr,
    ) -> Result<(u32, Vec<Name>), ProtoError> {
        let origin = records::domain(&zone.domain)?;
        let mut services = self.directory.services_at(zone, viewer, address);
        services.retain(|service| self.serves(zone, service.namespace.as_str()));
        let mut names = Vec::new();
        for service in &services {
            if matches!(&service.kind, ServiceKind::ClusterIp(addresses) if addresses.contains(&address)) {
                return Ok((zone.ttl, vec![records::service_name(service, &origin)?]));
            }
        }
        for service in services.iter().filter(|_| self.options.endpoints) {
            // Nothing exists below an external name, so nothing points there.
            if matches!(service.kind, ServiceKind::ExternalName(_)) {
                continue;
            }
            let base = records::service_name(service, &origin)?;
            for endpoint in service.endpoints.iter().filter(|endpoint| endpoint.address == address) {
                let name = records::below(&[&self.endpoint_label(endpoint)], &base)?;
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        if !names.is_empty() {
            return Ok((zone.ttl, names));
        }
        if let Some(domain) = &zone.external_domain {
            let origin = records::domain(domain)?;
            for service in &services {
                if service.external.contains(&ExternalAddress::Ip(address)) {
                    names.push(records::external_name(service, &origin)?);
                }
            }
            if !names.is_empty() {
                return Ok((records::EXTERNAL_TTL, names));
            }
        }
        if let Some(device) = self.directory.device_at(zone, viewer, address) {
            names.push(records::below(&[device.as_str()], &origin)?);
        }
        Ok((zone.ttl, names))
    }
}
