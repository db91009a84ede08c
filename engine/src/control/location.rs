//! Where a pool's control socket is.
//!
//! - Member 0 is a directory: `control.sock` in it.
//! - Otherwise, or when that directory cannot be written: `<pool id>.sock` in the runtime directory: `/run/nvtier` for root,
//!   else `$XDG_RUNTIME_DIR/nvtier`, else `/tmp/nvtier-<uid>`, which must be the user's own and closed to others (0700).
//!
//! A client looks in all of these, and in the runtime directory of the user whose process owns the pool.
//! Sockets are bound and reached through `/proc/self/fd/<directory>/<name>`, because `sun_path` ends after 108 bytes
//! (`unix(7)`) and paths of pools do not.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::error::{Error, ErrorKind, Result};
use crate::pool::{MemberKind, PoolInfo};

/// Name of the socket in a member's directory.
pub const SOCKET_NAME: &str = "control.sock";

/// A socket's directory and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub directory: PathBuf,
    pub name: OsString,
}

impl Location {
    fn in_pool(directory: &Path) -> Location {
        Location { directory: directory.to_owned(), name: SOCKET_NAME.into() }
    }

    fn in_runtime(directory: PathBuf, pool_id: &str) -> Location {
        Location { directory, name: format!("{pool_id}.sock").into() }
    }

    /// For messages.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// The directory, held open, and a path to the socket through it that is short whatever the directory's is.
    fn short(&self) -> io::Result<(OwnedFd, PathBuf)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.directory, flags, Mode::empty())?;
        let path = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(&self.name);
        Ok((directory, path))
    }

    pub fn connect(&self) -> io::Result<UnixStream> {
        let (_directory, path) = self.short()?;
        UnixStream::connect(path)
    }

    /// Listens; what a dead owner left at the name is replaced. The caller owns the pool.
    pub fn bind(&self) -> Result<UnixListener> {
        let doing = || format!("listen on the control socket {}", self.path().display());
        let (_directory, path) = self.short().map_err(|e| Error::io(doing(), e))?;
        // Read-only owners may be several: the first one serves.
        if UnixStream::connect(&path).is_ok() {
            return Err(Error::new(ErrorKind::Busy, format!("{}: another process does", doing())));
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io(doing(), error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(|e| Error::io(doing(), e))?;
        // Credentials decide; the mode keeps strangers from even connecting.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(|e| Error::io(doing(), e))?;
        Ok(listener)
    }

    pub fn remove(&self) {
        if let Ok((_directory, path)) = self.short() {
            let _ = fs::remove_file(path);
        }
    }
}

/// Where the owner listens: the first of these that works.
pub(super) fn to_listen(info: &PoolInfo) -> Result<Vec<Location>> {
    let mut found = Vec::new();
    if let Some(member) = info.members.first().filter(|m| m.kind == MemberKind::Directory) {
        found.push(Location::in_pool(&member.path));
    }
    match own_runtime_directory() {
        Ok(directory) => found.push(Location::in_runtime(directory, &info.id)),
        Err(error) if found.is_empty() => return Err(error),
        Err(_) => {}
    }
    Ok(found)
}

/// Where a client looks for the owner of the pool at `path`.
pub(super) fn to_connect(path: &Path, info: Option<&PoolInfo>) -> Vec<Location> {
    let mut found = vec![Location::in_pool(path)];
    let Some(info) = info else { return found };
    for member in info.members.iter().filter(|m| m.kind == MemberKind::Directory) {
        found.push(Location::in_pool(&member.path));
    }
    let me = rustix::process::geteuid().as_raw();
    let mut users = vec![me];
    // Another user's runtime directory is closed to us: only a known owner's is worth a look, for the message that it refuses.
    users.extend(info.owner_pid.and_then(user_of));
    users.dedup();
    for user in users {
        for directory in runtime_directories(user) {
            found.push(Location::in_runtime(directory, &info.id));
        }
    }
    found.dedup();
    found
}

fn user_of(pid: u32) -> Option<u32> {
    fs::metadata(format!("/proc/{pid}")).ok().map(|m| m.uid())
}

fn runtime_directories(user: u32) -> Vec<PathBuf> {
    if user == 0 {
        return vec!["/run/nvtier".into()];
    }
    let mut found = Vec::new();
    let mine = user == rustix::process::geteuid().as_raw();
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| mine && Path::new(dir).is_absolute()) {
        Some(dir) => found.push(Path::new(&dir).join("nvtier")),
        None => found.push(format!("/run/user/{user}/nvtier").into()),
    }
    found.push(format!("/tmp/nvtier-{user}").into());
    found
}

/// This user's runtime directory, made when it is missing.
fn own_runtime_directory() -> Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let mut last = None;
    for directory in runtime_directories(user) {
        match make_private(&directory, user) {
            Ok(()) => return Ok(directory),
            Err(error) => last = Some(Error::io(format!("runtime directory {}", directory.display()), error)),
        }
    }
    Err(last
        .unwrap_or_else(|| Error::new(ErrorKind::NotFound, "no runtime directory for the control socket")))
}

/// Makes a directory that is this user's alone, or checks that it is: `/tmp` belongs to everybody.
fn make_private(directory: &Path, user: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let metadata = File::from(rustix::fs::open(directory, flags, Mode::empty())?).metadata()?;
    if metadata.uid() != user || metadata.mode() & 0o077 != 0 {
        let why = format!(
            "belongs to user {} with mode {:o}, should be {user}'s with 700",
            metadata.uid(),
            metadata.mode() & 0o7777
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_longer_than_sun_path() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("d".repeat(200)).join("e".repeat(200));
        fs::create_dir_all(&directory).unwrap();
        let location = Location::in_pool(&directory);
        let listener = location.bind().unwrap();
        assert_eq!(fs::metadata(location.path()).unwrap().mode() & 0o777, 0o600);
        location.connect().unwrap();
        listener.accept().unwrap();
        // A second owner of a read-only pool does not take the name away.
        assert_eq!(location.bind().unwrap_err().kind(), ErrorKind::Busy);
        drop(listener);
        // A dead one's is replaced.
        let _listener = location.bind().unwrap();
        location.connect().unwrap();
        location.remove();
        assert!(!location.path().exists());
    }

    #[test]
    fn runtime_directories_must_be_private() {
        let temporary = tempfile::tempdir().unwrap();
        let me = rustix::process::geteuid().as_raw();
        let directory = temporary.path().join("run");
        make_private(&directory, me).unwrap();
        make_private(&directory, me).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(make_private(&directory, me).unwrap_err().to_string().contains("mode 755"));
        let link = temporary.path().join("link");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        assert!(make_private(&link, me).is_err());
    }
}
