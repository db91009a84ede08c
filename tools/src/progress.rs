//! Progress of long work on standard error: a bar on a terminal, a line now and then otherwise.
//!
//! A rate means little without the limit it runs against, so where the drive's ceiling is known its share is shown.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::{Global, ProgressMode};
use crate::{output, size};

/// Between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Progress of one task that counts bytes.
pub struct Progress {
    shown: Shown,
    task: String,
    total: u64,
    done: u64,
    /// Where this run started, after a resume: those bytes cost no time.
    base: u64,
    start: Instant,
    ceiling: Option<f64>,
}

enum Shown {
    Bar(ProgressBar),
    Lines { last: Instant },
    Nothing,
}

impl Progress {
    /// Starts showing `task` over `total` bytes. `ceiling`: bytes per second that the drive was measured to do.
    pub fn new(global: &Global, task: impl Into<String>, total: u64, ceiling: Option<f64>) -> Self {
        let task = task.into();
        let mode = match global.progress {
            ProgressMode::Auto if global.json => ProgressMode::None,
            ProgressMode::Auto if std::io::stderr().is_terminal() => ProgressMode::Bar,
            ProgressMode::Auto => ProgressMode::Plain,
            mode => mode,
        };
        let start = Instant::now();
        let shown = match mode {
            ProgressMode::Bar => {
                let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
                // A template that does not parse falls back to the default bar: looks, not correctness.
                if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {msg}") {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar.set_prefix(output::printable(&task));
                Shown::Bar(bar)
            }
            ProgressMode::Plain => Shown::Lines { last: start },
            ProgressMode::Auto | ProgressMode::None => Shown::Nothing,
        };
        Self { shown, task, total, done: 0, base: 0, start, ceiling }
    }

    /// `bytes` more are done, by an earlier run: they count for the total, not for the rate.
    pub fn skip(&mut self, bytes: u64) {
        self.base += bytes;
        self.set(self.done + bytes);
    }

    /// `bytes` of the total are done.
    pub fn set(&mut self, bytes: u64) {
        self.done = bytes;
        match &self.shown {
            Shown::Bar(bar) => {
                bar.set_position(bytes);
                bar.set_message(self.text());
            }
            Shown::Lines { last } if last.elapsed() >= LINE_INTERVAL => {
                output::note(&format!("{}: {}", output::printable(&self.task), self.text()));
                self.shown = Shown::Lines { last: Instant::now() };
            }
            Shown::Lines { .. } | Shown::Nothing => {}
        }
    }

    /// `bytes` more are done.
    pub fn add(&mut self, bytes: u64) {
        self.set(self.done + bytes);
    }

    /// The total turned out to be another one.
    pub fn set_total(&mut self, total: u64) {
        self.total = total;
        if let Shown::Bar(bar) = &self.shown {
            bar.set_length(total);
        }
    }

    /// Bytes per second of this run so far.
    pub fn rate(&self) -> f64 {
        (self.done - self.base) as f64 / self.start.elapsed().as_secs_f64().max(1e-9)
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Ends it; the last state stays on the screen as one line.
    pub fn finish(mut self) {
        let text = self.text();
        match std::mem::replace(&mut self.shown, Shown::Nothing) {
            Shown::Bar(bar) => {
                bar.finish_and_clear();
                output::note(&format!("{}: {text}", output::printable(&self.task)));
            }
            Shown::Lines { .. } => output::note(&format!("{}: {text}", output::printable(&self.task))),
            Shown::Nothing => {}
        }
    }

    fn text(&self) -> String {
        let rate = self.rate();
        let mut text =
            format!("{}/{}  {}", size::human(self.done), size::human(self.total), size::rate(rate));
        if let Some(ceiling) = self.ceiling.filter(|ceiling| *ceiling > 0.0) {
            text.push_str(&format!(
                " ({:.0}% of the drive's {})",
                100.0 * rate / ceiling,
                size::rate(ceiling)
            ));
        }
        if self.done < self.total && rate > 0.0 {
            let left = (self.total - self.done) as f64 / rate;
            text.push_str(&format!("  {} left", size::duration(left)));
        } else {
            text.push_str(&format!("  {}", size::duration(self.seconds())));
        }
        text
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // An error message follows: the bar must not stay in its way.
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}
