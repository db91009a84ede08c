//! Lanes of this process: taking and pinning a ring costs more than a small load, so one of each kind is kept.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use gpudirect::{ErrorKind, Lane, LaneOptions};

use crate::process::Born;

/// Loads of up to this many bytes take the small ring.
pub const SMALL: u64 = 64 << 20;
const SMALL_RING: usize = 16 << 20;
const SMALL_CHUNK: usize = 1 << 20;

/// How long the list of idle lanes is waited for. It is held for moments only; but in a child that was forked in such a moment
/// for ever, and there a lane of its own is as good.
const PATIENCE: Duration = Duration::from_millis(200);

/// Lanes that nobody uses now.
static IDLE: Mutex<Option<(Born, Vec<Idle>)>> = Mutex::new(None);

#[derive(Debug)]
struct Idle {
    device: String,
    small: bool,
    lane: Lane,
}

/// Does something with the idle lanes; `None` where they cannot be had.
fn idle<T>(run: impl FnOnce(&mut Vec<Idle>) -> T) -> Option<T> {
    let started = Instant::now();
    let mut guard = loop {
        match IDLE.try_lock() {
            Ok(guard) => break guard,
            Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
            Err(TryLockError::WouldBlock) if started.elapsed() < PATIENCE => std::thread::yield_now(),
            Err(TryLockError::WouldBlock) => return None,
        }
    };
    if guard.as_ref().is_some_and(|(born, _)| !born.here()) {
        // The parent's lanes: not even to be dropped.
        std::mem::forget(guard.take());
    }
    let (_, lanes) = guard.get_or_insert_with(|| (Born::now(), Vec::new()));
    Some(run(lanes))
}

fn options(small: bool) -> LaneOptions {
    let defaults = LaneOptions::default();
    if small {
        LaneOptions { chunk: SMALL_CHUNK, ring: SMALL_RING, threads: defaults.threads.min(4), ..defaults }
    } else {
        defaults
    }
}

/// A lane that goes back when it is dropped.
pub struct Borrowed(Option<Idle>);

/// A lane to a device for about so many bytes.
pub fn borrow(device: &str, bytes: u64) -> gpudirect::Result<Borrowed> {
    let small = bytes <= SMALL;
    let found = idle(|lanes| {
        let at = lanes.iter().position(|idle| idle.device == device && idle.small == small);
        at.map(|at| lanes.swap_remove(at))
    })
    .flatten();
    let idle = match found {
        Some(mut idle) => {
            // What the last load was given is nothing to this one.
            idle.lane.adjust(options(small))?;
            idle
        }
        None => {
            let driver = gpudirect::driver::open(device)?;
            Idle { device: device.to_owned(), small, lane: Lane::new(driver, options(small))? }
        }
    };
    Ok(Borrowed(Some(idle)))
}

/// A lane of its own to a device that no other call will ask for.
pub fn own(driver: Arc<dyn gpudirect::Driver>, bytes: u64) -> gpudirect::Result<Lane> {
    Lane::new(driver, options(bytes <= SMALL))
}

/// Gives the memory of idle lanes back.
pub fn trim() {
    drop(idle(std::mem::take));
}

impl Borrowed {
    /// Does not go back if this failed with the device or its memory.
    pub fn settle<T>(mut self, result: gpudirect::Result<T>) -> gpudirect::Result<T> {
        if let Err(error) = &result
            && matches!(error.kind(), ErrorKind::Device | ErrorKind::OutOfHostMemory | ErrorKind::Io)
        {
            self.0 = None;
        }
        result
    }
}

impl Deref for Borrowed {
    type Target = Lane;
    fn deref(&self) -> &Lane {
        match &self.0 {
            Some(idle) => &idle.lane,
            None => unreachable!("the lane is there until settle or drop, which take `self`"),
        }
    }
}

impl DerefMut for Borrowed {
    fn deref_mut(&mut self) -> &mut Lane {
        match &mut self.0 {
            Some(idle) => &mut idle.lane,
            None => unreachable!("the lane is there until settle or drop, which take `self`"),
        }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        let mut back = self.0.take();
        if let Some(idle) = &mut back {
            // A pool's memory is its own again.
            idle.lane.leave_tiers();
        }
        // One that is not taken back is dropped here, without the lock.
        idle(|lanes| {
            let known =
                |one: &Idle| lanes.iter().any(|idle| idle.device == one.device && idle.small == one.small);
            if let Some(one) = back.take_if(|one| !known(one)) {
                lanes.push(one);
            }
        });
    }
}
