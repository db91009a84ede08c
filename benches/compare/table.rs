//! Rows with both sides' figures, as Markdown.

use std::fmt::Write;

use crate::process::Measurement;

/// A finished row.
#[derive(Debug)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Unit of the figures.
    pub unit: &'static str,
    /// Least ratio A / B that the issue asks for; `None`: report only.
    pub target: Option<f64>,
    /// Names of the sides: ours, theirs.
    pub names: [String; 2],
    /// What was run.
    pub commands: [String; 2],
    /// Figures of each side, in order of the rounds.
    pub sides: [Vec<Measurement>; 2],
}

/// Median of some figures; 0 for none.
pub fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = figures.collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

impl Row {
    fn figures(&self, side: usize) -> String {
        let values = || self.sides[side].iter().map(|measurement| measurement.value);
        let (low, high) =
            values().fold((f64::INFINITY, 0.0f64), |(l, h), value| (l.min(value), h.max(value)));
        format!("{} ({}..{})", short(median(values())), short(low), short(high))
    }

    /// Median of A over median of B.
    pub fn ratio(&self) -> f64 {
        let side = |index: usize| median(self.sides[index].iter().map(|measurement| measurement.value));
        if side(1) > 0.0 { side(0) / side(1) } else { 0.0 }
    }

    /// Median of the rounds' own ratios, and the range in which the middle half of them lies.
    pub fn paired(&self) -> String {
        let [ours, theirs] = &self.sides;
        let mut ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .filter(|(_, theirs)| theirs.value > 0.0)
            .map(|(ours, theirs)| ours.value / theirs.value)
            .collect();
        ratios.sort_by(f64::total_cmp);
        let Some(last) = ratios.len().checked_sub(1) else { return "-".into() };
        let quarter = ratios.len() / 4;
        let (low, high) = (ratios[quarter], ratios[last - quarter]);
        format!("{:.3} ({low:.2}..{high:.2})", median(ratios.iter().copied()))
    }

    fn cpu(&self, side: usize) -> String {
        let per_gb = self.sides[side].iter().filter(|m| m.bytes > 0.0).map(|m| m.cpu_s * 1e9 / m.bytes);
        let value = median(per_gb);
        if value > 0.0 { format!("{value:.3}") } else { "-".into() }
    }
}

fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// One group's rows.
pub fn markdown(name: &str, rows: &[Row]) -> String {
    let mut text = format!(
        "\n## {name}\n\n| what | unit | A | median (min..max) | B | median (min..max) | A/B | by rounds (middle half) | target | CPU s/GB A | B |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    );
    for row in rows {
        let target = row.target.map_or("report".to_owned(), |target| {
            format!("{target:.2}: {}", if row.ratio() >= target { "met" } else { "missed" })
        });
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {:.3} | {} | {target} | {} | {} |",
            row.what,
            row.unit,
            row.names[0],
            row.figures(0),
            row.names[1],
            row.figures(1),
            row.ratio(),
            row.paired(),
            row.cpu(0),
            row.cpu(1)
        );
    }
    text.push_str("\n<details><summary>commands</summary>\n\n");
    for row in rows {
        let _ = writeln!(text, "- {}\n  - A: `{}`\n  - B: `{}`", row.what, row.commands[0], row.commands[1]);
    }
    text.push_str("\n</details>\n");
    text
}
