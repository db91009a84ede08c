//! Loads that go on while their caller uses what came.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use super::blocks::{Blocks, Which, Worker, died, late};
use crate::control::RemoteBlocks;
use crate::error::{Error, Result};
use crate::kv::{Get, GetDone, Key, Lane, Miss, View};

/// Blocks on their way from a store: what came is compared with its sum by other threads, and handed out one by one, in the order in which it comes.
/// See [`Blocks::loads`].
#[derive(Debug)]
pub struct Loads<'a> {
    blocks: &'a Blocks,
    lanes: Vec<Side>,
    came: Receiver<Message>,
    /// By number: the lane that has it, and its key.
    under_way: HashMap<u64, (usize, Key)>,
    ready: VecDeque<(u64, GetDone)>,
}

/// One lane.
#[derive(Debug)]
struct Side {
    to: Option<Sender<Begun>>,
    under_way: usize,
    worker: Option<Worker>,
    thread: Option<JoinHandle<()>>,
}

type Begun = (Vec<(u64, Get)>, Instant);

#[derive(Debug)]
enum Message {
    Came(u64, GetDone),
    /// Nothing more comes from that lane.
    Ended(usize),
}

/// Says that its lane ended, however it did.
struct End {
    lane: usize,
    out: Sender<Message>,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.out.send(Message::Ended(self.lane));
    }
}

impl Blocks {
    /// For loads that go on while what came is used: by so many lanes, each with a queue and a thread that compares sums. One keeps a drive busy; more
    /// than one where comparing is slower than the drive.
    pub fn loads(&self, lanes: usize) -> Result<Loads<'_>> {
        let (out, came) = channel();
        let mut loads = Loads {
            blocks: self,
            lanes: Vec::new(),
            came,
            under_way: HashMap::new(),
            ready: VecDeque::new(),
        };
        for lane in 0..lanes.max(1) {
            let (to, inbox) = channel();
            let end = End { lane, out: out.clone() };
            let (mut worker, mut thread) = (None, None);
            match &self.inner {
                Which::Local(local) => {
                    let lender = local.worker()?;
                    let view = local.view.clone();
                    lender.run(move |lane| run_local(lane, &view, &inbox, &end))?;
                    worker = Some(lender);
                }
                Which::Remote(remote) => {
                    let remote = remote.clone();
                    let run = move || run_remote(&remote, &inbox, &end);
                    let spawned = std::thread::Builder::new().name("nvtier-kv-loads".into()).spawn(run);
                    thread = Some(
                        spawned.map_err(|error| Error::io("start a thread that loads KV blocks", error))?,
                    );
                }
            }
            loads.lanes.push(Side { to: Some(to), under_way: 0, worker, thread });
        }
        Ok(loads)
    }
}

impl Loads<'_> {
    /// Begins loads, beside those that are under way. Each has a number of the caller's, which no other one that is under way has. `by`: what has not
    /// begun by then is a miss.
    pub fn begin(&mut self, gets: Vec<(u64, Get)>, by: Instant) {
        if Instant::now() >= by {
            self.ready.extend(gets.into_iter().map(|(number, get)| (number, late(get))));
            return;
        }
        let alive = self.lanes.iter().enumerate().filter(|(_, side)| side.to.is_some());
        let Some((lane, _)) = alive.min_by_key(|(_, side)| side.under_way) else {
            self.ready.extend(gets.into_iter().map(|(number, get)| (number, lost(get.key))));
            return;
        };
        for (number, get) in &gets {
            self.under_way.insert(*number, (lane, get.key));
        }
        let side = &mut self.lanes[lane];
        side.under_way += gets.len();
        let sent = side.to.as_ref().is_some_and(|to| to.send((gets, by)).is_ok());
        if !sent {
            self.ended(lane);
        }
    }

    /// Waits for the next block that came, with its number; `None`: none is under way. Whatever goes wrong is a miss.
    pub fn wait(&mut self) -> Option<(u64, GetDone)> {
        self.take(true)
    }

    /// As [`wait`](Self::wait), without waiting.
    pub fn poll(&mut self) -> Option<(u64, GetDone)> {
        self.take(false)
    }

    /// Loads that were begun and not handed out.
    pub fn under_way(&self) -> usize {
        self.under_way.len() + self.ready.len()
    }

    fn take(&mut self, wait: bool) -> Option<(u64, GetDone)> {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return Some(ready);
            }
            if self.under_way.is_empty() {
                return None;
            }
            let message = match wait {
                true => self.came.recv().map_err(|_| TryRecvError::Disconnected),
                false => self.came.try_recv(),
            };
            match message {
                Ok(Message::Came(number, done)) => {
                    if let Some((lane, _)) = self.under_way.remove(&number) {
                        self.lanes[lane].under_way -= 1;
                    }
                    return Some((number, done));
                }
                Ok(Message::Ended(lane)) => self.ended(lane),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => (0..self.lanes.len()).for_each(|lane| self.ended(lane)),
            }
        }
    }

    /// A lane is no more: what it had will not come.
    fn ended(&mut self, lane: usize) {
        let side = &mut self.lanes[lane];
        (side.to, side.under_way) = (None, 0);
        let gone = self.under_way.extract_if(|_, (of, _)| *of == lane);
        self.ready.extend(gone.map(|(number, (_, key))| (number, lost(key))));
    }
}

impl Drop for Loads<'_> {
    fn drop(&mut self) {
        for side in &mut self.lanes {
            // Ends its loop once what it has is over.
            let alive = side.to.take().is_some();
            if let (Some(worker), Which::Local(local)) = (side.worker.take(), &self.blocks.inner)
                && alive
            {
                local.keep(worker);
            }
            if let Some(thread) = side.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

fn lost(key: Key) -> GetDone {
    GetDone { key, result: Err(Miss::Failed(died())), buffer: None }
}

/// Takes gets as they come, and answers, until nobody asks any more.
fn run_local(lane: &mut Lane, view: &View, inbox: &Receiver<Begun>, end: &End) {
    let mut asked = true;
    loop {
        while asked {
            let more = match lane.gets_under_way() {
                0 => inbox.recv().map_err(|_| TryRecvError::Disconnected),
                _ => inbox.try_recv(),
            };
            match more {
                Ok((gets, _)) => begin(lane, view, gets, end),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => asked = false,
            }
        }
        match lane.next_get() {
            Ok(Some((number, done))) => drop(end.out.send(Message::Came(number, done))),
            Ok(None) if asked => {}
            Ok(None) => return,
            Err(error) => {
                // Whoever waits is told as this ends.
                tracing::error!(error = %error.chain(), "a lane of a KV store has no queue any more");
                return;
            }
        }
    }
}

fn begin(lane: &mut Lane, view: &View, gets: Vec<(u64, Get)>, end: &End) {
    let asked: Vec<(u64, Key)> = gets.iter().map(|(number, get)| (*number, get.key)).collect();
    if let Err(error) = lane.begin_gets(view, gets) {
        for (number, key) in asked {
            let result = Err(Miss::Failed(Error::new(error.kind(), error.chain())));
            let _ = end.out.send(Message::Came(number, GetDone { key, result, buffer: None }));
        }
    }
}

/// As `run_local`, by the process that owns the pool: all that was asked for meanwhile in one call.
fn run_remote(remote: &Arc<RemoteBlocks>, inbox: &Receiver<Begun>, end: &End) {
    while let Ok((mut gets, mut by)) = inbox.recv() {
        while let Ok((more, later)) = inbox.try_recv() {
            gets.extend(more);
            by = by.max(later);
        }
        let (numbers, gets): (Vec<u64>, Vec<Get>) = gets.into_iter().unzip();
        for (number, done) in numbers.into_iter().zip(remote.get(gets, by)) {
            let _ = end.out.send(Message::Came(number, done));
        }
    }
}
