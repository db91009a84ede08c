//! Where a pool's control socket is.
//!
//! - Member 0 is a directory: `control.sock` in it.
//! - Otherwise, or when that directory cannot be written: `<pool id>.sock` in the runtime directory: `/run/nvtier` for root,
//!   else `$XDG_RUNTIME_DIR/nvtier`, else `/tmp/nvtier-<uid>`, which must be the user's own and closed to others (0700).
//!
//! A client looks in all of these, and in the runtime directory of the user whose process owns the pool. Of a runtime directory it wants
//! that it is no link and belongs to root or to its own user.
//!
//! An owner that was killed leaves its socket behind. Servers bind at a name of their own and rename it once they listen, so a socket under its
//! final name that refuses connections is dead; whoever serves or takes ownership next removes it, in a runtime directory those of
//! all pools. A lock on the directory (`flock(2)`) keeps that apart from another server's rename.
//! Sockets are bound and reached through `/proc/self/fd/<directory>/<name>`, because `sun_path` ends after 108 bytes
//! (`unix(7)`) and paths of pools do not.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, ErrorKind, Result};
use crate::pool::{MemberKind, PoolInfo};

/// Name of the socket in a member's directory.
pub const SOCKET_NAME: &str = "control.sock";

/// What sockets are called while they do not listen yet, after the process id.
const BINDING: &str = ".binding";

/// A socket's directory and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub directory: PathBuf,
    pub name: OsString,
    /// The directory is a user's runtime directory, not the pool's.
    runtime: bool,
}

impl Location {
    fn in_pool(directory: &Path) -> Location {
        Location { directory: directory.to_owned(), name: SOCKET_NAME.into(), runtime: false }
    }

    fn in_runtime(directory: PathBuf, pool_id: &str) -> Location {
        Location { directory, name: format!("{pool_id}.sock").into(), runtime: true }
    }

    /// For messages.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// The directory, held open, and a path to the socket through it that is short whatever the directory's is.
    fn short(&self) -> io::Result<(OwnedFd, PathBuf)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.directory, flags, Mode::empty())?;
        let path = through(&directory).join(&self.name);
        Ok((directory, path))
    }

    /// The same, with the directory locked against others that bind or sweep there, and whether it is. The lock goes with the descriptor.
    /// Who has it keeps it for a moment; one that is stopped meanwhile (`SIGSTOP`) holds nobody up for longer than `patience`.
    fn locked(&self, patience: Duration) -> io::Result<(OwnedFd, PathBuf, bool)> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.directory, flags, Mode::empty())?;
        let path = through(&directory);
        let start = Instant::now();
        loop {
            match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok((directory, path, true)),
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < patience => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                // NFS and some FUSE file systems know no flock.
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::NOTSUP | rustix::io::Errno::NOLCK) => {
                    return Ok((directory, path, false));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Connects to a process of one of the `trusted` users.
    pub fn connect(&self, trusted: &[u32]) -> io::Result<UnixStream> {
        let denied = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        let (directory, path) = self.short()?;
        if self.runtime {
            if fs::symlink_metadata(&self.directory)?.is_symlink() {
                return denied(format!("{} is a link, not a runtime directory", self.directory.display()));
            }
            let user = File::from(directory.try_clone()?).metadata()?.uid();
            if !trusted.contains(&user) {
                let directory = self.directory.display();
                return denied(format!("{directory} belongs to user {user}, who is not to be trusted here"));
            }
        }
        let stream = UnixStream::connect(path)?;
        // Who called listen(2) there. What he says about the pool, and the files that he sends, are taken for true.
        let user = socket_peercred(&stream)?.uid.as_raw();
        if !trusted.contains(&user) {
            return denied(format!("a process of user {user} listens there, who is not to be trusted here"));
        }
        Ok(stream)
    }

    /// Listens; what a dead owner left at the name is replaced. The caller owns the pool.
    pub fn bind(&self) -> Result<UnixListener> {
        let doing = || format!("listen on the control socket {}", self.path().display());
        let (_directory, directory, locked) =
            self.locked(Duration::from_secs(1)).map_err(|e| Error::io(doing(), e))?;
        let path = directory.join(&self.name);
        // Read-only owners may be several: the first one serves.
        if path.symlink_metadata().is_ok() && !is_dead(&path) {
            return Err(Error::new(ErrorKind::Busy, format!("{}: another process does", doing())));
        }
        let mut binding = OsString::from(format!("{}-", std::process::id()));
        binding.push(&self.name);
        binding.push(BINDING);
        let binding = directory.join(binding);
        match fs::remove_file(&binding) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io(doing(), error)),
            _ => {}
        }
        let listener = UnixListener::bind(&binding).map_err(|e| Error::io(doing(), e))?;
        // Credentials decide; the mode keeps strangers from even connecting.
        let listening = fs::set_permissions(&binding, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&binding, &path));
        if let Err(error) = listening {
            let _ = fs::remove_file(&binding);
            return Err(Error::io(doing(), error));
        }
        if locked {
            self.sweep_in(&directory);
        }
        Ok(listener)
    }

    /// Removes what killed owners left: the pool's own socket, in a runtime directory those of all pools.
    pub fn sweep(&self) {
        // The next one does it otherwise.
        if let Ok((_directory, path, true)) = self.locked(Duration::ZERO) {
            self.sweep_in(&path);
        }
    }

    /// As [`sweep`](Self::sweep); `directory` is locked.
    fn sweep_in(&self, directory: &Path) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let bytes = name.as_encoded_bytes();
            let ours = if self.runtime {
                bytes.ends_with(b".sock") || bytes.ends_with(BINDING.as_bytes())
            } else {
                name == self.name || bytes.ends_with(BINDING.as_bytes())
            };
            if !ours || !entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                continue;
            }
            let path = directory.join(&name);
            // Under the lock nobody else is binding: what does not listen now never will.
            if is_dead(&path) && fs::remove_file(&path).is_ok() {
                tracing::debug!(
                    "removed {}, which a killed process left",
                    self.directory.join(&name).display()
                );
            }
        }
    }

    pub fn remove(&self) {
        if let Ok((_directory, path)) = self.short() {
            let _ = fs::remove_file(path);
        }
    }
}

/// A path to an open directory that is short whatever its own is.
fn through(directory: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string())
}

/// Whether nobody listens on the socket any more. Waits for nobody: a full queue is a sign of life.
fn is_dead(path: &Path) -> bool {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connected = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .and_then(|socket| rustix::net::connect(&socket, &SocketAddrUnix::new(path)?));
    connected == Err(rustix::io::Errno::CONNREFUSED)
}

/// Removes sockets that killed owners of this pool left. The caller owns the pool, and serves nobody.
pub(crate) fn sweep(info: &PoolInfo) {
    for member in info.members.iter().filter(|member| member.kind == MemberKind::Directory).take(1) {
        Location::in_pool(&member.path).sweep();
    }
    for directory in runtime_directories(rustix::process::geteuid().as_raw()) {
        if directory.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            Location::in_runtime(directory, &info.id).sweep();
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

/// The users whose process may answer for the pool at `path`: root and this one; to root also the one whom the pool belongs to, because
/// he can change every byte of it anyway.
pub(super) fn trusted(path: &Path) -> Vec<u32> {
    let me = rustix::process::geteuid().as_raw();
    let mut users = vec![0, me];
    if me == 0 {
        users.extend(fs::metadata(path).map(|found| found.uid()));
    }
    users
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

    fn me() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn a_path_longer_than_sun_path() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("d".repeat(200)).join("e".repeat(200));
        fs::create_dir_all(&directory).unwrap();
        let location = Location::in_pool(&directory);
        let listener = location.bind().unwrap();
        assert_eq!(fs::metadata(location.path()).unwrap().mode() & 0o777, 0o600);
        location.connect(&[me()]).unwrap();
        listener.accept().unwrap();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "no other name is left");
        // A second owner of a read-only pool does not take the name away.
        assert_eq!(location.bind().unwrap_err().kind(), ErrorKind::Busy);
        drop(listener);
        // A dead one's is replaced.
        let _listener = location.bind().unwrap();
        location.connect(&[me()]).unwrap();
        location.remove();
        assert!(!location.path().exists());
    }

    #[test]
    fn sockets_of_the_dead_are_swept_and_those_of_the_living_are_not() {
        let temporary = tempfile::tempdir().unwrap();
        let at = |id: &str| Location::in_runtime(temporary.path().to_owned(), id);
        let living = at("living").bind().unwrap();
        drop(at("dead").bind().unwrap());
        drop(UnixListener::bind(temporary.path().join("1-gone.sock.binding")).unwrap());
        // Killed between bind and listen, or a queue that is full: only the first is dead.
        let full = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&full, &SocketAddrUnix::new(temporary.path().join("full.sock")).unwrap()).unwrap();
        rustix::net::listen(&full, 0).unwrap();
        let _queued = at("full").connect(&[me()]).unwrap();
        fs::write(temporary.path().join("record.sock"), "no socket").unwrap();
        fs::write(temporary.path().join("mount.json"), "no socket").unwrap();
        at("another").sweep();
        let mut left: Vec<_> =
            fs::read_dir(temporary.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["full.sock", "living.sock", "mount.json", "record.sock"]);
        at("living").connect(&[me()]).unwrap();
        // Whoever has the lock and does not let go holds nobody up.
        let held = at("living").locked(Duration::ZERO).unwrap();
        at("late").bind().unwrap();
        at("late").sweep();
        assert!(at("late").path().exists());
        drop((held, living));
        let _next = at("next").bind().unwrap();
        assert!(!at("living").path().exists(), "who serves next sweeps too");
    }

    #[test]
    fn clients_take_no_runtime_directory_that_is_a_link_or_a_strangers() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("run");
        fs::create_dir(&directory).unwrap();
        let _listener = Location::in_runtime(directory.clone(), "id").bind().unwrap();
        Location::in_runtime(directory.clone(), "id").connect(&[me()]).unwrap();
        let link = temporary.path().join("link");
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        let refused = Location::in_runtime(link, "id").connect(&[me()]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(refused.to_string().contains("a link"), "{refused}");
        let refused = Location::in_runtime(directory.clone(), "id").connect(&[me() + 1]).unwrap_err();
        assert!(refused.to_string().contains(&format!("belongs to user {}", me())), "{refused}");
        let in_pool = Location::in_pool(&directory);
        let _listener = in_pool.bind().unwrap();
        let refused = in_pool.connect(&[me() + 1]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(refused.to_string().contains(&format!("of user {} listens", me())), "{refused}");
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
