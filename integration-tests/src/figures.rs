//! Figures that benchmarks report: one tab-separated line each, on standard output and in
//! `target/bench/<name>.tsv`: figure, value, unit, compared with, ratio.

use std::{fs, path::PathBuf, time::Duration};

use crate::{LabError, Result};

/// The figures of one benchmark.
pub struct Figures {
    name: &'static str,
    lines: Vec<String>,
}

impl Figures {
    /// An empty report of benchmark `name`; prints the header.
    #[expect(clippy::print_stdout, reason = "the report")]
    pub fn new(name: &'static str) -> Self {
        let header = "figure\tvalue\tunit\tcompared with\tratio".to_owned();
        println!("{header}");
        Self { name, lines: vec![header] }
    }

    /// Reports a figure on its own.
    pub fn report(&mut self, figure: &str, value: f64, unit: &str) {
        self.line(figure, value, unit, "-", None);
    }

    /// Reports a figure and its ratio to `other`, measured in the same run and unit.
    pub fn compare(&mut self, figure: &str, value: f64, unit: &str, with: &str, other: f64) {
        self.line(figure, value, unit, with, Some(value / other));
    }

    /// Reports that `what` could not be measured or compared with.
    pub fn missing(&mut self, figure: &str, why: &str) {
        self.push(format!("{figure}\tmissing\t-\t{why}\t-"));
    }

    fn line(&mut self, figure: &str, value: f64, unit: &str, with: &str, ratio: Option<f64>) {
        let ratio = ratio.map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        self.push(format!("{figure}\t{}\t{unit}\t{with}\t{ratio}", short(value)));
    }

    #[expect(clippy::print_stdout, reason = "the report")]
    fn push(&mut self, line: String) {
        println!("{line}");
        self.lines.push(line);
    }

    /// Writes the report to `target/bench/<name>.tsv`.
    pub fn write(&self) -> Result<PathBuf> {
        let directory = PathBuf::from("target/bench");
        let path = directory.join(format!("{}.tsv", self.name));
        fs::create_dir_all(&directory)
            .and_then(|()| fs::write(&path, self.lines.join("\n") + "\n"))
            .map_err(|source| LabError::File { path: path.display().to_string(), source })?;
        Ok(path)
    }
}

/// Three significant digits are more than such machines can tell.
fn short(value: f64) -> String {
    if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// The `q`th quantile (0 to 1) of `samples`, which it sorts; zero if there is none.
pub fn quantile(samples: &mut [Duration], q: f64) -> Duration {
    samples.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index below the number of samples"
    )]
    let index = (q * samples.len().saturating_sub(1) as f64).round() as usize;
    samples.get(index).copied().unwrap_or_default()
}

/// The median of `values`, which it sorts; zero if there is none.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_samples() {
        let mut samples: Vec<_> = (1..=101).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile(&mut samples, 0.5), Duration::from_millis(51));
        assert_eq!(quantile(&mut samples, 0.99), Duration::from_millis(100));
        assert_eq!(quantile(&mut [], 0.5), Duration::ZERO);
        assert!((median(&mut [3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
    }
}
