//! Runs of iperf3 from the left host to the right one, with what the tunnel used meanwhile.

use muster_integration_tests::{LabError, Result};
use serde_json::Value;

use crate::pair::{Pair, Usage};

/// One run.
pub(crate) struct Run {
    report: Value,
    /// What the tunnel's processes of both ends used.
    pub(crate) usage: Option<Usage>,
}

/// Runs iperf3 with `arguments` for `seconds`. When it fails, its server is started anew.
pub(crate) fn run(pair: &mut Pair, arguments: &str, seconds: u32) -> Result<Run> {
    let before = pair.usage()?;
    let limit = seconds + 15;
    let line = format!("timeout {limit} iperf3 -c {} -t {seconds} -J {arguments}", pair.target);
    let output = pair.left.try_sh(&line)?;
    let after = pair.usage()?;
    let report = serde_json::from_str::<Value>(&output.stdout).unwrap_or_default();
    if !output.status.success() || !report["error"].is_null() {
        pair.serve()?;
        let why = report["error"].as_str().map_or(output.stderr, str::to_owned);
        return Err(LabError::Command { command: line, reason: format!("{}: {why}", output.status) });
    }
    let usage = before.zip(after).map(|(before, after)| after.since(before));
    Ok(Run { report, usage })
}

impl Run {
    /// The number at `pointer` in what iperf3 reported.
    pub(crate) fn number(&self, pointer: &str) -> Result<f64> {
        self.report.pointer(pointer).and_then(Value::as_f64).ok_or_else(|| LabError::Command {
            command: format!("reading {pointer} of iperf3's report"),
            reason: self.report.get("end").unwrap_or(&self.report).to_string(),
        })
    }
}
