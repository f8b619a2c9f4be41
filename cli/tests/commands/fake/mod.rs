//! A registrar's admin API in memory: devices in full, tokens as far as creating them. Pages are short, so that
//! every list takes several.

mod directors;
mod kubernetes;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use muster_cli::client::Client;
use muster_common::labels::Selector;
use muster_proto::admin::{
    device_service_server::{DeviceService, DeviceServiceServer},
    token_service_server::{TokenService, TokenServiceServer},
    *,
};
use tokio::{net::TcpListener, sync::broadcast};
use tokio_stream::wrappers::{BroadcastStream, TcpListenerStream};
use tonic::{Request, Response, Status, transport::Endpoint};

const PAGE: usize = 2;

#[derive(Default)]
struct State {
    devices: BTreeMap<String, Device>,
    directors: Vec<Director>,
    revision: u64,
    /// Updates to answer with a conflict first.
    conflicts: u32,
    /// A subnet that is approved for a device just before the next update of it.
    interference: Option<String>,
    objects: kubernetes::Objects,
}

/// The fake, shared with its server.
#[derive(Clone)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<WatchDevicesResponse>,
}

impl Fake {
    /// Starts a server on loopback; returns it with a client of it.
    pub(crate) async fn start() -> (Self, Client) {
        let fake = Self { state: Arc::default(), events: broadcast::channel(64).0 };
        fake.state.lock().unwrap().directors = directors::initial();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tonic::transport::Server::builder()
            .add_service(DeviceServiceServer::new(fake.clone()))
            .add_service(director_service_server::DirectorServiceServer::new(fake.clone()))
            .add_service(TokenServiceServer::new(fake.clone()))
            .add_service(namespace_service_server::NamespaceServiceServer::new(fake.clone()))
            .add_service(service_service_server::ServiceServiceServer::new(fake.clone()))
            .add_service(endpoint_slice_service_server::EndpointSliceServiceServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        (fake, Client::new(channel, address, "net".into(), Duration::from_secs(10)))
    }

    /// The next `count` updates are told that the object has changed.
    pub(crate) fn conflict(&self, count: u32) {
        self.state.lock().unwrap().conflicts = count;
    }

    /// Objects of Kubernetes' kinds with `name` are refused from now on.
    pub(crate) fn refuse(&self, name: &str) {
        self.state.lock().unwrap().objects.refused.push(name.into());
    }

    /// Names of the namespaces, Services and EndpointSlices that there are.
    pub(crate) fn objects(&self) -> Vec<String> {
        let objects = &self.state.lock().unwrap().objects;
        let keys = objects.namespaces.keys().chain(objects.services.keys()).chain(objects.slices.keys());
        keys.map(|(namespace, name)| format!("{namespace}/{name}")).collect()
    }

    /// A device as it is now.
    pub(crate) fn device(&self, name: &str) -> Option<Device> {
        self.state.lock().unwrap().devices.get(name).cloned()
    }

    /// `device` tells the registrar what it offers, and what it is: the registrar's next revision of it.
    pub(crate) fn told(&self, name: &str, status: DeviceStatus) {
        let mut state = self.state.lock().unwrap();
        let mut device = state.devices.get(name).cloned().unwrap();
        device.status = Some(status);
        self.put(&mut state, device, EventType::Modified);
    }

    /// Just before the next update, another operator approves `subnet` for the device that it is about.
    pub(crate) fn interfere(&self, subnet: &str) {
        self.state.lock().unwrap().interference = Some(subnet.into());
    }

    /// What operators want of a director.
    pub(crate) fn director(&self, name: &str) -> Option<DirectorSpec> {
        let state = self.state.lock().unwrap();
        let found =
            state.directors.iter().find(|one| one.metadata.as_ref().is_some_and(|meta| meta.name == name));
        found.and_then(|director| director.spec)
    }

    /// Whether somebody watches.
    pub(crate) fn is_watched(&self) -> bool {
        self.events.receiver_count() > 0
    }

    fn put(&self, state: &mut State, mut device: Device, event: EventType) -> Device {
        state.revision += 1;
        let meta = device.metadata.get_or_insert_default();
        meta.resource_version = state.revision;
        let name = meta.name.clone();
        if event == EventType::Deleted {
            state.devices.remove(&name);
        } else {
            state.devices.insert(name, device.clone());
        }
        let _ = self.events.send(WatchDevicesResponse {
            r#type: event.into(),
            device: Some(device.clone()),
            resource_version: state.revision,
        });
        device
    }
}

fn meta(device: &Device) -> &ObjectMeta {
    device.metadata.as_ref().unwrap()
}

#[tonic::async_trait]
impl DeviceService for Fake {
    type WatchDevicesStream = stream::BoxStream<'static, Result<WatchDevicesResponse, Status>>;

    async fn get_device(
        &self,
        request: Request<GetDeviceRequest>,
    ) -> Result<Response<GetDeviceResponse>, Status> {
        let device =
            self.device(&request.into_inner().name).ok_or_else(|| Status::not_found("no such device"))?;
        Ok(Response::new(GetDeviceResponse { device: Some(device) }))
    }

    async fn list_devices(
        &self,
        request: Request<ListDevicesRequest>,
    ) -> Result<Response<ListDevicesResponse>, Status> {
        let request = request.into_inner();
        if request.network != "net" {
            return Err(Status::not_found(format!("network {:?} does not exist", request.network)));
        }
        let options = request.options.unwrap_or_default();
        let selector: Selector = options.label_selector.parse().unwrap();
        let state = self.state.lock().unwrap();
        let mut found = state.devices.values().filter(|device| {
            let meta = meta(device);
            (request.namespace.is_empty() || meta.namespace == request.namespace)
                && selector.matches(&meta.labels)
                && meta.name > options.page_token
        });
        let devices: Vec<_> = found.by_ref().take(PAGE).cloned().collect();
        let more = found.next().is_some();
        let last = devices.last().filter(|_| more).map(|device| meta(device).name.clone());
        Ok(Response::new(ListDevicesResponse {
            devices,
            next_page_token: last.unwrap_or_default(),
            resource_version: state.revision,
        }))
    }

    async fn create_device(
        &self,
        request: Request<CreateDeviceRequest>,
    ) -> Result<Response<CreateDeviceResponse>, Status> {
        let device = request.into_inner().device.unwrap();
        let mut state = self.state.lock().unwrap();
        if state.devices.contains_key(&meta(&device).name) {
            return Err(Status::already_exists("the name is taken"));
        }
        Ok(Response::new(CreateDeviceResponse {
            device: Some(self.put(&mut state, device, EventType::Added)),
        }))
    }

    async fn update_device(
        &self,
        request: Request<UpdateDeviceRequest>,
    ) -> Result<Response<UpdateDeviceResponse>, Status> {
        let UpdateDeviceRequest { device, update_mask } = request.into_inner();
        let wanted = device.unwrap();
        let mut state = self.state.lock().unwrap();
        let Some(mut device) = state.devices.get(&meta(&wanted).name).cloned() else {
            return Err(Status::not_found("no such device"));
        };
        if let Some(subnet) = state.interference.take() {
            device.spec.get_or_insert_default().subnets.push(subnet);
            device = self.put(&mut state, device, EventType::Modified);
        }
        let seen = meta(&wanted).resource_version;
        if state.conflicts > 0 || (seen > 0 && seen != meta(&device).resource_version) {
            state.conflicts = state.conflicts.saturating_sub(1);
            return Err(Status::aborted("it has changed"));
        }
        for path in update_mask.unwrap_or_default().paths {
            match path.as_str() {
                "metadata.labels" => {
                    device.metadata.as_mut().unwrap().labels = meta(&wanted).labels.clone();
                }
                "metadata.annotations" => {
                    device.metadata.as_mut().unwrap().annotations = meta(&wanted).annotations.clone();
                }
                "spec.revoked" => {
                    device.spec.get_or_insert_default().revoked =
                        wanted.spec.as_ref().is_some_and(|spec| spec.revoked);
                }
                "spec.may_proxy" => {
                    device.spec.get_or_insert_default().may_proxy =
                        wanted.spec.as_ref().is_some_and(|spec| spec.may_proxy);
                }
                "spec.subnets" => {
                    let mut subnets = wanted.spec.clone().unwrap_or_default().subnets;
                    subnets.sort();
                    device.spec.get_or_insert_default().subnets = subnets;
                }
                path => return Err(Status::invalid_argument(format!("{path} cannot be changed"))),
            }
        }
        Ok(Response::new(UpdateDeviceResponse {
            device: Some(self.put(&mut state, device, EventType::Modified)),
        }))
    }

    async fn delete_device(
        &self,
        request: Request<DeleteDeviceRequest>,
    ) -> Result<Response<DeleteDeviceResponse>, Status> {
        let mut state = self.state.lock().unwrap();
        let Some(device) = state.devices.get(&request.into_inner().name).cloned() else {
            return Err(Status::not_found("no such device"));
        };
        self.put(&mut state, device, EventType::Deleted);
        Ok(Response::new(DeleteDeviceResponse {}))
    }

    async fn watch_devices(
        &self,
        _: Request<WatchDevicesRequest>,
    ) -> Result<Response<Self::WatchDevicesStream>, Status> {
        let events = BroadcastStream::new(self.events.subscribe());
        Ok(Response::new(events.map(|event| event.map_err(|e| Status::internal(e.to_string()))).boxed()))
    }
}

#[tonic::async_trait]
impl TokenService for Fake {
    type WatchTokensStream = stream::BoxStream<'static, Result<WatchTokensResponse, Status>>;

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let mut token = request.into_inner().token.unwrap();
        token.metadata.get_or_insert_default().name = "k3v9".into();
        Ok(Response::new(CreateTokenResponse {
            token: Some(token),
            secret: "muster.k3v9.secret".into(),
            join_command: "muster-agent join --token muster.k3v9.secret".into(),
        }))
    }

    async fn get_token(&self, _: Request<GetTokenRequest>) -> Result<Response<GetTokenResponse>, Status> {
        Err(Status::permission_denied("operator alice may not"))
    }

    async fn list_tokens(
        &self,
        _: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        Err(Status::unauthenticated("no certificate"))
    }

    async fn update_token(
        &self,
        _: Request<UpdateTokenRequest>,
    ) -> Result<Response<UpdateTokenResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_token(
        &self,
        _: Request<DeleteTokenRequest>,
    ) -> Result<Response<DeleteTokenResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn watch_tokens(
        &self,
        _: Request<WatchTokensRequest>,
    ) -> Result<Response<Self::WatchTokensStream>, Status> {
        Err(Status::unimplemented(""))
    }
}
