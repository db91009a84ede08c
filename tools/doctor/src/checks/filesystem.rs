//! The file system that a pool lies on, or is to lie on.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::system::{existing, human};
use crate::{Finding, System};

/// A line of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountPoint {
    /// `major:minor`.
    pub device: String,
    pub point: String,
    pub kind: String,
    pub source: String,
    pub options: String,
}

/// The mount that `path` is below.
pub(crate) fn mount_of(system: &System, path: &Path) -> Option<MountPoint> {
    let text = system.read("/proc/self/mountinfo")?;
    let path = existing(path);
    let path = path.canonicalize().unwrap_or(path);
    text.lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            Some(MountPoint {
                device: (*left.get(2)?).to_owned(),
                point: left.get(4)?.replace("\\040", " "),
                kind: (*right.first()?).to_owned(),
                source: (*right.get(1)?).to_owned(),
                options: format!("{},{}", left.get(5)?, right.get(2).unwrap_or(&"")),
            })
        })
        .filter(|mount| path.starts_with(&mount.point))
        // The longest, and of those the last, which covers the others.
        .max_by_key(|mount| mount.point.len())
}

/// The disk below a mount, as /sys/block names it, and whether more than one lies below it (md, dm).
pub(super) fn disk_of(system: &System, mount: &MountPoint) -> Option<(String, bool)> {
    let name = system.link_name(&format!("/sys/dev/block/{}", mount.device))?;
    let stacked = !system.list(&format!("/sys/block/{name}/slaves")).is_empty();
    if system.exists(&format!("/sys/block/{name}")) {
        return Some((name, stacked));
    }
    // A partition lies in its disk's directory.
    let disks = system.list("/sys/block");
    let disk = disks.into_iter().find(|disk| system.exists(&format!("/sys/block/{disk}/{name}")))?;
    Some((disk, false))
}

pub(super) fn check(system: &System, path: &Path, out: &mut Vec<Finding>) {
    let Some(mount) = mount_of(system, path) else {
        let why = "/proc/self/mountinfo says nothing";
        out.push(Finding::unknown("file system", path.display().to_string(), why).needs(KIND));
        return;
    };
    out.push(kind(path, &mount));
    if let Some((disk, true)) = disk_of(system, &mount) {
        out.push(
            Finding::info("file system", "below it", format!("{disk}: md or device mapper"))
                .needs("one drive a member: nvtier stripes itself"),
        );
    }
    if system.is_live() {
        tried(path, out);
    }
}

const KIND: &str = "ext4 or XFS on a drive of this machine";

fn kind(path: &Path, mount: &MountPoint) -> Finding {
    let found = format!("{} on {} at {} ({})", mount.kind, mount.source, mount.point, mount.options);
    let finding = Finding::ok("file system", path.display().to_string(), found).needs(KIND);
    if mount.options.split(',').any(|option| option == "ro") {
        return finding.cannot_run(
            "no pool can be made or written here",
            "name a path on a file system that can be written",
        );
    }
    match mount.kind.as_str() {
        "ext4" | "xfs" => finding,
        "tmpfs" | "ramfs" => finding.degraded(
            "a pool here is memory: gone with the next boot, and no further tier",
            "name a path on a drive",
        ),
        "nfs" | "nfs4" | "cifs" | "smb3" | "9p" | "virtiofs" | "ceph" | "lustre" => finding.degraded(
            "each read goes over a network or to another kernel",
            "name a path on a drive of this machine",
        ),
        "overlay" => finding.degraded(
            "a container's own file system: no passthrough, and gone with the container",
            "mount a directory of a drive into the container (docker run -v)",
        ),
        _ => finding
            .degraded("not tested: checksums and copies on write of its own may slow it down", "ext4 or XFS"),
    }
}

/// What only trying tells: one unnamed file, gone when it is closed.
fn tried(path: &Path, out: &mut Vec<Finding>) {
    let directory = existing(path);
    let directory = if directory.is_dir() {
        directory
    } else {
        directory.parent().map(Path::to_path_buf).unwrap_or_default()
    };
    let unnamed = |flags: OFlags| {
        let flags = (OFlags::TMPFILE | flags).bits() as i32;
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&directory)
    };
    match unnamed(OFlags::empty()) {
        Ok(_) => {}
        Err(error) => {
            out.push(
                Finding::ok("file system", "writing", format!("{}: {error}", directory.display()))
                    .needs("a directory that can be written")
                    .cannot_run(
                        "no pool can be made or written here",
                        "another path, or the rights for this one",
                    )
                    .root_adds("rights that this user lacks"),
            );
            return;
        }
    }
    let direct = unnamed(OFlags::DIRECT).and_then(|file| aligned_write(&file));
    out.push(match direct {
        Ok(()) => Finding::ok("file system", "O_DIRECT", "works").needs("works"),
        Err(error) => {
            Finding::ok("file system", "O_DIRECT", format!("refused: {error}")).needs("works").degraded(
                "every byte goes through the page cache: slower, and it pushes out what others have there",
                "ext4 or XFS",
            )
        }
    });
    if let Ok(space) = rustix::fs::statvfs(&directory) {
        let (free, all) = (space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize);
        let found = format!("{} free of {}", human(free), human(all));
        let finding = Finding::ok("file system", "space", found)
            .needs("room for the models, and as much again while one is replaced");
        out.push(match free < all / 20 {
            true => finding.degraded(
                "drives and file systems slow down when they are nearly full",
                "make room, or use another drive",
            ),
            false => finding,
        });
    }
}

fn aligned_write(file: &File) -> std::io::Result<()> {
    let block = file.metadata()?.blksize().clamp(4096, 1 << 20) as usize;
    let memory = vec![1; 2 * block];
    let start = memory.as_ptr().align_offset(block);
    file.write_all_at(&memory[start..start + block], 0)
}
