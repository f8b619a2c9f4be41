//! What a query is about, as query logs tell it.

use hickory_proto::rr::RecordType::{A, SRV};
use muster_dns::{directory::Viewer, engine::Metadata};

use crate::{network::Asking, support::query};

#[test]
fn what_a_query_is_about() {
    let net = Asking::with(|_| {});
    let of = |net: &Asking, name: &str, kind| {
        net.engine.metadata(&query(name, kind).to_vec().unwrap(), &net.context)
    };
    let client = Metadata {
        client_namespace: "default".to_owned(),
        client_device: "web".to_owned(),
        ..Metadata::default()
    };
    let svc = Metadata {
        service: "db".to_owned(),
        namespace: "prod".to_owned(),
        kind: "svc".to_owned(),
        ..client.clone()
    };
    assert_eq!(of(&net, "DB.prod.svc.net.example.", A), svc);
    let ports = Metadata { port_name: "pg".to_owned(), protocol: "tcp".to_owned(), ..svc.clone() };
    assert_eq!(of(&net, "_pg._tcp.db.prod.svc.net.example.", SRV), ports);
    let endpoint = Metadata { endpoint: "db-0".to_owned(), ..svc };
    assert_eq!(of(&net, "db-0.db.prod.svc.net.example.", A), endpoint);
    let pod = Metadata {
        kind: "pod".to_owned(),
        namespace: "prod".to_owned(),
        endpoint: "10-0-0-1".to_owned(),
        ..client.clone()
    };
    assert_eq!(of(&net, "10-0-0-1.prod.pod.net.example.", A), pod);
    assert_eq!(of(&net, "web.net.example.", A), client);
    assert_eq!(of(&net, "example.org.", A), Metadata::default());
    let stranger = net.viewer(Viewer::Stranger);
    assert_eq!(of(&stranger, "db.prod.svc.net.example.", A), Metadata::default());
    assert_eq!(stranger.engine.metadata(b"x", &stranger.context), Metadata::default());
}
