//! What lies between the drives and the pool: nothing, an XFS on each drive, or one XFS on a striped logical volume.
//!
//! Each step is taken only where its result is not there yet, so that `apply` can be killed anywhere and run again. What is ours is told by
//! identifiers that were recorded before: the UUID of a file system, a tag of a volume group.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::record::Record;
use super::tool::{MKFS_XFS, MOUNT, UMOUNT, lvm};
use super::unit;
use crate::cli::Layout;
use crate::failure::{Failure, Outcome, code};
use crate::mountpoint::mounted_at;
use crate::size;

/// mkfs.xfs wants a log of 64 MiB inside an allocation group; of 512 MiB with a stripe unit it makes none (xfsprogs 6.1).
const XFS_LEAST: u64 = 1 << 30;
/// Stripes of a logical volume: large enough for a drive's bandwidth, and a divisor of the pool's own unit.
const LVM_STRIPE: u64 = 128 << 10;
/// The pool's directory on a file system.
const POOL: &str = "pool";
/// Of the logical volume.
const VOLUME: &str = "pool";

/// A file system that `apply` makes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Volume {
    /// What it lies on.
    pub node: PathBuf,
    /// Chosen before it is made: whatever carries it is ours.
    pub uuid: String,
    pub mountpoint: PathBuf,
    pub unit: PathBuf,
    pub unit_text: String,
}

impl Volume {
    /// The member of the pool.
    pub fn member(&self) -> PathBuf {
        self.mountpoint.join(POOL)
    }

    /// The unit's name.
    pub fn unit_name(&self) -> String {
        self.unit.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Where it is now: the kernel numbers NVMe drives anew at each boot.
    pub fn device(&self) -> PathBuf {
        let by_uuid = Path::new("/dev/disk/by-uuid").join(&self.uuid);
        if by_uuid.exists() { by_uuid } else { self.node.clone() }
    }

    /// Whether it is the one that `apply` made.
    pub fn is_ours(&self) -> bool {
        xfs_uuid(&self.device()).is_some_and(|uuid| uuid == self.uuid)
    }

    pub fn is_mounted(&self) -> Outcome<bool> {
        Ok(mounted_at(&self.mountpoint)?.is_some())
    }

    /// Mounts it, where it is not.
    pub fn mount(&self) -> Outcome {
        if self.is_mounted()? {
            return Ok(());
        }
        std::fs::create_dir_all(&self.mountpoint).map_err(|error| {
            Failure::io(format!("make the mount point {}", self.mountpoint.display()), &error)
        })?;
        let words = ["-t".as_ref(), "xfs".as_ref(), "-o".as_ref(), "noatime".as_ref()];
        let device = self.device();
        let words = [&words[..], &[device.as_os_str(), self.mountpoint.as_os_str()]].concat();
        MOUNT.run(&words).map(drop)
    }

    pub fn umount(&self) -> Outcome {
        if self.is_mounted()? {
            UMOUNT.run(&[self.mountpoint.as_os_str()])?;
        }
        Ok(())
    }

    /// What lies beside the pool.
    pub fn others(&self) -> Outcome<Vec<String>> {
        let tried = || format!("look into {}", self.mountpoint.display());
        let entries = std::fs::read_dir(&self.mountpoint).map_err(|error| Failure::io(tried(), &error))?;
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        Ok(names.filter(|name| name != POOL).collect())
    }
}

/// The UUID of an XFS (xfs_format.h, `xfs_dsb`: the magic at 0, `sb_uuid` at 32).
pub fn xfs_uuid(node: &Path) -> Option<String> {
    let mut head = [0; 48];
    File::open(node).ok()?.read_exact_at(&mut head, 0).ok()?;
    let bytes: [u8; 16] = head[32..].try_into().ok()?;
    head.starts_with(b"XFSB").then(|| uuid::Uuid::from_bytes(bytes).hyphenated().to_string())
}

/// The tag of our volume group.
fn tag(record: &Record) -> String {
    format!("nvtier.{}", record.pool_id)
}

fn group(record: &Record) -> String {
    format!("nvtier-{}", record.name)
}

/// Whether a drive is part of our volume group.
pub fn in_group(record: &Record, node: &Path) -> bool {
    let words = ["--noheadings", "-o", "vg_tags"].map(AsRef::as_ref);
    let told = lvm("pvs").run(&[&words[..], &[node.as_os_str()]].concat());
    told.is_ok_and(|text| text.trim().split(',').any(|found| found == tag(record)))
}

/// The file systems of a record to be.
pub fn volumes(record: &Record, unit_dir: &Path) -> Outcome<Vec<Volume>> {
    let nodes: Vec<PathBuf> = match record.layout {
        Layout::Raw => Vec::new(),
        Layout::Xfs => record.drives.iter().map(|drive| drive.node.clone()).collect(),
        Layout::Lvm => vec![Path::new("/dev").join(group(record)).join(VOLUME)],
    };
    let mut folder = record.pool.clone().into_os_string();
    folder.push(".fs");
    let volume = |(index, node): (usize, PathBuf)| {
        let mountpoint = Path::new(&folder).join(index.to_string());
        let uuid = uuid::Uuid::new_v4().hyphenated().to_string();
        let name = format!("{}.mount", unit::escaped(&mountpoint)?);
        let unit_text = unit::mount_text(&record.name, &uuid, &mountpoint)?;
        Ok(Volume { node, uuid, mountpoint, unit: unit_dir.join(name), unit_text })
    };
    nodes.into_iter().enumerate().map(volume).collect()
}

/// Fails where this machine cannot make it.
pub fn check(record: &Record) -> Outcome {
    if record.layout == Layout::Raw {
        return Ok(());
    }
    let tried = |failure: Failure| failure.while_doing(format!("make the layout {}", record.layout.word()));
    for tool in [MKFS_XFS, MOUNT, UMOUNT] {
        tool.check().map_err(tried)?;
    }
    let together: u64 = record.drives.iter().map(|drive| drive.bytes).sum();
    let least = match record.layout {
        Layout::Lvm => together,
        _ => record.drives.iter().map(|drive| drive.bytes).min().unwrap_or(0),
    };
    if least < XFS_LEAST {
        return Err(tried(
            Failure::usage(format!(
                "an XFS with a stripe unit has at least {}, and there would be {}",
                size::human(XFS_LEAST),
                size::human(least)
            ))
            .hint("--layout raw takes smaller drives"),
        ));
    }
    if record.layout == Layout::Lvm {
        for name in ["pvcreate", "vgcreate", "lvcreate", "pvs", "vgs", "lvs", "vgremove", "pvremove"] {
            lvm(name).check().map_err(tried)?;
        }
        let misc = std::fs::read_to_string("/proc/misc").unwrap_or_default();
        if !misc.lines().any(|line| line.ends_with(" device-mapper")) {
            return Err(tried(
                Failure::unsupported("the kernel has no device mapper, of which logical volumes are made")
                    .hint("`modprobe dm_mod`; where there is none, choose --layout raw or xfs"),
            ));
        }
    }
    Ok(())
}

/// What it comes to, for a plan.
pub fn steps(record: &Record) -> Vec<String> {
    let nodes: Vec<String> = record.drives.iter().map(|drive| drive.node.display().to_string()).collect();
    let mut steps = Vec::new();
    if record.layout == Layout::Lvm {
        steps.push(format!(
            "make the volume group {} of {} and a logical volume of all of it, striped over {} in units of {}",
            group(record),
            nodes.join(" "),
            nodes.len(),
            size::human(LVM_STRIPE)
        ));
    }
    for volume in &record.volumes {
        let (unit, width) = stripe(record);
        steps.push(format!(
            "mkfs.xfs -d su={unit},sw={width} {}, and mount it on {} by the unit {}",
            volume.node.display(),
            volume.mountpoint.display(),
            volume.unit.display()
        ));
    }
    steps
}

/// Unit and width of stripes as XFS is to know them: files begin where stripes of the volume, or of the pool, do.
fn stripe(record: &Record) -> (u64, usize) {
    match record.layout {
        Layout::Lvm => (LVM_STRIPE, record.drives.len()),
        _ => (engine::pool::DEFAULT_STRIPE_UNIT, 1),
    }
}

/// Makes what is not there yet; afterwards every file system is mounted.
pub fn make(record: &Record) -> Outcome {
    if record.layout == Layout::Lvm {
        make_group(record)?;
    }
    let (unit, width) = stripe(record);
    for volume in &record.volumes {
        if !volume.is_ours() {
            let uuid = format!("uuid={}", volume.uuid);
            let data = format!("su={unit},sw={width}");
            // What may be lost was judged before, drive by drive. The log has its own unit: the data's may be more than it takes.
            let words = ["-q", "-f", "-m", &uuid, "-d", &data, "-l", "su=32k"].map(AsRef::as_ref);
            MKFS_XFS.run(&[&words[..], &[volume.node.as_os_str()]].concat())?;
        }
        volume.mount()?;
    }
    Ok(())
}

fn make_group(record: &Record) -> Outcome {
    let (group, tag) = (group(record), tag(record));
    let nodes: Vec<&Path> = record.drives.iter().map(|drive| drive.node.as_path()).collect();
    if !nodes.iter().all(|node| in_group(record, node)) {
        for node in &nodes {
            let words = ["--yes", "-ff"].map(AsRef::as_ref);
            lvm("pvcreate").run(&[&words[..], &[node.as_os_str()]].concat())?;
        }
        let words = ["--yes", "--addtag", tag.as_str(), group.as_str()].map(AsRef::as_ref);
        let nodes: Vec<_> = nodes.iter().map(|node| node.as_os_str()).collect();
        lvm("vgcreate").run(&[&words[..], &nodes].concat())?;
    }
    let made = lvm("lvs").run(&["--noheadings", "-o", "lv_name", &group])?;
    if made.split_whitespace().any(|name| name == VOLUME) {
        return lvm("lvchange").run(&["-ay", &format!("{group}/{VOLUME}")]).map(drop);
    }
    let (stripes, unit) = (record.drives.len().to_string(), format!("{}k", LVM_STRIPE >> 10));
    let mut words = vec!["--yes", "-W", "y", "-n", VOLUME, "-l", "100%FREE"];
    if record.drives.len() > 1 {
        words.extend(["-i", &stripes, "-I", &unit]);
    }
    words.push(&group);
    lvm("lvcreate").run(&words).map(drop)
}

/// Whether a drive carries what `apply` made.
pub fn is_ours(record: &Record, index: usize) -> bool {
    let Some(drive) = record.drives.get(index) else { return false };
    match record.layout {
        Layout::Raw => super::judge::pool_id(&drive.node).as_ref() == Some(&record.pool_id),
        Layout::Xfs => record.volumes.get(index).is_some_and(Volume::is_ours),
        Layout::Lvm => in_group(record, &drive.node),
    }
}

/// Fails where undoing would lose what is not the pool's. Mounts what is not mounted.
pub fn check_undo(record: &Record) -> Outcome {
    for volume in record.volumes.iter().filter(|volume| volume.is_ours()) {
        volume.mount()?;
        let others = volume.others()?;
        if !others.is_empty() {
            let message = format!(
                "undo `{}`: beside the pool, {} holds {}",
                record.name,
                volume.mountpoint.display(),
                others.join(", ")
            );
            return Err(
                Failure::new(code::FAILED, "Changed", message).hint("move it away; nothing was changed")
            );
        }
    }
    if record.layout == Layout::Lvm && in_group(record, &record.drives[0].node) {
        let made = lvm("lvs").run(&["--noheadings", "-o", "lv_name", &group(record)])?;
        let others: Vec<&str> = made.split_whitespace().filter(|name| *name != VOLUME).collect();
        if !others.is_empty() {
            let message = format!(
                "undo `{}`: the volume group {} has other logical volumes: {}",
                record.name,
                group(record),
                others.join(", ")
            );
            return Err(Failure::new(code::FAILED, "Changed", message).hint("remove them first"));
        }
    }
    Ok(())
}

/// Removes volume group and physical volumes, if they are ours.
pub fn remove_group(record: &Record) -> Outcome<Vec<String>> {
    let ours: Vec<&Path> = record
        .drives
        .iter()
        .map(|drive| drive.node.as_path())
        .filter(|node| in_group(record, node))
        .collect();
    if ours.is_empty() {
        return Ok(Vec::new());
    }
    let group = group(record);
    lvm("vgremove").run(&["--yes", "--force", &group])?;
    let mut done = vec![format!("removed the volume group {group}")];
    for node in ours {
        let words = ["--yes", "--force"].map(AsRef::as_ref);
        lvm("pvremove").run(&[&words[..], &[node.as_os_str()]].concat())?;
        done.push(format!("wiped {}", node.display()));
    }
    Ok(done)
}

/// The directory of mount points.
pub fn folder(record: &Record) -> Option<PathBuf> {
    record.volumes.first()?.mountpoint.parent().map(Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uuid_is_read_where_xfs_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut bytes = vec![0; 4096];
        bytes[..4].copy_from_slice(b"XFSB");
        bytes[32..48].copy_from_slice(&[0xab; 16]);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(xfs_uuid(&path).unwrap(), "abababab-abab-abab-abab-abababababab");
        bytes[0] = 0;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(xfs_uuid(&path), None);
        std::fs::write(&path, b"XFSB").unwrap();
        assert_eq!(xfs_uuid(&path), None);
    }
}
