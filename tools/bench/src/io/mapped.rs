//! Loads and stores through a shared mapping, as fio's `mmap`.

use std::path::PathBuf;

use nvme::{Buffer, MappedFile};

use super::{Done, Files, IoEngine, Queued, Transfer, slot_buffers};
use crate::error::{Error, Result};
use crate::layout::open_file;
use crate::settings::{Direction, Settings};

pub struct MmapEngine {
    files: Vec<(MappedFile, PathBuf)>,
    buffers: Vec<Buffer>,
}

impl MmapEngine {
    pub fn open(settings: &Settings, files: &Files) -> Result<MmapEngine> {
        let open = |path: &PathBuf| {
            let file = open_file(path, settings.pattern.write, false)?;
            let mapped = MappedFile::new(file, settings.pattern.write)
                .map_err(|error| Error::nvme(format!("cannot map {}", path.display()), error))?;
            if settings.pattern.random { mapped.advise_random() } else { mapped.advise_sequential() }
                .map_err(|error| Error::nvme(format!("cannot madvise {}", path.display()), error))?;
            Ok((mapped, path.clone()))
        };
        Ok(MmapEngine {
            files: files.paths.iter().map(open).collect::<Result<_>>()?,
            buffers: slot_buffers(settings, 1)?,
        })
    }
}

impl IoEngine for MmapEngine {
    fn buffer(&mut self, slot: u32) -> &mut [u8] {
        &mut self.buffers[slot as usize]
    }

    fn queue(&mut self, slot: u32, transfer: Transfer) -> Result<Queued> {
        let (mapped, path) = &self.files[transfer.file as usize];
        let buffer = &mut self.buffers[slot as usize][..transfer.len as usize];
        let moved = match transfer.direction {
            Direction::Read => mapped.read_at(transfer.offset, buffer),
            Direction::Write => mapped.write_at(transfer.offset, buffer),
        };
        let moved = moved.map(|()| transfer.len);
        Ok(Queued::Finished(moved.map_err(|error| {
            Error::nvme(
                format!("cannot copy {} bytes at {} of {}", transfer.len, transfer.offset, path.display()),
                error,
            )
        })))
    }

    fn commit(&mut self) -> Result<()> {
        Ok(())
    }

    fn reap(&mut self, _min: usize, _done: &mut Vec<Done>) -> Result<()> {
        Ok(())
    }

    fn sync(&mut self, _data_only: bool) -> Result<()> {
        for (mapped, path) in &self.files {
            mapped.sync().map_err(|error| Error::nvme(format!("cannot msync {}", path.display()), error))?;
        }
        Ok(())
    }

    fn is_synchronous(&self) -> bool {
        true
    }
}
