//! Whether cuFile can be trusted with this device, file system and drive: every byte of a few reads, and how fast it is.
//!
//! The file that is to be loaded is itself the test's: it is only read. Before each read the device's memory holds the
//! **complement** of the bytes that must come, so that a byte that did not arrive cannot look as if it had; a margin on both
//! sides holds a pattern that must still be there afterwards. What comes is compared with a plain read.
//!
//! Which way the reads took is asked twice. Releases from 1.15 on count their reads by way; a read by `pread`, or by another way
//! than the one that is tested, refuses it. And a fallback to `pread` shows in the process's count of bytes read by system
//! calls: nvidia-fs reads by ioctl(2), which does not count there. By peer-to-peer DMA reads are system calls, too; with an
//! older library only its word that its compatibility mode is off is to be had there.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use nvme::Target;
use serde::{Deserialize, Serialize};

use super::read::reopen;
use super::{CuFile, CuFileOptions, Files, ReadCounts, Staging};
use crate::control::Control;
use crate::driver::DeviceMemory;
use crate::error::{Error, ErrorKind, Result};
use crate::lane::{Lane, Run};
use crate::paths::System;
use crate::source::Source;

/// Bytes of the reads that are compared.
const PIECE: u64 = 4 << 20;
/// Bytes on both sides of a read that must not change.
const MARGIN: u64 = 64 << 10;
/// What they hold.
const MARGIN_BYTE: u8 = 0x5a;
/// Bytes of one of the four reads that are timed.
const TIMED: u64 = 64 << 20;
/// A file must have as many bytes to be tested with.
pub(crate) const FILE_MIN: u64 = 1 << 20;

/// What came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every byte was right, and it is not slower than the bounce path.
    Passed,
    /// Every byte was right, but the bounce path is faster.
    Slower,
    /// It is not to be trusted.
    Refused,
}

/// The result of a self-test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelfTest {
    /// What came out.
    pub verdict: Verdict,
    /// Why, in words.
    pub why: String,
    /// Bytes that were compared.
    pub compared_bytes: u64,
    /// What cuFile did, bytes per second.
    pub cufile_bytes_per_second: Option<f64>,
    /// What the bounce path did beside it.
    pub bounce_bytes_per_second: Option<f64>,
}

/// What is tested.
pub(crate) struct Subject<'a> {
    pub cufile: &'a Arc<dyn CuFile>,
    pub system: &'a System,
    /// A source that is one file, of at least [`FILE_MIN`] bytes.
    pub source: &'a Source,
    /// Reads go by the kernel's peer-to-peer DMA.
    pub peer_to_peer: bool,
    pub options: CuFileOptions,
    /// From which share of the bounce path's speed on it is not slower.
    pub not_slower: f64,
}

/// Tests. An error is of the test itself (cancelled, no memory, the file changed) and says nothing of cuFile.
pub(crate) fn self_test(
    lane: &mut Lane,
    subject: &Subject<'_>,
    control: &mut Control<'_>,
) -> Result<SelfTest> {
    let refused = |why: String, compared| SelfTest {
        verdict: Verdict::Refused,
        why,
        compared_bytes: compared,
        cufile_bytes_per_second: None,
        bounce_bytes_per_second: None,
    };
    subject.cufile.count_reads(true);
    let compared = compare(lane, subject, control);
    let counted = subject.cufile.counted();
    subject.cufile.count_reads(false);
    let compared =
        match compared.and_then(|compared| counts_fit(counted, subject.peer_to_peer).map(|()| compared)) {
            Ok(compared) => compared,
            Err(Bad::Refused(why)) => return Ok(refused(why, 0)),
            Err(Bad::Failed(error)) => return Err(error),
        };
    let (cufile, bounce) = match race(lane, subject, control) {
        Ok(rates) => rates,
        Err(Bad::Refused(why)) => return Ok(refused(why, compared)),
        Err(Bad::Failed(error)) => return Err(error),
    };
    let gb = |rate: f64| format!("{:.2} GB/s", rate / 1e9);
    let (verdict, words) = match cufile >= subject.not_slower * bounce {
        true => (Verdict::Passed, "all bytes were right"),
        false => (Verdict::Slower, "all bytes were right, but the bounce path is faster"),
    };
    Ok(SelfTest {
        verdict,
        why: format!("self-test: {words} ({} against {})", gb(cufile), gb(bounce)),
        compared_bytes: compared,
        cufile_bytes_per_second: Some(cufile),
        bounce_bytes_per_second: Some(bounce),
    })
}

/// Whether an error is of the caller, the file or this moment, not of cuFile. What the device itself fails at is told apart
/// where it happens.
fn says_nothing(error: &Error) -> bool {
    use ErrorKind as K;
    matches!(
        error.kind(),
        K::Cancelled
            | K::Timeout
            | K::OutOfDeviceMemory
            | K::OutOfHostMemory
            | K::Changed
            | K::NotFound
            | K::Busy
    )
}

enum Bad {
    Refused(String),
    Failed(Error),
}

impl From<Error> for Bad {
    fn from(error: Error) -> Bad {
        match says_nothing(&error) {
            true => Bad::Failed(error),
            false => Bad::Refused(format!("the self-test failed: {error}")),
        }
    }
}

/// Whether the library's own counts say that the reads took the way that is tested. Others of this process may read meanwhile.
fn counts_fit(counts: Option<ReadCounts>, peer_to_peer: bool) -> std::result::Result<(), Bad> {
    let Some(ReadCounts { total, peer_to_peer: by_peer, nvidia_fs, posix }) = counts else { return Ok(()) };
    let wanted = if peer_to_peer { by_peer } else { nvidia_fs };
    if posix > 0 {
        return Err(Bad::Refused(format!(
            "libcufile counted {posix} of {total} reads of the self-test by pread: that is cuFile's compatibility mode, not \
             GPUDirect"
        )));
    }
    match total > 0 && wanted == 0 {
        true => Err(Bad::Refused(format!(
            "libcufile counted none of the {total} reads of the self-test by this way ({nvidia_fs} by nvidia-fs, {by_peer} by \
             peer-to-peer DMA)"
        ))),
        false => Ok(()),
    }
}

fn descriptor(source: &Source) -> Result<i32> {
    match source.stored.first().map(|extent| extent.device.target()) {
        Some(Target::Fd(fd)) => Ok(fd.as_raw_fd()),
        _ => Err(Error::new(ErrorKind::Unsupported, format!("{} is not made of files", source.name()))),
    }
}

/// Reads a few places by cuFile and compares. Returns the bytes that were compared.
fn compare(lane: &Lane, subject: &Subject<'_>, control: &mut Control<'_>) -> std::result::Result<u64, Bad> {
    let Subject { cufile, system, source, .. } = subject;
    let (driver, name, len) = (lane.driver().clone(), source.name(), source.len());
    driver.enter().map_err(Bad::Failed)?;
    let fd = descriptor(source)?;
    let plain = File::open(format!("/proc/self/fd/{fd}"))
        .map_err(|error| Bad::Failed(Error::io(format!("open {name}"), error)))?;
    let staging = Staging::new(&driver, cufile, PIECE + 2 * MARGIN, 1)?;
    let handle = cufile.open_file(reopen(fd, name)?, name)?;
    let tail = (len.saturating_sub(PIECE / 2)) / 4096 * 4096;
    let places = [(0, PIECE), (len / 2 / 4096 * 4096, PIECE), (tail, PIECE), (len / 3 / 4096 * 4096, 4096)];
    let (mut compared, mut by_calls, mut moved) = (0, Some(0), 0);
    for (offset, asked) in places {
        control.check(0, len)?;
        let needed = asked.min(len - offset) as usize;
        let blocks = needed.next_multiple_of(4096);
        let mut expected = vec![0; needed];
        plain
            .read_exact_at(&mut expected, offset)
            .map_err(|error| Bad::Failed(Error::io(format!("read {name} to compare"), error)))?;
        let margin = MARGIN as usize;
        let mut image = vec![MARGIN_BYTE; margin + blocks + margin];
        image[margin..].iter_mut().zip(&expected).for_each(|(byte, right)| *byte = !right);
        let at = staging.at(0);
        lane.write_device(staging.base() + at, &image).map_err(Bad::Failed)?;
        let before = system.bytes_read_by_calls();
        let count = handle.read(staging.base(), at + MARGIN, blocks, offset)?;
        let after = system.bytes_read_by_calls();
        by_calls =
            by_calls.zip(before.zip(after)).map(|(sum, (before, after))| sum + after.saturating_sub(before));
        if count < needed {
            return Err(Bad::Refused(format!(
                "the self-test read {needed} bytes at {offset} of {name}: {count} came"
            )));
        }
        moved += needed as u64;
        let mut there = vec![0; image.len()];
        lane.read_device(staging.base() + at, &mut there).map_err(Bad::Failed)?;
        if there[margin..margin + needed] != expected {
            let wrong = |(_, (a, b)): &(usize, (&u8, &u8))| a != b;
            let all = there[margin..].iter().zip(&expected).enumerate().filter(wrong);
            let (mut count, mut absent, mut first) = (0u64, 0u64, None);
            for (at, (have, want)) in all {
                count += 1;
                absent += u64::from(*have == !*want);
                first.get_or_insert(offset + at as u64);
            }
            return Err(Bad::Refused(format!(
                "the self-test read {needed} bytes at {offset} of {name}: {count} are wrong on the device, the first at {}; \
                 {absent} never arrived",
                first.unwrap_or(offset)
            )));
        }
        let outside = there[..margin].iter().chain(&there[margin + blocks..]);
        if outside.copied().any(|byte| byte != MARGIN_BYTE) {
            return Err(Bad::Refused(format!(
                "the self-test read {needed} bytes at {offset} of {name}: memory beside them was written to"
            )));
        }
        compared += needed as u64;
    }
    match by_calls {
        Some(by_calls) if !subject.peer_to_peer && by_calls >= moved / 2 => Err(Bad::Refused(format!(
            "the self-test saw {by_calls} of {moved} bytes read by system calls: that is cuFile's compatibility mode, not \
             GPUDirect"
        ))),
        _ => Ok(compared),
    }
}

/// Bytes per second of cuFile and of the bounce path, in turns on different parts of the file.
fn race(
    lane: &mut Lane,
    subject: &Subject<'_>,
    control: &mut Control<'_>,
) -> std::result::Result<(f64, f64), Bad> {
    let Subject { cufile, source, options, .. } = subject;
    let driver = lane.driver().clone();
    let part = (source.len() / 4).min(TIMED) / 4096 * 4096;
    let memory = DeviceMemory::new(&driver, part).map_err(Bad::Failed)?;
    let sources = std::slice::from_ref(*source);
    let files = Files::open(cufile, sources)?;
    let (name, gap) = (|_| "the self-test".to_owned(), lane.options().gap);
    let mut spent = [0.0f64; 2];
    // One that comes first or last has no advantage of it.
    for (index, way) in [0, 1, 1, 0].into_iter().enumerate() {
        let run =
            Run { source: 0, offset: index as u64 * part, len: part, device: memory.address(), tensor: 0 };
        let mut quiet =
            Control { cancel: control.cancel.clone(), deadline: control.deadline, ..Control::default() };
        let started = Instant::now();
        match way {
            0 => {
                super::read(&driver, cufile, *options, sources, &files, &[run], gap, &name, &mut quiet)?;
            }
            _ => {
                lane.read(sources, &[run], &name, &mut quiet).map_err(Bad::Failed)?;
            }
        }
        spent[way] += started.elapsed().as_secs_f64();
        control.check(0, source.len())?;
    }
    let rate = |seconds: f64| 2.0 * part as f64 / seconds.max(1e-9);
    Ok((rate(spent[0]), rate(spent[1])))
}
