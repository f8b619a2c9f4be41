//! Directors of the fake: there are `d1`, which is online, and `d2`, which is not.

use muster_proto::admin::{
    Director, DirectorSpec, DirectorStatus, director_service_server::DirectorService, *,
};
use tonic::{Request, Response, Status};

use super::Fake;

/// What there is at the beginning.
pub(super) fn initial() -> Vec<Director> {
    let director = |name: &str, online, attached| Director {
        metadata: Some(ObjectMeta { name: name.into(), network: "net".into(), ..Default::default() }),
        spec: Some(DirectorSpec::default()),
        status: Some(DirectorStatus {
            phase: "Ready".into(),
            region: "eu".into(),
            endpoints: vec![Endpoint { address: "2001:db8::1".into(), port: 7501 }],
            online,
            attached,
            ..Default::default()
        }),
    };
    vec![director("d1", true, 12), director("d2", false, 0)]
}

fn name(director: &Director) -> &str {
    director.metadata.as_ref().map_or("", |meta| &meta.name)
}

#[tonic::async_trait]
impl DirectorService for Fake {
    type WatchDirectorsStream =
        futures_util::stream::BoxStream<'static, Result<WatchDirectorsResponse, Status>>;

    async fn get_director(
        &self,
        request: Request<GetDirectorRequest>,
    ) -> Result<Response<GetDirectorResponse>, Status> {
        let wanted = request.into_inner().name;
        let found = self.state.lock().unwrap().directors.iter().find(|one| name(one) == wanted).cloned();
        let director = found.ok_or_else(|| Status::not_found("no such director"))?;
        Ok(Response::new(GetDirectorResponse { director: Some(director) }))
    }

    async fn list_directors(
        &self,
        _: Request<ListDirectorsRequest>,
    ) -> Result<Response<ListDirectorsResponse>, Status> {
        let directors = self.state.lock().unwrap().directors.clone();
        Ok(Response::new(ListDirectorsResponse { directors, ..Default::default() }))
    }

    async fn update_director(
        &self,
        request: Request<UpdateDirectorRequest>,
    ) -> Result<Response<UpdateDirectorResponse>, Status> {
        let UpdateDirectorRequest { director, update_mask } = request.into_inner();
        let (wanted, mask) = (director.unwrap(), update_mask.unwrap());
        let mut state = self.state.lock().unwrap();
        let found = state.directors.iter_mut().find(|one| name(one) == name(&wanted)).unwrap();
        let (spec, new) = (found.spec.as_mut().unwrap(), wanted.spec.unwrap());
        for path in mask.paths {
            match path.as_str() {
                "spec.revoked" => spec.revoked = new.revoked,
                "spec.drained" => spec.drained = new.drained,
                other => return Err(Status::invalid_argument(other.to_owned())),
            }
        }
        Ok(Response::new(UpdateDirectorResponse { director: Some(found.clone()) }))
    }

    async fn delete_director(
        &self,
        request: Request<DeleteDirectorRequest>,
    ) -> Result<Response<DeleteDirectorResponse>, Status> {
        let wanted = request.into_inner().name;
        self.state.lock().unwrap().directors.retain(|one| name(one) != wanted);
        Ok(Response::new(DeleteDirectorResponse {}))
    }

    async fn watch_directors(
        &self,
        _: Request<WatchDirectorsRequest>,
    ) -> Result<Response<Self::WatchDirectorsStream>, Status> {
        Err(Status::unimplemented("not here"))
    }
}
