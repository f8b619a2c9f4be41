//! A registrar on sqlite whose host and disk misbehave: it is killed in the midst of its work, its disk is full,
//! read-only or broken. Nothing that it has acknowledged is lost, it says what is wrong, and comes back by itself. So
//! do agents and directors whose state directories are on such a disk.
#![allow(clippy::print_stderr, reason = "scenarios tell seeds, and what they have measured")]

mod clients;
mod damaged;
mod disk;
mod full;
mod io_error;
mod killed;
mod ledger;
mod read_only;
mod served;
mod state;
