//! Blocks in memory, above a store: what was loaded or stored lately, under a hard budget.
//!
//! All memory is one arena, taken once: its owner can make it known to a device, and copies to the device then start from where a block
//! lies. The same arena gives the buffers that blocks are loaded into, so that what was loaded stays without a copy. What is in here was
//! compared with its sum when it was loaded, or is what was given to be stored.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme::{Arena, Buffer};

use super::Key;
use super::policy::{Entries, FREQUENCY_MAX, Policy, Queue, View};

/// The memory, and the blocks in it. May be shared by threads.
#[derive(Debug)]
pub struct Warm {
    arena: Arena,
    /// Whether blocks stay after their use.
    keep: bool,
    state: Mutex<State>,
}

/// What a namespace is here: of one fingerprint, size of blocks and tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Space(u32);

#[derive(Debug, Default)]
struct State {
    spaces: HashMap<(Vec<u8>, u32, String), Space>,
    map: HashMap<(Space, Key), u32>,
    entries: Table,
    free: Vec<u32>,
    policy: Policy,
    stays: u32,
    stat: WarmStat,
}

/// What it holds, and what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct WarmStat {
    /// Bytes of the arena.
    pub budget_bytes: u64,
    /// Blocks.
    pub blocks: u64,
    /// Blocks that were asked for and there.
    pub hits: u64,
    /// Blocks that made room.
    pub evictions: u64,
}

#[derive(Debug)]
struct Entry {
    name: (Space, Key),
    buffer: Arc<Buffer>,
    stay: u32,
    frequency: u8,
    queue: Queue,
}

#[derive(Debug, Default)]
struct Table(Vec<Option<Entry>>);

impl Entries for Table {
    fn view(&self, entry: u32) -> Option<View> {
        let entry = self.0.get(entry as usize)?.as_ref()?;
        let hash = hash(&entry.name);
        Some(View { stay: entry.stay, frequency: entry.frequency, pinned: false, expired: false, hash })
    }

    fn set(&mut self, entry: u32, queue: Queue, frequency: u8) {
        if let Some(Some(entry)) = self.0.get_mut(entry as usize) {
            (entry.queue, entry.frequency) = (queue, frequency);
        }
    }
}

/// Keys are hashes themselves.
fn hash((space, key): &(Space, Key)) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&key.padded()[..8]);
    u64::from_le_bytes(word) ^ u64::from(space.0).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl State {
    fn remove(&mut self, index: u32) -> Option<Entry> {
        let entry = self.entries.0.get_mut(index as usize)?.take()?;
        self.map.remove(&entry.name);
        self.free.push(index);
        Some(entry)
    }

    fn evict(&mut self) -> bool {
        let Some(index) = self.policy.evict(&mut self.entries) else { return false };
        let gone = self.remove(index).is_some();
        self.stat.evictions += u64::from(gone);
        gone
    }
}

impl Warm {
    /// Blocks in this arena. `keep`: whether they stay after their use; without, it only lends buffers.
    pub fn new(arena: Arena, keep: bool) -> Warm {
        Warm { arena, keep, state: Mutex::default() }
    }

    /// Where all buffers are from.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What names mean for these blocks, see [`super::Store::view`].
    pub fn space(&self, fingerprint: &[u8], block_bytes: u32, tenant: &str) -> Space {
        let mut state = self.state();
        let next = Space(state.spaces.len() as u32);
        *state.spaces.entry((fingerprint.to_vec(), block_bytes, tenant.to_owned())).or_insert(next)
    }

    /// A buffer; blocks make room for it. `None`: everything is in use.
    pub fn buffer(&self, len: usize) -> Option<Buffer> {
        loop {
            if let Some(buffer) = self.arena.alloc(len) {
                return Some(buffer);
            }
            // Memory of a block that is still being copied comes back later; the next one's may come at once.
            if !self.state().evict() {
                return self.arena.alloc(len);
            }
        }
    }

    /// The block, if it is here. It counts as asked for.
    pub fn get(&self, space: Space, key: &Key) -> Option<Arc<Buffer>> {
        let mut state = self.state();
        let index = *state.map.get(&(space, *key))?;
        let entry = state.entries.0.get_mut(index as usize)?.as_mut()?;
        entry.frequency = (entry.frequency + 1).min(FREQUENCY_MAX);
        let buffer = entry.buffer.clone();
        state.stat.hits += 1;
        Some(buffer)
    }

    /// Which of them are here. They do not count as asked for.
    pub fn contains(&self, space: Space, keys: &[Key]) -> Vec<bool> {
        let state = self.state();
        keys.iter().map(|key| state.map.contains_key(&(space, *key))).collect()
    }

    /// Keeps a block that was compared with its sum, or is to be stored; gives it back to be used. Only what is of the arena is kept.
    pub fn insert(&self, space: Space, key: Key, buffer: Buffer) -> Arc<Buffer> {
        let own = buffer.is_in(&self.arena);
        let buffer = Arc::new(buffer);
        if self.keep && own {
            let mut state = self.state();
            let name = (space, key);
            if !state.map.contains_key(&name) {
                state.stays = state.stays.wrapping_add(1);
                let stay = state.stays;
                let index = state.free.pop().unwrap_or(state.entries.0.len() as u32);
                let queue = state.policy.insert(index, stay, hash(&name));
                let entry = Some(Entry { name, buffer: buffer.clone(), stay, frequency: 0, queue });
                match state.entries.0.get_mut(index as usize) {
                    Some(place) => *place = entry,
                    None => state.entries.0.push(entry),
                }
                state.map.insert(name, index);
            }
        }
        buffer
    }

    /// Forgets blocks.
    pub fn remove(&self, space: Space, keys: &[Key]) {
        let mut state = self.state();
        for key in keys {
            let Some(index) = state.map.get(&(space, *key)).copied() else { continue };
            if let Some(entry) = state.remove(index) {
                let State { policy, entries, .. } = &mut *state;
                policy.removed(entry.queue, entries);
            }
        }
    }

    /// What it holds, and what happened.
    pub fn stat(&self) -> WarmStat {
        let state = self.state();
        WarmStat { budget_bytes: self.arena.len() as u64, blocks: state.map.len() as u64, ..state.stat }
    }
}

#[cfg(test)]
mod tests {
    use nvme::ArenaOptions;

    use super::*;

    const BLOCK: usize = 8192;

    fn key(n: u64) -> Key {
        let mut bytes = [7; 16];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        Key::new(&bytes).unwrap()
    }

    fn warm(blocks: usize, keep: bool) -> Warm {
        let options = ArenaOptions { huge: false, ..ArenaOptions::default() };
        Warm::new(Arena::new(blocks * BLOCK, options).unwrap(), keep)
    }

    fn put(warm: &Warm, space: Space, n: u64) {
        let mut buffer = warm.buffer(BLOCK).unwrap();
        buffer[..8].copy_from_slice(&n.to_le_bytes());
        warm.insert(space, key(n), buffer);
    }

    #[test]
    fn blocks_are_what_was_put_and_the_budget_is_hard() {
        let warm = warm(4, true);
        let space = warm.space(b"print", BLOCK as u32, "");
        for n in 0..100 {
            put(&warm, space, n);
            assert!(warm.stat().blocks <= 4);
            assert_eq!(&warm.get(space, &key(n)).unwrap()[..8], n.to_le_bytes());
        }
        for n in 0..100 {
            if let Some(block) = warm.get(space, &key(n)) {
                assert_eq!(&block[..8], n.to_le_bytes());
            }
        }
        assert_eq!(warm.stat().evictions, 96);
    }

    #[test]
    fn namespaces_and_tenants_are_apart() {
        let warm = warm(8, true);
        let spaces = [(b"a", 8192, ""), (b"b", 8192, ""), (b"a", 8000, ""), (b"a", 8192, "x")]
            .map(|(print, bytes, tenant)| warm.space(print, bytes, tenant));
        put(&warm, spaces[0], 1);
        assert!(warm.get(spaces[0], &key(1)).is_some());
        assert!(spaces[1..].iter().all(|space| warm.get(*space, &key(1)).is_none()));
        assert_eq!(warm.space(b"a", 8192, ""), spaces[0]);
        warm.remove(spaces[1], &[key(1)]);
        assert!(warm.get(spaces[0], &key(1)).is_some());
        warm.remove(spaces[0], &[key(1)]);
        assert!(warm.get(spaces[0], &key(1)).is_none());
        assert_eq!(warm.arena().free_bytes(), warm.arena().len());
    }

    #[test]
    fn a_block_in_use_stays_as_it_is_when_it_makes_room() {
        let warm = warm(2, true);
        let space = warm.space(b"a", BLOCK as u32, "");
        put(&warm, space, 1);
        let held = warm.get(space, &key(1)).unwrap();
        let _rest = [warm.buffer(BLOCK).unwrap()];
        assert!(warm.buffer(BLOCK).is_none(), "all memory is held");
        assert!(warm.get(space, &key(1)).is_none());
        assert_eq!(&held[..8], 1u64.to_le_bytes());
    }

    #[test]
    fn without_keep_nothing_stays() {
        let warm = warm(2, false);
        let space = warm.space(b"a", BLOCK as u32, "");
        put(&warm, space, 1);
        assert!(warm.get(space, &key(1)).is_none());
        assert_eq!(warm.arena().free_bytes(), warm.arena().len());
    }
}
