//! `muster-director`. Exit codes: 0 done, 1 failed, 2 wrong usage.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use muster_common::grpc;
use muster_director::commands::{self, Cli, FAILED};

#[expect(clippy::print_stderr, reason = "errors go to the terminal")]
fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let result = runtime.block_on(async { Box::pin(commands::main(cli)).await });
    // Threads that still wait for a disk or a name must not hold the process up.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", grpc::chain(error.as_ref()));
            ExitCode::from(FAILED)
        }
    }
}
