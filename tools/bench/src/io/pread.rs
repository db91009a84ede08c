//! `pread(2)` and `pwrite(2)`, one at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nvme::Buffer;

use super::{Done, Files, IoEngine, Queued, Transfer, slot_buffers};
use crate::error::{Error, Result};
use crate::layout::open_file;
use crate::settings::{Direction, Settings};

pub struct PreadEngine {
    files: Vec<(File, PathBuf)>,
    buffers: Vec<Buffer>,
}

impl PreadEngine {
    pub fn open(settings: &Settings, files: &Files) -> Result<PreadEngine> {
        let open =
            |path: &PathBuf| Ok((open_file(path, settings.pattern.write, settings.direct)?, path.clone()));
        Ok(PreadEngine {
            files: files.paths.iter().map(open).collect::<Result<_>>()?,
            buffers: slot_buffers(settings, 1)?,
        })
    }

    fn transfer(&mut self, slot: u32, transfer: Transfer) -> Result<u32> {
        let (file, path) = &self.files[transfer.file as usize];
        let buffer = &mut self.buffers[slot as usize][..transfer.len as usize];
        let mut at = 0;
        while at < buffer.len() {
            let offset = transfer.offset + at as u64;
            let moved = match transfer.direction {
                Direction::Read => file.read_at(&mut buffer[at..], offset),
                Direction::Write => file.write_at(&buffer[at..], offset),
            };
            match moved {
                Ok(0) => break,
                Ok(moved) => at += moved,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let verb = if transfer.direction == Direction::Read { "read" } else { "write" };
                    return Err(Error::io(format!("cannot {verb} {} at {offset}", path.display()), error));
                }
            }
        }
        Ok(at as u32)
    }
}

impl IoEngine for PreadEngine {
    fn buffer(&mut self, slot: u32) -> &mut [u8] {
        &mut self.buffers[slot as usize]
    }

    fn queue(&mut self, slot: u32, transfer: Transfer) -> Result<Queued> {
        Ok(Queued::Finished(self.transfer(slot, transfer)))
    }

    fn commit(&mut self) -> Result<()> {
        Ok(())
    }

    fn reap(&mut self, _min: usize, _done: &mut Vec<Done>) -> Result<()> {
        Ok(())
    }

    fn sync(&mut self, data_only: bool) -> Result<()> {
        for (file, path) in &self.files {
            let synced = if data_only { file.sync_data() } else { file.sync_all() };
            synced.map_err(|error| Error::io(format!("cannot sync {}", path.display()), error))?;
        }
        Ok(())
    }

    fn is_synchronous(&self) -> bool {
        true
    }
}
