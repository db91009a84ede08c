//! A view on a terminal that is drawn again and again until somebody ends it.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};

use crate::failure::{Failure, Outcome};
use crate::interrupt;

/// Keys and signals are looked for so often.
const TICK: Duration = Duration::from_millis(100);

/// What is shown.
pub trait Live {
    /// Looks again.
    fn look(&mut self) -> Outcome;
    /// Draws what was seen last.
    fn draw(&self, frame: &mut Frame<'_>);
}

/// Runs until `q`, Esc, Ctrl-C, a signal, or an error of [`Live::look`]. `doing`: what was asked for, of the error where this is no terminal.
pub fn run<L: Live>(doing: &str, interval: Duration, open: impl FnOnce() -> Outcome<L>) -> Outcome {
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return Err(
            Failure::usage(format!("{doing}: this is no terminal")).hint("add --once, or --once --json")
        );
    }
    let live = open()?;
    let mut terminal = ratatui::try_init().map_err(|error| Failure::io("take over the terminal", &error))?;
    let outcome = watch(&mut terminal, live, interval);
    ratatui::restore();
    outcome
}

fn watch(terminal: &mut ratatui::DefaultTerminal, mut live: impl Live, interval: Duration) -> Outcome {
    let failed = |error: std::io::Error| Failure::io("draw on the terminal", &error);
    let mut last = Instant::now();
    loop {
        terminal.draw(|frame| live.draw(frame)).map_err(failed)?;
        while last.elapsed() < interval {
            interrupt::check()?;
            if event::poll(TICK.min(interval)).map_err(failed)? {
                match event::read().map_err(failed)? {
                    Event::Key(key) if ends(key.code, key.modifiers) => return Ok(()),
                    Event::Resize(..) => {
                        terminal.draw(|frame| live.draw(frame)).map_err(failed)?;
                    }
                    _ => {}
                }
            }
        }
        last = Instant::now();
        live.look()?;
    }
}

fn ends(code: KeyCode, modifiers: KeyModifiers) -> bool {
    matches!(code, KeyCode::Char('q') | KeyCode::Esc)
        || (code == KeyCode::Char('c') && modifiers.contains(KeyModifiers::CONTROL))
}

/// Waits so long, unless somebody ends it.
pub fn pause(interval: Duration) -> Outcome {
    let start = Instant::now();
    while start.elapsed() < interval {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(10).min(interval));
    }
    Ok(())
}
