//! The store that several registrars share: etcd.
