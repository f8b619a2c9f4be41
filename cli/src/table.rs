//! Tables in kubectl's style: upper-case titles, columns three spaces apart, no lines. Pure.

use std::fmt::Write;

/// A column of a kind's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// In upper case.
    pub title: &'static str,
    /// Whether it is shown with `-o wide` only.
    pub wide: bool,
}

impl Column {
    /// A column that is always shown.
    pub const fn new(title: &'static str) -> Self {
        Self { title, wide: false }
    }

    /// A column that is shown with `-o wide`.
    pub const fn wide(title: &'static str) -> Self {
        Self { title, wide: true }
    }
}

/// Lays out rows as they come. Widths only grow, so that the rows of a watch stay aligned.
#[derive(Debug, Default)]
pub struct Layout {
    widths: Vec<usize>,
}

impl Layout {
    /// A layout whose first columns are at least `widths` characters wide.
    pub fn with_widths(widths: Vec<usize>) -> Self {
        Self { widths }
    }

    /// `rows` as lines; each row has the same number of cells. Control characters in cells, which could play
    /// tricks on a terminal, become `?`.
    pub fn lines(&mut self, rows: &[Vec<String>]) -> String {
        for row in rows {
            self.widths.resize(self.widths.len().max(row.len()), 0);
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in rows {
            let last = row.len().saturating_sub(1);
            for (i, (cell, width)) in row.iter().zip(&self.widths).enumerate() {
                let cell = printable(cell);
                // Writing to a string does not fail.
                let _ = if i == last { writeln!(text, "{cell}") } else { write!(text, "{cell:width$}   ") };
            }
        }
        text
    }
}

/// `text`, or `<none>` when it is empty.
pub fn or_none(text: &str) -> String {
    if text.is_empty() { "<none>".into() } else { text.to_owned() }
}

/// The items of a list joined by commas, or `<none>`.
pub fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    or_none(&items.into_iter().map(|i| i.to_string()).collect::<Vec<_>>().join(","))
}

/// As [`list`], the first three and how many more there are.
pub fn shortened(items: &[String]) -> String {
    match items.len().checked_sub(3) {
        Some(more) if more > 0 => format!("{} + {more} more...", list(items.iter().take(3))),
        _ => list(items),
    }
}

/// Labels as `a=b,c=d`, or `<none>`.
pub fn labels(labels: &muster_common::labels::Labels) -> String {
    list(labels.iter().map(|(k, v)| format!("{k}={v}")))
}

/// `text` with control characters replaced by `?`.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Vec<String> {
        cells.iter().map(|c| (*c).to_owned()).collect()
    }

    #[test]
    fn columns_are_aligned_and_stay_so() {
        let mut layout = Layout::default();
        assert_eq!(
            layout.lines(&[row(&["NAME", "STATUS", "AGE"]), row(&["web", "Online", "5m"])]),
            "NAME   STATUS   AGE\nweb    Online   5m\n"
        );
        assert_eq!(layout.lines(&[row(&["database", "Online", "1s"])]), "database   Online   1s\n");
        assert_eq!(layout.lines(&[row(&["db", "Offline", "1s"])]), "db         Offline   1s\n");
    }

    #[test]
    fn cells_cannot_play_tricks() {
        assert_eq!(Layout::default().lines(&[row(&["a\u{1b}[2Jb\n"])]), "a?[2Jb?\n");
        assert_eq!(list(Vec::<String>::new()), "<none>");
        assert_eq!(list(["a", "b"]), "a,b");
    }
}
