//! Directors at work in networks of real routers: packets arrive where no direct path can be, and nobody on the way reads
//! them.

mod first;
mod heal;
mod life;
mod matrix;
mod site;
