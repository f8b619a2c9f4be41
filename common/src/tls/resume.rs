//! Sessions that are resumed without losing sight of whom we trust: a resumed handshake shows no certificate, so
//! the one of the first handshake is verified again, and tickets live neither long nor beyond a change of roots.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::{
    Error, HandshakeKind, RootCertStore, ServerConfig, ServerConnection,
    crypto::aws_lc_rs::Ticketer,
    pki_types::UnixTime,
    server::{ProducesTickets, danger::ClientCertVerifier},
    ticketer::TicketRotator,
};

use super::{Credentials, TlsError, verify::Verifier};
use crate::time::Timestamp;

/// Seconds for which a key makes tickets; for as many again it still opens them.
const KEY_LIFETIME: u32 = 1800;
/// Tickets that a client gets at a handshake: each is used once, and more than one connection may come at a time.
const TICKETS: usize = 2;

/// For connections from clients, whose sessions are resumed: for an hour at most, and only by who is trusted still.
#[derive(Debug)]
pub struct ResumingServer {
    config: Arc<ServerConfig>,
    verifier: Verifier,
}

impl Credentials {
    /// As [`Self::server_config`], with sessions that are resumed. Nothing may be believed of a connection before
    /// [`ResumingServer::check`].
    pub fn resuming_server(self: &Arc<Self>, alpn: &[u8]) -> Result<ResumingServer, TlsError> {
        let mut config = self.server_config(alpn)?;
        config.ticketer = Arc::new(Tickets::new(self)?);
        config.send_tls13_tickets = TICKETS;
        let verifier = Verifier::new(Arc::clone(self), |_| true);
        Ok(ResumingServer { config: Arc::new(config), verifier })
    }
}

impl ResumingServer {
    /// To accept connections with.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// Whether the certificate of a client whose handshake is done is one to believe. That of a full handshake has
    /// just been verified; that of a resumed session is here, against the roots and the time of now. What the
    /// certificate stands for may have been revoked since, as during any connection.
    pub fn check(&self, connection: &ServerConnection) -> Result<(), Error> {
        match (connection.handshake_kind(), connection.peer_certificates()) {
            (Some(HandshakeKind::Resumed), Some([own, others @ ..])) => {
                let now = UnixTime::since_unix_epoch(Timestamp::now().since_epoch());
                self.verifier.verify_client_cert(own, others, now).map(drop)
            }
            _ => Ok(()),
        }
    }
}

/// Keys of tickets, and the roots that they go with.
#[derive(Debug)]
struct Keys {
    roots: Arc<RootCertStore>,
    tickets: TicketRotator,
}

impl Keys {
    fn new(roots: Arc<RootCertStore>) -> Result<Self, Error> {
        // Each gets a key of its own, which is forgotten with it.
        let key = || -> Result<Box<dyn ProducesTickets>, rustls::crypto::GetRandomFailed> {
            Ok(Box::new(Key(Ticketer::new().map_err(|_| rustls::crypto::GetRandomFailed)?)))
        };
        Ok(Self { roots, tickets: TicketRotator::new(KEY_LIFETIME, key)? })
    }
}

/// Makes and opens tickets; when the roots are replaced, none from before is opened any more.
#[derive(Debug)]
struct Tickets {
    credentials: Arc<Credentials>,
    keys: ArcSwap<Keys>,
}

impl Tickets {
    fn new(credentials: &Arc<Credentials>) -> Result<Self, Error> {
        let keys = Keys::new(credentials.roots.load_full())?;
        Ok(Self { credentials: Arc::clone(credentials), keys: ArcSwap::from_pointee(keys) })
    }

    fn keys(&self) -> Option<Arc<Keys>> {
        let (keys, roots) = (self.keys.load_full(), self.credentials.roots.load_full());
        if Arc::ptr_eq(&keys.roots, &roots) {
            return Some(keys);
        }
        let keys = Arc::new(Keys::new(roots).ok()?);
        self.keys.store(Arc::clone(&keys));
        Some(keys)
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        KEY_LIFETIME
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.keys()?.tickets.encrypt(plain)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.keys()?.tickets.decrypt(cipher)
    }
}

#[derive(Debug)]
struct Key(Arc<dyn ProducesTickets>);

impl ProducesTickets for Key {
    fn enabled(&self) -> bool {
        self.0.enabled()
    }

    fn lifetime(&self) -> u32 {
        KEY_LIFETIME
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.0.encrypt(plain)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.0.decrypt(cipher)
    }
}
