//! Write logs of a drive, and the states in which a cut of the power may have left it.
//!
//! The format is that of the kernel's dm-log-writes, as QEMU's blklogwrites makes it: a super block of one sector, then
//! for each entry one sector (start, count, flags, length of data; counted in sectors of the size that the super block names),
//! followed by the data unless the entry is a discard.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::report::Checked;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
/// Force unit access: durable by itself.
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// One write, flush or discard.
pub struct Entry {
    /// Bytes from the start of the drive.
    offset: u64,
    /// Bytes.
    len: u64,
    flags: u64,
    /// What was written.
    data: Vec<u8>,
}

/// A whole log.
pub struct WriteLog {
    /// In the order in which the drive took them.
    entries: Vec<Entry>,
    sector: usize,
}

/// What a replay did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Replayed {
    /// Writes before the flush: all of them are there.
    pub kept: usize,
    /// Writes after it that made it.
    pub survived: usize,
    /// Of those, only in part.
    pub torn: usize,
    /// Writes after it that did not.
    pub lost: usize,
}

impl WriteLog {
    /// Reads it. What its end lacks, because the emulator was killed while it wrote, did not happen.
    pub fn read(path: &Path) -> Checked<WriteLog> {
        WriteLog::parse(&std::fs::read(path)?)
    }

    fn parse(bytes: &[u8]) -> Checked<WriteLog> {
        let word =
            |at: usize| bytes.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")));
        let sector =
            bytes.get(24..28).map_or(0, |b| u32::from_le_bytes(b.try_into().expect("4 bytes"))) as usize;
        if word(0) != Some(MAGIC) || word(8) != Some(1) || !(512..=4096).contains(&sector) {
            return Err("not a write log".into());
        }
        let mut entries = Vec::new();
        let mut at = sector;
        // Not as many as the super block says: that is as of the last flush.
        while let (Some(start), Some(count), Some(flags)) = (word(at), word(at + 8), word(at + 16)) {
            at += sector;
            let len = count as usize * sector;
            let mut data = Vec::new();
            if flags & DISCARD == 0 && len > 0 {
                let Some(part) = bytes.get(at..at + len) else { break };
                data = part.to_vec();
                at += len;
            } else if flags == 0 {
                break; // zeros: nothing was written here yet
            }
            entries.push(Entry { offset: start * sector as u64, len: len as u64, flags, data });
        }
        Ok(WriteLog { entries, sector })
    }

    /// How many flushes it holds.
    pub fn flushes(&self) -> usize {
        self.entries.iter().filter(|entry| entry.flags & FLUSH != 0).count()
    }

    /// How many writes and discards.
    #[cfg(test)]
    pub fn writes(&self) -> usize {
        self.entries.iter().filter(|entry| entry.len > 0).count()
    }

    /// Makes `image` (a fresh sparse file) what the drive may be after the power went between flush `flush` (counted from 1) and the
    /// next: everything before that flush, and of the writes after it, with a seed, a random half, one in five of them torn at a
    /// sector; without, none.
    pub fn replay(&self, image: &File, flush: usize, seed: Option<u64>) -> Checked<Replayed> {
        let mut random = Random(seed.unwrap_or(0).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut replayed = Replayed::default();
        let mut flushes = 0;
        for entry in &self.entries {
            if entry.flags & FLUSH != 0 {
                flushes += 1;
            }
            if flushes > flush {
                break;
            }
            if entry.len == 0 {
                continue;
            }
            let mut len = entry.len as usize;
            if flushes < flush {
                replayed.kept += 1;
            } else if entry.flags & FUA == 0 && (seed.is_none() || random.below(2) == 0) {
                replayed.lost += 1;
                continue;
            } else {
                replayed.survived += 1;
                if entry.flags & FUA == 0 && random.below(5) == 0 {
                    replayed.torn += 1;
                    len = random.below((len / self.sector) as u64) as usize * self.sector;
                }
            }
            let zeros;
            let data = if entry.flags & DISCARD != 0 {
                zeros = vec![0; len];
                &zeros
            } else {
                &entry.data
            };
            image.write_all_at(&data[..len], entry.offset)?;
        }
        if flushes < flush {
            return Err(format!("the log has {flushes} flushes, not {flush}").into());
        }
        Ok(replayed)
    }
}

/// xorshift64*, so that a seed gives the same cut everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(entries: &[(u64, u64, u64, u8)]) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8] = 1;
        bytes[24..28].copy_from_slice(&512u32.to_le_bytes());
        for (start, count, flags, fill) in entries {
            let mut head = vec![0; 512];
            head[..8].copy_from_slice(&start.to_le_bytes());
            head[8..16].copy_from_slice(&count.to_le_bytes());
            head[16..24].copy_from_slice(&flags.to_le_bytes());
            bytes.extend(head);
            if flags & DISCARD == 0 {
                bytes.extend(vec![*fill; *count as usize * 512]);
            }
        }
        bytes
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_only_a_part_of_the_rest() {
        let mut entries = vec![(0, 1, 0, 1), (1, 2, 0, 2), (0, 0, FLUSH, 0)];
        entries.extend((0..100).map(|n| (10 + n, 1, 0, 3)));
        entries.extend([(1, 1, DISCARD, 0), (0, 0, FLUSH, 0), (5, 1, 0, 9)]);
        let mut bytes = log(&entries);
        bytes.truncate(bytes.len() - 100); // the last write was never whole
        let log = WriteLog::parse(&bytes).unwrap();
        assert_eq!((log.flushes(), log.writes()), (2, 103));

        let run = |flush, seed| {
            let image = tempfile::tempfile().unwrap();
            image.set_len(200 * 512).unwrap();
            let replayed = log.replay(&image, flush, Some(seed)).unwrap();
            let mut out = vec![0; 200 * 512];
            image.read_exact_at(&mut out, 0).unwrap();
            (replayed, out)
        };
        let (replayed, out) = run(1, 1);
        assert_eq!(replayed.kept, 2);
        assert_eq!(replayed.survived + replayed.lost, 101);
        assert!((20..80).contains(&replayed.lost), "{replayed:?}");
        assert!(out[..512].iter().all(|b| *b == 1) && out[1024..1536].iter().all(|b| *b == 2));
        assert_eq!(run(1, 1), (replayed, out), "the same seed is the same cut");
        assert_ne!(run(1, 2).1, run(1, 1).1);
        let image = tempfile::tempfile().unwrap();
        assert_eq!(
            log.replay(&image, 1, None).unwrap(),
            Replayed { kept: 2, lost: 101, ..Replayed::default() }
        );

        let (replayed, out) = run(2, 1);
        assert_eq!((replayed.kept, replayed.lost + replayed.survived), (103, 0));
        assert!(out[512..1024].iter().all(|b| *b == 0), "discarded");
        let image = tempfile::tempfile().unwrap();
        assert!(log.replay(&image, 3, Some(1)).is_err());
    }

    #[test]
    fn other_files_are_refused() {
        assert!(WriteLog::parse(&[0; 4096]).is_err());
        assert!(WriteLog::parse(b"").is_err());
    }
}
