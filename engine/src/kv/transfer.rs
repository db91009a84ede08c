//! Blocks out of a store into one file and back, and a look at all of them.
//!
//! ```text
//! NVTKVEXP | version u32 | block bytes u32 | fingerprint length u32 | fingerprint | crc32 over all of it
//! 1 | key length u8 | 0 u16 | key 32 | crc32 over key length, key and bytes | bytes         for each block
//! 0 | 0 0 0 | blocks u64 | crc32 over the count                                            the end
//! ```
//!
//! All numbers are little-endian. A file without its end is refused as cut short, with what came before it stored.

use std::io::{Read, Write};

use nvme::Buffer;
use serde::{Deserialize, Serialize};

use super::record::FINGERPRINT_MAX;
use super::{BLOCK_MAX, Get, Key, Lane, Miss, Put, Store, Stored, View};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"NVTKVEXP";
const VERSION: u32 = 1;
const BLOCK: u8 = 1;
const END: u8 = 0;
/// Bytes of blocks that are moved at a time.
const BATCH_BYTES: usize = 32 << 20;

/// What an export, an import or a look came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Blocks that are whole: written out, stored, or looked at.
    pub blocks: u64,
    /// Blocks that were asked for and are not there, or that a store had already.
    pub skipped: u64,
    /// Blocks that a store refused: for want of room, by its budgets.
    pub refused: u64,
    /// Blocks that were damaged or could not be read; they are dropped.
    pub bad: u64,
}

fn sum(key: &Key, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[key.len() as u8]);
    hasher.update(key.padded());
    hasher.update(bytes);
    hasher.finalize()
}

fn malformed(why: &str) -> Error {
    Error::new(ErrorKind::Malformed, format!("this is no export of a KV store: {why}"))
}

fn cut(error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => malformed("it ends in the middle"),
        _ => Error::io("read an export of a KV store", error),
    }
}

fn take<const N: usize>(from: &mut dyn Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map_err(cut)?;
    Ok(bytes)
}

fn batch_of(view: &View) -> usize {
    (BATCH_BYTES / view.slot_bytes()).clamp(1, 256)
}

impl Store {
    /// Every namespace and tenant that have blocks: number of the namespace, the tenant's name, the view.
    pub fn views(&self) -> Result<Vec<(u16, String, View)>> {
        let mut pairs: Vec<(u16, u16)> = {
            let state = self.shared().state();
            state.table.iter().map(|(_, block)| (block.namespace, block.tenant)).collect()
        };
        pairs.sort_unstable();
        pairs.dedup();
        let (namespaces, tenants) = (self.namespaces(), self.tenants());
        let view = |(namespace, tenant): (u16, u16)| {
            let namespace = namespaces.get(usize::from(namespace))?;
            let tenant = tenants.get(usize::from(tenant))?;
            let view = self.view(&namespace.fingerprint, namespace.block_bytes, &tenant.name);
            Some(view.map(|view| (namespace.id, tenant.name.clone(), view)))
        };
        pairs.into_iter().filter_map(view).collect()
    }

    /// Writes blocks out, in the order of `keys`: a prefix, as one file. What is not there is passed over.
    pub fn export(
        &self,
        view: &View,
        fingerprint: &[u8],
        keys: &[Key],
        out: &mut dyn Write,
    ) -> Result<Moved> {
        let failed = |error| Error::io("write an export of a KV store", error);
        let mut head = MAGIC.to_vec();
        for number in [VERSION, view.block_bytes(), fingerprint.len() as u32] {
            head.extend_from_slice(&number.to_le_bytes());
        }
        head.extend_from_slice(fingerprint);
        head.extend_from_slice(&crc32fast::hash(&head).to_le_bytes());
        out.write_all(&head).map_err(failed)?;
        let mut moved = Moved::default();
        let mut lane = self.lane(None)?;
        lane.each(view, keys, &mut moved, &mut |key, bytes| {
            let mut frame = [0; 40];
            (frame[0], frame[1]) = (BLOCK, key.len() as u8);
            frame[4..36].copy_from_slice(key.padded());
            frame[36..].copy_from_slice(&sum(key, bytes).to_le_bytes());
            out.write_all(&frame).and_then(|()| out.write_all(bytes)).map_err(failed)
        })?;
        let mut end = [0; 16];
        end[0] = END;
        end[4..12].copy_from_slice(&moved.blocks.to_le_bytes());
        end[12..].copy_from_slice(&crc32fast::hash(&moved.blocks.to_le_bytes()).to_le_bytes());
        out.write_all(&end).and_then(|()| out.flush()).map_err(failed)?;
        Ok(moved)
    }

    /// Stores the blocks of an export for a tenant, under the fingerprint that it has, durably. `Malformed`: it is none, it is damaged or cut
    /// short; blocks before that place are stored.
    pub fn import(&self, from: &mut dyn Read, tenant: &str) -> Result<Moved> {
        let mut head = take::<20>(from)?.to_vec();
        let field = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (version, block_bytes, len) = (field(8), field(12), field(16) as usize);
        if &head[..8] != MAGIC {
            return Err(malformed("it begins with something else"));
        }
        if version > VERSION {
            let text =
                format!("an export of version {version}, this program knows {VERSION}: use a newer nvtier");
            return Err(Error::new(ErrorKind::NewerFormat, text));
        }
        if len > FINGERPRINT_MAX || block_bytes == 0 || block_bytes > BLOCK_MAX {
            return Err(malformed("its sizes are impossible"));
        }
        let mut fingerprint = vec![0; len];
        from.read_exact(&mut fingerprint).map_err(cut)?;
        head.extend_from_slice(&fingerprint);
        if take::<4>(from)? != crc32fast::hash(&head).to_le_bytes() {
            return Err(malformed("its head fails its checksum"));
        }
        let view = self.view(&fingerprint, block_bytes, tenant)?;
        let mut lane = self.lane(None)?;
        let mut moved = Moved::default();
        let mut read = 0;
        let mut puts: Vec<Put> = Vec::new();
        let done = loop {
            match next(from, &view, read) {
                Ok(Some(put)) => puts.push(put),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
            read += 1;
            if puts.len() == batch_of(&view) {
                store_all(&mut lane, &view, std::mem::take(&mut puts), &mut moved)?;
            }
        };
        store_all(&mut lane, &view, puts, &mut moved)?;
        self.flush()?;
        done.map(|()| moved)
    }

    /// Reads every block and compares it with its sum; what is bad is dropped. `progress` gets the blocks looked at so far.
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<Moved> {
        let mut moved = Moved::default();
        let mut lane = self.lane(None)?;
        for (_, _, view) in self.views()? {
            let keys: Vec<Key> = view.blocks().into_iter().map(|(key, _)| key).collect();
            for keys in keys.chunks(batch_of(&view)) {
                lane.each(&view, keys, &mut moved, &mut |_, _| Ok(()))?;
                progress(moved.blocks + moved.bad);
            }
        }
        Ok(moved)
    }
}

/// The next block of an export; `None` at its end.
fn next(from: &mut dyn Read, view: &View, read: u64) -> Result<Option<Put>> {
    let head = take::<4>(from)?;
    if head[0] == END {
        let (count, crc) = (take::<8>(from)?, take::<4>(from)?);
        if crc32fast::hash(&count).to_le_bytes() != crc || u64::from_le_bytes(count) != read {
            return Err(malformed("blocks are missing"));
        }
        return Ok(None);
    }
    if head[0] != BLOCK {
        return Err(malformed("something that is no block"));
    }
    let (padded, crc) = (take::<32>(from)?, take::<4>(from)?);
    let key = Key::from_padded(padded, head[1]).ok_or_else(|| malformed("a key of impossible length"))?;
    let mut buffer = Buffer::heap(view.slot_bytes()).map_err(Error::from)?;
    let bytes = &mut buffer[..view.block_bytes() as usize];
    from.read_exact(bytes).map_err(cut)?;
    if sum(&key, bytes).to_le_bytes() != crc {
        return Err(malformed(&format!("block {key} fails its checksum")));
    }
    Ok(Some(Put { key, buffer, start: 0 }))
}

fn store_all(lane: &mut Lane, view: &View, puts: Vec<Put>, moved: &mut Moved) -> Result<()> {
    for done in lane.put(view, puts)? {
        match done.result {
            Stored::New => moved.blocks += 1,
            Stored::Present => moved.skipped += 1,
            Stored::Refused(_) => moved.refused += 1,
            Stored::Failed(error) => return Err(error.context(format!("storing block {}", done.key))),
        }
    }
    Ok(())
}

impl Lane {
    /// Loads blocks and gives those that are there to `each`, in order.
    fn each(
        &mut self,
        view: &View,
        keys: &[Key],
        moved: &mut Moved,
        each: &mut dyn FnMut(&Key, &[u8]) -> Result<()>,
    ) -> Result<()> {
        for keys in keys.chunks(batch_of(view)) {
            let mut gets = Vec::with_capacity(keys.len());
            for key in keys {
                let buffer = Buffer::heap(view.slot_bytes()).map_err(Error::from)?;
                gets.push(Get { key: *key, buffer, start: 0 });
            }
            for done in self.get(view, gets)? {
                match (done.result, done.buffer) {
                    (Ok(()), Some(buffer)) => {
                        moved.blocks += 1;
                        each(&done.key, &buffer[..view.block_bytes() as usize])?;
                    }
                    (Err(Miss::Absent), _) => moved.skipped += 1,
                    _ => moved.bad += 1,
                }
            }
        }
        Ok(())
    }
}
