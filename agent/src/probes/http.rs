//! HTTP checks, as kubelet makes them: redirects to the same host are followed, one to elsewhere is as good as a success.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http_body_util::Empty;
use hyper::{Request, Response, StatusCode, body::Incoming, client::conn::http1, header::LOCATION};
use hyper_util::rt::TokioIo;
use muster_proto::admin::HttpGetAction;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use url::{Position, Url};

use super::check::{CheckError, port};

/// Redirects that are followed.
const REDIRECTS_MAX: usize = 10;

/// Asks the server at `address`, and whatever else of it that leads to.
///
/// # Errors
/// If it does not answer, or with a status below 200 or above 399.
pub(super) async fn get(get: &HttpGetAction, address: IpAddr) -> Result<(), CheckError> {
    let server = SocketAddr::new(address, port(&get.port)?);
    let scheme = if get.scheme == "HTTPS" { "https" } else { "http" };
    let path = get.path.strip_prefix('/').unwrap_or(&get.path);
    let mut url = Url::parse(&format!("{scheme}://{server}/{path}"))?;
    for _ in 0..=REDIRECTS_MAX {
        let answer = ask(get, address, &url).await?;
        let next = redirect(&url, &answer).filter(|next| {
            let is_here = next.host() == url.host();
            is_here && matches!(next.scheme(), "http" | "https")
        });
        let status = answer.status().as_u16();
        match next {
            Some(next) => url = next,
            None if (200..400).contains(&status) => return Ok(()),
            None => return Err(CheckError::Status(status)),
        }
    }
    Err(CheckError::Redirects(REDIRECTS_MAX))
}

/// Where an answer leads to (RFC 9110 §15.4).
fn redirect(url: &Url, answer: &Response<Incoming>) -> Option<Url> {
    use StatusCode as Is;
    let leads_on =
        [Is::MOVED_PERMANENTLY, Is::FOUND, Is::SEE_OTHER, Is::TEMPORARY_REDIRECT, Is::PERMANENT_REDIRECT];
    let location = answer.headers().get(LOCATION).filter(|_| leads_on.contains(&answer.status()))?;
    url.join(location.to_str().ok()?).ok()
}

async fn ask(get: &HttpGetAction, address: IpAddr, url: &Url) -> Result<Response<Incoming>, CheckError> {
    let server = SocketAddr::new(address, url.port_or_known_default().unwrap_or_default());
    let stream = TcpStream::connect(server).await?;
    if url.scheme() == "https" {
        let name = ServerName::IpAddress(address.into());
        let stream = TlsConnector::from(any_certificate()?).connect(name, stream).await?;
        return exchange(get, server, url, stream).await;
    }
    exchange(get, server, url, stream).await
}

async fn exchange<S>(
    get: &HttpGetAction,
    server: SocketAddr,
    url: &Url,
    stream: S,
) -> Result<Response<Incoming>, CheckError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let target = &url[Position::BeforePath..Position::AfterQuery];
    let mut request =
        Request::get(target).header("user-agent", concat!("muster-probe/", env!("CARGO_PKG_VERSION")));
    let has_host = get.http_headers.iter().any(|header| header.name.eq_ignore_ascii_case("host"));
    if !has_host {
        request = request.header("host", server.to_string());
    }
    for header in &get.http_headers {
        request = request.header(&*header.name, &*header.value);
    }
    let request = request.body(Empty::<&[u8]>::new())?;
    let mut answer = std::pin::pin!(sender.send_request(request));
    // The connection makes progress while it is polled. If it ends first, the answer is there, or never comes.
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer?,
        _ = connection => answer.await?,
    };
    Ok(answer)
}

/// TLS to whoever is there: a probe asks whether something answers, and tells it nothing.
fn any_certificate() -> Result<Arc<ClientConfig>, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(AnyCertificate(provider.clone()));
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(Arc::new(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()))
}

#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
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
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
