//! The director as a relay: a registrar that knows its devices, and devices without agents that are attached to it.

use std::{net::SocketAddr, process::Command};

use muster_common::frame::Handle;
use muster_integration_tests::{
    Host, Result,
    attachments::{Attachment, Issuer, connect},
    failed,
    muster::{Director, Registrar},
    population::device_uid,
    process::check,
    run_on,
};
use rustix::net::sockopt::set_socket_recv_buffer_size;
use tokio::{net::UdpSocket, runtime::Runtime};

use crate::peers::{PORT, RELAY, RELAY_BEHIND};

const DOMAIN: &str = "net.example";
/// Where the load's datagrams come from, and where they arrive.
pub(crate) const LOAD_PORT: u16 = 7602;
const SENDER: &str = "192.0.2.1:7602";
const RECEIVER: &str = "198.51.100.3:7601";

/// A registrar and a director on one host.
pub(crate) struct Network {
    pub(crate) director: Director,
    pub(crate) issuer: Issuer,
    _registrar: Registrar,
}

/// Two devices: what one sends to the other.
pub(crate) struct Pair {
    /// Of the one that sends.
    pub(crate) session: u32,
    /// Of the one that receives.
    pub(crate) handle: Handle,
    _held: [(Attachment, Runtime); 2],
    /// Holds the receiver's port and reads nothing.
    _receiver: UdpSocket,
}

impl Network {
    /// On `host`, with a registrar that knows so many devices, and a director that has joined.
    pub(crate) fn new(host: &Host, devices: u32) -> Result<Self> {
        let mut registrar = Registrar::init(host, DOMAIN, RELAY, "")?;
        registrar.fill(0..devices)?;
        registrar.serve()?;
        let configuration = format!(
            "threads = 1\ndrain = 1\n[advertise]\nendpoints = [\"{RELAY}:{PORT}\"]\n[limits]\ndevice_rate = 0\n\
             strangers_per_source = 1000"
        );
        let director = Director::new(host, &configuration)?;
        director.join(&registrar.new_join_command(&["--director"])?, host.name())?;
        let issuer =
            Issuer::of(&registrar.data(), DOMAIN).map_err(|error| failed("the registrar's CA", error))?;
        Ok(Self { director, issuer, _registrar: registrar })
    }

    /// Starts the director, on one processor if one is named.
    pub(crate) fn start(&mut self, cpu: Option<usize>) -> Result {
        self.director.run()?;
        let (Some(cpu), Some(process)) = (cpu, self.director.process()) else { return Ok(()) };
        let mut pin = Command::new("taskset");
        pin.args(["-a", "-c", "-p", &cpu.to_string(), &process.id().to_string()]);
        check(pin).map(drop)
    }

    /// Attaches a device on each host.
    pub(crate) fn attach(&self, sender: &Host, receiver: &Host) -> Result<Pair> {
        let from = self.device(sender, 0, SENDER, RELAY)?;
        let to = self.device(receiver, 1, RECEIVER, RELAY_BEHIND)?;
        set_socket_recv_buffer_size(&to.1, 1).map_err(|error| failed("a socket's buffer", error))?;
        let (session, handle) = (from.0.session, to.0.handle);
        Ok(Pair { session, handle, _held: [(from.0, from.2), (to.0, to.2)], _receiver: to.1 })
    }

    /// Attaches the device with that number, by way of the director's address `director`; its frames come and go at
    /// `address`.
    fn device(
        &self,
        host: &Host,
        number: u32,
        address: &str,
        director: &str,
    ) -> Result<(Attachment, UdpSocket, Runtime)> {
        let address: SocketAddr = address.parse().map_err(|error| failed("an address", error))?;
        let director: SocketAddr =
            format!("{director}:{PORT}").parse().map_err(|error| failed("an address", error))?;
        let credentials = self.issuer.device(device_uid(number));
        let credentials = credentials.map_err(|error| failed("a certificate", error))?;
        let runtime = host.runtime()?;
        let (attachment, socket) = run_on(&runtime, async move {
            let socket = UdpSocket::bind(address).await?;
            let mut attachment = Attachment::open(&mut connect(&credentials, director).await?).await?;
            attachment.bind(&socket, director).await?;
            Ok((attachment, socket))
        })?;
        Ok((attachment, socket, runtime))
    }
}
