//! How soon a change is seen: a device tells of another endpoint, and one asks DNS until the answer has it.

use std::{net::UdpSocket, time::Duration};

use muster_common::time::Instant;
use muster_integration_tests::{
    device::{Device, Error, register_request},
    figures::quantile,
    muster::JoinCommand,
};
use muster_proto::registration::RegisterRequest;

use crate::{REGISTRAR, ROUNDS};

/// Changes in a round: a device may not write as often as it likes.
const CHANGES: u32 = 40;
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(50);

/// A line a round: median and 99th percentile in milliseconds, from the request and from its acknowledgement.
pub(crate) fn run(join: &[&str]) -> Result<(), Error> {
    let join = JoinCommand(join.iter().map(|a| (*a).to_owned()).collect());
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(REGISTRAR)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        for round in 0..ROUNDS as u64 {
            let name = format!("changing{round}");
            let mut client = Device::join(&join, &name).await?.connect().await?;
            let (mut from_request, mut from_answer) = (Vec::new(), Vec::new());
            for change in 0..CHANGES {
                let request = register_request(9_000_000 + round, change);
                let wanted = address(&request)?;
                let started = Instant::now();
                client.register(request).await?;
                let acknowledged = Instant::now();
                while !shows(&socket, &name, wanted)? {}
                let now = Instant::now();
                from_request.push(now - started);
                from_answer.push(now - acknowledged);
                tokio::time::sleep(PAUSE).await;
            }
            let milli = |samples: &mut [Duration], q| quantile(samples, q).as_secs_f64() * 1e3;
            println!(
                "{} {} {} {}",
                milli(&mut from_request, 0.5),
                milli(&mut from_request, 0.99),
                milli(&mut from_answer, 0.5),
                milli(&mut from_answer, 0.99)
            );
        }
        Ok(())
    })
}

fn address(request: &RegisterRequest) -> Result<[u8; 4], Error> {
    let endpoint = request.private_endpoints.first().ok_or("a registration without endpoint")?;
    Ok(endpoint.address.parse::<std::net::Ipv4Addr>()?.octets())
}

/// Whether the answer for `name` has `address` in it.
fn shows(socket: &UdpSocket, name: &str, address: [u8; 4]) -> Result<bool, Error> {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for part in [name].into_iter().chain(crate::DOMAIN.split('.')) {
        query.push(u8::try_from(part.len())?);
        query.extend_from_slice(part.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    socket.send(&query)?;
    let mut answer = [0; 1500];
    let length = socket.recv(&mut answer)?;
    let records = answer.get(query.len()..length).unwrap_or_default();
    Ok(records.windows(4).any(|window| window == address))
}
