//! Registered device memory, one slot for each thread that reads.

use std::sync::Arc;

use super::CuFile;
use crate::driver::{DeviceMemory, Driver};
use crate::error::Result;

/// Alignment of a slot: cuFile is fastest where device addresses are multiples of the GPU's 64 KiB pages.
const ALIGN: u64 = 64 << 10;

/// Slots of device memory that cuFile knows. Deregistered before it is freed: nvidia-fs can deadlock otherwise.
#[derive(Debug)]
pub struct Staging {
    cufile: Arc<dyn CuFile>,
    memory: Option<DeviceMemory>,
    /// Where the first slot starts in the memory.
    first: u64,
    slot: u64,
    slots: u32,
}

impl Staging {
    /// Takes and registers `slots` slots of at least `slot` bytes.
    pub fn new(driver: &Arc<dyn Driver>, cufile: &Arc<dyn CuFile>, slot: u64, slots: u32) -> Result<Staging> {
        let slot = slot.next_multiple_of(ALIGN);
        let tried = || format!("take {slots} x {slot} bytes on the device for cuFile");
        let memory = DeviceMemory::new(driver, slot * u64::from(slots) + ALIGN)
            .map_err(|error| error.context(tried()))?;
        let first = memory.address().next_multiple_of(ALIGN) - memory.address();
        cufile.register(memory.address(), memory.len()).map_err(|error| error.context(tried()))?;
        Ok(Staging { cufile: cufile.clone(), memory: Some(memory), first, slot, slots })
    }

    /// What the memory was registered as.
    pub fn base(&self) -> u64 {
        self.memory.as_ref().map_or(0, DeviceMemory::address)
    }

    /// Bytes taken on the device.
    pub fn len(&self) -> u64 {
        self.memory.as_ref().map_or(0, DeviceMemory::len)
    }

    /// Whether nothing was taken.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where a slot starts, counted from [`base`](Self::base).
    pub fn at(&self, slot: u32) -> u64 {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        self.first + u64::from(slot) * self.slot
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        if let Err(error) = self.cufile.deregister(memory.address()) {
            // Freed now, it might be somebody else's while a drive still knows it.
            tracing::error!("{error}; {} bytes of device memory stay taken", memory.len());
            std::mem::forget(memory);
        }
    }
}
