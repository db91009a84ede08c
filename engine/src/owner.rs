//! Who owns a pool: one process, by a lock that goes with it.
//!
//! The lock is `flock(2)` on member 0: on the file `owner` of a directory, on the device or image itself otherwise. The kernel drops it
//! when the process ends, however it ends, so there is nothing stale to clean up. The process id in the file is for messages only.
//! Read-only opens take the lock shared: several at a time, and none beside an owner.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, ErrorKind, Result};
use crate::pool::MemberKind;

/// How long udev may look at a drive.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);

/// The lock file of a directory.
pub const OWNER_FILE: &str = "owner";

/// Ownership; dropping it gives it up.
#[derive(Debug)]
pub struct Owner {
    /// Held for its lock. `None`: a read-only open of a pool that never had a lock file, on a file system that takes none; or there
    /// is no file, see [`of_devices`](Owner::of_devices).
    file: Option<File>,
    /// Who took it: a copy of this in a forked process gives nothing up.
    taker: u32,
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread is starting has a copy of the descriptor until it runs its program, and the
        // lock with it. Giving the lock up takes it from all copies.
        if let Some(file) = self.file.as_ref().filter(|_| self.taker == std::process::id()) {
            let _ = flock(file, FlockOperation::Unlock);
        }
    }
}

impl Owner {
    fn with(file: Option<File>) -> Owner {
        Owner { file, taker: std::process::id() }
    }

    /// Takes ownership; `Busy` names the process that has it.
    pub fn take(member: &Path, kind: MemberKind, read_only: bool) -> Result<Owner> {
        let what = || format!("lock pool {}", member.display());
        let path = if kind == MemberKind::Directory { member.join(OWNER_FILE) } else { member.to_path_buf() };
        let mut options = OpenOptions::new();
        options.read(true);
        if !read_only {
            options.write(true).create(kind == MemberKind::Directory).truncate(false);
        }
        if kind == MemberKind::Directory {
            // It is emptied below: a link that somebody put in its place must not lead to another file.
            options.mode(0o600).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
        }
        let mut file = match options.open(&path) {
            Ok(file) => file,
            Err(error)
                if read_only
                    && error.kind() == std::io::ErrorKind::NotFound
                    && kind == MemberKind::Directory =>
            {
                return Ok(Owner::with(None));
            }
            Err(error) => return Err(Error::io(what(), error)),
        };
        let operation = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        let deadline = Instant::now() + PROBE_DEADLINE;
        let locked = loop {
            match flock(&file, operation) {
                Err(rustix::io::Errno::WOULDBLOCK) if is_being_probed(&file) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => break other,
            }
        };
        match locked {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let by = match pid_of(&mut file, kind) {
                    Some(pid) => format!("process {pid}{}", name_of(pid)),
                    None => "another process".into(),
                };
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("pool {} is in use by {by}", member.display()),
                ));
            }
            // NFS and some FUSE file systems know no flock.
            Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::NOLCK) if read_only => {
                return Ok(Owner::with(None));
            }
            Err(error) => return Err(Error::io(what(), error.into())),
        }
        if !read_only && kind == MemberKind::Directory {
            let wrote = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            wrote.map_err(|error| Error::io(what(), error))?;
        }
        Ok(Owner::with(Some(file)))
    }

    /// For members that the caller brought as open devices: who holds those owns the pool.
    pub fn of_devices() -> Owner {
        Owner::with(None)
    }

    /// The process that owns a pool now, if one does.
    pub fn pid(member: &Path, kind: MemberKind) -> Option<u32> {
        let path = if kind == MemberKind::Directory { member.join(OWNER_FILE) } else { member.to_path_buf() };
        let mut file = File::open(path).ok()?;
        holder(&file)?;
        pid_of(&mut file, kind)
    }
}

/// Who holds the lock: the kernel's list knows, the file's content is for where that is hidden (other PID namespaces).
fn pid_of(file: &mut File, kind: MemberKind) -> Option<u32> {
    if let Some(pid) = holder(file).filter(|pid| *pid != 0) {
        return Some(pid);
    }
    if kind != MemberKind::Directory {
        return None;
    }
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Processes with a lock on it, by `/proc/locks` (proc(5)): `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`. 0: of whom is hidden.
fn holders(file: &File) -> Vec<u32> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    let (device, inode) = (meta.dev(), meta.ino());
    let id = format!("{:02x}:{:02x}:{inode}", rustix::fs::major(device), rustix::fs::minor(device));
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let lines = locks.lines().map(str::split_whitespace).map(Iterator::collect::<Vec<_>>);
    lines
        .filter(|fields| fields.get(1) == Some(&"FLOCK") && fields.get(5).is_some_and(|at| *at == id))
        .map(|fields| fields.get(4).and_then(|pid| pid.parse().ok()).unwrap_or(0))
        .collect()
}

/// Who owns the pool. udev does not: it only looks what is there.
fn holder(file: &File) -> Option<u32> {
    holders(file).into_iter().find(|pid| !is_udev(*pid))
}

/// Whether nobody but udev has a lock on it. Whenever a drive that was open for writing is closed, udev looks what it holds now, and has a
/// shared lock on it meanwhile ("Locking Block Device Access" of systemd): a moment later it is free.
fn is_being_probed(file: &File) -> bool {
    let holders = holders(file);
    !holders.is_empty() && holders.into_iter().all(is_udev)
}

fn is_udev(pid: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    ["(udev-worker)", "systemd-udevd", "udevd"].contains(&name.trim())
}

fn name_of(pid: u32) -> String {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!(" ({})", name.trim()),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn udev_is_no_owner_and_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        std::fs::write(&image, "").unwrap();
        // What has its name, and a lock until its input ends. It says something once it has the lock. A link: a copy may still be open for
        // writing in a process that another test is just starting, and cannot be run then.
        let udev = folder.path().join("(udev-worker)");
        std::os::unix::fs::symlink("/usr/bin/flock", &udev).unwrap();
        let mut command = Command::new(&udev);
        command.arg("--shared").arg(&image).args(["sh", "-c", "echo locked; cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = [0; 7];
        child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        let file = File::open(&image).unwrap();
        assert!(is_being_probed(&file));
        assert_eq!(Owner::pid(&image, MemberKind::Image), None);
        let taken = std::thread::scope(|scope| {
            let taking = scope.spawn(|| Owner::take(&image, MemberKind::Image, false));
            drop(child.stdin.take());
            assert!(child.wait().unwrap().success());
            taking.join().unwrap()
        });
        let owner = taken.unwrap();
        assert!(!is_being_probed(&file), "we are not udev");
        assert_eq!(Owner::pid(&image, MemberKind::Image), Some(std::process::id()));
        drop(owner);
    }

    #[test]
    fn a_copy_of_the_descriptor_does_not_keep_the_pool() {
        let dir = tempfile::tempdir().unwrap();
        let owner = Owner::take(dir.path(), MemberKind::Directory, false).unwrap();
        // As a child has it between fork and exec.
        let copy = owner.file.as_ref().unwrap().try_clone().unwrap();
        let busy = Owner::take(dir.path(), MemberKind::Directory, false).unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy);
        drop(owner);
        Owner::take(dir.path(), MemberKind::Directory, false).unwrap();
        drop(copy);
    }

    #[test]
    fn one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Owner::pid(dir.path(), MemberKind::Directory), None);
        let owner = Owner::take(dir.path(), MemberKind::Directory, false).unwrap();
        assert_eq!(Owner::pid(dir.path(), MemberKind::Directory), Some(std::process::id()));
        for read_only in [false, true] {
            let refused = Owner::take(dir.path(), MemberKind::Directory, read_only).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Busy);
            assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
        }
        drop(owner);
        assert_eq!(Owner::pid(dir.path(), MemberKind::Directory), None);
        let one = Owner::take(dir.path(), MemberKind::Directory, true).unwrap();
        let other = Owner::take(dir.path(), MemberKind::Directory, true).unwrap();
        assert_eq!(
            Owner::take(dir.path(), MemberKind::Directory, false).unwrap_err().kind(),
            ErrorKind::Busy
        );
        drop((one, other));
        Owner::take(dir.path(), MemberKind::Directory, false).unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_lock_file_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join(OWNER_FILE)).unwrap();
        for read_only in [false, true] {
            Owner::take(dir.path(), MemberKind::Directory, read_only).unwrap_err();
        }
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
        std::fs::remove_file(dir.path().join(OWNER_FILE)).unwrap();
        let _owner = Owner::take(dir.path(), MemberKind::Directory, false).unwrap();
        let mode = std::fs::metadata(dir.path().join(OWNER_FILE)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn an_image_is_locked_itself() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let _owner = Owner::take(file.path(), MemberKind::Image, false).unwrap();
        let refused = Owner::take(file.path(), MemberKind::Image, false).unwrap_err();
        assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 0, "nothing was written into it");
    }
}
