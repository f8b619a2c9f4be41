//! What readiness probes have found out of a device, as the store has it; and what makes a probe valid.

use std::collections::BTreeSet;

use muster_proto::{
    admin::{self, Probe},
    storage,
};
use prost::Message as _;

use super::{
    field::{self, FieldError},
    named,
    service::{one_of, port_or_name},
};
use crate::store::Revision;

/// The longest time in a probe, in seconds, and the highest threshold.
const MAX: u32 = 86_400;
/// The longest text in a probe, in bytes.
const TEXT_MAX: usize = 4096;
/// The most words of a command, and the most headers.
const LIST_MAX: usize = 64;
const PATH: &str = "spec.readinessProbe";

/// The Services whose probes say that a device is ready.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Their keys, as [`named::key`] makes them.
    pub services: BTreeSet<Box<str>>,
    /// Revision of the last change.
    pub revision: Revision,
}

impl Readiness {
    pub(crate) fn decode(value: &[u8], revision: Revision) -> Result<Self, FieldError> {
        let stored =
            storage::Readiness::decode(value).map_err(|error| FieldError::new("readiness", error))?;
        let services = stored.services.iter().filter_map(|text| named::read(text));
        Ok(Self { services: services.collect(), revision })
    }

    /// As it is stored.
    pub fn encode(services: &BTreeSet<Box<str>>) -> Vec<u8> {
        let names = services.iter().map(|key| named::shown(key));
        storage::Readiness { services: names.collect() }.encode_to_vec()
    }
}

/// Checks a readiness probe, and sets what is left out to its default.
///
/// # Errors
/// The first field that cannot be used.
pub(super) fn check(probe: &mut Probe) -> Result<(), FieldError> {
    let actions =
        [probe.exec.is_some(), probe.http_get.is_some(), probe.tcp_socket.is_some(), probe.grpc.is_some()];
    if actions.iter().filter(|is_set| **is_set).count() != 1 {
        let reason = "must have exactly one of exec, httpGet, tcpSocket and grpc";
        return Err(FieldError::new(PATH, reason));
    }
    for (name, value, default) in [
        ("initialDelaySeconds", &mut probe.initial_delay_seconds, 0),
        ("timeoutSeconds", &mut probe.timeout_seconds, 1),
        ("periodSeconds", &mut probe.period_seconds, 10),
        ("successThreshold", &mut probe.success_threshold, 1),
        ("failureThreshold", &mut probe.failure_threshold, 3),
    ] {
        if *value == 0 {
            *value = default;
        }
        if *value > MAX {
            let reason = format!("{value} is out of range; use at most {MAX}");
            return Err(FieldError::new(format!("{PATH}.{name}"), reason));
        }
    }
    if let Some(exec) = &probe.exec {
        let path = format!("{PATH}.exec.command");
        if exec.command.is_empty() || exec.command.len() > LIST_MAX {
            let reason = format!("has {} entries; 1 to {LIST_MAX} are allowed", exec.command.len());
            return Err(FieldError::new(path, reason));
        }
        exec.command.iter().try_for_each(|word| text(&path, word))?;
    }
    if let Some(get) = &mut probe.http_get {
        check_http(get)?;
    }
    if let Some(socket) = &probe.tcp_socket {
        port_or_name(&format!("{PATH}.tcpSocket.port"), &socket.port)?;
    }
    if let Some(grpc) = &probe.grpc {
        field::port(&format!("{PATH}.grpc.port"), grpc.port)?;
        text(&format!("{PATH}.grpc.service"), &grpc.service)?;
    }
    Ok(())
}

fn check_http(get: &mut admin::HttpGetAction) -> Result<(), FieldError> {
    if get.path.is_empty() {
        "/".clone_into(&mut get.path);
    }
    if get.scheme.is_empty() {
        "HTTP".clone_into(&mut get.scheme);
    }
    one_of(&format!("{PATH}.httpGet.scheme"), &get.scheme, &["HTTP", "HTTPS"])?;
    port_or_name(&format!("{PATH}.httpGet.port"), &get.port)?;
    let path = format!("{PATH}.httpGet.path");
    text(&path, &get.path)?;
    if !get.path.starts_with('/') {
        return Err(FieldError::new(path, "must begin with /"));
    }
    let path = format!("{PATH}.httpGet.httpHeaders");
    if get.http_headers.len() > LIST_MAX {
        let reason = format!("has {} entries; at most {LIST_MAX} are allowed", get.http_headers.len());
        return Err(FieldError::new(path, reason));
    }
    for header in &get.http_headers {
        text(&path, &header.name)?;
        text(&path, &header.value)?;
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if header.name.is_empty() || !header.name.bytes().all(is_token) {
            let reason = format!("{:?} is not the name of a header", field::short(&header.name));
            return Err(FieldError::new(path, reason));
        }
    }
    Ok(())
}

fn text(path: &str, text: &str) -> Result<(), FieldError> {
    if text.len() > TEXT_MAX || text.chars().any(char::is_control) {
        let reason = format!("has a text of more than {TEXT_MAX} bytes, or one with control characters");
        return Err(FieldError::new(path, reason));
    }
    Ok(())
}
