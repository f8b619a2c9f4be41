//! What a component tells of itself: logs through `tracing`, and an HTTP listener with `/metrics`
//! (OpenMetrics, as Prometheus reads it), `/healthz` (alive) and `/readyz` (fit for traffic).

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header, server::conn::http1, service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::Semaphore};
use tracing_subscriber::EnvFilter;

/// Requests served at a time; more wait in the listen queue.
const CONNECTIONS: usize = 32;
/// How long a client may take to send its request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The `[log]` section of every component's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`) or a list of `target=level`.
    pub level: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Sends logs to standard error from now on. To be called once, first of all.
pub fn init_logs(config: &LogConfig) -> Result<(), crate::config::ConfigError> {
    let filter = EnvFilter::try_new(&config.level)
        .map_err(|e| crate::config::ConfigError::value("log.level", &config.level, e))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // A second call, as tests make it, keeps the first one's set-up.
    let _ = match config.format {
        LogFormat::Text => builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    Ok(())
}

/// The metrics of a component: register metrics with it at start, read them at `/metrics`.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl Metrics {
    /// A registry whose metrics all begin with `prefix`, such as `muster_registrar`.
    pub fn with_prefix(prefix: &str) -> Self {
        Self(Arc::new(Mutex::new(Registry::with_prefix(prefix))))
    }

    /// Gives access to the registry, to register metrics.
    pub fn register(&self, register: impl FnOnce(&mut Registry)) {
        register(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// All metrics as OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match prometheus_client::encoding::text::encode(&mut text, &registry) {
            Ok(()) => text,
            Err(_) => String::new(),
        }
    }
}

/// Whether the component is fit for traffic. Starts as not ready.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<State>);

#[derive(Default)]
struct State {
    ready: AtomicBool,
    trouble: OnceLock<Box<dyn Fn() -> Option<String> + Send + Sync>>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("ready", &self.ready).finish_non_exhaustive()
    }
}

impl Readiness {
    /// Says whether the component is ready.
    pub fn set(&self, ready: bool) {
        self.0.ready.store(ready, Ordering::Release);
    }

    /// Whether the component is ready.
    pub fn get(&self) -> bool {
        self.0.ready.load(Ordering::Acquire)
    }

    /// Has `/readyz` tell, beside whether the component is ready, what `trouble` returns whenever it is asked. To be
    /// called once: later calls change nothing.
    pub fn tell(&self, trouble: impl Fn() -> Option<String> + Send + Sync + 'static) {
        let _ = self.0.trouble.set(Box::new(trouble));
    }

    fn trouble(&self) -> String {
        let trouble = self.0.trouble.get().and_then(|trouble| trouble());
        trouble.map(|trouble| format!("but {trouble}\n")).unwrap_or_default()
    }
}

/// Serves `/metrics`, `/healthz` and `/readyz` on `listener` until the task is dropped.
pub async fn serve(listener: TcpListener, metrics: Metrics, readiness: Readiness) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a metrics connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (metrics, readiness) = (metrics.clone(), readiness.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&request, &metrics, &readiness);
                async move { Ok::<_, Infallible>(response) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "metrics connection ended");
            }
            drop(slot);
        });
    }
}

/// Binds `address` for [`serve`]; the error names the address and the remedy.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, crate::net::BindError> {
    TcpListener::bind(address).await.map_err(|e| crate::net::BindError::new("metrics and health", address, e))
}

fn answer(request: &Request<Incoming>, metrics: &Metrics, readiness: &Readiness) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, OPENMETRICS, metrics.encode()),
        (&Method::GET, "/healthz") => (StatusCode::OK, TEXT, "ok\n".into()),
        (&Method::GET, "/readyz") if readiness.get() => {
            (StatusCode::OK, TEXT, format!("ready\n{}", readiness.trouble()))
        }
        (&Method::GET, "/readyz") => (StatusCode::SERVICE_UNAVAILABLE, TEXT, "not ready\n".into()),
        (&Method::GET, _) => (StatusCode::NOT_FOUND, TEXT, "try /metrics, /healthz or /readyz\n".into()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".into()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
