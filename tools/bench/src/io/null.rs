//! No transfer: everything queued is done at the next reap. Shows what the harness itself costs.

use super::{Done, IoEngine, Queued, Transfer};
use crate::error::Result;
use crate::settings::Settings;

pub struct NullEngine {
    buffers: Vec<Vec<u8>>,
    queued: Vec<(u32, u32)>,
    started: Vec<(u32, u32)>,
}

impl NullEngine {
    pub fn new(settings: &Settings) -> NullEngine {
        let depth = settings.iodepth as usize;
        NullEngine {
            buffers: vec![vec![0; settings.max_block_bytes() as usize]; depth],
            queued: Vec::with_capacity(depth),
            started: Vec::with_capacity(depth),
        }
    }
}

impl IoEngine for NullEngine {
    fn buffer(&mut self, slot: u32) -> &mut [u8] {
        &mut self.buffers[slot as usize]
    }

    fn queue(&mut self, slot: u32, transfer: Transfer) -> Result<Queued> {
        self.queued.push((slot, transfer.len));
        Ok(Queued::Started)
    }

    fn commit(&mut self) -> Result<()> {
        self.started.append(&mut self.queued);
        Ok(())
    }

    fn reap(&mut self, _min: usize, done: &mut Vec<Done>) -> Result<()> {
        done.extend(self.started.drain(..).map(|(slot, len)| Done { slot, result: Ok(len) }));
        Ok(())
    }

    fn sync(&mut self, _data_only: bool) -> Result<()> {
        Ok(())
    }

    fn is_synchronous(&self) -> bool {
        false
    }
}
