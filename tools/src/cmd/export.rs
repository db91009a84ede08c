//! `nvtier export NAME DEST`: regions to local files, past the page cache, complete or not there.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use engine::RegionReader;
use nvme::{Buffer, Device, FileDevice};
use serde_json::json;

use crate::cli::{Export, Global};
use crate::config::Config;
use crate::failure::{Failure, Outcome, code};
use crate::progress::Progress;
use crate::store::{Entry, Store};
use crate::{ceiling, interrupt, names, output, size};

/// Bytes of one read and one write.
const BLOCK: u64 = 1 << 20;
/// Blocks under way at a time.
const THREADS: u64 = 4;

/// Exports.
pub fn run(global: &Global, config: &Config, args: &Export) -> Outcome {
    let name = names::normalize(&args.name)?;
    let store = Store::open(&config.pool(args.pool.pool.as_ref())?, true)?;
    let entry = store.entry(&name)?;
    let entries = if entry.is_directory() { store.list(&name, true)? } else { vec![entry.clone()] };
    let total = entries.iter().filter(|entry| entry.is_region()).map(|entry| entry.size).sum();
    let progress = Progress::new(global, format!("export {name}"), total, ceiling::of_path(store.path()));
    let export = Exporter { store: &store, force: args.force, progress: Mutex::new(progress) };
    if entry.is_directory() {
        export.directory(&name, &entries, &args.dest)?;
    } else if entry.is_region() {
        let dest = if args.dest.is_dir() { args.dest.join(entry.name()) } else { args.dest.clone() };
        export.region(&entry, &dest)?;
    } else {
        return Err(Failure::failed(format!(
            "`{}` is a {}: only regions are exported",
            output::printable(&name),
            entry.kind
        )));
    }
    let progress = export.progress.into_inner().unwrap_or_else(PoisonError::into_inner);
    let seconds = progress.seconds();
    progress.finish();
    let rate = total as f64 / seconds.max(1e-9);
    if global.json {
        return output::json(&json!({
            "pool": store.path(),
            "name": name,
            "dest": args.dest,
            "bytes": total,
            "seconds": seconds,
            "bytes_per_second": rate,
        }));
    }
    output::line(&format!(
        "{}: {} in {} ({})",
        args.dest.display(),
        size::human(total),
        size::duration(seconds),
        size::rate(rate)
    ))
}

struct Exporter<'a> {
    store: &'a Store,
    force: bool,
    progress: Mutex<Progress>,
}

impl Exporter<'_> {
    fn directory(&self, name: &str, entries: &[Entry], dest: &Path) -> Outcome {
        let exists = dest.read_dir().is_ok_and(|mut entries| entries.next().is_some());
        if exists && !self.force {
            let message = format!("export to {}: the directory is not empty", dest.display());
            return Err(
                Failure::new(code::FAILED, "NotEmpty", message).hint("add --force to put files into it")
            );
        }
        make_directory(dest)?;
        for entry in entries {
            interrupt::check()?;
            let below = entry.path.strip_prefix(name).unwrap_or(&entry.path).trim_start_matches('/');
            let path = dest.join(below);
            match (entry.kind, &entry.target) {
                ("directory", _) => make_directory(&path)?,
                ("region", _) => self.region(entry, &path)?,
                ("symlink", Some(target)) => self.symlink(target, &path)?,
                (kind, _) => {
                    output::note(&format!("{}: a {kind} is not exported", output::printable(&entry.path)))
                }
            }
        }
        Ok(())
    }

    fn symlink(&self, target: &str, path: &Path) -> Outcome {
        if self.force && path.is_symlink() {
            let _ = fs::remove_file(path);
        }
        std::os::unix::fs::symlink(target, path)
            .map_err(|error| Failure::io(format!("make {}", path.display()), &error))
    }

    /// Writes a temporary file beside `path` and renames it once it is durable.
    fn region(&self, entry: &Entry, path: &Path) -> Outcome {
        if !self.force && path.symlink_metadata().is_ok() {
            let message = format!("export to {}: it exists", path.display());
            return Err(Failure::new(code::FAILED, "Exists", message).hint("add --force to replace it"));
        }
        let reader = self.store.reader(&entry.path)?;
        let temporary = Temporary::new(path)?;
        let tried = || format!("write {}", path.display());
        self.copy(entry, &reader, &temporary)?;
        let file = &temporary.file;
        file.set_permissions(fs::Permissions::from_mode(entry.mode & 0o777))
            .map_err(|error| Failure::io(tried(), &error))?;
        if let Some(modified) =
            u64::try_from(entry.modified).ok().map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds))
        {
            file.set_modified(modified).map_err(|error| Failure::io(tried(), &error))?;
        }
        file.sync_all().map_err(|error| Failure::io(tried(), &error))?;
        temporary.rename(path)
    }

    /// Reads (and so verifies) blocks and writes them, several at a time.
    fn copy(&self, entry: &Entry, reader: &RegionReader, temporary: &Temporary) -> Outcome {
        let len = reader.len();
        temporary.reserve(len)?;
        let device = temporary.device()?;
        let next = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        let failed = Mutex::new(None);
        let work = || -> Outcome {
            let mut buffer = Buffer::heap(BLOCK as usize)?;
            while !stop.load(Ordering::Relaxed) {
                interrupt::check()?;
                let offset = next.fetch_add(BLOCK, Ordering::Relaxed);
                if offset >= len {
                    break;
                }
                let count = (len - offset).min(BLOCK) as usize;
                reader
                    .read_exact_at(offset, &mut buffer[..count])
                    .map_err(|error| self.store.failure("read", &entry.path, error))?;
                // The unaligned tail goes through the page cache: O_DIRECT takes whole blocks only.
                let aligned = count / device.lba_size() as usize * device.lba_size() as usize;
                device.write_at(offset, &buffer[..aligned])?;
                if aligned < count {
                    temporary.file.write_all_at(&buffer[aligned..count], offset + aligned as u64).map_err(
                        |error| Failure::io(format!("write {}", temporary.path.display()), &error),
                    )?;
                }
                self.progress.lock().unwrap_or_else(PoisonError::into_inner).add(count as u64);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            for _ in 0..len.div_ceil(BLOCK).clamp(1, THREADS) {
                scope.spawn(|| {
                    if let Err(failure) = work() {
                        stop.store(true, Ordering::Relaxed);
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
                    }
                });
            }
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure.while_doing(format!("export {}", output::printable(&entry.path)))),
            None => Ok(()),
        }
    }
}

fn make_directory(path: &Path) -> Outcome {
    match fs::create_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.map_err(|error| Failure::io(format!("make the directory {}", path.display()), &error)),
    }
}

/// A file under another name until it is complete; removed on drop.
struct Temporary {
    path: PathBuf,
    file: File,
    renamed: bool,
}

impl Temporary {
    fn new(target: &Path) -> Outcome<Self> {
        let name = target.file_name().and_then(|name| name.to_str()).unwrap_or("region");
        // Long names leave no room for a suffix.
        let name: String = name.chars().take(40).collect();
        let path = target.with_file_name(format!(".{name}.nvtier-{}", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| Failure::io(format!("make {}", path.display()), &error))?;
        Ok(Self { path, file, renamed: false })
    }

    /// A full disk is told now, not in the middle; file systems without fallocate(2) tell it in the middle.
    fn reserve(&self, len: u64) -> Outcome {
        if len == 0 {
            return Ok(());
        }
        let reserved = rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, len);
        match reserved {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => self.file.set_len(len),
            reserved => reserved.map_err(std::io::Error::from),
        }
        .map_err(|error| {
            Failure::io(format!("reserve {} for {}", size::human(len), self.path.display()), &error)
        })
    }

    fn device(&self) -> Outcome<FileDevice> {
        let tried = || format!("open {}", self.path.display());
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
            .open(&self.path);
        // Some file systems know no O_DIRECT: then the page cache has to do.
        let (file, is_direct) = match direct {
            Ok(file) => (file, true),
            Err(_) => (self.file.try_clone().map_err(|error| Failure::io(tried(), &error))?, false),
        };
        FileDevice::from_file(file, self.path.display().to_string(), is_direct)
            .map_err(|error| Failure::from(error).while_doing(tried()))
    }

    fn rename(mut self, target: &Path) -> Outcome {
        let tried = format!("rename {} to {}", self.path.display(), target.display());
        fs::rename(&self.path, target).map_err(|error| Failure::io(&tried, &error))?;
        self.renamed = true;
        let parent =
            target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(|error| Failure::io(&tried, &error))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.path);
        }
    }
}
