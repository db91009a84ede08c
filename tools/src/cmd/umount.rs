//! `nvtier umount MNT`: unmounts and waits until the daemon has written everything and is gone.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cli::{Global, Umount};
use crate::failure::{Failure, Outcome, code};
use crate::runtime::MountRecord;
use crate::{interrupt, mountpoint, output, runtime};

/// How long the daemon may take to write what is dirty.
const EXIT_DEADLINE: Duration = Duration::from_secs(120);
/// How long a mount that is in use gets to come free.
const BUSY_DEADLINE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// Unmounts.
pub fn run(global: &Global, args: &Umount) -> Outcome {
    let mountpoint = mountpoint::resolve(&args.mountpoint)?;
    let pid = unmount(&mountpoint, interrupt::check)?;
    if global.json {
        return output::json(&serde_json::json!({ "mountpoint": mountpoint, "pid": pid }));
    }
    Ok(())
}

/// Unmounts a resolved path and waits for its daemon, whose process id is returned if it is known. `check` can end the
/// waiting; a clean-up after SIGINT must not be ended by that same signal.
pub fn unmount(mountpoint: &Path, check: fn() -> Outcome) -> Outcome<Option<u32>> {
    let shown = mountpoint.display();
    let source = match mountpoint::mounted_at(mountpoint)? {
        None => return Err(Failure::not_found(format!("unmount {shown}: nothing is mounted there"))),
        Some(mount) if !mount.is_nvtier() => {
            let message = format!("unmount {shown}: it is a mount of type {}, not of nvtier", mount.fs_type);
            return Err(Failure::failed(message).hint("use umount(8)"));
        }
        Some(mount) => mount.source,
    };
    let daemon = Daemon::find(mountpoint, Path::new(&source));
    let start = Instant::now();
    // What was just closed may keep the mount busy for a moment longer.
    loop {
        match fuse_fs::unmount(mountpoint) {
            Ok(()) => break,
            Err(error) if error.kind() == fuse_fs::ErrorKind::Busy && start.elapsed() < BUSY_DEADLINE => {
                check()?;
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(unmount_failure(mountpoint, error)),
        }
    }
    if let Some(daemon) = &daemon {
        daemon.wait_for_exit(check)?;
    }
    Ok(daemon.map(|daemon| daemon.pid))
}

/// The process behind a mount.
struct Daemon {
    pid: u32,
    start_ticks: u64,
    log: Option<PathBuf>,
}

impl Daemon {
    /// By the record that it wrote; or, if another user did or it is gone, as the owner of the pool.
    fn find(mountpoint: &Path, pool: &Path) -> Option<Self> {
        if let Some(record) = MountRecord::load(mountpoint).filter(MountRecord::is_running) {
            return Some(Self { pid: record.pid, start_ticks: record.start_ticks, log: record.log });
        }
        let pid = engine::Pool::probe(pool).ok()?.owner_pid?;
        Some(Self { pid, start_ticks: runtime::start_ticks(pid)?, log: None })
    }

    fn wait_for_exit(&self, check: fn() -> Outcome) -> Outcome {
        let start = Instant::now();
        while runtime::start_ticks(self.pid) == Some(self.start_ticks) {
            check()?;
            if start.elapsed() > EXIT_DEADLINE {
                let message = format!(
                    "the mount is gone, but its daemon {} still runs after {EXIT_DEADLINE:?}",
                    self.pid
                );
                let failure = Failure::new(code::BUSY, "Busy", message);
                return Err(match &self.log {
                    Some(log) => failure.hint(format!("its log is {}", log.display())),
                    None => failure,
                });
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

fn unmount_failure(mountpoint: &Path, error: fuse_fs::Error) -> Failure {
    let failure = Failure::from(error).while_doing(format!("unmount {}", mountpoint.display()));
    if failure.code == code::BUSY {
        failure.hint("files on it are open: close them (`fuser -vm MNT` shows by whom) and try again")
    } else {
        failure
    }
}
