//! Who the registrar is to etcd: the token that goes along with each request, and how a new one is come by.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use muster_common::time::Instant;
use tokio::sync::Mutex;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};
use zeroize::Zeroizing;

use super::{EtcdConfig, bad};
use crate::store::StoreError;

/// How long a password that etcd has refused is not tried again. Checking one is meant to cost etcd time.
const PAUSE: Duration = Duration::from_secs(5);

/// What goes along with each request.
#[derive(Clone, Debug, Default)]
pub(super) struct Token {
    value: Option<MetadataValue<Ascii>>,
    /// Tells it from the token before.
    number: u64,
}

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        // A member that is cut off from the others says so instead of staying silent, and ends its watches.
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        if let Some(value) = &self.value {
            request.metadata_mut().insert("token", value.clone());
        }
        Ok(request)
    }
}

/// The user whom the registrar is to etcd, if any, and the user's token.
#[derive(Debug)]
pub(super) struct Auth {
    user: Option<User>,
    /// Held while a new token is asked for, so that one request is enough for all who need it.
    state: Mutex<State>,
}

#[derive(Debug)]
struct User {
    name: String,
    password_file: PathBuf,
}

#[derive(Debug, Default)]
struct State {
    token: Token,
    /// When, and how, etcd has last refused the password.
    refused: Option<(Instant, String)>,
}

impl Auth {
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let user = match (&config.username, &config.password_file) {
            (Some(name), Some(file)) => {
                password(file)?;
                Some(User { name: name.clone(), password_file: file.clone() })
            }
            (None, None) => None,
            (Some(_), None) => return Err(bad("etcd.password_file", "etcd.username is set without it")),
            (None, Some(_)) => return Err(bad("etcd.username", "etcd.password_file is set without it")),
        };
        Ok(Self { user, state: Mutex::default() })
    }

    /// The user's name.
    pub(super) fn user(&self) -> Option<&str> {
        self.user.as_ref().map(|user| user.name.as_str())
    }

    /// The token to use: another one than `refused`. `authenticate` is called, with name and password, if none is
    /// there; it returns a token, or nothing if etcd does not ask who anybody is, or else why it refuses.
    ///
    /// # Errors
    /// [`StoreError::Config`] if etcd refuses the password, or has done so a moment ago; those of `authenticate`.
    pub(super) async fn token<E: From<StoreError>>(
        &self,
        refused: Option<&Token>,
        authenticate: impl AsyncFnOnce(&str, &str) -> Result<Result<Option<String>, String>, E>,
    ) -> Result<Token, E> {
        let Some(user) = &self.user else { return Ok(Token::default()) };
        let mut state = self.state.lock().await;
        if refused.map_or(state.token.number != 0, |refused| refused.number != state.token.number) {
            return Ok(state.token.clone());
        }
        if let Some((_, reason)) = state.refused.as_ref().filter(|(when, _)| Instant::now() - *when < PAUSE) {
            return Err(bad("etcd.password_file", reason).into());
        }
        // Read each time, so that a new password needs no restart.
        let password = password(&user.password_file)?;
        let value = match authenticate(&user.name, &password).await? {
            Ok(Some(token)) => Some(MetadataValue::try_from(token).map_err(|_| {
                StoreError::Unavailable("etcd's token for the user has characters that no token has".into())
            })?),
            Ok(None) => {
                tracing::warn!(
                    user = user.name,
                    "etcd lets in everybody: authentication is not enabled there"
                );
                None
            }
            Err(reason) => {
                let file = user.password_file.display();
                let reason =
                    format!("etcd refuses the password in {file} for the user {:?}: {reason}", user.name);
                tracing::error!("{reason}");
                state.refused = Some((Instant::now(), reason.clone()));
                return Err(bad("etcd.password_file", reason).into());
            }
        };
        state.refused = None;
        state.token = Token { value, number: state.token.number + 1 };
        Ok(state.token.clone())
    }
}

/// The password in the first line of a file that only its owner may read.
fn password(path: &Path) -> Result<Zeroizing<String>, StoreError> {
    let failed = |action| move |source| StoreError::Io { action, path: path.into(), source };
    let mode = std::fs::metadata(path).map_err(failed("read"))?.permissions().mode();
    if mode & 0o077 != 0 {
        let shown = path.display();
        let reason = format!(
            "{shown} holds a password, but others can read it (mode {:03o}); run: chmod 600 {shown}",
            mode & 0o777
        );
        return Err(bad("etcd.password_file", reason));
    }
    let text = Zeroizing::new(std::fs::read_to_string(path).map_err(failed("read"))?);
    match text.lines().next().filter(|line| !line.is_empty()) {
        Some(line) => Ok(Zeroizing::new(line.to_owned())),
        None => {
            Err(bad("etcd.password_file", format!("{} has no password in its first line", path.display())))
        }
    }
}
