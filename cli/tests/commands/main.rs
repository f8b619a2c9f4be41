//! Commands from the command line to the text they print, against a fake of the admin API.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod approve;
mod fake;

use std::{
    io::{self, Write},
    time::Duration,
};

use clap::Parser;
use fake::Fake;
use muster_cli::{args::Cli, client::Client, command};
use muster_common::time::Timestamp;
use tokio::sync::mpsc;

const NOW: Timestamp = Timestamp::from_epoch(Duration::from_secs(1_000_000));

/// What a command printed, and its exit code.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    out: String,
    err: String,
    code: u8,
}

struct Operator {
    fake: Fake,
    address: String,
}

impl Operator {
    async fn new() -> Self {
        let (fake, client) = Fake::start().await;
        Self { fake, address: client.registrar().to_owned() }
    }

    fn client(&self) -> Client {
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        Client::new(channel.connect_lazy(), self.address.clone(), "net".into(), Duration::from_secs(10))
    }

    /// Runs a command whose words are separated by single spaces.
    async fn run(&self, line: &str) -> Ran {
        let cli = Cli::try_parse_from(["muster"].into_iter().chain(line.split(' '))).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let result = Box::pin(command::run(cli, Some(self.client()), &mut out, &mut err, NOW)).await;
        let mut err = String::from_utf8(err).unwrap();
        let code = result.map_or_else(
            |error| {
                err.push_str(&format!("= {error}\n"));
                error.exit_code()
            },
            |()| 0,
        );
        Ran { out: String::from_utf8(out).unwrap(), err, code }
    }

    /// As [`Self::run`]; the command must succeed, and print `out` and nothing else.
    async fn prints(&self, line: &str, out: &str) {
        let ran = self.run(line).await;
        assert_eq!(ran, Ran { out: out.to_owned(), err: String::new(), code: 0 }, "{line}");
    }

    /// As [`Self::run`]; the command must fail with exit code 1 and say `message`.
    async fn fails(&self, line: &str, message: &str) {
        let ran = self.run(line).await;
        assert!(ran.code == 1 && ran.err.contains(message), "{line}: {ran:?}");
    }
}

async fn with_devices(names: &[&str]) -> Operator {
    let operator = Operator::new().await;
    for name in names {
        operator.prints(&format!("create device {name}"), &format!("device/{name} created\n")).await;
    }
    operator
}

#[tokio::test]
async fn devices_are_made_listed_labelled_and_deleted() {
    let operator = with_devices(&["a", "b", "c"]).await;
    operator.prints("create device d -n prod -l role=web", "device/d created\n").await;
    operator.prints("get devices -o name", "device/a\ndevice/b\ndevice/c\n").await;
    operator.prints("get dev -A -o name -l role=web", "device/d\n").await;
    operator.prints("get device/b device/d -o name", "device/b\ndevice/d\n").await;
    operator
        .prints(
            "get device d",
            "NAME   STATUS    VIRTUAL-IPV4   AGE\nd      Pending   <none>         <unknown>\n",
        )
        .await;
    let ran = operator.run("get devices -n none").await;
    assert_eq!((ran.err.as_str(), ran.code), ("No resources found in none namespace.\n", 0));

    operator.prints("label devices a b role=db", "device/a labeled\ndevice/b labeled\n").await;
    operator.prints("label devices -l role=db role=db", "device/a not labeled\ndevice/b not labeled\n").await;
    operator.prints("label device a role-", "device/a unlabeled\n").await;
    operator
        .fails("label device b role=web", "device/b: \"role\" already has a value (db); --overwrite")
        .await;
    operator.prints("label device b role=web --overwrite -o name", "device/b\n").await;
    operator.prints("annotate device b owner=x", "device/b annotated\n").await;

    operator.prints("revoke device b", "device/b revoked\n").await;
    assert!(operator.fake.device("b").unwrap().spec.unwrap().revoked);
    operator.prints("delete device a b", "device \"a\" deleted\ndevice \"b\" deleted\n").await;
    operator.prints("delete devices --all", "device \"c\" deleted\n").await;
    operator.prints("get devices -A -o name", "device/d\n").await;
}

#[tokio::test]
async fn directors_are_shown_drained_and_revoked() {
    let operator = Operator::new().await;
    operator
        .prints(
            "get directors",
            "NAME   STATUS    REGION   ENDPOINT             ATTACHED    AGE\n\
             d1     Ready     eu       [2001:db8::1]:7501   12          <unknown>\n\
             d2     Offline   eu       [2001:db8::1]:7501   <unknown>   <unknown>\n",
        )
        .await;
    operator.prints("drain director d1", "director/d1 drained\n").await;
    assert!(operator.fake.director("d1").unwrap().drained);
    operator.prints("undrain dir/d1 -o name", "director/d1\n").await;
    assert!(!operator.fake.director("d1").unwrap().drained);
    operator.prints("revoke director d2", "director/d2 revoked\n").await;
    assert!(operator.fake.director("d2").unwrap().revoked);
    operator.prints("delete director d2", "director \"d2\" deleted\n").await;
    assert!(operator.fake.director("d2").is_none());
    let described = operator.run("describe director d1").await.out;
    assert!(described.contains("Attached devices"), "{described}");
    operator.fails("get director none", "directors \"none\" not found").await;
    for line in ["drain device a", "drain directors", "create token --director -n prod"] {
        assert_eq!(operator.run(line).await.code, 2, "{line}");
    }
}

#[tokio::test]
async fn a_manifest_changes_a_director_and_makes_none() {
    let operator = Operator::new().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("director.yaml");
    let write = |name: &str| {
        let manifest = format!(
            "apiVersion: muster/v1\nkind: Director\nmetadata: {{name: {name}}}\nspec: {{drained: true}}\n"
        );
        std::fs::write(&file, manifest).unwrap();
    };
    let line = format!("apply -f {}", file.display());
    write("d1");
    operator.prints(&line, "director/d1 configured\n").await;
    operator.prints(&line, "director/d1 unchanged\n").await;
    assert!(operator.fake.director("d1").unwrap().drained);
    write("d9");
    operator.fails(&line, "muster create token --director").await;
}

#[tokio::test]
async fn what_is_missing_is_told_and_the_rest_is_done() {
    let operator = with_devices(&["a", "b"]).await;
    let ran = operator.run("get device a none b -o name").await;
    assert_eq!(ran.out, "device/a\ndevice/b\n");
    assert_eq!(
        (ran.err.as_str(), ran.code),
        ("muster: devices \"none\" not found in network \"net\"\n= 1 of the objects failed\n", 1)
    );
    operator.fails("delete device none a", "devices \"none\" not found").await;
    assert!(operator.fake.device("a").is_none());
    operator.prints("delete device none --ignore-not-found", "").await;
    operator
        .fails("get device b -n prod", "not found in namespace \"prod\"; there is one in \"default\"")
        .await;
    operator.fails("delete device b -n prod", "not found in namespace").await;
    assert!(operator.fake.device("b").is_some());
    operator
        .fails("create device b", "cannot create device \"b\" in network \"net\": the name is taken")
        .await;
}

#[tokio::test]
async fn refusals_have_remedies() {
    let operator = Operator::new().await;
    operator.fails("get tokens", "does not accept the credential: no certificate; give an operator's").await;
    operator
        .fails("get token x", "not allowed to get token \"x\" in network \"net\": operator alice may not")
        .await;
    operator.fails("delete token x", "upgrade it").await;
    operator.fails("get networks", "upgrade it").await;
    assert_eq!(operator.run("get devices pods/x").await.code, 2);
    assert_eq!(operator.run("delete devices").await.code, 2);
    assert_eq!(operator.run("label device a").await.code, 2);
    assert_eq!(operator.run("get devices,tokens -w").await.code, 2);
}

#[tokio::test]
async fn conflicts_are_tried_again() {
    let operator = with_devices(&["a"]).await;
    operator.fake.conflict(2);
    operator.prints("label device a x=y", "device/a labeled\n").await;
    operator.fake.conflict(99);
    operator.fails("label device a x-", "it has changed").await;
}

#[tokio::test]
async fn json_is_an_object_or_a_list() {
    let operator = with_devices(&["a", "b"]).await;
    let value = |ran: Ran| serde_json::from_str::<serde_json::Value>(&ran.out).unwrap();
    let one = value(operator.run("get device a -o json").await);
    assert_eq!((&one["apiVersion"], &one["kind"]), (&"muster/v1".into(), &"Device".into()));
    assert_eq!(one["metadata"]["namespace"], "default");
    let list = value(operator.run("get devices -o json").await);
    assert_eq!((&list["kind"], list["items"].as_array().unwrap().len()), (&"List".into(), 2));
    let none = value(operator.run("get devices -n none -o json").await);
    assert_eq!(none["items"], serde_json::json!([]));
}

#[tokio::test]
async fn tokens_come_with_their_command() {
    let operator = Operator::new().await;
    let ran = operator.run("create token --ttl 1h").await;
    assert_eq!(ran.out, "muster-agent join --token muster.k3v9.secret\n");
    assert_eq!(ran.err, "token/k3v9 created: lets one device join until 1970-01-12T14:46:40Z (in 60m)\n");
    let json: serde_json::Value =
        serde_json::from_str(&operator.run("create token -o json").await.out).unwrap();
    assert_eq!(json["secret"], "muster.k3v9.secret");
    assert_eq!(json["spec"]["deviceNamespace"], "default");
}

#[tokio::test]
async fn manifests_are_applied() {
    let operator = with_devices(&["a"]).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("devices.yaml");
    let path = file.display();
    let write = |labels: &str| {
        let device = |name| {
            format!(
                "apiVersion: muster/v1\nkind: Device\nmetadata: {{name: {name}, labels: {labels}}}\n---\n"
            )
        };
        std::fs::write(&file, device("a") + &device("new")).unwrap();
    };
    write("{role: web}");
    operator.prints(&format!("apply -f {path}"), "device/a configured\ndevice/new created\n").await;
    operator.prints(&format!("apply -f {path}"), "device/a unchanged\ndevice/new unchanged\n").await;
    write("{role: db}");
    operator.fake.conflict(1);
    operator.prints(&format!("apply -f {path}"), "device/a configured\ndevice/new configured\n").await;
    // What is printed can be applied.
    std::fs::write(&file, operator.run("get devices -o yaml").await.out).unwrap();
    operator.prints(&format!("apply -f {path}"), "device/a unchanged\ndevice/new unchanged\n").await;
    // A mistake in one document keeps all from being applied.
    write("{role: 1}");
    operator.fails(&format!("apply -f {path}"), "document 1: metadata.labels").await;
    assert_eq!(operator.fake.device("a").unwrap().metadata.unwrap().labels["role"], "db");
}

const MANIFESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests");

#[tokio::test]
async fn what_kubectl_prints_is_applied_and_what_is_printed_too() {
    let operator = Operator::new().await;
    let ran = operator.run(&format!("apply -f {MANIFESTS}")).await;
    assert_eq!(
        ran.out,
        "namespace/shop created\nservice/my-cs created\nservice/db created\nservice/headless created\nservice/lb created\nendpointslice/headless-x7k2p created\n",
        "{ran:?}"
    );
    assert_eq!(ran.code, 0);
    let warnings: Vec<_> = ran.err.lines().filter(|line| line.contains("left out")).collect();
    assert_eq!(warnings.len(), 3, "{}", ran.err);
    let of_items = "items[0].endpoints[0].hints, items[0].metadata.ownerReferences";
    assert!(
        warnings[0]
            .ends_with("headless.yml: left out, as it has no meaning here: items[0].metadata.finalizers")
    );
    assert!(warnings[1].contains("spec.ports[0].nodePort") && warnings[1].contains("spec.loadBalancerClass"));
    assert!(
        warnings[2].ends_with(&format!("kubectl-list.json: left out, as it has no meaning here: {of_items}"))
    );
    let ran = operator.run(&format!("apply -f {MANIFESTS}")).await;
    assert_eq!(ran.out.matches(" unchanged").count(), 6, "{}", ran.out);

    let table = operator.run("get svc -n shop").await.out;
    assert!(table.starts_with("NAME"), "{table}");
    assert!(table.contains("TYPE           CLUSTER-IP   EXTERNAL-IP"), "{table}");
    let printed = operator.run("get svc,endpointslices,ns -n shop -o yaml").await.out;
    assert!(printed.starts_with("apiVersion: v1\n") && printed.contains("targetPort: 9376"), "{printed}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("all.yaml");
    std::fs::write(&file, &printed).unwrap();
    let ran = operator.run(&format!("apply -f {}", file.display())).await;
    assert_eq!((ran.err.as_str(), ran.out.matches(" unchanged").count()), ("", 6), "{ran:?}");

    operator.prints("delete svc lb -n shop", "service \"lb\" deleted\n").await;
    operator.fails("get svc lb -n shop", "services \"lb\" not found in namespace \"shop\"").await;
    assert_eq!(operator.run("get svc lb -A").await.code, 2);
}

#[tokio::test]
async fn nothing_is_half_applied() {
    let operator = Operator::new().await;
    operator.fake.refuse("lb");
    let ran = operator.run(&format!("apply -f {MANIFESTS}")).await;
    assert_eq!((operator.fake.objects(), ran.code), (vec![], 1), "{ran:?}");
    assert!(ran.err.contains("outside the network's service pool"), "{ran:?}");
    assert!(ran.err.contains("namespace/shop deleted again"), "{ran:?}");
    // With the namespace there, it is seen before anything is done.
    operator.prints("create namespace shop", "namespace/shop created\n").await;
    let ran = operator.run(&format!("apply -f {MANIFESTS}")).await;
    assert_eq!((operator.fake.objects(), ran.code), (vec!["/shop".into()], 1), "{ran:?}");
    assert!(ran.err.contains("nothing has been changed") && ran.out.is_empty(), "{ran:?}");
}

#[tokio::test]
async fn services_are_created_as_kubectl_creates_them() {
    let operator = Operator::new().await;
    operator
        .prints(
            "create service clusterip a --tcp=5678:8080 --udp=53:dns --dry-run",
            "service/a created (server dry run)\n",
        )
        .await;
    operator.prints("create svc nodeport a --tcp=80 --dry-run=client -o name", "service/a\n").await;
    assert!(operator.fake.objects().is_empty());
    operator.prints("create service clusterip a --tcp=5678:8080 --udp=53:dns", "service/a created\n").await;
    operator.prints("create service clusterip b --clusterip=None", "service/b created\n").await;
    operator
        .prints("create service externalname c --external-name db.example.com", "service/c created\n")
        .await;
    assert_eq!(operator.run("create service clusterip d").await.code, 2);
    assert_eq!(operator.run("create service externalname d --external-name a..b").await.code, 2);
    assert_eq!(
        operator.run("get svc -o wide").await.out,
        "\
NAME   TYPE           CLUSTER-IP   EXTERNAL-IP      PORT(S)           AGE         SELECTOR
a      ClusterIP      100.96.1.7   <none>           5678/TCP,53/UDP   <unknown>   app=a
b      ClusterIP      None         <none>           <none>            <unknown>   app=b
c      ExternalName   <none>       db.example.com   <none>            <unknown>   app=c
"
    );
    operator.prints("label svc a x=y", "service/a labeled\n").await;
    let ran = operator.run("describe svc a").await;
    assert!(ran.out.contains("5678-8080 5678/TCP to 8080"), "{}", ran.out);
    operator.fails("create service clusterip a --tcp=1 -n none", "namespace \"none\" does not exist").await;
}

/// Hands over each line as it is written.
struct Lines(mpsc::UnboundedSender<String>, String);

impl Lines {
    fn pipe() -> (Self, mpsc::UnboundedReceiver<String>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender, String::new()), receiver)
    }
}

impl Write for Lines {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.1.push_str(std::str::from_utf8(text).unwrap());
        while let Some((line, rest)) = self.1.split_once('\n') {
            let _ = self.0.send(line.to_owned());
            self.1 = rest.to_owned();
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn watches_show_what_is_there_and_what_changes() {
    let operator = with_devices(&["a"]).await;
    let cli = Cli::try_parse_from(["muster", "get", "devices", "-w", "--output-watch-events"]).unwrap();
    let (mut write, mut lines) = Lines::pipe();
    let client = operator.client();
    let watch = async move {
        let mut err = Vec::new();
        Box::pin(command::run(cli, Some(client), &mut write, &mut err, NOW)).await
    };
    let read = async {
        let mut next = async || lines.recv().await.unwrap();
        assert!(next().await.starts_with("EVENT"));
        assert!(next().await.starts_with("ADDED      a"));
        while !operator.fake.is_watched() {
            tokio::task::yield_now().await;
        }
        operator.run("create device b").await;
        operator.run("label device b x=y").await;
        operator.run("delete device b").await;
        for event in ["ADDED", "MODIFIED", "DELETED"] {
            assert!(next().await.starts_with(event));
        }
    };
    tokio::select! {
        result = watch => panic!("the watch ended: {result:?}"),
        () = read => {}
    }
}
