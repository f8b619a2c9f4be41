//! Directors, for operators. They come into being when they join.

use std::sync::Arc;

use muster_common::labels::Labels;
use muster_proto::admin::{
    DeleteDirectorRequest, DeleteDirectorResponse, Director, EventType, GetDirectorRequest,
    GetDirectorResponse, ListDirectorsRequest, ListDirectorsResponse, UpdateDirectorRequest,
    UpdateDirectorResponse, WatchDirectorsRequest, WatchDirectorsResponse,
    director_service_server::DirectorService,
};
use tonic::{Request, Response, Status};

use super::{
    Api,
    object::{Events, Object},
    status::status,
    watch::Versions,
};
use crate::{
    registry::{self, Change, index::NetworkState, plan::director as plan},
    store::Revision,
};

#[derive(Debug)]
pub(super) struct Directors(pub(super) Arc<Api>);

fn show(api: &Api, director: &registry::Director) -> Director {
    director.to_proto(api.hub.attached(director.uid))
}

#[tonic::async_trait]
impl DirectorService for Directors {
    type WatchDirectorsStream = Events<WatchDirectorsResponse>;

    async fn get_director(
        &self,
        request: Request<GetDirectorRequest>,
    ) -> Result<Response<GetDirectorResponse>, Status> {
        self.0.operator(&request)?;
        let GetDirectorRequest { network, name } = request.into_inner();
        let director = plan::get(&self.0.registry.read(), &network, &name).map_err(status)?.clone();
        Ok(Response::new(GetDirectorResponse { director: Some(show(&self.0, &director)) }))
    }

    async fn list_directors(
        &self,
        request: Request<ListDirectorsRequest>,
    ) -> Result<Response<ListDirectorsResponse>, Status> {
        self.0.operator(&request)?;
        let ListDirectorsRequest { network, options } = request.into_inner();
        let listed = self.0.list::<registry::Director>(&network, "", options)?;
        Ok(Response::new(ListDirectorsResponse {
            directors: listed.objects.iter().map(|director| show(&self.0, director)).collect(),
            next_page_token: listed.next_page_token,
            resource_version: listed.revision,
        }))
    }

    async fn update_director(
        &self,
        request: Request<UpdateDirectorRequest>,
    ) -> Result<Response<UpdateDirectorResponse>, Status> {
        self.0.operator(&request)?;
        let UpdateDirectorRequest { director, update_mask: mask } = request.into_inner();
        let wanted = director.unwrap_or_default();
        let updated = self.0.registry.commit(|index, _| plan::update(index, &wanted, mask.as_ref())).await;
        let uid = updated.map_err(status)?;
        let network = wanted.metadata.as_ref().map_or("", |meta| &meta.network);
        let written = self.0.registry.read().director(network, uid).cloned();
        let written = written.ok_or_else(|| Status::aborted("the director was deleted at the same time"))?;
        let (revoked, drained) = (written.is_revoked(), written.is_drained());
        tracing::info!(network, name = &*written.name, revoked, drained, "director changed");
        Ok(Response::new(UpdateDirectorResponse { director: Some(show(&self.0, &written)) }))
    }

    async fn delete_director(
        &self,
        request: Request<DeleteDirectorRequest>,
    ) -> Result<Response<DeleteDirectorResponse>, Status> {
        self.0.operator(&request)?;
        let DeleteDirectorRequest { network, name, resource_version } = request.into_inner();
        self.0
            .registry
            .commit(|index, _| plan::delete(index, &network, &name, resource_version))
            .await
            .map_err(status)?;
        tracing::info!(network, name, "director deleted");
        Ok(Response::new(DeleteDirectorResponse {}))
    }

    async fn watch_directors(
        &self,
        request: Request<WatchDirectorsRequest>,
    ) -> Result<Response<Self::WatchDirectorsStream>, Status> {
        self.0.operator(&request)?;
        let WatchDirectorsRequest { network, label_selector, resource_version } = request.into_inner();
        let stream =
            self.0.watch::<registry::Director>(network, String::new(), &label_selector, resource_version);
        Ok(Response::new(stream.await?))
    }
}

impl Object for registry::Director {
    type Response = WatchDirectorsResponse;

    fn after(state: &NetworkState, after: &str, limit: usize) -> Vec<Arc<Self>> {
        state.directors.after(after).take(limit).cloned().collect()
    }

    fn of(change: &Change) -> Option<Versions<'_, Self>> {
        let Change::Director { old, new } = change else { return None };
        Some((old.as_ref(), new.as_ref()))
    }

    fn network(&self) -> &str {
        &self.network
    }

    fn namespace(&self) -> &str {
        ""
    }

    fn key(&self) -> &str {
        &self.name
    }

    fn labels(&self) -> &Labels {
        self.labels()
    }

    fn revision(&self) -> Revision {
        self.revision
    }

    fn response(
        api: &Api,
        event: EventType,
        director: Option<&Self>,
        revision: Revision,
    ) -> WatchDirectorsResponse {
        WatchDirectorsResponse {
            r#type: event.into(),
            director: director.map(|director| show(api, director)),
            resource_version: revision,
        }
    }
}
