//! Networks, for operators.

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use muster_common::{labels::Labels, time::Timestamp};
use muster_proto::admin::{
    CreateNetworkRequest, CreateNetworkResponse, DeleteNetworkRequest, DeleteNetworkResponse, EventType,
    GetNetworkRequest, GetNetworkResponse, ListNetworksRequest, ListNetworksResponse, Network,
    UpdateNetworkRequest, UpdateNetworkResponse, WatchNetworksRequest, WatchNetworksResponse,
    network_service_server::NetworkService,
};
use tonic::{Request, Response, Status};

use super::{
    Api,
    list::{Page, selector},
    random_uid,
    status::status,
    watch::{self, Kind, Versions},
};
use crate::{
    registry::{
        self, Change, CommitError, Index,
        index::NetworkState,
        plan::{AdminError, network as plan},
    },
    store::Revision,
};

#[derive(Debug)]
pub(super) struct Networks(pub(super) Arc<Api>);

fn show(state: &NetworkState) -> Network {
    state.network.to_proto(state.devices.len() as u64)
}

fn not_found(name: &str) -> Status {
    status(AdminError::NotFound { kind: "network", name: name.chars().take(80).collect() })
}

static NO_LABELS: Labels = Labels::new();

fn labels(network: &registry::Network) -> &Labels {
    network.stored.metadata.as_ref().map_or(&NO_LABELS, |meta| &meta.labels)
}

impl Networks {
    fn get(&self, name: &str) -> Result<Network, Status> {
        let index = self.0.registry.read();
        index.network(&name.to_ascii_lowercase()).map(show).ok_or_else(|| not_found(name))
    }

    /// Locks a network that has no devices, runs `then` with the lock's revision, and, if that failed, unlocks.
    async fn locked<R>(
        &self,
        name: &str,
        version: Revision,
        then: impl AsyncFnOnce(Revision) -> Result<R, CommitError<AdminError>>,
    ) -> Result<R, Status> {
        let (registry, mine) = (&self.0.registry, random_uid());
        registry.commit(|index, _| plan::lock(index, name, version, mine)).await.map_err(status)?;
        let locked = registry.read().lock_revision(name);
        let Some(lock) = locked else { return Err(status(AdminError::Locked(name.to_owned()))) };
        let result = then(lock).await;
        if result.is_err()
            && let Err(error) = registry.store().txn(plan::unlock(name, lock)).await
        {
            tracing::warn!(network = name, %error, "cannot unlock a network; it is unlocked in a minute or two");
        }
        result.map_err(status)
    }
}

#[tonic::async_trait]
impl NetworkService for Networks {
    type WatchNetworksStream = Pin<Box<dyn Stream<Item = Result<WatchNetworksResponse, Status>> + Send>>;

    async fn get_network(
        &self,
        request: Request<GetNetworkRequest>,
    ) -> Result<Response<GetNetworkResponse>, Status> {
        self.0.operator(&request)?;
        Ok(Response::new(GetNetworkResponse { network: Some(self.get(&request.get_ref().name)?) }))
    }

    async fn list_networks(
        &self,
        request: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        self.0.operator(&request)?;
        let registry = &self.0.registry;
        let page = Page::new(request.into_inner().options, registry.read().revision())?;
        let after = |after: &str, limit: usize| -> Vec<(Arc<registry::Network>, u64)> {
            let index = registry.read();
            let later = index.networks().filter(|state| &*state.network.name > after).take(limit);
            later.map(|state| (state.network.clone(), state.devices.len() as u64)).collect()
        };
        let (found, next_page_token) =
            page.collect(after, |(network, _)| &network.name, |_| true, |(network, _)| labels(network));
        let networks = found.iter().map(|(network, devices)| network.to_proto(*devices)).collect();
        Ok(Response::new(ListNetworksResponse { networks, next_page_token, resource_version: page.revision }))
    }

    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<CreateNetworkResponse>, Status> {
        self.0.operator(&request)?;
        let network = request.into_inner().network.unwrap_or_default();
        let (uid, random, now) = (random_uid(), rand::random(), Timestamp::now());
        let created =
            self.0.registry.commit(|index, _| plan::create(index, &network, uid, random, now)).await;
        let name = created.map_err(status)?;
        tracing::info!(network = name, "network created");
        Ok(Response::new(CreateNetworkResponse { network: Some(self.get(&name)?) }))
    }

    async fn update_network(
        &self,
        request: Request<UpdateNetworkRequest>,
    ) -> Result<Response<UpdateNetworkResponse>, Status> {
        self.0.operator(&request)?;
        let UpdateNetworkRequest { network, update_mask: mask } = request.into_inner();
        let mut network = network.unwrap_or_default();
        let registry = &self.0.registry;
        let updated = registry.commit(|index, _| plan::update(index, &network, mask.as_ref(), None)).await;
        let meta = network.metadata.get_or_insert_default();
        let name = meta.name.to_ascii_lowercase();
        if updated.map_err(status)? == plan::NeedsLock::Yes {
            let version = meta.resource_version;
            self.locked(&name, version, async |lock| {
                registry.commit(|index, _| plan::update(index, &network, mask.as_ref(), Some(lock))).await
            })
            .await?;
        }
        Ok(Response::new(UpdateNetworkResponse { network: Some(self.get(&name)?) }))
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        self.0.operator(&request)?;
        let DeleteNetworkRequest { name, resource_version } = request.into_inner();
        let name = name.to_ascii_lowercase();
        let registry = &self.0.registry;
        self.locked(&name, resource_version, async |lock| {
            while !registry.commit(|index, _| plan::delete(index, &name, lock)).await? {}
            Ok(())
        })
        .await?;
        tracing::info!(network = name, "network deleted");
        Ok(Response::new(DeleteNetworkResponse {}))
    }

    async fn watch_networks(
        &self,
        request: Request<WatchNetworksRequest>,
    ) -> Result<Response<Self::WatchNetworksStream>, Status> {
        self.0.operator(&request)?;
        let WatchNetworksRequest { label_selector, resource_version } = request.into_inner();
        let selector = selector("label_selector", &label_selector)?;
        let stream = watch::start(self.0.clone(), Watched, selector, resource_version).await?;
        Ok(Response::new(Box::pin(stream)))
    }
}

struct Watched;

impl Kind for Watched {
    type Object = registry::Network;
    type Response = WatchNetworksResponse;

    fn after(&self, index: &Index, after: &str, limit: usize) -> Vec<Arc<registry::Network>> {
        let all = index.networks().map(|state| &state.network);
        all.filter(|network| &*network.name > after).take(limit).cloned().collect()
    }

    fn of(change: &Change) -> Option<Versions<'_, registry::Network>> {
        let Change::Network { old, new } = change else { return None };
        Some((old.as_ref(), new.as_ref()))
    }

    fn includes(&self, _: &registry::Network) -> bool {
        true
    }

    fn name(network: &registry::Network) -> &str {
        &network.name
    }

    fn labels(network: &registry::Network) -> &Labels {
        labels(network)
    }

    fn revision(network: &registry::Network) -> Revision {
        network.revision
    }

    fn response(
        &self,
        api: &Api,
        event: EventType,
        network: Option<&registry::Network>,
        revision: Revision,
    ) -> WatchNetworksResponse {
        let devices =
            |name: &str| api.registry.read().network(name).map_or(0, |state| state.devices.len() as u64);
        WatchNetworksResponse {
            r#type: event.into(),
            network: network.map(|network| network.to_proto(devices(&network.name))),
            resource_version: revision,
        }
    }
}
