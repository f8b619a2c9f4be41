//! `muster create service`: the Service that the words describe, as kubectl makes it.

use muster_common::labels::Labels;
use muster_proto::admin::{ObjectMeta, Service, ServicePort, ServiceSpec};

use crate::{
    args::{CreateService, Making, PortPair, Ports},
    error::{Error, Result},
    manifest,
};

/// The Service, and how to create it.
pub(super) fn object(args: &CreateService) -> Result<(Service, &Making)> {
    let (name, kind, given, making) = match args {
        CreateService::ClusterIp(args) => (&args.name, "ClusterIP", &args.ports, &args.making),
        CreateService::NodePort(args) => (&args.name, "NodePort", &args.ports, &args.making),
        CreateService::LoadBalancer(args) => (&args.name, "LoadBalancer", &args.ports, &args.making),
        CreateService::ExternalName(args) => (&args.name, "ExternalName", &args.ports, &args.making),
    };
    let app = Labels::from([("app".to_owned(), name.clone())]);
    let mut spec = ServiceSpec {
        r#type: kind.to_owned(),
        selector: app.clone(),
        ports: ports(given),
        ..ServiceSpec::default()
    };
    match args {
        CreateService::ClusterIp(args) => {
            spec.cluster_ip = args.cluster_ip.clone().unwrap_or_default();
            if spec.ports.is_empty() && spec.cluster_ip != "None" {
                return Err(Error::Usage("give a port with --tcp or --udp, or --clusterip=None".into()));
            }
        }
        CreateService::ExternalName(args) => spec.external_name.clone_from(&args.external_name),
        CreateService::NodePort(_) | CreateService::LoadBalancer(_) => {}
    }
    let metadata = ObjectMeta { name: name.clone(), labels: app, ..ObjectMeta::default() };
    let service = Service { metadata: Some(metadata), spec: Some(spec), status: None };
    manifest::check_service(&service)
        .map_err(|(field, reason)| Error::Usage(format!("service/{name}: {field}: {reason}")))?;
    Ok((service, making))
}

/// Ports are called as they are written, `5678-8080`; one of a number that another protocol has, too, ends in its name.
fn ports(given: &Ports) -> Vec<ServicePort> {
    let of = |pairs: &[PortPair], protocol: &str, others: &[PortPair]| -> Vec<ServicePort> {
        let port = |pair: &PortPair| {
            let shared = others.iter().any(|other| other.text == pair.text);
            let suffix = if shared { format!("-{}", protocol.to_ascii_lowercase()) } else { String::new() };
            ServicePort {
                name: pair.text.replace(':', "-") + &suffix,
                protocol: protocol.to_owned(),
                port: pair.port.into(),
                target_port: pair.target.clone(),
                ..ServicePort::default()
            }
        };
        pairs.iter().map(port).collect()
    };
    [of(&given.tcp, "TCP", &given.udp), of(&given.udp, "UDP", &given.tcp)].concat()
}
