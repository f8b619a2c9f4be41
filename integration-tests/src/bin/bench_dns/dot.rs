//! The load over TLS, as a process of its own: queries in a pipeline on each of some connections.

use std::{sync::Arc, time::Duration};

use muster_common::time::Instant;
use muster_integration_tests::device::Error;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{ROUND, ROUNDS, query};

/// Keeps `under_way` queries under way on all `connections` together, at least one on each. A line a round: answers,
/// seconds, lost queries (none). NSD closes connections with many queries under way.
pub(crate) fn flood(address: &str, names: u32, connections: usize, under_way: usize) -> Result<(), Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let connector = TlsConnector::from(Arc::new(config()?));
        let mut open = Vec::new();
        for number in 0..connections {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let stream = connector.connect(ServerName::try_from("dns")?, tcp).await?;
            open.push((stream, StdRng::seed_from_u64(number as u64)));
        }
        let window = (under_way / connections).max(1);
        for round in 0..=ROUNDS {
            let time = if round == 0 { Duration::from_secs(1) } else { ROUND };
            let start = Instant::now();
            let tasks: Vec<_> = open
                .drain(..)
                .map(|(stream, rng)| tokio::spawn(pipeline(stream, rng, names, window, start + time)))
                .collect();
            let mut answers = 0;
            for task in tasks {
                let (stream, rng, count) = task.await?.map_err(|e| e.to_string())?;
                open.push((stream, rng));
                answers += count;
            }
            if round > 0 {
                println!("{answers} {} 0", (Instant::now() - start).as_secs_f64());
            }
        }
        Ok(())
    })
}

type Connection = TlsStream<TcpStream>;

async fn pipeline(
    mut stream: Connection,
    mut rng: StdRng,
    names: u32,
    window: usize,
    end: Instant,
) -> Result<(Connection, StdRng, u64), std::io::Error> {
    let (mut answers, mut under_way) = (0, 0);
    let (mut room, mut out, mut input) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let open = Instant::now() < end;
        if under_way == 0 && !open {
            return Ok((stream, rng, answers));
        }
        // Half a window at a time, so that there is something to write together.
        if open && under_way <= window / 2 {
            out.clear();
            while under_way < window {
                query(rng.random(), rng.random_range(0..names), &mut room);
                out.extend_from_slice(&u16::try_from(room.len()).unwrap_or(0).to_be_bytes());
                out.extend_from_slice(&room);
                under_way += 1;
            }
            stream.write_all(&out).await?;
            stream.flush().await?;
        }
        input.reserve(1 << 16);
        if stream.read_buf(&mut input).await? == 0 {
            return Err(std::io::Error::other("the server has closed the connection"));
        }
        let mut taken = 0;
        while let Some((length, rest)) = input.get(taken..).and_then(<[u8]>::split_first_chunk::<2>) {
            let length = usize::from(u16::from_be_bytes(*length));
            if rest.len() < length {
                break;
            }
            taken += 2 + length;
            answers += 1;
            under_way -= 1;
        }
        input.drain(..taken);
    }
}

/// Trusts whatever it is shown: who the server is does not matter here.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
        ]
    }
}

fn config() -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"dot".to_vec()];
    Ok(config)
}
