//! Devices that speak for hosts without an agent and carry subnets: approving that, seeing it, taking it back.

use muster_proto::admin::{DeviceSpec, DeviceStatus, ProxiedHost};

use super::{Operator, with_devices};

/// What an agent has told that speaks for a printer, and that carries `subnets`.
fn offers(subnets: &[&str]) -> DeviceStatus {
    let printer = ProxiedHost { name: "printer".into(), lan_address: "10.1.0.9".into() };
    DeviceStatus {
        phase: "Registered".into(),
        online: true,
        proxied_hosts: vec![printer],
        offered_subnets: subnets.iter().map(|subnet| (*subnet).to_owned()).collect(),
        ..DeviceStatus::default()
    }
}

fn approved(operator: &Operator, name: &str) -> (bool, Vec<String>) {
    let spec: DeviceSpec = operator.fake.device(name).unwrap().spec.unwrap_or_default();
    (spec.may_proxy, spec.subnets)
}

fn of(hosts: bool, subnets: &[&str]) -> (bool, Vec<String>) {
    (hosts, subnets.iter().map(|subnet| (*subnet).to_owned()).collect())
}

#[tokio::test]
async fn what_is_named_is_approved_and_taken_back_and_the_rest_stays() {
    let operator = with_devices(&["gate-1", "gate-2"]).await;
    operator
        .prints(
            "approve devices gate-1 gate-2 --subnet 10.1.0.0/24",
            "device/gate-1 approved: 10.1.0.0/24\ndevice/gate-2 approved: 10.1.0.0/24\n",
        )
        .await;
    operator
        .prints("approve device gate-1 --hosts --subnet 10.1.0.0/24", "device/gate-1 approved: hosts\n")
        .await;
    operator.prints("approve device gate-1 --hosts", "device/gate-1 unchanged\n").await;
    operator.prints("approve dev/gate-1 --subnet FD07::/64,10.0.0.0/24 -o name", "device/gate-1\n").await;
    assert_eq!(approved(&operator, "gate-1"), of(true, &["10.0.0.0/24", "10.1.0.0/24", "fd07::/64"]));
    assert_eq!(approved(&operator, "gate-2"), of(false, &["10.1.0.0/24"]));

    // Of several devices, one that has not got it does not keep the others from losing it.
    let ran = operator.run("disapprove devices gate-2 none gate-1 --hosts").await;
    assert_eq!(ran.out, "device/gate-1 disapproved: hosts\n");
    assert_eq!(
        ran.err,
        "muster: devices \"none\" not found in network \"net\"\n\
         muster: device/gate-2 is not approved for hosts, but for 10.1.0.0/24\n= 2 of the objects failed\n"
    );
    operator
        .fails(
            "disapprove device gate-1 --subnet 10.1.0.0/16",
            "device/gate-1 is not approved for 10.1.0.0/16",
        )
        .await;
    operator
        .prints(
            "disapprove device gate-1 --subnet 10.1.0.0/24,10.0.0.0/24",
            "device/gate-1 disapproved: 10.0.0.0/24, 10.1.0.0/24\n",
        )
        .await;
    assert_eq!(approved(&operator, "gate-1"), of(false, &["fd07::/64"]));
    operator.prints("disapprove device gate-1 --all", "device/gate-1 disapproved: fd07::/64\n").await;
    operator.fails("disapprove device gate-1 --all", "device/gate-1 is not approved for anything").await;
    assert_eq!(approved(&operator, "gate-1"), of(false, &[]));
}

#[tokio::test]
async fn all_is_what_the_device_offers_now() {
    let operator = with_devices(&["gate", "web"]).await;
    operator.fails("approve device gate --all", "device/gate has not registered yet").await;
    operator.fake.told("gate", offers(&["10.1.0.0/24", "10.2.0.0/24"]));
    operator
        .prints("approve device gate --all", "device/gate approved: hosts, 10.1.0.0/24, 10.2.0.0/24\n")
        .await;
    operator.prints("approve device gate --all", "device/gate unchanged\n").await;
    operator.fake.told("gate", offers(&["10.3.0.0/24"]));
    operator.prints("approve device gate --all", "device/gate approved: 10.3.0.0/24\n").await;
    assert_eq!(approved(&operator, "gate"), of(true, &["10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24"]));
    operator.fake.told("web", DeviceStatus { phase: "Registered".into(), ..DeviceStatus::default() });
    operator.fails("approve devices gate web --all", "device/web offers nothing").await;
}

#[tokio::test]
async fn without_options_the_command_tells_what_there_is_to_approve() {
    let operator = with_devices(&["gate", "printer"]).await;
    operator.fake.told("gate", offers(&["10.1.0.0/24"]));
    operator.fake.told(
        "printer",
        DeviceStatus { phase: "Proxied".into(), proxied_by: "gate".into(), ..DeviceStatus::default() },
    );
    let ran = operator.run("approve devices gate printer").await;
    assert_eq!((ran.out.as_str(), ran.code), ("", 2));
    assert_eq!(
        ran.err,
        "= say what to approve: --hosts, --subnet CIDR, or --all\n  \
         device/gate offers to speak for printer (10.1.0.9), and to carry 10.1.0.0/24: \
         muster approve device gate --hosts --subnet 10.1.0.0/24\n  \
         device/printer has no agent, and carries nothing; gate speaks for it\n"
    );
    let ran = operator.run("disapprove device gate").await;
    assert!(ran.code == 2 && ran.err.contains("device/gate is not approved for anything"), "{ran:?}");
    assert_eq!(approved(&operator, "gate"), of(false, &[]));
    // What is not there is told of as such.
    operator.fails("approve device none", "devices \"none\" not found").await;
    for line in
        ["approve director d1 --hosts", "approve token x --all", "approve devices --all", "approve pods x"]
    {
        let ran = operator.run(line).await;
        assert_eq!((ran.out.as_str(), ran.code), ("", 2), "{line}: {ran:?}");
    }
}

#[tokio::test]
async fn approving_what_is_not_offered_is_done_and_warned_of() {
    let operator = with_devices(&["gate"]).await;
    operator.fake.told("gate", offers(&["10.1.0.0/24"]));
    let ran = operator.run("approve device gate --subnet 10.1.0.0/16,10.1.0.0/24").await;
    assert_eq!((ran.out.as_str(), ran.code), ("device/gate approved: 10.1.0.0/16, 10.1.0.0/24\n", 0));
    assert!(ran.err.starts_with("muster: warning: device/gate does not offer 10.1.0.0/16 now"), "{ran:?}");
}

#[tokio::test]
async fn what_another_operator_approves_meanwhile_stays_approved() {
    let operator = with_devices(&["gate"]).await;
    operator.fake.interfere("10.9.0.0/24");
    operator.prints("approve device gate --subnet 10.1.0.0/24", "device/gate approved: 10.1.0.0/24\n").await;
    assert_eq!(approved(&operator, "gate"), of(false, &["10.1.0.0/24", "10.9.0.0/24"]));
    operator.fake.interfere("10.8.0.0/24");
    operator
        .prints("disapprove device gate --subnet 10.1.0.0/24", "device/gate disapproved: 10.1.0.0/24\n")
        .await;
    assert_eq!(approved(&operator, "gate"), of(false, &["10.8.0.0/24", "10.9.0.0/24"]));
    operator.fake.conflict(99);
    operator.fails("approve device gate --hosts", "it has changed").await;
}

#[tokio::test]
async fn manifests_and_create_approve_too() {
    let operator = Operator::new().await;
    operator
        .prints("create device gate --may-proxy --subnet 10.2.0.0/24,10.1.0.0/24", "device/gate created\n")
        .await;
    assert_eq!(approved(&operator, "gate"), of(true, &["10.2.0.0/24", "10.1.0.0/24"]));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("gate.yaml");
    let line = format!("apply -f {}", file.display());
    let write = |spec: &str| {
        let metadata = "apiVersion: muster/v1\nkind: Device\nmetadata: {name: gate}\n";
        std::fs::write(&file, format!("{metadata}spec: {{{spec}}}\n")).unwrap();
    };
    write("subnets: ['10.1.0.0/24', FD07::/64]");
    operator.prints(&line, "device/gate configured\n").await;
    assert_eq!(approved(&operator, "gate"), of(true, &["10.1.0.0/24", "fd07::/64"]));
    // Order and spelling make no difference.
    write("mayProxy: true, subnets: ['fd07:0::/64', '10.1.0.0/24']");
    operator.prints(&line, "device/gate unchanged\n").await;
    let printed = operator.run("get device gate -o yaml").await.out;
    assert!(printed.contains("  mayProxy: true\n  subnets:\n  - 10.1.0.0/24\n  - fd07::/64\n"), "{printed}");
    std::fs::write(&file, printed).unwrap();
    operator.prints(&line, "device/gate unchanged\n").await;
    write("mayProxy: false, subnets: []");
    operator.prints(&line, "device/gate configured\n").await;
    assert_eq!(approved(&operator, "gate"), of(false, &[]));
    write("subnets: [10.1.0.5/24]");
    operator
        .fails(&line, "spec.subnets: 10.1.0.5/24 has bits set beyond its length; write 10.1.0.0/24")
        .await;
}
