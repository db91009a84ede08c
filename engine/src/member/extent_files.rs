//! A directory member of a striped pool: files that hold extents.
//!
//! Each draft fills a file of its own on each member, a `fallocate(2)` an allocation, so that the file system lays a region
//! down in order and `ENOSPC` shows when space is asked for. Extents that are freed are punched out; a file without extents is
//! removed.
//!
//! Which extents live is known from the layouts alone; files that no layout names are what a crash left, and are removed at open.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use nvme::{Device, FileDevice};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::directory::private_directories;
use super::{Hint, Member};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Extent;
use crate::pool::MemberKind;

/// Name of the directory within the member.
pub const DIRECTORY: &str = "extents";
/// Files kept open.
const OPEN_FILES: usize = 128;

/// How an [`ExtentDirectory`] is opened.
#[derive(Clone, Debug)]
pub struct ExtentDirectoryOptions {
    /// Index of the member.
    pub index: u16,
    /// Bytes a chunk.
    pub chunk_size: u32,
    /// Bytes that extents may take in all; `None`: what the file system has.
    pub quota: Option<u64>,
    /// Never write.
    pub read_only: bool,
}

/// The extents of one directory member; see the module documentation.
#[derive(Debug)]
pub struct ExtentDirectory {
    member: PathBuf,
    directory: PathBuf,
    options: ExtentDirectoryOptions,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    files: HashMap<u64, Entry>,
    /// Highest number of a file that ever was.
    last: u64,
    used: u64,
    /// `last` at open: drafts of this process write to later files only.
    found_last: u64,
    /// A file was made or removed since the last sync.
    directory_dirty: bool,
    open: VecDeque<(u64, Arc<FileDevice>)>,
}

#[derive(Debug, Default)]
struct Entry {
    /// End of what was allocated.
    end: u64,
    /// Bytes of it in use.
    live: u64,
}

impl ExtentDirectory {
    /// Opens (and makes, unless read-only) the extents of the member at `member`.
    pub fn new(member: &Path, options: &ExtentDirectoryOptions) -> Result<ExtentDirectory> {
        let directory = member.join(DIRECTORY);
        if !options.read_only {
            private_directories(&directory)
                .map_err(|e| Error::io(format!("making {}", directory.display()), e))?;
        }
        Ok(ExtentDirectory {
            member: member.to_owned(),
            directory,
            options: options.clone(),
            state: Mutex::default(),
        })
    }

    /// The path of a file.
    pub fn file_path(&self, file: u64) -> PathBuf {
        self.directory.join(format!("{file:016x}"))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn open_file(&self, state: &mut State, file: u64) -> Result<Arc<FileDevice>> {
        if let Some(at) = state.open.iter().position(|(open, _)| *open == file) {
            // Move it to the young end.
            if let Some(found) = state.open.remove(at) {
                state.open.push_back(found);
            }
        } else {
            let path = self.file_path(file);
            let opened = OpenOptions::new().read(true).write(!self.options.read_only).open(&path);
            let opened = opened.map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
            self.remember(state, file, opened)?;
        }
        match state.open.back() {
            Some((_, device)) => Ok(device.clone()),
            None => Err(Error::new(ErrorKind::Io, "no file is open")),
        }
    }

    fn remember(&self, state: &mut State, file: u64, opened: File) -> Result<()> {
        let name = self.file_path(file).display().to_string();
        // Where the file system refuses O_DIRECT the page cache serves.
        let device = match FileDevice::from_file(opened, name.clone(), true) {
            Ok(device) => device,
            Err(refused) => {
                let again =
                    OpenOptions::new().read(true).write(!self.options.read_only).open(self.file_path(file));
                let again = again.map_err(|e| Error::io(format!("opening {name}"), e))?;
                tracing::debug!(file = name, reason = %refused, "no O_DIRECT here");
                FileDevice::from_file(again, name, false)?
            }
        };
        if state.open.len() >= OPEN_FILES {
            state.open.pop_front();
        }
        state.open.push_back((file, Arc::new(device)));
        Ok(())
    }

    fn create(&self, state: &mut State) -> Result<u64> {
        let id = state.last + 1;
        let path = self.file_path(id);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Error::io(format!("making {}", path.display()), e))?;
        state.last = id;
        state.directory_dirty = true;
        state.files.insert(id, Entry::default());
        self.remember(state, id, file)?;
        Ok(id)
    }

    fn free_one(&self, state: &mut State, extent: &Extent) -> Result<()> {
        let path = self.file_path(extent.file);
        let end = extent.offset.checked_add(extent.len);
        let Some(entry) = state
            .files
            .get_mut(&extent.file)
            .filter(|entry| entry.live >= extent.len && end.is_some_and(|end| end <= entry.end))
        else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{}: {extent:?} is freed, but not in use", path.display()),
            ));
        };
        entry.live -= extent.len;
        state.used -= extent.len;
        if entry.live == 0 {
            state.files.remove(&extent.file);
            state.open.retain(|(file, _)| *file != extent.file);
            state.directory_dirty = true;
            return fs::remove_file(&path).map_err(|e| Error::io(format!("removing {}", path.display()), e));
        }
        let device = self.open_file(state, extent.file)?;
        rustix::fs::fallocate(
            device.file(),
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            extent.offset,
            extent.len,
        )
        .map_err(|e| {
            Error::io(
                format!("punching {} bytes at {} out of {}", extent.len, extent.offset, path.display()),
                e.into(),
            )
        })
    }

    fn file_system_free(&self) -> u64 {
        rustix::fs::statvfs(&self.member).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

impl Member for ExtentDirectory {
    fn index(&self) -> u16 {
        self.options.index
    }

    fn kind(&self) -> MemberKind {
        MemberKind::Directory
    }

    fn path(&self) -> &Path {
        &self.member
    }

    fn capacity(&self) -> u64 {
        let used = self.lock().used;
        self.options.quota.unwrap_or_else(|| self.file_system_free() + used)
    }

    fn free_bytes(&self) -> u64 {
        let used = self.lock().used;
        let chunk = self.options.chunk_size as u64;
        let allowed = self.options.quota.map_or(u64::MAX, |quota| quota.saturating_sub(used));
        allowed.min(self.file_system_free()) / chunk * chunk
    }

    fn used_bytes(&self) -> u64 {
        self.lock().used
    }

    fn allocate(&self, len: u64, hint: &Hint) -> Result<Vec<Extent>> {
        if self.options.read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{} was opened read-only", self.member.display()),
            ));
        }
        let len = len.next_multiple_of(self.options.chunk_size as u64);
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some(quota) = self.options.quota
            && quota.saturating_sub(state.used) < len
        {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{}: {len} bytes asked for, {} of its quota are left",
                    self.member.display(),
                    quota.saturating_sub(state.used)
                ),
            ));
        }
        // The file goes on only where the draft's last extent ends it: a removed or foreign file does not.
        let own = hint.after.filter(|after| {
            state.files.get(&after.file).is_some_and(|entry| entry.end == after.offset + after.len)
        });
        let file = match own {
            Some(after) => after.file,
            None => self.create(state)?,
        };
        let device = self.open_file(state, file)?;
        let end = state.files.get(&file).map_or(0, |entry| entry.end);
        let path = self.file_path(file);
        let reserved = loop {
            match rustix::fs::fallocate(device.file(), FallocateFlags::empty(), end, len) {
                Err(Errno::INTR) => {}
                // Without fallocate the space shows only when it is written; better than no member at all.
                Err(Errno::OPNOTSUPP) => break rustix::fs::ftruncate(device.file(), end + len),
                other => break other,
            }
        };
        if let Err(errno) = reserved {
            // What it got before it failed must not stay behind as space that nobody knows.
            let cut = rustix::fs::ftruncate(device.file(), end);
            if end == 0 {
                state.files.remove(&file);
                state.open.retain(|(open, _)| *open != file);
                let _ = fs::remove_file(&path);
            } else if let Err(e) = cut {
                tracing::warn!(file = %path.display(), error = %e, "cannot cut the file back");
            }
            return Err(Error::io(format!("reserving {len} bytes in {}", path.display()), errno.into()));
        }
        if let Some(entry) = state.files.get_mut(&file) {
            entry.end = end + len;
            entry.live += len;
        }
        state.used += len;
        Ok(vec![Extent { logical: hint.logical, member: self.options.index, file, offset: end, len }])
    }

    fn free(&self, extents: &[Extent]) -> Result<()> {
        let mut state = self.lock();
        let mut first = Ok(());
        for extent in extents {
            let done = self.free_one(&mut state, extent);
            first = first.and(done);
        }
        first
    }

    fn take(&self, extents: &[Extent]) -> Result<()> {
        let mut state = self.lock();
        for extent in extents {
            let Some(end) = extent.offset.checked_add(extent.len).filter(|_| extent.file != 0) else {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("{}: {extent:?} is impossible", self.member.display()),
                ));
            };
            state.last = state.last.max(extent.file);
            state.used += extent.len;
            let entry = state.files.entry(extent.file).or_default();
            entry.end = entry.end.max(end);
            entry.live += extent.len;
        }
        Ok(())
    }

    fn taken_all(&self) -> Result<()> {
        let mut state = self.lock();
        let listing = match fs::read_dir(&self.directory) {
            Ok(listing) => listing,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && state.files.is_empty() => return Ok(()),
            Err(e) => return Err(Error::io(format!("listing {}", self.directory.display()), e)),
        };
        let mut there = HashSet::new();
        for entry in listing {
            let entry = entry.map_err(|e| Error::io(format!("listing {}", self.directory.display()), e))?;
            let id = entry
                .file_name()
                .to_str()
                .filter(|name| name.len() == 16)
                .and_then(|name| u64::from_str_radix(name, 16).ok());
            let Some(id) = id else { continue };
            state.last = state.last.max(id);
            if state.files.contains_key(&id) {
                there.insert(id);
            } else if !self.options.read_only {
                tracing::info!(file = %entry.path().display(), "removing extents that a crash left behind");
                fs::remove_file(entry.path())
                    .map_err(|e| Error::io(format!("removing {}", entry.path().display()), e))?;
            }
        }
        state.found_last = state.last;
        match state.files.keys().find(|id| !there.contains(id)) {
            Some(id) => Err(Error::new(
                ErrorKind::Corrupt,
                format!("{} is missing, and regions have extents in it", self.file_path(*id).display()),
            )),
            None => Ok(()),
        }
    }

    fn free_unnamed(&self, named: &[Extent]) -> Result<u64> {
        let mut state = self.lock();
        let mut freed = 0;
        let old: Vec<(u64, u64)> = state
            .files
            .iter()
            .filter(|(file, _)| **file <= state.found_last)
            .map(|(file, entry)| (*file, entry.end))
            .collect();
        for (file, end) in old {
            let path = self.file_path(file);
            let failed = |error| Error::io(format!("freeing unused space of {}", path.display()), error);
            let device = self.open_file(&mut state, file)?;
            let blocks = || device.file().metadata().map(|meta| super::directory::allocated(&meta));
            let before = blocks().map_err(failed)?;
            let mut ranges: Vec<(u64, u64)> = named
                .iter()
                .filter(|extent| extent.file == file)
                .map(|extent| (extent.offset, extent.offset + extent.len))
                .collect();
            ranges.sort_unstable();
            let mut at = 0;
            for (start, stop) in ranges.into_iter().chain([(end, end)]) {
                if start > at {
                    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(device.file(), mode, at, start - at)
                        .map_err(|errno| failed(errno.into()))?;
                }
                at = at.max(stop);
            }
            if device.len() > end {
                device.set_len(end)?;
            }
            freed += before.saturating_sub(blocks().map_err(failed)?);
        }
        Ok(freed)
    }

    fn sync(&self, extents: &[Extent]) -> Result<()> {
        let files: HashSet<u64> = extents.iter().map(|extent| extent.file).collect();
        let mut done = Ok(());
        for file in files {
            let device = {
                let mut state = self.lock();
                // Removed meanwhile: nothing of it is needed.
                if !state.files.contains_key(&file) {
                    continue;
                }
                self.open_file(&mut state, file)?
            };
            done = done.and(
                device.flush().map_err(|e| Error::from(e).context(format!("syncing {}", device.name()))),
            );
        }
        if std::mem::take(&mut self.lock().directory_dirty) {
            let synced = File::open(&self.directory).and_then(|open| open.sync_all());
            if let Err(e) = synced {
                self.lock().directory_dirty = true;
                done = done.and(Err(Error::io(format!("syncing {}", self.directory.display()), e)));
            }
        }
        done
    }

    fn open(&self, extent: &Extent) -> Result<(Arc<dyn Device>, u64)> {
        let mut state = self.lock();
        if !state.files.contains_key(&extent.file) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{} is not in use, but an extent names it", self.file_path(extent.file).display()),
            ));
        }
        let device: Arc<dyn Device> = self.open_file(&mut state, extent.file)?;
        Ok((device, extent.offset))
    }
}

#[cfg(test)]
mod tests;
