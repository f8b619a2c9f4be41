//! Registrars, for operators. They come into being when they run.

use std::sync::Arc;

use muster_common::labels::Labels;
use muster_proto::admin::{
    DeleteRegistrarRequest, DeleteRegistrarResponse, EventType, GetRegistrarRequest, GetRegistrarResponse,
    ListRegistrarsRequest, ListRegistrarsResponse, WatchRegistrarsRequest, WatchRegistrarsResponse,
    registrar_service_server::RegistrarService,
};
use tonic::{Request, Response, Status};

use super::{
    Api,
    list::{Page, selector},
    object::Events,
    status::status,
    watch::{self, Kind, Versions},
};
use crate::{
    registry::{Change, Index, Registrar, plan::registrar as plan},
    store::Revision,
};

#[derive(Debug)]
pub(super) struct Registrars(pub(super) Arc<Api>);

#[tonic::async_trait]
impl RegistrarService for Registrars {
    type WatchRegistrarsStream = Events<WatchRegistrarsResponse>;

    async fn get_registrar(
        &self,
        request: Request<GetRegistrarRequest>,
    ) -> Result<Response<GetRegistrarResponse>, Status> {
        self.0.operator(&request)?;
        let index = self.0.registry.read();
        let registrar = plan::get(&index, &request.get_ref().name).map_err(status)?;
        Ok(Response::new(GetRegistrarResponse { registrar: Some(plan::show(&index, registrar)) }))
    }

    async fn list_registrars(
        &self,
        request: Request<ListRegistrarsRequest>,
    ) -> Result<Response<ListRegistrarsResponse>, Status> {
        self.0.operator(&request)?;
        let index = self.0.registry.read();
        let page = Page::new(request.into_inner().options, index.revision())?;
        let (found, next_page_token) = page.collect(
            |after, limit| index.registrars().after(after, limit),
            |registrar| &registrar.name,
            |_| true,
            |registrar| registrar.labels(),
        );
        Ok(Response::new(ListRegistrarsResponse {
            registrars: found.iter().map(|registrar| plan::show(&index, registrar)).collect(),
            next_page_token,
            resource_version: page.revision,
        }))
    }

    async fn delete_registrar(
        &self,
        request: Request<DeleteRegistrarRequest>,
    ) -> Result<Response<DeleteRegistrarResponse>, Status> {
        self.0.operator(&request)?;
        let DeleteRegistrarRequest { name, resource_version } = request.into_inner();
        let deleted = self.0.registry.commit(|index, _| plan::delete(index, &name, resource_version)).await;
        deleted.map_err(status)?;
        tracing::info!(name, "registrar deleted");
        Ok(Response::new(DeleteRegistrarResponse {}))
    }

    async fn watch_registrars(
        &self,
        request: Request<WatchRegistrarsRequest>,
    ) -> Result<Response<Self::WatchRegistrarsStream>, Status> {
        self.0.operator(&request)?;
        let WatchRegistrarsRequest { label_selector, resource_version } = request.into_inner();
        let selector = selector("label_selector", &label_selector)?;
        let stream = watch::start(self.0.clone(), Watched, selector, resource_version).await?;
        Ok(Response::new(Box::pin(stream)))
    }
}

struct Watched;

impl Kind for Watched {
    type Object = Registrar;
    type Response = WatchRegistrarsResponse;

    fn after(&self, index: &Index, after: &str, limit: usize) -> Vec<Arc<Registrar>> {
        index.registrars().after(after, limit)
    }

    fn of(change: &Change) -> Option<Versions<'_, Registrar>> {
        let Change::RegistrarRecord { old, new } = change else { return None };
        Some((old.as_ref(), new.as_ref()))
    }

    fn includes(&self, _: &Registrar) -> bool {
        true
    }

    fn name(registrar: &Registrar) -> &str {
        &registrar.name
    }

    fn labels(registrar: &Registrar) -> &Labels {
        registrar.labels()
    }

    fn revision(registrar: &Registrar) -> Revision {
        registrar.revision
    }

    fn response(
        &self,
        api: &Api,
        event: EventType,
        registrar: Option<&Registrar>,
        revision: Revision,
    ) -> WatchRegistrarsResponse {
        WatchRegistrarsResponse {
            r#type: event.into(),
            registrar: registrar.map(|registrar| plan::show(&api.registry.read(), registrar)),
            resource_version: revision,
        }
    }
}
