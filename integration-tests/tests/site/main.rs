//! Hosts without an agent, and subnets, behind an agent that speaks for them.

mod approved;
mod carried;
mod lan;
