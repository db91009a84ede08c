//! `nvtier verify [NAME]`: reads regions and compares them with their checksums.

use serde_json::json;

use crate::cli::{Global, Verify};
use crate::config::Config;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Align, Table};
use crate::progress::Progress;
use crate::store::Store;
use crate::{ceiling, interrupt, names, size};

/// Lists at most this many bad chunks; `--json` has all that the engine keeps.
const SHOWN: usize = 50;

/// Verifies, and fails with code 5 when a chunk is bad.
pub fn run(global: &Global, config: &Config, args: &Verify) -> Outcome {
    let name = names::normalize(args.name.as_deref().unwrap_or(""))?;
    let store = Store::open(&config.pool(args.pool.pool.as_ref())?, true)?;
    store.entry(&name)?;
    let mut progress = Progress::new(global, "verify", 0, ceiling::of_path(store.path()));
    let report = store.verify(&name, &mut |state| {
        if interrupt::requested() {
            // Nothing is half done in a read, and the engine has no way to be told to stop.
            output::note("nvtier: error: interrupted");
            std::process::exit(code::INTERRUPTED.into());
        }
        progress.set_total(state.total_bytes);
        progress.set(state.done_bytes);
    })?;
    let (seconds, rate) = (progress.seconds(), report.bytes as f64 / progress.seconds().max(1e-9));
    progress.finish();
    if global.json {
        let value = json!({
            "pool": store.path(),
            "name": name,
            "clean": report.is_clean(),
            "seconds": seconds,
            "bytes_per_second": rate,
            "report": report,
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
    }
    if report.is_clean() {
        return Ok(());
    }
    if !global.json {
        let mut table = Table::new(&[
            ("chunk", Align::Right),
            ("member", Align::Right),
            ("region", Align::Left),
            ("reason", Align::Left),
        ]);
        for bad in report.bad.iter().take(SHOWN) {
            table.row(vec![
                bad.chunk.to_string(),
                bad.member.to_string(),
                output::printable(&bad.path),
                output::printable(&bad.reason),
            ]);
        }
        output::line(&table.render())?;
    }
    let first = report.bad.first().map_or(String::new(), |bad| {
        format!(
            ", the first is chunk {} of `{}` on member {}",
            bad.chunk,
            output::printable(&bad.path),
            bad.member
        )
    });
    let message = format!("verify {}: {} corrupt chunks{first}", store.path().display(), report.bad_chunks);
    Err(Failure::corrupt(message)
        .hint("import these regions again from their source, and look at the drive's health"))
}
