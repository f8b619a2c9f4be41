//! The `muster-director` command.
#![forbid(unsafe_code)]

use clap::Parser;

/// A director of a Muster network: relays sealed packets between devices that have no direct path.
#[derive(Parser)]
#[command(version)]
struct Cli {}

fn main() {
    Cli::parse();
}
