//! What lies between the drives and the pool: nothing, an XFS on each drive, or one XFS on a striped logical volume.
//!
//! Each step is taken only where its result is not there yet, so that `apply` can be killed anywhere and run again. What is ours is told by
//! identifiers that were recorded before: the UUID of a file system, that of a physical volume, the tag of a volume group.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use doctor::System;
use doctor::disks::disks;
use engine::format::erase_device;
use nvme::DeviceOptions;
use serde::{Deserialize, Serialize};

use super::record::Record;
use super::tool::{MKFS_XFS, MOUNT, UMOUNT};
use super::{lvm, unit};
use crate::cli::Layout;
use crate::failure::{Failure, Outcome, code};
use crate::mountpoint::mounted_at;
use crate::size;

/// mkfs.xfs wants a log of 64 MiB inside an allocation group; of 512 MiB with a stripe unit it makes none (xfsprogs 6.1).
const XFS_LEAST: u64 = 1 << 30;
const XFS_MAGIC: &[u8] = b"XFSB";
/// `sb_inprogress`, which mkfs.xfs clears last; nothing mounts an XFS that has it.
const XFS_IN_PROGRESS: usize = 126;
/// What tells whose a drive is lies in its first bytes.
const HEAD: usize = 4096;
/// Bytes at the start of a drive that `undo` takes away.
const WIPED: usize = 1 << 20;
/// The pool's directory on a file system.
const POOL: &str = "pool";

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

    /// Where it is now: the kernel numbers NVMe drives anew at each boot. Where no device carries it, the one that it was made on.
    pub fn device(&self) -> PathBuf {
        let likely = [Path::new("/dev/disk/by-uuid").join(&self.uuid), self.node.clone()];
        let carries = |node: &PathBuf| super_block(node).is_some_and(|(uuid, _)| uuid == self.uuid);
        if let Some(found) = likely.into_iter().find(carries) {
            return found;
        }
        let all = disks(&System::here()).into_iter().map(|disk| PathBuf::from(disk.node));
        all.into_iter().find(carries).unwrap_or_else(|| self.node.clone())
    }

    /// Whether it is there, and the one that `apply` made or began to make.
    pub fn is_ours(&self) -> bool {
        super_block(&self.device()).is_some_and(|(uuid, _)| uuid == self.uuid)
    }

    /// Whether it is ours and mkfs.xfs came to its end.
    pub fn is_made(&self) -> bool {
        super_block(&self.device()).is_some_and(|(uuid, made)| made && uuid == self.uuid)
    }

    pub fn is_mounted(&self) -> Outcome<bool> {
        Ok(mounted_at(&self.mountpoint)?.is_some())
    }

    /// Mounts it, where it is not.
    pub fn mount(&self) -> Outcome {
        if self.is_mounted()? {
            return Ok(());
        }
        if !self.is_made() {
            let message = format!(
                "mount the file system {} on {}: no drive carries it",
                self.uuid,
                self.mountpoint.display()
            );
            return Err(Failure::not_found(message).hint("is a drive missing? `nvtier disk plan` lists them"));
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

/// The UUID of an XFS, and whether it was made to the end (xfs_format.h, `xfs_dsb`: the magic at 0, `sb_uuid` at 32).
fn super_block(node: &Path) -> Option<(String, bool)> {
    let mut head = [0; 128];
    File::open(node).ok()?.read_exact_at(&mut head, 0).ok()?;
    let uuid = uuid::Uuid::from_slice(&head[32..48]).ok()?;
    head.starts_with(XFS_MAGIC).then(|| (uuid.hyphenated().to_string(), head[XFS_IN_PROGRESS] == 0))
}

/// The file systems of a record to be.
pub fn volumes(record: &Record, unit_dir: &Path) -> Outcome<Vec<Volume>> {
    let nodes: Vec<PathBuf> = match record.layout {
        Layout::Raw => Vec::new(),
        Layout::Xfs => record.drives.iter().map(|drive| drive.node.clone()).collect(),
        Layout::Lvm => vec![Path::new("/dev").join(lvm::group(record)).join(lvm::VOLUME)],
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
        lvm::check(record).map_err(tried)?;
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
            lvm::group(record),
            nodes.join(" "),
            nodes.len(),
            size::human(lvm::STRIPE)
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
        Layout::Lvm => (lvm::STRIPE, record.drives.len()),
        _ => (engine::pool::DEFAULT_STRIPE_UNIT, 1),
    }
}

/// Makes what is not there yet; afterwards every file system is mounted.
pub fn make(record: &Record) -> Outcome {
    if record.layout == Layout::Lvm {
        lvm::make(record)?;
    }
    let (unit, width) = stripe(record);
    for volume in &record.volumes {
        if !volume.is_made() {
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

/// Mounts what a boot without the units did not.
pub fn mount(record: &Record) -> Outcome {
    if record.layout == Layout::Lvm {
        lvm::activate(record)?;
    }
    record.volumes.iter().try_for_each(Volume::mount)
}

/// Whether a drive carries what `apply` made.
pub fn is_ours(record: &Record, index: usize) -> bool {
    let Some(drive) = record.drives.get(index) else { return false };
    match record.layout {
        Layout::Raw => super::judge::pool_id(&drive.node).as_ref() == Some(&record.pool_id),
        Layout::Xfs | Layout::Lvm => node_of(record, index).is_some(),
    }
}

/// Where the drive is now that carries a file system or a physical volume of ours.
pub fn node_of(record: &Record, index: usize) -> Option<PathBuf> {
    match record.layout {
        Layout::Raw => None,
        Layout::Xfs => {
            let device = record.volumes.get(index).filter(|volume| volume.is_ours())?.device();
            Some(device.canonicalize().unwrap_or(device))
        }
        Layout::Lvm => lvm::node_of(record.drives.get(index)?),
    }
}

/// Takes file system or physical volume off a drive. What tells that it is ours goes last: until then a run that was killed can be repeated.
pub fn wipe(node: &Path) -> engine::Result<()> {
    let device = nvme::open(node, &DeviceOptions::default())?;
    let mut head = vec![0; HEAD];
    device.read_at(0, &mut head)?;
    if head.starts_with(XFS_MAGIC) {
        // From here on nobody mounts it.
        head[XFS_IN_PROGRESS] = 1;
        device.write_at(0, &head)?;
        device.flush()?;
    }
    // Whoever looks next sees nothing: what looks for signatures looks here.
    device.write_at(HEAD as u64, &vec![0; WIPED - HEAD])?;
    device.flush()?;
    device.write_at(0, &[0; HEAD])?;
    device.flush()?;
    erase_device(&*device)
}

/// Fails where undoing would lose what is not the pool's. Mounts what is not mounted.
pub fn check_undo(record: &Record) -> Outcome {
    if record.layout == Layout::Lvm {
        lvm::check_undo(record)?;
    }
    for volume in record.volumes.iter().filter(|volume| volume.is_made()) {
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
    Ok(())
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
        let uuid = "abababab-abab-abab-abab-abababababab".to_owned();
        assert_eq!(super_block(&path), Some((uuid.clone(), true)));
        bytes[126] = 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(super_block(&path), Some((uuid, false)));
        bytes[0] = 0;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(super_block(&path), None);
        std::fs::write(&path, b"XFSB").unwrap();
        assert_eq!(super_block(&path), None);
    }
}
