//! The way through an HTTP proxy (CONNECT, RFC 9110, 9.3.6) where a network lets nothing else out. The environment names
//! it, as for other programs; TLS goes through it from end to end, so it learns who is spoken to, and not what is said.

use std::{env, io, net::IpAddr, time::Duration};

use http::{
    HeaderValue, Method, Request, StatusCode, Uri,
    header::{HOST, PROXY_AUTHORIZATION},
};
use http_body_util::Empty;
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::{client::proxy::matcher::Matcher, rt::TokioIo};
use tokio::net::TcpStream;

/// Where the proxy is named, and what is reached without it; each also in lower case.
const PROXY: [&str; 2] = ["HTTPS_PROXY", "https_proxy"];
const EXCEPTIONS: [&str; 2] = ["NO_PROXY", "no_proxy"];
/// Octets of a proxy's answer that are read.
const ANSWER_MAX: usize = 16 * 1024;
/// Of a proxy that is named without one.
const DEFAULT_PORT: u16 = 80;

/// Connects to `target` (`HOST:PORT`) over TCP within a time: through the proxy that the environment names, if it does.
///
/// # Errors
/// Those of a proxy say what it was asked, why it did not help, and what to do, and never show a password.
pub async fn connect(target: &str, within: Duration) -> io::Result<TcpStream> {
    let proxy = Proxy::from_environment(target).map_err(io::Error::other)?;
    let connecting = async {
        match &proxy {
            Some(proxy) => proxy.connect(target).await.map_err(io::Error::other),
            None => TcpStream::connect(target).await,
        }
    };
    let Ok(connected) = tokio::time::timeout(within, connecting).await else {
        return Err(match &proxy {
            Some(proxy) => io::Error::other(proxy.silent(target, within)),
            None => {
                io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", within.as_secs()))
            }
        });
    };
    connected.and_then(|stream| stream.set_nodelay(true).map(|()| stream))
}

/// Why there is no way through the proxy.
#[derive(Debug, thiserror::Error)]
enum ProxyError {
    /// What the environment says is of no use.
    #[error(
        "HTTPS_PROXY names no proxy that can be used: {0}; write http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT"
    )]
    Variable(&'static str),
    /// No connection to the proxy.
    #[error(
        "cannot reach proxy {proxy}, asked for the way to {target}: {source}; check HTTPS_PROXY, or name the host in NO_PROXY if it is to be reached without"
    )]
    Unreachable { proxy: String, target: String, source: io::Error },
    /// It said no.
    #[error("proxy {proxy} does not connect to {target}: it answered {status}; {remedy}")]
    Refused { proxy: String, target: String, status: StatusCode, remedy: &'static str },
    /// It said nothing that a proxy says.
    #[error(
        "{proxy}, asked as a proxy to connect to {target}, did not answer as one: {reason}; check that HTTPS_PROXY names an HTTP proxy"
    )]
    Answer { proxy: String, target: String, reason: String },
    /// It, or what is behind it, said nothing.
    #[error(
        "no answer through proxy {proxy} within {seconds} s, asked to connect to {target}; check the proxy, and that it can reach that address"
    )]
    Silent { proxy: String, target: String, seconds: u64 },
}

/// The proxy that leads to a server.
struct Proxy {
    /// `HOST:PORT`, without user and password.
    address: String,
    authorization: Option<HeaderValue>,
}

impl Proxy {
    /// The proxy for connections to `target` (`HOST:PORT`), if the environment names one.
    fn from_environment(target: &str) -> Result<Option<Self>, ProxyError> {
        let [url, exceptions] = [PROXY, EXCEPTIONS].map(|names| {
            let mut values = names.into_iter().filter_map(env::var_os);
            values.find(|value| !value.is_empty()).unwrap_or_default().to_string_lossy().into_owned()
        });
        Self::find(url.trim(), &exceptions, target)
    }

    fn find(url: &str, exceptions: &str, target: &str) -> Result<Option<Self>, ProxyError> {
        let Ok(target) = format!("https://{target}").parse::<Uri>() else { return Ok(None) };
        if url.is_empty() || is_this_host(target.host().unwrap_or_default()) {
            return Ok(None);
        }
        let proxies = Matcher::builder().https(url.to_owned());
        // First without exceptions, so that a mistake is not taken for one.
        let any = Matcher::builder().https(url.to_owned()).build().intercept(&target);
        let any = any.ok_or(ProxyError::Variable("it is not the URL of an HTTP proxy"))?;
        if any.uri().scheme_str() != Some("http") {
            return Err(ProxyError::Variable("only http:// is spoken to proxies"));
        }
        let Some(found) = proxies.no(exceptions.to_owned()).build().intercept(&target) else {
            return Ok(None);
        };
        let host = found.uri().host().filter(|host| !host.is_empty());
        let host = host.ok_or(ProxyError::Variable("it has no host"))?;
        let port = found.uri().port_u16().unwrap_or(DEFAULT_PORT);
        Ok(Some(Self { address: format!("{host}:{port}"), authorization: found.basic_auth().cloned() }))
    }

    /// A connection to `target` (`HOST:PORT`), whose name the proxy resolves.
    async fn connect(&self, target: &str) -> Result<TcpStream, ProxyError> {
        let (proxy, target) = (self.address.clone(), target.to_owned());
        let stream = match TcpStream::connect(&proxy).await {
            Ok(stream) => stream,
            Err(source) => return Err(ProxyError::Unreachable { proxy, target, source }),
        };
        let answer =
            |reason: String| ProxyError::Answer { proxy: proxy.clone(), target: target.clone(), reason };
        let bad = |error: &dyn std::error::Error| answer(crate::grpc::chain(error));
        let mut request = Request::builder().method(Method::CONNECT).uri(&target).header(HOST, &target);
        if let Some(authorization) = &self.authorization {
            request = request.header(PROXY_AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| bad(&error))?;
        let mut http = http1::Builder::new();
        let (mut sender, connection) = http
            .max_buf_size(ANSWER_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| bad(&error))?;
        let asking = async {
            let response = sender.send_request(request).await.map_err(|error| bad(&error))?;
            let status = response.status();
            if status != StatusCode::OK {
                let remedy = self.remedy(status);
                let (proxy, target) = (proxy.clone(), target.clone());
                return Err(ProxyError::Refused { proxy, target, status, remedy });
            }
            hyper::upgrade::on(response).await.map_err(|error| bad(&error))
        };
        let upgraded = tokio::select! {
            upgraded = asking => upgraded?,
            // What is wrong with the connection is told to who waits for the answer.
            never = async { let _ = connection.with_upgrades().await; std::future::pending().await } => never,
        };
        let parts = upgraded
            .downcast::<TokioIo<TcpStream>>()
            .map_err(|_| answer("the connection cannot be used further".to_owned()))?;
        // In TLS, it is the client who begins.
        if parts.read_buf.is_empty() {
            Ok(parts.io.into_inner())
        } else {
            Err(answer("it says more than that the connection stands".to_owned()))
        }
    }

    /// That nothing was heard through it for `limit`.
    fn silent(&self, target: &str, limit: Duration) -> ProxyError {
        let (proxy, target) = (self.address.clone(), target.to_owned());
        ProxyError::Silent { proxy, target, seconds: limit.as_secs() }
    }

    fn remedy(&self, status: StatusCode) -> &'static str {
        // Some say 401 to a wrong password.
        let asks = [StatusCode::PROXY_AUTHENTICATION_REQUIRED, StatusCode::UNAUTHORIZED].contains(&status);
        match status {
            _ if asks && self.authorization.is_some() => {
                "check user and password in HTTPS_PROXY; of the ways to prove them, only Basic is known here"
            }
            _ if asks => "put user and password into HTTPS_PROXY (http://USER:PASSWORD@HOST:PORT)",
            status if status.is_server_error() => {
                "check that something listens at that address, and that the proxy can reach it"
            }
            _ => {
                "have its administrator allow CONNECT to this address and port, or use one that is allowed, such as 443"
            }
        }
    }
}

/// No proxy leads to the host itself.
fn is_this_host(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    const TARGET: &str = "relay.example:7501";

    fn find(url: &str, exceptions: &str, target: &str) -> Option<String> {
        Proxy::find(url, exceptions, target).unwrap().map(|proxy| proxy.address)
    }

    /// What is heard of a proxy that reads a request and answers like this; `None`: it holds the connection, silent.
    async fn ask(url_of: impl Fn(&str) -> String, answer: Option<&[u8]>) -> (Result<String, String>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = listener.local_addr().unwrap().to_string();
        let proxy = Proxy::find(&url_of(&proxy), "", TARGET).unwrap().unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            match answer {
                Some(answer) => {
                    // In small pieces, as a slow one does.
                    for piece in answer.chunks(7) {
                        let _ = stream.write_all(piece).await;
                        tokio::task::yield_now().await;
                    }
                }
                None => std::future::pending().await,
            }
            String::from_utf8(request).unwrap()
        };
        let connect = async {
            let mut stream = proxy.connect(TARGET).await.map_err(|e| e.to_string())?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await.map_err(|e| e.to_string())?;
            Ok(text)
        };
        tokio::join!(connect, serve)
    }

    #[test]
    fn the_environment_is_read_as_other_programs_read_it() {
        for (url, address) in [
            ("http://proxy.example:3128", "proxy.example:3128"),
            ("http://proxy.example", "proxy.example:80"),
            ("proxy.example:3128", "proxy.example:3128"),
            ("http://u:p%40ss@[2001:db8::1]:8080/", "[2001:db8::1]:8080"),
        ] {
            assert_eq!(find(url, "", TARGET).unwrap(), address);
        }
        assert_eq!(find("", "", TARGET), None);
        let proxy = "http://proxy.example:3128";
        for exceptions in ["*", "relay.example", "a, .example ,b"] {
            assert_eq!(find(proxy, exceptions, TARGET), None, "{exceptions}");
        }
        assert!(find(proxy, "lay.example,other.example", TARGET).is_some());
        for target in ["192.0.2.7:443", "[2001:db8::7]:443"] {
            assert_eq!(find(proxy, "192.0.2.0/24,2001:db8::7", target), None, "{target}");
            assert!(find(proxy, "198.51.100.0/24", target).is_some());
        }
        for here in ["127.0.0.1:7500", "[::1]:7500", "localhost:7500", "127.9.9.9:1"] {
            assert_eq!(find(proxy, "", here), None, "{here}");
        }
    }

    #[test]
    fn a_variable_of_no_use_is_an_error_that_hides_it() {
        for url in
            ["socks5://u:secret@p:1", "https://u:secret@p:1", "ftp://secret", "http://", "secret secret"]
        {
            // Also where it would not be used.
            let error = Proxy::find(url, "*", TARGET).err().unwrap().to_string();
            assert!(error.contains("HTTPS_PROXY") && error.contains("http://HOST:PORT"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_good_answer_opens_the_way() {
        let (text, request) = ask(|proxy| format!("http://{proxy}"), Some(b"HTTP/1.0 200 OK\r\n\r\n")).await;
        assert_eq!(text.unwrap(), "", "closed at once");
        assert!(!request.contains("uthorization"), "{request}");
        let url = |proxy: &str| format!("http://Aladdin:open%20sesame@{proxy}");
        let (text, request) = ask(url, Some(b"HTTP/1.1 200 Fine\r\nVia: x\r\n\r\n")).await;
        assert_eq!(text.unwrap(), "");
        assert!(request.starts_with("CONNECT relay.example:7501 HTTP/1.1\r\n"), "{request}");
        assert!(request.to_lowercase().contains("\r\nhost: relay.example:7501\r\n"), "{request}");
        assert!(request.to_lowercase().contains("\r\nproxy-authorization: basic "), "{request}");
        assert!(request.contains("QWxhZGRpbjpvcGVuIHNlc2FtZQ=="), "{request}");
    }

    #[tokio::test]
    async fn what_follows_is_the_servers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let proxy = Proxy::find(&url, "", TARGET).unwrap().unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 1000];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
            let mut hello = [0; 5];
            stream.read_exact(&mut hello).await.unwrap();
            stream.write_all(&hello).await.unwrap();
        };
        let connect = async {
            let mut stream = proxy.connect(TARGET).await.unwrap();
            stream.write_all(b"hello").await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            text
        };
        assert_eq!(tokio::join!(connect, serve).0, "hello");
    }

    #[tokio::test]
    async fn bad_answers_are_explained() {
        let endless = [b"HTTP/1.1 200 OK\r\nx: ".as_slice(), &[b'x'; 40_000]].concat();
        for (answer, parts) in [
            (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n".as_slice(), ["407", "user and password"]),
            (b"HTTP/1.1 401 Unauthorized\r\n\r\n", ["401", "user and password"]),
            (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\nnope", ["403", "443"]),
            (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 400\r\n\r\nab", ["502", "listens"]),
            (b"HTTP/1.1 204 Nothing\r\n\r\n", ["204", "CONNECT"]),
            (b"HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n", ["301", "CONNECT"]),
            (b"SSH-2.0-OpenSSH_9.2\r\n", ["not answer as one", "HTTPS_PROXY"]),
            (b"HTTP/1.1 200", ["not answer as one", "HTTPS_PROXY"]),
            (b"", ["not answer as one", "HTTPS_PROXY"]),
            (&endless, ["not answer as one", "HTTPS_PROXY"]),
        ] {
            let (result, _) = ask(|proxy| format!("http://me:secret@{proxy}"), Some(answer)).await;
            let error = result.unwrap_err();
            for part in parts.iter().chain(&["127.0.0.1:", TARGET]) {
                assert!(error.contains(part), "{part}: {error}");
            }
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_server_that_begins_by_itself_is_none_of_ours() {
        let (result, _) =
            ask(|proxy| format!("http://{proxy}"), Some(b"HTTP/1.1 200 OK\r\n\r\n220 hi")).await;
        // Unless it comes late, and TLS refuses it.
        if let Err(error) = result {
            assert!(error.contains("more than"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_proxy_that_is_not_there_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let proxy = Proxy::find(&format!("http://{address}"), "", TARGET).unwrap().unwrap();
        let error = proxy.connect(TARGET).await.unwrap_err().to_string();
        for part in [&address.to_string(), TARGET, "refused", "NO_PROXY"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_proxy_is_not_waited_for_for_ever() {
        let limit = Duration::from_secs(4);
        let asking = tokio::time::timeout(limit, ask(|proxy| format!("http://{proxy}"), None));
        assert!(asking.await.is_err());
        let proxy = Proxy::find("http://p:1", "", TARGET).unwrap().unwrap();
        let error = proxy.silent(TARGET, limit).to_string();
        assert!(error.contains("p:1") && error.contains(TARGET) && error.contains("4 s"), "{error}");
    }
}
