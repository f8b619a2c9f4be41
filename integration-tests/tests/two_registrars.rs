//! Two registrars on one etcd: devices come and go at both at once, with the same and with different names and keys,
//! in a network with few addresses, while one registrar is killed. No name, key or address ever has two owners, and
//! both registrars end up showing the same.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    time::Duration,
};

use muster_integration_tests::{
    Host, Lab, Result,
    device::{self, Device, register_request},
    expect, failed, is_missing,
    muster::{JoinCommand, Registrar},
    process::wait_for,
    scenario,
};
use muster_proto::registration::{DeregisterRequest, RegisterRequest};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tonic::{Code, Status};

/// Where etcd, and the two registrars, are.
const ETCD: &str = "198.51.100.1";
const REGISTRARS: [&str; 2] = ["198.51.100.11", "198.51.100.12"];
/// Addresses that 10.99.0.0/26 has for devices: all but the first and the last.
const ADDRESSES: usize = 62;
const PATIENCE: Duration = Duration::from_secs(60);

/// Devices that registered, with their addresses.
type Addresses = BTreeMap<String, String>;

#[test]
fn devices_come_and_go_at_two_registrars() {
    scenario("two registrars", |lab| {
        let clients = lab.host("clients")?;
        if is_missing(&clients, "etcd", "etcd-server")? {
            return Ok(());
        }
        run(lab, &clients)
    });
}

fn run(lab: &Lab, clients: &Host) -> Result {
    let namespace = clients.namespace();
    let switch = lab.switch("core")?;
    switch.plug(clients, &[&format!("{ETCD}/24")])?;
    let mut command = clients.command("etcd");
    let url = format!("http://{ETCD}:2379");
    command.arg("--data-dir").arg(clients.directory().join("etcd")).args(["--log-level", "error"]);
    command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
    let _etcd = clients.spawn("etcd", command)?;
    wait_for("etcd", PATIENCE, || clients.sh(&format!("curl -sf {url}/health")).map_err(|e| e.to_string()))?;

    let more = format!(
        "[limits]\njoins_per_second = 1000\njoins_burst = 1000\n[store]\nkind = \"etcd\"\n[store.etcd]\n\
         endpoints = [\"{url}\"]\n"
    );
    let hosts = [lab.host("r0")?, lab.host("r1")?];
    for (host, address) in hosts.iter().zip(REGISTRARS) {
        switch.plug(host, &[&format!("{address}/24")])?;
    }
    let mut first = Registrar::init(&hosts[0], "net.example", REGISTRARS[0], &more)?;
    first.serve()?;
    let mut second = Registrar::beside(&first, &hosts[1], REGISTRARS[1], &more)?;
    second.serve()?;
    let [here, there] = REGISTRARS.map(|address| format!("{address}:7500"));
    let tiny = ["--device-pool-v4", "10.99.0.0/26"];
    first.muster(&[&["create", "network", "tiny", "--domain", "tiny.example"][..], &tiny].concat())?;
    let join = first.new_join_command(&["--reusable", "--network", "tiny"])?;
    let joins = [join.with("registrar", &here), join.with("registrar", &there)];

    // Forty devices come at once, each name at both registrars.
    let (alive, came) = inside(namespace, || come(&joins, 0..40))?;
    expect(came.len() == 40, "all have an address", &format!("{came:?}"))?;
    let devices = agree(&first, &second)?;
    owned_once(&devices)?;
    expect(addresses(&devices) == came, "what was answered is stored", &format!("{came:?}\n{devices}"))?;

    // Some leave, others come, some names come back; meanwhile one registrar dies, and comes back.
    let mut alive = alive;
    let leaving: Vec<Device> = alive.split_off(25);
    let gone: Addresses =
        leaving.iter().filter_map(|d| came.get_key_value(&d.enrolled.name)).map(own).collect();
    let killing = std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            inside(namespace, || async {
                leave(&leaving).await?;
                come(&joins, 32..47).await
            })
        });
        second.kill();
        let served = second.serve();
        let changed = changing.join().map_err(|_| failed("the clients", "they panicked"))?;
        served.and(changed)
    });
    let (more_alive, more_came) = killing?;
    expect(more_came.len() == 15, "all newcomers have an address", &format!("{more_came:?}"))?;
    let devices = agree(&first, &second)?;
    owned_once(&devices)?;
    let stayed: Addresses = came.iter().filter(|(name, _)| !gone.contains_key(*name)).map(own).collect();
    let expected: Addresses = stayed.iter().chain(&more_came).map(own).collect();
    expect(addresses(&devices) == expected, "who stays keeps its address", &devices)?;
    let released: BTreeSet<&String> = gone.values().collect();
    let reused: Vec<_> = more_came.values().filter(|address| released.contains(address)).collect();
    expect(reused.is_empty(), "released addresses are in quarantine", &format!("{reused:?}"))?;
    alive.extend(more_alive);

    // All addresses have an owner or are in quarantine: the rest is told so, and nothing else happens to them.
    let left = ADDRESSES - expected.len() - gone.len();
    let exhausted = inside(namespace, || exhaust(&joins, 100..120))?;
    let told: Vec<&String> = exhausted.values().filter(|outcome| outcome.contains("exhausted")).collect();
    expect(
        exhausted.len() - told.len() == left,
        "the last addresses are given out",
        &format!("{exhausted:?}"),
    )?;
    expect(
        told.iter().all(|text| text.contains("quarantine")),
        "and then there is a remedy",
        &format!("{told:?}"),
    )?;
    let devices = agree(&first, &second)?;
    owned_once(&devices)?;
    expect(addresses(&devices).len() == expected.len() + left, "no more than there are", &devices)?;

    // Everybody who registers again, at either registrar, gets what it had.
    inside(namespace, || async {
        for (n, device) in alive.iter().enumerate() {
            let wanted = expected.get(&device.enrolled.name).cloned().unwrap_or_default();
            let request = register_request(number(&device.enrolled.name), 0);
            for registrar in [&here, &there] {
                let address = register(device, registrar, &request).await?;
                if address != wanted {
                    return Err(format!("device {n} had {wanted}, and now has {address}").into());
                }
            }
        }
        Ok(())
    })?;

    // One key for two devices: one of them gets it.
    let outcomes = inside(namespace, || same_key(&joins, &alive))?;
    expect(outcomes == [false, true], "a key has one owner", &format!("{outcomes:?}"))?;
    owned_once(&agree(&first, &second)?)?;
    second.stop()?;
    first.stop()
}

fn own<T: Clone, U: Clone>((name, address): (&T, &U)) -> (T, U) {
    (name.clone(), address.clone())
}

/// Runs `clients` in this network namespace, on a thread that is there alone.
fn inside<T: Send, F>(namespace: &str, clients: impl FnOnce() -> F + Send) -> Result<T>
where
    F: Future<Output = Result<T, device::Error>>,
{
    let path = format!("/run/netns/{namespace}");
    let run = || -> Result<T, device::Error> {
        let namespace = File::open(&path)?;
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(clients())
    };
    let outcome = std::thread::scope(|scope| scope.spawn(run).join());
    outcome.map_err(|_| failed("the clients", "they panicked"))?.map_err(|error| failed("the clients", error))
}

/// The number in a device's name.
fn number(name: &str) -> u64 {
    name.trim_start_matches('d').parse().unwrap_or(0)
}

/// What both registrars show, once they show the same.
fn agree(first: &Registrar, second: &Registrar) -> Result<String> {
    let show = |registrar: &Registrar, address| {
        let show = ["get", "devices", "-o", "json", "--network", "tiny", "--registrar", address];
        registrar.muster(&show).map_err(|error| error.to_string())
    };
    let [here, there] = REGISTRARS.map(|address| format!("{address}:7500"));
    wait_for("both registrars to show the same", PATIENCE, || {
        let (one, other) = (show(first, &here)?, show(second, &there)?);
        if one == other { Ok(one) } else { Err(format!("{one}\n{other}")) }
    })
}

fn items(devices: &str) -> Vec<serde_json::Value> {
    let list: serde_json::Value = serde_json::from_str(devices).expect("JSON");
    list["items"].as_array().expect("a list").clone()
}

fn text(device: &serde_json::Value, path: &str) -> String {
    device.pointer(path).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
}

/// The addresses of those that have one, by name.
fn addresses(devices: &str) -> Addresses {
    let pairs =
        items(devices).into_iter().map(|d| (text(&d, "/metadata/name"), text(&d, "/status/virtualIpv4")));
    pairs.filter(|(_, address)| !address.is_empty()).collect()
}

/// No name, key or address has two owners.
fn owned_once(devices: &str) -> Result {
    let items = items(devices);
    for path in ["/metadata/name", "/metadata/uid", "/status/virtualIpv4", "/status/publicKey"] {
        let all: Vec<String> = items.iter().map(|d| text(d, path)).filter(|t| !t.is_empty()).collect();
        let distinct: BTreeSet<&String> = all.iter().collect();
        expect(all.len() == distinct.len(), &format!("{path} is unique"), devices)?;
    }
    Ok(())
}

fn code(error: &device::Error) -> Option<Code> {
    error.downcast_ref::<Status>().map(Status::code)
}

/// Tries again until there is an answer that is final: a registrar may be away, or behind the other one.
async fn insist<T, F>(mut call: impl FnMut(usize) -> F) -> Result<T, device::Error>
where
    F: Future<Output = Result<T, device::Error>>,
{
    let mut attempt = 0;
    loop {
        let outcome = tokio::time::timeout(Duration::from_secs(10), call(attempt)).await;
        let error = match outcome {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error,
            Err(_) => "no answer".into(),
        };
        let is_final = matches!(code(&error), Some(Code::AlreadyExists | Code::ResourceExhausted));
        if is_final || attempt > 400 {
            return Err(error);
        }
        attempt += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Registers; the answer is the virtual IPv4 address.
async fn register(
    device: &Device,
    registrar: &str,
    request: &RegisterRequest,
) -> Result<String, device::Error> {
    insist(|_| async {
        let answer = device.connect_to(registrar).await?.register(request.clone()).await?;
        Ok(answer.into_inner().config.unwrap_or_default().virtual_ipv4)
    })
    .await
}

/// A device of this name joins at both registrars at the same time, as two hosts would: one of them gets the name.
async fn join_as(joins: [JoinCommand; 2], number: u64) -> Result<Device, device::Error> {
    let name = format!("d{number}");
    let keys = [rcgen::KeyPair::generate()?, rcgen::KeyPair::generate()?];
    let join = |n: usize| {
        let (name, key, joins) = (name.clone(), &keys[n], &joins);
        insist(move |attempt| {
            // The same key and token, wherever: a lost answer is given again.
            let (name, join) = (name.clone(), &joins[(n + attempt) % 2]);
            async move {
                let request = rcgen::CertificateParams::default().serialize_request(key)?;
                Device::join_with(join, &name, key, request.der().to_vec()).await
            }
        })
    };
    let (one, other) = tokio::join!(join(0), join(1));
    match (one, other) {
        (Ok(device), Err(error)) | (Err(error), Ok(device)) => match code(&error) {
            Some(Code::AlreadyExists) => Ok(device),
            _ => Err(error),
        },
        (Ok(_), Ok(_)) => Err(format!("two hosts got the name {name}").into()),
        (Err(error), Err(_)) => Err(error),
    }
}

/// As [`join_as`]; then the device registers at both registrars at the same time, and gets the same address from both.
async fn come_as(joins: [JoinCommand; 2], number: u64) -> Result<(Device, String), device::Error> {
    let device = join_as(joins, number).await?;
    let request = register_request(number, number.try_into()?);
    let [here, there] = REGISTRARS.map(|address| format!("{address}:7500"));
    let (one, other) = tokio::join!(register(&device, &here, &request), register(&device, &there, &request));
    match (one?, other?) {
        (one, other) if one == other => Ok((device, one)),
        (one, other) => Err(format!("d{number} got {one} and {other}").into()),
    }
}

/// Devices with these numbers come, all at once.
async fn come(
    joins: &[JoinCommand; 2],
    numbers: std::ops::Range<u64>,
) -> Result<(Vec<Device>, Addresses), device::Error> {
    let tasks: Vec<_> = numbers.map(|number| tokio::spawn(come_as(joins.clone(), number))).collect();
    let (mut devices, mut addresses) = (Vec::new(), Addresses::new());
    for task in tasks {
        let (device, address) = task.await??;
        addresses.insert(device.enrolled.name.clone(), address);
        devices.push(device);
    }
    Ok((devices, addresses))
}

/// These devices leave.
async fn leave(devices: &[Device]) -> Result<(), device::Error> {
    for (n, device) in devices.iter().enumerate() {
        let registrars = REGISTRARS.map(|address| format!("{address}:7500"));
        insist(|attempt| {
            let registrar = &registrars[(n + attempt) % 2];
            async move {
                let left = device.connect_to(registrar).await?.deregister(DeregisterRequest {}).await;
                match left {
                    Ok(_) => Ok(()),
                    // An answer was lost: it has left already.
                    Err(status) if attempt > 0 && status.code() == Code::PermissionDenied => Ok(()),
                    Err(status) => Err(status.into()),
                }
            }
        })
        .await?;
    }
    Ok(())
}

/// More devices come than there are addresses, all at once; the outcome of each, an address or the refusal.
async fn exhaust(
    joins: &[JoinCommand; 2],
    numbers: std::ops::Range<u64>,
) -> Result<BTreeMap<u64, String>, device::Error> {
    let [here, there] = REGISTRARS.map(|address| format!("{address}:7500"));
    let tasks: Vec<_> = numbers
        .map(|number| {
            let (joins, here, there) = (joins.clone(), here.clone(), there.clone());
            tokio::spawn(async move {
                let device = join_as(joins, number).await?;
                let request = register_request(number, number.try_into()?);
                // Who is refused while others' requests are under way may be luckier afterwards.
                let _ = tokio::join!(register(&device, &here, &request), register(&device, &there, &request));
                Ok::<_, device::Error>((number, device, request))
            })
        })
        .collect();
    let mut devices = Vec::new();
    for task in tasks {
        devices.push(task.await??);
    }
    let mut outcomes = BTreeMap::new();
    for (number, device, request) in devices {
        let registrar = if number % 2 == 0 { &here } else { &there };
        let outcome = match register(&device, registrar, &request).await {
            Ok(address) => address,
            Err(error) if code(&error) == Some(Code::ResourceExhausted) => error.to_string(),
            Err(error) => return Err(error),
        };
        outcomes.insert(number, outcome);
    }
    Ok(outcomes)
}

/// Two registered devices change to the same key, one at each registrar; returns, sorted, whether each got it.
async fn same_key(joins: &[JoinCommand; 2], devices: &[Device]) -> Result<[bool; 2], device::Error> {
    let request = register_request(999_999, 1);
    let change = |n: usize| {
        let (device, request) = (&devices[n], &request);
        async move {
            let registrar = joins[n].option("registrar").unwrap_or_default();
            match register(device, registrar, request).await {
                Ok(_) => Ok(true),
                Err(error) if code(&error) == Some(Code::AlreadyExists) => Ok(false),
                Err(error) => Err(error),
            }
        }
    };
    let (one, other) = tokio::join!(change(0), change(1));
    let mut outcomes = [one?, other?];
    outcomes.sort_unstable();
    Ok(outcomes)
}
