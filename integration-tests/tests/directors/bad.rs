//! What directors and agents are sent by those who mean ill: nobody gets in who does not belong, nothing that is forged,
//! replayed or cut short has an effect, and nobody is answered more than was asked.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use muster_common::{
    frame::{self, DataHeader, HELLO, Handle, Key},
    identity::Party,
    tls::{ALPN_H2, Credentials},
};
use muster_integration_tests::{
    Host, Result,
    attachments::{Attachment, Issuer, connect},
    expect, failed,
    muster::Director,
    nat::Kind,
    population::device_uid,
    process::wait_for,
    run_on, scenario,
};
use muster_proto::director::{RegisterRequest, director_service_client::DirectorServiceClient};
use tokio::runtime::Runtime;
use tonic::Code;

use crate::{
    site::{DOMAIN, Internet},
    traffic::{Pings, reaches},
};

/// For what should come.
const SOON: Duration = Duration::from_secs(10);
/// Within this nothing should come.
const SILENCE: Duration = Duration::from_millis(300);

/// The first director, for everything.
pub(crate) fn director_address() -> SocketAddr {
    ([198, 51, 100, 201], Director::PORT).into()
}

/// A socket on `host`.
pub(crate) fn socket(host: &Host) -> Result<UdpSocket> {
    host.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(SILENCE))?;
        Ok(socket)
    })
}

/// A device that is attached, and bound to a socket of the host that the runtime is on.
pub(crate) fn attached(runtime: &Runtime, credentials: Arc<Credentials>) -> Result<(Attachment, UdpSocket)> {
    run_on(runtime, async move {
        let mut attachment = Attachment::open(&mut connect(&credentials, director_address()).await?).await?;
        let socket = tokio::net::UdpSocket::bind("0.0.0.0:0").await?;
        attachment.bind(&socket, director_address()).await?;
        let socket = socket.into_std()?;
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(SILENCE))?;
        Ok((attachment, socket))
    })
}

fn send(socket: &UdpSocket, to: SocketAddr, octets: &[u8]) -> Result {
    socket.send_to(octets, to).map(drop).map_err(|error| failed("sending", &error))
}

/// The datagram that comes next, if one does.
fn received(socket: &UdpSocket) -> Option<Vec<u8>> {
    let mut buffer = [0; 2048];
    let (len, _) = socket.recv_from(&mut buffer).ok()?;
    buffer.get(..len).map(<[u8]>::to_vec)
}

/// Sends this, and expects this answer.
fn answers(what: &str, socket: &UdpSocket, octets: &[u8], answer: Option<&[u8]>) -> Result {
    send(socket, director_address(), octets)?;
    let got = received(socket);
    expect(got.as_deref() == answer, what, &format!("{got:?} instead of {answer:?}"))
}

/// The outcome of attaching with these credentials, unless the director has taken it.
fn refusal(runtime: &Runtime, credentials: Arc<Credentials>) -> Result<String> {
    run_on(runtime, async move {
        let mut client = match connect(&credentials, director_address()).await {
            Ok(client) => client,
            Err(error) => return Ok(format!("no connection: {error}")),
        };
        Ok(match Attachment::open(&mut client).await {
            Ok(_) => "attached".to_owned(),
            Err(status) => format!("{:?}: {}", status.code(), status.message()),
        })
    })
}

#[test]
fn nobody_gets_in_who_does_not_belong() {
    scenario("strangers at a director", |lab| {
        let mut internet = Internet::prepared(lab, 1, |registrar| registrar.fill(0..2))?;
        let mallory = internet.stranger("mallory", 150)?;
        let (runtime, issuer) = (mallory.runtime()?, internet.issuer()?);
        let director = internet.directors.remove(0);
        let of = |party: String| issuer.credentials(&party).map_err(|error| failed("a certificate", &error));
        let uid = device_uid(0);
        for party in [
            format!("network/other/device/{uid}"),
            format!("network/default/director/{uid}"),
            format!("registrar/{uid}"),
            "operator/admin".to_owned(),
            "network/default/device/no-uid".to_owned(),
        ] {
            let outcome = refusal(&runtime, of(party.clone())?)?;
            expect(outcome.starts_with("PermissionDenied"), &format!("{party} is refused"), &outcome)?;
        }
        let foreign = Issuer::foreign(&lab.directory().join("foreign"), DOMAIN)
            .map_err(|error| failed("a foreign CA", &error))?;
        let foreigner = foreign.device(uid).map_err(|error| failed("a certificate", &error))?;
        let outcome = refusal(&runtime, foreigner)?;
        expect(outcome != "attached", "a foreign CA's certificate is refused", &outcome)?;
        expect(director.metric("attached ")? == 0, "nobody is attached", "somebody is")?;

        // Of the right network, but the registrar knows no such device: let in at first, and put out at once.
        let unknown = of(format!("network/default/device/{}", device_uid(77)))?;
        let put_out = run_on(&runtime, async move {
            let mut attachment = Attachment::open(&mut connect(&unknown, director_address()).await?).await?;
            let ended = tokio::time::timeout(SOON, attachment.ended()).await?;
            Ok(ended.map(|status| status.code()))
        })?;
        expect(
            put_out == Some(Code::PermissionDenied),
            "an unknown device is put out",
            &format!("{put_out:?}"),
        )?;

        // Nor does a registrar take anybody for a director who is none.
        for (party, is_foreign) in [
            (format!("network/default/device/{uid}"), false),
            (format!("network/default/director/{uid}"), false),
            (format!("network/default/director/{uid}"), true),
        ] {
            let from = if is_foreign { &foreign } else { &issuer };
            let credentials = from.credentials(&party).map_err(|error| failed("a certificate", &error))?;
            let outcome = run_on(&runtime, async move {
                let accept = |party: &Party| matches!(party, Party::Registrar { .. });
                let config = Arc::new(credentials.client_config(accept, ALPN_H2)?);
                let channel = match muster_common::grpc::connect("198.51.100.200:7500", config).await {
                    Ok(channel) => channel,
                    Err(error) => return Ok(Err(error.to_string())),
                };
                let registered =
                    DirectorServiceClient::new(channel).register(RegisterRequest::default()).await;
                Ok(registered.map(drop).map_err(|status| status.to_string()))
            })?;
            expect(outcome.is_err(), &format!("{party} cannot register"), "it can")?;
        }
        let shown = internet.registrar.muster(&["get", "directors", "-o", "name"])?;
        expect(shown.lines().count() == 1, "one director", &shown)
    });
}

#[test]
fn what_is_forged_replayed_or_cut_short_has_no_effect() {
    scenario("forged frames", |lab| {
        let mut internet = Internet::prepared(lab, 1, |registrar| registrar.fill(0..2))?;
        let (alice, _bob) =
            (internet.host("alice", Kind::Symmetric)?, internet.host("bob", Kind::Symmetric)?);
        let (carol, _dora) = (internet.host("carol", Kind::Open)?, internet.host("dora", Kind::Open)?);
        let mut director = internet.directors.remove(0);
        director.wait_attached(4)?;
        reaches(&alice.site.host, "bob")?;
        reaches(&carol.site.host, "dora")?;
        wait_for("carol's path", Duration::from_secs(30), || {
            let path = carol.agent.path_to("dora").map_err(|e| e.to_string())?.0;
            if path == "direct" { Ok(()) } else { Err(path) }
        })?;
        let pings = [Pings::start(&alice.site.host, "bob")?, Pings::start(&carol.site.host, "dora")?];

        let (mallory, eve) = (internet.stranger("mallory", 150)?, internet.stranger("eve", 151)?);
        let (runtime, issuer) = (mallory.runtime()?, internet.issuer()?);
        let device = |number| issuer.device(device_uid(number)).map_err(|e| failed("a certificate", &e));
        let (mut one, first) = attached(&runtime, device(0)?)?;
        let (other, second) = attached(&runtime, device(1)?)?;
        let stranger = socket(&eve)?;
        let message = [4; 100];
        let arrived = |from: &Attachment, to: &Attachment| {
            [DataHeader { session: to.session, handle: from.handle }.octets().as_slice(), &message].concat()
        };
        let passes = |one: &Attachment, what: &str| -> Result {
            send(&first, director_address(), &one.frame(other.handle, &message))?;
            let got = received(&second);
            expect(got == Some(arrived(one, &other)), &format!("frames pass {what}"), &format!("{got:?}"))?;
            send(&second, director_address(), &other.frame(one.handle, &message))?;
            let got = received(&first);
            expect(got == Some(arrived(&other, one)), &format!("frames come {what}"), &format!("{got:?}"))
        };
        passes(&one, "at first")?;

        // From elsewhere, with all that somebody on the way could have seen.
        let unbound = frame::unbound(one.session);
        let frame_of_one = one.frame(other.handle, &message);
        answers("a stolen session", &stranger, &frame_of_one, Some(&unbound))?;
        let old = frame::hello(&one.key, one.session, one.counter, 0);
        answers("a replayed hello", &stranger, &old, None)?;
        answers("a replayed hello, at the right place", &first, &old, None)?;
        let forged = frame::hello(&Key::new(&[0; 32]), one.session, one.counter + 9, 0);
        answers("a forged hello", &stranger, &forged, None)?;
        let mut flipped = one.hello(0);
        flipped[20] ^= 1;
        answers("a hello that was changed", &stranger, &flipped, None)?;
        let no_session = one.session ^ other.session ^ 0x5555_5555;
        let of_nobody = DataHeader { session: no_session, handle: other.handle };
        let of_nobody = [of_nobody.octets().as_slice(), &message].concat();
        answers("a guessed session", &stranger, &of_nobody, Some(&frame::unbound(no_session)))?;
        expect(received(&second).is_none(), "none of it arrives", "something did")?;
        passes(&one, "as before")?;

        // A device that has the key, from where it has not shown that it receives: it can point frames at nobody.
        let fresh = one.hello(0);
        send(&stranger, director_address(), &fresh)?;
        let welcome = received(&stranger).and_then(|octets| one.welcome(&octets));
        let is_asked = welcome.is_some_and(|welcome| !welcome.is_bound && welcome.proof != 0);
        expect(is_asked, "a new address has to prove itself", &format!("{welcome:?}"))?;
        passes(&one, "to the old address")?;
        expect(received(&stranger).is_none(), "nothing is sent to the other one", "something was")?;

        // Sessions and handles of others, and of nobody.
        let in_its_name = other.frame(one.handle, &message);
        answers("another's session", &first, &in_its_name, Some(&frame::unbound(other.session)))?;
        let nobody = DataHeader { session: one.session, handle: Handle(99) };
        let to_nobody = one.frame(nobody.handle, &message);
        answers("a device of nowhere", &first, &to_nobody, Some(&frame::unreachable(nobody)))?;
        answers("a frame to itself", &first, &one.frame(one.handle, &message), None)?;
        expect(received(&second).is_none(), "none of it arrives", "something did")?;

        // Whatever is cut short, or too long, or of no known sort.
        let mut junk: Vec<Vec<u8>> = (0..HELLO).map(|len| fresh[..len].to_vec()).collect();
        junk.extend((0..48).map(|len| frame_of_one[..len].to_vec()));
        junk.push([fresh.as_slice(), &[0]].concat());
        junk.extend((0..=255_u8).filter(|kind| *kind != 5).map(|kind| vec![kind; 64]));
        junk.push(vec![0xff; 1_472]);
        for octets in &junk {
            send(&stranger, director_address(), octets)?;
            send(&first, director_address(), octets)?;
        }
        let to_stranger = received(&stranger);
        expect(to_stranger.is_none(), "junk has no answer", &format!("{to_stranger:?}"))?;
        let to_device = received(&first);
        expect(to_device.is_none(), "a device's junk has no answer", &format!("{to_device:?}"))?;
        let malformed = director.metric("drops_total{reason=\"malformed\"}")?;
        expect(malformed >= junk.len() as u64, "it is counted", &malformed.to_string())?;
        passes(&one, "after all that")?;

        // The same to an agent, which listens to its directors and peers alone.
        let agent: SocketAddr = ([198, 51, 100, 3], 7551).into();
        let notices = [frame::unbound(one.session).to_vec(), frame::unreachable(nobody).to_vec()];
        let welcome = fresh.map(|octet| if octet == 6 { 7 } else { octet }).to_vec();
        for octets in junk.iter().chain(&notices).chain([&welcome, &frame_of_one]) {
            send(&stranger, agent, octets)?;
        }
        let told = received(&stranger);
        expect(told.is_none(), "agents do not answer strangers", &format!("{told:?}"))?;
        for pings in pings {
            pings.more(50)?;
            let pinged = pings.end()?;
            expect(pinged.lost == 0, "nobody else has lost anything", &format!("{pinged:?}"))?;
        }
        expect(carol.agent.path_to("dora")?.0 == "direct", "paths are as they were", "they are not")?;
        expect(director.metric("attached ")? == 6, "and so are attachments", "they are not")?;
        expect(director.process().is_some_and(|process| process.is_running()), "it runs", "it does not")
    });
}
