//! Reading the fields of messages into types, with the path of the field in every error. The same code checks
//! what operators send and what comes out of the store.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use muster_common::{labels, time::Timestamp};
use muster_proto::admin::{DirectorAddress, Endpoint, ObjectMeta};

/// The most labels, and the most annotations, of an object.
const ENTRIES_MAX: usize = 64;
/// The longest annotation value, in bytes.
const ANNOTATION_MAX: usize = 4096;

/// A field that cannot be used: `spec.domain: …`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct FieldError {
    /// Path of the field, as in a field mask.
    pub path: String,
    /// What is wrong with it and what to write.
    pub reason: String,
}

impl FieldError {
    /// `path` cannot be used for `reason`.
    pub fn new(path: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self { path: path.into(), reason: reason.to_string() }
    }
}

/// Parses a field.
pub(crate) fn parse<T: FromStr<Err: fmt::Display>>(path: &str, text: &str) -> Result<T, FieldError> {
    text.parse().map_err(|error: T::Err| FieldError::new(path, error))
}

/// Parses an IP address of the family of `T`.
pub(crate) fn address<T: FromStr>(path: &str, text: &str, kind: &str) -> Result<Option<T>, FieldError> {
    if text.is_empty() {
        return Ok(None);
    }
    let shown = || text.chars().take(80).collect::<String>();
    text.parse()
        .map(Some)
        .map_err(|_| FieldError::new(path, format!("{:?} is not an {kind} address", shown())))
}

/// Parses a list of transport addresses that others can reach, at most `limit` of them.
pub(crate) fn endpoints(
    path: &str,
    list: &[Endpoint],
    limit: usize,
) -> Result<Box<[SocketAddr]>, FieldError> {
    if list.len() > limit {
        return Err(FieldError::new(
            path,
            format!("has {} entries; at most {limit} are allowed", list.len()),
        ));
    }
    list.iter().enumerate().map(|(i, e)| endpoint(&format!("{path}[{i}]"), e)).collect()
}

/// Parses a transport address that others can reach.
pub(crate) fn endpoint(path: &str, endpoint: &Endpoint) -> Result<SocketAddr, FieldError> {
    let ip = address::<IpAddr>(&format!("{path}.address"), &endpoint.address, "IP")?
        .ok_or_else(|| FieldError::new(format!("{path}.address"), "is empty"))?;
    let ip = ip.to_canonical();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast() || v4.octets()[0] == 0);
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || broadcast {
        return Err(FieldError::new(
            format!("{path}.address"),
            format!("no other host can reach {ip}: send an address of a network interface"),
        ));
    }
    Ok(SocketAddr::new(ip, port(&format!("{path}.port"), endpoint.port)?))
}

/// Checks a port.
pub(crate) fn port(path: &str, port: u32) -> Result<u16, FieldError> {
    match u16::try_from(port) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(FieldError::new(path, format!("{port} is not a port; use 1 to 65535"))),
    }
}

/// Parses a director's address.
pub(crate) fn director(path: &str, director: &DirectorAddress) -> Result<SocketAddr, FieldError> {
    endpoint(path, &Endpoint { address: director.address.clone(), port: director.port })
}

/// Checks labels and annotations.
pub(crate) fn metadata(meta: &ObjectMeta) -> Result<(), FieldError> {
    labels("metadata.labels", &meta.labels)?;
    let path = "metadata.annotations";
    if meta.annotations.len() > ENTRIES_MAX {
        return Err(FieldError::new(path, format!("at most {ENTRIES_MAX} are allowed")));
    }
    for (key, value) in &meta.annotations {
        labels::check_key(key).map_err(|e| FieldError::new(path, e))?;
        if value.len() > ANNOTATION_MAX {
            let reason = format!("the value of {key} is longer than {ANNOTATION_MAX} bytes");
            return Err(FieldError::new(path, reason));
        }
    }
    Ok(())
}

/// Checks labels.
pub(crate) fn labels(path: &str, labels: &labels::Labels) -> Result<(), FieldError> {
    if labels.len() > ENTRIES_MAX {
        return Err(FieldError::new(path, format!("at most {ENTRIES_MAX} are allowed")));
    }
    labels::check(labels).map_err(|e| FieldError::new(path, e))
}

/// A duration in whole seconds within `range`.
pub(crate) fn duration(
    path: &str,
    duration: Option<&pbjson_types::Duration>,
    default: Duration,
    max: Duration,
) -> Result<Duration, FieldError> {
    let Some(duration) = duration else { return Ok(default) };
    match u64::try_from(duration.seconds) {
        Ok(seconds) if seconds <= max.as_secs() && duration.nanos >= 0 => Ok(Duration::from_secs(seconds)),
        _ => Err(FieldError::new(
            path,
            format!("{}s is out of range; use 0s to {}s", duration.seconds, max.as_secs()),
        )),
    }
}

/// A stored or received timestamp; the epoch for one before it.
pub(crate) fn timestamp(timestamp: &pbjson_types::Timestamp) -> Timestamp {
    Timestamp::from_epoch(Duration::from_secs(timestamp.seconds.try_into().unwrap_or(0)))
}

/// `timestamp` as a message, in whole seconds.
pub(crate) fn to_timestamp(timestamp: Timestamp) -> pbjson_types::Timestamp {
    let seconds = timestamp.unix_seconds().try_into().unwrap_or(i64::MAX);
    pbjson_types::Timestamp { seconds, nanos: 0 }
}

/// `endpoint` as a message.
pub(crate) fn to_endpoint(endpoint: &SocketAddr) -> Endpoint {
    Endpoint { address: endpoint.ip().to_string(), port: endpoint.port().into() }
}

/// The beginning of a text that somebody sent, for a message.
pub(crate) fn short(text: &str) -> String {
    text.chars().take(80).collect()
}
