//! State of a computation in a pool: units of bytes that are replaced again and again, and commits that say which of them belong together.
//!
//! ```text
//! StateStore     units 0..n, each of a fixed length, and a commit that names one version of each, with bytes of the caller's
//!   blocks of a unit's version      -> a KV store of the pool, pinned; every read is checked against its sum   (kv/)
//!   head A, head B                  -> another namespace there; the commit with the larger number is the one that counts
//! ```
//!
//! What is promised:
//!
//! - **A commit is all of it or nothing.** Data is made durable first, then the head that names it; what the head before it names stays until that
//!   is durable. After a crash the last commit that [`commit`](StateStore::commit) returned for is there, or the one that was being made.
//! - **Never wrong bytes**, as in any KV store: a block of another version or another unit does not fit its sum.
//! - **Nothing is dropped by itself**: see [`StoreOptions::lasting`](crate::kv::StoreOptions::lasting).
//!
//! **Stores that are committed together**, each by a process of its own ([`StateStore::open_held`]): what the commit before names stays until
//! [`settle`](StateStore::settle) says that all of them have made theirs, so that after a crash they go back to the last one that all have.
//!
//! A unit has up to three versions at a time: the committed one, the one of a commit that is being made, and the one that is written. So its space is
//! between one and three times its length; how often a commit is made decides where between.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nvme::{Arena, Buffer};

use crate::error::{Error, ErrorKind, Result};
use crate::kv::{Get, GetDone, Key, Miss, Put, PutDone, Refusal, Settings, Stored};
use crate::pool::lock;
use crate::session::{Blocks, Loads, Session};

mod head;
#[cfg(test)]
mod tests;

use head::Head;

/// Versions of a unit that can be told apart.
const VERSIONS: u8 = 3;
/// What the blocks of units are called; a change of what they mean needs another name.
const DATA: &[u8] = b"nvtier state: blocks of units, 1";
const HEAD: &[u8] = b"nvtier state: heads, 1";
/// Bytes of a block of a head.
const HEAD_BLOCK: u32 = 64 << 10;
/// Units at most.
pub const UNITS_MAX: usize = 1 << 20;
/// Bytes of the caller's in a commit at most.
pub const META_MAX: usize = 64 << 20;

/// How a [`StateStore`] is opened.
#[derive(Clone, Debug)]
pub struct StateOptions {
    /// Its name within the pool, of letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Bytes that it may occupy, see [`StateStore::room_for`].
    pub budget_bytes: u64,
    /// Bytes of a block: what is read, written and summed at once.
    pub block_bytes: u32,
    /// Of every operation of a drive.
    pub deadline: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Unit {
    len: u64,
    /// In the durable head.
    committed: Option<u8>,
    /// In the head that is being made.
    committing: Option<u8>,
    /// What reads give.
    live: Option<u8>,
    /// Being written.
    writing: Option<u8>,
    /// In the head before, which is held.
    held: Option<u8>,
}

#[derive(Debug, Default)]
struct State {
    units: Vec<Unit>,
    /// Of the head that counts; heads alternate by it.
    sequence: u64,
    /// There is a commit that is not settled.
    unsettled: bool,
    written_bytes: u64,
    read_bytes: u64,
}

/// A commit that a state can be opened at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Its number: 1 is the first.
    pub sequence: u64,
    /// Bytes of a block of the state.
    pub block_bytes: u32,
    /// The caller's bytes.
    pub meta: Vec<u8>,
}

/// Units of bytes and commits of them. May be shared by threads.
#[derive(Debug)]
pub struct StateStore {
    data: Blocks,
    heads: Blocks,
    options: StateOptions,
    /// Whether commits are held until they are settled.
    holds: bool,
    state: Mutex<State>,
    /// One commit at a time.
    commits: Mutex<()>,
}

/// A version of a unit that is being written. It ends by [`StateStore::publish`] or [`StateStore::abandon`].
#[derive(Debug)]
pub struct Draft {
    unit: u32,
    version: u8,
}

impl Draft {
    /// The unit.
    pub fn unit(&self) -> u32 {
        self.unit
    }
}

/// Reads that go on while their caller uses what came, block by block: see [`StateStore::reads`].
#[derive(Debug)]
pub struct Reads<'a, T> {
    store: &'a StateStore,
    loads: Loads<'a>,
    under_way: HashMap<u64, (u32, u32, T)>,
    next: u64,
}

impl<T> Reads<'_, T> {
    /// Begins to read a block of what is live of a unit into a buffer of [`slot_bytes`](StateStore::slot_bytes). `what` comes back with it; at once,
    /// where the unit has no bytes.
    pub fn begin(
        &mut self,
        unit: u32,
        block: u32,
        buffer: Buffer,
        what: T,
    ) -> std::result::Result<(), (T, Error)> {
        let version = match self.store.live(unit) {
            Ok(version) => version,
            Err(error) => return Err((what, error)),
        };
        let get = Get { key: key(unit, version, block), buffer, start: 0 };
        self.under_way.insert(self.next, (unit, block, what));
        self.loads.begin(vec![(self.next, get)], self.store.by());
        self.next += 1;
        Ok(())
    }

    /// Waits for the next block that came; `None`: none is under way. Errors are as of [`StateStore::read`].
    pub fn wait(&mut self) -> Option<(T, Result<Buffer>)> {
        let (number, done) = self.loads.wait()?;
        let (unit, block, what) = self.under_way.remove(&number)?;
        let buffer = self.store.loaded(unit, block, done);
        if buffer.is_ok() {
            self.store.state().read_bytes += u64::from(self.store.options.block_bytes);
        }
        Some((what, buffer))
    }

    /// Blocks that were begun and not handed out.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }
}

/// What a store holds and has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateStat {
    /// Bytes of blocks written since it was opened.
    pub written_bytes: u64,
    /// Bytes of blocks read since it was opened.
    pub read_bytes: u64,
    /// Commits ever.
    pub sequence: u64,
}

fn key(unit: u32, version: u8, block: u32) -> Key {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&unit.to_le_bytes());
    bytes[4] = version;
    bytes[8..12].copy_from_slice(&block.to_le_bytes());
    Key::new(&bytes).unwrap_or_else(|_| unreachable!("a key may have 16 bytes"))
}

fn refused(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, why.into())
}

impl StateStore {
    /// Bytes of a pool that a store needs for so many bytes of units: `extra_bytes` of them may be there in a second or third version between two
    /// commits.
    pub fn room_for(lens: impl IntoIterator<Item = u64>, extra_bytes: u64, block_bytes: u32) -> u64 {
        let slot = u64::from(block_bytes).next_multiple_of(4096);
        let units: u64 = lens.into_iter().map(|len| len.div_ceil(u64::from(block_bytes)) * slot).sum();
        let bytes = units + extra_bytes.next_multiple_of(slot);
        // Slots that are given back wait for the next flush; the slab of the heads, a 64th of all or 8 MiB; the logs of the KV store.
        bytes + bytes / 32 + (32 << 20)
    }

    /// Opens the state of that name, which is made where there is none. `arena`: where buffers of blocks come from. What a crash left of
    /// versions that no commit names is given back.
    pub fn open(session: &Session, options: &StateOptions, arena: Option<&Arena>) -> Result<StateStore> {
        StateStore::open_with(session, options, arena, false, None)
    }

    /// As [`open`](Self::open), for one of several stores that are committed together: see [`settle`](Self::settle). `at`: the commit to go on
    /// with, one of [`commits`](Self::commits), where that is not the last; one after it is forgotten. It must not have been settled.
    pub fn open_held(
        session: &Session,
        options: &StateOptions,
        arena: Option<&Arena>,
        at: Option<u64>,
    ) -> Result<StateStore> {
        StateStore::open_with(session, options, arena, true, at)
    }

    fn open_with(
        session: &Session,
        options: &StateOptions,
        arena: Option<&Arena>,
        holds: bool,
        at: Option<u64>,
    ) -> Result<StateStore> {
        if options.block_bytes == 0 || options.deadline.is_zero() {
            return Err(refused("a state store with blocks of 0 bytes, or a deadline of 0"));
        }
        let settings = Settings {
            name: options.name.clone(),
            budget_bytes: Some(options.budget_bytes),
            deadline_ms: (options.deadline.as_millis() as u64).max(1),
            lasting: true,
            ..Settings::default()
        };
        let open = |what, bytes, arena| session.blocks(&settings, what, bytes, "", arena);
        let context = |error: Error| error.context(format!("open the state {:?}", options.name));
        let heads = open(HEAD, HEAD_BLOCK, None).map_err(context)?;
        let data = open(DATA, options.block_bytes, arena).map_err(context)?;
        let store = StateStore {
            data,
            heads,
            options: options.clone(),
            holds,
            state: Mutex::default(),
            commits: Mutex::default(),
        };
        let mut head = store.latest()?;
        if let (Some(sequence), Some(last)) = (at, head.as_ref().map(|head| head.sequence)) {
            head = store.go_back(sequence, last)?;
        }
        if let Some(head) = &head {
            if head.block_bytes != options.block_bytes {
                return Err(refused(format!(
                    "the state {:?} has blocks of {} bytes, not {}",
                    options.name, head.block_bytes, options.block_bytes
                )));
            }
            let mut state = store.state();
            state.sequence = head.sequence;
            let unit = |(len, version): &(u64, Option<u8>)| Unit {
                len: *len,
                committed: *version,
                live: *version,
                ..Unit::default()
            };
            state.units = head.units.iter().map(unit).collect();
        }
        if head.is_none() {
            // Takes the heads' space before units take all of it.
            let none =
                Head { sequence: 0, block_bytes: options.block_bytes, units: Vec::new(), meta: Vec::new() };
            store.write_head(&none).map_err(context)?;
        }
        store.tidy()?;
        Ok(store)
    }

    /// The size of blocks and the caller's bytes of the last commit of a state, where there is one; it is not opened for longer.
    pub fn look(session: &Session, name: &str) -> Result<Option<(u32, Vec<u8>)>> {
        let Some((heads, by)) = heads_of(session, name)? else { return Ok(None) };
        let head = both(&heads, by, name)?.into_iter().next();
        Ok(head.filter(|head| head.sequence > 0).map(|head| (head.block_bytes, head.meta)))
    }

    /// The commits of a state that is not open: the last one, and the one before where it was not settled. Of one that was settled, or of a state
    /// that holds none, the one before may be named as well, and parts of it are gone.
    pub fn commits(session: &Session, name: &str) -> Result<Vec<Commit>> {
        let Some((heads, by)) = heads_of(session, name)? else { return Ok(Vec::new()) };
        let found = both(&heads, by, name)?.into_iter().filter(|head| head.sequence > 0);
        let commit =
            |head: Head| Commit { sequence: head.sequence, block_bytes: head.block_bytes, meta: head.meta };
        Ok(found.map(commit).collect())
    }

    /// Removes a state that is not open, with all of its bytes. `false`: there is none.
    pub fn remove(session: &Session, name: &str) -> Result<bool> {
        match session.remove(&format!("{}/{name}", crate::kv::DIRECTORY), true) {
            Ok(()) => session.sync().map(|()| true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.context(format!("remove the state {name:?}"))),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn by(&self) -> Instant {
        Instant::now() + self.options.deadline
    }

    /// The head of commit `sequence`; the `last` one is forgotten where it is another one.
    fn go_back(&self, sequence: u64, last: u64) -> Result<Option<Head>> {
        let heads = both(&self.heads, self.by(), &self.options.name)?;
        let numbers: Vec<u64> = heads.iter().map(|head| head.sequence).collect();
        let found = heads.into_iter().find(|head| head.sequence == sequence && sequence > 0);
        let Some(found) = found else {
            let name = &self.options.name;
            let why = format!("the state {name:?} has no commit {sequence}: it has {numbers:?}");
            return Err(Error::new(ErrorKind::NotFound, why));
        };
        if sequence != last {
            // Before versions that it names go.
            self.heads.remove(&head_keys(last))?;
            self.heads.flush()?;
        }
        Ok(Some(found))
    }

    /// Takes out versions that no commit names.
    fn tidy(&self) -> Result<()> {
        let units = self.state().units.clone();
        let mut keys = Vec::new();
        for (unit, found) in (0..).zip(&units) {
            for version in (0..VERSIONS).filter(|version| found.committed != Some(*version)) {
                keys.extend(self.keys(unit, version, found.len));
            }
        }
        self.forget(&keys)
    }

    fn keys(&self, unit: u32, version: u8, len: u64) -> impl Iterator<Item = Key> + use<> {
        let blocks = len.div_ceil(u64::from(self.options.block_bytes)) as u32;
        (0..blocks).map(move |block| key(unit, version, block))
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        self.options.block_bytes
    }

    /// Bytes that a buffer needs for a block: whole pages.
    pub fn slot_bytes(&self) -> usize {
        self.data.slot_bytes()
    }

    /// Lengths of the units, in order.
    pub fn units(&self) -> Vec<u64> {
        self.state().units.iter().map(|unit| unit.len).collect()
    }

    /// Whether the unit has bytes that can be read.
    pub fn has(&self, unit: u32) -> bool {
        self.state().units.get(unit as usize).is_some_and(|unit| unit.live.is_some())
    }

    /// Adds units of these lengths, without bytes yet; the number of the first.
    pub fn add(&self, lens: &[u64]) -> Result<u32> {
        let mut state = self.state();
        let limit = u64::from(self.options.block_bytes) * u64::from(u32::MAX);
        if state.units.len() + lens.len() > UNITS_MAX || lens.iter().any(|len| *len == 0 || *len > limit) {
            return Err(refused(format!(
                "{} more units: up to {UNITS_MAX} of 1 to {limit} bytes are possible",
                lens.len()
            )));
        }
        let first = state.units.len() as u32;
        state.units.extend(lens.iter().map(|len| Unit { len: *len, ..Unit::default() }));
        Ok(first)
    }

    /// What it has moved.
    pub fn stat(&self) -> StateStat {
        let state = self.state();
        StateStat {
            written_bytes: state.written_bytes,
            read_bytes: state.read_bytes,
            sequence: state.sequence,
        }
    }

    fn unit(&self, unit: u32) -> Result<Unit> {
        let found = self.state().units.get(unit as usize).copied();
        found.ok_or_else(|| refused(format!("there is no unit {unit}")))
    }

    /// Begins a new version of a unit.
    pub fn begin(&self, unit: u32) -> Result<Draft> {
        let (version, again, len) = {
            let mut state = self.state();
            let found = state.units.get_mut(unit as usize);
            let found = found.ok_or_else(|| refused(format!("there is no unit {unit}")))?;
            if found.writing.is_some() {
                return Err(Error::new(ErrorKind::Busy, format!("unit {unit} is being written already")));
            }
            let keep = [found.committed, found.committing, found.held];
            // What nobody has committed is written anew in its place, where there is no other.
            let free = (0..VERSIONS).filter(|version| !keep.contains(&Some(*version)));
            let version = free.max_by_key(|version| found.live != Some(*version)).unwrap_or(0);
            found.writing = Some(version);
            (version, found.live == Some(version), found.len)
        };
        if again {
            self.state().units[unit as usize].live = None;
        }
        let keys: Vec<Key> = self.keys(unit, version, len).collect();
        let removed = self.data.remove(&keys);
        if let Err(error) = removed {
            self.state().units[unit as usize].writing = None;
            return Err(error.context(format!("begin a version of unit {unit}")));
        }
        Ok(Draft { unit, version })
    }

    /// Writes blocks of a version, from block `first` on; each buffer has [`slot_bytes`](Self::slot_bytes), and comes back.
    pub fn write(&self, draft: &Draft, first: u32, buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let unit = self.unit(draft.unit)?;
        let blocks = unit.len.div_ceil(u64::from(self.options.block_bytes));
        if u64::from(first) + buffers.len() as u64 > blocks {
            return Err(refused(format!(
                "{} blocks from {first} on of unit {}, which has {blocks}",
                buffers.len(),
                draft.unit
            )));
        }
        let bytes = buffers.len() as u64 * u64::from(self.options.block_bytes);
        let puts = (first..).zip(buffers).map(|(block, buffer)| Put {
            key: key(draft.unit, draft.version, block),
            buffer,
            start: 0,
        });
        let done = self.data.put(puts.collect(), self.by());
        let buffers = put_all(done).map_err(|error| {
            error.context(format!("write unit {} of the state {:?}", draft.unit, self.options.name))
        })?;
        self.state().written_bytes += bytes;
        Ok(buffers)
    }

    /// The version is written: reads give it from here on, and the next commit names it.
    pub fn publish(&self, draft: &Draft) -> Result<()> {
        let mut state = self.state();
        let unit = &mut state.units[draft.unit as usize];
        unit.writing = None;
        let old = unit.live.replace(draft.version);
        let keep = [unit.committed, unit.committing, unit.held, unit.live];
        let gone = old.filter(|old| !keep.contains(&Some(*old)));
        let len = unit.len;
        drop(state);
        if let Some(version) = gone {
            let keys: Vec<Key> = self.keys(draft.unit, version, len).collect();
            self.data.remove(&keys)?;
        }
        Ok(())
    }

    /// The version is not wanted after all.
    pub fn abandon(&self, draft: &Draft) {
        self.state().units[draft.unit as usize].writing = None;
        // What lies there is overwritten by the next version, or given back at the next open.
    }

    /// Reads blocks of what is live of a unit, from block `first` on, into buffers of [`slot_bytes`](Self::slot_bytes) each.
    /// `Corrupt`: the drive has other bytes than were written. `NotFound`: nobody wrote it, or its block is gone.
    pub fn read(&self, unit: u32, first: u32, buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let version = self.live(unit)?;
        let bytes = buffers.len() as u64 * u64::from(self.options.block_bytes);
        let gets = (first..).zip(buffers).map(|(block, buffer)| Get {
            key: key(unit, version, block),
            buffer,
            start: 0,
        });
        let mut buffers = Vec::new();
        for (block, done) in (first..).zip(self.data.get(gets.collect(), self.by())) {
            buffers.push(self.loaded(unit, block, done)?);
        }
        self.state().read_bytes += bytes;
        Ok(buffers)
    }

    /// The version that reads of a unit give.
    fn live(&self, unit: u32) -> Result<u8> {
        self.unit(unit)?.live.ok_or_else(|| {
            let why = format!("unit {unit} of the state {:?} has no bytes", self.options.name);
            Error::new(ErrorKind::NotFound, why)
        })
    }

    fn loaded(&self, unit: u32, block: u32, done: GetDone) -> Result<Buffer> {
        let fail = |kind, why: &str| {
            let name = &self.options.name;
            Error::new(kind, format!("block {block} of unit {unit} of the state {name:?} {why}"))
        };
        match (done.result, done.buffer) {
            (Ok(()), Some(buffer)) => Ok(buffer),
            (Err(Miss::Absent), _) => Err(fail(ErrorKind::NotFound, "is not there")),
            (Err(Miss::Corrupt), _) => {
                Err(fail(ErrorKind::Corrupt, "is not what was written: its checksum differs"))
            }
            (Err(Miss::Failed(error)), _) => Err(error.context(format!("read unit {unit}"))),
            (Ok(()), None) => Err(fail(ErrorKind::Io, "was read to nowhere")),
        }
    }

    /// Reads that go on while the caller uses what came.
    pub fn reads<T>(&self) -> Result<Reads<'_, T>> {
        Ok(Reads { store: self, loads: self.data.loads(1)?, under_way: HashMap::new(), next: 0 })
    }

    /// Commits what is live of all units, with bytes of the caller's. Durable when it returns.
    pub fn commit(&self, meta: &[u8]) -> Result<()> {
        if meta.len() > META_MAX {
            return Err(refused(format!(
                "{} bytes to commit with a state: {META_MAX} are possible",
                meta.len()
            )));
        }
        let _one = lock(&self.commits);
        let head = {
            let mut state = self.state();
            if state.unsettled {
                return Err(refused("a commit while the one before is not settled"));
            }
            state.units.iter_mut().for_each(|unit| unit.committing = unit.live);
            Head {
                sequence: state.sequence + 1,
                block_bytes: self.options.block_bytes,
                units: state.units.iter().map(|unit| (unit.len, unit.committing)).collect(),
                meta: meta.to_vec(),
            }
        };
        let done = self.write_head(&head);
        let mut gone: Vec<Key> = Vec::new();
        {
            let mut state = self.state();
            for (number, unit) in (0..).zip(&mut state.units) {
                let committing = unit.committing.take();
                if done.is_ok() && committing != unit.committed {
                    let old = unit.committed;
                    unit.committed = committing;
                    if self.holds {
                        unit.held = old;
                    } else if let Some(old) =
                        old.filter(|old| unit.live != Some(*old) && unit.writing != Some(*old))
                    {
                        gone.extend(self.keys(number, old, unit.len));
                    }
                }
            }
            if done.is_ok() {
                state.sequence = head.sequence;
                state.unsettled = self.holds;
            }
        }
        done.map_err(|error| error.context(format!("commit the state {:?}", self.options.name)))?;
        self.forget(&gone)
    }

    /// All stores that are committed together have made the last commit: what the one before names is given back. Nothing where it was settled.
    pub fn settle(&self) -> Result<()> {
        let _one = lock(&self.commits);
        let mut gone: Vec<Key> = Vec::new();
        {
            let mut state = self.state();
            state.unsettled = false;
            for (number, unit) in (0..).zip(&mut state.units) {
                let old = unit.held.take();
                if let Some(old) = old.filter(|old| unit.live != Some(*old) && unit.writing != Some(*old)) {
                    gone.extend(self.keys(number, old, unit.len));
                }
            }
        }
        self.forget(&gone)
    }

    fn forget(&self, gone: &[Key]) -> Result<()> {
        // As they go over a socket.
        gone.chunks(1 << 14).try_for_each(|keys| self.data.remove(keys).map(|_| ()))
    }

    fn write_head(&self, head: &Head) -> Result<()> {
        self.data.flush()?;
        let which = (head.sequence % 2) as u32;
        let bytes = head.encode();
        let blocks = bytes.chunks(HEAD_BLOCK as usize);
        // The head before the last: its blocks may be more than this one's.
        self.heads.remove(&head_keys(head.sequence))?;
        let mut puts = Vec::with_capacity(blocks.len());
        for (block, part) in (0..).zip(blocks) {
            let mut buffer = Buffer::heap(self.heads.slot_bytes())?;
            buffer[..part.len()].copy_from_slice(part);
            buffer[part.len()..].fill(0);
            puts.push(Put { key: key(which, 0, block), buffer, start: 0 });
        }
        put_all(self.heads.put(puts, self.by()))?;
        self.heads.flush()
    }

    fn latest(&self) -> Result<Option<Head>> {
        Ok(both(&self.heads, self.by(), &self.options.name)?.into_iter().next())
    }

    /// The caller's bytes of the last commit.
    pub fn meta(&self) -> Result<Option<Vec<u8>>> {
        Ok(self.latest()?.filter(|head| head.sequence > 0).map(|head| head.meta))
    }
}

/// All keys that the head of a commit may have.
fn head_keys(sequence: u64) -> Vec<Key> {
    let which = (sequence % 2) as u32;
    (0..(META_MAX as u32 + (32 << 20)) / HEAD_BLOCK).map(|block| key(which, 0, block)).collect()
}

/// The heads of a state that is not open, and by when to have read them.
fn heads_of(session: &Session, name: &str) -> Result<Option<(Blocks, Instant)>> {
    match session.stat_path(&format!("{}/{name}", crate::kv::DIRECTORY)) {
        // To look at a store makes it.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let settings = Settings { name: name.to_owned(), lasting: true, ..Settings::default() };
    let heads = session.blocks(&settings, HEAD, HEAD_BLOCK, "", None)?;
    Ok(Some((heads, Instant::now() + Duration::from_millis(settings.deadline_ms))))
}

/// The heads that can be read, the one that counts first. An error: there is one, and none can be read.
fn both(heads: &Blocks, by: Instant, name: &str) -> Result<Vec<Head>> {
    let mut found: Vec<Head> = Vec::new();
    let mut trouble = None;
    for which in 0..2 {
        match read_head(heads, which, by) {
            Ok(head) => found.extend(head),
            Err(error) => trouble = Some(error),
        }
    }
    found.sort_by_key(|head| std::cmp::Reverse(head.sequence));
    match trouble {
        None => Ok(found),
        // A crash while it was written leaves the other one, which is whole; damage leaves it, too, and cannot be told from that.
        Some(error)
            if !found.is_empty() && error.kind() != ErrorKind::Timeout && error.kind() != ErrorKind::Io =>
        {
            tracing::warn!(error = %error.chain(), "one head of the state {name:?} cannot be read; the other counts");
            Ok(found)
        }
        Some(error) => Err(error.context(format!("read the head of the state {name:?}"))),
    }
}

fn read_head(heads: &Blocks, which: u32, by: Instant) -> Result<Option<Head>> {
    let read = |block: u32| -> Result<Option<Buffer>> {
        let buffer = Buffer::heap(heads.slot_bytes())?;
        let done = heads.get(vec![Get { key: key(which, 0, block), buffer, start: 0 }], by).pop();
        match done.map(|done| (done.result, done.buffer)) {
            Some((Ok(()), Some(buffer))) => Ok(Some(buffer)),
            Some((Err(Miss::Absent), _)) => Ok(None),
            Some((Err(Miss::Failed(error)), _)) => Err(error),
            _ => Err(Error::new(ErrorKind::Corrupt, format!("head {which} is damaged"))),
        }
    };
    let Some(first) = read(0)? else { return Ok(None) };
    let mut bytes = first[..HEAD_BLOCK as usize].to_vec();
    let len = head::encoded_len(&bytes)?;
    for block in 1..len.div_ceil(HEAD_BLOCK as usize) {
        // A crash between two blocks: it was not committed.
        let Some(more) = read(block as u32)? else { return Ok(None) };
        bytes.extend_from_slice(&more[..HEAD_BLOCK as usize]);
    }
    bytes.truncate(len);
    Head::decode(&bytes).map(Some)
}

fn put_all(done: Vec<PutDone>) -> Result<Vec<Buffer>> {
    let mut buffers = Vec::with_capacity(done.len());
    for done in done {
        match done.result {
            Stored::New => {}
            Stored::Present => {
                return Err(Error::new(ErrorKind::Io, "a block of that version is there already"));
            }
            Stored::Refused(Refusal::Space) => {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "no room: the pool is full, or the budget of the state is used up",
                ));
            }
            Stored::Refused(refusal) => {
                return Err(Error::new(ErrorKind::NoSpace, format!("refused by policy: {refusal:?}")));
            }
            Stored::Failed(error) => return Err(error),
        }
        buffers.extend(done.buffer);
    }
    Ok(buffers)
}
