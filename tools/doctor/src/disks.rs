//! Block devices and what uses them, as the kernel's files tell it. Nothing is opened, nothing is written.

use std::path::Path;

use serde::Serialize;

use crate::System;

/// A drive, a partition, or what stands for one (loop, md, device mapper).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// As /sys names it: `nvme0n1`.
    pub name: String,
    /// Its node: `/dev/nvme0n1`.
    pub node: String,
    /// `major:minor`.
    pub device: String,
    /// The drive that a partition is part of.
    pub part_of: Option<String>,
    /// Its length.
    pub bytes: u64,
    /// As the drive says; empty where it says nothing.
    pub model: String,
    /// As the drive says; empty where it says nothing.
    pub serial: String,
    /// It can be taken out (a stick, a card).
    pub removable: bool,
    /// It cannot be written.
    pub read_only: bool,
    /// The file behind a loop device.
    pub backing: Option<String>,
    /// Names of its partitions.
    pub partitions: Vec<String>,
    /// Names of the md and device-mapper devices that are made of it.
    pub holders: Vec<String>,
    /// Where it is mounted.
    pub mounts: Vec<String>,
    /// The kernel swaps to it.
    pub swap: bool,
    /// The line of /etc/fstab that names it, by whatever name.
    pub fstab: Option<String>,
}

impl Disk {
    /// Why nothing may be written to it, each reason for people; empty where nothing speaks against it. What it holds is not looked at.
    pub fn uses(&self) -> Vec<String> {
        let mut uses: Vec<String> = self.mounts.iter().map(|point| format!("mounted on {point}")).collect();
        if self.swap {
            uses.push("the kernel swaps to it".into());
        }
        if !self.holders.is_empty() {
            uses.push(format!("held by {} (md or device mapper)", self.holders.join(", ")));
        }
        if !self.partitions.is_empty() {
            uses.push(format!("has partitions: {}", self.partitions.join(", ")));
        }
        if let Some(line) = &self.fstab {
            uses.push(format!("in /etc/fstab: {line}"));
        }
        if self.read_only {
            uses.push("read-only".into());
        }
        if self.is_stacked() {
            uses.push(
                "made of other drives (md or device mapper): nvtier stripes itself, name the drives".into(),
            );
        }
        uses
    }

    /// Whether it is an md or device-mapper device.
    pub fn is_stacked(&self) -> bool {
        ["md", "dm-"].iter().any(|prefix| {
            self.name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    }
}

/// All of this machine that have a size, drives before their partitions. Left out: RAM disks, zram, optical and floppy drives, loop
/// devices without a file, and the hidden paths of multipath drives.
pub fn disks(system: &System) -> Vec<Disk> {
    let mut found = Vec::new();
    for name in system.list("/sys/block") {
        let of_no_use = ["ram", "zram", "sr", "fd"].iter().any(|prefix| is_numbered(&name, prefix))
            || is_hidden(system, &name);
        let at = format!("/sys/block/{name}");
        let whole = one(system, &name, &at, None);
        if of_no_use || whole.bytes == 0 {
            continue;
        }
        let parts: Vec<Disk> = whole
            .partitions
            .iter()
            .map(|part| one(system, part, &format!("{at}/{part}"), Some(&whole)))
            .collect();
        found.push(whole);
        found.extend(parts);
    }
    uses_of(system, &mut found);
    found
}

fn is_numbered(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|c| c.is_ascii_digit()))
}

fn is_hidden(system: &System, name: &str) -> bool {
    system.number(&format!("/sys/block/{name}/hidden")) == Some(1)
}

/// What stands in its own folder of /sys.
fn one(system: &System, name: &str, at: &str, whole: Option<&Disk>) -> Disk {
    let text = |what: &str| system.read(&format!("{at}/{what}"));
    let flag = |what: &str| system.number(&format!("{at}/{what}")) == Some(1);
    let partitions = match whole {
        Some(_) => Vec::new(),
        None => system
            .list(at)
            .into_iter()
            .filter(|part| system.exists(&format!("{at}/{part}/partition")))
            .collect(),
    };
    Disk {
        name: name.to_owned(),
        // `cciss!c0d0` is /dev/cciss/c0d0.
        node: format!("/dev/{}", name.replace('!', "/")),
        device: text("dev").unwrap_or_default(),
        part_of: whole.map(|whole| whole.name.clone()),
        // In units of 512 bytes, whatever the drive's blocks are.
        bytes: system.number(&format!("{at}/size")).unwrap_or(0).saturating_mul(512),
        model: whole.map_or_else(|| text("device/model").unwrap_or_default(), |whole| whole.model.clone()),
        serial: whole.map_or_else(|| text("device/serial").unwrap_or_default(), |whole| whole.serial.clone()),
        removable: whole.map_or_else(|| flag("removable"), |whole| whole.removable),
        read_only: flag("ro") || whole.is_some_and(|whole| whole.read_only),
        backing: text("loop/backing_file"),
        partitions,
        holders: system.list(&format!("{at}/holders")),
        ..Disk::default()
    }
}

/// Mounts, swap and fstab.
fn uses_of(system: &System, disks: &mut [Disk]) {
    let mounts = system.read("/proc/self/mountinfo").unwrap_or_default();
    let swaps = system.read("/proc/swaps").unwrap_or_default();
    let fstab = system.read("/etc/fstab").unwrap_or_default();
    let find = |disks: &[Disk], node: &str| {
        let name = name_of(system, node)?;
        disks.iter().position(|disk| disk.name == name)
    };
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (device, point) = (left.split(' ').nth(2).unwrap_or(""), left.split(' ').nth(4).unwrap_or(""));
        let source = unescape(right.split(' ').nth(1).unwrap_or(""));
        // btrfs and others mount under a device number that is no drive's.
        let found = disks.iter().position(|disk| !device.is_empty() && disk.device == device);
        if let Some(index) = found.or_else(|| find(disks, &source)) {
            let point = unescape(point);
            if !disks[index].mounts.contains(&point) {
                disks[index].mounts.push(point);
            }
        }
    }
    for line in swaps.lines().skip(1) {
        if let Some(index) = line.split_whitespace().next().and_then(|node| find(disks, &unescape(node))) {
            disks[index].swap = true;
        }
    }
    for line in fstab.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        if let Some(index) =
            line.split_whitespace().next().and_then(|source| find(disks, &by_tag(&unescape(source))))
        {
            disks[index].fstab = Some(line.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
}

/// `UUID=x` is the link /dev/disk/by-uuid/x (fstab(5), udev).
fn by_tag(source: &str) -> String {
    match source.split_once('=') {
        Some((tag @ ("UUID" | "LABEL" | "PARTUUID" | "PARTLABEL"), value)) => {
            format!("/dev/disk/by-{}/{}", tag.to_ascii_lowercase(), value.trim_matches('"'))
        }
        _ => source.to_owned(),
    }
}

/// The name in /sys of a node, which may be a link (by-id, by-uuid, /dev/mapper).
fn name_of(system: &System, node: &str) -> Option<String> {
    let rest = node.strip_prefix("/dev/")?;
    let target =
        system.link_name(node).or_else(|| Path::new(rest).file_name()?.to_str().map(str::to_owned))?;
    match rest.contains('/') && system.link_name(node).is_none() {
        true => Some(rest.replace('/', "!")),
        false => Some(target),
    }
}

/// /proc and fstab write blanks, tabs, newlines and backslashes as `\ooo`.
pub(crate) fn unescape(field: &str) -> String {
    let mut out = String::new();
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        match rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}
