//! The view on a terminal.

use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge, Paragraph, Sparkline};

use super::sample::{Holding, Sample, View, Watched};
use crate::cmd::live::Live;
use crate::failure::Outcome;

/// What a pool holds changes slowly, and listing a large one takes time.
const HOLDINGS_EVERY: Duration = Duration::from_secs(10);
/// As many points as the widest terminal shows.
const HISTORY: usize = 400;

/// What is on it.
pub struct Screen {
    watched: Watched,
    before: Sample,
    holdings: Vec<Holding>,
    listed: Instant,
    view: View,
    history: Vec<u64>,
}

impl Screen {
    /// Looks for the first time.
    pub fn open(watched: Watched) -> Outcome<Self> {
        let before = watched.sample()?;
        let holdings = watched.holdings()?;
        let view = watched.view(&before, &before, &holdings);
        Ok(Self { watched, before, holdings, listed: Instant::now(), view, history: Vec::new() })
    }
}

impl Live for Screen {
    fn look(&mut self) -> Outcome {
        let now = self.watched.sample()?;
        if self.listed.elapsed() > HOLDINGS_EVERY {
            self.holdings = self.watched.holdings()?;
            self.listed = Instant::now();
        }
        self.view = self.watched.view(&self.before, &now, &self.holdings);
        self.before = now;
        let pool = self.view.throughput.iter().filter(|flow| flow.tier == "pool");
        self.history.push(pool.map(|flow| flow.bytes_per_second as u64).sum());
        if self.history.len() > HISTORY {
            self.history.remove(0);
        }
        Ok(())
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        draw(frame, &self.view, &self.history);
    }
}

fn draw(frame: &mut Frame<'_>, view: &View, history: &[u64]) {
    let lines = |lines: Vec<String>| lines.into_iter().map(Line::from).collect::<Vec<_>>();
    let (flows, waits, tiers) = (super::throughput(view), super::waiting(view), super::memory(view));
    let limits = super::limits(view);
    let height = |count: usize| Constraint::Length(u16::try_from(count + 2).unwrap_or(u16::MAX));
    let areas = Layout::vertical([
        Constraint::Length(1),
        height(flows.len()),
        height(waits.len()),
        height(tiers.len()),
        height(limits.len()),
        Constraint::Length(1),
        Constraint::Length(3),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .split(frame.area());
    frame.render_widget(Line::from(super::heading(view)).bold(), areas[0]);
    for (index, title, part) in [
        (1, "throughput", flows),
        (2, "queues and times", waits),
        (3, "tiers", tiers),
        (4, "limits and wear", limits),
    ] {
        frame.render_widget(Paragraph::new(lines(part)).block(Block::bordered().title(title)), areas[index]);
    }
    let share = |used: u64, of: u64| if of == 0 { 0.0 } else { (used as f64 / of as f64).clamp(0.0, 1.0) };
    let full = share(view.used_bytes, view.capacity_bytes);
    frame.render_widget(
        Gauge::default()
            .gauge_style(Style::new().blue())
            .ratio(full)
            .label(format!("pool {:.0} % full", full * 100.0)),
        areas[5],
    );
    let shown = history.len().saturating_sub(usize::from(areas[6].width));
    frame.render_widget(Sparkline::default().data(history[shown..].iter().copied()), areas[6]);
    let holdings =
        Paragraph::new(lines(super::holdings(view))).block(Block::bordered().title("what it holds"));
    frame.render_widget(holdings, areas[7]);
    frame.render_widget(Line::from("q: quit").dim(), areas[8]);
}
