//! Who may see and reach whom: decided for one pair at a time, when one looks the other up. A pair that is not
//! allowed looks exactly like a device that does not exist.

use muster_common::{labels::Labels, name::Label};

/// What policy looks at in either end of a pair.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Name of the device's network.
    pub network: &'a Label,
    /// The device's namespace.
    pub namespace: &'a str,
    /// The device's labels.
    pub labels: &'a Labels,
    /// Whether an operator has revoked the device.
    pub revoked: bool,
}

/// Whether `viewer` may see and reach `target`: both are of one network, and neither is revoked.
pub fn allows(viewer: &Subject<'_>, target: &Subject<'_>) -> bool {
    viewer.network == target.network && !viewer.revoked && !target.revoked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_need_one_network_and_two_good_devices() {
        let (a, b): (Label, Label) = ("a".parse().unwrap(), "b".parse().unwrap());
        let labels = Labels::new();
        let subject = |network, revoked| Subject { network, namespace: "default", labels: &labels, revoked };
        assert!(allows(&subject(&a, false), &subject(&a, false)));
        assert!(!allows(&subject(&a, false), &subject(&b, false)));
        assert!(!allows(&subject(&a, true), &subject(&a, false)));
        assert!(!allows(&subject(&a, false), &subject(&a, true)));
    }
}
