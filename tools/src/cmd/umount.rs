//! `nvtier umount MNT`: unmounts and waits until the daemon has written everything and is gone.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::cli::{Global, Umount};
use crate::failure::{Failure, Outcome, code};
use crate::runtime::MountRecord;
use crate::{interrupt, mountpoint, output};

/// How long the daemon may take to write what is dirty.
const EXIT_DEADLINE: Duration = Duration::from_secs(120);

/// Unmounts.
pub fn run(global: &Global, args: &Umount) -> Outcome {
    let mountpoint = mountpoint::resolve(&args.mountpoint)?;
    let pid = unmount(&mountpoint)?;
    if global.json {
        return output::json(&serde_json::json!({ "mountpoint": mountpoint, "pid": pid }));
    }
    Ok(())
}

/// Unmounts a resolved path and waits for its daemon, whose process id is returned if it is known.
pub fn unmount(mountpoint: &Path) -> Outcome<Option<u32>> {
    let shown = mountpoint.display();
    match mountpoint::mounted_at(mountpoint)? {
        None => return Err(Failure::not_found(format!("unmount {shown}: nothing is mounted there"))),
        Some(mount) if !mount.is_nvtier() => {
            let message = format!("unmount {shown}: it is a mount of type {}, not of nvtier", mount.fs_type);
            return Err(Failure::failed(message).hint("use umount(8)"));
        }
        Some(_) => {}
    }
    let record = MountRecord::load(mountpoint);
    fuse_fs::unmount(mountpoint).map_err(|error| unmount_failure(mountpoint, error))?;
    if let Some(record) = &record {
        wait_for_exit(record)?;
    }
    Ok(record.map(|record| record.pid))
}

fn unmount_failure(mountpoint: &Path, error: fuse_fs::Error) -> Failure {
    let failure = Failure::from(error).while_doing(format!("unmount {}", mountpoint.display()));
    if failure.code == code::BUSY {
        failure.hint("files on it are open: close them (`fuser -vm MNT` shows by whom) and try again")
    } else {
        failure
    }
}

fn wait_for_exit(record: &MountRecord) -> Outcome {
    let start = Instant::now();
    while record.is_running() {
        interrupt::check()?;
        if start.elapsed() > EXIT_DEADLINE {
            let message = format!(
                "the mount is gone, but its daemon {} still runs after {EXIT_DEADLINE:?}",
                record.pid
            );
            let failure = Failure::new(code::BUSY, "Busy", message);
            return Err(match &record.log {
                Some(log) => failure.hint(format!("its log is {}", log.display())),
                None => failure,
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
