//! What operators let a device carry, for hosts without an agent and subnets: how `approve` and `disapprove` change
//! that, and what there is to approve. Pure.

use std::fmt;

use ipnet::IpNet;
use muster_proto::admin::{Device, ProxiedHost};

use crate::resource::Resource as _;

/// What a device carries, or is to carry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Whether it speaks for hosts.
    pub hosts: bool,
    /// Subnets, each once, as the registrar writes them.
    pub subnets: Vec<String>,
}

impl Carried {
    /// What a command names.
    pub fn new(hosts: bool, subnets: &[IpNet]) -> Self {
        let mut subnets = subnets.to_vec();
        subnets.sort_unstable();
        subnets.dedup();
        Self { hosts, subnets: subnets.iter().map(ToString::to_string).collect() }
    }

    /// What `device` asks for.
    pub fn offered(device: &Device) -> Self {
        let Some(status) = &device.status else { return Self::default() };
        Self { hosts: !status.proxied_hosts.is_empty(), subnets: status.offered_subnets.clone() }
    }

    /// What operators let `device` carry.
    pub fn approved(device: &Device) -> Self {
        let Some(spec) = &device.spec else { return Self::default() };
        Self { hosts: spec.may_proxy, subnets: spec.subnets.clone() }
    }

    /// Whether it is nothing.
    pub fn is_empty(&self) -> bool {
        !self.hosts && self.subnets.is_empty()
    }

    /// What of it is not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let missing = |subnet: &&String| !other.subnets.contains(subnet);
        Self {
            hosts: self.hosts && !other.hosts,
            subnets: self.subnets.iter().filter(missing).cloned().collect(),
        }
    }

    /// The fields that it is in.
    pub fn mask(&self) -> Vec<String> {
        let fields = [("spec.may_proxy", self.hosts), ("spec.subnets", !self.subnets.is_empty())];
        fields.into_iter().filter(|(_, has)| *has).map(|(field, _)| field.to_owned()).collect()
    }

    /// The options that name it.
    fn options(&self) -> String {
        let subnets = (!self.subnets.is_empty()).then(|| format!("--subnet {}", self.subnets.join(",")));
        let options = self.hosts.then(|| "--hosts".to_owned()).into_iter().chain(subnets);
        options.collect::<Vec<_>>().join(" ")
    }
}

/// `hosts, 10.1.0.0/24`
impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = self.hosts.then_some("hosts");
        let all: Vec<_> = hosts.into_iter().chain(self.subnets.iter().map(String::as_str)).collect();
        f.write_str(&all.join(", "))
    }
}

/// Lets `device` carry `wanted`, or with `None` all that it offers; returns what of that is new.
///
/// # Errors
/// It offers nothing, and what to do about that.
pub fn approve(device: &mut Device, wanted: Option<&Carried>) -> Result<Carried, String> {
    let offered = Carried::offered(device);
    let wanted = wanted.unwrap_or(&offered);
    if wanted.is_empty() {
        return Err(offers_nothing(device));
    }
    let new = wanted.without(&Carried::approved(device));
    let spec = device.spec.get_or_insert_default();
    spec.may_proxy |= new.hosts;
    spec.subnets.extend(new.subnets.iter().cloned());
    Ok(new)
}

/// Does not let `device` carry `wanted` any more, or with `None` anything; returns what has been taken back.
///
/// # Errors
/// Something of it has not been approved; then nothing is taken back.
pub fn disapprove(device: &mut Device, wanted: Option<&Carried>) -> Result<Carried, String> {
    let approved = Carried::approved(device);
    let wanted = wanted.unwrap_or(&approved);
    let missing = wanted.without(&approved);
    if approved.is_empty() || !missing.is_empty() {
        let what = if missing.is_empty() { "anything".into() } else { missing.to_string() };
        let others = if approved.is_empty() { String::new() } else { format!(", but for {approved}") };
        return Err(format!("{} is not approved for {what}{others}", device.qualified_name()));
    }
    let spec = device.spec.get_or_insert_default();
    spec.may_proxy &= !wanted.hosts;
    spec.subnets.retain(|subnet| !wanted.subnets.contains(subnet));
    Ok(wanted.clone())
}

/// What of `approved` has no effect yet, as `device` has told that it does not offer it; `None` if it is all offered, or
/// the device has not told yet.
pub fn warning(device: &Device, approved: &Carried) -> Option<String> {
    let idle = approved.without(&Carried::offered(device));
    (has_told(device) && !idle.is_empty()).then(|| {
        let name = device.qualified_name();
        format!("{name} does not offer {idle} now; it carries that once [site] in its agent.toml names it")
    })
}

/// What there is to approve for `device`, and how.
pub fn to_approve(device: &Device) -> String {
    let offered = Carried::offered(device);
    let new = offered.without(&Carried::approved(device));
    let name = device.qualified_name();
    if offered.is_empty() {
        return offers_nothing(device);
    }
    if new.is_empty() {
        return format!("{name} offers {offered}, which is approved");
    }
    let hosts = device.status.iter().flat_map(|status| &status.proxied_hosts).map(host).collect::<Vec<_>>();
    let hosts = new.hosts.then(|| format!("to speak for {}", hosts.join(", ")));
    let subnets = (!new.subnets.is_empty()).then(|| format!("to carry {}", new.subnets.join(", ")));
    let offers = hosts.into_iter().chain(subnets).collect::<Vec<_>>().join(", and ");
    format!("{name} offers {offers}: muster approve device {} {}", device.name(), new.options())
}

/// What there is to take back from `device`, and how.
pub fn to_disapprove(device: &Device) -> String {
    let approved = Carried::approved(device);
    let name = device.qualified_name();
    if approved.is_empty() {
        return format!("{name} is not approved for anything");
    }
    format!(
        "{name} is approved for {approved}: muster disapprove device {} {}",
        device.name(),
        approved.options()
    )
}

/// `printer (192.168.7.9)`
pub fn host(host: &ProxiedHost) -> String {
    format!("{} ({})", host.name, host.lan_address)
}

fn offers_nothing(device: &Device) -> String {
    let name = device.qualified_name();
    match device.status.as_ref().map_or("", |status| &status.proxied_by) {
        "" if has_told(device) => {
            format!("{name} offers nothing; name hosts or subnets under [site] in its agent.toml")
        }
        "" => {
            format!("{name} has not registered yet; give --hosts or --subnet to approve what it will offer")
        }
        by => format!("{name} has no agent, and carries nothing; {by} speaks for it"),
    }
}

/// Whether the device has an agent that has registered, and with that has told what it offers.
fn has_told(device: &Device) -> bool {
    let registered = |phase: &str| !matches!(phase, "" | "Pending");
    device.status.as_ref().is_some_and(|s| registered(&s.phase) && s.proxied_by.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(spec: &str, status: &str) -> Device {
        let json = format!(r#"{{"metadata":{{"name":"gate"}},"spec":{{{spec}}},"status":{{{status}}}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    /// Offers two hosts and two subnets.
    fn gate(spec: &str) -> Device {
        device(
            spec,
            r#""phase":"Registered","offeredSubnets":["10.1.0.0/24","10.2.0.0/24"],
               "proxiedHosts":[{"name":"printer","lanAddress":"10.1.0.9"},{"name":"tv","lanAddress":"10.1.0.8"}]"#,
        )
    }

    fn carried(hosts: bool, subnets: &[&str]) -> Carried {
        let subnets: Vec<_> = subnets.iter().map(|subnet| subnet.parse().unwrap()).collect();
        Carried::new(hosts, &subnets)
    }

    #[test]
    fn what_is_approved_already_is_not_new() {
        let mut device = gate(r#""subnets":["10.2.0.0/24"]"#);
        let wanted = carried(false, &["10.3.0.0/24", "10.2.0.0/24", "10.3.0.0/24"]);
        let new = approve(&mut device, Some(&wanted)).unwrap();
        assert_eq!((&new, new.mask()), (&carried(false, &["10.3.0.0/24"]), vec!["spec.subnets".into()]));
        assert_eq!(Carried::approved(&device).to_string(), "10.2.0.0/24, 10.3.0.0/24");
        let new = approve(&mut device, None).unwrap();
        assert_eq!((new.to_string(), new.mask().len()), ("hosts, 10.1.0.0/24".into(), 2));
        assert!(approve(&mut device, None).unwrap().is_empty());
        assert_eq!(Carried::approved(&device).subnets, ["10.2.0.0/24", "10.3.0.0/24", "10.1.0.0/24"]);
    }

    #[test]
    fn only_what_is_approved_is_taken_back_and_all_or_nothing() {
        let mut device = gate(r#""subnets":["10.1.0.0/24","10.2.0.0/24"]"#);
        let before = device.clone();
        let error = disapprove(&mut device, Some(&carried(true, &["10.1.0.0/24"]))).unwrap_err();
        assert_eq!(error, "device/gate is not approved for hosts, but for 10.1.0.0/24, 10.2.0.0/24");
        assert_eq!(device, before);
        let taken = disapprove(&mut device, Some(&carried(false, &["10.1.0.0/24"]))).unwrap();
        assert_eq!((taken.to_string(), taken.mask()), ("10.1.0.0/24".into(), vec!["spec.subnets".into()]));
        assert_eq!(disapprove(&mut device, None).unwrap().to_string(), "10.2.0.0/24");
        assert_eq!(disapprove(&mut device, None).unwrap_err(), "device/gate is not approved for anything");
        let mut device = gate(r#""mayProxy":true,"subnets":["10.1.0.0/24"]"#);
        assert_eq!(disapprove(&mut device, Some(&carried(true, &[]))).unwrap().mask(), ["spec.may_proxy"]);
        assert_eq!(Carried::approved(&device), carried(false, &["10.1.0.0/24"]));
    }

    #[test]
    fn what_there_is_to_approve_is_told_with_the_command() {
        assert_eq!(
            to_approve(&gate(r#""subnets":["10.2.0.0/24"]"#)),
            "device/gate offers to speak for printer (10.1.0.9), tv (10.1.0.8), and to carry 10.1.0.0/24: \
             muster approve device gate --hosts --subnet 10.1.0.0/24"
        );
        let all = r#""mayProxy":true,"subnets":["10.1.0.0/24","10.2.0.0/24"]"#;
        assert_eq!(
            to_approve(&gate(all)),
            "device/gate offers hosts, 10.1.0.0/24, 10.2.0.0/24, which is approved"
        );
        assert_eq!(
            to_disapprove(&gate(all)),
            "device/gate is approved for hosts, 10.1.0.0/24, 10.2.0.0/24: \
             muster disapprove device gate --hosts --subnet 10.1.0.0/24,10.2.0.0/24"
        );
        assert_eq!(to_disapprove(&gate("")), "device/gate is not approved for anything");
    }

    #[test]
    fn devices_that_offer_nothing_do_so_for_a_reason() {
        for (status, reason) in [
            (r#""phase":"Registered""#, "[site]"),
            (r#""phase":"Pending""#, "has not registered yet"),
            ("", "has not registered yet"),
            (
                r#""phase":"Proxied","proxiedBy":"other""#,
                "no agent, and carries nothing; other speaks for it",
            ),
        ] {
            let mut device = device("", status);
            assert!(to_approve(&device).contains(reason), "{}", to_approve(&device));
            assert_eq!(approve(&mut device, None).unwrap_err(), to_approve(&device));
        }
    }

    #[test]
    fn approving_what_is_not_offered_is_warned_of_once_that_is_known() {
        let typo = carried(true, &["10.1.0.0/24", "10.1.0.0/16"]);
        let warned = warning(&gate(""), &typo).unwrap();
        assert!(warned.starts_with("device/gate does not offer 10.1.0.0/16 now"), "{warned}");
        assert_eq!(warning(&gate(""), &carried(true, &["10.1.0.0/24"])), None);
        assert_eq!(warning(&device("", ""), &typo), None);
        let silent = device("", r#""phase":"Registered""#);
        assert!(warning(&silent, &carried(true, &[])).unwrap().contains("does not offer hosts now"));
    }
}
