//! Regions that are being written through a session: invisible until their commit.
//!
//! Such a region lives in the directory `/.nvtier-partial` (mode 0700) of the pool under a name of its own and is renamed to its
//! target at commit, so readers see the old content or the new one, and a crash leaves one of them.
//!
//! - A writer without `resume` uses the name `<hash>-<pid>-<n>`: removed when the writer goes, and by the next owner's
//!   [`sweep`] after a crash.
//! - A writer with `resume` uses the name `<hash>` of its target. When it goes without a commit, the bytes from the start
//!   that are durable are counted in the xattr `user.nvtier.partial` = `<bytes> <resume key>`, and the next writer of the same target
//!   and key goes on there. Every [`CHECKPOINT`] bytes the same is done on the way, so a crash loses no more than that.
//!   Writing without resuming, or `nvtier rm -r .nvtier-partial`, gets rid of it.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::file_draft::FileStream;
use crate::handle::Handle;
use crate::pool::Pool;
use crate::session::local::{self, Who};
use crate::session::{Entry, WriterOptions};
use crate::types::{Access, Allocate, Attr, NewNode, NodeId, NodeKind, ROOT, RenameFlags, SetAttr, XattrSet};

/// The directory of regions being written, in the root.
pub(crate) const DIRECTORY: &str = ".nvtier-partial";
/// Holds how much of a resumable region is durable.
const XATTR: &str = "user.nvtier.partial";
/// A resumable writer makes its bytes durable this often.
pub(crate) const CHECKPOINT: u64 = 1 << 30;
/// Largest offset: `off_t`.
const OFFSET_MAX: u64 = i64::MAX as u64;

/// Names in [`DIRECTORY`] that a writer of this process has, by pool: one writer at a time may resume a target.
static OPEN: Mutex<Option<HashSet<(String, OsString)>>> = Mutex::new(None);
static COUNTER: AtomicU64 = AtomicU64::new(0);

fn open_names() -> MutexGuard<'static, Option<HashSet<(String, OsString)>>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A name taken in [`OPEN`]; given back on drop.
#[derive(Debug)]
struct Claim(String, OsString);

impl Claim {
    fn take(pool: &Pool, name: &OsStr, target: &str) -> Result<Claim> {
        let id = pool.info().id;
        let mut names = open_names();
        if !names.get_or_insert_default().insert((id.clone(), name.to_owned())) {
            return Err(Error::new(ErrorKind::Busy, format!("{target:?} is being imported already")));
        }
        Ok(Claim(id, name.to_owned()))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(names) = open_names().as_mut() {
            names.remove(&(std::mem::take(&mut self.0), std::mem::take(&mut self.1)));
        }
    }
}

/// Removes what writers that cannot be resumed left behind in a crash. For a process that has just become the owner.
pub(crate) fn sweep(pool: &Pool) {
    let Ok(dir) = pool.lookup(ROOT, OsStr::new(DIRECTORY)) else { return };
    let mut cookie = 0;
    while let Ok(page) = pool.readdir(dir.node, cookie, 1000) {
        let Some((next, _)) = page.last() else { break };
        cookie = *next;
        for (_, child) in page {
            if !child.name.to_string_lossy().contains('-') {
                continue;
            }
            if let Err(error) = pool.unlink(dir.node, &child.name) {
                tracing::warn!("cannot remove {DIRECTORY}/{:?}: {}", child.name, error.chain());
            }
        }
    }
    let _ = pool.rmdir(ROOT, OsStr::new(DIRECTORY)); // fails when something is left, as it should
}

/// How far a region is written without gaps.
#[derive(Debug, Default)]
struct Progress {
    /// All bytes below are written.
    contiguous: u64,
    /// What is written beyond, start to end, apart from each other.
    beyond: BTreeMap<u64, u64>,
    /// One past the last byte written.
    end: u64,
    /// Bytes that the last checkpoint covers.
    checkpointed: u64,
}

impl Progress {
    fn wrote(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        self.end = self.end.max(end);
        if offset > self.contiguous {
            let known = self.beyond.entry(offset).or_insert(end);
            *known = end.max(*known);
            return;
        }
        self.contiguous = self.contiguous.max(end);
        while let Some(next) = self.beyond.first_entry().filter(|e| *e.key() <= self.contiguous) {
            self.contiguous = self.contiguous.max(next.remove());
        }
    }
}

/// A region being written, in the process that owns the pool.
#[derive(Debug)]
pub(crate) struct PartialWriter {
    pool: Pool,
    target: String,
    directory: NodeId,
    name: OsString,
    /// `None` once it was committed or given up.
    handle: Option<Handle>,
    node: NodeId,
    resume: Option<String>,
    resume_offset: u64,
    progress: Mutex<Progress>,
    /// Taken before `progress`.
    stream: Mutex<Stream>,
    _claim: Claim,
}

/// Bytes on their way past the page cache, as long as they come in order.
#[derive(Debug, Default)]
enum Stream {
    /// None, or no more.
    #[default]
    Off,
    Open(FileStream),
    /// Ended after that many bytes, with their sums; nothing was written since.
    Ended(u64, Vec<u32>),
}

impl PartialWriter {
    pub fn open(
        pool: &Pool,
        path: &str,
        size_hint: Option<u64>,
        options: &WriterOptions,
        who: Who,
    ) -> Result<PartialWriter> {
        let parts = local::parts(path)?;
        let Some((_, above)) = parts.split_last() else {
            return Err(Error::new(ErrorKind::IsDirectory, "a region needs a name; the root is a directory"));
        };
        let target = parts.join("/");
        match pool.resolve(&target) {
            Ok(Attr { kind: NodeKind::Directory, .. }) => {
                return Err(Error::new(ErrorKind::IsDirectory, format!("{target:?} is a directory")));
            }
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        pool.create_dirs(&above.join("/"), who.uid, who.gid)?;

        let hash = format!("{:016x}", crate::tensors::fnv1a(target.as_bytes()));
        let name = match options.resume {
            true => hash,
            false => {
                format!("{hash}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
            }
        };
        let name = OsString::from(name);
        let claim = Claim::take(pool, &name, &target)?;
        let (directory, attr, kept) = create(pool, &name, options, who)?;
        let handle = pool.open_region(attr.node, Access::ReadWrite, kept == 0)?;
        let writer = PartialWriter {
            pool: pool.clone(),
            target,
            directory,
            name,
            node: attr.node,
            resume: options.resume.then(|| options.resume_key.clone()),
            resume_offset: kept,
            progress: Mutex::new(Progress {
                contiguous: kept,
                end: kept,
                checkpointed: kept,
                ..Progress::default()
            }),
            handle: Some(handle),
            stream: Mutex::default(),
            _claim: claim,
        };
        // From here on a failure drops the writer, which gives everything back.
        writer.handle()?.set_len(kept)?; // what lies beyond was never promised
        if let Some(size) = size_hint.filter(|&s| s > kept) {
            match writer.handle()?.allocate(kept, size - kept, Allocate::Reserve { keep_size: true }) {
                Err(error) if error.kind() == ErrorKind::NotSupported => {}
                other => {
                    other.map_err(|e| e.context(format!("reserve {size} bytes for {:?}", writer.target)))?
                }
            }
        }
        Ok(writer)
    }

    /// Has the bytes written past the page cache where that can be done. For a writer whose bytes nobody else writes
    /// ([`backing`](Self::backing) is `None` from then on), before the first one.
    pub fn stream(&mut self, size_hint: Option<u64>) -> Result<()> {
        if self.resume_offset == 0
            && let Some(stream) = self.handle()?.stream(size_hint)?
        {
            self.stream = Mutex::new(Stream::Open(stream));
        }
        Ok(())
    }

    fn stream_state(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets what is on its way into the file.
    fn end_stream(&self, state: &mut Stream) -> Result<()> {
        if let Stream::Open(stream) = std::mem::take(state) {
            let written = stream.position();
            *state = Stream::Ended(written, self.handle()?.finish(stream)?);
        }
        Ok(())
    }

    fn handle(&self) -> Result<&Handle> {
        let ended = || Error::new(ErrorKind::Stale, format!("the writer of {:?} has ended", self.target));
        self.handle.as_ref().ok_or_else(ended)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes from the start that are there already.
    pub fn resume_offset(&self) -> u64 {
        self.resume_offset
    }

    /// One past the last byte written.
    pub fn len(&self) -> u64 {
        self.progress().end
    }

    /// The file that the bytes go to, 1:1, where they go to one.
    pub fn backing(&self) -> Option<std::sync::Arc<std::fs::File>> {
        self.handle.as_ref().and_then(Handle::backing)
    }

    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        in_range(offset, data.len() as u64, &self.target)?;
        let mut state = self.stream_state();
        match &mut *state {
            Stream::Open(stream) if stream.position() == offset => {
                self.handle()?.push(stream, data)?;
                drop(state);
                return self.wrote(offset, data.len() as u64);
            }
            Stream::Off => {}
            _ => {
                self.end_stream(&mut state)?;
                *state = Stream::Off;
            }
        }
        drop(state);
        let mut done = 0;
        while done < data.len() {
            match self.handle()?.write_at(offset + done as u64, &data[done..])? {
                0 => {
                    return Err(Error::new(
                        ErrorKind::Io,
                        format!("a write to {:?} took nothing", self.target),
                    ));
                }
                n => done += n,
            }
        }
        self.wrote(offset, data.len() as u64)
    }

    /// As [`wrote`](Self::wrote), for bytes that a client says it wrote to [`backing`](Self::backing) itself.
    pub fn claimed(&self, offset: u64, len: u64) -> Result<()> {
        let end = in_range(offset, len, &self.target)?;
        let size = self.handle()?.size();
        if end > size {
            let context = format!(
                "bytes up to {end} of {:?} are said to be written, but its draft ends at {size}",
                self.target
            );
            return Err(Error::new(ErrorKind::OutOfRange, context));
        }
        self.wrote(offset, len)
    }

    /// Counts bytes that were written; every now and then makes them durable.
    fn wrote(&self, offset: u64, len: u64) -> Result<()> {
        let due = {
            let mut progress = self.progress();
            progress.wrote(offset, len);
            progress.contiguous - progress.checkpointed.min(progress.contiguous) >= CHECKPOINT
        };
        if due && self.resume.is_some() { self.checkpoint_at(true) } else { Ok(()) }
    }

    /// Makes durable what is written without gaps, and notes how much that is.
    pub fn checkpoint(&self) -> Result<()> {
        self.checkpoint_at(false)
    }

    /// `go_on`: more comes, so what is only gathered may wait.
    fn checkpoint_at(&self, go_on: bool) -> Result<()> {
        let Some(key) = &self.resume else { return Ok(()) };
        let mut state = self.stream_state();
        let contiguous = match &mut *state {
            Stream::Open(stream) if go_on => stream.settle()?,
            state => {
                self.end_stream(state)?;
                self.progress().contiguous
            }
        };
        drop(state);
        self.handle()?.sync()?;
        let note = format!("{contiguous} {key}");
        self.pool.setxattr(self.node, OsStr::new(XATTR), note.as_bytes(), XattrSet::Any)?;
        self.progress().checkpointed = contiguous;
        Ok(())
    }

    /// Makes the region appear at its target, durable, in place of what was there.
    pub fn commit(mut self) -> Result<Entry> {
        let end = self.len();
        let doing = format!("commit {:?}", self.target);
        self.seal_and_rename(end).map_err(|e| e.context(&doing))?;
        self.handle = None; // Drop has nothing to undo any more
        self.pool.sync().map_err(|e| e.context(&doing))?;
        local::stat_path(&self.pool, &self.target)
    }

    fn seal_and_rename(&mut self, end: u64) -> Result<()> {
        let mut state = self.stream_state();
        self.end_stream(&mut state)?;
        let handle = self.handle()?;
        if handle.size() != end {
            handle.set_len(end)?; // reserved space, or what a resumed writer found, may reach further
        }
        match std::mem::take(&mut *state) {
            Stream::Ended(written, sums) if written == end => handle.offer_sums(end, sums),
            _ => {}
        }
        drop(state);
        // The last handle's drop makes sums but reports nothing; flush and sync do.
        handle.flush()?;
        handle.sync()?;
        if self.resume.is_some() {
            match self.pool.removexattr(self.node, OsStr::new(XATTR)) {
                Err(error) if error.kind() == ErrorKind::NoAttribute => {}
                other => other?,
            }
        }
        let (above, name) = local::parent(&self.pool, &self.target)?;
        self.pool.rename(self.directory, &self.name, above.node, name, RenameFlags::default())?;
        self.handle = None;
        let _ = self.pool.rmdir(ROOT, OsStr::new(DIRECTORY));
        Ok(())
    }

    /// Gives up all that was written, what could be resumed included.
    pub fn abort(mut self) -> Result<()> {
        self.resume = None;
        self.end()
    }

    /// Ends the writer without a commit.
    fn end(&mut self) -> Result<()> {
        if self.handle.is_none() {
            return Ok(());
        }
        if self.resume.is_some() {
            let parked = self.checkpoint();
            self.handle = None;
            return parked;
        }
        // Unlinked first: dropping the last handle then discards instead of making sums.
        let removed = self.pool.unlink(self.directory, &self.name);
        self.handle = None;
        let _ = self.pool.rmdir(ROOT, OsStr::new(DIRECTORY));
        removed
    }
}

impl Drop for PartialWriter {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!("give up writing {:?}: {}", self.target, error.chain());
        }
    }
}

/// The end of a range that a file can have.
fn in_range(offset: u64, len: u64, target: &str) -> Result<u64> {
    offset.checked_add(len).filter(|&end| end <= OFFSET_MAX).ok_or_else(|| {
        Error::new(ErrorKind::TooLarge, format!("{len} bytes at {offset} of {target:?} end beyond 2^63"))
    })
}

/// The region to write to, and how many of its bytes are kept.
fn create(pool: &Pool, name: &OsStr, options: &WriterOptions, who: Who) -> Result<(NodeId, Attr, u64)> {
    // Another writer that ends may remove the empty directory in between.
    let mut attempts = 0;
    loop {
        let new = |kind, mode| NewNode { kind, mode, uid: who.uid, gid: who.gid, rdev: 0, target: None };
        let directory = match pool.lookup(ROOT, OsStr::new(DIRECTORY)) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                match pool.create(ROOT, OsStr::new(DIRECTORY), &new(NodeKind::Directory, 0o700)) {
                    Err(error) if error.kind() == ErrorKind::Exists => continue,
                    other => other?,
                }
            }
            other => other?,
        };
        match pool.create(directory.node, name, &new(NodeKind::Region, options.mode & 0o7777)) {
            Ok(attr) => return Ok((directory.node, attr, 0)),
            Err(error) if error.kind() == ErrorKind::Exists => {
                let attr = pool.lookup(directory.node, name)?;
                let set = SetAttr {
                    mode: Some(options.mode & 0o7777),
                    uid: Some(who.uid),
                    gid: Some(who.gid),
                    ..SetAttr::default()
                };
                let attr = pool.setattr(attr.node, &set)?;
                return Ok((directory.node, attr, kept(pool, &attr, &options.resume_key)));
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Stale) && attempts < 100 =>
            {
                attempts += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// What the note of an earlier writer promises, if it wrote the same.
fn kept(pool: &Pool, attr: &Attr, key: &str) -> u64 {
    kept_by(&pool.getxattr(attr.node, OsStr::new(XATTR)).unwrap_or_default(), key, attr.size)
}

/// Reads a note: the bytes it promises of a region of `size` bytes, 0 where it is of another source or none at all.
pub(crate) fn kept_by(note: &[u8], key: &str, size: u64) -> u64 {
    match std::str::from_utf8(note).unwrap_or_default().split_once(' ') {
        Some((bytes, same)) if same == key => bytes.parse().map_or(0, |bytes: u64| bytes.min(size)),
        _ => 0,
    }
}

/// For tests: what [`Progress`] says after these writes.
pub(crate) fn progress_of(writes: &[(u64, u64)]) -> (u64, u64) {
    let mut progress = Progress::default();
    writes.iter().for_each(|(offset, len)| progress.wrote(*offset, *len));
    (progress.contiguous, progress.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_counts_what_has_no_gaps() {
        let mut p = Progress::default();
        p.wrote(10, 10);
        p.wrote(30, 5);
        p.wrote(30, 2);
        assert_eq!((p.contiguous, p.end), (0, 35));
        p.wrote(0, 12);
        assert_eq!(p.contiguous, 20);
        p.wrote(20, 10);
        assert_eq!((p.contiguous, p.end), (35, 35));
        assert!(p.beyond.is_empty());
    }
}
