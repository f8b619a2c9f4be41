//! Completion of names of one or two labels with a search list, in resolv.conf(5)'s order, for clients that do not do
//! it themselves.

use hickory_proto::{
    ProtoError,
    op::Message,
    rr::{Name, RData, Record, rdata::CNAME},
};
use muster_common::name::Domain;

use super::settings::Completion;

/// Names with more labels are never completed.
const LABELS_MAX: usize = 2;

/// What names are completed with.
#[derive(Debug, Default)]
pub(super) struct Completer {
    suffixes: Vec<Name>,
    ndots: usize,
}

impl Completer {
    pub(super) fn new(completion: &Completion, domain: &Domain) -> Self {
        let suffix = |entry: &String| {
            let text = match entry.as_str() {
                "" => format!("{domain}."),
                absolute if absolute.ends_with('.') => absolute.to_owned(),
                relative => format!("{relative}.{domain}."),
            };
            Name::from_ascii(text).ok()
        };
        let suffixes = completion.search.iter().filter_map(suffix).collect();
        Self { suffixes, ndots: completion.ndots.into() }
    }

    /// Whether a name of so many labels is completed, and if so, whether before it is asked as it is.
    pub(super) fn applies(&self, labels: usize) -> Option<bool> {
        let applies = !self.suffixes.is_empty() && (1..=LABELS_MAX).contains(&labels);
        applies.then(|| labels - 1 < self.ndots)
    }

    /// What to ask for `name`, in this order.
    pub(super) fn names(&self, name: &Name) -> Vec<Name> {
        let completed =
            || self.suffixes.iter().filter_map(|suffix| Name::append_domain(name.clone(), suffix).ok());
        match self.applies(name.iter().count()) {
            None => vec![name.clone()],
            Some(true) => completed().chain([name.clone()]).collect(),
            Some(false) => std::iter::once(name.clone()).chain(completed()).collect(),
        }
    }
}

/// The answer to `asked` that has been found at another name: an alias of that.
pub(super) fn alias(asked: &Name, mut found: Message, ttl: u32) -> Result<Message, ProtoError> {
    if let Some(question) = found.queries.first_mut() {
        let target = question.name.clone();
        question.set_name(asked.clone());
        let alias = Record::from_rdata(asked.clone(), ttl, RData::CNAME(CNAME(target)));
        found.answers.insert(0, alias);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(name: &str, search: &[&str], ndots: u8) -> Vec<String> {
        let search = search.iter().map(ToString::to_string).collect();
        let completer = Completer::new(&Completion { search, ndots }, &"net.example".parse().unwrap());
        let names = completer.names(&Name::from_ascii(name).unwrap());
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn short_names_are_completed_in_the_order_of_resolv_conf() {
        let search = ["default.svc", "svc", "", "corp.example."];
        let completed = [
            "my.default.svc.net.example.",
            "my.svc.net.example.",
            "my.net.example.",
            "my.corp.example.",
            "my.",
        ];
        assert_eq!(names("my.", &search, 1), completed);
        assert_eq!(names("my.shop.", &["svc"], 1), ["my.shop.", "my.shop.svc.net.example."]);
        assert_eq!(names("my.shop.", &["svc"], 2), ["my.shop.svc.net.example.", "my.shop."]);
        assert_eq!(names("a.b.c.", &search, 2), ["a.b.c."]);
        assert_eq!(names("my.", &[], 1), ["my."]);
        assert_eq!(names(".", &search, 1), ["."]);
    }
}
