//! What a query is about, in the terms of the reference server's metadata: for query logs and metrics.

use hickory_proto::rr::RecordType;
use muster_common::name::Label;

use super::{
    Engine, QueryContext,
    lookup::{sees, within},
    services::Part,
};
use crate::{
    directory::Directory,
    message::{self, Parsed},
    reverse::ReverseName,
};

/// What a query is about. What does not apply is empty.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Metadata {
    /// The Service's name.
    pub service: String,
    /// The namespace in the name.
    pub namespace: String,
    /// `svc` or `pod`.
    pub kind: String,
    /// The endpoint's label, or the dashed address of a `pod` name.
    pub endpoint: String,
    /// The port's name, without underscore.
    pub port_name: String,
    /// The protocol, without underscore.
    pub protocol: String,
    /// The namespace of the device that asks.
    pub client_namespace: String,
    /// The name of the device that asks.
    pub client_device: String,
}

impl<D: Directory> Engine<D> {
    /// Reads what `query` is about; empty for what is no query or not for a zone of ours. Takes as long as an
    /// answer on the slow path does.
    pub fn metadata(&self, query: &[u8], context: &QueryContext) -> Metadata {
        let mut metadata = Metadata::default();
        let Parsed::Request(request) = message::parse(query) else { return metadata };
        let text = message::plain_name(&request.question.name);
        let zone = match ReverseName::parse(&text) {
            Some(_) if request.record_type() != RecordType::PTR => None,
            Some(_) => self.directory.zones(&context.viewer).into_iter().next(),
            None => self.directory.zone(&text),
        };
        let Some(zone) = zone.filter(|zone| sees(&context.viewer, zone)) else { return metadata };
        let (device, namespace) = self.client(&zone, context);
        let text_of = |label: Option<Label>| label.map(|label| label.to_string()).unwrap_or_default();
        (metadata.client_device, metadata.client_namespace) = (text_of(device), text_of(namespace));
        let Some((left, external)) = within(&zone, &text) else { return metadata };
        let mut labels: Vec<&str> = left.rsplit('.').collect();
        if external {
            labels.insert(0, "svc");
        }
        match labels.as_slice() {
            ["pod", namespace, rest @ ..] => {
                metadata.kind = "pod".to_owned();
                metadata.namespace = (*namespace).to_owned();
                metadata.endpoint = rest.first().copied().unwrap_or_default().to_owned();
            }
            ["svc", namespace, rest @ ..] => {
                metadata.kind = "svc".to_owned();
                metadata.namespace = (*namespace).to_owned();
                if let [service, below @ ..] = rest {
                    metadata.service = (*service).to_owned();
                    match Part::read(below) {
                        Some(Part::Host(host)) => metadata.endpoint = host.to_owned(),
                        Some(Part::Port { name, protocol }) => {
                            metadata.port_name = name.to_owned();
                            metadata.protocol = protocol.to_owned();
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        metadata
    }
}
