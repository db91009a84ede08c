//! `nvtier kv top`: what the KV stores of a pool do at this moment, as their owner counts it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::Pool;
use engine::control::Client;
use engine::kv::admin::{Contents, Order, Report, Watched};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::Stylize;
use ratatui::text::Line;
use ratatui::widgets::{Block, Paragraph};
use serde::Serialize;

use crate::cli::{Global, KvTop};
use crate::cmd::live::{self, Live};
use crate::failure::{Failure, Outcome};
use crate::{output, size};

/// Shows it until it is told to stop, or once. `store`: this one only.
pub fn run(global: &Global, pool: &Path, store: Option<&str>, args: &KvTop) -> Outcome {
    let interval = Duration::from_millis(args.look.interval);
    let doing = format!("watch the KV stores of {}", pool.display());
    let watch = Watch::open(&doing, pool, store)?;
    if !args.look.once && !global.json {
        return live::run(&doing, interval, || Screen::open(watch));
    }
    let before = watch.sample()?;
    live::pause(interval)?;
    let view = watch.view(&before, &watch.sample()?);
    if global.json { output::json(&view) } else { output::line(&text(&view)) }
}

/// A moment.
struct Sample {
    at: Instant,
    stores: Vec<Watched>,
}

/// Where samples come from.
struct Watch {
    client: Client,
    pool: PathBuf,
    store: Option<String>,
}

impl Watch {
    fn open(doing: &str, pool: &Path, store: Option<&str>) -> Outcome<Self> {
        let tried = |error: engine::Error| Failure::from(error).while_doing(doing);
        // Whatever is wrong with the pool itself is told first.
        Pool::probe(pool).map_err(tried)?;
        let client = Client::connect(pool).map_err(|error| {
            tried(error).hint(
                "only stores of a pool that a mount or another program serves can be watched; `nvtier kv stat` shows what lies there",
            )
        })?;
        let watch = Self { client, pool: pool.to_owned(), store: store.map(str::to_owned) };
        if let Some(name) = store
            && watch.sample()?.stores.is_empty()
        {
            return Err(Failure::not_found(format!("{doing}: there is no KV store {name:?}")));
        }
        Ok(watch)
    }

    fn sample(&self) -> Outcome<Sample> {
        let mut stores = match self.client.kv("", &Order::Watch, &[], None, &mut |_| {})? {
            Report::Watched(stores) => stores,
            other => return Err(super::odd(&other)),
        };
        stores.retain(|store| self.store.as_ref().is_none_or(|wanted| *wanted == store.name));
        Ok(Sample { at: Instant::now(), stores })
    }

    fn view(&self, before: &Sample, now: &Sample) -> View {
        let seconds = now.at.duration_since(before.at).as_secs_f64().max(1e-9);
        let store = |store: &Watched| {
            let old = before.stores.iter().find(|old| old.name == store.name);
            StoreView {
                name: store.name.clone(),
                open: store
                    .open
                    .as_deref()
                    .map(|new| OpenView::between(old.and_then(|old| old.open.as_deref()), new, seconds)),
            }
        };
        View {
            pool: self.pool.clone(),
            owner_pid: self.client.owner_pid(),
            seconds,
            stores: now.stores.iter().map(store).collect(),
        }
    }
}

/// All that is shown, and what `--json` prints.
#[derive(Debug, Serialize)]
struct View {
    pool: PathBuf,
    owner_pid: u32,
    /// Between the two samples.
    seconds: f64,
    stores: Vec<StoreView>,
}

#[derive(Debug, Serialize)]
struct StoreView {
    name: String,
    /// `None`: nobody has it open, and nothing happens to it.
    open: Option<OpenView>,
}

#[derive(Debug, Serialize)]
struct OpenView {
    hits_per_second: f64,
    misses_per_second: f64,
    /// Of what was asked for between the samples; `None`: nothing was.
    hit_rate: Option<f64>,
    hit_rate_since_open: Option<f64>,
    puts_per_second: f64,
    written_bytes_per_second: f64,
    evictions_per_second: f64,
    expired_per_second: f64,
    /// Puts refused since it was opened, for whatever reason.
    refused: u64,
    /// What may be written today yet; `None`: there is no limit.
    write_left_bytes: Option<u64>,
    /// All that is counted, since it was opened.
    #[serde(flatten)]
    contents: Contents,
}

impl OpenView {
    fn between(old: Option<&Contents>, new: &Contents, seconds: f64) -> Self {
        let stat = &new.stat;
        // A store that was opened since counts from nothing; one that was opened again has less than before.
        let empty = Default::default();
        let old = old.map(|old| &old.stat).filter(|old| old.commits <= stat.commits).unwrap_or(&empty);
        let rate = |from: u64, to: u64| to.saturating_sub(from) as f64 / seconds;
        let share =
            |hits: u64, misses: u64| (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64);
        let written = match old.written_bytes {
            0 => 0.0,
            from => rate(from, stat.written_bytes),
        };
        Self {
            hits_per_second: rate(old.hits, stat.hits),
            misses_per_second: rate(old.misses, stat.misses),
            hit_rate: share(stat.hits.saturating_sub(old.hits), stat.misses.saturating_sub(old.misses)),
            hit_rate_since_open: share(stat.hits, stat.misses),
            puts_per_second: rate(old.puts, stat.puts),
            written_bytes_per_second: written,
            evictions_per_second: rate(old.evictions, stat.evictions),
            expired_per_second: rate(old.expired, stat.expired),
            refused: stat.refused_admission + stat.refused_budget + stat.refused_quota + stat.refused_space,
            write_left_bytes: stat
                .write_bytes_per_day
                .map(|limit| limit.saturating_sub(stat.written_today_bytes)),
            contents: new.clone(),
        }
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".into(), |share| format!("{:.0} %", share * 100.0))
}

fn heading(view: &View) -> String {
    format!(
        "KV stores of {}, owned by process {}",
        output::printable(&view.pool.to_string_lossy()),
        view.owner_pid
    )
}

fn lines(store: &StoreView) -> Vec<String> {
    let Some(open) = &store.open else { return vec!["not open: nobody uses it now".into()] };
    let stat = &open.contents.stat;
    let left = match (open.write_left_bytes, stat.write_bytes_per_day) {
        (Some(left), Some(limit)) => {
            format!("{} of {} left today (UTC)", size::human(left), size::human(limit))
        }
        _ => "no write budget".into(),
    };
    let mut lines = vec![
        format!(
            "asked      {:>8.0} hits/s {:>8.0} misses/s, hits {} now, {} since it was opened",
            open.hits_per_second,
            open.misses_per_second,
            percent(open.hit_rate),
            percent(open.hit_rate_since_open)
        ),
        format!(
            "stored     {:>8.0} puts/s {:>10} written, {} puts refused",
            open.puts_per_second,
            size::rate(open.written_bytes_per_second),
            open.refused
        ),
        format!(
            "gone       {:>8.0} evictions/s, {} evicted, {} expired, {} corrupt, {} I/O errors",
            open.evictions_per_second, stat.evictions, stat.expired, stat.corrupt, stat.io_errors
        ),
        format!(
            "holds      {} blocks ({}), {} pinned, {} of {} allocated, {} namespaces",
            stat.blocks,
            size::human(stat.used_bytes),
            stat.pinned,
            size::human(stat.allocated_bytes),
            size::human(stat.budget_bytes),
            stat.namespaces
        ),
        format!(
            "writes     {} today, {} ever, {left}",
            size::human(stat.written_today_bytes),
            size::human(stat.written_bytes)
        ),
    ];
    for tenant in
        open.contents.tenants.iter().filter(|tenant| !tenant.name.is_empty() || tenant.used_bytes > 0)
    {
        let name = if tenant.name.is_empty() { "(no name)".into() } else { output::printable(&tenant.name) };
        let quota = match tenant.quota_bytes {
            0 => "no quota".to_owned(),
            bytes => format!("of {}", size::human(bytes)),
        };
        lines.push(format!("tenant     {name}: {} {quota}", size::human(tenant.used_bytes)));
    }
    if !stat.failed.is_empty() {
        lines.push(format!("FAILED     {}", output::printable(&stat.failed)));
    }
    lines
}

fn text(view: &View) -> String {
    let mut all = vec![heading(view)];
    if view.stores.is_empty() {
        all.push("there is no KV store in this pool".into());
    }
    for store in &view.stores {
        all.push(format!("\n{}", output::printable(&store.name)));
        all.extend(lines(store).into_iter().map(|line| format!("  {line}")));
    }
    all.join("\n")
}

struct Screen {
    watch: Watch,
    before: Sample,
    view: View,
}

impl Screen {
    fn open(watch: Watch) -> Outcome<Self> {
        let before = watch.sample()?;
        let view = watch.view(&before, &before);
        Ok(Self { watch, before, view })
    }
}

impl Live for Screen {
    fn look(&mut self) -> Outcome {
        let now = self.watch.sample()?;
        self.view = self.watch.view(&self.before, &now);
        self.before = now;
        Ok(())
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let parts: Vec<(String, Vec<String>)> =
            self.view.stores.iter().map(|store| (output::printable(&store.name), lines(store))).collect();
        let height = |count: usize| Constraint::Length(u16::try_from(count + 2).unwrap_or(u16::MAX));
        let mut rows = vec![Constraint::Length(1)];
        rows.extend(parts.iter().map(|(_, lines)| height(lines.len())));
        rows.extend([Constraint::Min(0), Constraint::Length(1)]);
        let areas = Layout::vertical(rows).split(frame.area());
        frame.render_widget(Line::from(heading(&self.view)).bold(), areas[0]);
        for (index, (name, lines)) in parts.iter().enumerate() {
            let lines: Vec<Line<'_>> = lines.iter().map(|line| Line::from(line.as_str())).collect();
            let block = Block::bordered().title(name.as_str());
            frame.render_widget(Paragraph::new(lines).block(block), areas[index + 1]);
        }
        if parts.is_empty() {
            frame.render_widget(Line::from("there is no KV store in this pool"), areas[1]);
        }
        frame.render_widget(Line::from("q: quit").dim(), areas[parts.len() + 2]);
    }
}
