//! What the kernel says about a node: which subsystem it is of, its sibling, its limits (`/sys`, sysfs(5)).

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Subsystem of a character device, as its `subsystem` link names it.
fn subsystem(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    if !meta.file_type().is_char_device() {
        return None;
    }
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    let link = fs::read_link(format!("/sys/dev/char/{major}:{minor}/subsystem")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// Whether a path is an NVMe generic character device, `/dev/ngXnY`: a namespace reached by passthrough.
pub fn is_nvme_char(path: &Path) -> bool {
    subsystem(path).is_some_and(|name| name == "nvme-generic")
}

/// Whether a path is the character device of an NVMe controller, `/dev/nvmeX`.
pub fn is_controller(path: &Path) -> bool {
    subsystem(path).is_some_and(|name| name == "nvme")
}

/// The kernel's name of a character device: `ng0n1`.
fn char_name(rdev: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let link = fs::read_link(format!("/sys/dev/char/{major}:{minor}")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// The block device of the same namespace, by the kernel's naming: `ng0n1` and `nvme0n1`.
fn block_name(char_name: &str) -> Option<String> {
    char_name.strip_prefix("ng").map(|rest| format!("nvme{rest}"))
}

/// The node of the block device that shows the same namespace as this character device.
pub(crate) fn block_sibling(rdev: u64) -> Option<PathBuf> {
    let name = block_name(&char_name(rdev)?)?;
    let number = fs::read_to_string(format!("/sys/class/block/{name}/dev")).ok()?;
    let path = Path::new("/dev").join(name);
    let meta = fs::metadata(&path).ok()?;
    let is = format!("{}:{}", rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    (meta.file_type().is_block_device() && is == number.trim()).then_some(path)
}

/// The most bytes that the kernel passes to the drive as one command, from the limits of the block device's queue: what the
/// controller's driver takes, and as many pages as it has segments for.
pub(crate) fn kernel_limit(rdev: u64) -> Option<u64> {
    let name = block_name(&char_name(rdev)?)?;
    let read = |what: &str| -> Option<u64> {
        fs::read_to_string(format!("/sys/class/block/{name}/queue/{what}")).ok()?.trim().parse().ok()
    };
    let bytes = read("max_hw_sectors_kb")?.checked_mul(1024)?;
    let pages = read("max_segments")?.checked_mul(4096)?;
    Some(bytes.min(pages)).filter(|limit| *limit > 0)
}

/// The nodes of every NVMe namespace of this machine, as block and as character device where both are.
pub fn namespace_nodes() -> Vec<PathBuf> {
    let mut nodes = Vec::new();
    for class in ["/sys/class/block", "/sys/class/nvme-generic"] {
        for entry in fs::read_dir(class).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(text) = name.to_str() else { continue };
            let path = Path::new("/dev").join(&name);
            if (is_namespace_name(text, "nvme") || is_namespace_name(text, "ng")) && path.exists() {
                nodes.push(path);
            }
        }
    }
    nodes.sort();
    nodes
}

/// `PREFIX` number `n` number: neither a partition nor a path of a multipath namespace.
fn is_namespace_name(name: &str, prefix: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.strip_prefix(prefix)
        .and_then(|rest| rest.split_once('n'))
        .is_some_and(|(controller, namespace)| number(controller) && number(namespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_namespaces() {
        assert_eq!(block_name("ng0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(block_name("tty0"), None);
        for (name, is) in [
            ("nvme0n1", true),
            ("nvme12n34", true),
            ("nvme0n1p1", false),
            ("nvme0c0n1", false),
            ("nvme0", false),
            ("nvmen1", false),
        ] {
            assert_eq!(is_namespace_name(name, "nvme"), is, "{name}");
        }
    }

    #[test]
    fn other_nodes_are_not_nvmes() {
        for path in ["/dev/null", "/dev/zero", "/", "/nonexistent"] {
            assert!(!is_nvme_char(Path::new(path)) && !is_controller(Path::new(path)), "{path}");
        }
    }
}
