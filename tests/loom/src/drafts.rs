//! Drafts as write-behind sees them: they gather, take permits, hand runs over and hear what became of them.

use std::sync::{Arc, Weak};

use loom::sync::{Condvar, Mutex, MutexGuard};
use nvme::{Buffer, Device, SimDevice, SimOptions};

use crate::error::Result;
use crate::write_behind::{Permit, RunOwner, RunWrite, WriteBehind};

/// Bytes of a run.
pub const RUN: usize = 4096;

#[derive(Debug, Default)]
struct State {
    held: Option<(u64, Permit)>,
    told: Vec<u64>,
    under_way: usize,
}

/// A draft of a region on one simulated device.
#[derive(Debug)]
pub struct Draft {
    behind: Arc<WriteBehind>,
    device: Arc<SimDevice>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Draft {
    /// A draft that hands over to `behind` and writes to `device`.
    pub fn new(behind: &Arc<WriteBehind>, device: &Arc<SimDevice>) -> Arc<Draft> {
        let draft = Arc::new(Draft {
            behind: behind.clone(),
            device: device.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let owner: Weak<Draft> = Arc::downgrade(&draft);
        behind.register(owner);
        draft
    }

    /// A device with room for `runs`.
    pub fn device(runs: u64) -> Arc<SimDevice> {
        Arc::new(SimDevice::new(runs * RUN as u64, SimOptions::default()).expect("a simulated device"))
    }

    /// Gathers run `chunk`: hands over what is held, waits for a permit, and holds the run until it is handed over.
    pub fn gather(self: &Arc<Draft>, chunk: u64) {
        loop {
            // As drafts do it: under the own lock a permit is only tried for; waiting is done without it and with nothing held.
            let mut state = self.lock();
            self.submit_held(&mut state);
            if let Some(permit) = self.behind.try_permit(RUN) {
                state.held = Some((chunk, permit));
                return;
            }
            drop(state);
            self.behind.wait_for_room(RUN).expect("room comes");
        }
    }

    /// Hands over what is held.
    pub fn finish(self: &Arc<Draft>) {
        self.submit_held(&mut self.lock());
    }

    /// Waits until nothing is under way, then says which runs the draft was told of, in order of their chunks.
    pub fn told(&self) -> Vec<u64> {
        let mut state = self.lock();
        while state.under_way > 0 {
            state = self.changed.wait(state).expect("no thread panics");
        }
        let mut told = state.told.clone();
        told.sort_unstable();
        told
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics")
    }

    fn submit_held(self: &Arc<Draft>, state: &mut State) {
        let Some((chunk, permit)) = state.held.take() else { return };
        let mut buffer = Buffer::heap(RUN).expect("a buffer");
        buffer.fill(chunk as u8 + 1);
        state.under_way += 1;
        self.behind.submit(RunWrite {
            owner: self.clone(),
            first_chunk: chunk,
            chunk_size: RUN,
            device: self.device.clone(),
            offset: chunk * RUN as u64,
            buffer,
            len: RUN,
            valid: RUN,
            permit,
        });
    }
}

impl RunOwner for Draft {
    fn written(&self, first_chunk: u64, sums: Vec<u32>, result: Result<()>) {
        result.expect("the device works");
        assert_eq!(sums, [crc32fast::hash(&[first_chunk as u8 + 1; RUN])]);
        let mut state = self.lock();
        state.told.push(first_chunk);
        state.under_way -= 1;
        drop(state);
        self.changed.notify_all();
    }

    fn hand_over(self: Arc<Draft>) {
        if let Ok(mut state) = self.state.try_lock() {
            self.submit_held(&mut state);
        }
    }
}

/// Every run that was told of is on the device.
pub fn assert_written(device: &SimDevice, chunks: impl IntoIterator<Item = u64>) {
    for chunk in chunks {
        let mut bytes = vec![0; RUN];
        device.read_at(chunk * RUN as u64, &mut bytes).expect("a read");
        assert!(bytes.iter().all(|byte| *byte == chunk as u8 + 1), "run {chunk} is not on the device");
    }
}
