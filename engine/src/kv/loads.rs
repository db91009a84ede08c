//! Gets: blocks that are loaded side by side and looked at one by one, while the others are on their way.
//!
//! What came is compared with its sum by the thread that asked. A thread that begins a batch, waits for all of it and then compares leaves the drive
//! idle meanwhile; so a lane takes more loads at any time ([`Lane::begin_gets`]), and gives what came one block at a time ([`Lane::next_get`]).

use std::collections::VecDeque;

use super::lane::{Job, Way, check_buffer};
use super::record::Block;
use super::table::Name;
use super::{Get, GetDone, Lane, Miss, View, sum_of};
use crate::error::{Error, ErrorKind, Result};

/// What a lane is loading.
#[derive(Debug, Default)]
pub(super) struct Loads {
    /// By the queue's tags.
    under_way: Vec<Option<Load>>,
    free: Vec<usize>,
    /// To be given to the queue.
    ready: VecDeque<usize>,
    /// Came, or failed; not looked at yet.
    came: VecDeque<usize>,
    /// Ended, and not handed out yet.
    ended: VecDeque<(u64, GetDone)>,
    /// The queue failed, and there is no new one yet.
    broken: bool,
}

#[derive(Debug)]
struct Load {
    tag: u64,
    view: View,
    block: Block,
    job: Job,
    /// It was read twice already.
    again: bool,
}

impl Loads {
    fn add(&mut self, load: Load) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.under_way.push(None);
            self.under_way.len() - 1
        });
        self.under_way[index] = Some(load);
        self.ready.push_back(index);
    }

    /// The queue is not to be used any more.
    pub(super) fn fail(&mut self) {
        self.broken = true;
    }

    fn take(&mut self, index: usize) -> Option<Load> {
        let load = self.under_way[index].take();
        self.free.push(index);
        load
    }
}

impl Lane {
    /// Loads blocks. Answers come in the order of `gets`. Nothing is handed out that is not what was stored.
    pub fn get(&mut self, view: &View, gets: Vec<Get>) -> Result<Vec<GetDone>> {
        let _span = tracing::debug_span!("kv_get", blocks = gets.len()).entered();
        self.check_idle()?;
        let mut done: Vec<Option<GetDone>> = Vec::new();
        done.resize_with(gets.len(), || None);
        self.begin_gets(view, (0..).zip(gets).collect())?;
        while let Some((index, answer)) = self.next_get()? {
            done[index as usize] = Some(answer);
        }
        Ok(done.into_iter().flatten().collect())
    }

    /// Begins to load blocks, beside those that are being loaded; each has a number of the caller's. Bad arguments are refused before any begins.
    pub fn begin_gets(&mut self, view: &View, gets: Vec<(u64, Get)>) -> Result<()> {
        self.check_view(view)?;
        self.mend()?;
        for (_, get) in &gets {
            check_buffer(view, &get.buffer, get.start)?;
        }
        let slot_bytes = view.slot_bytes() as u64;
        let mut state = self.shared.state();
        state.table.now = self.shared.options.clock.now();
        for (tag, get) in gets {
            let found = state.find(&view.name(&get.key));
            let slab = found.and_then(|(_, block)| Some(state.slabs.get(&block.slab)?.slab.clone()));
            let (Some((entry, block)), Some(slab)) = (found, slab) else {
                state.stat.misses += 1;
                let absent = GetDone { key: get.key, result: Err(Miss::Absent), buffer: Some(get.buffer) };
                self.loads.ended.push_back((tag, absent));
                continue;
            };
            state.table.touch(entry);
            let job = Job::new(&slab, block.slot, slot_bytes, get.buffer, get.start);
            self.loads.add(Load { tag, view: view.clone(), block, job, again: false });
        }
        Ok(())
    }

    /// Blocks that were begun and not handed out.
    pub fn gets_under_way(&self) -> usize {
        let loads = &self.loads;
        loads.under_way.len() - loads.free.len() + loads.ended.len()
    }

    /// Waits for the next block, in the order in which they come, with its number; `None`: none is under way. Nothing is handed out that is not what
    /// was stored.
    pub fn next_get(&mut self) -> Result<Option<(u64, GetDone)>> {
        loop {
            let moved = if self.loads.broken { Ok(()) } else { self.move_on() };
            let mended = moved.or_else(|error| self.give_up(&error));
            if let Some(ended) = self.loads.ended.pop_front() {
                return Ok(Some(ended));
            }
            mended?;
            if let Some(index) = self.loads.came.pop_front() {
                self.look_at(index);
            } else if self.loads.broken || self.queue.in_flight() == 0 && self.loads.ready.is_empty() {
                return Ok(None);
            }
        }
    }

    /// Gives the queue what it takes, before anything else is done, and takes what came; waits where there is nothing else to do.
    fn move_on(&mut self) -> Result<()> {
        let loads = &mut self.loads;
        loop {
            while self.queue.in_flight() < self.queue.depth()
                && let Some(index) = loads.ready.pop_front()
            {
                let Some(load) = &mut loads.under_way[index] else { continue };
                let refused = load.job.op(Way::In, index as u64).and_then(|op| self.queue.push(op).err());
                if let Some(refused) = refused {
                    load.job.buffer = refused.op.buffer;
                    load.job.error = Some(refused.error.into());
                    loads.came.push_back(index);
                }
            }
            if self.queue.in_flight() == 0 {
                break;
            }
            self.queue.wait(usize::from(loads.came.is_empty() && loads.ended.is_empty()))?;
            self.queue.reap(|completion| {
                let index = completion.tag as usize;
                let Some(load) = &mut loads.under_way[index] else { return };
                load.job.buffer = completion.op.buffer;
                load.job.error = completion.result.err().map(Error::from);
                match load.job.error.is_some() || load.job.is_done() {
                    true => loads.came.push_back(index),
                    false => loads.ready.push_back(index),
                }
            });
            // Pieces of blocks that are not whole go on at once.
            if loads.ready.is_empty() || self.queue.in_flight() >= self.queue.depth() {
                break;
            }
        }
        Ok(())
    }

    /// Compares a block with its sum. What was changed on its way is right the second time.
    fn look_at(&mut self, index: usize) {
        let Some(load) = &mut self.loads.under_way[index] else { return };
        let (job, block) = (&mut load.job, &load.block);
        let good = job.error.is_none()
            && job.buffer.as_ref().is_some_and(|buffer| {
                let bytes = &buffer[job.start..job.start + load.view.block_bytes() as usize];
                sum_of(load.view.seed, &block.key, block.generation, bytes) == block.sum
            });
        let name = Name::of(block);
        let mut state = self.shared.state();
        if good {
            state.stat.hits += 1;
            drop(state);
            self.end(index, Ok(()));
            return;
        }
        let late = job.error.as_ref().is_some_and(|error| error.kind() == ErrorKind::Timeout);
        if job.buffer.is_some() && !late && !load.again {
            let now = state.table.find(&name).and_then(|entry| state.table.get(entry));
            if now.is_some_and(|now| now.generation == block.generation) {
                state.stat.retried += 1;
                load.again = true;
                job.again();
                self.loads.ready.push_back(index);
                return;
            }
        }
        state.stat.misses += 1;
        let error = job.error.take();
        let unreadable = error.is_some();
        // A drive that does not answer now may do so later: what somebody relies on stays.
        let ours = !(unreadable && self.shared.options.lasting)
            && state.remove_bad(&name, block.generation, unreadable);
        let miss = match error {
            Some(error) => {
                state.stat.io_errors += 1;
                state.stat.timeouts += u64::from(late);
                Miss::Failed(error)
            }
            None if ours => {
                state.stat.corrupt += 1;
                tracing::warn!(key = %block.key, slab = block.slab, slot = block.slot, "a KV block is not what was stored: dropped");
                Miss::Corrupt
            }
            // It made room while it was read.
            None => Miss::Absent,
        };
        drop(state);
        self.end(index, Err(miss));
    }

    fn end(&mut self, index: usize, result: std::result::Result<(), Miss>) {
        if let Some(load) = self.loads.take(index) {
            let done = GetDone { key: load.block.key, result, buffer: load.job.buffer };
            self.loads.ended.push_back((load.tag, done));
        }
    }

    /// The queue failed as a whole: what it has is over, and it is replaced, for what it still holds must not answer to later loads.
    fn give_up(&mut self, error: &Error) -> Result<()> {
        tracing::error!(error = %error.chain(), "a queue of the KV store failed");
        self.loads.ready.clear();
        self.loads.came.clear();
        for index in 0..self.loads.under_way.len() {
            if self.loads.under_way[index].is_some() {
                self.end(index, Err(Miss::Failed(Error::new(error.kind(), error.chain()))));
            }
        }
        self.loads.fail();
        self.mend()
    }

    /// Replaces a queue that failed.
    pub(super) fn mend(&mut self) -> Result<()> {
        if self.loads.broken {
            self.queue = Lane::queue(&self.shared, self.arena())?;
            self.loads.broken = false;
        }
        Ok(())
    }

    /// Refuses to begin something while loads are under way, whose answers nobody would wait for.
    pub(super) fn check_idle(&mut self) -> Result<()> {
        match self.gets_under_way() {
            0 => self.mend(),
            under_way => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{under_way} gets of this lane are under way: wait for them first"),
            )),
        }
    }
}
