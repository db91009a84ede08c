//! Superblocks: two copies on every member that say which pool it belongs to and how the pool is built.
//!
//! ```text
//! offset  size
//!      0     8  magic "NVTIERSB"
//!      8     4  version                       \ magic, version and sum stay where they are
//!     12     4  CRC-32 of all 4096 bytes,     / in every version to come
//!                 this field taken as zero
//!     16    16  pool id (UUID)
//!     32     2  index of this member; 0xffff: not a member, only points to them
//!     34     2  number of members
//!     36     4  chunk size in bytes
//!     40     8  stripe unit in bytes
//!     48     8  time of format, seconds since the epoch
//!     56     8  sequence: rises with every write of the superblock
//!     64     8  catalog zone: offset          \
//!     72     8  catalog zone: length           | raw members;
//!     80     8  data area: offset              | 0 in a directory
//!     88     8  data area: length             /  (here: quota, 0 for none)
//!     96     2  length of the path behind the table: where the directory with index 0xffff was at format
//!     98    30  zero
//!    128     .  member table, in order: id 16 | kind 1 | zero 1 | path length 2 | bytes 8 | path
//! ```
//!
//! All numbers are little-endian. A directory holds both copies in the file `superblock`, at 0 and 4096; a raw member holds one in
//! its first and one in its last 4096 bytes, so that wiping either end leaves the other.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::pool::{DeviceHook, MAX_CHUNK_SIZE, MAX_MEMBERS, MIN_CHUNK_SIZE, MemberKind};
use nvme::{Device, DeviceOptions};

pub mod foreign;
pub(crate) mod place;

#[cfg(test)]
mod tests;

/// Bytes of one copy.
pub const SUPERBLOCK_BYTES: usize = 4096;
/// The version that this program writes, and the newest it reads.
pub const VERSION: u32 = 1;
/// First bytes of every copy.
pub const MAGIC: [u8; 8] = *b"NVTIERSB";
/// Index in a directory that only points to the members.
pub const POINTER: u16 = u16::MAX;
/// The file of a directory that holds both copies.
pub const SUPERBLOCK_FILE: &str = "superblock";
const TABLE: usize = 128;
const TABLE_ENTRY: usize = 28;

/// A member in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberEntry {
    /// Its id.
    pub id: [u8; 16],
    /// What it is.
    pub kind: MemberKind,
    /// Data bytes; of a directory its quota, 0 for none.
    pub bytes: u64,
    /// Where it was at format.
    pub path: PathBuf,
}

/// A superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The pool's id.
    pub pool: [u8; 16],
    /// Index of the member that holds it, or [`POINTER`].
    pub index: u16,
    /// Bytes under one checksum.
    pub chunk_size: u32,
    /// Bytes on one member before the next one's turn.
    pub stripe_unit: u64,
    /// When the pool was made, seconds since the epoch.
    pub created: i64,
    /// Rises with every write.
    pub sequence: u64,
    /// Raw members: where the catalog zone starts.
    pub catalog_offset: u64,
    /// Raw members: length of the catalog zone.
    pub catalog_len: u64,
    /// Raw members: where the data area starts.
    pub data_offset: u64,
    /// Raw members: length of the data area. Directories: quota, 0 for none.
    pub data_len: u64,
    /// All members by index.
    pub members: Vec<MemberEntry>,
    /// With index [`POINTER`]: where that directory was at format. Else empty.
    pub own_path: PathBuf,
}

/// One copy, as found.
#[derive(Debug, PartialEq, Eq)]
enum Copy {
    Good(Superblock),
    /// Of a later version.
    Newer(u32),
    /// Once a superblock: says why it is none any more.
    Damaged(String),
    /// Never a superblock.
    Absent,
}

/// What a member's two copies yield.
#[derive(Debug)]
pub struct Found {
    /// The newer good copy.
    pub superblock: Superblock,
    /// What is wrong with the other, when something is: it wants to be written again.
    pub damaged: Option<String>,
}

impl Superblock {
    /// The bytes of a copy. Fails when the member paths do not fit.
    pub fn encode(&self) -> Result<[u8; SUPERBLOCK_BYTES]> {
        let mut block = [0u8; SUPERBLOCK_BYTES];
        block[..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        block[16..32].copy_from_slice(&self.pool);
        block[32..34].copy_from_slice(&self.index.to_le_bytes());
        block[34..36].copy_from_slice(&(self.members.len() as u16).to_le_bytes());
        block[36..40].copy_from_slice(&self.chunk_size.to_le_bytes());
        let words = [
            self.stripe_unit,
            self.created as u64,
            self.sequence,
            self.catalog_offset,
            self.catalog_len,
            self.data_offset,
            self.data_len,
        ];
        for (index, word) in words.into_iter().enumerate() {
            block[40 + index * 8..48 + index * 8].copy_from_slice(&word.to_le_bytes());
        }
        let mut at = TABLE;
        for member in &self.members {
            let path = member.path.as_os_str().as_bytes();
            if at + TABLE_ENTRY + path.len() > SUPERBLOCK_BYTES {
                return Err(Error::new(
                    ErrorKind::NameTooLong,
                    format!(
                        "the paths of {} members do not fit into a superblock ({} bytes for all): use shorter paths",
                        self.members.len(),
                        SUPERBLOCK_BYTES - TABLE - TABLE_ENTRY * self.members.len()
                    ),
                ));
            }
            block[at..at + 16].copy_from_slice(&member.id);
            block[at + 16] = match member.kind {
                MemberKind::Directory => 1,
                MemberKind::Block => 2,
                MemberKind::Image => 3,
            };
            block[at + 18..at + 20].copy_from_slice(&(path.len() as u16).to_le_bytes());
            block[at + 20..at + 28].copy_from_slice(&member.bytes.to_le_bytes());
            block[at + 28..at + 28 + path.len()].copy_from_slice(path);
            at += TABLE_ENTRY + path.len();
        }
        let own = self.own_path.as_os_str().as_bytes();
        match block.get_mut(at..at + own.len()) {
            Some(place) => place.copy_from_slice(own),
            None => {
                return Err(Error::new(
                    ErrorKind::NameTooLong,
                    "the pool's path does not fit into a superblock",
                ));
            }
        }
        block[96..98].copy_from_slice(&(own.len() as u16).to_le_bytes());
        let sum = crc32fast::hash(&block);
        block[12..16].copy_from_slice(&sum.to_le_bytes());
        Ok(block)
    }

    fn decode(block: &[u8]) -> Copy {
        if block.len() < 16 || block[..8] != MAGIC {
            return Copy::Absent;
        }
        let Ok(block) = <&[u8; SUPERBLOCK_BYTES]>::try_from(block) else {
            return Copy::Damaged(format!("it is cut short at {} bytes", block.len()));
        };
        let u16_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap_or_default());
        let u64_at = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().unwrap_or_default());
        let mut zeroed = *block;
        zeroed[12..16].fill(0);
        if crc32fast::hash(&zeroed) != u32_at(12) {
            return Copy::Damaged("it fails its checksum".into());
        }
        if u32_at(8) > VERSION {
            return Copy::Newer(u32_at(8));
        }
        let count = u16_at(34) as usize;
        let mut members = Vec::with_capacity(count.min(MAX_MEMBERS));
        let mut at = TABLE;
        for _ in 0..count {
            let Some(entry) = block.get(at..at + TABLE_ENTRY) else {
                return Copy::Damaged("its member table runs over the end".into());
            };
            let kind = match entry[16] {
                1 => MemberKind::Directory,
                2 => MemberKind::Block,
                3 => MemberKind::Image,
                other => return Copy::Damaged(format!("it names a member of kind {other}")),
            };
            let len = u16_at(at + 18) as usize;
            let Some(path) = block.get(at + TABLE_ENTRY..at + TABLE_ENTRY + len) else {
                return Copy::Damaged("its member table runs over the end".into());
            };
            members.push(MemberEntry {
                id: entry[..16].try_into().unwrap_or_default(),
                kind,
                bytes: u64_at(at + 20),
                path: PathBuf::from(std::ffi::OsString::from_vec(path.to_vec())),
            });
            at += TABLE_ENTRY + len;
        }
        let Some(own) = block.get(at..at + u16_at(96) as usize) else {
            return Copy::Damaged("its own path runs over the end".into());
        };
        let superblock = Superblock {
            own_path: PathBuf::from(std::ffi::OsString::from_vec(own.to_vec())),
            pool: block[16..32].try_into().unwrap_or_default(),
            index: u16_at(32),
            chunk_size: u32_at(36),
            stripe_unit: u64_at(40),
            created: u64_at(48) as i64,
            sequence: u64_at(56),
            catalog_offset: u64_at(64),
            catalog_len: u64_at(72),
            data_offset: u64_at(80),
            data_len: u64_at(88),
            members,
        };
        match superblock.check() {
            Ok(()) => Copy::Good(superblock),
            Err(why) => Copy::Damaged(why),
        }
    }

    /// What a good checksum does not promise.
    fn check(&self) -> std::result::Result<(), String> {
        let count = self.members.len();
        if count == 0 || count > MAX_MEMBERS || (self.index != POINTER && self.index as usize >= count) {
            return Err(format!("it says member {} of {count}", self.index));
        }
        if !self.chunk_size.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&self.chunk_size)
        {
            return Err(format!("it says a chunk size of {}", self.chunk_size));
        }
        if self.stripe_unit == 0 || !self.stripe_unit.is_multiple_of(self.chunk_size as u64) {
            return Err(format!("it says a stripe unit of {}", self.stripe_unit));
        }
        let zones = [(self.catalog_offset, self.catalog_len), (self.data_offset, self.data_len)];
        if zones.iter().any(|(offset, len)| offset.checked_add(*len).is_none()) {
            return Err("its zones run over 2^64".into());
        }
        let raw = self.members.get(self.index as usize).is_some_and(|member| member.kind.is_raw());
        let mut zones = zones.map(|(offset, len)| offset..offset + len).to_vec();
        zones.retain(|zone| raw && !zone.is_empty());
        zones.sort_by_key(|zone| zone.start);
        let first = zones.first().map_or(u64::MAX, |zone| zone.start);
        if first < SUPERBLOCK_BYTES as u64 || zones.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err(format!("its superblock, catalog and data lie over each other: {zones:?}"));
        }
        Ok(())
    }
}

/// Where a member keeps its copies.
fn offsets(kind: MemberKind, len: u64) -> [u64; 2] {
    let copy = SUPERBLOCK_BYTES as u64;
    match kind {
        MemberKind::Directory => [0, copy],
        _ => [0, (len / copy * copy).saturating_sub(copy)],
    }
}

/// The file that the copies are in.
fn file_of(path: &Path, kind: MemberKind) -> PathBuf {
    match kind {
        MemberKind::Directory => path.join(SUPERBLOCK_FILE),
        _ => path.to_path_buf(),
    }
}

/// Length of a file or block device in bytes.
fn length(file: &mut File) -> std::io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

fn read_copy(file: &File, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut block = vec![0; SUPERBLOCK_BYTES];
    let mut done = 0;
    while done < block.len() {
        match file.read_at(&mut block[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    block.truncate(done);
    Ok(block)
}

/// Reads a member's superblock: the newer of the good copies.
pub fn read(path: &Path, kind: MemberKind) -> Result<Found> {
    read_through(path, kind, None)
}

/// The same; a raw member's bytes come through `hook` where there is one.
pub(crate) fn read_through(path: &Path, kind: MemberKind, hook: Option<&DeviceHook>) -> Result<Found> {
    if let Some(device) = hooked(path, kind, true, hook)? {
        let copies = offsets(kind, device.len()).map(|offset| {
            let mut block = vec![0; SUPERBLOCK_BYTES];
            match device.read_at(offset, &mut block) {
                Ok(()) => Superblock::decode(&block),
                Err(error) => Copy::Damaged(format!("it cannot be read: {error}")),
            }
        });
        return choose(path, copies.into());
    }
    let at = file_of(path, kind);
    let what = format!("read the superblock of {}", path.display());
    let mut file = File::open(&at).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound if kind == MemberKind::Directory && path.is_dir() => Error::with_source(
            ErrorKind::NotAPool,
            format!("{} is not a pool: it has no superblock", path.display()),
            error,
        ),
        _ => Error::io(what.clone(), error),
    })?;
    let len = length(&mut file).map_err(|error| Error::io(what.clone(), error))?;
    let mut copies = Vec::new();
    for offset in offsets(kind, len) {
        copies.push(match read_copy(&file, offset) {
            Ok(block) => Superblock::decode(&block),
            Err(error) => Copy::Damaged(format!("it cannot be read: {error}")),
        });
    }
    choose(path, copies)
}

/// As [`read`], of a raw member that is open already.
pub fn read_device(device: &dyn Device) -> Result<Found> {
    let copies = offsets(MemberKind::Image, device.len()).map(|offset| {
        let mut block = vec![0; SUPERBLOCK_BYTES];
        match device.read_at(offset, &mut block) {
            Ok(()) => Superblock::decode(&block),
            Err(error) => Copy::Damaged(format!("it cannot be read: {}", Error::from(error).chain())),
        }
    });
    choose(Path::new(device.name()), copies.into())
}

/// As [`write()`], to a raw member that is open already.
pub fn write_device(device: &dyn Device, superblock: &Superblock) -> Result<()> {
    let block = superblock.encode()?;
    for offset in offsets(MemberKind::Image, device.len()) {
        device.write_at(offset, &block).and_then(|()| device.flush()).map_err(|error| {
            Error::from(error).context(format!("write the superblock of {}", device.name()))
        })?;
    }
    Ok(())
}

/// Takes both copies away from a raw member, durably.
pub fn erase_device(device: &dyn Device) -> Result<()> {
    let zeros = [0; SUPERBLOCK_BYTES];
    let erased = offsets(MemberKind::Image, device.len())
        .into_iter()
        .try_for_each(|offset| device.write_at(offset, &zeros))
        .and_then(|()| device.flush());
    erased.map_err(|error| Error::from(error).context(format!("erase the superblock of {}", device.name())))
}

/// What the bytes of both copies yield.
pub(crate) fn from_copies(path: &Path, copies: &[&[u8]]) -> Result<Found> {
    choose(path, copies.iter().map(|block| Superblock::decode(block)).collect())
}

fn choose(path: &Path, copies: Vec<Copy>) -> Result<Found> {
    if let Some(version) =
        copies.iter().find_map(|copy| if let Copy::Newer(version) = copy { Some(*version) } else { None })
    {
        return Err(Error::new(
            ErrorKind::NewerFormat,
            format!(
                "pool {} has format version {version}, this program knows up to {VERSION}: use a newer nvtier",
                path.display()
            ),
        ));
    }
    let mut best: Option<Superblock> = None;
    let mut wrong: Vec<String> = Vec::new();
    let mut seen = Vec::new();
    for (copy, which) in copies.into_iter().zip(["first", "second"]) {
        match copy {
            Copy::Good(superblock) => {
                seen.push((which, superblock.sequence));
                if best.as_ref().is_none_or(|best| superblock.sequence > best.sequence) {
                    best = Some(superblock);
                }
            }
            Copy::Damaged(why) => wrong.push(format!("the {which} copy of the superblock: {why}")),
            Copy::Absent | Copy::Newer(_) => {
                wrong.push(format!("the {which} copy of the superblock is gone"))
            }
        }
    }
    let Some(superblock) = best else {
        return Err(if wrong.iter().all(|why| why.ends_with("is gone")) {
            Error::new(ErrorKind::NotAPool, format!("{} is not a pool: it has no superblock", path.display()))
        } else {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "both copies of the superblock of {} are damaged: {}",
                    path.display(),
                    wrong.join("; ")
                ),
            )
        });
    };
    for (which, sequence) in seen {
        if sequence < superblock.sequence {
            wrong.push(format!("the {which} copy of the superblock is older than the other"));
        }
    }
    Ok(Found { superblock, damaged: (!wrong.is_empty()).then(|| wrong.join("; ")) })
}

/// The member's device as `hook` wants it, or that of an NVMe namespace behind its character device, which takes commands only; `None`: the
/// member is reached as a file. An open pool has claimed its namespaces already, so this does not.
fn hooked(
    path: &Path,
    kind: MemberKind,
    read_only: bool,
    hook: Option<&DeviceHook>,
) -> Result<Option<Arc<dyn Device>>> {
    let options = DeviceOptions { direct: true, read_only };
    if kind.is_raw() && nvme::passthrough::is_nvme_char(path) {
        let device: Arc<dyn Device> = Arc::new(nvme::NvmeCharDevice::open_unclaimed(path, &options)?);
        return Ok(Some(hook.map_or(device.clone(), |hook| hook.wrap(path, device))));
    }
    let Some(hook) = hook.filter(|_| kind.is_raw()) else { return Ok(None) };
    Ok(Some(hook.wrap(path, nvme::open(path, &options)?)))
}

/// Writes both copies, one after the other, each durable before the next: one of them is good at any time.
pub fn write(path: &Path, kind: MemberKind, superblock: &Superblock) -> Result<()> {
    write_through(path, kind, superblock, None)
}

/// The same; a raw member's bytes go through `hook` where there is one.
pub(crate) fn write_through(
    path: &Path,
    kind: MemberKind,
    superblock: &Superblock,
    hook: Option<&DeviceHook>,
) -> Result<()> {
    let block = superblock.encode()?;
    let what = || format!("write the superblock of {}", path.display());
    if let Some(device) = hooked(path, kind, false, hook)? {
        for offset in offsets(kind, device.len()) {
            let written = device.write_at(offset, &block).and_then(|()| device.flush());
            written.map_err(|error| Error::from(error).context(what()))?;
        }
        return Ok(());
    }
    let at = file_of(path, kind);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(kind == MemberKind::Directory)
        .truncate(false)
        .mode(0o600)
        .open(&at)
        .map_err(|error| Error::io(what(), error))?;
    let len = length(&mut file).map_err(|error| Error::io(what(), error))?;
    for offset in offsets(kind, len) {
        file.write_all_at(&block, offset)
            .and_then(|()| file.sync_all())
            .map_err(|error| Error::io(what(), error))?;
    }
    if kind == MemberKind::Directory {
        File::open(path)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| Error::io(what(), error))?;
    }
    Ok(())
}

/// A UUID in its usual form.
pub fn uuid_text(id: &[u8; 16]) -> String {
    uuid::Uuid::from_bytes(*id).hyphenated().to_string()
}
