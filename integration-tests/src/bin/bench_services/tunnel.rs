//! Throughput from one device to another through the tunnel, by virtual IP and by the device's own address in turn.

use std::time::Duration;

use muster_integration_tests::{
    Lab, Result, failed,
    figures::{Figures, median},
    muster::{Agent, Registrar},
    process::wait_for,
};

use crate::traffic::throughput;

const IPERF: u16 = 5201;
const TURNS: usize = 5;

pub(super) fn measure(lab: &Lab, figures: &mut Figures) -> Result {
    let (switch, hq) = (lab.switch("tunnel")?, lab.host("tunnel-hq")?);
    switch.plug(&hq, &["192.0.2.1/24"])?;
    let mut registrar = Registrar::init(&hq, "net.example", "192.0.2.1", "")?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let mut agents = Vec::new();
    for (name, address) in [("a", "192.0.2.2/24"), ("b", "192.0.2.3/24")] {
        let host = lab.host(&format!("tunnel-{name}"))?;
        switch.plug(&host, &[address])?;
        let mut agent = Agent::new(&host, "")?;
        agent.join(&join, name)?;
        agent.run()?;
        agents.push(agent);
    }
    let [a, b] = agents.as_slice() else { return Err(failed("two agents", "there are others")) };
    registrar.muster(&["label", "device", "b", "app=iperf"])?;
    registrar.muster(&["create", "service", "clusterip", "iperf", &format!("--tcp={IPERF}:{IPERF}")])?;
    let mut command = b.host().command("iperf3");
    command.args(["-s", "-p", &IPERF.to_string()]);
    let _iperf = b.host().spawn("iperf3", command)?;
    let address = |name: &str| -> Result<String> {
        let script = format!("dig +short @169.254.20.10 {name}.net.example A");
        wait_for(&format!("the address of {name}"), Duration::from_secs(20), || {
            let printed = a.host().sh(&script).map_err(|error| error.to_string())?;
            let found = printed.lines().next().ok_or_else(|| "none".to_owned())?;
            // The table has the endpoint a moment after the name has an address.
            let reach = format!("iperf3 -c {found} -p {IPERF} -t 1");
            a.host().sh(&reach).map_err(|error| error.to_string())?;
            Ok(found.to_owned())
        })
    };
    let (straight, through) = (address("b")?, address("iperf.default.svc")?);
    let (mut of_device, mut of_service) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        of_device.push(throughput(a.host(), &straight, IPERF)?);
        of_service.push(throughput(a.host(), &through, IPERF)?);
    }
    let figure = "tunnel: throughput through a virtual IP";
    let (of_device, of_service) = (median(&mut of_device), median(&mut of_service));
    figures.compare(figure, of_service, "Gbit/s", "by the device's address", of_device);
    agents.iter_mut().try_for_each(|agent| agent.stop())?;
    registrar.stop()
}
