//! `muster create`.

use std::io::Write;

use muster_common::{
    labels::{self, Labels},
    time::Timestamp,
};
use muster_proto::admin::{
    Device, DeviceSpec, DirectorAddress, Namespace, Network, NetworkSpec, ObjectMeta, Token, TokenSpec,
};

use super::{
    Context,
    apply::{self, Plan},
    service,
};
use crate::{
    age::{moment, timestamp},
    args::{Create, CreateDevice, CreateNetwork, CreateToken, CreateWhat, DryRun, Format, Making, Printing},
    error::{Error, Result},
    manifest,
    output::{print_change, print_document},
    resource::{Resource, Secret, is_for_directors},
};

pub(super) async fn run(ctx: &mut Context<'_>, args: Create) -> Result {
    match args.what {
        None if args.filename.is_empty() => {
            Err(Error::Usage("say what to create, or give a file with -f".into()))
        }
        None => from_files(ctx, &args).await,
        Some(CreateWhat::Token(args)) => token(ctx, args).await,
        Some(CreateWhat::Network(args)) => {
            let network = network(&args)?;
            one(ctx, network, &args.printing).await
        }
        Some(CreateWhat::Device(args)) => {
            let mut device = device(&args)?;
            let client = ctx.client().await?;
            let meta = device.metadata_mut();
            meta.network = client.network().to_owned();
            meta.namespace = ctx.namespace();
            one(ctx, device, &args.printing).await
        }
        Some(CreateWhat::Namespace(args)) => {
            let metadata = ObjectMeta {
                name: args.name,
                labels: parse_labels(&args.labels.labels)?,
                ..ObjectMeta::default()
            };
            make(ctx, Namespace { metadata: Some(metadata), status: None }, &args.making).await
        }
        Some(CreateWhat::Service(args)) => {
            let (service, making) = service::object(&args)?;
            make(ctx, service, making).await
        }
    }
}

async fn from_files(ctx: &mut Context<'_>, args: &Create) -> Result {
    let manifests = manifest::load(&args.filename).map_err(Error::Manifests)?;
    let plan = Plan { only_create: true, dry_run: args.dry_run, printing: &args.printing };
    Box::pin(apply::all(ctx, manifests, plan)).await
}

/// Fills in network and namespace where a manifest leaves them out.
pub(super) async fn complete<R: Resource>(ctx: &mut Context<'_>, mut object: R) -> Result<R> {
    let client = ctx.client().await?;
    let names = R::KIND.names();
    let meta = object.metadata_mut();
    if names.in_network && meta.network.is_empty() {
        meta.network = client.network().to_owned();
    }
    if names.namespaced && meta.namespace.is_empty() {
        meta.namespace = ctx.namespace();
    }
    Ok(object)
}

/// Creates an object, or shows what would be created.
/// Creates an object, or shows what would be created.
pub(super) async fn make<R: Resource>(ctx: &mut Context<'_>, object: R, making: &Making) -> Result {
    // Without the registrar, there is no need to know the network.
    let object = if making.dry_run == Some(DryRun::Client) { object } else { complete(ctx, object).await? };
    match making.dry_run {
        None => one(ctx, object, &making.printing).await,
        Some(dry_run) => {
            let object = match dry_run {
                DryRun::Client => object,
                DryRun::Server => ctx.client().await?.check_create(object).await?,
            };
            print_change(ctx.out, making.printing.output, &object, &dry_run.says("created"))
        }
    }
}

async fn one<R: Resource>(ctx: &mut Context<'_>, object: R, printing: &Printing) -> Result {
    let client = ctx.client().await?;
    let (object, secret) = client.create(object).await?;
    created(ctx.out, ctx.err, &object, secret.as_ref(), printing)
}

/// Tells of what was created.
pub(super) fn created<R: Resource>(
    out: &mut dyn Write,
    err: &mut dyn Write,
    object: &R,
    secret: Option<&Secret>,
    printing: &Printing,
) -> Result {
    let Some(secret) = secret else { return print_change(out, printing.output, object, "created") };
    match printing.output {
        Some(format @ (Format::Json | Format::Yaml)) => {
            let mut value = manifest::value(object);
            if let Some(map) = value.as_object_mut() {
                map.insert("secret".into(), secret.token.clone().into());
                map.insert("joinCommand".into(), secret.join_command.clone().into());
            }
            print_document(out, format == Format::Yaml, &value)
        }
        None => {
            writeln!(err, "{} created. Run this on the host that is to join:", object.qualified_name())?;
            Ok(writeln!(out, "{}", secret.join_command)?)
        }
        other => print_change(out, other, object, "created"),
    }
}

async fn token(ctx: &mut Context<'_>, args: CreateToken) -> Result {
    if args.director && ctx.global.namespace.is_some() {
        return Err(Error::Usage("a director is in no namespace; leave out --namespace".into()));
    }
    let mut token = token_object(&args, &ctx.namespace(), ctx.now)?;
    let client = ctx.client().await?;
    token.metadata_mut().network = client.network().to_owned();
    let (token, secret) = client.create(token).await?;
    if let (None, Some(secret)) = (args.printing.output, &secret) {
        let spec = token.spec.clone().unwrap_or_default();
        let who = match (is_for_directors(&spec), spec.reusable) {
            (false, true) => "any number of devices",
            (false, false) => "one device",
            (true, true) => "any number of directors",
            (true, false) => "one director",
        };
        let until = moment(timestamp(spec.expires_at.as_ref()), ctx.now);
        // The command alone goes to standard output, for scripts.
        writeln!(ctx.err, "{} created: lets {who} join until {until}", token.qualified_name())?;
        return Ok(writeln!(ctx.out, "{}", secret.join_command)?);
    }
    created(ctx.out, ctx.err, &token, secret.as_ref(), &args.printing)
}

fn token_object(args: &CreateToken, namespace: &str, now: Timestamp) -> Result<Token> {
    let expires_at = args.ttl.map(|ttl| pbjson_types::Timestamp {
        seconds: i64::try_from((now + ttl).unix_seconds()).unwrap_or(i64::MAX),
        nanos: 0,
    });
    Ok(Token {
        metadata: Some(ObjectMeta { name: args.name.clone().unwrap_or_default(), ..ObjectMeta::default() }),
        spec: Some(TokenSpec {
            reusable: args.reusable,
            expires_at,
            device_namespace: if args.director { String::new() } else { namespace.to_owned() },
            device_labels: parse_labels(&args.labels.labels)?,
            party: if args.director { "director".to_owned() } else { String::new() },
            ..TokenSpec::default()
        }),
        status: None,
    })
}

fn network(args: &CreateNetwork) -> Result<Network> {
    let text = |pool: Option<String>| pool.unwrap_or_default();
    let directors = args.directors.iter().map(|director| DirectorAddress {
        name: director.name.clone(),
        address: director.address.ip().to_string(),
        port: director.address.port().into(),
        ..DirectorAddress::default()
    });
    let proto = |d: std::time::Duration| pbjson_types::Duration {
        seconds: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(d.subsec_nanos()).unwrap_or(0),
    };
    Ok(Network {
        metadata: Some(ObjectMeta {
            name: args.name.clone(),
            labels: parse_labels(&args.labels.labels)?,
            ..ObjectMeta::default()
        }),
        spec: Some(NetworkSpec {
            domain: args.domain.clone(),
            public_addresses: args.public_addresses.iter().map(ToString::to_string).collect(),
            device_pool_v4: text(args.device_pool_v4.map(|p| p.to_string())),
            device_pool_v6: text(args.device_pool_v6.map(|p| p.to_string())),
            service_pool_v4: text(args.service_pool_v4.map(|p| p.to_string())),
            service_pool_v6: text(args.service_pool_v6.map(|p| p.to_string())),
            directors: directors.collect(),
            record_ttl: args.record_ttl.map(proto),
            address_quarantine: args.address_quarantine.map(proto),
            external_domain: String::new(),
        }),
        status: None,
    })
}

fn device(args: &CreateDevice) -> Result<Device> {
    Ok(Device {
        metadata: Some(ObjectMeta {
            name: args.name.clone(),
            labels: parse_labels(&args.labels.labels)?,
            ..ObjectMeta::default()
        }),
        spec: Some(DeviceSpec {
            virtual_ipv4: args.virtual_ipv4.map(|a| a.to_string()).unwrap_or_default(),
            virtual_ipv6: args.virtual_ipv6.map(|a| a.to_string()).unwrap_or_default(),
            revoked: false,
            may_proxy: args.may_proxy,
            subnets: args.subnets.iter().map(ToString::to_string).collect(),
        }),
        status: None,
    })
}

/// Reads `KEY=VALUE` labels.
pub(super) fn parse_labels(words: &[String]) -> Result<Labels> {
    let mut all = Labels::new();
    for word in words {
        let (key, value) = word
            .split_once('=')
            .ok_or_else(|| Error::Usage(format!("{word:?} is not a label; write KEY=VALUE")))?;
        if all.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(Error::Usage(format!("label {key:?} is given twice")));
        }
    }
    labels::check(&all).map_err(|e| Error::Usage(e.to_string()))?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(line: &str) -> CreateWhat {
        match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Create(Create { what: Some(what), .. }) => what,
            other => unreachable!("{other:?}"),
        }
    }

    #[test]
    fn tokens_are_made_as_asked() {
        let CreateWhat::Token(args) = parse("muster create token --reusable --ttl 1h -l role=web,tier=a")
        else {
            unreachable!()
        };
        let token = token_object(&args, "prod", Timestamp::from_epoch(Duration::from_secs(100))).unwrap();
        let spec = token.spec.unwrap();
        assert!(spec.reusable);
        assert_eq!(spec.expires_at.unwrap().seconds, 3700);
        assert_eq!(spec.device_namespace, "prod");
        assert_eq!(spec.device_labels.len(), 2);
        let CreateWhat::Token(args) = parse("muster create token --director") else { unreachable!() };
        let token = token_object(&args, "default", Timestamp::from_epoch(Duration::ZERO)).unwrap();
        let spec = token.spec.unwrap();
        assert_eq!((&*spec.party, &*spec.device_namespace), ("director", ""));
    }

    #[test]
    fn networks_are_made_as_asked() {
        let CreateWhat::Network(args) = parse(
            "muster create network lab --domain lab.example --public-address 192.0.2.1 --device-pool-v4 10.0.0.0/8 --director d=[::1]:7570 --record-ttl 0",
        ) else {
            unreachable!()
        };
        let spec = network(&args).unwrap().spec.unwrap();
        assert_eq!(spec.public_addresses, ["192.0.2.1"]);
        assert_eq!(spec.device_pool_v4, "10.0.0.0/8");
        assert_eq!((spec.directors[0].address.as_str(), spec.directors[0].port), ("::1", 7570));
        assert_eq!(spec.record_ttl.unwrap().seconds, 0);
        assert_eq!(spec.address_quarantine, None);
    }

    #[test]
    fn devices_are_made_as_asked() {
        let CreateWhat::Device(args) = parse(
            "muster create device gate --may-proxy --subnet 10.1.0.0/24,FD07::/64 --subnet 10.2.0.0/24",
        ) else {
            unreachable!()
        };
        let spec = device(&args).unwrap().spec.unwrap();
        assert!(spec.may_proxy);
        assert_eq!(spec.subnets, ["10.1.0.0/24", "fd07::/64", "10.2.0.0/24"]);
        let CreateWhat::Device(args) = parse("muster create device web") else { unreachable!() };
        assert_eq!(device(&args).unwrap().spec, Some(DeviceSpec::default()));
    }

    #[test]
    fn labels_are_checked_before_anything_is_asked() {
        for bad in ["role", "=x", "a=-", "a b=c"] {
            assert!(parse_labels(&[bad.to_owned()]).is_err(), "{bad}");
        }
        assert!(parse_labels(&["a=b".into(), "a=c".into()]).is_err());
    }
}
