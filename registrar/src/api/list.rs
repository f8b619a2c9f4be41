//! Pages of a list. A page token holds the name that the page ended with, and the revision of the first page: what
//! changes while one pages is told by a watch from there.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use muster_common::labels::{Labels, Selector};
use muster_proto::admin::ListOptions;
use tonic::Status;

use crate::store::Revision;

const PAGE_DEFAULT: usize = 500;
const PAGE_MAX: usize = 1000;
/// The longest selector and page token, in bytes.
const TEXT_MAX: usize = 4096;
/// Objects looked at under one lock.
const CHUNK: usize = 2048;

/// A page that is asked for.
#[derive(Debug)]
pub(super) struct Page {
    size: usize,
    selector: Selector,
    after: String,
    /// Revision of the list.
    pub(super) revision: Revision,
}

impl Page {
    /// Reads the options; `current` is the revision of a list that begins now.
    pub(super) fn new(options: Option<ListOptions>, current: Revision) -> Result<Self, Status> {
        let options = options.unwrap_or_default();
        let size = match usize::try_from(options.page_size) {
            Ok(0) => PAGE_DEFAULT,
            Ok(size) if size <= PAGE_MAX => size,
            _ => {
                return Err(Status::invalid_argument(format!(
                    "options.page_size: {} is too many; use 1 to {PAGE_MAX}",
                    options.page_size
                )));
            }
        };
        let selector = selector("options.label_selector", &options.label_selector)?;
        let (revision, after) = if options.page_token.is_empty() {
            (current, String::new())
        } else {
            parse_token(&options.page_token).ok_or_else(|| {
                Status::invalid_argument("options.page_token: is not from the page before; begin without one")
            })?
        };
        Ok(Self { size, selector, after, revision })
    }

    /// Collects the page. `chunk` gives the objects that follow a name, a bounded number at a time.
    pub(super) fn collect<T>(
        &self,
        chunk: impl Fn(&str, usize) -> Vec<T>,
        name: impl Fn(&T) -> &str,
        matches: impl Fn(&T) -> bool,
        labels: impl Fn(&T) -> &Labels,
    ) -> (Vec<T>, String) {
        let (mut found, mut after): (Vec<T>, String) = (Vec::new(), self.after.clone());
        loop {
            let objects = chunk(&after, CHUNK);
            let exhausted = objects.len() < CHUNK;
            if let Some(last) = objects.last() {
                after = name(last).to_owned();
            }
            for object in objects {
                if !matches(&object) || !self.selector.matches(labels(&object)) {
                    continue;
                }
                if found.len() == self.size {
                    let last = found.last().map_or("", &name);
                    let token = URL_SAFE_NO_PAD.encode(format!("{}/{last}", self.revision));
                    return (found, token);
                }
                found.push(object);
            }
            if exhausted {
                return (found, String::new());
            }
        }
    }
}

fn parse_token(token: &str) -> Option<(Revision, String)> {
    if token.len() > TEXT_MAX {
        return None;
    }
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
    let (revision, after) = text.split_once('/')?;
    Some((revision.parse().ok()?, after.to_owned()))
}

/// Reads a label selector.
pub(super) fn selector(path: &str, text: &str) -> Result<Selector, Status> {
    if text.len() > TEXT_MAX {
        return Err(Status::invalid_argument(format!("{path}: is longer than {TEXT_MAX} bytes")));
    }
    text.parse().map_err(|error| Status::invalid_argument(format!("{path}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(size: u32, token: &str) -> (Vec<String>, String) {
        let all: Vec<String> = (0..5000).map(|n| format!("n{n:04}")).collect();
        let options =
            ListOptions { page_size: size, page_token: token.into(), label_selector: String::new() };
        Page::new(Some(options), 7).unwrap().collect(
            |after, limit| all.iter().filter(|name| &***name > after).take(limit).cloned().collect(),
            |name| name,
            |name| name.ends_with('3'),
            |_| const { &Labels::new() },
        )
    }

    #[test]
    fn pages_are_complete_and_end() {
        let (mut all, mut token, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let (found, next) = page(100, &token);
            all.extend(found);
            pages += 1;
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!((all.len(), pages), (500, 5));
        assert!(all.is_sorted());
    }

    #[test]
    fn bad_options_are_refused() {
        for options in [
            ListOptions { page_size: 1001, ..Default::default() },
            ListOptions { page_token: "!".into(), ..Default::default() },
            ListOptions { page_token: "abcd".into(), ..Default::default() },
            ListOptions { label_selector: "a in (".into(), ..Default::default() },
            ListOptions { label_selector: "a,".repeat(4000), ..Default::default() },
        ] {
            assert!(Page::new(Some(options), 1).is_err());
        }
    }
}
