//! Whether a file is in the page cache.

use std::fs::File;
use std::io::IoSliceMut;

use rustix::io::ReadWriteFlags;

/// Places that are asked.
const SAMPLES: u64 = 16;

/// Whether most of the first `len` bytes of `file` are in the page cache: asks for a few bytes here and there without waiting for the drive
/// (`RWF_NOWAIT`, preadv2(2)). False where the file system cannot tell.
pub fn is_cached(file: &File, len: u64) -> bool {
    let mut buffer = [0; 512];
    let found = (0..SAMPLES).filter(|sample| {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        // The middle of each part: headers at the start are always hot.
        let offset = len / SAMPLES * sample + len / SAMPLES / 2;
        rustix::io::preadv2(file, &mut slices, offset, ReadWriteFlags::NOWAIT).is_ok_and(|count| count > 0)
    });
    len > 0 && found.count() as u64 >= SAMPLES - 1
}
