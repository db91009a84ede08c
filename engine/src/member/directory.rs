//! The only member of a pool that is one directory: every region is one file in it, byte for byte.
//!
//! ```text
//! POOL/superblock            two copies, see format.rs
//!      owner                 lock file, holds the owner's process id
//!      catalog.redb          the catalog; catalog.bak: its copy
//!      regions/3f/0000000000003f07      content of a region: its file number, in the directory of the number's second byte
//!      lost/                 files that no catalog knows, kept when the catalog itself had to be restored
//! ```
//!
//! File numbers are never used twice. The catalog reserves them in blocks, so that after a crash every file below the reserve that
//! the catalog does not name is known to be an orphan, even while new files are made.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use rustix::fs::{statvfs, syncfs};

use crate::error::{Error, ErrorKind, Result};

/// Directory of the regions' files.
pub const REGIONS: &str = "regions";
/// Directory of what was found without an owner after the catalog was restored from its copy.
pub const LOST: &str = "lost";
/// From this many files on, one `syncfs(2)` is cheaper than an `fdatasync(2)` each: every one of those is a journal commit.
const SYNC_EACH: usize = 8;

/// Whether the file system shares blocks between files.
const REFLINK_UNKNOWN: u8 = 0;
const REFLINK_NO: u8 = 1;
const REFLINK_YES: u8 = 2;

/// The files of a directory pool.
#[derive(Debug)]
pub struct FileDirectory {
    path: PathBuf,
    /// Bytes that files may occupy; `None`: what the file system has.
    quota: Option<u64>,
    /// Bytes that files occupy, drafts with what they may come to occupy.
    used: AtomicU64,
    next_file: AtomicU64,
    reflink: AtomicU8,
    read_only: bool,
}

/// Makes directories of a pool, closed to everybody else whatever the umask says: what is in them may be worth as much as a file's bytes.
pub fn private_directories(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Space and inodes of the file system under a directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// File system id: two members on one file system share its space.
    pub id: u64,
}

/// Files, and the directories that name them, open to be made durable.
#[derive(Debug, Default)]
pub(crate) struct ToSync {
    /// All of it at once.
    file_system: Option<(PathBuf, File)>,
    files: Vec<(PathBuf, File)>,
    folders: Vec<(PathBuf, File)>,
}

/// What `statvfs(3)` says.
pub fn space(path: &Path) -> Result<Space> {
    let stat = statvfs(path)
        .map_err(|error| Error::io(format!("ask for the free space of {}", path.display()), error.into()))?;
    Ok(Space { free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize), id: stat.f_fsid })
}

impl FileDirectory {
    /// Opens the directory; `next_file` comes from the catalog.
    pub fn open(path: &Path, quota: Option<u64>, next_file: u64, read_only: bool) -> Result<FileDirectory> {
        let regions = path.join(REGIONS);
        if !read_only {
            private_directories(&regions)
                .map_err(|error| Error::io(format!("make {}", regions.display()), error))?;
        }
        Ok(FileDirectory {
            path: path.to_path_buf(),
            quota,
            used: AtomicU64::new(0),
            next_file: AtomicU64::new(next_file.max(1)),
            reflink: AtomicU8::new(REFLINK_UNKNOWN),
            read_only,
        })
    }

    /// The member's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The quota, when there is one.
    pub fn quota(&self) -> Option<u64> {
        self.quota
    }

    /// Number that the next new file gets.
    pub fn next_file(&self) -> u64 {
        self.next_file.load(Relaxed)
    }

    fn folder_of(&self, file: u64) -> PathBuf {
        self.path.join(REGIONS).join(format!("{:02x}", (file >> 8) & 0xff))
    }

    /// Where a file is.
    pub fn file_path(&self, file: u64) -> PathBuf {
        self.folder_of(file).join(format!("{file:016x}"))
    }

    /// Makes an empty file.
    pub fn create_file(&self) -> Result<(u64, File)> {
        if self.read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("pool {} was opened read-only", self.path.display()),
            ));
        }
        loop {
            let number = self.next_file.fetch_add(1, Relaxed);
            let path = self.file_path(number);
            let open = || OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
            let opened = match open() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    private_directories(&self.folder_of(number)).and_then(|()| open())
                }
                opened => opened,
            };
            match opened {
                Ok(file) => return Ok((number, file)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(Error::io(format!("make file {}", path.display()), error)),
            }
        }
    }

    /// Opens a region's file.
    pub fn open_file(&self, number: u64, write: bool) -> Result<File> {
        let path = self.file_path(number);
        let mut options = OpenOptions::new();
        options.read(true).write(write && !self.read_only).custom_flags(libc_flags::NOATIME);
        let opened = match options.open(&path) {
            // O_NOATIME is the file owner's privilege.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                options.custom_flags(0).open(&path)
            }
            opened => opened,
        };
        opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::with_source(
                ErrorKind::Corrupt,
                format!("file {} of the region is gone from member {}", path.display(), self.path.display()),
                error,
            ),
            _ => Error::io(format!("open {}", path.display()), error),
        })
    }

    /// Removes a file and gives back what it was charged.
    pub fn remove_file(&self, number: u64, charged: u64) -> Result<()> {
        let path = self.file_path(number);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(format!("remove {}", path.display()), error)),
        }
        self.release(charged);
        Ok(())
    }

    /// Counts `bytes` as used; `NoSpace` when the quota has no room for them.
    pub fn charge(&self, bytes: u64) -> Result<()> {
        let Some(quota) = self.quota else {
            self.used.fetch_add(bytes, Relaxed);
            return Ok(());
        };
        let taken = self
            .used
            .fetch_update(Relaxed, Relaxed, |used| used.checked_add(bytes).filter(|used| *used <= quota));
        taken.map(drop).map_err(|used| {
            Error::new(
                ErrorKind::NoSpace,
                format!(
                    "pool {} is full: {used} of {quota} bytes are in use, {bytes} more are needed (its size was set when it was formatted)",
                    self.path.display()
                ),
            )
        })
    }

    /// Counts `bytes` as used even beyond the quota: they are there already.
    pub fn charge_fact(&self, bytes: u64) {
        self.used.fetch_add(bytes, Relaxed);
    }

    /// Counts `bytes` as free again.
    pub fn release(&self, bytes: u64) {
        let _ = self.used.fetch_update(Relaxed, Relaxed, |used| Some(used.saturating_sub(bytes)));
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Bytes that can still be written: what quota and file system both have.
    pub fn free_bytes(&self) -> Result<u64> {
        let free = space(&self.path)?.free_bytes;
        Ok(match self.quota {
            Some(quota) => free.min(quota.saturating_sub(self.used_bytes())),
            None => free,
        })
    }

    /// Shares the first `len` bytes of `from` with the empty file `to`. `false`: this file system cannot; nothing was done.
    pub fn reflink(&self, from: &File, to: &File) -> Result<bool> {
        if self.reflink.load(Relaxed) == REFLINK_NO {
            return Ok(false);
        }
        use rustix::io::Errno;
        match rustix::fs::ioctl_ficlone(to, from) {
            Ok(()) => {
                self.reflink.store(REFLINK_YES, Relaxed);
                Ok(true)
            }
            Err(Errno::NOTSUP | Errno::NOTTY | Errno::INVAL | Errno::NOSYS | Errno::XDEV | Errno::TXTBSY) => {
                let _ = self.reflink.compare_exchange(REFLINK_UNKNOWN, REFLINK_NO, Relaxed, Relaxed);
                Ok(false)
            }
            Err(error) => {
                Err(Error::io(format!("share blocks of a file of {}", self.path.display()), error.into()))
            }
        }
    }

    /// Whether the file system is known to share blocks between files.
    pub fn has_reflinks(&self) -> bool {
        self.reflink.load(Relaxed) == REFLINK_YES
    }

    /// Opens what [`sync_open`](Self::sync_open) is to make durable: an error here says nothing of the data.
    pub(crate) fn open_to_sync(&self, files: &[u64]) -> Result<ToSync> {
        let open = |path: PathBuf| match File::open(&path) {
            Ok(file) => Ok(Some((path, file))),
            // A file that went meanwhile has no content to lose.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("open {} to sync it", path.display()), error)),
        };
        let mut found = ToSync::default();
        if files.is_empty() {
            return Ok(found);
        }
        if files.len() > SYNC_EACH {
            let all = File::open(&self.path)
                .map_err(|error| Error::io(format!("open {}", self.path.display()), error))?;
            found.file_system = Some((self.path.clone(), all));
            return Ok(found);
        }
        let mut folders = HashSet::from([self.path.join(REGIONS)]);
        for number in files {
            // Not `open_file`: this is not an access of the region.
            if let Some(file) = open(self.file_path(*number))? {
                found.files.push(file);
                folders.insert(self.folder_of(*number));
            }
        }
        for folder in folders {
            // One that is gone took its files along: that is no success.
            let file = File::open(&folder).map_err(|error| {
                Error::io(format!("open directory {} to sync it", folder.display()), error)
            })?;
            found.folders.push((folder, file));
        }
        Ok(found)
    }

    /// Makes the content of files, and their names, durable.
    pub(crate) fn sync_open(&self, open: ToSync) -> Result<()> {
        if let Some((path, all)) = open.file_system {
            return syncfs(&all).map_err(|error| {
                Error::io(format!("sync the file system of {}", path.display()), error.into())
            });
        }
        for (path, file) in open.files {
            file.sync_data().map_err(|error| Error::io(format!("sync {}", path.display()), error))?;
        }
        for (path, folder) in open.folders {
            folder
                .sync_all()
                .map_err(|error| Error::io(format!("sync directory {}", path.display()), error))?;
        }
        Ok(())
    }

    /// Removes the files below `limit` that nobody names: what a crash left behind. With `keep` they move to `lost` instead.
    /// Returns how many there were.
    pub fn remove_orphans(
        &self,
        named: &HashSet<u64>,
        limit: u64,
        keep: bool,
        stop: &dyn Fn() -> bool,
    ) -> Result<u64> {
        let regions = self.path.join(REGIONS);
        let mut count = 0;
        let read = |path: &Path| {
            fs::read_dir(path).map_err(|error| Error::io(format!("list {}", path.display()), error))
        };
        for folder in read(&regions)? {
            let Ok(folder) = folder else { continue };
            if !folder.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            for entry in read(&folder.path())? {
                if stop() {
                    return Ok(count);
                }
                let Ok(entry) = entry else { continue };
                let name = entry.file_name();
                let Some(number) = name
                    .to_str()
                    .filter(|name| name.len() == 16)
                    .and_then(|name| u64::from_str_radix(name, 16).ok())
                else {
                    continue;
                };
                if number >= limit || named.contains(&number) || self.file_path(number) != entry.path() {
                    continue;
                }
                count += 1;
                let gone = if keep {
                    let lost = self.path.join(LOST);
                    private_directories(&lost).and_then(|()| fs::rename(entry.path(), lost.join(&name)))
                } else {
                    fs::remove_file(entry.path())
                };
                if let Err(error) = gone {
                    tracing::warn!(file = %entry.path().display(), %error, "cannot remove a file that a crash left behind");
                }
            }
        }
        Ok(count)
    }
}

/// Bytes that a file occupies (`st_blocks` counts 512 bytes each on every file system).
pub fn allocated(meta: &fs::Metadata) -> u64 {
    meta.blocks() * 512
}

mod libc_flags {
    /// `open(2)`: reading does not write the inode.
    pub const NOATIME: i32 = rustix::fs::OFlags::NOATIME.bits() as i32;
}
