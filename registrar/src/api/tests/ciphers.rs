//! What a device says that it can receive packets in: how others and operators are told of it.

use muster_proto::admin::TransportCipher;

use super::*;

#[tokio::test]
async fn the_ciphers_of_a_device_are_told_in_lookups_and_to_operators() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(true).await;
    let (a, b) = (registrar.join(&secret, "a", 1).await, registrar.join(&secret, "b", 2).await);
    // Twice: what a device no longer says does not hold any more. What is not known is not handed on.
    for (told, known) in [(vec![99, 1, 0], vec![1]), (vec![], vec![]), (vec![1], vec![1])] {
        let request = RegisterRequest { transport_ciphers: told, ..registration(2) };
        registrar.registration().register(by_device(request, &b)).await.unwrap();
        let peer = registrar.look_up(&a, By::Name("b".into())).await.unwrap();
        assert_eq!(peer.transport_ciphers, known);
        let get = operator(GetDeviceRequest { network: "n".into(), name: "b".into() });
        let device = registrar.devices().get_device(get).await.unwrap().into_inner().device.unwrap();
        assert_eq!(device.status.unwrap().transport_ciphers, known);
    }
    // Each device speaks for itself, and nobody else does for it.
    assert_eq!(registrar.look_up(&b, By::Name("a".into())).await.unwrap().transport_ciphers, [0; 0]);
    let mut wanted = device("a", "");
    wanted.status.get_or_insert_default().transport_ciphers = vec![TransportCipher::Aes256Gcm.into()];
    let request = UpdateDeviceRequest { device: Some(wanted), update_mask: None };
    let _ = registrar.devices().update_device(operator(request)).await;
    assert_eq!(registrar.look_up(&b, By::Name("a".into())).await.unwrap().transport_ciphers, [0; 0]);
    drop(a);
}
