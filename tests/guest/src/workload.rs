//! Commits whose content tells which one it is, and what must be left of them.
//!
//! Step k writes version k of region `k % SLOTS`, which replaces version k - SLOTS as a whole, and syncs. After step K every slot
//! must hold the newest version up to K, or a later one that was under way.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use engine::{FormatOptions, Pool, Session, SessionOptions, WriterOptions};
use nvtier_tests::pattern;

use crate::report::{Checked, ensure};

const SLOTS: u64 = 8;

fn name(slot: u64) -> String {
    format!("part-{}/slot-{slot}", slot % 2)
}

/// From one byte to a few chunks and stripes.
fn content(seed: u64, version: u64) -> Vec<u8> {
    let len = 8 + (version.wrapping_mul(0x9e37_79b9) ^ seed) as usize % 300_000;
    let mut bytes = pattern(seed ^ version, len);
    bytes[..8].copy_from_slice(&version.to_le_bytes());
    bytes
}

fn options(read_only: bool) -> SessionOptions {
    SessionOptions { read_only, ram_bytes: 64 << 20, serve: false, wait: Duration::from_secs(5) }
}

/// Formats a pool there, unless there is one, and commits up to `steps` versions, going on after those that are there. Prints
/// `acked K flushes F` once version K is durable, F being how many flushes the drive had answered by then.
pub fn write(path: &Path, steps: u64, seed: u64) -> Checked {
    let flushes = flush_counter(path);
    if Pool::probe(path).is_err() {
        Pool::format(path, &FormatOptions::default())?;
    }
    let first = check(path, None, seed)?.map_or(0, |newest| newest + 1);
    let session = Session::open(path, options(false))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "from {first} flushes {}", flushes()?)?;
    for version in first..steps {
        let bytes = content(seed, version);
        let mut writer =
            session.writer(&name(version % SLOTS), Some(bytes.len() as u64), WriterOptions::default())?;
        writer.write_all(&bytes)?;
        writer.commit()?;
        session.sync()?;
        writeln!(out, "acked {version} flushes {}", flushes()?)?;
        out.flush()?;
    }
    session.close()?;
    Ok(())
}

/// How many flushes a block device has answered: field 16 of its `stat` (Documentation/block/stat.rst).
fn flush_counter(path: &Path) -> impl Fn() -> Checked<u64> {
    let name = std::fs::canonicalize(path).ok();
    let name = name.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    move || {
        let stat = format!("/sys/block/{}/stat", name.as_deref().ok_or("the device has no name")?);
        let text = std::fs::read_to_string(&stat)?;
        let field = text.split_whitespace().nth(15).ok_or("this kernel counts no flushes")?;
        Ok(field.parse()?)
    }
}

/// Opens the pool there, verifies every sum, compares every byte, and checks that nothing up to version `acked` is missing.
/// Returns the newest version that is there.
pub fn check(path: &Path, acked: Option<u64>, seed: u64) -> Checked<Option<u64>> {
    let session = Session::open(path, options(false))?;
    let report = session.verify("", &mut |_| ())?;
    ensure(report.bad.is_empty(), || format!("bad chunks: {:?}", report.bad))?;
    let mut newest = None;
    for slot in 0..SLOTS {
        let least = acked.and_then(|acked| Some(acked - (acked.checked_sub(slot)? % SLOTS)));
        let found = match session.reader(&name(slot)) {
            Err(error) if error.kind() == engine::ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
            Ok(reader) => {
                let mut bytes = vec![0; reader.len() as usize];
                reader.read_exact_at(0, &mut bytes)?;
                let head =
                    bytes.get(..8).ok_or_else(|| format!("slot {slot} is {} bytes long", bytes.len()))?;
                let version = u64::from_le_bytes(head.try_into()?);
                ensure(version % SLOTS == slot && bytes == content(seed, version), || {
                    format!("slot {slot} holds other bytes than version {version} has")
                })?;
                Some(version)
            }
        };
        ensure(least.is_none() || found >= least, || {
            format!(
                "slot {slot} holds version {found:?}, but {least:?} was durable (acknowledged up to {acked:?})"
            )
        })?;
        newest = newest.max(found);
    }
    session.close()?;
    Ok(newest)
}
