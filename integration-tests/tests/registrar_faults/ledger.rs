//! What clients know of their devices: what was acknowledged, and what may be so because an answer was lost.

use std::collections::{BTreeMap, BTreeSet};

use muster_proto::admin;

/// A value that clients have set. While an answer is missing, both the old and the new one are right.
#[derive(Debug)]
pub(crate) struct Field<T>(Vec<T>);

impl<T: PartialEq + Copy> Field<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(vec![value])
    }

    /// `value` is asked for.
    pub(crate) fn ask(&mut self, value: T) {
        if !self.0.contains(&value) {
            self.0.push(value);
        }
    }

    /// `value` was acknowledged, or seen.
    pub(crate) fn is(&mut self, value: T) {
        self.0 = vec![value];
    }

    /// The value, if there is no doubt about it.
    pub(crate) fn only(&self) -> Option<T> {
        if let [value] = self.0[..] { Some(value) } else { None }
    }

    fn may_be(&self, value: &T) -> bool {
        self.0.contains(value)
    }
}

/// What is known of one device.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) name: String,
    pub(crate) present: Field<bool>,
    /// As the registrar has given it; never changes while the device is there.
    pub(crate) address: Option<String>,
    /// Numbers that the client has made these from; `None` while there is none.
    pub(crate) key: Field<Option<u64>>,
    pub(crate) endpoint: Field<Option<u32>>,
    pub(crate) label: Field<Option<u64>>,
}

/// The label that operators set.
pub(crate) const LABEL: &str = "round";

impl Known {
    /// Of a device that is not there.
    pub(crate) fn absent(name: String) -> Self {
        Self {
            name,
            present: Field::new(false),
            address: None,
            key: Field::new(None),
            endpoint: Field::new(None),
            label: Field::new(None),
        }
    }

    /// Compares with what the registrar shows, which holds from then on.
    fn check(&mut self, shown: Option<&admin::Device>) -> Result<(), String> {
        let wrong = |what: &str, self_: &Self| Err(format!("{what} of {self_:?} is not as in {shown:?}"));
        if !self.present.may_be(&shown.is_some()) {
            return wrong("the presence", self);
        }
        let Some(shown) = shown else {
            *self = Self::absent(std::mem::take(&mut self.name));
            return Ok(());
        };
        self.present.is(true);
        let status = shown.status.clone().unwrap_or_default();
        let address = (!status.virtual_ipv4.is_empty()).then_some(status.virtual_ipv4);
        let key = status.public_key.first_chunk().map(|first| u64::from_be_bytes(*first));
        let endpoint = status.private_endpoints.first().and_then(|endpoint| {
            let address: std::net::Ipv4Addr = endpoint.address.parse().ok()?;
            Some(u32::from(address) & 0x00FF_FFFF)
        });
        let labels = shown.metadata.as_ref().map(|metadata| &metadata.labels);
        let label = labels.and_then(|labels| labels.get(LABEL)?.parse().ok());
        if self.address.is_some() && self.address != address {
            return wrong("the address", self);
        }
        if !self.key.may_be(&key) {
            return wrong("the key", self);
        }
        if !self.endpoint.may_be(&endpoint) {
            return wrong("the endpoint", self);
        }
        if !self.label.may_be(&label) {
            return wrong("the label", self);
        }
        self.address = address;
        self.key.is(key);
        self.endpoint.is(endpoint);
        self.label.is(label);
        Ok(())
    }
}

/// Compares all that is known with what the registrar shows, which holds from then on: it is there, nothing else is, and
/// no name, key or address has two owners.
pub(crate) fn check<'a>(
    known: impl Iterator<Item = &'a mut Known>,
    shown: &[admin::Device],
) -> Result<(), String> {
    let mut owned: BTreeMap<&str, BTreeSet<Vec<u8>>> = BTreeMap::new();
    let mut by_name = BTreeMap::new();
    for device in shown {
        let metadata = device.metadata.clone().unwrap_or_default();
        let status = device.status.clone().unwrap_or_default();
        for (what, value) in [
            ("uid", metadata.uid.into_bytes()),
            ("name", metadata.name.clone().into_bytes()),
            ("key", status.public_key.to_vec()),
            ("IPv4 address", status.virtual_ipv4.into_bytes()),
            ("IPv6 address", status.virtual_ipv6.into_bytes()),
        ] {
            if !value.is_empty() && !owned.entry(what).or_default().insert(value) {
                return Err(format!("the {what} of {device:?} has another owner, too"));
            }
        }
        by_name.insert(metadata.name, device);
    }
    for known in known {
        let shown = by_name.remove(&known.name);
        known.check(shown)?;
    }
    if by_name.is_empty() { Ok(()) } else { Err(format!("nobody has asked for {:?}", by_name.keys())) }
}
