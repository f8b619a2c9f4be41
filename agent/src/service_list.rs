//! The Services of a namespace, as a registrar lists them; the last lists are kept, within bounds, for when no registrar
//! can be reached.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use muster_common::{
    grpc,
    name::{Label, NameError},
};
use muster_proto::registration::{
    ListServicesRequest, ListServicesResponse, VisibleService,
    registration_service_client::RegistrationServiceClient,
};
use prost::Message;
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Code, Status, transport::Channel};

/// Services that a list may have.
const LIST_MAX: usize = 20_000;
/// Octets that a list may have on the wire, and all lists that are kept together.
const OCTETS_MAX: usize = 16 << 20;
/// Namespaces whose lists are kept.
const LISTS_MAX: usize = 64;
/// How long a registrar may take for a whole list.
const PATIENCE: Duration = Duration::from_secs(10);
/// Lists that are asked for at the same time.
const CALLS_MAX: usize = 4;

/// How it stands with the registrar.
#[derive(Debug)]
pub struct Registrar {
    /// The connection, if there is one.
    pub channel: Option<Channel>,
    /// Whether the registrar refuses this device.
    pub refused: bool,
    /// Why there is no connection.
    pub last_error: String,
    /// The device's own namespace.
    pub namespace: String,
}

/// Why there is no list.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// Not a namespace.
    #[error("cannot list Services: {0}")]
    Namespace(#[from] NameError),
    /// The registrar says no.
    #[error("the registrar refuses to list the Services of namespace {namespace}: {reason}")]
    Refused {
        /// The namespace.
        namespace: Label,
        /// What it says.
        reason: String,
    },
    /// Nobody can be asked, and nothing is known.
    #[error(
        "cannot list the Services of namespace {namespace}: no registrar can be reached ({reason}), and they have not been listed since the agent was started\nremedy: `muster-agent status` shows how it stands with the registrar; try again once it is connected"
    )]
    Unavailable {
        /// The namespace.
        namespace: Label,
        /// Why nobody can be asked.
        reason: String,
    },
    /// More than anybody wants to read.
    #[error(
        "cannot list the Services of namespace {0}: this device may see more than {LIST_MAX} of them, or more than {mib} MiB",
        mib = OCTETS_MAX >> 20
    )]
    TooMany(Label),
}

/// The lists that are kept.
#[derive(Debug)]
pub struct ServiceLists {
    kept: Mutex<Kept>,
    calls: Semaphore,
}

impl Default for ServiceLists {
    fn default() -> Self {
        Self { kept: Mutex::default(), calls: Semaphore::new(CALLS_MAX) }
    }
}

impl ServiceLists {
    /// The Services of `namespace`, of the device's own if that is empty, sorted by name: as the registrar tells them,
    /// or as it told them last if it cannot be reached.
    pub async fn list(
        &self,
        registrar: Registrar,
        namespace: &str,
    ) -> Result<Vec<VisibleService>, ListError> {
        let Registrar { channel, refused, last_error, namespace: own } = registrar;
        let namespace = if namespace.is_empty() { &own } else { namespace }.parse::<Label>()?;
        let asked = match channel {
            _ if refused => Err(Failed::Refused(last_error)),
            None => Err(Failed::Unavailable(last_error)),
            Some(channel) => {
                // Never closed: if it were, there would be no bound, and nothing else wrong.
                let _permit = self.calls.acquire().await;
                let fetched = timeout(PATIENCE, gather(|page_token| page(&channel, &namespace, page_token)));
                let silent =
                    |_| Err(Failed::Unavailable(format!("no answer within {} s", PATIENCE.as_secs())));
                fetched.await.unwrap_or_else(silent)
            }
        };
        self.settle(namespace, asked)
    }

    /// Keeps what has been listed, or gives what is kept.
    fn settle(
        &self,
        namespace: Label,
        asked: Result<Vec<VisibleService>, Failed>,
    ) -> Result<Vec<VisibleService>, ListError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match asked {
            Ok(services) => {
                kept.put(namespace, services.clone());
                Ok(services)
            }
            Err(Failed::Unavailable(reason)) => match kept.get(&namespace) {
                Some(services) => {
                    tracing::warn!(%namespace, reason, "no registrar can be reached: telling of Services as they were listed last");
                    Ok(services.to_vec())
                }
                None if reason.is_empty() => {
                    Err(ListError::Unavailable { namespace, reason: "not connected yet".into() })
                }
                None => Err(ListError::Unavailable { namespace, reason }),
            },
            Err(Failed::Refused(reason)) => {
                kept.remove(&namespace);
                Err(ListError::Refused { namespace, reason })
            }
            Err(Failed::TooMany) => {
                kept.remove(&namespace);
                Err(ListError::TooMany(namespace))
            }
        }
    }
}

#[derive(Debug)]
enum Failed {
    Refused(String),
    Unavailable(String),
    TooMany,
}

async fn page(
    channel: &Channel,
    namespace: &Label,
    page_token: String,
) -> Result<ListServicesResponse, Status> {
    let request = ListServicesRequest { namespace: namespace.to_string(), page_token };
    Ok(RegistrationServiceClient::new(channel.clone()).list_services(request).await?.into_inner())
}

/// All pages, one after the other.
async fn gather<F>(mut page: impl FnMut(String) -> F) -> Result<Vec<VisibleService>, Failed>
where
    F: Future<Output = Result<ListServicesResponse, Status>>,
{
    let (mut services, mut octets, mut token) = (Vec::new(), 0, String::new());
    loop {
        let ListServicesResponse { services: more, next_page_token } = page(token).await.map_err(failed)?;
        octets += octets_of(&more);
        let is_empty = more.is_empty();
        services.extend(more);
        if services.len() > LIST_MAX || octets > OCTETS_MAX {
            return Err(Failed::TooMany);
        }
        if next_page_token.is_empty() {
            services.sort_by(|a, b| a.name.cmp(&b.name));
            return Ok(services);
        }
        // So that every page brings the end nearer.
        if is_empty {
            return Err(Failed::Unavailable("the registrar sends empty pages".into()));
        }
        token = next_page_token;
    }
}

fn failed(status: Status) -> Failed {
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented => Failed::Refused(grpc::words(&status)),
        _ => Failed::Unavailable(grpc::words(&status)),
    }
}

fn octets_of(services: &[VisibleService]) -> usize {
    // Each with its tag and length.
    services.iter().map(|service| service.encoded_len() + 5).sum()
}

#[derive(Debug, Default)]
struct Kept {
    /// Each with its number: the lowest is the oldest.
    lists: BTreeMap<Label, (u64, Vec<VisibleService>)>,
    next: u64,
}

impl Kept {
    fn put(&mut self, namespace: Label, services: Vec<VisibleService>) {
        self.next += 1;
        self.lists.insert(namespace, (self.next, services));
        let octets = |lists: &BTreeMap<_, (u64, Vec<VisibleService>)>| -> usize {
            lists.values().map(|(_, services)| octets_of(services)).sum()
        };
        while self.lists.len() > LISTS_MAX || octets(&self.lists) > OCTETS_MAX {
            let oldest = self.lists.iter().min_by_key(|(_, (number, _))| *number);
            let Some(oldest) = oldest.map(|(namespace, _)| namespace.clone()) else { break };
            self.lists.remove(&oldest);
        }
    }

    fn get(&self, namespace: &Label) -> Option<&[VisibleService]> {
        self.lists.get(namespace).map(|(_, services)| &**services)
    }

    fn remove(&mut self, namespace: &Label) {
        self.lists.remove(namespace);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> VisibleService {
        VisibleService { name: name.into(), cluster_ips: vec!["100.64.7.1".into()], ports: vec![] }
    }

    fn response(names: &[&str], next: &str) -> ListServicesResponse {
        ListServicesResponse {
            services: names.iter().map(|n| service(n)).collect(),
            next_page_token: next.into(),
        }
    }

    fn away(reason: &str) -> Registrar {
        Registrar { channel: None, refused: false, last_error: reason.into(), namespace: "default".into() }
    }

    #[tokio::test]
    async fn pages_are_gathered_in_order() {
        let mut asked = Vec::new();
        let services = gather(|token| {
            asked.push(token.clone());
            std::future::ready(Ok(match &*token {
                "" => response(&["a", "b"], "b"),
                _ => response(&["c"], ""),
            }))
        });
        assert_eq!(services.await.unwrap(), ["a", "b", "c"].map(service));
        assert_eq!(asked, ["", "b"]);
    }

    #[tokio::test]
    async fn a_registrar_without_end_is_left() {
        let same = |_| std::future::ready(Ok(response(&["a"; 500], "a")));
        assert!(matches!(gather(same).await, Err(Failed::TooMany)));
        let empty = |_| std::future::ready(Ok(response(&[], "a")));
        assert!(matches!(gather(empty).await, Err(Failed::Unavailable(_))));
        let long = |_| std::future::ready(Ok(response(&[&"x".repeat(1 << 20)], "a")));
        assert!(matches!(gather(long).await, Err(Failed::TooMany)));
    }

    #[tokio::test]
    async fn the_last_list_is_given_while_no_registrar_can_be_reached() {
        let lists = ServiceLists::default();
        let error = lists.list(away("connection refused"), "").await.unwrap_err().to_string();
        for part in ["namespace default", "connection refused", "muster-agent status"] {
            assert!(error.contains(part), "{error}");
        }
        let default: Label = "default".parse().unwrap();
        lists.settle(default.clone(), Ok(vec![service("web")])).unwrap();
        for own in ["", "default"] {
            assert_eq!(lists.list(away(""), own).await.unwrap(), [service("web")]);
        }
        assert!(lists.list(away(""), "shop").await.is_err());
        // Not to a device that is refused, nor afterwards.
        let refused = Registrar { refused: true, ..away("the device has been revoked") };
        let error = lists.list(refused, "").await.unwrap_err().to_string();
        assert!(error.contains("revoked"), "{error}");
        assert!(lists.list(away(""), "").await.is_err());
        let error = lists.list(away(""), "a b").await.unwrap_err();
        assert!(matches!(error, ListError::Namespace(_)), "{error}");
    }

    #[tokio::test]
    async fn what_a_status_means() {
        let lists = ServiceLists::default();
        let namespace: Label = "default".parse().unwrap();
        lists.settle(namespace.clone(), Ok(vec![service("web")])).unwrap();
        let broken = gather(|_| std::future::ready(Err(Status::unavailable("broken")))).await;
        assert_eq!(lists.settle(namespace.clone(), broken).unwrap().len(), 1);
        let denied = gather(|_| std::future::ready(Err(Status::permission_denied("revoked")))).await;
        assert!(matches!(lists.settle(namespace, denied), Err(ListError::Refused { .. })));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut kept = Kept::default();
        let label = |n: usize| -> Label { format!("n{n}").parse().unwrap() };
        for n in 0..=LISTS_MAX {
            kept.put(label(n), vec![service("a")]);
        }
        assert_eq!((kept.lists.len(), kept.get(&label(0))), (LISTS_MAX, None));
        // One that is asked for again is not the oldest.
        kept.put(label(1), vec![service("a")]);
        kept.put(label(0), vec![service("a")]);
        assert!(kept.get(&label(1)).is_some() && kept.get(&label(2)).is_none());
        let large = || vec![service(&"x".repeat(10 << 20))];
        kept.put(label(7), large());
        kept.put(label(8), large());
        assert!(kept.get(&label(7)).is_none() && kept.get(&label(8)).is_some());
    }
}
