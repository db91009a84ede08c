//! `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`): the one place that tells of mounts without touching them, so that a dead or hung
//! one cannot hold us.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number as `major:minor`.
    pub device: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Type, `fuse.nvtier` for ours.
    pub fs_type: String,
    /// Source; the pool's path for ours.
    pub source: String,
}

impl MountEntry {
    /// Whether it is a mounted pool.
    pub fn is_nvtier(&self) -> bool {
        self.fs_type == "fuse.nvtier"
    }
}

/// The topmost mount at exactly this (absolute, resolved) path.
pub fn find_mount(mountpoint: &Path) -> io::Result<Option<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(parse(&table).into_iter().rfind(|entry| entry.mountpoint == mountpoint))
}

/// The mounts of a table; lines that are none are passed over.
pub fn parse(table: &[u8]) -> Vec<MountEntry> {
    table.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    // id parent major:minor root mountpoint options [optional fields] - type source super-options
    let mut fields = line.split(|&byte| byte == b' ');
    let device = String::from_utf8_lossy(fields.nth(2)?).into_owned();
    let mountpoint = PathBuf::from(unescape(fields.nth(1)?));
    fields.find(|field| *field == b"-")?;
    let fs_type = unescape(fields.next()?).to_string_lossy().into_owned();
    let source = unescape(fields.next()?).to_string_lossy().into_owned();
    Some(MountEntry { device, mountpoint, fs_type, source })
}

/// Space, tab, newline and backslash are written as `\040` and so on.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\').then(|| tail.get(..3)).flatten().and_then(|digits| {
            digits.iter().try_fold(0u32, |value, digit| {
                (b'0'..=b'7').contains(digit).then(|| value * 8 + u32::from(digit - b'0'))
            })
        });
        match octal.and_then(|value| u8::try_from(value).ok()) {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_manual_page() {
        let table = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
            99 35 0:51 / /mnt/a\\040b rw,nosuid - fuse.nvtier /srv/pool\\134x rw,user_id=0\n\
            broken line\n";
        let entries = parse(table);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].fs_type, "ext3");
        assert!(!entries[0].is_nvtier());
        assert_eq!(entries[1].mountpoint, Path::new("/mnt/a b"));
        assert_eq!(entries[1].source, "/srv/pool\\x");
        assert_eq!(entries[1].device, "0:51");
        assert!(entries[1].is_nvtier());
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(find_mount(Path::new("/")).unwrap().is_some());
        assert!(find_mount(Path::new("/no such mount")).unwrap().is_none());
    }
}
