//! Devices, for operators.

use std::sync::Arc;

use muster_common::{labels::Labels, time::Timestamp};
use muster_proto::admin::{
    CreateDeviceRequest, CreateDeviceResponse, DeleteDeviceRequest, DeleteDeviceResponse, Device, EventType,
    GetDeviceRequest, GetDeviceResponse, ListDevicesRequest, ListDevicesResponse, UpdateDeviceRequest,
    UpdateDeviceResponse, WatchDevicesRequest, WatchDevicesResponse, device_service_server::DeviceService,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    Api,
    object::{Events, Object},
    random_uid,
    status::status,
    watch::Versions,
};
use crate::{
    registry::{self, Change, index::NetworkState, plan::device as plan},
    store::Revision,
};

#[derive(Debug)]
pub(super) struct Devices(pub(super) Arc<Api>);

impl Devices {
    fn show(&self, device: &registry::Device) -> Device {
        show(&self.0, device)
    }

    /// The device that has just been written.
    fn written(&self, network: &str, uid: Uuid) -> Result<Device, Status> {
        let found = self.0.registry.read().device(network, uid).cloned();
        let gone = || Status::aborted("the device was deleted at the same time");
        found.map(|device| self.show(&device)).ok_or_else(gone)
    }
}

/// `device` as operators see it: with the names of its directors and of the device that speaks for it.
fn show(api: &Api, device: &registry::Device) -> Device {
    let mut shown = device.to_proto(api.hub.is_online(device.uid));
    if device.home().or(device.second()).is_none() && device.site.is_none() {
        return shown;
    }
    let index = api.registry.read();
    let (Some(status), Some(state)) = (shown.status.as_mut(), index.network(&device.network)) else {
        return shown;
    };
    let name = |uid: Option<Uuid>| {
        let director = uid.and_then(|uid| state.directors.by_uid(uid));
        director.map(|director| director.name.to_string()).unwrap_or_default()
    };
    (status.home_director, status.second_director) = (name(device.home()), name(device.second()));
    status.active_subnets = state.active_subnets(device).iter().map(ToString::to_string).collect();
    if let Some(by) = device.proxied_by() {
        // Of a device that is gone, its uid says more than nothing.
        if let Some(agent) = state.devices.by_uid(by) {
            status.proxied_by = agent.name.to_string();
            status.online = api.hub.is_online(by);
        }
        let lan_address = state.proxy_of(device).map(|(_, lan_address)| lan_address.to_string());
        if !device.revoked {
            status.phase = if lan_address.is_some() { "Proxied" } else { "Unreachable" }.to_owned();
        }
        status.lan_address = lan_address.unwrap_or_default();
    }
    shown
}

fn network_of(device: &Device) -> String {
    device.metadata.as_ref().map(|meta| meta.network.clone()).unwrap_or_default()
}

#[tonic::async_trait]
impl DeviceService for Devices {
    type WatchDevicesStream = Events<WatchDevicesResponse>;

    async fn get_device(
        &self,
        request: Request<GetDeviceRequest>,
    ) -> Result<Response<GetDeviceResponse>, Status> {
        self.0.operator(&request)?;
        let GetDeviceRequest { network, name } = request.into_inner();
        let device = plan::get(&self.0.registry.read(), &network, &name).map_err(status)?.clone();
        Ok(Response::new(GetDeviceResponse { device: Some(self.show(&device)) }))
    }

    async fn list_devices(
        &self,
        request: Request<ListDevicesRequest>,
    ) -> Result<Response<ListDevicesResponse>, Status> {
        self.0.operator(&request)?;
        let ListDevicesRequest { network, namespace, options } = request.into_inner();
        let listed = self.0.list::<registry::Device>(&network, &namespace, options)?;
        Ok(Response::new(ListDevicesResponse {
            devices: listed.objects.iter().map(|device| self.show(device)).collect(),
            next_page_token: listed.next_page_token,
            resource_version: listed.revision,
        }))
    }

    async fn create_device(
        &self,
        request: Request<CreateDeviceRequest>,
    ) -> Result<Response<CreateDeviceResponse>, Status> {
        self.0.operator(&request)?;
        let device = request.into_inner().device.unwrap_or_default();
        let (uid, now) = (random_uid(), Timestamp::now());
        let created = self.0.registry.commit(|index, _| plan::create(index, &device, uid, now)).await;
        let uid = created.map_err(status)?;
        Ok(Response::new(CreateDeviceResponse { device: Some(self.written(&network_of(&device), uid)?) }))
    }

    async fn update_device(
        &self,
        request: Request<UpdateDeviceRequest>,
    ) -> Result<Response<UpdateDeviceResponse>, Status> {
        self.0.operator(&request)?;
        let UpdateDeviceRequest { device, update_mask: mask } = request.into_inner();
        let device = device.unwrap_or_default();
        let updated = self.0.registry.commit(|index, _| plan::update(index, &device, mask.as_ref())).await;
        let uid = updated.map_err(status)?;
        self.0.settle(&network_of(&device), uid).await;
        let written = self.written(&network_of(&device), uid)?;
        if written.spec.as_ref().is_some_and(|spec| spec.revoked) {
            tracing::info!(%uid, "device is revoked");
        }
        Ok(Response::new(UpdateDeviceResponse { device: Some(written) }))
    }

    async fn delete_device(
        &self,
        request: Request<DeleteDeviceRequest>,
    ) -> Result<Response<DeleteDeviceResponse>, Status> {
        self.0.operator(&request)?;
        let DeleteDeviceRequest { network, name, resource_version } = request.into_inner();
        let now = Timestamp::now();
        self.0
            .registry
            .commit(|index, _| plan::delete(index, &network, &name, resource_version, now))
            .await
            .map_err(status)?;
        tracing::info!(network, name, "device deleted");
        Ok(Response::new(DeleteDeviceResponse {}))
    }

    async fn watch_devices(
        &self,
        request: Request<WatchDevicesRequest>,
    ) -> Result<Response<Self::WatchDevicesStream>, Status> {
        self.0.operator(&request)?;
        let WatchDevicesRequest { network, namespace, label_selector, resource_version } =
            request.into_inner();
        Ok(Response::new(
            self.0.watch::<registry::Device>(network, namespace, &label_selector, resource_version).await?,
        ))
    }
}

impl Object for registry::Device {
    type Response = WatchDevicesResponse;

    fn after(state: &NetworkState, after: &str, limit: usize) -> Vec<Arc<Self>> {
        state.devices.after(after).take(limit).cloned().collect()
    }

    fn of(change: &Change) -> Option<Versions<'_, Self>> {
        let Change::Device { old, new } = change else { return None };
        Some((old.as_ref(), new.as_ref()))
    }

    fn network(&self) -> &str {
        &self.network
    }

    fn namespace(&self) -> &str {
        &self.namespace
    }

    fn key(&self) -> &str {
        &self.name
    }

    fn labels(&self) -> &Labels {
        self.labels()
    }

    fn revision(&self) -> Revision {
        self.revision
    }

    fn response(
        api: &Api,
        event: EventType,
        device: Option<&Self>,
        revision: Revision,
    ) -> WatchDevicesResponse {
        WatchDevicesResponse {
            r#type: event.into(),
            device: device.map(|device| show(api, device)),
            resource_version: revision,
        }
    }
}
