//! What the machine says: kernel, drivers, file system and drive under a path. Only files of `/proc` and `/sys` are read, so
//! that tests can make a machine up in a folder.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// A machine, by the root of its `/proc` and `/sys`.
#[derive(Clone, Debug)]
pub struct System {
    root: PathBuf,
}

/// What a path lies on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Type of the file system, `ext4`; empty where it is not known.
    pub file_system: String,
    /// Its mount options.
    pub options: String,
    /// The block device, `nvme0n1`; empty where there is none.
    pub drive: String,
    /// The drive's own name for itself.
    pub model: String,
    /// Whether it is a namespace of a local NVMe controller; else what it is.
    pub kind: DriveKind,
}

/// What kind of block device a drive is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DriveKind {
    /// A namespace of a controller on the PCI bus.
    Nvme,
    /// An NVMe namespace behind a network, by this transport.
    NvmeFabrics(String),
    /// An NVMe namespace of a subsystem with several paths to it.
    NvmeMultipath,
    /// md, device mapper.
    Stacked,
    /// Any other.
    #[default]
    Other,
}

impl System {
    /// This machine.
    pub fn here() -> System {
        System { root: "/".into() }
    }

    /// A machine whose `/proc`, `/sys`, `/boot` and `/etc` are in a folder.
    pub fn at(root: impl Into<PathBuf>) -> System {
        System { root: root.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The text of a file, trimmed. None where it cannot be read.
    pub fn read(&self, path: &str) -> Option<String> {
        let bytes = std::fs::read(self.path(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// Whether there is such a file.
    pub fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The kernel's release, `6.12.1-amd64`.
    pub fn kernel(&self) -> String {
        self.read("proc/sys/kernel/osrelease").unwrap_or_default()
    }

    /// The first two numbers of the kernel's release.
    pub fn kernel_version(&self) -> Option<(u32, u32)> {
        let release = self.kernel();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// A line of the kernel's configuration, `y`, `m` or `n`; None where the configuration is not readable.
    pub fn kernel_config(&self, name: &str) -> Option<String> {
        let text = self.read(&format!("boot/config-{}", self.kernel()))?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        Some(value.unwrap_or("n").to_owned())
    }

    /// Bytes that this process has read by system calls so far (`rchar` of proc(5)).
    pub fn bytes_read_by_calls(&self) -> Option<u64> {
        let text = self.read("proc/self/io")?;
        text.lines().find_map(|line| line.strip_prefix("rchar:")?.trim().parse().ok())
    }

    /// What identifies this machine, its kernel and its NVIDIA drivers.
    pub fn identity(&self) -> String {
        let part =
            |path: &str| self.read(path).unwrap_or_default().lines().next().unwrap_or_default().to_owned();
        let id = match part("etc/machine-id") {
            id if id.is_empty() => part("proc/sys/kernel/hostname"),
            id => id,
        };
        format!(
            "{id}|{}|{}|{}",
            self.kernel(),
            part("proc/driver/nvidia/version"),
            part("proc/driver/nvidia-fs/version")
        )
    }

    /// What a file or folder lies on. The path itself is one of this machine.
    pub fn place(&self, path: &Path) -> Place {
        let Ok(metadata) = std::fs::metadata(path) else { return Place::default() };
        let dev = if metadata.rdev() != 0 { metadata.rdev() } else { metadata.dev() };
        let number = format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
        self.place_of(&number)
    }

    /// What the device of this number, `259:3`, is, and what is mounted from it.
    pub fn place_of(&self, number: &str) -> Place {
        let (file_system, options) = self.mount(number).unwrap_or_default();
        let mut place = Place { file_system, options, ..Place::default() };
        let Ok(folder) = std::fs::canonicalize(self.path(&format!("sys/dev/block/{number}"))) else {
            return place;
        };
        // A partition's folder is inside its drive's.
        let drive = match (folder.join("partition").exists(), folder.parent()) {
            (true, Some(parent)) => parent.to_owned(),
            _ => folder,
        };
        let text = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        place.drive = drive.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        place.model = text(drive.join("device/model"));
        let transport = text(drive.join("device/transport"));
        place.kind = if drive.join("md").exists() || drive.join("dm").exists() {
            DriveKind::Stacked
        } else if !place.drive.starts_with("nvme") {
            DriveKind::Other
        } else if drive.to_string_lossy().contains("nvme-subsystem") {
            DriveKind::NvmeMultipath
        } else if matches!(transport.as_str(), "" | "pcie") {
            DriveKind::Nvme
        } else {
            DriveKind::NvmeFabrics(transport)
        };
        place
    }

    /// Type and options of the file system of a device (proc_pid_mountinfo(5)).
    fn mount(&self, number: &str) -> Option<(String, String)> {
        let text = self.read("proc/self/mountinfo")?;
        text.lines().rev().find_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            (before.split(' ').nth(2)? == number).then_some(())?;
            let mut after = after.split(' ');
            let (kind, _, options) = (after.next()?, after.next()?, after.next().unwrap_or_default());
            Some((kind.to_owned(), options.to_owned()))
        })
    }
}

impl Place {
    /// In words: `ext4 on nvme0n1`.
    pub fn describe(&self) -> String {
        let file_system =
            if self.file_system.is_empty() { "an unknown file system" } else { &self.file_system };
        if self.drive.is_empty() {
            file_system.to_owned()
        } else {
            format!("{file_system} on {}", self.drive)
        }
    }

    /// What tells it from other places.
    pub(crate) fn identity(&self) -> String {
        format!("{}|{}|{}|{}", self.file_system, self.options, self.drive, self.model)
    }
}
