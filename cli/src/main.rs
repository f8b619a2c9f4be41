//! `muster`: see the library.
#![forbid(unsafe_code)]

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use muster_cli::{args::Cli, command, error::Error};
use muster_common::time::Timestamp;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (mut out, mut err) = (io::BufWriter::new(io::stdout()), io::stderr());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.map_err(Error::from).and_then(|runtime| {
        runtime.block_on(Box::pin(command::run(cli, None, &mut out, &mut err, Timestamp::now())))
    });
    // What was printed before a failure is worth having.
    let result = match (result, out.flush()) {
        (Ok(()), Err(error)) => Err(Error::from(error)),
        (result, _) => result,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has what it wanted, as in `muster get devices | head`.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            // Objects that failed have been told of, one by one.
            if !matches!(error, Error::Several(_)) {
                let _ = writeln!(err, "muster: {error}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}
