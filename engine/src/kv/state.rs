//! What a store knows: blocks, slots, namespaces, tenants, and what the log does not hold yet. No I/O here; all of it is under one lock.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::options::{Admission, StoreStat};
use super::policy::{Policy, Seen};
use super::record::{Block, GENERATION_MAX, PAGE_ROOM, PINNED, PUTS_PER_PAGE, Record, SLAB_MAX};
use super::table::{Name, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::slab::Slab;

const SECS_PER_DAY: u64 = 86_400;
/// Nobody's slot.
const NOBODY: u32 = u32::MAX;

/// What blocks belong to.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    pub block_bytes: u32,
    pub fingerprint: Vec<u8>,
    pub blocks: u64,
}

/// Who blocks belong to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tenant {
    pub name: Vec<u8>,
    pub quota: u64,
    pub used: u64,
    /// Of a tenant with a quota: his blocks in the order they came, by entry and stay.
    pub order: VecDeque<(u32, u32)>,
}

/// A region of slots.
#[derive(Debug)]
pub(crate) struct SlabState {
    pub slab: Arc<Slab>,
    pub slot_bytes: u64,
    owners: Vec<u32>,
    free: Vec<u32>,
    pub live: u32,
}

impl SlabState {
    pub(crate) fn slots(&self) -> usize {
        self.owners.len()
    }
}

/// Slots of one size.
#[derive(Debug, Default)]
pub(crate) struct Class {
    pub slabs: Vec<u32>,
    /// Slots that can be written now.
    pub free: usize,
    /// Slots whose blocks are gone, but not yet durably so.
    pub limbo: usize,
    policy: Policy,
    /// Which slab's turn it is.
    turn: usize,
}

/// A slot, and how the block that goes there is told from all others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reserved {
    pub slab: u32,
    pub slot: u32,
    pub slot_bytes: u64,
    pub generation: u64,
}

/// Why a put does not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum No {
    Present,
    Admission,
    Budget,
    Quota,
    /// No slot is free now.
    Space,
}

/// What one commit makes durable.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub records: Vec<Record>,
    /// Slab, slot, and bytes of the slot.
    limbo: Vec<(u32, u32, u64)>,
    pub dirty: BTreeSet<u32>,
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub table: Table,
    pub slabs: BTreeMap<u32, SlabState>,
    pub classes: BTreeMap<u64, Class>,
    pub namespaces: Vec<Namespace>,
    pub tenants: Vec<Tenant>,
    /// The quota of a tenant who is made.
    pub new_quota: u64,
    pub next_slab: u32,
    pub next_generation: u64,
    pub stat: StoreStat,
    /// Names of blocks on their way.
    writing: HashSet<Name>,
    offered: Seen,
    day: u32,
    ledger_dirty: bool,
    pending: Batch,
    /// When the oldest put that is not durable was acknowledged: pending, and in the commit that runs.
    pub pending_since: Option<Instant>,
    pub committing_since: Option<Instant>,
}

fn no_number(what: &str) -> Error {
    Error::new(ErrorKind::TooLarge, format!("a store has at most 65536 {what}"))
}

impl State {
    // --- what the log says ---------------------------------------------------------------------------------------------------

    /// A record of the log, in order. Later ones win; what cannot be is passed over: reads check what the index says.
    pub(crate) fn replay(&mut self, record: Record) {
        match record {
            // Numbers that no store ever comes to would overflow at the next step.
            Record::Put(block) if block.generation >= GENERATION_MAX || block.slab >= SLAB_MAX => {}
            Record::Drop { generation, .. } if generation >= GENERATION_MAX => {}
            Record::Put(block) => {
                self.next_generation = self.next_generation.max(block.generation + 1);
                self.next_slab = self.next_slab.max(block.slab + 1);
                let owner = self.slabs.get(&block.slab).and_then(|slab| slab.owners.get(block.slot as usize));
                let known = self.namespaces.get(usize::from(block.namespace)).is_some_and(|namespace| {
                    self.slabs
                        .get(&block.slab)
                        .is_some_and(|slab| slab.slot_bytes == slot_bytes(namespace.block_bytes))
                });
                let Some(owner) = owner.copied().filter(|_| known) else { return };
                if usize::from(block.tenant) >= self.tenants.len() {
                    return;
                }
                let name = Name::of(&block);
                if let Some(old) = self.table.find(&name) {
                    self.unmap(old);
                }
                if owner != NOBODY && self.table.get(owner).is_some() {
                    self.unmap(owner);
                }
                let block = Block { flags: block.flags & PINNED, ..block };
                let entry = self.table.insert(block);
                self.map(entry, &block);
            }
            Record::Drop { key, namespace, tenant, generation } => {
                self.next_generation = self.next_generation.max(generation + 1);
                let found = self.table.find(&Name { namespace, tenant, key });
                if let Some(entry) = found
                    && self.table.get(entry).is_some_and(|block| block.generation <= generation)
                {
                    self.unmap(entry);
                }
            }
            Record::Namespace { id, block_bytes, fingerprint } => {
                // Numbers are given out in order, so that a gap is one of lost pages: nothing of what hides there can be used.
                if usize::from(id) == self.namespaces.len() && block_bytes > 0 {
                    self.namespaces.push(Namespace { block_bytes, fingerprint, blocks: 0 });
                }
            }
            Record::Tenant { id, quota, name } => {
                let index = usize::from(id);
                if index == self.tenants.len() {
                    self.tenants.push(Tenant { name, quota, ..Tenant::default() });
                } else if let Some(tenant) = self.tenants.get_mut(index).filter(|tenant| tenant.name == name)
                {
                    tenant.quota = quota;
                }
            }
            Record::Ledger { day, today, total } => {
                self.day = day;
                self.stat.written_today_bytes = today;
                self.stat.written_bytes = total;
            }
        }
    }

    fn map(&mut self, entry: u32, block: &Block) {
        let Some(slab) = self.slabs.get_mut(&block.slab) else { return };
        slab.owners[block.slot as usize] = entry;
        slab.live += 1;
        let bytes = slab.slot_bytes;
        self.count(block, bytes, true);
    }

    fn count(&mut self, block: &Block, bytes: u64, more: bool) {
        let by = |value: &mut u64, delta: u64| {
            *value = if more { *value + delta } else { value.saturating_sub(delta) };
        };
        by(&mut self.stat.used_bytes, bytes);
        if block.flags & PINNED != 0 {
            by(&mut self.stat.pinned, 1);
        }
        if let Some(namespace) = self.namespaces.get_mut(usize::from(block.namespace)) {
            by(&mut namespace.blocks, 1);
        }
        if let Some(tenant) = self.tenants.get_mut(usize::from(block.tenant)) {
            by(&mut tenant.used, bytes);
        }
    }

    /// Takes a block out of the table and its slot; the slot's bytes are nobody's then.
    fn unmap(&mut self, entry: u32) -> Option<Block> {
        let block = self.table.remove(entry)?;
        if let Some(slab) = self.slabs.get_mut(&block.slab) {
            if slab.owners.get(block.slot as usize) == Some(&entry) {
                slab.owners[block.slot as usize] = NOBODY;
            }
            slab.live = slab.live.saturating_sub(1);
            let bytes = slab.slot_bytes;
            self.count(&block, bytes, false);
        }
        Some(block)
    }

    /// After the last record: what is left is free, and everything has its place in a queue.
    pub(crate) fn replayed(&mut self) {
        for (number, slab) in &mut self.slabs {
            let class = self.classes.entry(slab.slot_bytes).or_default();
            slab.free = (0..slab.owners.len() as u32)
                .rev()
                .filter(|slot| slab.owners[*slot as usize] == NOBODY)
                .collect();
            class.free += slab.free.len();
            if !class.slabs.contains(number) {
                class.slabs.push(*number);
            }
        }
        let blocks: Vec<(u32, u64, u32)> = self
            .table
            .iter()
            .filter_map(|(entry, block)| {
                Some((entry, self.slabs.get(&block.slab)?.slot_bytes, Table::stay(block)))
            })
            .collect();
        for (entry, bytes, stay) in blocks {
            use super::policy::Entries;
            if let Some(class) = self.classes.get_mut(&bytes) {
                class.policy.restore(entry, stay);
                self.table.set(entry, super::policy::Queue::Main, 0);
            }
        }
        for tenant in 0..self.tenants.len() {
            self.order_tenant(tenant as u16);
        }
        self.day_now();
    }

    fn order_tenant(&mut self, id: u16) {
        let Some(tenant) = self.tenants.get_mut(usize::from(id)) else { return };
        tenant.order.clear();
        if tenant.quota == 0 {
            return;
        }
        let mut his: Vec<(u64, u32)> = self
            .table
            .iter()
            .filter(|(_, block)| block.tenant == id)
            .map(|(entry, block)| (block.generation, entry))
            .collect();
        his.sort_unstable();
        tenant.order = his.into_iter().map(|(generation, entry)| (entry, generation as u32)).collect();
    }

    /// Everything that a checkpoint says besides blocks.
    pub(crate) fn describe(&self) -> Vec<Record> {
        let namespaces = (0..).zip(&self.namespaces).map(|(id, namespace)| Record::Namespace {
            id,
            block_bytes: namespace.block_bytes,
            fingerprint: namespace.fingerprint.clone(),
        });
        let tenants = (0..).zip(&self.tenants).map(|(id, tenant)| Record::Tenant {
            id,
            quota: tenant.quota,
            name: tenant.name.clone(),
        });
        namespaces.chain(tenants).chain([self.ledger()]).collect()
    }

    /// Slots of all slabs.
    pub(crate) fn slots(&self) -> u64 {
        self.slabs.values().map(|slab| slab.slots() as u64).sum()
    }

    /// Pages of a checkpoint when all of so many slots hold blocks, at most.
    pub(crate) fn pages_for(&self, slots: u64) -> u64 {
        let described: usize = self.describe().iter().map(Record::len).sum();
        // A page may be left half empty only by a record of a fingerprint.
        slots.div_ceil(PUTS_PER_PAGE) + described.div_ceil(PAGE_ROOM / 2) as u64 + 1
    }

    fn ledger(&self) -> Record {
        Record::Ledger { day: self.day, today: self.stat.written_today_bytes, total: self.stat.written_bytes }
    }

    // --- names ---------------------------------------------------------------------------------------------------------------

    /// The number of a namespace, which is made where there is none.
    pub(crate) fn namespace(&mut self, fingerprint: &[u8], block_bytes: u32) -> Result<u16> {
        let same = |namespace: &Namespace| {
            namespace.fingerprint == fingerprint && namespace.block_bytes == block_bytes
        };
        if let Some(index) = self.namespaces.iter().position(same) {
            return Ok(index as u16);
        }
        let id = u16::try_from(self.namespaces.len()).map_err(|_| no_number("namespaces"))?;
        let fingerprint = fingerprint.to_vec();
        self.namespaces.push(Namespace { block_bytes, fingerprint: fingerprint.clone(), blocks: 0 });
        self.pending.records.push(Record::Namespace { id, block_bytes, fingerprint });
        Ok(id)
    }

    /// The number of a tenant, who is made where there is none.
    pub(crate) fn tenant(&mut self, name: &[u8]) -> Result<u16> {
        if let Some(index) = self.tenants.iter().position(|tenant| tenant.name == name) {
            return Ok(index as u16);
        }
        let id = u16::try_from(self.tenants.len()).map_err(|_| no_number("tenants"))?;
        let quota = self.new_quota;
        self.tenants.push(Tenant { name: name.to_vec(), quota, ..Tenant::default() });
        self.pending.records.push(Record::Tenant { id, quota, name: name.to_vec() });
        Ok(id)
    }

    /// His oldest blocks go at once where they are more.
    pub(crate) fn set_quota(&mut self, id: u16, quota: u64) {
        let Some(tenant) = self.tenants.get_mut(usize::from(id)).filter(|tenant| tenant.quota != quota)
        else {
            return;
        };
        tenant.quota = quota;
        let name = tenant.name.clone();
        self.pending.records.push(Record::Tenant { id, quota, name });
        self.order_tenant(id);
        self.fit_quota(id, 0);
    }

    // --- blocks --------------------------------------------------------------------------------------------------------------

    /// A block that can be read. One whose time is over goes.
    pub(crate) fn find(&mut self, name: &Name) -> Option<(u32, Block)> {
        let entry = self.table.find(name)?;
        let block = *self.table.get(entry)?;
        if self.table.is_expired(&block) {
            self.remove(entry);
            self.stat.expired += 1;
            return None;
        }
        Some((entry, block))
    }

    /// Takes a block out for good: the log will say so, and its slot is free when that is durable.
    pub(crate) fn remove(&mut self, entry: u32) -> Option<Block> {
        self.take_out(entry, true, true)
    }

    /// Takes a block out because what was read is not it. `false`: it was another one's turn by then, and nothing is wrong.
    /// `unreadable`: the slot gets nothing else to keep.
    pub(crate) fn remove_bad(&mut self, name: &Name, generation: u64, unreadable: bool) -> bool {
        let Some(entry) = self.table.find(name) else { return false };
        if self.table.get(entry).is_none_or(|block| block.generation != generation) {
            return false;
        }
        if unreadable {
            self.stat.bad_slots += 1;
        }
        self.take_out(entry, true, !unreadable).is_some()
    }

    fn take_out(&mut self, entry: u32, queued: bool, reuse: bool) -> Option<Block> {
        let block = self.unmap(entry)?;
        let slot_bytes = self.slabs.get(&block.slab).map(|slab| slab.slot_bytes);
        if let Some(bytes) = slot_bytes
            && let Some(class) = self.classes.get_mut(&bytes)
        {
            if queued {
                class.policy.removed(Table::queue(&block), &self.table);
            }
            if reuse {
                class.limbo += 1;
                self.pending.limbo.push((block.slab, block.slot, bytes));
            }
        }
        self.pending.records.push(Record::Drop {
            key: block.key,
            namespace: block.namespace,
            tenant: block.tenant,
            generation: block.generation,
        });
        Some(block)
    }

    /// Makes up to `count` blocks of a class go; how many did.
    pub(crate) fn evict(&mut self, slot_bytes: u64, count: usize) -> usize {
        for done in 0..count {
            let Some(class) = self.classes.get_mut(&slot_bytes) else { return done };
            let Some(entry) = class.policy.evict(&mut self.table) else { return done };
            let expired = self.table.get(entry).is_some_and(|block| self.table.is_expired(block));
            if expired {
                self.stat.expired += 1;
            } else {
                self.stat.evictions += 1;
            }
            self.take_out(entry, false, true);
        }
        count
    }

    /// Makes the oldest blocks of a tenant go until `bytes` fit under his quota. `false`: they do not.
    fn fit_quota(&mut self, id: u16, bytes: u64) -> bool {
        let mut passes = 1;
        loop {
            let Some(tenant) = self.tenants.get_mut(usize::from(id)) else { return true };
            if tenant.quota == 0 || tenant.used + bytes <= tenant.quota {
                return true;
            }
            if bytes > tenant.quota || passes > tenant.order.len() {
                return false;
            }
            let Some((entry, stay)) = tenant.order.pop_front() else { return false };
            match self.table.get(entry).filter(|block| Table::stay(block) == stay && block.tenant == id) {
                None => {}
                Some(block) if block.flags & PINNED != 0 => {
                    tenant.order.push_back((entry, stay));
                    passes += 1;
                }
                Some(_) => {
                    self.remove(entry);
                    self.stat.evictions += 1;
                }
            }
        }
    }

    fn day_now(&mut self) {
        let day = (self.table.now / SECS_PER_DAY) as u32;
        if day != self.day {
            self.day = day;
            self.stat.written_today_bytes = 0;
        }
    }

    /// Bytes of blocks written in the day of a moment that is not before the last put.
    pub(crate) fn written_on_the_day_of(&self, now: u64) -> u64 {
        if (now / SECS_PER_DAY) as u32 == self.day { self.stat.written_today_bytes } else { 0 }
    }

    /// Whether a block may be written, and where to. The name counts as being written until [`publish`](Self::publish) or
    /// [`give_up`](Self::give_up).
    pub(crate) fn reserve(
        &mut self,
        name: &Name,
        slot_bytes: u64,
        admission: Admission,
        per_day: Option<u64>,
    ) -> std::result::Result<Reserved, No> {
        if let Some((entry, _)) = self.find(name) {
            self.table.touch(entry);
            return Err(No::Present);
        }
        if self.writing.contains(name) {
            return Err(No::Present);
        }
        if let Admission::SecondOffer { remember } = admission {
            let hash = name.hash();
            if !self.offered.contains(hash) {
                self.offered.insert(hash, remember);
                return Err(No::Admission);
            }
        }
        self.day_now();
        if per_day.is_some_and(|limit| self.stat.written_today_bytes.saturating_add(slot_bytes) > limit) {
            return Err(No::Budget);
        }
        if !self.fit_quota(name.tenant, slot_bytes) {
            return Err(No::Quota);
        }
        let (slab, slot) = self.take_slot(slot_bytes).ok_or(No::Space)?;
        // He holds it from here on: several puts at a time must not pass his quota together.
        if let Some(tenant) = self.tenants.get_mut(usize::from(name.tenant)) {
            tenant.used += slot_bytes;
        }
        self.stat.written_today_bytes = self.stat.written_today_bytes.saturating_add(slot_bytes);
        self.stat.written_bytes = self.stat.written_bytes.saturating_add(slot_bytes);
        self.ledger_dirty = true;
        self.writing.insert(*name);
        let generation = self.next_generation;
        self.next_generation += 1;
        Ok(Reserved { slab, slot, slot_bytes, generation })
    }

    fn take_slot(&mut self, slot_bytes: u64) -> Option<(u32, u32)> {
        let class = self.classes.get_mut(&slot_bytes)?;
        if class.free == 0 {
            return None;
        }
        let count = class.slabs.len();
        for step in 0..count {
            let index = (class.turn + step) % count;
            let number = class.slabs[index];
            if let Some(slot) = self.slabs.get_mut(&number).and_then(|slab| slab.free.pop()) {
                class.turn = index + 1;
                class.free -= 1;
                return Some((number, slot));
            }
        }
        class.free = 0;
        None
    }

    fn release(&mut self, name: &Name, slot_bytes: u64) {
        self.writing.remove(name);
        if let Some(tenant) = self.tenants.get_mut(usize::from(name.tenant)) {
            tenant.used = tenant.used.saturating_sub(slot_bytes);
        }
    }

    /// The block is written.
    /// `false`: its slab went meanwhile.
    pub(crate) fn publish(&mut self, block: Block, slot_bytes: u64) -> bool {
        let name = Name::of(&block);
        self.release(&name, slot_bytes);
        if !self.slabs.contains_key(&block.slab) {
            return false;
        }
        let entry = self.table.insert(block);
        self.map(entry, &block);
        let stay = Table::stay(&block);
        if let Some(class) = self.classes.get_mut(&slot_bytes) {
            use super::policy::Entries;
            let queue = class.policy.insert(entry, stay, name.hash());
            self.table.set(entry, queue, 0);
        }
        if let Some(tenant) =
            self.tenants.get_mut(usize::from(block.tenant)).filter(|tenant| tenant.quota > 0)
        {
            tenant.order.push_back((entry, stay));
            if tenant.order.len() as u64 > 2 * (tenant.used / slot_bytes) + 1024 {
                let table = &self.table;
                tenant.order.retain(|(entry, stay)| {
                    table.get(*entry).is_some_and(|block| Table::stay(block) == *stay)
                });
            }
        }
        self.stat.puts += 1;
        self.pending.records.push(Record::Put(block));
        self.pending.dirty.insert(block.slab);
        self.pending_since.get_or_insert_with(Instant::now);
        true
    }

    /// The block could not be written. `lost`: nobody knows what the slot will hold, and when.
    pub(crate) fn give_up(&mut self, name: &Name, reserved: Reserved, lost: bool) {
        self.release(name, reserved.slot_bytes);
        if lost {
            self.stat.bad_slots += 1;
        } else if let Some(slab) = self.slabs.get_mut(&reserved.slab) {
            slab.free.push(reserved.slot);
            if let Some(class) = self.classes.get_mut(&reserved.slot_bytes) {
                class.free += 1;
            }
        }
    }

    pub(crate) fn log(&mut self, record: Record) {
        self.pending.records.push(record);
    }

    // --- slabs ---------------------------------------------------------------------------------------------------------------

    /// Adds a slab; its slots are free when [`replayed`](Self::replayed), or with `fresh` at once.
    pub(crate) fn add_slab(&mut self, number: u32, slot_bytes: u64, slab: Arc<Slab>, fresh: bool) {
        let slots = (slab.len() / slot_bytes).min(u64::from(u32::MAX - 1)) as u32;
        self.next_slab = self.next_slab.max(number.saturating_add(1));
        let mut state =
            SlabState { slab, slot_bytes, owners: vec![NOBODY; slots as usize], free: Vec::new(), live: 0 };
        if fresh {
            state.free = (0..slots).rev().collect();
            let class = self.classes.entry(slot_bytes).or_default();
            class.slabs.push(number);
            class.free += slots as usize;
        }
        self.slabs.insert(number, state);
    }

    /// Takes a slab of another size of slots out, of which there are most. Its blocks are gone; what holds it keeps its space until then.
    pub(crate) fn take_slab(&mut self, not: u64) -> Option<(u32, u64)> {
        let (bytes, _) = self
            .classes
            .iter()
            .filter(|(bytes, class)| **bytes != not && !class.slabs.is_empty())
            .max_by_key(|(bytes, class)| class.slabs.len() as u64 * **bytes)?;
        let bytes = *bytes;
        let candidates = self.classes.get(&bytes)?.slabs.clone();
        let number =
            candidates.into_iter().min_by_key(|number| self.slabs.get(number).map_or(0, |s| s.live))?;
        self.remove_slab(number);
        Some((number, bytes))
    }

    /// Drops a slab with all of its blocks.
    fn remove_slab(&mut self, number: u32) {
        let Some(slab) = self.slabs.get(&number) else { return };
        let owners: Vec<u32> = slab.owners.iter().copied().filter(|owner| *owner != NOBODY).collect();
        let slot_bytes = slab.slot_bytes;
        for entry in owners {
            if self.remove(entry).is_some() {
                self.stat.evictions += 1;
            }
        }
        let Some(slab) = self.slabs.remove(&number) else { return };
        if let Some(class) = self.classes.get_mut(&slot_bytes) {
            class.slabs.retain(|other| *other != number);
            class.free = class.free.saturating_sub(slab.free.len());
        }
    }

    // --- commits -------------------------------------------------------------------------------------------------------------

    pub(crate) fn is_clean(&self) -> bool {
        self.pending.records.is_empty() && self.pending.dirty.is_empty() && !self.ledger_dirty
    }

    /// What the next commit has to make durable. Its puts count as being committed.
    pub(crate) fn take_batch(&mut self) -> Batch {
        if std::mem::take(&mut self.ledger_dirty) {
            let ledger = self.ledger();
            self.pending.records.push(ledger);
        }
        self.committing_since = self.committing_since.or(self.pending_since);
        self.pending_since = None;
        std::mem::take(&mut self.pending)
    }

    /// Slabs that were written to since the last batch was taken.
    pub(crate) fn dirty_now(&self) -> BTreeSet<u32> {
        self.pending.dirty.clone()
    }

    /// It is durable: slots of what is gone are free.
    pub(crate) fn committed(&mut self, batch: Batch) {
        for (slab, slot, bytes) in batch.limbo {
            let Some(class) = self.classes.get_mut(&bytes) else { continue };
            class.limbo = class.limbo.saturating_sub(1);
            if let Some(state) = self.slabs.get_mut(&slab) {
                state.free.push(slot);
                class.free += 1;
            }
        }
        self.committing_since = None;
        self.stat.commits += 1;
    }

    /// Devices that hold what a batch says is written: another look, since a slab may have come or gone.
    pub(crate) fn slabs_of(&self, numbers: &BTreeSet<u32>) -> Vec<Arc<Slab>> {
        numbers.iter().filter_map(|number| self.slabs.get(number)).map(|slab| slab.slab.clone()).collect()
    }
}

/// Bytes of the slot of a block.
pub(crate) fn slot_bytes(block_bytes: u32) -> u64 {
    u64::from(block_bytes).next_multiple_of(super::record::PAGE as u64)
}
