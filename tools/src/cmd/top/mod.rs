//! `nvtier top`: what a pool's owner does at this moment.

mod limits;
mod sample;
mod screen;

use std::path::Path;
use std::time::Duration;

use crate::cli::{Global, Top};
use crate::cmd::live;
use crate::config::Config;
use crate::failure::{Failure, Outcome};
use crate::{output, size};
use sample::{View, Watched};

/// Shows it until it is told to stop, or once.
pub fn run(global: &Global, config: &Config, args: &Top) -> Outcome {
    let pool = config.pool(args.pool.pool.as_ref())?;
    let interval = Duration::from_millis(args.look.interval);
    let watched = open(&pool, args.tbw)?;
    if !args.look.once && !global.json {
        let doing = format!("watch the pool {}", pool.display());
        return live::run(&doing, interval, || screen::Screen::open(watched));
    }
    let before = watched.sample()?;
    live::pause(interval)?;
    let view = watched.view(&before, &watched.sample()?, &watched.holdings()?);
    if global.json { output::json(&view) } else { output::line(&text(&view).join("\n")) }
}

fn open(pool: &Path, tbw: Option<u64>) -> Outcome<Watched> {
    let tried = |failure: Failure| failure.while_doing(format!("watch the pool {}", pool.display()));
    // Whatever is wrong with the pool itself is told first.
    engine::Pool::probe(pool).map_err(|error| tried(error.into()))?;
    Watched::open(pool, tbw).map_err(|failure| {
        tried(failure)
            .hint("only a pool that a mount or another program serves can be watched: `nvtier mount` does")
    })
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".into(), |share| format!("{:.0} %", share * 100.0))
}

fn time(seconds: Option<f64>) -> String {
    seconds.map_or("-".into(), |seconds| match seconds {
        s if s < 1e-3 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.2} s"),
    })
}

fn heading(view: &View) -> String {
    let place =
        view.mountpoint.as_deref().map(Path::display).map_or(String::new(), |point| format!(" on {point}"));
    format!("{}{place}, owned by process {}", path(&view.pool), view.owner_pid)
}

fn path(path: &Path) -> String {
    output::printable(&path.to_string_lossy())
}

fn throughput(view: &View) -> Vec<String> {
    let line = |flow: &sample::Flow| {
        format!("{:<10} {:<24} {:>14}", flow.tier, flow.purpose, size::rate(flow.bytes_per_second))
    };
    view.throughput.iter().map(line).collect()
}

fn waiting(view: &View) -> Vec<String> {
    let queue =
        |what: &str| view.queues.iter().find(|queue| queue.what == what).map_or(0, |queue| queue.in_flight);
    let mut lines = vec![format!(
        "{:<14} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "", "IN FLIGHT", "REQUESTS", "P50", "P95", "P99"
    )];
    for one in &view.latency {
        let what = format!("mount {}", one.what);
        lines.push(format!(
            "{what:<14} {:>9} {:>9} {:>9} {:>9} {:>9}",
            queue(&what),
            one.requests,
            time(one.p50_seconds),
            time(one.p95_seconds),
            time(one.p99_seconds)
        ));
    }
    for drive in &view.drives {
        lines.push(format!(
            "{:<14} {:>9} busy {}, mean of a read {}, of a write {}",
            drive.name,
            queue(&drive.name),
            percent(Some(drive.busy)),
            time(drive.read_mean_seconds),
            time(drive.write_mean_seconds)
        ));
    }
    lines
}

fn memory(view: &View) -> Vec<String> {
    let ram = &view.ram;
    vec![
        format!(
            "RAM tier   {} of {}, hits {} now, {} since it was opened",
            size::human(ram.used_bytes),
            size::human(ram.budget_bytes),
            percent(ram.hit_rate),
            percent(ram.hit_rate_since_open)
        ),
        format!(
            "pool       {} of {}, corrupt chunks {}",
            size::human(view.used_bytes),
            size::human(view.capacity_bytes),
            view.corrupt_chunks
        ),
    ]
}

fn limits(view: &View) -> Vec<String> {
    let mut lines = vec![limits::binding(&view.limits)];
    match view.wear.is_empty() {
        true => lines.push("wear unknown: the kernel names no drive below the members".into()),
        false => lines.extend(view.wear.iter().map(limits::wear_line)),
    }
    lines.extend(view.write_budgets.iter().map(limits::budget_line));
    lines.into_iter().map(|line| output::printable(&line)).collect()
}

fn holdings(view: &View) -> Vec<String> {
    let line = |holding: &sample::Holding| {
        format!(
            "{:>10} {:>8} regions  {}",
            size::human(holding.bytes),
            holding.regions,
            output::printable(&holding.name)
        )
    };
    view.holdings.iter().map(line).collect()
}

fn text(view: &View) -> Vec<String> {
    let mut lines = vec![heading(view)];
    for (title, part) in [
        ("throughput", throughput(view)),
        ("queues and times", waiting(view)),
        ("tiers", memory(view)),
        ("limits and wear", limits(view)),
        ("what it holds", holdings(view)),
    ] {
        lines.push(format!("\n{title}"));
        lines.extend(part.into_iter().map(|line| format!("  {line}")));
    }
    lines
}
