//! Directors at work in networks of real routers: packets arrive where no direct path can be, and nobody on the way reads
//! them.

mod asleep;
mod bad;
mod blocked;
mod first;
mod flood;
mod heal;
mod life;
mod many;
mod matrix;
mod metrics;
mod netcheck;
mod nobody_home;
mod port_mapping;
mod roam;
mod site;
mod traffic;
mod two_behind_one;
mod untrusted;
