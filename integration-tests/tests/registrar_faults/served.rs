//! A registrar whose disk is in trouble, with a device and an operator who ask it for everything.

use std::sync::Arc;

use muster_integration_tests::{
    Host, LabError, Result,
    device::{self, Device, Error, register_request},
    expect, failed,
    muster::Registrar,
    process::wait_for,
    run_on,
};
use muster_proto::{
    admin::device_service_client::DeviceServiceClient,
    registration::{
        LookupRequest, lookup_request::By, registration_service_client::RegistrationServiceClient,
    },
};
use tokio::runtime::Runtime;
use tonic::{Code, Status, transport::Channel};

use crate::{
    clients::{self, Site},
    disk::PATIENCE,
    ledger::{self, Known},
};

const NAME: &str = "web";

/// The registrar, and those who ask it.
pub(crate) struct Served {
    pub(crate) registrar: Registrar,
    pub(crate) host: Host,
    runtime: Runtime,
    site: Site,
    device: Arc<Device>,
    known: Known,
    written: u64,
}

/// Where the registrar's data will be on `host`.
pub(crate) fn data(host: &Host) -> std::path::PathBuf {
    host.directory().join("registrar/data")
}

impl Served {
    /// A registrar on `host`, which others reach as 10.1.0.1, with one device.
    pub(crate) fn start(host: &Host) -> Result<Self> {
        let mut registrar = Registrar::init(host, "net.example", "10.1.0.1", "")?;
        registrar.serve()?;
        let site =
            Site { join: registrar.new_join_command(&["--reusable"])?, credential: registrar.credential() };
        let runtime = host.runtime()?;
        let join = site.join.clone();
        let device = run_on(&runtime, async move {
            let device = Device::join(&join, NAME).await?;
            device.connect().await?.register(register_request(1, 1)).await?;
            Ok(device)
        })?;
        let mut known = Known::absent(NAME.into());
        known.present.is(true);
        known.key.is(Some(1));
        known.endpoint.is(Some(1));
        Ok(Self { registrar, host: host.clone(), runtime, site, device: Arc::new(device), known, written: 0 })
    }

    /// A write of the operator's: the label of the device.
    fn write(&mut self) -> Result<Result<(), Status>> {
        self.written += 1;
        let credential = self.site.credential.clone();
        // Connected by a task: these are on the host.
        let operator = run_on(&self.runtime, async move { device::operator(&credential).await })?;
        let mut operator = Some(DeviceServiceClient::new(operator));
        let labelled = clients::label(&mut operator, &self.site, &mut self.known, self.written);
        status(self.runtime.block_on(labelled))
    }

    /// A write succeeds.
    pub(crate) fn writes(&mut self) -> Result {
        self.write()?.map_err(|status| failed("a write", status))
    }

    /// Writes until it is refused, with `code` and in words with all these `parts`; a join is, too. A
    /// device that is known may connect, and hears that what it tells is not kept.
    pub(crate) fn refuses(&mut self, code: Code, parts: &[&str]) -> Result {
        let refused = |what: &str, status: &Status| {
            let right = status.code() == code && parts.iter().all(|part| status.message().contains(part));
            expect(right, &format!("{what} is refused with {code:?} and {parts:?}"), &format!("{status:?}"))
        };
        let mut limit = 0..2000;
        let status = loop {
            if limit.next().is_none() {
                return Err(failed("writing until it is refused", "it never was"));
            }
            if let Err(status) = self.write()? {
                break status;
            }
        };
        refused("an operator's change", &status)?;
        let join = self.site.join.clone();
        let joined = run_on(&self.runtime, async move { Ok(Device::join(&join, "late").await) })?;
        let Err(status) = self::status(joined.map(drop))? else {
            return Err(failed("joining", "it was not refused"));
        };
        refused("a join", &status)?;
        self.known.endpoint.ask(Some(2));
        let mut client = self.connect()?;
        let answer = self.runtime.block_on(client.register(register_request(1, 2)));
        let answer = answer.map_err(|status| failed("Register of a known device", status))?.into_inner();
        expect(answer.unsaved, "a known device hears that nothing is kept", &format!("{answer:?}"))
    }

    /// What needs no write goes on: lists, in which the `others` are, look-ups, and DNS.
    pub(crate) fn reads(&self, others: &[&str]) -> Result {
        let site = self.site.clone();
        let devices = run_on(&self.runtime, async move { clients::list(&site).await })?;
        expect(devices.len() == 1 + others.len(), "the devices are listed", &format!("{devices:?}"))?;
        let mut client = self.connect()?;
        let lookup = client.lookup(LookupRequest { by: Some(By::Name(NAME.into())) });
        let found = self.runtime.block_on(lookup).map_err(|status| failed("a look-up", status))?.into_inner();
        expect(found.peer.is_some_and(|peer| peer.name == NAME), "the device is looked up", "")?;
        let soa = self.host.sh("dig +short +tries=1 +time=5 @127.0.0.1 net.example SOA")?;
        expect(soa.contains("net.example"), "DNS answers", &soa)
    }

    fn connect(&self) -> Result<RegistrationServiceClient<Channel>> {
        let device = Arc::clone(&self.device);
        run_on(&self.runtime, async move { device.connect().await })
    }

    /// Everything that was acknowledged is there, and nothing else but what was asked for without an answer.
    pub(crate) fn holds(&mut self) -> Result {
        let site = self.site.clone();
        let shown = run_on(&self.runtime, async move { clients::list(&site).await })?;
        // A join that was refused may show, if the disk broke in the midst of it.
        let shown: Vec<_> = shown
            .into_iter()
            .filter(|device| device.metadata.as_ref().is_some_and(|metadata| metadata.name == NAME))
            .collect();
        ledger::check(std::iter::once(&mut self.known), &shown)
            .map_err(|error| failed("what the registrar shows", error))
    }

    /// Waits until health and metrics tell that the store takes changes, or of this trouble: the reason, and a part of
    /// what health says.
    pub(crate) fn shows(&self, trouble: Option<(&str, &str)>) -> Result {
        wait_for("health and metrics to show the store's condition", PATIENCE, || {
            let told = |error: LabError| error.to_string();
            let metrics = self.registrar.metrics().map_err(told)?;
            let ready = self.host.sh("curl -sf http://127.0.0.1:7580/readyz").map_err(told)?;
            let writable = metrics.lines().any(|line| line == "muster_registrar_store_writable 1");
            let as_expected = match trouble {
                None => writable && ready == "ready\n",
                Some((reason, part)) => {
                    let counter = format!("muster_registrar_store_failures_total{{reason=\"{reason}\"}} ");
                    let count = metrics.lines().find_map(|line| line.strip_prefix(counter.as_str()));
                    !writable && count.is_some_and(|count| count != "0") && ready.contains(part)
                }
            };
            if as_expected { Ok(()) } else { Err(format!("{ready}\n{metrics}")) }
        })
    }

    /// SQLite finds nothing wrong with the database.
    pub(crate) fn sound(&self) -> Result {
        let database = self.registrar.data().join("registry.db");
        let check = format!("sqlite3 -readonly '{}' 'pragma integrity_check'", database.display());
        let found = self.host.sh(&check)?;
        expect(found.trim() == "ok", "the database is sound", &found)
    }

    /// It is killed and started again; all is there.
    pub(crate) fn restarts(&mut self) -> Result {
        self.registrar.kill();
        self.registrar.serve()?;
        self.holds()?;
        self.writes()?;
        self.sound()
    }

    /// It is started while the disk takes nothing: it serves what needs no write, or ends and says why. What it shows
    /// may be what was begun when the disk broke.
    pub(crate) fn starts_or_says(&mut self, part: &str) -> Result {
        self.registrar.start()?;
        let serves = wait_for("the registrar to serve or to end", PATIENCE, || {
            if self.process().is_err() {
                return Ok(false);
            }
            self.host.sh("curl -sf http://127.0.0.1:7580/readyz").map_err(|error| error.to_string())?;
            Ok(true)
        })?;
        if serves {
            return self.holds();
        }
        let log = self.registrar.process().map(|process| process.log()).unwrap_or_default();
        expect(log.contains(part), part, &log)
    }

    /// The number of its process, which must be running.
    pub(crate) fn process(&mut self) -> Result<u32> {
        let process = self.registrar.process();
        process
            .and_then(|process| process.is_running().then(|| process.id()))
            .ok_or_else(|| failed("the registrar", "it has ended"))
    }
}

/// The registrar's refusal; an error if it was not the registrar that refused.
fn status<T>(outcome: Result<T, Error>) -> Result<Result<T, Status>> {
    match outcome {
        Ok(value) => Ok(Ok(value)),
        Err(error) => match error.downcast::<Status>() {
            Ok(status) => Ok(Err(*status)),
            Err(error) => Err(failed("a call", error)),
        },
    }
}
