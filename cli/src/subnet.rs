//! Subnets as operators write them: CIDR blocks with no bits set beyond their length. Pure.

use ipnet::IpNet;

/// Reads a subnet. The error says what was probably meant.
pub fn parse(text: &str) -> Result<IpNet, String> {
    let net: IpNet = text
        .parse()
        .map_err(|_| format!("{text:?} is not a subnet in CIDR notation, such as 10.1.0.0/24"))?;
    if net != net.trunc() {
        return Err(format!("{net} has bits set beyond its length; write {}", net.trunc()));
    }
    Ok(net)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_have_one_spelling() {
        let text = |text: &str| parse(text).map(|net| net.to_string());
        assert_eq!(text("10.1.0.0/24"), Ok("10.1.0.0/24".into()));
        assert_eq!(text("FD07:0::/64"), Ok("fd07::/64".into()));
        let error = "10.1.0.5/24 has bits set beyond its length; write 10.1.0.0/24";
        assert_eq!(text("10.1.0.5/24"), Err(error.into()));
        for bad in ["", "10.1.0.0", "10.1.0.0/33", "10.1.0/24", "gate/24"] {
            assert!(text(bad).unwrap_err().contains("CIDR"), "{bad}");
        }
    }
}
