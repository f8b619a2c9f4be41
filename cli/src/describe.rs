//! The text of `muster describe`: keys on the left, values on the right, one line a value. Pure.

use std::fmt::Write;

use muster_common::time::Timestamp;
use muster_proto::admin::ObjectMeta;

use crate::{
    age::{moment, timestamp},
    table::{or_none, printable},
};

/// Collects what is told of one object.
#[derive(Debug, Default)]
pub struct Description(Vec<(String, Vec<String>)>);

impl Description {
    /// One value; `<none>` if it is empty.
    pub fn value(&mut self, key: &str, value: impl AsRef<str>) {
        self.values(key, [or_none(value.as_ref())]);
    }

    /// A value a line; `<none>` if there is none.
    pub fn values(&mut self, key: &str, values: impl IntoIterator<Item = String>) {
        let mut values: Vec<_> = values.into_iter().collect();
        if values.is_empty() {
            values.push(or_none(""));
        }
        self.0.push((key.to_owned(), values));
    }

    /// What every object has.
    pub fn metadata(&mut self, meta: &ObjectMeta, now: Timestamp) {
        self.value("Name", &meta.name);
        if !meta.namespace.is_empty() {
            self.value("Namespace", &meta.namespace);
        }
        if !meta.network.is_empty() {
            self.value("Network", &meta.network);
        }
        let pairs = |map: &muster_common::labels::Labels| -> Vec<String> {
            map.iter().map(|(k, v)| format!("{k}={v}")).collect()
        };
        self.values("Labels", pairs(&meta.labels));
        self.values("Annotations", pairs(&meta.annotations));
        self.value("UID", &meta.uid);
        self.value("Created", moment(timestamp(meta.creation_timestamp.as_ref()), now));
    }

    /// The text.
    pub fn render(&self) -> String {
        let width = self.0.iter().map(|(key, _)| key.chars().count() + 1).max().unwrap_or(0) + 2;
        let mut text = String::new();
        for (key, values) in &self.0 {
            let mut left = format!("{key}:");
            for value in values {
                // Writing to a string does not fail.
                let _ = writeln!(text, "{left:width$}{}", printable(value));
                left.clear();
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_below_each_other() {
        let mut description = Description::default();
        description.value("Name", "web");
        description.values("Labels", ["a=b".into(), "c=d".into()]);
        description.value("Domain", "");
        assert_eq!(description.render(), "Name:    web\nLabels:  a=b\n         c=d\nDomain:  <none>\n");
    }
}
