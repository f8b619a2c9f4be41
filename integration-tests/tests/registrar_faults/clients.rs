//! Clients that write all the time: devices join, change, and leave, and an operator labels them. Each takes down what
//! was acknowledged.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use muster_integration_tests::{
    device::{self, Device, Error, register_request},
    muster::JoinCommand,
};
use muster_proto::{
    admin::{
        self, ListDevicesRequest, ListOptions, ObjectMeta, UpdateDeviceRequest,
        device_service_client::DeviceServiceClient,
    },
    registration::{DeregisterRequest, registration_service_client::RegistrationServiceClient},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tonic::{Code, Status, transport::Channel};

use crate::ledger::{Known, LABEL};

/// The network that `init` makes.
const NETWORK: &str = "default";
/// No registrar takes so long, unless it hangs.
const ANSWER: Duration = Duration::from_secs(30);
/// Between attempts while the registrar is away.
const AGAIN: Duration = Duration::from_millis(10);

/// What all clients share.
#[derive(Clone)]
pub(crate) struct Site {
    /// With a token that can be used many times.
    pub(crate) join: JoinCommand,
    pub(crate) credential: PathBuf,
}

/// A client with its devices, the same ones for as long as the test lasts.
pub(crate) struct Client {
    site: Site,
    rng: StdRng,
    places: Vec<Place>,
    operator: Option<DeviceServiceClient<Channel>>,
    /// Makes each value that is written a new one.
    next: u64,
    /// Writes that were acknowledged, and whose answer was lost.
    pub(crate) acknowledged: u64,
    pub(crate) lost: u64,
}

/// Where a device can be: the same name, time and again.
struct Place {
    known: Known,
    /// Of a join whose answer is missing: it is repeated with the same key.
    joining: Option<rcgen::KeyPair>,
    device: Option<Device>,
    connection: Option<RegistrationServiceClient<Channel>>,
    leaving: bool,
}

impl Client {
    /// The client with this `number`, of which nothing is there yet.
    pub(crate) fn new(site: Site, number: u64, places: u64, seed: u64) -> Self {
        let place = |place: u64| Place {
            known: Known::absent(format!("c{number}-{place}")),
            joining: None,
            device: None,
            connection: None,
            leaving: false,
        };
        Self {
            site,
            rng: StdRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(number)),
            places: (0..places).map(place).collect(),
            operator: None,
            next: number << 32,
            acknowledged: 0,
            lost: 0,
        }
    }

    /// All that it knows.
    pub(crate) fn known(&mut self) -> impl Iterator<Item = &mut Known> {
        self.places.iter_mut().map(|place| &mut place.known)
    }

    /// Writes until told to stop. An error is a refusal that there is no reason for: something was lost.
    pub(crate) async fn write(mut self, stop: Arc<AtomicBool>) -> Result<Self, Error> {
        while !stop.load(Ordering::Relaxed) {
            match self.step().await {
                Ok(()) => self.acknowledged += 1,
                Err(error) if is_away(&error) => {
                    self.lost += 1;
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(self)
    }

    async fn step(&mut self) -> Result<(), Error> {
        let at = self.rng.random_range(0..self.places.len());
        self.next += 1;
        let (value, chance) = (self.next, self.rng.random_range(0..100));
        let Some(place) = self.places.get_mut(at) else { return Ok(()) };
        if place.device.is_none() {
            return place.join(&self.site.join).await;
        }
        if place.leaving || chance < 8 {
            return place.leave().await;
        }
        if chance < 35 {
            let outcome = label(&mut self.operator, &self.site, &mut place.known, value).await;
            if outcome.is_err() {
                self.operator = None;
            }
            return outcome;
        }
        place.register(value, chance < 50).await
    }
}

impl Place {
    async fn join(&mut self, join: &JoinCommand) -> Result<(), Error> {
        let key = match self.joining.take() {
            Some(key) => key,
            None => rcgen::KeyPair::generate()?,
        };
        let key = self.joining.insert(key);
        self.known.present.ask(true);
        let request = rcgen::CertificateParams::default().serialize_request(key)?;
        let joined = Device::join_with(join, &self.known.name, key, request.der().to_vec());
        self.device = Some(answered(joined).await?);
        self.joining = None;
        self.known.present.is(true);
        Ok(())
    }

    /// Registers with another endpoint, and with another key if `rekey`.
    async fn register(&mut self, value: u64, rekey: bool) -> Result<(), Error> {
        let endpoint = u32::try_from(value & 0x00FF_FFFF)?;
        let key = match self.known.key.only() {
            Some(Some(key)) if !rekey => key,
            _ => value,
        };
        self.known.key.ask(Some(key));
        self.known.endpoint.ask(Some(endpoint));
        let registered = async {
            let request = register_request(key, endpoint);
            Ok::<_, Error>(self.connection().await?.register(request).await?.into_inner())
        };
        let outcome = answered(registered).await;
        if outcome.is_err() {
            self.connection = None;
        }
        let answer = outcome?;
        if answer.unsaved {
            return Err("what it tells is not kept".into());
        }
        let address = answer.config.unwrap_or_default().virtual_ipv4;
        if self.known.address.as_ref().is_some_and(|before| *before != address) {
            return Err(format!("another address, {address}, for {:?}", self.known).into());
        }
        self.known.address = Some(address);
        self.known.key.is(Some(key));
        self.known.endpoint.is(Some(endpoint));
        Ok(())
    }

    async fn leave(&mut self) -> Result<(), Error> {
        self.known.present.ask(false);
        let again = std::mem::replace(&mut self.leaving, true);
        let left = async { Ok::<_, Error>(self.connection().await?.deregister(DeregisterRequest {}).await?) };
        match answered(left).await {
            Ok(_) => {}
            // The answer was lost.
            Err(error) if again && code(&error) == Some(Code::PermissionDenied) => {}
            Err(error) => {
                self.connection = None;
                return Err(error);
            }
        }
        self.known = Known::absent(std::mem::take(&mut self.known.name));
        (self.device, self.connection, self.leaving) = (None, None, false);
        Ok(())
    }

    async fn connection(&mut self) -> Result<&mut RegistrationServiceClient<Channel>, Error> {
        if self.connection.is_none() {
            let device = self.device.as_ref().ok_or("it has not joined")?;
            self.connection = Some(device.connect().await?);
        }
        Ok(self.connection.as_mut().ok_or("it is connected")?)
    }
}

/// An operator sets the label of a device that is there.
pub(crate) async fn label(
    operator: &mut Option<DeviceServiceClient<Channel>>,
    site: &Site,
    known: &mut Known,
    value: u64,
) -> Result<(), Error> {
    known.label.ask(Some(value));
    let request = UpdateDeviceRequest {
        device: Some(admin::Device {
            metadata: Some(ObjectMeta {
                name: known.name.clone(),
                network: NETWORK.into(),
                labels: [(LABEL.to_owned(), value.to_string())].into(),
                ..ObjectMeta::default()
            }),
            ..admin::Device::default()
        }),
        update_mask: Some(pbjson_types::FieldMask { paths: vec!["metadata.labels".into()] }),
    };
    let updated = async {
        if operator.is_none() {
            *operator = Some(DeviceServiceClient::new(device::operator(&site.credential).await?));
        }
        let operator = operator.as_mut().ok_or("it is connected")?;
        Ok::<_, Error>(operator.update_device(request).await?)
    };
    answered(updated).await?;
    known.label.is(Some(value));
    Ok(())
}

/// All devices, as the registrar shows them to an operator.
pub(crate) async fn list(site: &Site) -> Result<Vec<admin::Device>, Error> {
    let mut operator = DeviceServiceClient::new(device::operator(&site.credential).await?);
    let mut devices = Vec::new();
    let mut page_token = String::new();
    loop {
        let options = ListOptions { page_size: 1000, page_token, ..ListOptions::default() };
        let request =
            ListDevicesRequest { network: NETWORK.into(), namespace: String::new(), options: Some(options) };
        let page = operator.list_devices(request).await?.into_inner();
        devices.extend(page.devices);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(devices);
        }
    }
}

/// What the registrar answers; to get none at all, not even that it is away, is a failure.
async fn answered<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let outcome = tokio::time::timeout(ANSWER, call).await;
    outcome.unwrap_or_else(|_| Err(Status::deadline_exceeded("the registrar hangs").into()))
}

pub(crate) fn code(error: &Error) -> Option<Code> {
    error.downcast_ref::<Status>().map(Status::code)
}

/// Whether the registrar was not there, or died before it answered; any other answer is a refusal.
fn is_away(error: &Error) -> bool {
    match code(error) {
        Some(code) => matches!(code, Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal),
        // From the connection.
        None => !error.to_string().starts_with("another address"),
    }
}
