//! Endpoints (specification 2, 3, 4): their labels, and what headless Services and endpoint names answer.

use std::{collections::BTreeSet, net::IpAddr};

use hickory_proto::{
    ProtoError,
    rr::{Name, RecordType},
};

use super::{
    Engine,
    lookup::{Content, Question, typed},
    services::Part,
};
use crate::{
    directory::{Directory, Endpoint, Service},
    records,
};

impl<D: Directory> Engine<D> {
    /// The label that names an endpoint.
    pub fn endpoint_label(&self, endpoint: &Endpoint) -> String {
        label(endpoint, self.options.endpoint_device_names)
    }

    /// What the endpoints of `service` answer, as far as `part` means them; `base` is the Service's name.
    pub(super) fn endpoints(
        &self,
        question: &Question<'_>,
        ttl: u32,
        base: &Name,
        service: &Service,
        part: Part<'_>,
    ) -> Result<Content, ProtoError> {
        if !self.options.endpoints {
            return Ok(Content::NoName);
        }
        let meant: Vec<(String, &Endpoint)> = service
            .endpoints
            .iter()
            .map(|endpoint| (self.endpoint_label(endpoint), endpoint))
            .filter(|(label, endpoint)| match part {
                Part::Host(host) => label == host,
                _ => part.matches_any(&endpoint.ports),
            })
            .collect();
        if meant.is_empty() {
            return Ok(Content::NoName);
        }
        if question.record_type != RecordType::SRV {
            let mut seen = BTreeSet::new();
            let addresses = meant.iter().map(|(_, endpoint)| endpoint.address);
            let once: Vec<IpAddr> = addresses.filter(|address| seen.insert(*address)).collect();
            let answers = typed(&once, question.record_type);
            let answers = answers.map(|a| records::address(question.name, ttl, a)).collect();
            return Ok(Content::of(answers, Vec::new()));
        }
        let candidates: Vec<(&str, u16)> = meant
            .iter()
            .flat_map(|(label, endpoint)| {
                let ports = endpoint.ports.iter().filter(|port| part.matches(port));
                ports.map(|port| (label.as_str(), port.number))
            })
            .collect();
        let weight = records::weight(candidates.len());
        let (mut seen, mut targets, mut answers) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        for (label, port) in candidates {
            if seen.insert((label, port)) {
                let target = records::below(&[label], base)?;
                answers.push(records::service(question.name, ttl, weight, port, target));
                targets.insert(label);
            }
        }
        // All that the targets' names hold, also where another port of the Service is not offered.
        let (mut glue, mut seen) = (Vec::new(), BTreeSet::new());
        for endpoint in &service.endpoints {
            let label = self.endpoint_label(endpoint);
            if targets.contains(label.as_str()) && seen.insert((label.clone(), endpoint.address)) {
                glue.push(records::address(&records::below(&[&label], base)?, ttl, endpoint.address));
            }
        }
        Ok(Content::of(answers, glue))
    }
}

/// The label that names an endpoint; `device_names`: a device's endpoint is called like the device.
pub(super) fn label(endpoint: &Endpoint, device_names: bool) -> String {
    let device = endpoint.device.as_ref().filter(|_| device_names);
    match endpoint.hostname.as_ref().or(device) {
        Some(label) => label.as_str().to_owned(),
        None => dashed(endpoint.address),
    }
}

/// The address as a label.
pub(super) fn dashed(address: IpAddr) -> String {
    let mut label = address.to_string().replace(['.', ':'], "-");
    if label.ends_with('-') {
        label.push('0');
    }
    label
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_labels() {
        for (address, label) in
            [("10.0.0.1", "10-0-0-1"), ("2001:db8::", "2001-db8--0"), ("::1", "--1"), ("fd00::5", "fd00--5")]
        {
            assert_eq!(dashed(address.parse().unwrap()), label);
        }
    }
}
