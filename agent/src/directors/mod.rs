//! Directors, from the agent's side: they pass the tunnel's datagrams on between devices that cannot reach each other
//! straight away, and read none of them.

pub mod attach;
pub mod flow;
mod stream;
