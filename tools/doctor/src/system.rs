//! Where facts come from.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A machine as its files show it.
#[derive(Clone, Debug)]
pub struct System {
    root: PathBuf,
    live: bool,
}

impl System {
    /// This machine.
    pub fn here() -> System {
        System { root: "/".into(), live: true }
    }

    /// A machine whose `/proc`, `/sys` and `/etc` lie below `root`. Nothing is tried out there.
    pub fn below(root: impl Into<PathBuf>) -> System {
        System { root: root.into(), live: false }
    }

    /// Whether things can be tried out, not only read about.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    pub(crate) fn is_root(&self) -> bool {
        !self.live || rustix::process::geteuid().is_root()
    }

    /// Whether this process may mount, and pass reads through to the kernel. Of a machine that is only read about: whether its root may, who may.
    pub(crate) fn may_mount(&self) -> bool {
        use rustix::thread::{CapabilitySet, capabilities};
        !self.live || capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
    }

    /// Where a path of the machine lies here.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// A file's text without the white space around it; `None` where there is none to be read.
    pub(crate) fn read(&self, path: &str) -> Option<String> {
        self.try_read(path).ok()
    }

    /// The same, with the reason.
    pub(crate) fn try_read(&self, path: &str) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.at(path))?).trim().to_owned())
    }

    /// A number in a file.
    pub(crate) fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    pub(crate) fn exists(&self, path: &str) -> bool {
        self.at(path).exists()
    }

    /// Names in a directory, in order; none where there is no such directory.
    pub(crate) fn list(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.at(path))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// A file of the cgroup that this process is in, and of each above it: what limits one limits all below it.
    pub(crate) fn cgroup(&self, file: &str) -> Vec<String> {
        let own = self.read("/proc/self/cgroup").unwrap_or_default();
        // "0::/user.slice/x"; in a container with a cgroup namespace it is "/".
        let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned();
        let folders = Path::new(&own).ancestors();
        folders
            .filter_map(|folder| {
                let folder = folder.to_string_lossy();
                self.read(&format!("/sys/fs/cgroup/{}/{file}", folder.trim_matches('/')))
            })
            .collect()
    }

    /// The last part of what a symbolic link leads to.
    pub(crate) fn link_name(&self, path: &str) -> Option<String> {
        let target = fs::read_link(self.at(path)).ok()?;
        target.file_name().map(|name| name.to_string_lossy().into_owned())
    }

    /// The kernel's version, major and minor.
    pub(crate) fn kernel(&self) -> Option<(u32, u32)> {
        let release = self.read("/proc/sys/kernel/osrelease")?;
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok());
        Some((numbers.next()?, numbers.next()?))
    }

    /// A field `name: value` of a text as /proc writes it.
    pub(crate) fn field(&self, path: &str, name: &str) -> Option<String> {
        self.read(path)?.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        })
    }
}

/// A size for people, powers of 1024.
pub(crate) fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// The path itself, or the nearest directory above it that exists.
pub(crate) fn existing(path: &Path) -> PathBuf {
    let mut path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    while !path.exists() && path.pop() {}
    path
}
