//! The objects of one kind in a network, found by namespace and name, and in that order.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

/// An object that has a namespace and a name.
pub trait Keyed {
    /// As [`key`] makes it from namespace and name.
    fn key(&self) -> &str;
}

/// Namespace and name as one text, which sorts by namespace, then by name: no name has a character below the
/// separator.
pub fn key(namespace: &str, name: &str) -> Box<str> {
    format!("{namespace}\0{name}").into()
}

/// Namespace and name of a key.
pub fn parts(key: &str) -> (&str, &str) {
    key.split_once('\0').unwrap_or(("", key))
}

/// A key as people and messages have it, `namespace/name`.
pub fn shown(key: &str) -> String {
    key.replacen('\0', "/", 1)
}

/// The key of what is written `namespace/name`; `None` if that is something else.
pub fn read(text: &str) -> Option<Box<str>> {
    let (namespace, name) = text.split_once('/')?;
    Some(key(namespace, name))
}

/// All objects of one kind in a network.
#[derive(Clone, Debug)]
pub struct Named<T>(BTreeMap<Box<str>, Arc<T>>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Named<T> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The object with this namespace and name, both in lower case.
    pub fn get(&self, namespace: &str, name: &str) -> Option<&Arc<T>> {
        self.0.get(&key(namespace, name))
    }

    /// The object with this key.
    pub fn by_key(&self, key: &str) -> Option<&Arc<T>> {
        self.0.get(key)
    }

    /// All of them, by namespace and name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<T>> {
        self.0.values()
    }

    /// Those whose keys come after `key`, in order.
    pub fn after<'a>(&'a self, key: &str) -> impl Iterator<Item = &'a Arc<T>> + use<'a, T> {
        self.0.range::<str, _>((Bound::Excluded(key), Bound::Unbounded)).map(|(_, object)| object)
    }

    /// Those of one namespace whose names come after `name`, by name.
    pub fn within<'a>(
        &'a self,
        namespace: &str,
        name: &str,
    ) -> impl Iterator<Item = &'a Arc<T>> + use<'a, T> {
        let (start, end) = (key(namespace, name), format!("{namespace}\u{1}"));
        let range = (Bound::Excluded(&*start), Bound::Excluded(&*end));
        self.0.range::<str, _>(range).map(|(_, object)| object)
    }

    pub(crate) fn insert(&mut self, object: Arc<T>) -> Option<Arc<T>>
    where
        T: Keyed,
    {
        self.0.insert(object.key().into(), object)
    }

    pub(crate) fn remove(&mut self, key: &str) -> Option<Arc<T>> {
        self.0.remove(key)
    }
}

/// Tells of every object that is not the same in `old` and in `new`, as it was and as it is.
pub(crate) fn differences<T: Keyed>(
    old: &Named<T>,
    new: &Named<T>,
    is_same: impl Fn(&T, &T) -> bool,
    mut tell: impl FnMut(Option<Arc<T>>, Option<Arc<T>>),
) {
    for was in old.iter() {
        let is = new.by_key(was.key());
        if is.is_none_or(|is| !is_same(was, is)) {
            tell(Some(was.clone()), is.cloned());
        }
    }
    for is in new.iter().filter(|is| old.by_key(is.key()).is_none()) {
        tell(None, Some(is.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Object(Box<str>);

    impl Keyed for Object {
        fn key(&self) -> &str {
            &self.0
        }
    }

    #[test]
    fn objects_come_by_namespace_then_by_name() {
        let mut objects = Named::default();
        for (namespace, name) in [("a-b", "x"), ("a", "z"), ("a", "y"), ("b", "w")] {
            objects.insert(Arc::new(Object(key(namespace, name))));
        }
        let names = |found: &mut dyn Iterator<Item = &Arc<Object>>| -> Vec<String> {
            found.map(|object| parts(&object.0).1.to_owned()).collect()
        };
        assert_eq!(names(&mut objects.iter()), ["y", "z", "x", "w"]);
        assert_eq!(names(&mut objects.within("a", "")), ["y", "z"]);
        assert_eq!(names(&mut objects.after(&key("a", "y"))), ["z", "x", "w"]);
        assert!(objects.get("a", "y").is_some() && objects.get("a", "x").is_none());
        assert_eq!(parts(&key("a", "y")), ("a", "y"));
        assert_eq!((&*shown(&key("a", "y")), read("a/y"), read("a")), ("a/y", Some(key("a", "y")), None));
    }
}
