//! Imports: from a [`Source`] to regions that appear whole or not at all.
//!
//! A single region is written by the engine under a hidden name that its writer can be resumed by. A directory is put
//! together under a hidden name, too, and renamed at the end. That name has a hash of what the source looked like, so
//! that a source which changed is imported from the start, and one which did not goes on where the last run stopped.

mod check;

use engine::WriterOptions;

use crate::cli::Global;
use crate::failure::{Failure, Outcome, code};
use crate::output::printable;
use crate::progress::Progress;
use crate::source::{Item, Listing, Source};
use crate::store::{PARTIAL, Store, staging_path};
use crate::{interrupt, names, size};

pub use check::check;

/// How to import.
#[derive(Clone, Copy, Debug)]
pub struct ImportOptions {
    /// Replace what has the name.
    pub replace: bool,
    /// Parse tensor headers (done by the caller with [`check()`], before the pool is touched).
    pub check: bool,
    /// Go on where an earlier run stopped.
    pub resume: bool,
}

/// What an import did.
#[derive(Clone, Copy, Debug)]
pub struct Imported {
    /// Bytes that an earlier run had brought.
    pub resumed_bytes: u64,
    /// Bytes that this run brought.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Imported {
    /// Bytes per second of this run.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds.max(1e-9)
    }
}

/// Imports everything in `listing` under `name`.
pub fn import(
    global: &Global,
    store: &Store,
    source: &Source,
    listing: &Listing,
    name: &str,
    options: &ImportOptions,
) -> Outcome<Imported> {
    refuse_existing(store, name, listing, options)?;
    refuse_too_large(store, listing, name)?;
    let mut task = Task {
        store,
        source,
        options,
        progress: Progress::new(global, format!("import {name}"), listing.len(), None),
        resumed: 0,
    };
    let outcome = match listing.items.as_slice() {
        [item] if !listing.is_directory => task.copy(item, name),
        _ => task.directory(listing, name),
    };
    outcome?;
    let Task { progress, resumed, .. } = task;
    let seconds = progress.seconds();
    progress.finish();
    Ok(Imported { resumed_bytes: resumed, bytes: listing.len() - resumed, seconds })
}

fn refuse_existing(store: &Store, name: &str, listing: &Listing, options: &ImportOptions) -> Outcome {
    let Some(entry) = store.find(name)? else { return Ok(()) };
    let exists = |what: &str| {
        Failure::new(
            code::FAILED,
            "Exists",
            format!("there is a {what} `{}` in the pool already", printable(name)),
        )
    };
    if entry.is_directory() && !listing.is_directory {
        return Err(exists("directory").hint(format!("give the region a name: {}/FILE", printable(name))));
    }
    if !options.replace {
        return Err(exists(entry.kind).hint("add --force to replace it, or choose another name"));
    }
    Ok(())
}

/// What is sure not to fit is refused before the first byte, so that nothing else suffers from a full pool meanwhile.
fn refuse_too_large(store: &Store, listing: &Listing, name: &str) -> Outcome {
    let free = store.stat()?.free_bytes;
    let staged: u64 = match store.find(&staging(name, listing))? {
        Some(_) => store.list(&staging(name, listing), true)?.iter().map(|entry| entry.allocated).sum(),
        None => 0,
    };
    let needed = listing.len().saturating_sub(staged);
    // A single region that was interrupted has its space already; its writer knows how much.
    if needed > free && (listing.is_directory || store.find(PARTIAL)?.is_none()) {
        let message = format!("{} are needed, the pool has {} free", size::human(needed), size::human(free));
        return Err(Failure::new(code::NO_SPACE, "NoSpace", message)
            .hint("remove regions with `nvtier rm`, or give the pool more space"));
    }
    Ok(())
}

struct Task<'a> {
    store: &'a Store,
    source: &'a Source,
    options: &'a ImportOptions,
    progress: Progress,
    resumed: u64,
}

impl Task<'_> {
    /// Brings all items to a hidden directory, then gives that its name.
    fn directory(&mut self, listing: &Listing, name: &str) -> Outcome {
        let staging = staging(name, listing);
        self.remove_stale(name, &staging)?;
        let outcome = self.fill(listing, &staging);
        if let Err(failure) = outcome {
            // A full pool gets its space back; after anything else the next run goes on.
            if failure.code == code::NO_SPACE || !self.options.resume {
                self.discard(&staging);
            }
            return Err(failure);
        }
        self.publish(&staging, name)
    }

    fn fill(&mut self, listing: &Listing, staging: &str) -> Outcome {
        for item in &listing.items {
            interrupt::check()?;
            let target = names::join(staging, &item.name);
            match self.store.find(&target)? {
                Some(entry) if entry.is_region() && entry.size == item.len => self.skip(item.len),
                _ => self.copy(item, &target)?,
            }
        }
        // After the first region: the engine makes the hidden directory then, closed to other users.
        self.store.make_directories(staging)?;
        for directory in &listing.directories {
            self.store.make_directories(&names::join(staging, directory))?;
        }
        Ok(())
    }

    fn publish(&self, staging: &str, name: &str) -> Outcome {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.store.make_directories(parent)?;
        }
        let old = format!("{staging}.old");
        let replaces = self.store.find(name)?.is_some();
        if replaces {
            self.store.rename(name, &old)?;
        }
        self.store.rename(staging, name)?;
        if replaces {
            self.store.remove(&old, true)?;
        }
        // Fails while another import is under way there, as it should.
        let _ = self.store.remove(PARTIAL, false);
        Ok(())
    }

    /// Earlier runs of the same name from a source that looked otherwise.
    fn remove_stale(&self, name: &str, staging: &str) -> Outcome {
        if self.store.find(PARTIAL)?.is_none() {
            return Ok(());
        }
        let prefix = staging_prefix(name);
        for entry in self.store.list(PARTIAL, false)? {
            let ours = entry.path.starts_with(&prefix);
            if ours && (entry.path != staging || !self.options.resume) {
                self.store.remove(&entry.path, true)?;
            }
        }
        Ok(())
    }

    fn discard(&self, staging: &str) {
        for path in [staging, PARTIAL] {
            // What failed before is what the user has to know; this is only the clean-up.
            if let Err(failure) = self.store.remove(path, path == staging) {
                tracing::debug!("{failure}");
            }
        }
    }

    /// One region.
    fn copy(&mut self, item: &Item, target: &str) -> Outcome {
        let options =
            WriterOptions { mode: item.mode, resume: self.options.resume, resume_key: item.identity.clone() };
        let mut writer = self.store.writer(target, item.len, options)?;
        let start = writer.resume_offset();
        let mut done = start;
        if start > item.len {
            writer.abort()?;
            return Err(Failure::failed(format!(
                "an interrupted import of `{}` is longer than its source",
                printable(target)
            ))
            .hint("add --no-resume to start over"));
        }
        self.skip(start);
        let outcome = self.source.stream(item, start).and_then(|mut stream| {
            loop {
                interrupt::check()?;
                let more = stream.next(&mut |bytes| {
                    writer.write_all(bytes).map_err(|error| self.store.failure("write", target, error))?;
                    done += bytes.len() as u64;
                    self.progress.add(bytes.len() as u64);
                    Ok(())
                })?;
                if !more {
                    return Ok(());
                }
            }
        });
        let outcome = outcome.and_then(|()| self.source.recheck(item, done));
        if let Err(failure) = outcome {
            let keep = self.options.resume && failure.code != code::NO_SPACE && failure.kind != "Changed";
            if keep {
                let kept = writer.checkpoint();
                drop(writer);
                kept.map_err(|error| self.store.failure("keep the part of", target, error))?;
                return Err(failure.hint("run the same command again: it goes on where this one stopped"));
            }
            writer.abort().map_err(|error| self.store.failure("clean up after", target, error))?;
            return Err(failure);
        }
        writer.commit().map_err(|error| self.store.failure("commit", target, error))?;
        Ok(())
    }

    /// Bytes that need not be brought again.
    fn skip(&mut self, bytes: u64) {
        if bytes > 0 {
            self.resumed += bytes;
            self.progress.skip(bytes);
        }
    }
}

fn staging_prefix(name: &str) -> String {
    staging_path(&format!("import.{:016x}.", hash([name].into_iter())))
}

fn staging(name: &str, listing: &Listing) -> String {
    let parts = listing.items.iter().flat_map(|item| [item.name.as_str(), item.identity.as_str()]);
    format!(
        "{}{:016x}",
        staging_prefix(name),
        hash(parts.chain(listing.directories.iter().map(String::as_str)))
    )
}

/// FNV-1a, 64 bits, over the parts and their ends: only has to keep different sources apart.
fn hash<'a>(parts: impl Iterator<Item = &'a str>) -> u64 {
    parts
        .flat_map(|part| part.bytes().chain([0]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
