//! Doors for the fuzz targets (`fuzz/`) to the parsers of this crate; not part of its interface.

use std::ffi::OsString;

use crate::parse::{self, Command};
use crate::settings::Verify;

fn shown(command: Command) -> String {
    match command {
        Command::Run(request) => format!("{request:?}"),
        Command::Print(text) => text,
    }
}

/// Parses the text of a job file and checks its jobs; what they are, for comparing.
pub fn job_file(text: &str) -> Result<String, String> {
    parse::job_file_text(text).map(shown)
}

/// Parses a command line that names no job file.
pub fn arguments(args: &[OsString]) -> Result<String, String> {
    parse::parse(args).map(shown)
}

/// Parses an amount of data, a time and a whole number.
pub fn numbers(text: &str) -> [Option<u64>; 4] {
    [
        crate::units::parse_bytes(text, 1024).ok(),
        crate::units::parse_bytes(text, 1000).ok(),
        crate::units::parse_time_us(text, 1).ok(),
        crate::units::parse_int(text).ok(),
    ]
}

/// Parses /proc/diskstats; how many disks.
pub fn disk_stats(text: &str) -> usize {
    crate::sys::parse_disk_stats(text).len()
}

const VERIFIES: [Verify; 3] = [Verify::Crc32, Verify::Crc32c, Verify::XxHash];

/// Checks a block that was read, with each kind of sum.
pub fn check_block(block: &[u8], offset: u64) -> [bool; 3] {
    // The worker calls a shorter block bad before it looks into it.
    VERIFIES.map(|kind| {
        block.len() >= crate::data::HEADER_BYTES && crate::data::check(kind, block, offset).is_ok()
    })
}

/// Seals a block with a kind of sum.
pub fn seal_block(kind: usize, block: &mut [u8], offset: u64) {
    crate::data::seal(VERIFIES[kind % 3], block, offset);
}
