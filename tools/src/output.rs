//! Standard output: tables for people, JSON for programs, and a closed pipe that is no error.

use std::io::{ErrorKind, Write};

use serde::Serialize;

use crate::failure::{Failure, Outcome};

/// Prints text and a line end. A reader that went away (`nvtier ls | head`) ends the command quietly and well.
pub fn line(text: &str) -> Outcome {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Failure::io("write to standard output", &error)),
    }
}

/// Prints one JSON document, indented, with a line end.
pub fn json(value: &impl Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::failed(format!("write JSON: {error}")))?;
    line(&text)
}

/// A message for people, on standard error; nothing can be done when that is gone.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Which side of its column a cell keeps to.
#[derive(Clone, Copy, PartialEq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table of aligned columns, two blanks between them, no frames: easy on eyes and on `awk`.
pub struct Table {
    head: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new(head: &[(&str, Align)]) -> Self {
        Self {
            head: head.iter().map(|(name, align)| ((*name).to_owned(), *align)).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row of as many cells as there are columns.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.head.len());
        self.rows.push(cells);
    }

    /// The lines of the table, without a line end after the last.
    pub fn render(&self) -> String {
        let mut widths: Vec<usize> = self.head.iter().map(|(name, _)| name.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let head: Vec<String> = self.head.iter().map(|(name, _)| name.to_uppercase()).collect();
        let mut lines = Vec::with_capacity(self.rows.len() + 1);
        for row in std::iter::once(&head).chain(&self.rows) {
            let mut text = String::new();
            for (index, ((cell, width), (_, align))) in row.iter().zip(&widths).zip(&self.head).enumerate() {
                if index > 0 {
                    text.push_str("  ");
                }
                let pad = " ".repeat(width - cell.chars().count());
                match align {
                    Align::Left => text.extend([cell.as_str(), &pad]),
                    Align::Right => text.extend([pad.as_str(), cell]),
                }
            }
            lines.push(text.trim_end().to_owned());
        }
        lines.join("\n")
    }
}

/// A name that may hold anything but `/` and NUL, made safe for a terminal: control characters are escaped.
pub fn printable(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for c in name.chars() {
        if c.is_control() || c == '\\' {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("name", Align::Left), ("size", Align::Right)]);
        table.row(vec!["a".into(), "1".into()]);
        table.row(vec!["größer".into(), "123456".into()]);
        assert_eq!(table.render(), "NAME      SIZE\na            1\ngrößer  123456");
    }

    #[test]
    fn names_cannot_drive_the_terminal() {
        assert_eq!(printable("a\nb\u{1b}[2J\\"), "a\\nb\\u{1b}[2J\\\\");
        assert_eq!(printable("modèle"), "modèle");
    }
}
