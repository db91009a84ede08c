//! Mounting and unmounting.

use std::fs::{self as std_fs, File};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuser::{BackingId, Config, MountOption, Session, SessionACL};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno as Os;
use rustix::mount::UnmountFlags;

use crate::adapter::{Adapter, AdapterOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::fs::{Caller, Fs, FsOptions, Passthrough};
use crate::mountinfo::find_mount;

/// How long an unmount waits for the last user of a busy mount before it detaches the mount from the tree.
const BUSY_WAIT: Duration = Duration::from_secs(5);
/// How long a detached mount may still serve open files before its connection is cut.
const DETACHED_WAIT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(20);
/// Readahead of files that are served, in bytes; FUSE starts with 128 KiB and grows only through sysfs.
pub const DEFAULT_READAHEAD_BYTES: u64 = 8 << 20;
/// Largest request: what the kernel allows by default (`fs.fuse.max_pages_limit` is 256 pages).
const MAX_REQUEST: u32 = 1 << 20;
/// More threads only take turns on the queue; each has a request buffer of its own.
const MAX_THREADS: usize = 16;
/// Below the mount of a dead daemon there may be another dead one.
const MAX_STALE_LAYERS: usize = 16;

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// An existing, empty directory.
    pub mountpoint: PathBuf,
    /// Refuse every change. The kernel refuses most before we hear of them.
    pub read_only: bool,
    /// Let other users in; permissions are checked by the kernel either way.
    pub allow_other: bool,
    /// Threads that serve requests. Default: two a core, at least 4, at most 16.
    pub threads: Option<usize>,
    /// Check the sum of every byte before it is handed out. Turns kernel passthrough off.
    pub verify_always: bool,
    /// Readahead of served files in bytes. Default: [`DEFAULT_READAHEAD_BYTES`].
    pub readahead_bytes: u64,
}

impl MountOptions {
    /// Read-write, for the calling user only, with passthrough.
    pub fn new(mountpoint: impl Into<PathBuf>) -> MountOptions {
        MountOptions {
            mountpoint: mountpoint.into(),
            read_only: false,
            allow_other: false,
            threads: None,
            verify_always: false,
            readahead_bytes: DEFAULT_READAHEAD_BYTES,
        }
    }
}

enum Event {
    /// The kernel ended the session.
    Ended(io::Result<()>),
    /// The mount is detached and its users did not leave in time.
    Abandoned,
}

/// A mounted pool. Dropping it unmounts.
pub struct Mounted {
    fs: Arc<Fs<BackingId>>,
    mountpoint: PathBuf,
    events: Receiver<Event>,
    unmounter: Unmounter,
    session: Option<JoinHandle<()>>,
    done: bool,
}

impl std::fmt::Debug for Mounted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounted")
            .field("mountpoint", &self.mountpoint)
            .field("passthrough", &self.passthrough())
            .finish_non_exhaustive()
    }
}

/// Mounts a pool. Returns once the kernel has accepted the session, so that the mount point can be used at once.
///
/// As root, or with CAP_SYS_ADMIN, the mount is made directly; an ordinary user needs `fusermount3`. A mount left behind by a daemon that died is
/// detached first. Errors: [`ErrorKind::Mountpoint`] when the directory cannot carry a mount, [`ErrorKind::NotSupported`] without
/// `/dev/fuse`, [`ErrorKind::PermissionDenied`] without the right to mount.
pub fn mount(pool: engine::Pool, options: &MountOptions) -> Result<Mounted> {
    repair_stale(&options.mountpoint)?;
    let mountpoint = check_mountpoint(&options.mountpoint)?;
    check_device()?;
    occupy_standard_descriptors()?;

    let info = pool.info();
    let fs = Arc::new(Fs::new(
        pool,
        FsOptions {
            owner: Caller {
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
            },
            read_only: options.read_only,
            mountpoint: mountpoint.display().to_string(),
        },
    ));
    let adapter = Adapter::new(
        fs.clone(),
        AdapterOptions { passthrough: wanted_passthrough(options), max_request: MAX_REQUEST },
    );
    let source = info.path.display().to_string();
    let session = Session::new(adapter, &mountpoint, &session_config(options, &source))
        .map_err(|error| mount_failed(&mountpoint, error))?;

    let (sender, events) = mpsc::channel();
    let unmounter = Unmounter {
        shared: Arc::new(Shared { mountpoint: mountpoint.clone(), state: Mutex::new(State::Mounted) }),
        events: sender.clone(),
    };
    let ended = unmounter.clone();
    let thread = thread::Builder::new().name("nvtier-session".to_owned()).spawn(move || {
        let result = session.run();
        ended.shared.set(State::Ended);
        let _ = sender.send(Event::Ended(result));
    });
    let session = thread.map_err(|error| {
        let _ = detach(&mountpoint);
        Error::new(ErrorKind::Io, "cannot start the thread of the session").with_source(error)
    })?;
    if let Err(error) = raise_readahead(&mountpoint, options.readahead_bytes) {
        // Only served files are slower without it, and only root may set it.
        tracing::info!(%error, "readahead stays at the kernel's default");
    }
    if let Passthrough::Off(reason) = fs.passthrough() {
        tracing::info!(reason, "files are served by this process, not handed to the kernel");
    }
    Ok(Mounted { fs, mountpoint, events, unmounter, session: Some(session), done: false })
}

impl Mounted {
    /// Waits until the mount is gone (by [`Unmounter::unmount`] or by anybody's `umount`), then closes the pool.
    pub fn wait(mut self) -> Result<()> {
        self.finish()
    }

    /// A handle that ends the mount, for signal handlers' threads.
    pub fn unmounter(&self) -> Unmounter {
        self.unmounter.clone()
    }

    /// The directory that carries the mount, resolved.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether files are handed to the kernel, and why not if not.
    pub fn passthrough(&self) -> Passthrough {
        self.fs.passthrough()
    }

    /// The numbers of `.nvtier/stats.json`.
    pub fn stats(&self) -> serde_json::Value {
        self.fs.stats()
    }

    /// What makes the text of `.nvtier/metrics`; it does not keep the pool open, and makes nothing once the mount is gone.
    pub fn metrics(&self) -> impl Fn() -> Option<String> + Send + Sync + 'static + use<> {
        let fs = Arc::downgrade(&self.fs);
        move || fs.upgrade().map(|fs| fs.metrics())
    }

    fn finish(&mut self) -> Result<()> {
        self.done = true;
        let result = match self.events.recv() {
            Ok(Event::Ended(result)) => {
                if let Some(session) = self.session.take() {
                    let _ = session.join();
                }
                result.map_err(|error| {
                    Error::new(ErrorKind::Io, format!("the session of {} failed", self.mountpoint.display()))
                        .with_source(error)
                })
            }
            // The session's threads stay blocked in the kernel until the process ends; they find the file system shut.
            Ok(Event::Abandoned) | Err(_) => Err(Error::new(
                ErrorKind::Busy,
                format!("files of {} were still in use; they were cut off", self.mountpoint.display()),
            )),
        };
        self.fs.shut_down();
        let closed = self.fs.pool().clone().close().map_err(Error::from);
        result.and(closed)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let result = self.unmounter.unmount().and_then(|()| self.finish());
        if let Err(error) = result {
            tracing::error!(%error, "unmounting {}", self.mountpoint.display());
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Mounted,
    Detached,
    Ended,
}

#[derive(Debug)]
struct Shared {
    mountpoint: PathBuf,
    state: Mutex<State>,
}

impl Shared {
    fn get(&self) -> State {
        *self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = state;
    }
}

/// Ends a mount from any thread.
#[derive(Debug, Clone)]
pub struct Unmounter {
    shared: Arc<Shared>,
    events: Sender<Event>,
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Event::Ended(_) => "Ended",
            Event::Abandoned => "Abandoned",
        })
    }
}

impl Unmounter {
    /// Unmounts. A busy mount gets 5 s for its users to leave; then it is detached from the tree, and after another 5 s its
    /// connection is cut: files still open then answer `ECONNABORTED` or `ENOTCONN`, passed-through ones go on working.
    pub fn unmount(&self) -> Result<()> {
        let path = &self.shared.mountpoint;
        let deadline = Instant::now() + BUSY_WAIT;
        loop {
            if self.shared.get() == State::Ended {
                return Ok(());
            }
            match unmount_once(path, UnmountFlags::empty()) {
                Ok(()) => return self.expect_end(),
                Err(Os::BUSY) if Instant::now() < deadline => thread::sleep(RETRY),
                Err(Os::BUSY) => break,
                // Somebody else unmounted it.
                Err(Os::INVAL | Os::NOENT) => return self.expect_end(),
                Err(error) => return Err(unmount_failed(path, error)),
            }
        }
        tracing::warn!("{} is still in use after {BUSY_WAIT:?}; detaching it", path.display());
        let connection = connection_of(path);
        detach(path)?;
        self.shared.set(State::Detached);
        let deadline = Instant::now() + DETACHED_WAIT;
        while Instant::now() < deadline {
            if self.shared.get() == State::Ended {
                return Ok(());
            }
            thread::sleep(RETRY);
        }
        tracing::warn!("files of {} are still open; cutting the connection", path.display());
        if let Some(abort) =
            connection.map(|id| PathBuf::from(format!("/sys/fs/fuse/connections/{id}/abort")))
            && std_fs::write(abort, "1").is_ok()
        {
            return self.expect_end();
        }
        let _ = self.events.send(Event::Abandoned);
        Ok(())
    }

    /// The kernel ends the session right after the unmount; a session that does not end (the mount was bound elsewhere too) is
    /// given up.
    fn expect_end(&self) -> Result<()> {
        let deadline = Instant::now() + BUSY_WAIT;
        while self.shared.get() != State::Ended {
            if Instant::now() > deadline {
                let _ = self.events.send(Event::Abandoned);
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Unmounts whatever pool is mounted at `mountpoint`, from any process. [`ErrorKind::Busy`] while something uses it.
pub fn unmount(mountpoint: &Path) -> Result<()> {
    let path = resolve(mountpoint)?;
    match find_mount(&path) {
        Ok(Some(entry)) if entry.is_nvtier() => {}
        Ok(Some(entry)) => {
            return Err(Error::new(
                ErrorKind::Mountpoint,
                format!("{} carries {} ({}), not a pool", path.display(), entry.source, entry.fs_type),
            ));
        }
        Ok(None) => {
            return Err(Error::new(
                ErrorKind::Mountpoint,
                format!("nothing is mounted at {}", path.display()),
            ));
        }
        Err(error) => {
            return Err(Error::new(ErrorKind::Io, "cannot read the table of mounts").with_source(error));
        }
    }
    unmount_once(&path, UnmountFlags::empty()).map_err(|error| unmount_failed(&path, error))
}

/// Detaches the mount of a pool whose daemon died without unmounting. True when there was one.
pub fn repair_stale(mountpoint: &Path) -> Result<bool> {
    let path = resolve(mountpoint)?;
    let mut repaired = false;
    for _ in 0..MAX_STALE_LAYERS {
        // A plain stat may be answered from the kernel's cache for as long as VALIDITY after the daemon's death.
        match rustix::fs::statx(CWD, &path, AtFlags::STATX_FORCE_SYNC, StatxFlags::TYPE) {
            Err(Os::NOTCONN | Os::CONNABORTED) => {}
            _ => return Ok(repaired),
        }
        match find_mount(&path) {
            Ok(Some(entry)) if entry.is_nvtier() => {
                tracing::warn!("{} was left behind by a daemon that died; detaching it", path.display());
            }
            _ => {
                return Err(Error::new(
                    ErrorKind::Mountpoint,
                    format!(
                        "{} carries the mount of another file system whose daemon died; detach it with `umount -l {}`",
                        path.display(),
                        path.display()
                    ),
                ));
            }
        }
        detach(&path)?;
        repaired = true;
    }
    Ok(repaired)
}

/// Absolute path without touching the mount itself: only the directory above is resolved.
fn resolve(mountpoint: &Path) -> Result<PathBuf> {
    let failed = |error: io::Error| {
        let kind = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::Mountpoint,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            _ => ErrorKind::Io,
        };
        Error::new(kind, format!("cannot resolve the mount point {}", mountpoint.display()))
            .with_source(error)
    };
    // A symbolic link as mount point is followed; a dead mount cannot be one.
    if let Ok(path) = mountpoint.canonicalize() {
        return Ok(path);
    }
    let absolute = std::path::absolute(mountpoint).map_err(failed)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize().map_err(failed)?.join(name)),
        _ => Ok(absolute),
    }
}

fn check_mountpoint(mountpoint: &Path) -> Result<PathBuf> {
    let refuse = |why: String| Err(Error::new(ErrorKind::Mountpoint, why));
    let path = resolve(mountpoint)?;
    let shown = path.display();
    if let Ok(Some(entry)) = find_mount(&path) {
        if entry.is_nvtier() {
            return refuse(format!(
                "{shown} already carries the pool {}; unmount it first (`nvtier umount {shown}`)",
                entry.source
            ));
        }
        return refuse(format!(
            "{shown} already carries a mount ({} of type {})",
            entry.source, entry.fs_type
        ));
    }
    match std_fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return refuse(format!("the mount point {shown} is not a directory")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return refuse(format!("the mount point {shown} does not exist; create it (`mkdir -p {shown}`)"));
        }
        Err(error) => {
            return Err(Error::new(ErrorKind::Mountpoint, format!("cannot look at the mount point {shown}"))
                .with_source(error));
        }
    }
    match std_fs::read_dir(&path).map(|mut entries| entries.next().is_some()) {
        Ok(false) => Ok(path),
        Ok(true) => refuse(format!(
            "the mount point {shown} is not empty; its files would be hidden. Use an empty directory"
        )),
        Err(error) => Err(Error::new(ErrorKind::Mountpoint, format!("cannot list the mount point {shown}"))
            .with_source(error)),
    }
}

fn check_device() -> Result<()> {
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(Error::new(ErrorKind::PermissionDenied, "cannot open /dev/fuse").with_source(error));
        }
        Err(error) => {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "cannot open /dev/fuse: load the fuse module, or start the container with `--device /dev/fuse`",
            )
            .with_source(error));
        }
    }
    if !may_mount() && !has_fusermount() {
        return Err(Error::new(
            ErrorKind::PermissionDenied,
            "mounting as an ordinary user needs fusermount3, which is not in PATH: install the package fuse3, or mount as root or with CAP_SYS_ADMIN",
        ));
    }
    Ok(())
}

/// Root tries; anybody else has the capability (`AmbientCapabilities=` of a unit), or asks fusermount.
fn may_mount() -> bool {
    rustix::process::geteuid().is_root() || is_capable()
}

fn is_capable() -> bool {
    use rustix::thread::{CapabilitySet, capabilities};
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

fn has_fusermount() -> bool {
    std::env::var_os("FUSERMOUNT_PATH").is_some()
        || std::env::var_os("PATH").is_some_and(|path| {
            std::env::split_paths(&path).any(|directory| {
                directory.join("fusermount3").is_file() || directory.join("fusermount").is_file()
            })
        })
}

/// `fuser` asserts that its descriptor is none of the standard three; a daemon may have closed those.
fn occupy_standard_descriptors() -> Result<()> {
    loop {
        let null = File::open("/dev/null")
            .map_err(|error| Error::new(ErrorKind::Io, "cannot open /dev/null").with_source(error))?;
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        // Kept open for the life of the process.
        let _ = null.into_raw_fd();
    }
}

fn wanted_passthrough(options: &MountOptions) -> Passthrough {
    if options.verify_always {
        Passthrough::Off("every byte is to be checked (verify always)".to_owned())
    } else if !is_capable() {
        Passthrough::Off("the daemon has no CAP_SYS_ADMIN, which root or a unit may give it".to_owned())
    } else {
        Passthrough::On
    }
}

fn session_config(options: &MountOptions, source: &str) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(source.to_owned()),
        // fuser passes `Subtype` to fusermount only; the kernel itself understands it too.
        MountOption::CUSTOM("subtype=nvtier".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoAtime,
        if options.read_only { MountOption::RO } else { MountOption::RW },
    ];
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads.unwrap_or_else(default_threads).clamp(1, 64));
    config
}

fn default_threads() -> usize {
    let cores = thread::available_parallelism().map_or(2, |count| count.get());
    (2 * cores).clamp(4, MAX_THREADS)
}

fn mount_failed(mountpoint: &Path, error: io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        io::ErrorKind::NotFound | io::ErrorKind::Unsupported => ErrorKind::NotSupported,
        _ => ErrorKind::Io,
    };
    // fuser asks fusermount where mount(2) is refused: what is missing then is not the mount point.
    let why = match error.kind() {
        io::ErrorKind::NotFound if mountpoint.exists() && !has_fusermount() => {
            ": this process may not mount (CAP_SYS_ADMIN; of a container, `--cap-add SYS_ADMIN`), and there is no fusermount3 that may"
        }
        _ => "",
    };
    Error::new(kind, format!("cannot mount at {}{why}", mountpoint.display())).with_source(error)
}

fn unmount_failed(path: &Path, error: Os) -> Error {
    let (kind, advice) = match error {
        Os::BUSY => {
            (ErrorKind::Busy, ": files or working directories in it are still in use (`fuser -vm` lists who)")
        }
        Os::PERM | Os::ACCESS => (ErrorKind::PermissionDenied, ""),
        _ => (ErrorKind::Io, ""),
    };
    Error::new(kind, format!("cannot unmount {}{advice}", path.display())).with_source(io::Error::from(error))
}

fn unmount_once(path: &Path, flags: UnmountFlags) -> std::result::Result<(), Os> {
    match rustix::mount::unmount(path, flags) {
        Err(Os::PERM) if has_fusermount() => {
            let mut command = Command::new("fusermount3");
            command.arg("-u").arg("-q");
            if flags.contains(UnmountFlags::DETACH) {
                command.arg("-z");
            }
            match command.arg("--").arg(path).status() {
                Ok(status) if status.success() => Ok(()),
                // fusermount tells no reasons by its status; a busy mount is the usual one.
                Ok(_) => Err(Os::BUSY),
                Err(_) => Err(Os::PERM),
            }
        }
        other => other,
    }
}

fn detach(path: &Path) -> Result<()> {
    unmount_once(path, UnmountFlags::DETACH).map_err(|error| unmount_failed(path, error))
}

/// Number of the FUSE connection, which is the minor number of the mount's device.
fn connection_of(path: &Path) -> Option<String> {
    let entry = find_mount(path).ok()??;
    entry.device.split_once(':').map(|(_, minor)| minor.to_owned())
}

fn raise_readahead(mountpoint: &Path, bytes: u64) -> io::Result<()> {
    let entry = find_mount(mountpoint)?.ok_or(io::ErrorKind::NotFound)?;
    std_fs::write(format!("/sys/class/bdi/{}/read_ahead_kb", entry.device), (bytes / 1024).to_string())
}
