//! What comes from the registrar: answers, the session's messages, and certificates and roots to go on with.

use muster_common::{
    time::{Instant, Timestamp},
    tls::{Credentials, certificates_from_pem},
};
use muster_enrollment::Identity as _;
use rustls::pki_types::CertificateDer;

use super::Agent;
use crate::{
    control::Validity,
    renewal::{self, Renewed},
    session,
    state::pem,
};

impl Agent {
    pub(super) fn handle_session(&mut self, event: session::Event) {
        let now = Instant::now();
        let before = self.control.registrar();
        match event {
            session::Event::Registered { attempt, result } => {
                self.control.handle_registered(attempt, result.map(|response| *response), now)
            }
            session::Event::Opened { attempt } => self.control.handle_session_opened(attempt, now),
            session::Event::Message { attempt, message } => {
                self.control.handle_session_message(attempt, *message, now);
            }
            session::Event::Closed { attempt, failure } => {
                self.control.handle_session_closed(attempt, failure, now);
            }
            session::Event::LookedUp { id, result } => {
                self.metrics.looked_up(&result);
                self.control.handle_looked_up(id, result, now);
            }
            session::Event::Renewed(Ok(renewed)) => self.renewed(&renewed),
            session::Event::Renewed(Err(error)) => {
                tracing::warn!(error, "cannot renew the certificate; trying again later");
                self.control.handle_renewal_failed(now);
            }
        }
        let after = self.control.registrar();
        if after.connected && !before.connected {
            tracing::info!(registrar = after.address, "connected");
        } else if after.last_error != before.last_error && !after.last_error.is_empty() {
            tracing::warn!(
                registrar = before.address,
                error = after.last_error,
                refused = after.refused,
                "no registrar"
            );
        }
        self.metrics.control(&self.control);
    }

    /// The certificate has been renewed: on disk first, then in use.
    fn renewed(&mut self, renewed: &Renewed) {
        let identity = renewed.apply(&self.identity);
        let adopt = || -> anyhow::Result<Validity> {
            let (pair, roots) = (identity.key_pair()?, identity.root_certificates()?);
            let validity = renewal::validity(&pair)?;
            self.state.set_identity(&identity)?;
            self.credentials.replace_key(&pair)?;
            self.credentials.replace_roots(&roots)?;
            Ok(validity)
        };
        match adopt() {
            Ok(validity) => {
                tracing::info!(expiry = %validity.not_after, "certificate renewed");
                self.identity = identity;
                self.validity = validity;
                self.metrics.certificate_expiry(validity.not_after.unix_seconds());
                self.control.handle_certificate(validity, Timestamp::now(), Instant::now());
            }
            Err(error) => {
                tracing::warn!(%error, "cannot use the renewed certificate; trying again later");
                self.control.handle_renewal_failed(Instant::now());
            }
        }
    }

    pub(super) fn replace_roots(&mut self, roots: &[Vec<u8>]) {
        let mut identity = self.identity.clone();
        identity.roots = pem(roots);
        let adopt = || -> anyhow::Result<()> {
            let parsed: Vec<CertificateDer<'static>> =
                certificates_from_pem("the new roots", identity.roots.as_bytes())?;
            // Only roots that can be used are kept.
            Credentials::new(&identity.key_pair()?, &parsed)?;
            self.state.set_identity(&identity)?;
            self.credentials.replace_roots(&parsed)?;
            Ok(())
        };
        match adopt() {
            Ok(()) => {
                tracing::info!(roots = roots.len(), "roots replaced");
                self.identity = identity;
            }
            Err(error) => tracing::warn!(%error, "cannot use the new roots; going on with the old ones"),
        }
    }
}
