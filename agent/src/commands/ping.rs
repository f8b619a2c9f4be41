//! `muster-agent ping`.

use std::time::Duration;

use clap::Args;
use muster_proto::{
    admin::Endpoint,
    agent::{PingRequest, PingResponse},
};

use super::{Output, client, print, print_json};
use crate::config::Config;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  muster-agent ping bob -c 2")]
pub(super) struct Arguments {
    /// Device name, name under the domain, or virtual address
    target: String,
    /// How many requests to send
    #[arg(short, long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// Seconds between requests
    #[arg(short, long, default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// Seconds to wait for each reply
    #[arg(short = 'W', long, default_value_t = 2.0, value_parser = seconds)]
    timeout: f64,
}

fn seconds(text: &str) -> Result<f64, String> {
    let range = 0.01..=60.0;
    match text.parse::<f64>() {
        Ok(value) if range.contains(&value) => Ok(value),
        _ => Err("write seconds, 0.01 to 60".into()),
    }
}

pub(super) async fn ping(config: &Config, arguments: Arguments, output: Output) -> anyhow::Result<()> {
    let Arguments { target, count, interval, timeout } = arguments;
    let proto = |seconds: f64| Some(from_std(Duration::from_secs_f64(seconds)));
    let request =
        PingRequest { target: target.clone(), count, interval: proto(interval), timeout: proto(timeout) };
    let mut agent = client::connect(&config.socket).await?;
    let answer = agent.ping(request).await.map_err(|status| client::refused(&status))?;
    let mut stream = answer.into_inner();
    let mut times = Vec::new();
    let mut sent = 0;
    while let Some(response) = stream.message().await.map_err(|status| client::refused(&status))? {
        sent += 1;
        times.extend(response.round_trip.as_ref().map(to_std));
        match output {
            Output::Json => print_json(&response)?,
            Output::Text => print(&line(&response, &target))?,
        }
    }
    if output == Output::Text {
        print(&summary(sent, &times))?;
    }
    anyhow::ensure!(
        !times.is_empty(),
        "{target} does not answer\nremedy: is its agent running? `muster get device` tells the operator whether it is online"
    );
    Ok(())
}

fn line(response: &PingResponse, target: &str) -> String {
    let PingResponse { sequence, address, round_trip, path, endpoint, name, director } = response;
    let who = if name.is_empty() { target.to_owned() } else { format!("{name} ({address})") };
    match round_trip {
        None => format!("no reply from {who}: seq={sequence}\n"),
        Some(time) => {
            let via = match endpoint {
                _ if !director.is_empty() => format!(" via {director}"),
                Some(endpoint) => format!(" via {}", show(endpoint)),
                None => String::new(),
            };
            format!("reply from {who}: seq={sequence} time={} path={path}{via}\n", milliseconds(to_std(time)))
        }
    }
}

fn summary(sent: u32, times: &[Duration]) -> String {
    let received = times.len();
    let (Some(least), Some(most)) = (times.iter().min(), times.iter().max()) else {
        return format!("{sent} sent, 0 received\n");
    };
    let mean = times.iter().sum::<Duration>() / u32::try_from(received).unwrap_or(u32::MAX);
    let [least, mean, most] = [*least, mean, *most].map(milliseconds);
    format!("{sent} sent, {received} received; round trip least {least}, mean {mean}, most {most}\n")
}

pub(super) fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1000.0)
}

/// `address:port`, IPv6 in brackets.
pub(super) fn show(endpoint: &Endpoint) -> String {
    let Endpoint { address, port } = endpoint;
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// From the API's form.
pub(super) fn to_std(duration: &pbjson_types::Duration) -> Duration {
    let nanos = u64::try_from(duration.nanos).unwrap_or(0);
    Duration::from_secs(u64::try_from(duration.seconds).unwrap_or(0)) + Duration::from_nanos(nanos)
}

fn from_std(duration: Duration) -> pbjson_types::Duration {
    pbjson_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_tell_time_and_path() {
        let reply = PingResponse {
            sequence: 2,
            address: "100.64.1.2".into(),
            round_trip: Some(from_std(Duration::from_micros(1_234))),
            path: "direct".into(),
            endpoint: Some(Endpoint { address: "2001:db8::1".into(), port: 7551 }),
            name: "bob.net.example".into(),
            director: String::new(),
        };
        assert_eq!(
            line(&reply, "bob"),
            "reply from bob.net.example (100.64.1.2): seq=2 time=1.23 ms path=direct via [2001:db8::1]:7551\n"
        );
        let times = [Duration::from_millis(1), Duration::from_millis(3)];
        assert_eq!(
            summary(3, &times),
            "3 sent, 2 received; round trip least 1.00 ms, mean 2.00 ms, most 3.00 ms\n"
        );
    }
}
