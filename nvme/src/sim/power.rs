//! Power cuts: a volatile write cache, and what of it survives.
//!
//! ```text
//! write ------> cache (what reads see) ---- flush ----> durable
//!                  |
//!                cut: of the writes since the last flush any subset is durable, in any order, each torn between blocks
//! ```
//!
//! This is what the NVMe specification leaves a drive with a volatile write cache: nothing is promised of a write before a
//! Flush that was submitted after its completion, blocks are written whole or not at all (AWUPF of one block), and a write
//! that was under way is like one that was in the cache.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use super::SimRng;
use super::pages::{PAGE, Pages};
use crate::queue::Verb;

/// One power supply, for the devices that lose power together. It counts their writes, flushes and discards, and may be set
/// to go off at one of them.
#[derive(Debug)]
pub struct SimPower {
    changes: AtomicU64,
    cut_after: AtomicU64,
    /// The number of the change that found it off; 0: it is on.
    off_at: AtomicU64,
    log: Mutex<Option<Vec<SimChange>>>,
}

/// A write, flush or discard, as [`SimPower::record`] notes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimChange {
    /// Name of the device.
    pub device: String,
    /// What it did.
    pub verb: Verb,
    /// Bytes from the start of the device.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Default for SimPower {
    fn default() -> SimPower {
        SimPower::new()
    }
}

/// Whether a change may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admitted {
    Yes,
    /// The power goes off during this one.
    Dying,
    /// It is off.
    No,
}

impl SimPower {
    /// On, and to stay so.
    pub fn new() -> SimPower {
        SimPower {
            changes: AtomicU64::new(0),
            cut_after: AtomicU64::new(u64::MAX),
            off_at: AtomicU64::new(0),
            log: Mutex::new(None),
        }
    }

    /// Goes off after `changes` more writes, flushes or discards: during the next one, which fails, but which the drive may
    /// have done all the same.
    pub fn cut_after(&self, changes: u64) {
        self.cut_after.store(self.changes.load(SeqCst).saturating_add(changes), SeqCst);
    }

    /// Goes off now.
    pub fn cut(&self) {
        let _ = self.off_at.compare_exchange(0, u64::MAX, SeqCst, SeqCst);
    }

    /// Whether it is off.
    pub fn is_off(&self) -> bool {
        self.off_at.load(SeqCst) != 0
    }

    /// Writes, flushes and discards so far.
    pub fn changes(&self) -> u64 {
        self.changes.load(SeqCst)
    }

    /// From now on notes every change.
    pub fn record(&self) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
    }

    /// What was noted.
    pub fn recorded(&self) -> Vec<SimChange> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
    }

    pub(super) fn admit(&self, device: &str, verb: Verb, offset: u64, len: u64) -> Admitted {
        if self.is_off() {
            return Admitted::No;
        }
        if let Some(log) = self.log.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            log.push(SimChange { device: device.to_owned(), verb, offset, len });
        }
        let number = self.changes.fetch_add(1, SeqCst) + 1;
        if number <= self.cut_after.load(SeqCst) {
            return Admitted::Yes;
        }
        match self.off_at.compare_exchange(0, number, SeqCst, SeqCst) {
            Ok(_) => Admitted::Dying,
            Err(_) => Admitted::No,
        }
    }
}

/// What of the writes since the last flush survives a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survivors {
    /// Nothing.
    None,
    /// Everything, in order.
    All,
    /// The write with this index (from 0, in submit order) alone.
    Only(usize),
    /// All but that write.
    AllBut(usize),
    /// By chance: any subset, in any order, each torn between blocks. The seed decides, also about how likely each is.
    Random(u64),
}

/// A write that no flush has made durable.
#[derive(Debug)]
struct Unflushed {
    /// Bytes, a multiple of the block size.
    offset: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Data(Box<[u8]>),
    /// A discard.
    Zeros(u64),
}

/// The writes since the last flush, and what the pages that they touch held before.
#[derive(Debug)]
pub(super) struct Cache {
    lba: u64,
    before: HashMap<u64, Option<Arc<Vec<u8>>>>,
    unflushed: Vec<Unflushed>,
}

impl Cache {
    pub fn new(lba: u32) -> Cache {
        Cache { lba: u64::from(lba), before: HashMap::new(), unflushed: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.unflushed.len()
    }

    pub fn flush(&mut self) {
        self.before.clear();
        self.unflushed.clear();
    }

    /// To be called before `pages` are written.
    fn keep(&mut self, pages: &Pages, touched: impl IntoIterator<Item = u64>) {
        for page in touched {
            self.before.entry(page).or_insert_with(|| pages.page(page));
        }
    }

    pub fn write(&mut self, pages: &mut Pages, offset: u64, buf: &[u8]) {
        if buf.is_empty() {
            return;
        }
        let end = offset + buf.len() as u64;
        self.keep(pages, offset / PAGE..end.div_ceil(PAGE));
        pages.write(offset, buf);
        // Blocks are written whole: what a caller brings of one is completed from what is there, as a driver would.
        let start = offset / self.lba * self.lba;
        let mut data = vec![0; (end.next_multiple_of(self.lba) - start) as usize].into_boxed_slice();
        pages.read(start, &mut data);
        self.unflushed.push(Unflushed { offset: start, what: What::Data(data) });
    }

    pub fn discard(&mut self, pages: &mut Pages, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let touched = pages.stored_within(offset..offset + len);
        self.keep(pages, touched);
        pages.zero(offset, len);
        self.unflushed.push(Unflushed { offset, what: What::Zeros(len) });
    }

    /// What is durable when the power goes. `pages`: what reads saw.
    pub fn survivors(&self, pages: &Pages, which: Survivors) -> Pages {
        let mut durable = pages.clone();
        if which == Survivors::All {
            return durable;
        }
        for (page, bytes) in &self.before {
            durable.set_page(*page, bytes.clone());
        }
        match which {
            Survivors::None | Survivors::All => {}
            Survivors::Only(index) => {
                if let Some(write) = self.unflushed.get(index) {
                    self.apply(&mut durable, write, &mut |_| true);
                }
            }
            Survivors::AllBut(index) => {
                for (_, write) in self.unflushed.iter().enumerate().filter(|(at, _)| *at != index) {
                    self.apply(&mut durable, write, &mut |_| true);
                }
            }
            Survivors::Random(seed) => self.by_chance(&mut durable, &mut SimRng::new(seed)),
        }
        durable
    }

    fn apply(&self, pages: &mut Pages, write: &Unflushed, survives: &mut dyn FnMut(u64) -> bool) {
        match &write.what {
            What::Data(data) => {
                for (index, block) in data.chunks(self.lba as usize).enumerate() {
                    if survives(index as u64) {
                        pages.write(write.offset + index as u64 * self.lba, block);
                    }
                }
            }
            // A discard names no data: whole or not at all is as good as any part of it.
            What::Zeros(len) => {
                if survives(0) {
                    pages.zero(write.offset, *len);
                }
            }
        }
    }

    fn by_chance(&self, pages: &mut Pages, rng: &mut SimRng) {
        let count = self.unflushed.len() as u64;
        if count == 0 {
            return;
        }
        let mut order: Vec<usize> = (0..self.unflushed.len()).collect();
        let style = rng.in_range(0..8);
        let keep: u64 = [10, 50, 90][rng.in_range(0..3) as usize];
        let torn: u64 = [0, 30, 100][rng.in_range(0..3) as usize];
        if style >= 3 {
            for last in (1..order.len()).rev() {
                order.swap(last, rng.in_range(0..last as u64 + 1) as usize);
            }
        }
        match style {
            // In order up to somewhere, the last one torn: what a drive without reordering does.
            0..=2 => order.truncate(rng.in_range(0..count + 1) as usize),
            3 => order.truncate(1),
            4 => drop(order.pop()),
            _ => order.retain(|_| rng.in_range(0..100) < keep),
        }
        let last = order.len();
        for (at, index) in order.into_iter().enumerate() {
            let tears = if style <= 2 { at + 1 == last } else { rng.in_range(0..100) < torn };
            let part = rng.in_range(1..100);
            self.apply(pages, &self.unflushed[index], &mut |_| !tears || rng.in_range(0..100) < part);
        }
    }
}
