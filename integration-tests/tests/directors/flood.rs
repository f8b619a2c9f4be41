//! Floods, from a device that is attached and from strangers: nobody else is hurt, nothing grows, and nobody is answered
//! more than was asked.

use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    thread::sleep,
    time::Duration,
};

use muster_common::{
    frame::{self, DataHeader, Handle, Key},
    time::Instant,
};
use muster_integration_tests::{
    Result, expect, failed, muster::Director, nat::Kind, population::device_uid, scenario,
};

use crate::{
    bad::{attached, director_address, socket},
    site::Internet,
    traffic::{Pings, reaches},
};

const LENGTH: Duration = Duration::from_secs(3);
const RATE: f64 = 20_000.0;
/// Connections that say nothing.
const CONNECTIONS: usize = 300;
/// Octets that a director may grow by: what connections and the sockets' buffers take.
const GROWTH: f64 = 24e6;

/// What was sent, and what came back: datagrams and octets.
#[derive(Clone, Copy, Debug, Default)]
struct Flooded {
    sent: (u64, u64),
    answered: (u64, u64),
}

/// Sends what `datagram` makes of a number, and counts what comes back.
fn flood(socket: &UdpSocket, to: SocketAddr, datagram: impl Fn(u64) -> Vec<u8>) -> Result<Flooded> {
    let error = |error: std::io::Error| failed("flooding", &error);
    socket.set_nonblocking(true).map_err(error)?;
    let mut flooded = Flooded::default();
    let mut buffer = [0; 2048];
    let mut count = |flooded: &mut Flooded| {
        while let Ok((len, _)) = socket.recv_from(&mut buffer) {
            flooded.answered.0 += 1;
            flooded.answered.1 += len as u64;
        }
    };
    let start = Instant::now();
    loop {
        let passed = Instant::now() - start;
        if passed >= LENGTH {
            break;
        }
        let due = (passed.as_secs_f64() * RATE) as u64;
        while flooded.sent.0 < due {
            let octets = datagram(flooded.sent.0);
            match socket.send_to(&octets, to) {
                Ok(len) => flooded.sent.1 += len as u64,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(error(e)),
            }
            flooded.sent.0 += 1;
        }
        count(&mut flooded);
        sleep(Duration::from_millis(1));
    }
    sleep(Duration::from_millis(200));
    count(&mut flooded);
    Ok(flooded)
}

#[test]
#[expect(clippy::print_stderr, reason = "how much it was is worth to be seen")]
fn floods_hurt_nobody_else() {
    scenario("floods", |lab| {
        let mut internet = Internet::prepared(lab, 1, |registrar| registrar.fill(0..2))?;
        let (alice, _bob) =
            (internet.host("alice", Kind::Symmetric)?, internet.host("bob", Kind::Symmetric)?);
        let mut director = internet.directors.remove(0);
        director.wait_attached(2)?;
        reaches(&alice.site.host, "bob")?;
        let (mallory, eve) = (internet.stranger("mallory", 150)?, internet.stranger("eve", 151)?);
        let (runtime, issuer) = (mallory.runtime()?, internet.issuer()?);
        let device = |number| issuer.device(device_uid(number)).map_err(|e| failed("a certificate", &e));
        let (one, first) = attached(&runtime, device(0)?)?;
        let (other, _second) = attached(&runtime, device(1)?)?;
        let resident = |director: &mut Director| director.process().map_or(Ok(0.0), |p| p.resident());
        let before = resident(&mut director)?;

        let stranger = socket(&eve)?;
        let pings = Pings::start(&alice.site.host, "bob")?;
        pings.more(50)?;
        // Who is attached floods another device, one that is not there, and itself.
        let handles = [other.handle, Handle(99), one.handle];
        let inside = flood(&first, director_address(), |number| {
            let handle = handles.get(number as usize % handles.len()).copied().unwrap_or(other.handle);
            one.frame(handle, &[4; 200])
        })?;
        let during = pings.answers();
        // Strangers flood with frames and hellos of sessions that there are not, and of one that there is; with what looks
        // like a handshake; with nothing at all. Others of them connect and say nothing.
        let connections = eve.enter(|| {
            let address = director_address();
            let open = |_| TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok();
            Ok((0..CONNECTIONS).filter_map(open).collect::<Vec<_>>())
        })?;
        let forged = Key::new(&[0; 32]);
        let outside = flood(&stranger, director_address(), |number| {
            let session = (number as u32).wrapping_mul(0x9E37_79B9);
            match number % 6 {
                0 => [DataHeader { session, handle: other.handle }.octets().as_slice(), &[4; 32]].concat(),
                1 => frame::hello(&forged, session, number, 0).to_vec(),
                2 => one.frame(other.handle, &[4; 32]),
                3 => frame::hello(&forged, one.session, one.counter + number, 0).to_vec(),
                4 => vec![1; 148],
                _ => Vec::new(),
            }
        })?;
        drop(connections);
        pings.more(100)?;
        let pinged = pings.end()?;
        let after = resident(&mut director)?;
        let seen = format!(
            "{inside:?}, {outside:?}, {pinged:?} ({during} answers at half-time), resident {:.1} MB, then {:.1} MB",
            before / 1e6,
            after / 1e6
        );
        eprintln!("{seen}");
        for flooded in [inside, outside] {
            expect(flooded.sent.0 > 10_000, "it is a flood", &seen)?;
            expect(flooded.answered.1 < flooded.sent.1 / 10, "answers are few", &seen)?;
        }
        // Ten a second for a session, and a second's worth at once.
        expect(inside.answered.0 < 100, "a device is told so often", &seen)?;
        expect(after - before < GROWTH, "memory does not grow", &seen)?;
        // A socket's buffer may run over on a busy machine: the kernel counts that. The director drops nothing of others.
        let overflown = director.host().sh("nstat -asz UdpRcvbufErrors | awk '/Rcvbuf/ {print $2}'")?;
        let is_overflown = overflown.trim() != "0";
        let may_be_lost = if is_overflown { pinged.sent / 20 } else { 0 };
        expect(pinged.lost <= may_be_lost, "nobody else has lost anything", &format!("{overflown}{seen}"))?;
        let full = director.metric("drops_total{reason=\"full\"}")?;
        expect(full == 0 || is_overflown, "no queue was full", &format!("{full} {seen}"))
    });
}
