//! The namespaces, Services and EndpointSlices of one network, and what DNS answers from: each Service merged with its
//! slices, made anew only when the Service or one of its slices changes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    ops::Bound,
    sync::Arc,
};

use muster_dns::directory::{self, ExternalAddress, Port, ServiceKind};

use super::{
    device::DEFAULT_NAMESPACE,
    named::{self, Keyed as _, Named},
    namespace::Namespace,
    service::Service,
    slice::Slice,
};

/// An object as it was and as it is.
pub(super) type Versions<T> = (Option<Arc<T>>, Option<Arc<T>>);

/// A Service as DNS answers for it.
pub type View = directory::Service;

/// The namespaces, Services and EndpointSlices of one network.
#[derive(Clone, Debug, Default)]
pub struct Services {
    /// The namespaces, by name.
    pub namespaces: BTreeMap<Box<str>, Arc<Namespace>>,
    /// The Services.
    pub services: Named<Service>,
    /// The EndpointSlices.
    pub slices: Named<Slice>,
    /// Keys of the slices of each Service, there or not, by its key.
    slices_of: BTreeMap<Box<str>, BTreeSet<Box<str>>>,
    views: BTreeMap<Box<str>, Arc<View>>,
    /// Keys of the Services that have an address.
    at: HashMap<IpAddr, BTreeSet<Box<str>>>,
}

/// What a change has done to what DNS answers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Effects {
    /// Whether a record under the domain has changed.
    pub(crate) zone: bool,
    /// Whether a record of an external address has changed.
    pub(crate) external: bool,
    /// Whether a headless Service without external address has changed.
    pub(crate) headless: bool,
    /// Keys of the Services that are answered for differently.
    pub(crate) services: Vec<Box<str>>,
}

impl Effects {
    fn compare(&mut self, key: &str, old: Option<&View>, new: Option<&View>) {
        fn zone(view: &View) -> impl PartialEq + '_ {
            (&view.kind, &view.ports, &view.endpoints)
        }
        fn external(view: &View) -> Option<(&[ExternalAddress], &[Port])> {
            (!view.external.is_empty()).then_some((&view.external, &view.ports))
        }
        fn headless(view: &View) -> Option<impl PartialEq + '_> {
            let headless = view.external.is_empty() && view.kind == ServiceKind::Headless;
            headless.then_some((&view.ports, &view.endpoints))
        }
        if old == new {
            return;
        }
        self.zone |= old.map(zone) != new.map(zone);
        self.external |= old.and_then(external) != new.and_then(external);
        self.headless |= old.and_then(headless) != new.and_then(headless);
        self.services.push(key.into());
    }
}

impl Services {
    /// Whether `namespace` (in lower case) exists, and is not being deleted. `default` always does.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        match self.namespaces.get(namespace) {
            Some(found) => !found.terminating,
            None => namespace == DEFAULT_NAMESPACE,
        }
    }

    /// The namespaces of which [`has_namespace`](Self::has_namespace) says that they exist.
    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        let missing = (!self.namespaces.contains_key(DEFAULT_NAMESPACE)).then_some(DEFAULT_NAMESPACE);
        let there = self.namespaces.iter().filter(|(_, namespace)| !namespace.terminating);
        there.map(|(name, _)| &**name).chain(missing)
    }

    /// The Service called `name` in `namespace` (both in lower case) with its slices, as long as its namespace exists.
    pub fn view(&self, namespace: &str, name: &str) -> Option<&Arc<View>> {
        let found = self.views.get(&named::key(namespace, name))?;
        self.has_namespace(namespace).then_some(found)
    }

    /// All Services with their slices, by namespace and name.
    pub fn views(&self) -> impl Iterator<Item = &Arc<View>> {
        self.views.values().filter(|view| self.has_namespace(view.namespace.as_str()))
    }

    /// The Services that have `address` as ClusterIP, endpoint or external address, by namespace and name.
    pub fn views_at(&self, address: IpAddr) -> impl Iterator<Item = &Arc<View>> {
        let keys = self.at.get(&address).into_iter().flatten();
        let views = keys.filter_map(|key| self.views.get(key));
        views.filter(|view| self.has_namespace(view.namespace.as_str()))
    }

    /// The slices of a Service, there or not, by name.
    pub fn slices_of<'a>(
        &'a self,
        namespace: &str,
        name: &str,
    ) -> impl Iterator<Item = &'a Arc<Slice>> + use<'a> {
        let keys = self.slices_of.get(&named::key(namespace, name)).into_iter().flatten();
        keys.filter_map(|key| self.slices.by_key(key))
    }

    pub(crate) fn put_namespace(
        &mut self,
        new: Arc<Namespace>,
        effects: &mut Effects,
    ) -> Option<Arc<Namespace>> {
        let name = new.name.clone();
        let was = self.has_namespace(name.as_str());
        let old = self.namespaces.insert(name.as_str().into(), new);
        self.namespace_changed(name.as_str(), was, effects);
        old
    }

    /// Removes a namespace. What is in it must have been removed before, except from `default`, which stays without
    /// an object.
    pub(crate) fn remove_namespace(&mut self, name: &str, effects: &mut Effects) -> Option<Arc<Namespace>> {
        let was = self.has_namespace(name);
        let old = self.namespaces.remove(name);
        self.namespace_changed(name, was, effects);
        old
    }

    fn namespace_changed(&self, name: &str, was: bool, effects: &mut Effects) {
        let is = self.has_namespace(name);
        if was == is {
            return;
        }
        effects.zone = true;
        let (start, end) = (format!("{name}\0"), format!("{name}\u{1}"));
        let range = (Bound::Excluded(&*start), Bound::Excluded(&*end));
        for (key, view) in self.views.range::<str, _>(range) {
            let view = Some(&**view);
            let (old, new) = if is { (None, view) } else { (view, None) };
            effects.compare(key, old, new);
        }
    }

    pub(crate) fn put_service(&mut self, new: Arc<Service>, effects: &mut Effects) -> Option<Arc<Service>> {
        let key: Box<str> = new.key().into();
        let old = self.services.insert(new);
        self.rebuild(&key, effects);
        old
    }

    pub(crate) fn remove_service(&mut self, key: &str, effects: &mut Effects) -> Option<Arc<Service>> {
        let old = self.services.remove(key);
        self.rebuild(key, effects);
        old
    }

    pub(crate) fn put_slice(&mut self, new: Arc<Slice>, effects: &mut Effects) -> Option<Arc<Slice>> {
        let of = new.service_key();
        if let Some(of) = &of {
            self.slices_of.entry(of.clone()).or_default().insert(new.key().into());
        }
        let old = self.slices.insert(new.clone());
        if let Some(was_of) =
            old.as_ref().and_then(|old| old.service_key()).filter(|old| of.as_ref() != Some(old))
        {
            self.forget_slice(&was_of, new.key(), effects);
        }
        if let Some(of) = of {
            self.rebuild(&of, effects);
        }
        old
    }

    /// Puts slices of the devices that a Service selects in the place of `stale` ones (their keys). Returns what has
    /// become of each.
    pub(super) fn select(
        &mut self,
        service: &str,
        made: Vec<Arc<Slice>>,
        stale: &BTreeSet<Box<str>>,
        effects: &mut Effects,
    ) -> Vec<Versions<Slice>> {
        let mut changes = Vec::with_capacity(made.len() + stale.len());
        let slices = self.slices_of.entry(service.into()).or_default();
        for new in made {
            slices.insert(new.key().into());
            changes.push((self.slices.insert(new.clone()), Some(new)));
        }
        for key in stale {
            slices.remove(key);
            changes.push((self.slices.remove(key), None));
        }
        if slices.is_empty() {
            self.slices_of.remove(service);
        }
        self.rebuild(service, effects);
        changes
    }

    pub(crate) fn remove_slice(&mut self, key: &str, effects: &mut Effects) -> Option<Arc<Slice>> {
        let old = self.slices.remove(key)?;
        if let Some(of) = old.service_key() {
            self.forget_slice(&of, key, effects);
        }
        Some(old)
    }

    fn forget_slice(&mut self, service: &str, slice: &str, effects: &mut Effects) {
        if let Some(slices) = self.slices_of.get_mut(service) {
            slices.remove(slice);
            if slices.is_empty() {
                self.slices_of.remove(service);
            }
        }
        self.rebuild(service, effects);
    }

    /// Makes the view of one Service anew.
    fn rebuild(&mut self, key: &str, effects: &mut Effects) {
        let (namespace, name) = named::parts(key);
        let service = self.services.by_key(key);
        let new = service.map(|service| Arc::new(service.view(self.slices_of(namespace, name))));
        let old = self.views.get(key).cloned();
        if old == new {
            return;
        }
        for address in old.iter().flat_map(|view| addresses(view)) {
            if let Some(keys) = self.at.get_mut(&address) {
                keys.remove(key);
                if keys.is_empty() {
                    self.at.remove(&address);
                }
            }
        }
        for address in new.iter().flat_map(|view| addresses(view)) {
            let keys = self.at.entry(address).or_default();
            if !keys.contains(key) {
                keys.insert(key.into());
            }
        }
        match &new {
            Some(view) => drop(self.views.insert(key.into(), view.clone())),
            None => drop(self.views.remove(key)),
        }
        if self.has_namespace(namespace) {
            effects.compare(key, old.as_deref(), new.as_deref());
        }
    }

    /// Keys of the Services for which `newer` answers differently.
    pub(crate) fn differences(&self, newer: &Self) -> Vec<Box<str>> {
        fn visible<'a>(services: &'a Services, key: &str) -> Option<&'a Arc<View>> {
            let found = services.views.get(key)?;
            services.has_namespace(found.namespace.as_str()).then_some(found)
        }
        let keys: BTreeSet<&Box<str>> = self.views.keys().chain(newer.views.keys()).collect();
        keys.into_iter().filter(|key| visible(self, key) != visible(newer, key)).cloned().collect()
    }
}

/// All addresses of a Service.
fn addresses(view: &View) -> impl Iterator<Item = IpAddr> {
    let cluster_ips = match &view.kind {
        ServiceKind::ClusterIp(addresses) => &**addresses,
        ServiceKind::Headless | ServiceKind::ExternalName(_) => &[],
    };
    let external = view.external.iter().filter_map(|address| match address {
        ExternalAddress::Ip(address) => Some(*address),
        ExternalAddress::Host(_) => None,
    });
    let endpoints = view.endpoints.iter().map(|endpoint| endpoint.address);
    cluster_ips.iter().copied().chain(endpoints).chain(external)
}
