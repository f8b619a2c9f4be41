//! Backup, restore and migration between real stores: sqlite files and etcd processes.

#![expect(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod interrupted;
mod online;
mod refused;
mod site;
mod whole;
