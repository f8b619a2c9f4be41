//! `muster`, the operator's command: kubectl's grammar and table style over the registrar's admin API.
//!
//! `args` is the grammar, `resource` knows each kind, `command` has a module per verb, `client` speaks to the
//! registrar; `table`, `describe`, `approval` and `manifest` are pure.
#![forbid(unsafe_code)]

pub mod age;
pub mod approval;
pub mod args;
pub mod channel;
pub mod client;
pub mod command;
pub mod describe;
pub mod duration;
pub mod error;
pub mod generate;
pub mod manifest;
pub mod output;
pub mod patch;
pub mod resource;
pub mod subnet;
pub mod table;
pub mod target;
