//! The catalog's store on a raw member: redb over a *zone*, a fixed range of a device.
//!
//! redb wants a file: a length that changes, reads, writes, a sync. The zone gives it one: a header says how long the
//! "file" is now, the rest is its bytes.
//!
//! ```text
//! zone start
//! +0        header slot 0 (4096 bytes)
//! +4096     header slot 1 (4096 bytes)
//! +65536    bytes of the database, up to the zone's end
//!
//! header, little-endian:
//! 0          8          12          16              24            32         36
//! +----------+----------+-----------+---------------+-------------+----------+--- zeros
//! | NVTZONE1 | version  | reserved  | sequence      | length      | crc32    |
//! +----------+----------+-----------+---------------+-------------+----------+---
//! ```
//!
//! A new length goes to the slot that does not hold the current one, with the next sequence number; the valid slot with the
//! higher number counts. A slot is overwritten only after the other one is durable, so a torn write leaves one of them.
//! Growth writes zeros, which redb's contract asks for. Growth beyond the zone is `StorageFull`, which the catalog reports
//! as no space.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use nvme::{Buffer, Device};
use redb::StorageBackend;

use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"NVTZONE1";
const VERSION: u32 = 1;
const SLOT_BYTES: u64 = 4096;
const HEADER_BYTES: usize = 36;
/// Bytes before the database: two slots, rounded up to what suits any drive.
pub const ZONE_HEAD_BYTES: u64 = 64 << 10;
const ZERO_BYTES: usize = 1 << 20;

/// A growing "file" in a fixed range of a device.
#[derive(Debug)]
pub struct ZoneBackend {
    device: Arc<dyn Device>,
    start: u64,
    capacity: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    len: u64,
    sequence: u64,
    /// The slot of `sequence` is written but not yet durable.
    header_dirty: bool,
    /// Something was written since the last flush.
    data_dirty: bool,
}

impl ZoneBackend {
    /// Makes an empty zone at `start`, `len` bytes long with its head. Overwrites what was there. Durable when it returns.
    pub fn create(device: Arc<dyn Device>, start: u64, len: u64) -> Result<ZoneBackend> {
        let capacity = capacity(&device, start, len)?;
        let zone = ZoneBackend {
            device,
            start,
            capacity,
            state: Mutex::new(State { len: 0, sequence: 1, header_dirty: false, data_dirty: false }),
        };
        // Both slots, so that a slot of an older zone here cannot come back.
        for sequence in [1, 2] {
            zone.write_header(sequence, 0).map_err(|e| zone.error(e, "writing the zone header"))?;
        }
        zone.device.flush().map_err(|e| zone.error(e, "flushing the zone header"))?;
        zone.lock().sequence = 2;
        Ok(zone)
    }

    /// Opens the zone at `start`.
    pub fn open(device: Arc<dyn Device>, start: u64, len: u64) -> Result<ZoneBackend> {
        let capacity = capacity(&device, start, len)?;
        let mut newest: Option<(u64, u64)> = None;
        let mut newer_format = None;
        for slot in 0..2 {
            let mut bytes = [0u8; HEADER_BYTES];
            device.read_at(start + slot * SLOT_BYTES, &mut bytes).map_err(|e| {
                Error::from(e).context(format!("reading the catalog zone of {}", device.name()))
            })?;
            match decode(&bytes) {
                Some(Header { version, .. }) if version > VERSION => newer_format = Some(version),
                Some(Header { sequence, len, .. })
                    if len <= capacity && newest.is_none_or(|(known, _)| sequence > known) =>
                {
                    newest = Some((sequence, len))
                }
                _ => {}
            }
        }
        if let Some(version) = newer_format {
            return Err(Error::new(
                ErrorKind::NewerFormat,
                format!(
                    "catalog zone of {} has version {version}, this program knows {VERSION}",
                    device.name()
                ),
            ));
        }
        let Some((sequence, len)) = newest else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "both headers of the catalog zone of {} (at byte {start}) are damaged",
                    device.name()
                ),
            ));
        };
        Ok(ZoneBackend {
            device,
            start,
            capacity,
            state: Mutex::new(State { len, sequence, header_dirty: false, data_dirty: false }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn error(&self, error: nvme::Error, doing: &str) -> Error {
        Error::from(error).context(format!("{doing} on {}", self.device.name()))
    }

    fn write_header(&self, sequence: u64, len: u64) -> nvme::Result<()> {
        let mut slot = Buffer::heap(SLOT_BYTES as usize)?;
        slot.fill(0);
        slot[..HEADER_BYTES].copy_from_slice(&encode(sequence, len));
        self.device.write_at(self.start + (sequence % 2) * SLOT_BYTES, &slot)
    }

    fn check(&self, state: &State, offset: u64, len: usize) -> io::Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= state.len => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{len} bytes at {offset} lie beyond the {} bytes of the catalog", state.len),
            )),
        }
    }

    fn data_offset(&self, offset: u64) -> u64 {
        self.start + ZONE_HEAD_BYTES + offset
    }
}

fn capacity(device: &Arc<dyn Device>, start: u64, len: u64) -> Result<u64> {
    let inside = start.checked_add(len).is_some_and(|end| end <= device.len());
    if !inside || len <= ZONE_HEAD_BYTES || !start.is_multiple_of(SLOT_BYTES) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "a catalog zone of {len} bytes at {start} does not fit the {} bytes of {}",
                device.len(),
                device.name()
            ),
        ));
    }
    Ok(len - ZONE_HEAD_BYTES)
}

struct Header {
    version: u32,
    sequence: u64,
    len: u64,
}

fn encode(sequence: u64, len: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0u8; HEADER_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes[24..32].copy_from_slice(&len.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..32]);
    bytes[32..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default());
    let sound = &bytes[..8] == MAGIC && u32_at(32) == crc32fast::hash(&bytes[..32]);
    sound.then(|| Header { version: u32_at(8), sequence: u64_at(16), len: u64_at(24) })
}

impl StorageBackend for ZoneBackend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.check(&self.lock(), offset, out.len())?;
        self.device.read_at(self.data_offset(offset), out).map_err(io::Error::other)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.lock();
        if len > self.capacity {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "the catalog needs {len} bytes, its zone on {} has {}",
                    self.device.name(),
                    self.capacity
                ),
            ));
        }
        if len > state.len {
            let mut zeros = Buffer::heap(ZERO_BYTES).map_err(io::Error::other)?;
            zeros.fill(0);
            let mut at = state.len;
            while at < len {
                let n = (len - at).min(ZERO_BYTES as u64);
                self.device.write_at(self.data_offset(at), &zeros[..n as usize]).map_err(io::Error::other)?;
                at += n;
            }
        }
        if state.header_dirty {
            // The slot to be overwritten next is the one that still counts on the drive.
            self.device.flush().map_err(io::Error::other)?;
        }
        self.write_header(state.sequence + 1, len).map_err(io::Error::other)?;
        *state = State { len, sequence: state.sequence + 1, header_dirty: true, data_dirty: true };
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        // Held over the flush: a set_len in between must not lose its mark.
        let mut state = self.lock();
        if state.data_dirty || state.header_dirty {
            self.device.flush().map_err(io::Error::other)?;
            state.data_dirty = false;
            state.header_dirty = false;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(&self.lock(), offset, data.len())?;
        let written = self.device.write_at(self.data_offset(offset), data).map_err(io::Error::other);
        // After the write, so that a flush that began before its end does not clear the mark; and also where it failed, halfway.
        self.lock().data_dirty = true;
        written
    }
}

#[cfg(test)]
mod tests;
