//! Whether anybody else has a file open.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

/// `F_SETSIG` of linux/fcntl.h; the libc crate lacks it.
const F_SETSIG: libc::c_int = 10;

/// Whether the file is open, or mapped, through any other open file description than this one. `None`: the file system cannot tell.
///
/// Mappings count because each keeps the description open that it was made of, even after its descriptor was closed (`mmap(2)`). The
/// answer is that of a write lease (`fcntl(2)`, F_SETLEASE), which the kernel grants to a sole opener only; it is given back at once.
/// `file` must be open for writing.
pub fn is_open_elsewhere(file: &File) -> Option<bool> {
    let fd = file.as_raw_fd();
    // Should somebody open the file in the moment of the lease, the kernel signals its holder: with SIGIO, which ends the process,
    // unless another signal is asked for. SIGURG is ignored by default.
    // SAFETY: F_SETSIG takes a signal number; `fd` is open as long as `file` is borrowed; no memory is passed.
    if unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) } != 0 {
        return None;
    }
    // SAFETY: F_SETLEASE takes a lease type; `fd` is open as long as `file` is borrowed; no memory is passed.
    if unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) } == 0 {
        // SAFETY: as above.
        unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) };
        return Some(false);
    }
    (std::io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)).then_some(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MappedFile;

    #[test]
    fn other_openers_and_mappings_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, [0u8; 4096]).unwrap();
        let open = |write| File::options().read(true).write(write).open(&path).unwrap();
        let file = open(true);
        if is_open_elsewhere(&file).is_none() {
            println!("skipped: no leases on this file system");
            return;
        }
        assert_eq!(is_open_elsewhere(&file), Some(false));
        let copy = file.try_clone().unwrap();
        assert_eq!(is_open_elsewhere(&file), Some(false), "a duplicate is the same open file");
        drop(copy);
        for write in [false, true] {
            let other = open(write);
            assert_eq!(is_open_elsewhere(&file), Some(true));
            drop(other);
            assert_eq!(is_open_elsewhere(&file), Some(false));
        }
        let mapping = MappedFile::new(open(true), true).unwrap();
        assert_eq!(is_open_elsewhere(&file), Some(true));
        drop(mapping);
        assert_eq!(is_open_elsewhere(&file), Some(false));
    }
}
