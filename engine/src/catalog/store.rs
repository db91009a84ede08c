//! Where the catalog is, and its copy.
//!
//! The copy (`catalog.bak`) is taken when no transaction runs: at a clean close, and every few minutes. When the catalog cannot be
//! read, it is moved aside and the copy takes its place; what was made since then is not in it, and content that was replaced
//! since then may be gone. Checksums tell.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use std::sync::Arc;

use nvme::Device;
use redb::StorageBackend;

use super::backend::FileStore;
use super::checked::Checked;
use super::load::Extents;
use super::zone::ZoneBackend;
use super::{Batch, Catalog, Meta};
use crate::error::{Error, ErrorKind, Result};
use crate::member::raw::RawGeometry;
use crate::namespace::Tree;

/// The catalog's file in a directory member.
pub const CATALOG_FILE: &str = "catalog.redb";
/// Its copy.
pub const COPY_FILE: &str = "catalog.bak";
const DAMAGED_FILE: &str = "catalog.damaged";
/// Space that is given up when the file system is full, so that the catalog can note what was removed.
pub const RESERVE_FILE: &str = "reserve";
const RESERVE_BYTES: u64 = 2 << 20;

/// A place for a catalog and its copy.
#[derive(Debug)]
pub(crate) enum CatalogStore {
    /// Files in this directory.
    Directory(PathBuf),
    /// The two halves of the catalog zone of a raw member.
    Zone { device: Arc<dyn Device>, halves: [(u64, u64); 2] },
}

/// A catalog that was opened and read.
#[derive(Debug)]
pub(crate) struct Loaded<L> {
    pub catalog: Catalog,
    pub meta: Meta,
    pub tree: Tree<L>,
    /// Of all regions, where they were asked for.
    pub extents: Result<Extents>,
    /// Why the copy had to be used.
    pub restored: Option<String>,
}

/// How a catalog is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    pub read_only: bool,
    /// Up to this size all pages are checked.
    pub check_bytes: u64,
    /// Read the extents of all regions as well.
    pub extents: bool,
}

fn open_file(path: &Path, read_only: bool) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only).mode(0o600);
    options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Error::with_source(ErrorKind::Corrupt, format!("the catalog {} is gone", path.display()), error)
        }
        _ => Error::io(format!("open the catalog {}", path.display()), error),
    })
}

fn load<L: Send + Sync>(
    backend: Box<dyn StorageBackend>,
    name: &str,
    pool: &[u8; 16],
    how: How,
) -> Result<Loaded<L>> {
    let context = |error: Error| error.context(name);
    let catalog = Catalog::open_checked(backend, how.read_only, how.check_bytes).map_err(context)?;
    let (meta, tree, extents) = catalog.load(how.extents).map_err(context)?;
    if meta.pool != *pool {
        return Err(Error::new(ErrorKind::WrongMember, format!("{name} is the catalog of another pool")));
    }
    Ok(Loaded { catalog, meta, tree, extents, restored: None })
}

impl CatalogStore {
    /// The place on member 0: `device` is that member where it is raw.
    pub(crate) fn new(
        member: &Path,
        device: Option<Arc<dyn Device>>,
        geometry: &RawGeometry,
    ) -> CatalogStore {
        match device {
            Some(device) => CatalogStore::Zone { device, halves: geometry.zone_halves() },
            None => CatalogStore::Directory(member.to_path_buf()),
        }
    }

    /// What messages call the catalog, or its copy.
    pub(crate) fn name(&self, copy: bool) -> String {
        match self {
            CatalogStore::Directory(directory) => {
                directory.join(if copy { COPY_FILE } else { CATALOG_FILE }).display().to_string()
            }
            CatalogStore::Zone { device, .. } if copy => {
                format!("the copy of the catalog on {}", device.name())
            }
            CatalogStore::Zone { device, .. } => format!("the catalog zone of {}", device.name()),
        }
    }

    fn backend(&self, copy: bool, read_only: bool) -> Result<Box<dyn StorageBackend>> {
        let inner: Box<dyn StorageBackend> = match self {
            CatalogStore::Directory(directory) => Box::new(FileStore(open_file(
                &directory.join(if copy { COPY_FILE } else { CATALOG_FILE }),
                read_only,
            )?)),
            CatalogStore::Zone { device, halves } => {
                let (start, len) = halves[usize::from(copy)];
                Box::new(ZoneBackend::open(device.clone(), start, len)?)
            }
        };
        Ok(Box::new(Checked::new(inner, self.name(copy))))
    }

    /// Makes a new catalog.
    pub(crate) fn create(&self, first: &Batch) -> Result<Catalog> {
        let backend: Box<dyn StorageBackend> = match self {
            CatalogStore::Directory(directory) => {
                let path = directory.join(CATALOG_FILE);
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .mode(0o600)
                    .open(&path);
                Box::new(FileStore(
                    file.map_err(|error| Error::io(format!("make {}", path.display()), error))?,
                ))
            }
            CatalogStore::Zone { device, halves } => {
                Box::new(ZoneBackend::create(device.clone(), halves[0].0, halves[0].1)?)
            }
        };
        Catalog::create(backend, first)
    }

    /// Opens the catalog; falls back to the copy where it is damaged.
    pub(crate) fn open<L: Send + Sync>(&self, pool: &[u8; 16], how: How) -> Result<Loaded<L>> {
        let read_only = how.read_only;
        let name = self.name(false);
        let attempt = || self.backend(false, read_only).and_then(|backend| load(backend, &name, pool, how));
        let error = match attempt() {
            Ok(loaded) => return Ok(loaded),
            // The copy is older: before it takes the catalog's place, a bit that flipped on its way gets a second chance.
            Err(error) if error.kind() == ErrorKind::Corrupt => match attempt() {
                Ok(loaded) => {
                    tracing::warn!(error = %error.chain(), "the catalog was right when it was read again");
                    return Ok(loaded);
                }
                Err(_) => error,
            },
            Err(error) => error,
        };
        if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::WrongMember) {
            return Err(error);
        }
        let both = |second: Error| {
            Error::new(
                ErrorKind::Corrupt,
                format!("the catalog is damaged: {}; and so is its copy: {}", error.chain(), second.chain()),
            )
        };
        // First without writing to it: it is the last one there is.
        let copy = self.name(true);
        let loaded: Loaded<L> = self
            .backend(true, true)
            .and_then(|backend| load(backend, &copy, pool, How { read_only: true, ..how }))
            .map_err(both)?;
        let restored =
            format!("{}; the copy of generation {} was used instead", error.chain(), loaded.meta.generation);
        if read_only {
            return Ok(Loaded { restored: Some(restored), ..loaded });
        }
        drop(loaded);
        self.restore()?;
        let loaded =
            self.backend(false, false).and_then(|backend| load(backend, &name, pool, how)).map_err(both)?;
        Ok(Loaded { restored: Some(restored), ..loaded })
    }

    /// Reads the whole copy. No transaction may run.
    pub(crate) fn check_copy(&self, pool: &[u8; 16]) -> Result<()> {
        let how = How { read_only: true, check_bytes: super::CHECK_BYTES, extents: false };
        let copy: Loaded<()> =
            self.backend(true, true).and_then(|backend| load(backend, &self.name(true), pool, how))?;
        copy.catalog.layout_nodes().map(drop)
    }

    /// Opens the catalog's backend again, after a write failed.
    pub(crate) fn again(&self, read_only: bool) -> Result<Box<dyn StorageBackend>> {
        if let CatalogStore::Directory(directory) = self {
            // After a failed write the page cache may hold, as clean, what the drive never got: what is there is to be seen.
            let file = open_file(&directory.join(CATALOG_FILE), true)?;
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        }
        self.backend(false, read_only)
    }

    /// Sets space aside for when there is none. What cannot be had now is tried again later.
    pub(crate) fn keep_reserve(&self) {
        let CatalogStore::Directory(directory) = self else { return };
        let path = directory.join(RESERVE_FILE);
        if path.exists() {
            return;
        }
        let made =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).and_then(
                |file| {
                    let allocated =
                        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_BYTES);
                    allocated.map_err(io::Error::from)
                },
            );
        if let Err(error) = made {
            tracing::debug!(path = %path.display(), %error, "no reserve could be set aside");
            let _ = fs::remove_file(&path);
        }
    }

    /// Gives the reserve up; whether there was one.
    pub(crate) fn spend_reserve(&self) -> bool {
        match self {
            CatalogStore::Directory(directory) => fs::remove_file(directory.join(RESERVE_FILE)).is_ok(),
            CatalogStore::Zone { .. } => false,
        }
    }

    /// Puts the copy in the catalog's place. The damaged file is kept aside.
    fn restore(&self) -> Result<()> {
        match self {
            CatalogStore::Directory(directory) => {
                let (path, trial) = (directory.join(CATALOG_FILE), directory.join("catalog.trial"));
                copy_file(&directory.join(COPY_FILE), &trial)?;
                let moved = match fs::rename(&path, directory.join(DAMAGED_FILE)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => fs::rename(&trial, &path),
                };
                moved.map_err(|error| {
                    Error::io(format!("put the copy in place of {}", path.display()), error)
                })?;
                sync_directory(directory)
            }
            CatalogStore::Zone { device, halves } => copy_zone(device, halves[1], halves[0]),
        }
    }

    /// Copies the catalog. No transaction may run.
    pub(crate) fn back_up(&self) -> Result<()> {
        match self {
            CatalogStore::Directory(directory) => {
                let next = directory.join("catalog.bak.new");
                copy_file(&directory.join(CATALOG_FILE), &next)?;
                let copy = directory.join(COPY_FILE);
                fs::rename(&next, &copy)
                    .map_err(|error| Error::io(format!("replace {}", copy.display()), error))?;
                sync_directory(directory)
            }
            CatalogStore::Zone { device, halves } => copy_zone(device, halves[0], halves[1]),
        }
    }
}

/// Copies a database from one half of a zone to the other, which is no database until that is done.
fn copy_zone(device: &Arc<dyn Device>, from: (u64, u64), to: (u64, u64)) -> Result<()> {
    let source = ZoneBackend::open(device.clone(), from.0, from.1)?;
    let target = ZoneBackend::create(device.clone(), to.0, to.1)?;
    let run = || -> io::Result<()> {
        let len = source.len()?;
        target.set_len(len)?;
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < len {
            let now = (len - at).min(buffer.len() as u64) as usize;
            source.read(at, &mut buffer[..now])?;
            target.write(at, &buffer[..now])?;
            at += now as u64;
        }
        target.sync_data()
    };
    run().map_err(|error| Error::io(format!("copy the catalog within {}", device.name()), error))
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let copy = || {
        // Closed to others from its first byte on, also where the original, of an older version, is not.
        let mut target = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to)?;
        io::copy(&mut File::open(from)?, &mut target)?;
        target.sync_all()
    };
    let copied = copy();
    copied.map_err(|error| {
        let _ = fs::remove_file(to);
        Error::io(format!("copy {} to {}", from.display(), to.display()), error)
    })
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|error| Error::io(format!("sync directory {}", path.display()), error))
}
