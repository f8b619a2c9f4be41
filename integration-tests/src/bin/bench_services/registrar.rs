//! What a change of labels costs the registrar, on the store that it has by default.

use std::{sync::Arc, time::Duration};

use muster_common::{labels::Labels, time::Instant, time::Timestamp};
use muster_integration_tests::{
    LabError, Result,
    figures::{Figures, median},
};
use muster_proto::admin;
use muster_registrar::{
    registry::{
        Index, Registry,
        plan::{
            self,
            register::{Registration, register},
            service::Attempt,
        },
    },
    store::sqlite::SqliteStore,
};
use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;

/// Services that one device is put into, and out of, and the devices that each of them has beside it.
const SERVICES: u32 = 1000;
const DEVICES: u32 = 100;
const CHANGES: usize = 11;

pub(super) fn measure(figures: &mut Figures) -> Result {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| LabError::Command {
        command: "changing labels".into(),
        reason: error.to_string(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failed(error.into()))?;
    let (mut wall, mut cpu) = runtime.block_on(work()).map_err(failed)?;
    let what = format!("a label puts a device into {SERVICES} Services of {DEVICES}");
    figures.report(&format!("registrar: {what}, until it is shown"), median(&mut wall), "ms");
    figures.report(&format!("registrar: {what}, processor time"), median(&mut cpu), "ms");
    Ok(())
}

/// Processor time of the process.
fn processor_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

fn meta(name: &str, labels: &[(&str, &str)]) -> Option<admin::ObjectMeta> {
    let labels: Labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Some(admin::ObjectMeta { network: "n".into(), name: name.into(), labels, ..Default::default() })
}

async fn work() -> Result<(Vec<f64>, Vec<f64>), Box<dyn std::error::Error + Send + Sync>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("registry.db");
    SqliteStore::create(&path)?;
    let store = SqliteStore::open(path)?;
    let registry = Registry::load(Arc::new(store)).await?;
    let now = Timestamp::now();
    let network = admin::Network {
        metadata: Some(admin::ObjectMeta { name: "n".into(), ..Default::default() }),
        spec: Some(admin::NetworkSpec { domain: "n.example".into(), ..Default::default() }),
        status: None,
    };
    registry
        .commit(|index, _| plan::network::create(index, &network, Uuid::from_u128(1), [7; 5], now))
        .await?;
    for n in 0..=DEVICES {
        let name = format!("d{n}");
        let labels: &[(&str, &str)] = if n == 0 { &[] } else { &[("app", "web")] };
        let device = admin::Device { metadata: meta(&name, labels), spec: None, status: None };
        let uid = Uuid::from_u64_pair(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(u64::from(n) + 1), u64::from(n));
        registry.commit(|index, _| plan::device::create(index, &device, uid, now)).await?;
        let mut key = [1; 32];
        key[..4].copy_from_slice(&n.to_le_bytes());
        let registration = |attempt| Registration {
            key,
            endpoints: &[],
            outside: None,
            hosts: &[],
            subnets: &[],
            aes_256_gcm: false,
            agent_version: "1",
            before: None,
            attempt,
            now,
        };
        let plan = |index: &mut Index, attempt| register(index, "n", uid, &registration(attempt));
        registry.commit(plan).await?;
    }
    for n in 0..SERVICES {
        let spec = admin::ServiceSpec {
            selector: [("app".to_owned(), "web".to_owned())].into(),
            ports: vec![admin::ServicePort { port: 80, ..Default::default() }],
            ..Default::default()
        };
        let service =
            admin::Service { metadata: meta(&format!("s{n}"), &[]), spec: Some(spec), status: None };
        let uid = Uuid::from_u128(1 << 100 | u128::from(n));
        let plan =
            |index: &mut Index, number| plan::service::create(index, &service, uid, Attempt { number, now });
        registry.commit(plan).await?;
    }
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    for n in 0..CHANGES {
        let labels: &[(&str, &str)] = if n % 2 == 0 { &[("app", "web")] } else { &[] };
        let device = admin::Device { metadata: meta("d0", labels), spec: None, status: None };
        let mask = pbjson_types::FieldMask { paths: vec!["metadata.labels".into()] };
        let (began, before) = (Instant::now(), processor_time());
        registry.commit(|index, _| plan::device::update(index, &device, Some(&mask))).await?;
        wall.push((Instant::now() - began).as_secs_f64() * 1e3);
        cpu.push(processor_time().saturating_sub(before).as_secs_f64() * 1e3);
    }
    Ok((wall, cpu))
}
