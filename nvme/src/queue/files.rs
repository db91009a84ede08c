//! Which device sits in which slot of the ring's table of registered files.
//!
//! A registered descriptor saves the kernel a lookup and a reference count per operation. Devices are told apart
//! by the address of their Arc; a Weak keeps that address from being reused.

use std::sync::{Arc, Weak};

use crate::device::Device;

/// Slots in the table. More devices than that take turns.
pub(super) const SLOTS: u32 = 64;

/// No slot: the operation names its descriptor.
pub(super) const NONE: u32 = u32::MAX;

struct Slot {
    device: Weak<dyn Device>,
    /// Operations pushed with this slot and not answered.
    in_flight: u32,
    /// When it was switched to last, for eviction.
    used: u64,
    /// Its owner wants it out.
    doomed: bool,
}

#[derive(Default)]
pub(super) struct FileTable {
    /// Addresses, apart from the slots so that a search reads one or two cache lines. 0: empty.
    ids: Vec<usize>,
    slots: Vec<Slot>,
    last: usize,
    clock: u64,
}

pub(super) fn id_of(device: &Arc<dyn Device>) -> usize {
    Arc::as_ptr(device).cast::<()>() as usize
}

impl FileTable {
    /// The slot of `device`, now with one operation more in flight.
    #[inline]
    pub(super) fn find(&mut self, device: &Arc<dyn Device>) -> Option<u32> {
        let id = id_of(device);
        if self.ids.get(self.last) != Some(&id) {
            self.last = self.ids.iter().position(|&other| other == id)?;
            self.clock += 1;
            self.slots[self.last].used = self.clock;
        }
        self.slots[self.last].in_flight += 1;
        Some(self.last as u32)
    }

    /// A slot that `device` may have: a new one, an empty one, or that of the device not used for longest. None
    /// when operations are in flight on all.
    pub(super) fn vacancy(&self) -> Option<u32> {
        if let Some(empty) = self.ids.iter().position(|&id| id == 0) {
            return Some(empty as u32);
        }
        if self.slots.len() < SLOTS as usize {
            return Some(self.slots.len() as u32);
        }
        let idle = self.slots.iter().enumerate().filter(|(_, slot)| slot.in_flight == 0);
        idle.min_by_key(|(_, slot)| slot.used).map(|(index, _)| index as u32)
    }

    /// Notes that `slot` now holds `device`.
    pub(super) fn assign(&mut self, slot: u32, device: &Arc<dyn Device>) {
        self.clock += 1;
        let entry = Slot { device: Arc::downgrade(device), in_flight: 0, used: self.clock, doomed: false };
        let index = slot as usize;
        if index == self.slots.len() {
            self.ids.push(0);
            self.slots.push(entry);
        } else {
            self.slots[index] = entry;
        }
        self.ids[index] = id_of(device);
    }

    /// An operation with this slot was answered.
    #[inline]
    pub(super) fn release(&mut self, slot: u32) {
        if slot != NONE {
            self.slots[slot as usize].in_flight -= 1;
        }
    }

    /// Marks the device's slot to be emptied.
    pub(super) fn doom(&mut self, device: &Arc<dyn Device>) {
        let id = id_of(device);
        if let Some(index) = self.ids.iter().position(|&other| other == id) {
            self.slots[index].doomed = true;
        }
    }

    /// A slot to be emptied: its device is gone or told to be forgotten, and nothing is in flight on it.
    pub(super) fn next_dead(&self) -> Option<u32> {
        let dead = |(index, slot): (usize, &Slot)| {
            let gone = slot.doomed || slot.device.strong_count() == 0;
            (self.ids[index] != 0 && slot.in_flight == 0 && gone).then_some(index as u32)
        };
        self.slots.iter().enumerate().find_map(dead)
    }

    /// Notes that `slot` is empty.
    pub(super) fn vacate(&mut self, slot: u32) {
        self.ids[slot as usize] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{SimDevice, SimOptions};

    fn device() -> Arc<dyn Device> {
        Arc::new(SimDevice::new(4096, SimOptions::default()).unwrap())
    }

    #[test]
    fn the_least_recently_used_idle_slot_is_given_away() {
        let mut table = FileTable::default();
        let devices: Vec<_> = (0..SLOTS).map(|_| device()).collect();
        for device in &devices {
            let slot = table.vacancy().unwrap();
            table.assign(slot, device);
        }
        // 0 is busy, 1 was used after all others, so 2 goes.
        assert_eq!(table.find(&devices[0]), Some(0));
        assert_eq!(table.find(&devices[1]), Some(1));
        table.release(1);
        assert_eq!(table.vacancy(), Some(2));
        let new = device();
        table.assign(2, &new);
        assert_eq!(table.find(&devices[2]), None);
        assert_eq!(table.find(&new), Some(2));
    }

    #[test]
    fn a_slot_is_dead_once_its_device_is_gone_and_idle() {
        let mut table = FileTable::default();
        let (a, b) = (device(), device());
        table.assign(0, &a);
        table.assign(1, &b);
        assert_eq!(table.next_dead(), None);
        assert_eq!(table.find(&b), Some(1));
        drop(b);
        assert_eq!(table.next_dead(), None, "an operation is in flight on it");
        table.release(1);
        assert_eq!(table.next_dead(), Some(1));
        table.vacate(1);
        assert_eq!((table.next_dead(), table.vacancy()), (None, Some(1)));
        table.doom(&a);
        assert_eq!(table.next_dead(), Some(0));
    }

    #[test]
    fn no_vacancy_while_all_are_busy() {
        let mut table = FileTable::default();
        let devices: Vec<_> = (0..SLOTS).map(|_| device()).collect();
        for (slot, device) in (0..SLOTS).zip(&devices) {
            table.assign(slot, device);
            table.find(device);
        }
        assert_eq!(table.vacancy(), None);
        table.release(7);
        assert_eq!(table.vacancy(), Some(7));
    }
}
