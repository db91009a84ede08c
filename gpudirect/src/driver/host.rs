//! The machine's own memory as a device: for loads without a GPU, and so that everything above runs in any test.
//!
//! Copies run on a thread of the stream, in order, as a GPU's copy engine does them beside the I/O. Files in the page cache are
//! not read through a mapping: a file that is truncated would end the process, since here it is the processor that reads.

use std::sync::Arc;

use nvme::Arena;

use super::copier::{Copier, Work};
use super::memory::{GRANULARITY, Memory};
use super::{DeviceCopy, DeviceInfo, Driver, Stream, VirtualMemory};
use crate::error::{Error, ErrorKind, Result};

/// The machine's memory.
#[derive(Debug, Default)]
pub struct HostDriver {
    memory: Arc<Memory>,
}

impl HostDriver {
    /// Opens it.
    pub fn new() -> HostDriver {
        HostDriver::default()
    }

    /// The kernel would promise more than there is, and end some process for it later.
    fn check_free(&self, len: u64) -> Result<()> {
        let free = self.info()?.free_bytes;
        if free > 0 && len > free {
            let context = format!("allocate {len} bytes of host memory for tensors: {free} are available");
            return Err(Error::new(ErrorKind::OutOfDeviceMemory, context));
        }
        Ok(())
    }
}

impl Driver for HostDriver {
    fn info(&self) -> Result<DeviceInfo> {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        Ok(DeviceInfo {
            id: "cpu".into(),
            name: "host memory".into(),
            pci: String::new(),
            memory_bytes: field("MemTotal:"),
            free_bytes: field("MemAvailable:"),
            driver: String::new(),
        })
    }

    fn pin(&self, _: &Arena) -> Result<()> {
        Ok(())
    }

    fn unpin(&self, _: &Arena) -> Result<()> {
        Ok(())
    }

    fn alloc(&self, len: u64) -> Result<u64> {
        self.check_free(len)?;
        self.memory.alloc(len, None)
    }

    fn free(&self, address: u64) -> Result<()> {
        self.memory.free(address).map(drop)
    }

    fn stream(&self) -> Result<Box<dyn Stream>> {
        let memory = self.memory.clone();
        let unmapped = |_: &_, _, _: &mut [u8]| {
            Err(Error::new(ErrorKind::Unsupported, "host memory reads no mapped files"))
        };
        Ok(Box::new(Copier::start(0, move |work| match work {
            Work::Copy(batch) => memory.copy(batch, &unmapped),
            Work::Move(job) => memory.shuffle(job),
        })?))
    }

    fn copy_within(&self, moves: &[DeviceCopy]) -> Result<()> {
        self.memory.copy_within(moves)
    }

    fn check_range(&self, address: u64, len: u64) -> Result<()> {
        self.memory.check_range(address, len)
    }

    fn virtual_memory(&self) -> Option<&dyn VirtualMemory> {
        Some(self)
    }
}

impl VirtualMemory for HostDriver {
    fn granularity(&self) -> Result<u64> {
        Ok(GRANULARITY)
    }

    fn reserve(&self, len: u64) -> Result<u64> {
        self.memory.reserve(len)
    }

    fn unreserve(&self, address: u64, len: u64) -> Result<()> {
        self.memory.unreserve(address, len)
    }

    fn create(&self, len: u64) -> Result<u64> {
        self.check_free(len)?;
        self.memory.create(len)
    }

    fn release(&self, physical: u64) -> Result<()> {
        self.memory.release(physical)
    }

    fn map(&self, address: u64, len: u64, physical: u64) -> Result<()> {
        self.memory.map(address, len, physical, None)
    }

    fn unmap(&self, address: u64, len: u64) -> Result<()> {
        self.memory.unmap(address, len)
    }
}
