//! Hosts without an agent, from what an agent says to what it, others and operators are told.

use super::*;

#[tokio::test]
async fn hosts_without_an_agent_are_devices_as_soon_as_an_operator_allows_it() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(true).await;
    let (a, g) = (registrar.join(&secret, "a", 1).await, registrar.join(&secret, "g", 2).await);
    let host = |name: &str, lan_address: &str| proto::ProxiedHost {
        name: name.into(),
        lan_address: lan_address.into(),
    };
    let offer = RegisterRequest {
        proxied_hosts: vec![host("tv", "192.168.7.8"), host("printer", "192.168.7.9")],
        offered_subnets: vec!["192.168.7.0/24".into()],
        ..registration(2)
    };
    let register = async |offer: &RegisterRequest| {
        let registered = registrar.registration().register(by_device(offer.clone(), &g)).await?;
        Ok::<_, Status>(registered.into_inner().config.unwrap())
    };
    let config = register(&offer).await.unwrap();
    assert!(
        config.proxied_devices.iter().all(|host| host.refused.contains("muster approve device g --hosts"))
    );
    let show = async |name: &str| {
        let get = operator(GetDeviceRequest { network: "n".into(), name: name.into() });
        Ok::<_, Status>(registrar.devices().get_device(get).await?.into_inner().device.unwrap())
    };
    let status = show("g").await.unwrap().status.unwrap();
    assert_eq!(
        (status.proxied_hosts.len(), &*status.offered_subnets),
        (2, &["192.168.7.0/24".to_owned()][..])
    );
    assert_eq!(show("tv").await.unwrap_err().code(), Code::NotFound);

    let mut wanted = device("g", "");
    wanted.spec.as_mut().unwrap().may_proxy = true;
    let mask = Some(mask(&["spec.may_proxy", "spec.subnets"]));
    let request = UpdateDeviceRequest { device: Some(wanted), update_mask: mask };
    registrar.devices().update_device(operator(request)).await.unwrap();
    let status = show("tv").await.unwrap().status.unwrap();
    assert_eq!(
        (&*status.phase, &*status.proxied_by, &*status.lan_address, status.online),
        ("Proxied", "g", "192.168.7.8", false)
    );
    let peer = registrar.look_up(&a, By::Name("tv".into())).await.unwrap();
    assert_eq!(peer.name, "g");
    assert!(peer.virtual_addresses.contains(&status.virtual_ipv4));
    assert_eq!(
        registrar.look_up(&a, By::VirtualAddress(status.virtual_ipv4.clone())).await.unwrap().name,
        "g"
    );

    let less = RegisterRequest { proxied_hosts: vec![host("printer", "192.168.7.9")], ..offer.clone() };
    let config = register(&less).await.unwrap();
    let [printer] = &config.proxied_devices[..] else { panic!("one host") };
    assert_eq!((&*printer.name, &*printer.refused), ("printer", ""));
    let status = show("tv").await.unwrap().status.unwrap();
    assert_eq!((&*status.phase, &*status.proxied_by, &*status.lan_address), ("Unreachable", "g", ""));
    assert_eq!(registrar.look_up(&a, By::Name("tv".into())).await.unwrap_err().code(), Code::NotFound);

    for bad in [
        RegisterRequest { proxied_hosts: vec![host("tv", "127.0.0.1")], ..offer.clone() },
        RegisterRequest { proxied_hosts: vec![host("ns", "192.168.7.8")], ..offer.clone() },
        RegisterRequest { offered_subnets: vec!["192.168.7.1/24".into()], ..offer.clone() },
        RegisterRequest { offered_subnets: vec!["0.0.0.0/0".into()], ..offer.clone() },
    ] {
        assert_eq!(register(&bad).await.unwrap_err().code(), Code::InvalidArgument);
    }
}
