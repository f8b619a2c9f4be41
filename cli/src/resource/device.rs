//! Devices.

use base64::{Engine, engine::general_purpose::STANDARD};
use muster_common::time::Timestamp;
use muster_proto::admin::{
    CreateDeviceRequest, DeleteDeviceRequest, Device, DeviceSpec, DeviceStatus, Endpoint, GetDeviceRequest,
    ListDevicesRequest, ListOptions, ObjectMeta, TransportCipher, UpdateDeviceRequest, WatchDevicesRequest,
    device_service_client::DeviceServiceClient as Client,
};
use pbjson_types::FieldMask;
use serde::{Deserialize, de::Error as _};
use serde_json::Value;
use tonic::Status;

use super::{Event, Events, Key, Kind, Names, Page, Resource, Scope, Secret, events};
use crate::{
    age::{moment, timestamp},
    approval::{Carried, host},
    channel::Channel,
    describe::Description,
    subnet,
    table::{Column, list, or_none, shortened},
};

pub(super) const NAMES: Names = Names {
    api_version: super::MUSTER,
    kind: "Device",
    singular: "device",
    plural: "devices",
    short: "dev",
    namespaced: true,
    unique_in_namespace: false,
    in_network: true,
};

impl Resource for Device {
    const KIND: Kind = Kind::Device;
    const COLUMNS: &'static [Column] = &[
        Column::new("STATUS"),
        Column::new("VIRTUAL-IPV4"),
        Column::wide("VIRTUAL-IPV6"),
        Column::wide("PRIVATE"),
        Column::wide("REFLEXIVE"),
        Column::wide("HOME"),
        Column::wide("VERSION"),
        Column::wide("VIA"),
        Column::wide("SUBNETS"),
    ];

    fn metadata(&self) -> Option<&ObjectMeta> {
        self.metadata.as_ref()
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        self.metadata.get_or_insert_default()
    }

    fn cells(&self, _: Timestamp) -> Vec<String> {
        let status = self.status.clone().unwrap_or_default();
        vec![
            status_word(self, &status),
            or_none(&status.virtual_ipv4),
            or_none(&status.virtual_ipv6),
            list(status.private_endpoints.iter().map(endpoint)),
            list(reflexive(&status).iter().map(endpoint)),
            or_none(&status.home_director),
            or_none(&status.agent_version),
            or_none(&status.proxied_by),
            shortened(&status.active_subnets),
        ]
    }

    fn describe(&self, description: &mut Description, now: Timestamp) {
        let status = self.status.clone().unwrap_or_default();
        description.value("Status", status_word(self, &status));
        description.value("Virtual IPv4", &status.virtual_ipv4);
        description.value("Virtual IPv6", &status.virtual_ipv6);
        description.values("Private endpoints", status.private_endpoints.iter().map(endpoint));
        description.values("Reflexive endpoints", reflexive(&status).iter().map(endpoint));
        description.value("Home director", &status.home_director);
        description.value("Second director", &status.second_director);
        describe_site(self, description);
        description.value("Public key", STANDARD.encode(&status.public_key));
        let ciphers = status.transport_ciphers().filter_map(cipher).map(str::to_owned);
        description.values("Further ciphers", ciphers);
        description.value("Agent version", &status.agent_version);
        if let Some(expiry) = timestamp(status.certificate_expiry.as_ref()) {
            description.value("Certificate expiry", moment(Some(expiry), now));
        }
    }

    fn check_spec(value: &Value) -> Result<(), serde_json::Error> {
        for subnet in &DeviceSpec::deserialize(value)?.subnets {
            subnet::parse(subnet).map_err(serde_json::Error::custom)?;
        }
        Ok(())
    }

    /// Subnets in the order and spelling of the registrar.
    fn fill_defaults(&mut self) {
        let Some(spec) = &mut self.spec else { return };
        let nets: Result<Vec<_>, _> = spec.subnets.iter().map(|text| subnet::parse(text)).collect();
        if let Ok(mut nets) = nets {
            nets.sort_unstable();
            nets.dedup();
            spec.subnets = nets.iter().map(ToString::to_string).collect();
        }
    }

    fn revoke(&mut self) -> bool {
        self.spec.get_or_insert_default().revoked = true;
        true
    }

    async fn get(channel: Channel, key: &Key) -> Result<Option<Self>, Status> {
        let request = GetDeviceRequest { network: key.network.clone(), name: key.name.clone() };
        Ok(Client::new(channel).get_device(request).await?.into_inner().device)
    }

    async fn list(channel: Channel, scope: &Scope, options: ListOptions) -> Result<Page<Self>, Status> {
        let request = ListDevicesRequest {
            network: scope.network.clone(),
            namespace: scope.namespace.clone(),
            options: Some(options),
        };
        let page = Client::new(channel).list_devices(request).await?.into_inner();
        Ok(Page { items: page.devices, next: page.next_page_token, revision: page.resource_version })
    }

    async fn create(
        channel: Channel,
        device: Self,
        _: bool,
    ) -> Result<(Option<Self>, Option<Secret>), Status> {
        let request = CreateDeviceRequest { device: Some(device) };
        Ok((Client::new(channel).create_device(request).await?.into_inner().device, None))
    }

    async fn update(
        channel: Channel,
        device: Self,
        mask: FieldMask,
        _: bool,
    ) -> Result<Option<Self>, Status> {
        let request = UpdateDeviceRequest { device: Some(device), update_mask: Some(mask) };
        Ok(Client::new(channel).update_device(request).await?.into_inner().device)
    }

    async fn delete(channel: Channel, key: &Key, revision: u64) -> Result<(), Status> {
        let request = DeleteDeviceRequest {
            network: key.network.clone(),
            name: key.name.clone(),
            resource_version: revision,
        };
        Client::new(channel).delete_device(request).await.map(drop)
    }

    async fn watch(channel: Channel, scope: &Scope, revision: u64) -> Result<Events<Self>, Status> {
        let request = WatchDevicesRequest {
            network: scope.network.clone(),
            namespace: scope.namespace.clone(),
            label_selector: scope.selector.clone(),
            resource_version: revision,
        };
        let stream = Client::new(channel).watch_devices(request).await?.into_inner();
        Ok(events(stream, |r| Event { event: r.r#type(), object: r.device, revision: r.resource_version }))
    }
}

/// Pending, Revoked, or, once registered, Online or Offline; of a host without an agent, Proxied or Unreachable.
fn status_word(device: &Device, status: &DeviceStatus) -> String {
    let revoked = device.spec.as_ref().is_some_and(|s| s.revoked);
    match status.phase.as_str() {
        _ if revoked => "Revoked".into(),
        "Registered" if status.online => "Online".into(),
        "Registered" => "Offline".into(),
        "" => "Pending".into(),
        phase => phase.to_owned(),
    }
}

/// What a device has to do with hosts without an agent and subnets; nothing for most.
fn describe_site(device: &Device, description: &mut Description) {
    let status = device.status.clone().unwrap_or_default();
    if !status.proxied_by.is_empty() {
        description.value("Spoken for by", &status.proxied_by);
        description.value("LAN address", &status.lan_address);
    }
    let approved = Carried::approved(device);
    if approved.hosts || !status.proxied_hosts.is_empty() {
        description.value("May speak for hosts", if approved.hosts { "yes" } else { "no, not approved" });
        description.values("Speaks for", status.proxied_hosts.iter().map(host));
    }
    let idle = approved.without(&Carried::offered(device)).subnets;
    let state = |subnet: &String| match approved.subnets.contains(subnet) {
        _ if status.active_subnets.contains(subnet) => format!("{subnet}, active"),
        true => format!("{subnet}, standby"),
        false => format!("{subnet}, not approved"),
    };
    let offered = status.offered_subnets.iter().map(state);
    let all: Vec<_> = offered.chain(idle.iter().map(|s| format!("{s}, approved but not offered"))).collect();
    if !all.is_empty() {
        description.values("Subnets", all);
    }
}

/// As directors see it; registrars before they had a list told the first one.
fn reflexive(status: &DeviceStatus) -> &[Endpoint] {
    match &*status.reflexive_endpoints {
        [] => status.reflexive_endpoint.as_slice(),
        all => all,
    }
}

/// As `muster-agent status` writes it.
const fn cipher(cipher: TransportCipher) -> Option<&'static str> {
    match cipher {
        TransportCipher::Unspecified => None,
        TransportCipher::Aes256Gcm => Some("aes-256-gcm"),
    }
}

/// `address:port`.
pub(super) fn endpoint(endpoint: &Endpoint) -> String {
    socket_address(&endpoint.address, endpoint.port)
}

/// `address:port`, with brackets around IPv6.
pub(super) fn socket_address(address: &str, port: u32) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(json: &str) -> String {
        let device: Device = serde_json::from_str(json).unwrap();
        let mut description = Description::default();
        device.describe(&mut description, Timestamp::default());
        description.render()
    }

    #[test]
    fn what_a_device_carries_is_described_with_its_state() {
        let text = described(
            r#"{"spec":{"subnets":["10.1.0.0/24","10.2.0.0/24","10.9.0.0/24"]},
                "status":{"phase":"Registered","online":true,
                "proxiedHosts":[{"name":"printer","lanAddress":"10.1.0.9"},{"name":"tv","lanAddress":"10.1.0.8"}],
                "offeredSubnets":["10.1.0.0/24","10.2.0.0/24","10.3.0.0/24"],"activeSubnets":["10.1.0.0/24"]}}"#,
        );
        let lines = "\
May speak for hosts:  no, not approved
Speaks for:           printer (10.1.0.9)
                      tv (10.1.0.8)
Subnets:              10.1.0.0/24, active
                      10.2.0.0/24, standby
                      10.3.0.0/24, not approved
                      10.9.0.0/24, approved but not offered
";
        assert!(text.contains(lines), "{text}");
        let text = described(r#"{"spec":{"mayProxy":true},"status":{"phase":"Registered"}}"#);
        assert!(text.contains("May speak for hosts:  yes\nSpeaks for:           <none>\n"), "{text}");
    }

    #[test]
    fn hosts_without_an_agent_are_described_by_who_speaks_for_them() {
        let words = |json: &str| described(json).split_whitespace().collect::<Vec<_>>().join(" ");
        let text = words(
            r#"{"status":{"phase":"Proxied","online":true,"proxiedBy":"gate","lanAddress":"10.1.0.9"}}"#,
        );
        assert!(text.starts_with("Status: Proxied Virtual"), "{text}");
        assert!(text.contains("Spoken for by: gate LAN address: 10.1.0.9 "), "{text}");
        let text = words(r#"{"status":{"phase":"Unreachable","proxiedBy":"gate"}}"#);
        assert!(text.starts_with("Status: Unreachable Virtual"), "{text}");
        assert!(text.contains("LAN address: <none>"), "{text}");
        let ordinary = words(r#"{"status":{"phase":"Registered"}}"#);
        for key in ["hosts:", "Speaks", "Subnets", "Spoken", "LAN"] {
            assert!(!ordinary.contains(key), "{ordinary}");
        }
    }
}
