//! `nvtier verify [NAME]`: reads regions and compares them with their checksums; with `--repair` mends what can be mended.

use std::collections::HashMap;

use engine::{BadChunk, RepairReport, RepairedChunk, ScrubStat};
use serde_json::json;

use crate::cli::{Global, Verify};
use crate::config::Config;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Align, Table};
use crate::progress::Progress;
use crate::source::{Item, ObjectOptions, Source};
use crate::store::Store;
use crate::{ceiling, interrupt, names, size, time};

/// Lists at most this many bad chunks; `--json` has all that the engine keeps.
const SHOWN: usize = 50;
/// A damaged chunk is read by one range request of at most this size.
const SOURCE_OPTIONS: ObjectOptions = ObjectOptions { connections: 1, part_size: 8 << 20 };

/// Verifies, and fails with code 5 when a chunk is bad.
pub fn run(global: &Global, config: &Config, args: &Verify) -> Outcome {
    let name = names::normalize(args.name.as_deref().unwrap_or(""))?;
    let originals = args.from.as_deref().map(Originals::open).transpose()?;
    let metrics = crate::store::bind_metrics(args.metrics)?;
    let store = Store::open(&config.pool(args.pool.pool.as_ref())?, !args.repair)?;
    let scraped = store.serve_metrics(metrics)?;
    let entry = store.entry(&name)?;
    let mut progress = Progress::new(global, "verify", 0, ceiling::of_path(store.path()));
    let mut watch = |state: engine::VerifyProgress| {
        if interrupt::requested() {
            // Nothing is half done: reads change nothing, and each chunk that was mended is whole. The engine has no way to be told to
            // stop.
            output::note("nvtier: error: interrupted");
            std::process::exit(code::INTERRUPTED.into());
        }
        progress.set_total(state.total_bytes);
        progress.set(state.done_bytes);
    };
    let mut repair = None;
    let report = if args.repair {
        let mut done = store.repair(&name, &mut watch)?;
        if let Some(originals) = &originals {
            originals.mend(&store, &name, entry.is_directory(), &mut done)?;
        }
        let report = done.verify.clone();
        repair = Some(done);
        report
    } else {
        store.verify(&name, &mut watch)?
    };
    let (seconds, rate) = (progress.seconds(), report.bytes as f64 / progress.seconds().max(1e-9));
    progress.finish();
    let (left, listed) = match &repair {
        Some(repair) => (repair.left_chunks, &repair.left),
        None => (report.bad_chunks, &report.bad),
    };
    drop(scraped);
    let scrub = store.stat()?.scrub;
    if global.json {
        let value = json!({
            "pool": store.path(),
            "name": name,
            "clean": left == 0,
            "seconds": seconds,
            "bytes_per_second": rate,
            "report": report,
            "repair": repair,
            "scrub": scrub,
        });
        output::json(&value)?;
    } else {
        output::line(&format!(
            "{} regions, {} chunks, {} in {} ({}): {}",
            report.regions,
            report.chunks,
            size::human(report.bytes),
            size::duration(seconds),
            size::rate(rate),
            if report.is_clean() {
                "all good".to_owned()
            } else {
                format!("{} BAD CHUNKS", report.bad_chunks)
            },
        ))?;
        if report.skipped > 0 {
            output::line(&format!("{} regions are open for writing and were not checked", report.skipped))?;
        }
        if report.resealed > 0 {
            output::line(&format!("{} regions that a crash left open got new checksums", report.resealed))?;
        }
        if let Some(repair) = &repair {
            show_repair(repair)?;
        }
        show_scrub(&scrub)?;
    }
    let path = store.path().to_owned();
    let (listed, bad) = (listed.clone(), left);
    if args.repair {
        store.close()?;
    }
    if bad == 0 {
        return Ok(());
    }
    if !global.json {
        show_bad(&listed)?;
    }
    let first = listed.first().map_or(String::new(), |bad| {
        format!(
            ", the first is chunk {} of `{}` on member {}",
            bad.chunk,
            output::printable(&bad.path),
            bad.member
        )
    });
    let what = if args.repair { "chunks that could not be repaired" } else { "corrupt chunks" };
    let message = format!("verify {}: {bad} {what}{first}", path.display());
    Err(Failure::corrupt(message).hint(match (args.repair, &args.from) {
        (false, _) => "`nvtier verify --repair --from SOURCE NAME` mends them; look at the drive's health",
        (true, None) => {
            "give the source that they were imported from: --from SOURCE; look at the drive's health"
        }
        (true, Some(_)) => "import these regions again, and look at the drive's health",
    }))
}

fn show_repair(repair: &RepairReport) -> Outcome {
    for done in &repair.done {
        output::line(&format!("repaired: {}", output::printable(done)))?;
    }
    if repair.orphans > 0 {
        output::line(&format!("removed: {} files that no region owns", repair.orphans))?;
    }
    if repair.leaked_bytes > 0 {
        output::line(&format!("freed: {} that nothing owns", size::human(repair.leaked_bytes)))?;
    }
    for chunk in repair.repaired.iter().take(SHOWN) {
        output::line(&format!(
            "repaired: chunk {} of `{}`, from {}",
            chunk.chunk,
            output::printable(&chunk.path),
            output::printable(&chunk.from)
        ))?;
    }
    if repair.repaired_chunks > SHOWN as u64 {
        output::line(&format!("repaired: {} chunks in all", repair.repaired_chunks))?;
    }
    Ok(())
}

/// The last scrub, and the one under way.
fn show_scrub(scrub: &ScrubStat) -> Outcome {
    if scrub.last_finished != 0 {
        let when = time::utc(scrub.last_finished);
        output::line(&format!("last scrub: ended {when}, {} bad chunks", scrub.last_bad_chunks))?;
    }
    if scrub.started != 0 {
        output::line(&format!(
            "scrub since {}: {} of {}, {} bad chunks{}",
            time::utc(scrub.started),
            size::human(scrub.done_bytes),
            size::human(scrub.total_bytes),
            scrub.bad_chunks,
            if scrub.running { "" } else { "; it goes on at the next mount with --scrub" },
        ))?;
    }
    Ok(())
}

fn show_bad(list: &[BadChunk]) -> Outcome {
    let mut table = Table::new(&[
        ("chunk", Align::Right),
        ("bytes", Align::Left),
        ("region", Align::Left),
        ("member", Align::Left),
        ("reason", Align::Left),
    ]);
    for bad in list.iter().take(SHOWN) {
        table.row(vec![
            bad.chunk.to_string(),
            if bad.len == 0 { "all".to_owned() } else { format!("{}..{}", bad.offset, bad.offset + bad.len) },
            output::printable(&bad.path),
            format!("{} {}", bad.member, output::printable(&bad.member_path)),
            output::printable(&bad.reason),
        ]);
    }
    output::line(&table.render())
}

/// What regions were imported from.
struct Originals {
    text: String,
    source: Source,
    is_directory: bool,
    items: HashMap<String, Item>,
}

impl Originals {
    fn open(text: &str) -> Outcome<Self> {
        let source = Source::parse(text, &SOURCE_OPTIONS)?;
        let listing = source.list(true)?;
        let items = listing.items.into_iter().map(|item| (item.name.clone(), item)).collect();
        Ok(Self { text: text.to_owned(), source, is_directory: listing.is_directory, items })
    }

    /// The item that a region below `name` was made of.
    fn item(&self, name: &str, path: &str) -> Option<&Item> {
        let below = if name.is_empty() { Some(path) } else { path.strip_prefix(name) };
        self.items.get(below?.trim_start_matches('/'))
    }

    /// Puts the source's bytes in the place of damaged chunks, where they are the committed ones.
    fn mend(&self, store: &Store, name: &str, is_directory: bool, report: &mut RepairReport) -> Outcome {
        if is_directory != self.is_directory {
            let kind = |directory| if directory { "a directory" } else { "one region" };
            let message = format!(
                "--from {}: it is {}, and `{}` is {}",
                self.text,
                kind(self.is_directory),
                output::printable(name),
                kind(is_directory)
            );
            return Err(
                Failure::usage(message).hint("name the region or directory that was imported from it")
            );
        }
        let chunk_size = u64::from(store.info()?.chunk_size);
        let mut left = Vec::new();
        for bad in std::mem::take(&mut report.left) {
            interrupt::check()?;
            report.left_chunks -= 1;
            // A region as a whole: each of its chunks.
            let size = if bad.len == 0 { store.entry(&bad.path)?.size } else { bad.offset + bad.len };
            let mut offset = bad.offset;
            while offset < size {
                let len = (size - offset).min(chunk_size);
                let bad = BadChunk { chunk: offset / chunk_size, offset, len, ..bad.clone() };
                match self.mend_chunk(store, name, &bad) {
                    Ok(()) => report.add_repaired(RepairedChunk {
                        node: bad.node,
                        path: bad.path,
                        chunk: bad.chunk,
                        from: self.text.clone(),
                    }),
                    Err(why) => left.push(BadChunk { reason: format!("{}; {why}", bad.reason), ..bad }),
                }
                offset += len;
            }
        }
        report.left_chunks += left.len() as u64;
        report.left = left;
        Ok(())
    }

    fn mend_chunk(&self, store: &Store, name: &str, bad: &BadChunk) -> Result<(), String> {
        let Some(item) = self.item(name, &bad.path) else {
            return Err(format!("{} has no such file", self.text));
        };
        if item.len < bad.offset + bad.len {
            return Err(format!("{} has only {} bytes", item.origin.describe(), item.len));
        }
        let mut bytes = vec![0; bad.len as usize];
        self.source.read_at(item, bad.offset, &mut bytes).map_err(|failure| failure.message)?;
        store.replace_chunk(bad.node, bad.chunk, &bytes).map(drop).map_err(|failure| failure.message)
    }
}
