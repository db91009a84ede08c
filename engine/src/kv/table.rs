//! Blocks by key, in memory: 64 bytes a block and a hash table of numbers.

use hashbrown::HashTable;

use super::Key;
use super::policy::{Entries, FREQUENCY_MAX, Queue, View};
use super::record::{Block, PINNED};

/// No slab: the entry is free.
const NOWHERE: u32 = u32::MAX;
/// In `flags`, in memory only: in the main queue, not the small one.
const MAIN: u8 = 2;
/// In `flags`, in memory only: how often it was asked for.
const FREQUENCY_SHIFT: u8 = 2;

/// Whose block, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    pub namespace: u16,
    pub tenant: u16,
    pub key: Key,
}

impl Name {
    pub(crate) fn of(block: &Block) -> Name {
        Name { namespace: block.namespace, tenant: block.tenant, key: block.key }
    }

    /// Keys are hashes already, but nothing here depends on how good they are.
    pub(crate) fn hash(&self) -> u64 {
        let bytes = self.key.padded();
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let owner = (u64::from(self.namespace) << 16) | u64::from(self.tenant);
        [word(0), word(8), word(16), word(24)].into_iter().fold(mix(owner), |hash, word| mix(hash ^ word))
    }
}

/// splitmix64.
fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The blocks.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: Vec<Block>,
    free: Vec<u32>,
    table: HashTable<u32>,
    /// Seconds since the epoch, as of the last look at the clock.
    pub now: u64,
}

impl Table {
    /// Blocks.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// One more than the highest number of an entry.
    pub(crate) fn bound(&self) -> u32 {
        self.entries.len() as u32
    }

    pub(crate) fn reserve(&mut self, blocks: usize) {
        self.entries.reserve(blocks);
        let entries = &self.entries;
        self.table.reserve(blocks, |entry| Name::of(&entries[*entry as usize]).hash());
    }

    pub(crate) fn get(&self, entry: u32) -> Option<&Block> {
        self.entries.get(entry as usize).filter(|block| block.slab != NOWHERE)
    }

    pub(crate) fn find(&self, name: &Name) -> Option<u32> {
        let same = |entry: &u32| Name::of(&self.entries[*entry as usize]) == *name;
        self.table.find(name.hash(), same).copied()
    }

    pub(crate) fn is_expired(&self, block: &Block) -> bool {
        block.expires != 0 && u64::from(block.expires) <= self.now
    }

    /// Adds a block whose name is not there.
    pub(crate) fn insert(&mut self, block: Block) -> u32 {
        let entry = match self.free.pop() {
            Some(entry) => {
                self.entries[entry as usize] = block;
                entry
            }
            None => {
                self.entries.push(block);
                self.entries.len() as u32 - 1
            }
        };
        let entries = &self.entries;
        let hash = |entry: &u32| Name::of(&entries[*entry as usize]).hash();
        self.table.insert_unique(Name::of(&block).hash(), entry, hash);
        entry
    }

    pub(crate) fn remove(&mut self, entry: u32) -> Option<Block> {
        let block = *self.get(entry)?;
        if let Ok(found) = self.table.find_entry(Name::of(&block).hash(), |other| *other == entry) {
            found.remove();
        }
        self.entries[entry as usize].slab = NOWHERE;
        self.free.push(entry);
        Some(block)
    }

    /// It was asked for.
    pub(crate) fn touch(&mut self, entry: u32) {
        if let Some(block) = self.entries.get_mut(entry as usize) {
            let frequency = ((block.flags >> FREQUENCY_SHIFT) + 1).min(FREQUENCY_MAX);
            block.flags = (block.flags & (PINNED | MAIN)) | (frequency << FREQUENCY_SHIFT);
        }
    }

    /// Pins it, or no longer; the block as it is then, where that is a change.
    pub(crate) fn pin(&mut self, entry: u32, pinned: bool) -> Option<Block> {
        let block = self.entries.get_mut(entry as usize)?;
        if (block.flags & PINNED != 0) == pinned {
            return None;
        }
        block.flags ^= PINNED;
        Some(Table::stored(block))
    }

    /// A block as a record has it.
    pub(crate) fn stored(block: &Block) -> Block {
        Block { flags: block.flags & PINNED, ..*block }
    }

    pub(crate) fn queue(block: &Block) -> Queue {
        if block.flags & MAIN != 0 { Queue::Main } else { Queue::Small }
    }

    /// What the policy tells stays apart by.
    pub(crate) fn stay(block: &Block) -> u32 {
        block.generation as u32
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Block)> {
        (0..).zip(&self.entries).filter(|(_, block)| block.slab != NOWHERE)
    }
}

impl Entries for Table {
    fn view(&self, entry: u32) -> Option<View> {
        let block = self.get(entry)?;
        Some(View {
            stay: Table::stay(block),
            frequency: block.flags >> FREQUENCY_SHIFT,
            pinned: block.flags & PINNED != 0,
            expired: self.is_expired(block),
            hash: Name::of(block).hash(),
        })
    }

    fn set(&mut self, entry: u32, queue: Queue, frequency: u8) {
        if let Some(block) = self.entries.get_mut(entry as usize) {
            let queue = if queue == Queue::Main { MAIN } else { 0 };
            block.flags = (block.flags & PINNED) | queue | (frequency << FREQUENCY_SHIFT);
        }
    }
}

const _: () = assert!(size_of::<Block>() == 64);
