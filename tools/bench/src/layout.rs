//! Files before the run: their names, that they exist and are long enough, that the page cache does not hold them.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::data;
use crate::error::{Error, ErrorKind, Result};
use crate::settings::{EngineKind, Settings};

const LAYOUT_BLOCK: usize = 1 << 20;

/// The files that worker `index` of a job uses: `filename`, or `directory/name.index.0` as in fio.
pub fn paths(settings: &Settings, index: u32) -> Vec<PathBuf> {
    let under = |name: &Path| match &settings.directory {
        Some(directory) => directory.join(name),
        None => name.to_path_buf(),
    };
    if settings.filenames.is_empty() {
        return vec![under(Path::new(&format!("{}.{index}.0", settings.name)))];
    }
    settings.filenames.iter().map(|name| under(name)).collect()
}

/// Opens a file for transfers, saying plainly when O_DIRECT is what failed.
pub fn open_file(path: &Path, write: bool, direct: bool) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(write);
    if direct {
        options.custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32);
    }
    options.open(path).map_err(|error| {
        if direct && error.kind() == std::io::ErrorKind::InvalidInput {
            return Error::new(
                ErrorKind::NotSupported,
                format!("{}: this file system does not take O_DIRECT; run with direct=0", path.display()),
            );
        }
        Error::io(format!("cannot open {}", path.display()), error)
    })
}

/// Length of a file, block device or NVMe character device.
pub fn len_of(path: &Path) -> Result<u64> {
    if nvme::passthrough::is_nvme_char(path) {
        let device = nvme::open(path, &nvme::DeviceOptions { direct: true, read_only: true })
            .map_err(|error| Error::nvme(format!("cannot open {}", path.display()), error))?;
        return Ok(device.len());
    }
    let mut file =
        File::open(path).map_err(|error| Error::io(format!("cannot open {}", path.display()), error))?;
    file.seek(SeekFrom::End(0)).map_err(|error| Error::io(format!("cannot size {}", path.display()), error))
}

/// Makes `path` at least `len` bytes long: with content where it will be read, preallocated where it will only be
/// written. Returns the bytes laid out (0: it was there already). Block devices are never laid out.
pub fn lay_out(settings: &Settings, path: &Path, len: u64) -> Result<u64> {
    let fail =
        |what: &str, error: std::io::Error| Error::io(format!("cannot {what} {}", path.display()), error);
    let present = match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_block_device() || nvme::passthrough::is_nvme_char(path) => {
            let device = len_of(path)?;
            if device < len {
                let text = format!("{} has {device} bytes, the job needs {len}", path.display());
                return Err(Error::new(ErrorKind::Usage, text));
            }
            return Ok(0);
        }
        Ok(metadata) if metadata.is_dir() => {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{} is a directory; use directory=", path.display()),
            ));
        }
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(fail("look at", error)),
    };
    if present >= len && path.exists() {
        return Ok(0);
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| fail("create", error))?;
    if settings.fallocate {
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&file, flags, 0, len) {
            Ok(()) => {}
            // Not every file system can; the length is then set below or by the writes.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(error) => return Err(fail("preallocate", error.into())),
        }
    }
    if !settings.pattern.read {
        file.set_len(len).map_err(|error| fail("extend", error))?;
        return Ok(len - present);
    }
    let mut block = vec![0; LAYOUT_BLOCK];
    if !settings.zero_buffers {
        data::fill_random(&mut block, settings.randseed ^ len);
    }
    let mut at = present / LAYOUT_BLOCK as u64 * LAYOUT_BLOCK as u64;
    file.seek(SeekFrom::Start(at)).map_err(|error| fail("seek in", error))?;
    while at < len {
        let part = (len - at).min(LAYOUT_BLOCK as u64) as usize;
        if !settings.zero_buffers {
            data::scramble(&mut block, at ^ settings.randseed);
        }
        file.write_all(&block[..part]).map_err(|error| fail("write", error))?;
        at += part as u64;
    }
    file.sync_all().map_err(|error| fail("sync", error))?;
    Ok(len - present)
}

/// Drops the file's pages from the page cache (fio's `invalidate`).
pub fn invalidate(path: &Path) -> Result<()> {
    let file =
        File::open(path).map_err(|error| Error::io(format!("cannot open {}", path.display()), error))?;
    match rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed) {
        // tmpfs and the like have no cache to drop.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
            Ok(())
        }
        Err(error) => Err(Error::io(format!("cannot drop the cache of {}", path.display()), error)),
    }
}

/// Refuses `ioengine=io_uring_cmd` on anything but a namespace, before a mistyped name becomes a file.
pub fn check_namespace(settings: &Settings, path: &Path) -> Result<()> {
    if settings.engine != EngineKind::IoUringCmd || nvme::passthrough::is_nvme_char(path) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Usage,
        format!(
            "ioengine=io_uring_cmd takes NVMe character devices (/dev/ng0n1), {} is none",
            path.display()
        ),
    ))
}

/// Refuses `ioengine=mount` on a path that is not on an nvtier mount, naming what it is on.
pub fn check_mount(settings: &Settings, path: &Path) -> Result<()> {
    if settings.engine != EngineKind::Mount {
        return Ok(());
    }
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("."));
    let real = existing
        .canonicalize()
        .map_err(|error| Error::io(format!("cannot resolve {}", path.display()), error))?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| Error::io("cannot read /proc/self/mountinfo", error))?;
    match mount_of(&mounts, &real) {
        Some((_, "fuse.nvtier")) => Ok(()),
        Some((point, kind)) => Err(Error::new(
            ErrorKind::Usage,
            format!(
                "ioengine=mount: {} lies on {kind} mounted at {point}, not on an nvtier mount; mount the pool first, or use ioengine=io_uring",
                path.display()
            ),
        )),
        None => {
            Err(Error::new(ErrorKind::Usage, format!("ioengine=mount: no mount holds {}", path.display())))
        }
    }
}

/// Mount point and type of the mount that holds `path`: the last of the longest mount points that contain it
/// (proc_pid_mountinfo(5); a later line hides an earlier one).
fn mount_of<'a>(mountinfo: &'a str, path: &Path) -> Option<(String, &'a str)> {
    let mut best: Option<(String, &str)> = None;
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (Some(point), Some(kind)) = (left.split(' ').nth(4), right.split(' ').next()) else { continue };
        let point = point.replace(r"\040", " ").replace(r"\011", "\t").replace(r"\134", r"\");
        if path.starts_with(&point) && best.as_ref().is_none_or(|(known, _)| known.len() <= point.len()) {
            best = Some((point, kind));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_and_latest_mount_holds_a_path() {
        let info = "1 0 8:1 / / rw - ext4 /dev/vda rw\n\
                    2 1 0:5 / /mnt/pool\\040one rw - fuse.nvtier nvtier rw\n\
                    3 1 0:6 / /mnt rw - tmpfs tmpfs rw\n";
        let kind = |path: &str| mount_of(info, Path::new(path)).unwrap().1;
        assert_eq!(kind("/mnt/pool one/a/b"), "fuse.nvtier");
        assert_eq!(kind("/mnt/pool"), "tmpfs");
        assert_eq!(kind("/etc"), "ext4");
    }

    #[test]
    fn files_are_laid_out_once_and_only_as_needed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let settings = Settings::default();
        assert_eq!(lay_out(&settings, &path, 3 << 20).unwrap(), 3 << 20);
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), 3 << 20);
        assert_ne!(content[..4096], content[1 << 20..(1 << 20) + 4096], "blocks must differ");
        assert_eq!(lay_out(&settings, &path, 2 << 20).unwrap(), 0);
        assert_eq!(lay_out(&settings, &path, 4 << 20).unwrap(), 1 << 20);
        assert_eq!(std::fs::read(&path).unwrap()[..3 << 20], content[..]);
    }

    #[test]
    fn mount_engine_refuses_other_file_systems() {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings { engine: EngineKind::IoUringCmd, ..Settings::default() };
        assert!(check_namespace(&settings, Path::new("/dev/null")).is_err());
        let settings = Settings { engine: EngineKind::Mount, ..Settings::default() };
        let error = check_mount(&settings, &directory.path().join("new")).unwrap_err().to_string();
        assert!(error.contains("not on an nvtier mount"), "{error}");
    }

    #[test]
    fn default_names_follow_fio() {
        let mut settings =
            Settings { name: "job".into(), directory: Some(PathBuf::from("/d")), ..Settings::default() };
        assert_eq!(paths(&settings, 2), [PathBuf::from("/d/job.2.0")]);
        settings.filenames = vec!["a".into(), "/b".into()];
        assert_eq!(paths(&settings, 0), [PathBuf::from("/d/a"), PathBuf::from("/b")]);
    }
}
