//! Prints objects: tables, JSON, YAML, names.

use std::io::Write;

use muster_common::{labels::Labels, time::Timestamp};
use serde_json::Value;

use crate::{
    age::{age, timestamp},
    args::{Format, Output, Showing},
    error::{Error, Result},
    manifest,
    resource::Resource,
    table::{Column, Layout, labels},
};

/// How rows of a table are made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    /// `-o wide`
    pub wide: bool,
    /// Whether there is a column with the namespace.
    pub namespace: bool,
    /// Whether there is a column with the labels.
    pub labels: bool,
    /// Whether names are written `device/web`.
    pub qualified: bool,
    /// Whether there is a column that tells what happened.
    pub event: bool,
}

impl Style {
    /// The style that `showing` asks for.
    pub fn new(showing: &Showing) -> Self {
        Self { wide: showing.output == Some(Output::Wide), labels: showing.show_labels, ..Self::default() }
    }

    /// The titles of a table of `R`.
    pub fn titles<R: Resource>(&self) -> Vec<String> {
        let column = |wanted: bool, title| wanted.then_some(title);
        let of_kind = |wide| R::COLUMNS.iter().filter(move |c| c.wide == wide).map(|c| c.title);
        column(self.event, "EVENT")
            .into_iter()
            .chain(column(self.namespace, "NAMESPACE"))
            .chain(["NAME"])
            .chain(of_kind(false))
            .chain(["AGE"])
            .chain(of_kind(true).filter(|_| self.wide))
            .chain(column(self.labels, "LABELS"))
            .map(str::to_owned)
            .collect()
    }

    /// The row of `object`; `event` tells what happened to it.
    pub fn row<R: Resource>(&self, event: &str, object: &R, now: Timestamp) -> Vec<String> {
        let meta = object.metadata();
        let cells = object.cells(now);
        let of_kind = |wide| {
            let pairs = R::COLUMNS.iter().zip(&cells);
            pairs.filter(move |(c, _): &(&Column, _)| c.wide == wide).map(|(_, cell)| cell.clone())
        };
        let cell = |wanted: bool, text: String| wanted.then_some(text);
        let none = Labels::new();
        cell(self.event, event.to_owned())
            .into_iter()
            .chain(cell(self.namespace, meta.map(|m| m.namespace.clone()).unwrap_or_default()))
            .chain([if self.qualified { object.qualified_name() } else { object.name().to_owned() }])
            .chain(of_kind(false))
            .chain([age(timestamp(meta.and_then(|m| m.creation_timestamp.as_ref())), now)])
            .chain(of_kind(true).filter(|_| self.wide))
            .chain(cell(self.labels, labels(meta.map_or(&none, |m| &m.labels))))
            .collect()
    }

    /// A table of `objects`, with titles if `headers` is set.
    pub fn table<R: Resource>(&self, objects: &[R], headers: bool, now: Timestamp) -> String {
        let titles = headers.then(|| self.titles::<R>());
        let rows = objects.iter().map(|object| self.row("", object, now));
        Layout::default().lines(&titles.into_iter().chain(rows).collect::<Vec<_>>())
    }
}

/// Prints a value as kubectl does: JSON indented by four spaces, or YAML.
pub fn print_value(out: &mut dyn Write, yaml: bool, value: &Value) -> Result {
    if yaml {
        let text = serde_yaml_ng::to_string(value)
            .map_err(|e| Error::Format { format: "YAML", reason: e.to_string() })?;
        return Ok(out.write_all(text.as_bytes())?);
    }
    let mut json = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut json, formatter);
    serde::Serialize::serialize(value, &mut serializer)
        .map_err(|e| Error::Format { format: "JSON", reason: e.to_string() })?;
    json.push(b'\n');
    Ok(out.write_all(&json)?)
}

/// Tells what was done to `object`: `device/web labeled`, or the object itself.
pub fn print_change<R: Resource>(
    out: &mut dyn Write,
    format: Option<Format>,
    object: &R,
    done: &str,
) -> Result {
    match format {
        None => Ok(writeln!(out, "{} {done}", object.qualified_name())?),
        Some(Format::Name) => Ok(writeln!(out, "{}", object.qualified_name())?),
        Some(Format::Json) => print_document(out, false, &manifest::value(object)),
        Some(Format::Yaml) => print_document(out, true, &manifest::value(object)),
    }
}

/// Prints one of several values that follow each other.
pub fn print_document(out: &mut dyn Write, yaml: bool, value: &Value) -> Result {
    if yaml {
        out.write_all(b"---\n")?;
    }
    print_value(out, yaml, value)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use muster_proto::admin::{Device, Network, Token};

    use super::*;

    const NOW: Timestamp = Timestamp::from_epoch(Duration::from_secs(1_000_000));

    fn objects<R: Resource>(json: &str) -> Vec<R> {
        serde_json::from_str(json).unwrap()
    }

    fn devices() -> Vec<Device> {
        objects(
            r#"[{"metadata":{"name":"web","namespace":"default","labels":{"role":"web","tier":"a"},
                 "creationTimestamp":"1970-01-12T13:41:40Z"},
                 "status":{"phase":"Registered","virtualIpv4":"100.64.1.0","virtualIpv6":"fd00::100","online":true,
                 "privateEndpoints":[{"address":"192.168.1.10","port":51820},{"address":"fe80::1","port":51820}],
                 "agentVersion":"0.1.0"}},
                {"metadata":{"name":"database","namespace":"prod"},"status":{"phase":"Pending"}},
                {"metadata":{"name":"old","namespace":"prod"},"spec":{"revoked":true},"status":{"phase":"Registered"}}]"#,
        )
    }

    #[test]
    fn devices_in_a_table() {
        assert_eq!(
            Style::default().table(&devices(), true, NOW),
            "\
NAME       STATUS    VIRTUAL-IPV4   AGE
web        Online    100.64.1.0     5m
database   Pending   <none>         <unknown>
old        Revoked   <none>         <unknown>
"
        );
    }

    #[test]
    fn wide_tables_with_everything() {
        let style = Style { wide: true, namespace: true, labels: true, qualified: true, event: false };
        assert_eq!(
            style.table(&devices()[..1], true, NOW),
            "\
NAMESPACE   NAME         STATUS   VIRTUAL-IPV4   AGE   VIRTUAL-IPV6   PRIVATE                              REFLEXIVE   HOME     VERSION   VIA      SUBNETS   LABELS
default     device/web   Online   100.64.1.0     5m    fd00::100      192.168.1.10:51820,[fe80::1]:51820   <none>      <none>   0.1.0     <none>   <none>    role=web,tier=a
"
        );
        assert_eq!(Style { event: true, ..style }.titles::<Device>()[0], "EVENT");
    }

    #[test]
    fn wide_tables_tell_who_carries_what() {
        let site: Vec<Device> = objects(
            r#"[{"metadata":{"name":"gate"},"status":{"phase":"Registered","online":true,
                 "activeSubnets":["10.1.0.0/24","10.2.0.0/24","10.3.0.0/24","10.4.0.0/24"]}},
                {"metadata":{"name":"printer"},"status":{"phase":"Proxied","online":true,"proxiedBy":"gate"}},
                {"metadata":{"name":"tv"},"status":{"phase":"Unreachable","proxiedBy":"gate"}}]"#,
        );
        let table = Style { wide: true, ..Style::default() }.table(&site, true, NOW);
        let columns: Vec<_> = table
            .lines()
            .map(|line| {
                let cells: Vec<_> =
                    line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
                [cells[0], cells[1], cells[9], cells[10]]
            })
            .collect();
        assert_eq!(
            columns,
            [
                ["NAME", "STATUS", "VIA", "SUBNETS"],
                ["gate", "Online", "<none>", "10.1.0.0/24,10.2.0.0/24,10.3.0.0/24 + 1 more..."],
                ["printer", "Proxied", "gate", "<none>"],
                ["tv", "Unreachable", "gate", "<none>"],
            ]
        );
    }

    #[test]
    fn networks_and_tokens_in_tables() {
        let networks: Vec<Network> = objects(
            r#"[{"metadata":{"name":"net","creationTimestamp":"1970-01-01T00:00:00Z"},
                "spec":{"domain":"net.example"},"status":{"devices":"12"}}]"#,
        );
        assert_eq!(
            Style::default().table(&networks, true, NOW),
            "NAME   DOMAIN        DEVICES   AGE\nnet    net.example   12        11d\n"
        );
        let tokens: Vec<Token> = objects(
            r#"[{"metadata":{"name":"k3v9"},"spec":{"expiresAt":"1970-01-12T14:46:40Z"},"status":{"phase":"Active"}},
                {"metadata":{"name":"x"},"spec":{"reusable":true,"expiresAt":"1970-01-12T13:00:00Z"},
                 "status":{"phase":"Expired","uses":"3"}}]"#,
        );
        assert_eq!(
            Style::default().table(&tokens, false, NOW),
            "\
k3v9   Active    false   0   60m       <unknown>
x      Expired   true    3   expired   <unknown>
"
        );
    }

    #[test]
    fn objects_print_as_kubernetes_users_expect() {
        let network: Network =
            objects::<Network>(r#"[{"metadata":{"name":"net","resourceVersion":"7"}}]"#).remove(0);
        let mut out = Vec::new();
        print_value(&mut out, false, &manifest::value(&network)).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "{\n    \"apiVersion\": \"muster/v1\",\n    \"kind\": \"Network\",\n    \"metadata\": {\n        \"name\": \"net\",\n        \"resourceVersion\": \"7\"\n    }\n}\n"
        );
        let mut out = Vec::new();
        print_change(&mut out, Some(Format::Yaml), &network, "created").unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "---\napiVersion: muster/v1\nkind: Network\nmetadata:\n  name: net\n  resourceVersion: '7'\n"
        );
        let mut out = Vec::new();
        print_change(&mut out, None, &network, "created").unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "network/net created\n");
    }
}
