//! `muster expose`: a Service for a device, or another one for a Service, as kubectl makes it.

use muster_proto::admin::{Device, ObjectMeta, Service, ServicePort, ServiceSpec};

use super::{
    Context,
    create::{make, parse_labels},
};
use crate::{
    args::expose::{Affinity, Expose, Protocol},
    error::{Error, Result},
    manifest,
    resource::{Key, Kind},
    target,
};

pub(super) async fn run(ctx: &mut Context<'_>, args: Expose) -> Result {
    let targets = target::parse(&args.target).map_err(Error::Usage)?;
    let [exposed] = &*targets else {
        return Err(Error::Usage("expose one device or one Service".into()));
    };
    let [name] = &*exposed.names else {
        return Err(Error::Usage("expose one device or one Service".into()));
    };
    let namespace = ctx.namespace();
    let client = ctx.client().await?;
    let key = |namespace| Key { network: client.network().to_owned(), namespace, name: name.clone() };
    let found = match exposed.kind {
        Kind::Device => {
            let device: Device = client.get(&key(String::new())).await?;
            let labels = device.metadata.map(|meta| meta.labels).unwrap_or_default();
            ServiceSpec { selector: labels, ..ServiceSpec::default() }
        }
        Kind::Service => {
            let service: Service = client.get(&key(namespace)).await?;
            let spec = service.spec.unwrap_or_default();
            ServiceSpec { selector: spec.selector, ports: spec.ports, ..ServiceSpec::default() }
        }
        other => {
            let reason =
                format!("a {} cannot be exposed; name a device or a Service", other.names().singular);
            return Err(Error::Usage(reason));
        }
    };
    let service = object(&args, name, found)?;
    make(ctx, service, &args.making).await
}

/// The Service to create, for what has `found` as its selector and ports.
fn object(args: &Expose, exposed: &str, found: ServiceSpec) -> Result<Service> {
    let selector = if args.selector.is_empty() { found.selector } else { parse_labels(&args.selector)? };
    if selector.is_empty() {
        let reason = format!("{exposed} has no labels to select it by; label it, or give --selector");
        return Err(Error::Usage(reason));
    }
    let ports = match args.port {
        Some(port) => vec![ServicePort {
            protocol: match args.protocol {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
                Protocol::Sctp => "SCTP",
            }
            .to_owned(),
            port: port.into(),
            target_port: args.target_port.clone().unwrap_or_else(|| port.to_string()),
            ..ServicePort::default()
        }],
        None => found.ports,
    };
    if ports.is_empty() {
        return Err(Error::Usage(format!("{exposed} has no ports to take over; give --port")));
    }
    let spec = ServiceSpec {
        r#type: args.kind.clone(),
        selector,
        ports,
        cluster_ip: args.cluster_ip.clone().unwrap_or_default(),
        external_ips: args.external_ip.iter().map(ToString::to_string).collect(),
        session_affinity: match args.session_affinity {
            Some(Affinity::ClientIp) => "ClientIP".to_owned(),
            Some(Affinity::None) => "None".to_owned(),
            None => String::new(),
        },
        ..ServiceSpec::default()
    };
    let name = args.name.clone().unwrap_or_else(|| exposed.to_owned());
    let labels = parse_labels(&args.labels.labels)?;
    let metadata = ObjectMeta { name: name.clone(), labels, ..ObjectMeta::default() };
    let service = Service { metadata: Some(metadata), spec: Some(spec), status: None };
    manifest::check_service(&service)
        .map_err(|(field, reason)| Error::Usage(format!("service/{name}: {field}: {reason}")))?;
    Ok(service)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn args(words: &str) -> Expose {
        let words = ["muster", "expose"].into_iter().chain(words.split(' '));
        match Cli::try_parse_from(words).unwrap().command {
            Command::Expose(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn labelled() -> ServiceSpec {
        ServiceSpec { selector: [("app".to_owned(), "web".to_owned())].into(), ..ServiceSpec::default() }
    }

    #[test]
    fn a_device_is_exposed_by_its_labels() {
        let wanted =
            args("device web --port=80 --target-port=http --protocol=udp --session-affinity=ClientIP");
        let service = object(&wanted, "web", labelled()).unwrap();
        let spec = service.spec.unwrap();
        assert_eq!((service.metadata.unwrap().name, &spec.selector), ("web".into(), &labelled().selector));
        let port = &spec.ports[0];
        assert_eq!((port.port, &*port.target_port, &*port.protocol), (80, "http", "UDP"));
        assert_eq!(spec.session_affinity, "ClientIP");
        // Without labels, or without a port, there is nothing to go by.
        for (words, found, said) in [
            ("device web --port=80", ServiceSpec::default(), "no labels"),
            ("device web", labelled(), "give --port"),
        ] {
            let error = object(&args(words), "web", found).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let other = args("device web --port=80 --selector=app=shop --name=shop");
        let service = object(&other, "web", ServiceSpec::default()).unwrap();
        assert_eq!(service.spec.unwrap().selector["app"], "shop");
    }

    #[test]
    fn a_service_is_exposed_with_its_ports() {
        let port = ServicePort { port: 80, target_port: "8080".into(), ..ServicePort::default() };
        let found = ServiceSpec { ports: vec![port], ..labelled() };
        let service =
            object(&args("service/web --name=web-2 --external-ip=192.0.2.7"), "web", found).unwrap();
        let spec = service.spec.unwrap();
        assert_eq!((&*service.metadata.unwrap().name, &*spec.ports[0].target_port), ("web-2", "8080"));
        assert_eq!(spec.external_ips, ["192.0.2.7"]);
    }
}
