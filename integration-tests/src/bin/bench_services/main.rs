//! `make bench-services`: what virtual IPs cost where they are translated, and what a change of endpoints costs, on the
//! registrar and on the way to the kernels of many hosts.
#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, reason = "a report is what this program is for")]

mod agents;
mod registrar;
mod table;
mod traffic;
mod tunnel;

use std::process::ExitCode;

use muster_integration_tests::{Lab, Result, figures::Figures};

fn main() -> ExitCode {
    let parts: Vec<String> = std::env::args().skip(1).collect();
    match bench(&parts) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-services: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures the named parts; all of them if none is named.
fn bench(parts: &[String]) -> Result {
    let lab = Lab::new()?;
    let mut figures = Figures::new("services");
    let wanted = |name: &str| parts.is_empty() || parts.iter().any(|part| part == name);
    if wanted("table") {
        table::measure(&lab, &mut figures)?;
    }
    if wanted("traffic") {
        traffic::measure(&lab, &mut figures)?;
    }
    if wanted("tunnel") {
        tunnel::measure(&lab, &mut figures)?;
    }
    if wanted("registrar") {
        registrar::measure(&mut figures)?;
    }
    if wanted("agents") {
        agents::measure(&lab, &mut figures)?;
    }
    figures.write().map(drop)
}
