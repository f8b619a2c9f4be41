//! Services, in the shape of Kubernetes' `v1 Service`.

use muster_common::time::Timestamp;
use muster_proto::admin::{
    CreateServiceRequest, DeleteServiceRequest, GetServiceRequest, ListOptions, ListServicesRequest,
    ObjectMeta, Service, ServicePort, ServiceSpec, UpdateServiceRequest, WatchServicesRequest,
    service_service_client::ServiceServiceClient as Client,
};
use pbjson_types::FieldMask;
use serde_json::Value;
use tonic::Status;

use super::{Event, Events, Key, Kind, Names, Page, Resource, Scope, Secret, events};
use crate::{
    channel::Channel,
    describe::Description,
    table::{Column, labels, list, or_none},
};

pub(super) const NAMES: Names = Names {
    api_version: "v1",
    kind: "Service",
    singular: "service",
    plural: "services",
    short: "svc",
    namespaced: true,
    unique_in_namespace: true,
    in_network: true,
};

impl Resource for Service {
    const KIND: Kind = Kind::Service;
    const COLUMNS: &'static [Column] = &[
        Column::new("TYPE"),
        Column::new("CLUSTER-IP"),
        Column::new("EXTERNAL-IP"),
        Column::new("PORT(S)"),
        Column::wide("SELECTOR"),
    ];
    const FIXED: &'static [&'static str] = &["spec.clusterIP", "spec.clusterIPs"];
    const VALIDATES: bool = true;

    fn metadata(&self) -> Option<&ObjectMeta> {
        self.metadata.as_ref()
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        self.metadata.get_or_insert_default()
    }

    fn cells(&self, _: Timestamp) -> Vec<String> {
        let spec = self.spec.clone().unwrap_or_default();
        vec![
            type_of(&spec).to_owned(),
            or_none(&spec.cluster_ip),
            external(self),
            list(spec.ports.iter().map(|port| format!("{}/{}", port.port, or(&port.protocol, "TCP")))),
            labels(&spec.selector),
        ]
    }

    fn describe(&self, description: &mut Description, _: Timestamp) {
        let spec = self.spec.clone().unwrap_or_default();
        description.values("Selector", spec.selector.iter().map(|(k, v)| format!("{k}={v}")));
        description.value("Type", type_of(&spec));
        description.value("IP family policy", &spec.ip_family_policy);
        description.value("IP families", list(&spec.ip_families));
        description.value("IP", &spec.cluster_ip);
        description.value("IPs", list(&spec.cluster_ips));
        if type_of(&spec) == "ExternalName" {
            description.value("External name", &spec.external_name);
        }
        if !spec.external_ips.is_empty() {
            description.value("External IPs", list(&spec.external_ips));
        }
        let ingress = ingress(self);
        if !ingress.is_empty() {
            description.value("Load balancer ingress", list(ingress));
        }
        description.values("Ports", spec.ports.iter().map(port_line));
        description.value("Session affinity", or(&spec.session_affinity, "None"));
        if spec.publish_not_ready_addresses {
            description.value("Not ready addresses", "published");
        }
        if !spec.internal_traffic_policy.is_empty() {
            description.value("Internal traffic policy", &spec.internal_traffic_policy);
        }
        if !spec.traffic_distribution.is_empty() {
            description.value("Traffic distribution", &spec.traffic_distribution);
        }
        if !spec.external_traffic_policy.is_empty() {
            description.value("External traffic policy", &spec.external_traffic_policy);
        }
    }

    /// Kubernetes has numbers where a port is a number.
    fn present(value: &mut Value) {
        let ports = value.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
        for target in ports.into_iter().flatten().filter_map(|port| port.get_mut("targetPort")) {
            if let Some(number) = target.as_str().and_then(|text| text.parse::<u16>().ok()) {
                *target = number.into();
            }
        }
    }

    fn fill_defaults(&mut self) {
        let Some(spec) = &mut self.spec else { return };
        let fill = |text: &mut String, default: &str| {
            if text.is_empty() {
                default.clone_into(text);
            }
        };
        fill(&mut spec.r#type, "ClusterIP");
        fill(&mut spec.session_affinity, "None");
        for port in &mut spec.ports {
            fill(&mut port.protocol, "TCP");
            fill(&mut port.target_port, &port.port.to_string());
        }
        if let Some(client_ip) = spec.session_affinity_config.as_mut().and_then(|c| c.client_ip.as_mut())
            && client_ip.timeout_seconds == 0
        {
            client_ip.timeout_seconds = 10_800;
        }
    }

    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status> {
        let request = GetServiceRequest {
            network: key.network.clone(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
        };
        Ok(Client::new(channel).get_service(request).await?.into_inner().service)
    }

    async fn list(channel: Channel, scope: &Scope, options: ListOptions) -> Result<Page<Self>, Status> {
        let request = ListServicesRequest {
            network: scope.network.clone(),
            namespace: scope.namespace.clone(),
            options: Some(options),
        };
        let page = Client::new(channel).list_services(request).await?.into_inner();
        Ok(Page { items: page.services, next: page.next_page_token, revision: page.resource_version })
    }

    async fn create(
        channel: Channel,
        service: Self,
        validate_only: bool,
    ) -> Result<(Option<Self>, Option<Secret>), Status> {
        let request = CreateServiceRequest { service: Some(service), validate_only };
        Ok((Client::new(channel).create_service(request).await?.into_inner().service, None))
    }

    async fn update(
        channel: Channel,
        service: Self,
        mask: FieldMask,
        validate_only: bool,
    ) -> Result<Option<Self>, Status> {
        let request = UpdateServiceRequest { service: Some(service), update_mask: Some(mask), validate_only };
        Ok(Client::new(channel).update_service(request).await?.into_inner().service)
    }

    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status> {
        let request = DeleteServiceRequest {
            network: key.network.clone(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            resource_version: revision,
        };
        Client::new(channel).delete_service(request).await.map(drop)
    }

    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status> {
        let request = WatchServicesRequest {
            network: scope.network.clone(),
            namespace: scope.namespace.clone(),
            label_selector: scope.selector.clone(),
            resource_version: revision,
        };
        let stream = Client::new(channel).watch_services(request).await?.into_inner();
        Ok(events(stream, |r| Event { event: r.r#type(), object: r.service, revision: r.resource_version }))
    }
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn type_of(spec: &ServiceSpec) -> &str {
    or(&spec.r#type, "ClusterIP")
}

/// Addresses and host names that a load balancer gave the Service.
fn ingress(service: &Service) -> Vec<String> {
    let balancer = service.status.clone().and_then(|status| status.load_balancer).unwrap_or_default();
    balancer.ingress.into_iter().map(|i| if i.ip.is_empty() { i.hostname } else { i.ip }).collect()
}

/// The external name, or the load balancer's and the external addresses.
fn external(service: &Service) -> String {
    let spec = service.spec.clone().unwrap_or_default();
    if type_of(&spec) == "ExternalName" {
        return or_none(&spec.external_name);
    }
    let mut addresses = ingress(service);
    for ip in spec.external_ips.iter().filter(|ip| !ip.is_empty()) {
        if !addresses.contains(ip) {
            addresses.push(ip.clone());
        }
    }
    if addresses.is_empty() && type_of(&spec) == "LoadBalancer" {
        "<pending>".into()
    } else {
        list(addresses)
    }
}

/// `http 80/TCP to 8080`
fn port_line(port: &ServicePort) -> String {
    let name = or(&port.name, "<unnamed>");
    let number = port.port.to_string();
    format!("{name} {number}/{} to {}", or(&port.protocol, "TCP"), or(&port.target_port, &number))
}
