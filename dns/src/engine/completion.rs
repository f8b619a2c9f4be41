//! Completion of search lists on the server (specification 15): if the first name of the client's search list
//! does not exist, the others that the client would ask for next are tried at once.

use std::collections::VecDeque;

use hickory_proto::{ProtoError, rr::Name};
use muster_common::name::Label;

use super::{
    Engine, Next, QueryContext, Then,
    lookup::{Content, Found, Place, Question, within},
};
use crate::{
    directory::{Directory, Viewer, Zone},
    message::{self, Request},
    records,
};

impl<D: Directory> Engine<D> {
    /// What to try after `asked`, which does not exist: nothing, unless it is in the client's own namespace.
    pub(super) fn candidates(
        &self,
        asked: &Name,
        context: &QueryContext,
    ) -> Result<VecDeque<Name>, ProtoError> {
        let mut names = VecDeque::new();
        if !self.options.complete || context.viewer == Viewer::Stranger {
            return Ok(names);
        }
        let text = message::plain_name(asked);
        let Some(zone) = self.directory.zone(&text) else { return Ok(names) };
        let Some((left, false)) = within(&zone, &text) else { return Ok(names) };
        let Some(namespace) = self.client(&zone, context).1 else { return Ok(names) };
        let first = format!(".{namespace}.svc");
        let Some(remainder) = left.strip_suffix(&first) else { return Ok(names) };
        let labels = remainder.split('.').count();
        let remainder = Name::from_labels(asked.iter().take(labels))?;
        let right = asked.iter().count().saturating_sub(labels);
        for depth in [right.saturating_sub(1), right.saturating_sub(2)] {
            names.push_back(remainder.clone().append_domain(&asked.trim_to(depth))?);
        }
        let entries = self.options.host_search.iter().filter_map(|entry| records::absolute(entry));
        // What becomes too long is no name that the client could ask for.
        names.extend(entries.filter_map(|entry| remainder.clone().append_domain(&entry).ok()));
        names.push_back(remainder);
        Ok(names)
    }

    /// Name and namespace of the device that asks, as far as they are known: its certificate tells them, or else the
    /// address.
    pub(super) fn client(&self, zone: &Zone, context: &QueryContext) -> (Option<Label>, Option<Label>) {
        if let Some((name, namespace)) = self.directory.member(zone, &context.viewer) {
            return (Some(name), Some(namespace));
        }
        let Some(source) = context.source else { return (None, None) };
        let name = self.directory.device_at(zone, &context.viewer, source);
        (name, self.directory.namespace_of(zone, source))
    }

    /// Answers with the first of `names` that exists, in place of the asked name, which does not exist in
    /// `place`.
    pub(super) fn complete(
        &self,
        request: &Request,
        viewer: &Viewer,
        recurse: bool,
        mut names: VecDeque<Name>,
        place: Place,
    ) -> Result<Next, ProtoError> {
        while let Some(name) = names.pop_front() {
            let found = self.look(&Question::new(request, &name, viewer))?;
            match found {
                Found::In(_, Content::NoName) | Found::Refused => {}
                Found::In(there, content) => {
                    let alias = records::alias(&request.question.name, there.ttl(), name.clone());
                    return self.settle(request, recurse, vec![alias], &there, content);
                }
                Found::Outside if recurse => {
                    let then = Then::Complete { rest: names, place };
                    return Ok(Next::Ask { name, whole: false, then });
                }
                Found::Outside => {}
            }
        }
        self.settle(request, recurse, Vec::new(), &place, Content::NoName)
    }
}
