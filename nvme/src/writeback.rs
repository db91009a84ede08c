//! Asking the kernel to write out dirty pages early.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Starts writing the dirty pages of a range to the drive, and does not wait for them: `sync_file_range(2)`, SYNC_FILE_RANGE_WRITE. It may wait for
/// room in the drive's queue. Makes nothing durable: for that there is `fdatasync`, which then finds less to do.
pub fn start_writeback(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let (offset, len) = (range(offset)?, range(len)?);
    // SAFETY: `file` is borrowed, so its descriptor stays open during the call; no memory is passed.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn it_takes_ranges_of_files_and_refuses_the_rest() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 100_000]).unwrap();
        start_writeback(&file, 0, 100_000).unwrap();
        start_writeback(&file, 4096, 0).unwrap(); // to the end
        assert!(start_writeback(&file, u64::MAX, 1).is_err());
        let (reader, _writer) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(reader));
        assert!(start_writeback(&pipe, 0, 1).is_err(), "a pipe has no pages to write");
    }
}
