//! Which virtual address goes to whom (design §5), without I/O, clock or randomness.
//!
//! [`Pool`] hands out the addresses of one block; [`NetworkPools`] are the blocks of one network, checked. A pool
//! mirrors what the store holds and adds reservations for what is on its way there: the store decides.

mod error;
mod network;
mod pool;
mod set;

pub use error::{AllocationError, PoolError};
pub use network::{NetworkPools, PoolKind, check_overlaps};
pub use pool::{Counts, Pool, Reservation, Status};
