//! The volume group of the layout `lvm`: made, found again, removed.
//!
//! A physical volume of ours is told by the identifier that was recorded for it, the group by its tag. Both are chosen before the first
//! byte is written: whatever `apply` or `undo` was killed in, the next run knows what it left.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use doctor::System;
use doctor::disks::disks;

use super::record::{Drive, Record};
use super::tool::{Tool, lvm};
use crate::failure::{Failure, Outcome, code};

/// Bytes of a stripe: large enough for a drive's bandwidth, and a divisor of the pool's own unit.
pub const STRIPE: u64 = 128 << 10;
/// The logical volume.
pub const VOLUME: &str = "pool";

const TOOLS: [&str; 8] = ["pvcreate", "pvs", "vgcreate", "vgs", "vgremove", "lvcreate", "lvchange", "lvs"];

/// The group's name.
pub fn group(record: &Record) -> String {
    format!("nvtier-{}", record.name)
}

/// The tag that makes it ours.
fn tag(record: &Record) -> String {
    format!("nvtier.{}", record.pool_id)
}

/// A new identifier of a physical volume, as LVM writes them: letters and digits in groups of 6, 4, 4, 4, 4, 4 and 6.
pub fn new_id() -> String {
    let digits = uuid::Uuid::new_v4().simple().to_string();
    let mut rest = digits.as_str();
    let parts = [6, 4, 4, 4, 4, 4, 6].map(|len| {
        let (part, after) = rest.split_at(len);
        rest = after;
        part
    });
    parts.join("-")
}

/// The identifier of the physical volume on a drive. LVM's label lies in the second sector of 512 bytes, where pvcreate puts it: a
/// `label_header` of 32 bytes, which says how far behind its start the `pv_header` begins, and that with the identifier.
fn id_on(node: &Path) -> Option<String> {
    let mut label = [0; 512];
    File::open(node).ok()?.read_exact_at(&mut label, 512).ok()?;
    if !label.starts_with(b"LABELONE") || label[24..32] != *b"LVM2 001" {
        return None;
    }
    let at = u32::from_le_bytes(label[20..24].try_into().ok()?) as usize;
    std::str::from_utf8(label.get(at..)?.get(..32)?).ok().map(str::to_owned)
}

fn carries(node: &Path, drive: &Drive) -> bool {
    let wanted = drive.physical.as_ref().map(|id| id.replace('-', ""));
    wanted.is_some() && id_on(node) == wanted
}

/// Where a drive's physical volume is now, if it is there: the kernel numbers NVMe drives anew at each boot.
pub fn node_of(drive: &Drive) -> Option<PathBuf> {
    if carries(&drive.node, drive) {
        return Some(drive.node.clone());
    }
    disks(&System::here()).into_iter().map(|disk| PathBuf::from(disk.node)).find(|node| carries(node, drive))
}

/// Whether the group is there, and ours.
pub fn has_group(record: &Record) -> bool {
    let tags = lvm("vgs").run(&["--noheadings", "-o", "vg_tags", &group(record)]);
    tags.is_ok_and(|text| text.trim().split(',').any(|found| found == tag(record)))
}

fn volumes(record: &Record) -> Outcome<Vec<String>> {
    let made = lvm("lvs").run(&["--noheadings", "-o", "lv_name", &group(record)])?;
    Ok(made.split_whitespace().map(str::to_owned).collect())
}

/// Fails where this machine cannot make it of these drives.
pub fn check(record: &Record) -> Outcome {
    TOOLS.into_iter().map(lvm).try_for_each(Tool::check)?;
    let misc = std::fs::read_to_string("/proc/misc").unwrap_or_default();
    if !misc.lines().any(|line| line.ends_with(" device-mapper")) {
        return Err(Failure::unsupported(
            "the kernel has no device mapper, of which logical volumes are made",
        )
        .hint("`modprobe dm_mod`; where there is none, choose --layout raw or xfs"));
    }
    let blocks = |drive: &Drive| rustix::fs::ioctl_blksszget(File::open(&drive.node).ok()?).ok();
    let blocks: Vec<Option<u32>> = record.drives.iter().map(blocks).collect();
    let mut known = blocks.iter().flatten();
    if let Some(first) = known.next()
        && let Some(other) = known.find(|other| *other != first)
    {
        return Err(Failure::usage(format!(
            "LVM puts no drives with blocks of {first} and of {other} bytes into one group"
        ))
        .hint("--layout raw takes them together; `nvme format` gives a drive other blocks and loses what is on it"));
    }
    Ok(())
}

/// Makes what is not there yet; afterwards the logical volume is active.
pub fn make(record: &Record) -> Outcome {
    let (group, tag) = (group(record), tag(record));
    if !has_group(record) {
        for drive in record.drives.iter().filter(|drive| !carries(&drive.node, drive)) {
            let id = drive.physical.as_deref().unwrap_or_default();
            let words = ["--yes", "-ff", "--uuid", id, "--norestorefile"].map(AsRef::as_ref);
            lvm("pvcreate").run(&[&words[..], &[drive.node.as_os_str()]].concat())?;
        }
        let words = ["--yes", "--addtag", tag.as_str(), group.as_str()].map(AsRef::as_ref);
        let nodes: Vec<_> = record.drives.iter().map(|drive| drive.node.as_os_str()).collect();
        lvm("vgcreate").run(&[&words[..], &nodes].concat())?;
    }
    if volumes(record)?.iter().any(|name| name == VOLUME) {
        return activate(record);
    }
    let (stripes, unit) = (record.drives.len().to_string(), format!("{}k", STRIPE >> 10));
    let mut words = vec!["--yes", "-W", "y", "-n", VOLUME, "-l", "100%FREE"];
    if record.drives.len() > 1 {
        words.extend(["-i", &stripes, "-I", &unit]);
    }
    words.push(&group);
    lvm("lvcreate").run(&words).map(drop)
}

/// Makes the node of the logical volume, where a boot did not.
pub fn activate(record: &Record) -> Outcome {
    lvm("lvchange").run(&["-ay", &format!("{}/{VOLUME}", group(record))]).map(drop)
}

/// Fails where removing the group would take something else along; activates the logical volume, so that it can be looked into.
pub fn check_undo(record: &Record) -> Outcome {
    let changed = |what: String, hint: &str| {
        let message = format!("undo `{}`: {what}", record.name);
        Err(Failure::new(code::FAILED, "Changed", message).hint(hint))
    };
    for node in record.drives.iter().filter_map(node_of) {
        let words = ["--noheadings", "-o", "vg_name,vg_tags"].map(AsRef::as_ref);
        let told = lvm("pvs").run(&[&words[..], &[node.as_os_str()]].concat())?;
        let mut words = told.split_whitespace();
        let (found, tags) = (words.next(), words.next().unwrap_or_default());
        if let Some(found) = found
            && (found != group(record) || !tags.split(',').any(|found| found == tag(record)))
        {
            let what =
                format!("{} is part of the volume group {found}, which `apply` did not make", node.display());
            return changed(what, "give the group its name back, or remove it and the record yourself");
        }
    }
    if !has_group(record) {
        return Ok(());
    }
    let (ours, others): (Vec<_>, Vec<_>) = volumes(record)?.into_iter().partition(|name| name == VOLUME);
    if !others.is_empty() {
        let what =
            format!("the volume group {} has other logical volumes: {}", group(record), others.join(", "));
        return changed(what, "remove them first; nothing was changed");
    }
    if ours.is_empty() { Ok(()) } else { activate(record) }
}

/// Removes the group, if it is there and ours. Whether it was.
pub fn remove_group(record: &Record) -> Outcome<bool> {
    if !has_group(record) {
        return Ok(false);
    }
    lvm("vgremove").run(&["--yes", "--force", &group(record)]).map(|_| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_physical_volume_is_known_by_its_identifier() {
        let id = new_id();
        let parts: Vec<usize> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [6, 4, 4, 4, 4, 4, 6], "{id}");
        let folder = tempfile::tempdir().unwrap();
        let node = folder.path().join("drive");
        let mut bytes = vec![0; 4096];
        bytes[512..520].copy_from_slice(b"LABELONE");
        bytes[532] = 32;
        bytes[536..544].copy_from_slice(b"LVM2 001");
        bytes[544..576].copy_from_slice(id.replace('-', "").as_bytes());
        std::fs::write(&node, &bytes).unwrap();
        let drive = |physical: Option<String>| Drive {
            node: node.clone(),
            bytes: 4096,
            model: String::new(),
            serial: String::new(),
            held: None,
            physical,
        };
        assert!(carries(&node, &drive(Some(id.clone()))));
        assert!(!carries(&node, &drive(Some(new_id()))) && !carries(&node, &drive(None)));
        // A label that points out of its sector, a torn one, none.
        bytes[533] = 2;
        std::fs::write(&node, &bytes).unwrap();
        assert_eq!(id_on(&node), None);
        bytes[533] = 0;
        bytes[536] = 0;
        std::fs::write(&node, &bytes).unwrap();
        assert_eq!(id_on(&node), None);
        std::fs::write(&node, &bytes[..600]).unwrap();
        assert!(!carries(&node, &drive(Some(id))) && !carries(&node, &drive(None)));
    }
}
