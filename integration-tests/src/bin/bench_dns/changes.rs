//! How soon a change is seen: a device tells of another endpoint, an operator changes a Service's endpoints or creates
//! a Service, and one asks DNS until the answer has it.

use std::{
    net::{Ipv4Addr, UdpSocket},
    path::Path,
    time::Duration,
};

use muster_common::time::Instant;
use muster_integration_tests::{
    device::{Device, Error, operator, register_request},
    figures::quantile,
    muster::JoinCommand,
    population,
};
use muster_proto::{
    admin::{
        CreateServiceRequest, EndpointSlice, ObjectMeta, Service, ServicePort, ServiceSpec,
        UpdateEndpointSliceRequest, endpoint_slice_service_client::EndpointSliceServiceClient,
        service_service_client::ServiceServiceClient,
    },
    registration::RegisterRequest,
};

use crate::{REGISTRAR, ROUNDS, SERVICES};

/// Changes of each kind in a round: a device may not write as often as it likes.
const CHANGES: u32 = 60;
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(50);
const NETWORK: &str = "default";

/// How long the changes of one kind took to be seen.
#[derive(Default)]
struct Times {
    from_request: Vec<Duration>,
    from_acknowledgement: Vec<Duration>,
}

/// A line for each kind of change, devices', endpoints', and new Services, in milliseconds: median, 99th percentile and
/// longest from the request, median and 99th percentile from its acknowledgement.
pub(crate) fn run(credential: &str, join: &[&str]) -> Result<(), Error> {
    let join = JoinCommand(join.iter().map(|a| (*a).to_owned()).collect());
    let dns = Dns::connect()?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let operator = operator(Path::new(credential)).await?;
        let mut slices = EndpointSliceServiceClient::new(operator.clone());
        let mut services = ServiceServiceClient::new(operator);
        let [mut of_devices, mut of_endpoints, mut of_services] = [const { Times::new() }; 3];
        for round in 0..u32::try_from(ROUNDS)? {
            let name = format!("changing{round}");
            let mut device = Device::join(&join, &name).await?.connect().await?;
            for change in 0..CHANGES {
                let number = round * CHANGES + change;

                let request = register_request(9_000_000 + u64::from(round), change);
                let wanted = address(&request)?;
                let has_it = |answer: &[u8]| has(answer, wanted);
                of_devices.measure(device.register(request), &dns, &name, has_it).await?;
                tokio::time::sleep(PAUSE).await;

                let (name, request, wanted) = other_endpoint(number);
                let has_it = |answer: &[u8]| has(answer, wanted);
                of_endpoints.measure(slices.update_endpoint_slice(request), &dns, &name, has_it).await?;
                tokio::time::sleep(PAUSE).await;

                let (name, request) = new_service(number);
                of_services.measure(services.create_service(request), &dns, &name, has_records).await?;
                tokio::time::sleep(PAUSE).await;
            }
        }
        for times in [of_devices, of_endpoints, of_services] {
            times.print();
        }
        Ok(())
    })
}

impl Times {
    const fn new() -> Self {
        Self { from_request: Vec::new(), from_acknowledgement: Vec::new() }
    }

    /// Makes the change that `request` asks for, and waits until the answer for `name` is as `wanted`.
    async fn measure<T>(
        &mut self,
        request: impl Future<Output = Result<T, tonic::Status>>,
        dns: &Dns,
        name: &str,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<(), Error> {
        let query = query(name)?;
        if wanted(&dns.ask(&query)?) {
            return Err(format!("the answer for {name} shows the change before it is made").into());
        }
        let started = Instant::now();
        request.await?;
        let acknowledged = Instant::now();
        while !wanted(&dns.ask(&query)?) {}
        let now = Instant::now();
        self.from_request.push(now - started);
        self.from_acknowledgement.push(now - acknowledged);
        Ok(())
    }

    fn print(mut self) {
        let milli = |samples: &mut [Duration], q| quantile(samples, q).as_secs_f64() * 1e3;
        println!(
            "{} {} {} {} {}",
            milli(&mut self.from_request, 0.5),
            milli(&mut self.from_request, 0.99),
            milli(&mut self.from_request, 1.0),
            milli(&mut self.from_acknowledgement, 0.5),
            milli(&mut self.from_acknowledgement, 0.99)
        );
    }
}

/// One of the headless Services, with another address for each of its endpoints: its name in DNS, the request, and one
/// of the addresses.
fn other_endpoint(number: u32) -> (String, UpdateEndpointSliceRequest, [u8; 4]) {
    // All over the Services, each once.
    let mut headless = (0..SERVICES).filter(|service| population::is_headless(*service));
    let service = headless.nth(usize::try_from(number).unwrap_or(0) * 8).unwrap_or(0);
    let address = |endpoint: u32| Ipv4Addr::from(0x0AF0_0000 + number * population::ENDPOINTS + endpoint);
    let request = UpdateEndpointSliceRequest {
        endpoint_slice: Some(EndpointSlice {
            metadata: Some(meta(&format!("s{service}"))),
            address_type: "IPv4".into(),
            endpoints: population::service_endpoints((0..population::ENDPOINTS).map(address)),
            ports: Vec::new(),
        }),
        update_mask: Some(pbjson_types::FieldMask { paths: vec!["endpoints".into()] }),
        validate_only: false,
    };
    (format!("s{service}.default.svc"), request, address(0).octets())
}

/// A Service whose ClusterIP is found for it: its name in DNS, and the request.
fn new_service(number: u32) -> (String, CreateServiceRequest) {
    let service = Service {
        metadata: Some(meta(&format!("new{number}"))),
        spec: Some(ServiceSpec {
            ports: vec![ServicePort { name: "http".into(), port: 80, ..ServicePort::default() }],
            ..ServiceSpec::default()
        }),
        status: None,
    };
    let request = CreateServiceRequest { service: Some(service), validate_only: false };
    (format!("new{number}.default.svc"), request)
}

fn meta(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: name.to_owned(),
        namespace: "default".into(),
        network: NETWORK.into(),
        ..ObjectMeta::default()
    }
}

fn address(request: &RegisterRequest) -> Result<[u8; 4], Error> {
    let endpoint = request.private_endpoints.first().ok_or("a registration without endpoint")?;
    Ok(endpoint.address.parse::<Ipv4Addr>()?.octets())
}

/// A query for the A records of `name` in the network.
fn query(name: &str) -> Result<Vec<u8>, Error> {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for part in name.split('.').chain(crate::DOMAIN.split('.')) {
        query.push(u8::try_from(part.len())?);
        query.extend_from_slice(part.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    Ok(query)
}

/// The registrar's DNS, over UDP.
struct Dns(UdpSocket);

impl Dns {
    fn connect() -> Result<Self, Error> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(REGISTRAR)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self(socket))
    }

    /// The response to `query`.
    fn ask(&self, query: &[u8]) -> Result<Vec<u8>, Error> {
        self.0.send(query)?;
        let mut answer = vec![0; 1500];
        let length = self.0.recv(&mut answer)?;
        answer.truncate(length);
        Ok(answer)
    }
}

/// Whether `address` is among the records of `answer`.
fn has(answer: &[u8], address: [u8; 4]) -> bool {
    answer.windows(4).any(|window| window == address)
}

/// Whether `answer` has records of what was asked for.
fn has_records(answer: &[u8]) -> bool {
    answer.get(6..8).is_some_and(|count| count != [0, 0])
}
