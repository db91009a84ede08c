//! The dashboard on a terminal.

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge, Paragraph, Sparkline};

use super::sample::{Holding, View, Watched};
use crate::failure::{Failure, Outcome};
use crate::interrupt;

/// What a pool holds changes slowly, and listing a large one takes time.
const HOLDINGS_EVERY: Duration = Duration::from_secs(10);
/// As many points as the widest terminal shows.
const HISTORY: usize = 400;
/// Keys and signals are looked for so often.
const TICK: Duration = Duration::from_millis(100);

/// Runs until `q`, Esc, Ctrl-C, a signal, or the end of the owner.
pub fn run(pool: &Path, watched: &Watched, interval: Duration) -> Outcome {
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return Err(Failure::usage(format!("watch the pool {}: this is no terminal", pool.display()))
            .hint("add --once, or --once --json"));
    }
    let mut terminal = ratatui::try_init().map_err(|error| Failure::io("take over the terminal", &error))?;
    let outcome = watch(&mut terminal, watched, interval);
    ratatui::restore();
    outcome
}

fn watch(terminal: &mut ratatui::DefaultTerminal, watched: &Watched, interval: Duration) -> Outcome {
    let failed = |error: std::io::Error| Failure::io("draw on the terminal", &error);
    let mut before = watched.sample()?;
    let mut holdings: Vec<Holding> = watched.holdings()?;
    let mut listed = Instant::now();
    let mut view = watched.view(&before, &before, &holdings);
    let mut history: Vec<u64> = Vec::new();
    let mut last = Instant::now();
    loop {
        terminal.draw(|frame| draw(frame, &view, &history)).map_err(failed)?;
        while last.elapsed() < interval {
            interrupt::check()?;
            if event::poll(TICK.min(interval)).map_err(failed)? {
                match event::read().map_err(failed)? {
                    Event::Key(key) if ends(key.code, key.modifiers) => return Ok(()),
                    Event::Resize(..) => {
                        terminal.draw(|frame| draw(frame, &view, &history)).map_err(failed)?;
                    }
                    _ => {}
                }
            }
        }
        last = Instant::now();
        let now = watched.sample()?;
        if listed.elapsed() > HOLDINGS_EVERY {
            holdings = watched.holdings()?;
            listed = Instant::now();
        }
        view = watched.view(&before, &now, &holdings);
        before = now;
        let pool = view.throughput.iter().filter(|flow| flow.tier == "pool");
        history.push(pool.map(|flow| flow.bytes_per_second as u64).sum());
        if history.len() > HISTORY {
            history.remove(0);
        }
    }
}

fn ends(code: KeyCode, modifiers: KeyModifiers) -> bool {
    matches!(code, KeyCode::Char('q') | KeyCode::Esc)
        || (code == KeyCode::Char('c') && modifiers.contains(KeyModifiers::CONTROL))
}

fn draw(frame: &mut Frame<'_>, view: &View, history: &[u64]) {
    let lines = |lines: Vec<String>| lines.into_iter().map(Line::from).collect::<Vec<_>>();
    let (flows, waits, tiers) = (super::throughput(view), super::waiting(view), super::memory(view));
    let height = |count: usize| Constraint::Length(u16::try_from(count + 2).unwrap_or(u16::MAX));
    let areas = Layout::vertical([
        Constraint::Length(1),
        height(flows.len()),
        height(waits.len()),
        height(tiers.len()),
        Constraint::Length(1),
        Constraint::Length(3),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .split(frame.area());
    frame.render_widget(Line::from(super::heading(view)).bold(), areas[0]);
    for (index, title, part) in
        [(1, "throughput", flows), (2, "queues and times", waits), (3, "tiers", tiers)]
    {
        frame.render_widget(Paragraph::new(lines(part)).block(Block::bordered().title(title)), areas[index]);
    }
    let share = |used: u64, of: u64| if of == 0 { 0.0 } else { (used as f64 / of as f64).clamp(0.0, 1.0) };
    let full = share(view.used_bytes, view.capacity_bytes);
    frame.render_widget(
        Gauge::default()
            .gauge_style(Style::new().blue())
            .ratio(full)
            .label(format!("pool {:.0} % full", full * 100.0)),
        areas[4],
    );
    let shown = history.len().saturating_sub(usize::from(areas[5].width));
    frame.render_widget(Sparkline::default().data(history[shown..].iter().copied()), areas[5]);
    let holdings =
        Paragraph::new(lines(super::holdings(view))).block(Block::bordered().title("what it holds"));
    frame.render_widget(holdings, areas[6]);
    frame.render_widget(Line::from("q: quit").dim(), areas[7]);
}
