//! What hosts send each other meanwhile, through the network: a TCP connection that may pause and never break, with relays
//! between and without, and names that are held, which always resolve.

use std::time::Duration;

use muster_integration_tests::{Host, Process, Result, expect, process::wait_for};
use rustix::process::Signal;

use crate::world::World;

const PATIENCE: Duration = Duration::from_secs(60);
/// Sends back all that comes on each connection.
const ECHO: &str = r#"
import socket, threading
server = socket.create_server(("0.0.0.0", 9000))
def echo(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
while True:
    threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
"#;
/// Numbers on one connection, each of which has to come back; says how many did when it is told to end.
const NUMBERS: &str = r#"
import signal, socket, sys, time
ending = []
signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
connection = socket.create_connection((sys.argv[1], 9000), timeout=30)
connection.settimeout(None)
print("connected", flush=True)
stream, count, slowest = connection.makefile("rb"), 0, 0.0
try:
    while not ending:
        line = b"%d %s\n" % (count, b"x" * 1000)
        began = time.monotonic()
        connection.sendall(line)
        if stream.readline() != line:
            raise OSError("something else came back")
        slowest = max(slowest, time.monotonic() - began)
        count += 1
        time.sleep(0.02)
    print("whole", count, "slowest", round(slowest, 2), flush=True)
except OSError as error:
    print("broken after", count, error, flush=True)
"#;
/// Asks the host's resolver for names, ten times a second; says how often it failed when it is told to end.
const NAMES: &str = r#"
import signal, socket, struct, sys, time
ending = []
signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
asked, failed = 0, []
while not ending:
    for name in sys.argv[1:]:
        asked += 1
        query = struct.pack(">6H", asked & 0xffff, 0x100, 1, 0, 0, 0)
        query += b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0\0\1\0\1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
            resolver.settimeout(3)
            try:
                resolver.sendto(query, ("169.254.20.10", 53))
                answer = resolver.recv(4096)
                if answer[3] & 15 or not struct.unpack(">H", answer[6:8])[0]:
                    failed.append((name, answer[3] & 15))
            except OSError as error:
                failed.append((name, str(error)))
    time.sleep(0.1)
print("asked", asked, "failed", failed, flush=True)
"#;

pub(crate) struct Traffic {
    _echoes: Vec<Process>,
    numbers: Vec<Process>,
    names: Process,
}

impl Traffic {
    /// From Alice to Bob, by way of directors, and to Carol, without.
    pub(crate) fn start(world: &World) -> Result<Self> {
        let [alice, bob, carol] = [0, 1, 2].map(|number| world.agents[number].host().clone());
        let mut echoes = Vec::new();
        for host in [&bob, &carol] {
            echoes.push(python(host, "echo", ECHO, &[])?);
            wait_for("the echo to listen", PATIENCE, || {
                host.sh("ss -tln | grep -q :9000").map(drop).map_err(|e| e.to_string())
            })?;
        }
        let mut numbers = Vec::new();
        for name in ["bob", "carol"] {
            let address = wait_for(&format!("{name} to be reached"), PATIENCE, || {
                let address =
                    alice.sh(&format!("dig +short {name}.net.example")).map_err(|e| e.to_string())?;
                let address = address.trim().to_owned();
                alice.sh(&format!("ping -c 1 -W 1 {address}")).map_err(|e| e.to_string())?;
                Ok(address)
            })?;
            let process = python(&alice, &format!("numbers-{name}"), NUMBERS, &[&address])?;
            wait_for("a connection", PATIENCE, || {
                if process.log().contains("connected") { Ok(()) } else { Err(process.log()) }
            })?;
            numbers.push(process);
        }
        expect(
            world.agents[0].path_to("bob")?.0 == "relay",
            "directors relay",
            &format!("{:?}", world.agents[0].path_to("bob")?),
        )?;
        let names = python(&alice, "names", NAMES, &["bob.net.example", "carol.net.example"])?;
        Ok(Self { _echoes: echoes, numbers, names })
    }

    pub(crate) fn end(self) -> Result {
        for mut process in self.numbers {
            process.signal(Signal::TERM)?;
            process.wait(PATIENCE)?;
            let log = process.log();
            eprintln!("chaos: {}", log.lines().last().unwrap_or_default());
            expect(log.contains("whole"), "the connection is whole", &log)?;
        }
        let mut names = self.names;
        names.signal(Signal::TERM)?;
        names.wait(PATIENCE)?;
        let log = names.log();
        eprintln!("chaos: {}", log.lines().last().unwrap_or_default());
        expect(log.contains("failed []"), "names that are held resolve", &log)
    }
}

fn python(host: &Host, name: &str, program: &str, arguments: &[&str]) -> Result<Process> {
    let mut command = host.command("python3");
    command.args(["-uc", program]).args(arguments);
    host.spawn(name, command)
}
