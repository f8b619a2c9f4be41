//! Devices, for operators.

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
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
    list::{Page, selector},
    random_uid,
    status::status,
    watch::{self, Kind, Versions},
};
use crate::{
    registry::{
        self, Change, Index,
        plan::{AdminError, device as plan},
    },
    store::Revision,
};

#[derive(Debug)]
pub(super) struct Devices(pub(super) Arc<Api>);

impl Devices {
    fn show(&self, device: &registry::Device) -> Device {
        device.to_proto(self.0.hub.is_online(device.uid))
    }

    /// The device that has just been written.
    fn written(&self, network: &str, uid: Uuid) -> Result<Device, Status> {
        let found = self.0.registry.read().device(network, uid).cloned();
        let gone = || Status::aborted("the device was deleted at the same time");
        found.map(|device| self.show(&device)).ok_or_else(gone)
    }

    fn check_network(&self, network: &str) -> Result<(), Status> {
        if self.0.registry.read().network(network).is_some() {
            return Ok(());
        }
        let name = network.chars().take(80).collect();
        Err(status(AdminError::NotFound { kind: "network", name }))
    }
}

fn network_of(device: &Device) -> String {
    device.metadata.as_ref().map(|meta| meta.network.clone()).unwrap_or_default()
}

#[tonic::async_trait]
impl DeviceService for Devices {
    type WatchDevicesStream = Pin<Box<dyn Stream<Item = Result<WatchDevicesResponse, Status>> + Send>>;

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
        self.check_network(&network)?;
        let registry = &self.0.registry;
        let page = Page::new(options, registry.read().revision())?;
        let after = |after: &str, limit: usize| -> Vec<Arc<registry::Device>> {
            let index = registry.read();
            let devices = index.network(&network).into_iter().flat_map(|state| state.devices.after(after));
            devices.take(limit).cloned().collect()
        };
        let matches =
            |device: &Arc<registry::Device>| namespace.is_empty() || *device.namespace == *namespace;
        let (found, next_page_token) =
            page.collect(after, |device| &device.name, matches, |device| device.labels());
        let devices = found.iter().map(|device| self.show(device)).collect();
        Ok(Response::new(ListDevicesResponse { devices, next_page_token, resource_version: page.revision }))
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
        self.check_network(&network)?;
        let selector = selector("label_selector", &label_selector)?;
        let kind = Watched { network, namespace };
        let stream = watch::start(self.0.clone(), kind, selector, resource_version).await?;
        Ok(Response::new(Box::pin(stream)))
    }
}

struct Watched {
    network: String,
    namespace: String,
}

impl Kind for Watched {
    type Object = registry::Device;
    type Response = WatchDevicesResponse;

    fn after(&self, index: &Index, after: &str, limit: usize) -> Vec<Arc<registry::Device>> {
        let devices = index.network(&self.network).into_iter().flat_map(|state| state.devices.after(after));
        devices.take(limit).cloned().collect()
    }

    fn of(change: &Change) -> Option<Versions<'_, registry::Device>> {
        let Change::Device { old, new } = change else { return None };
        Some((old.as_ref(), new.as_ref()))
    }

    fn includes(&self, device: &registry::Device) -> bool {
        *device.network == *self.network
            && (self.namespace.is_empty() || *device.namespace == *self.namespace)
    }

    fn name(device: &registry::Device) -> &str {
        &device.name
    }

    fn labels(device: &registry::Device) -> &Labels {
        device.labels()
    }

    fn revision(device: &registry::Device) -> Revision {
        device.revision
    }

    fn response(
        &self,
        api: &Api,
        event: EventType,
        device: Option<&registry::Device>,
        revision: Revision,
    ) -> WatchDevicesResponse {
        WatchDevicesResponse {
            r#type: event.into(),
            device: device.map(|device| device.to_proto(api.hub.is_online(device.uid))),
            resource_version: revision,
        }
    }
}
