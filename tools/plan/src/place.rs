//! Where each part lives: the fastest tier that has room, in the order in which parts are worth it.

use serde::Serialize;

/// A part of what is needed, and where it lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What it is.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Of these, bytes in the GPU's memory.
    pub vram: u64,
    /// In host memory.
    pub ram: u64,
    /// On the drives.
    pub nvme: u64,
}

/// Room that is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes in the GPU's memory.
    pub vram: u64,
    /// In host memory.
    pub ram: u64,
    /// On the drives.
    pub nvme: u64,
}

/// Which tiers a part may live in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    /// The GPU's memory, and nowhere else.
    Vram,
    /// Any, the fastest first.
    Any,
    /// Host memory or drives.
    Below,
    /// Drives only: files.
    Nvme,
}

/// Parts that were placed, and what did not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// In the order in which they were placed.
    pub parts: Vec<Part>,
    /// Bytes that must be in the GPU's memory and are not.
    pub short_vram: u64,
    /// Bytes that have room nowhere.
    pub short_nvme: u64,
}

impl Placed {
    /// Places a part.
    pub fn put(&mut self, room: &mut Room, name: impl Into<String>, bytes: u64, may: May) -> &Part {
        let mut part = Part { name: name.into(), bytes, vram: 0, ram: 0, nvme: 0 };
        let mut left = bytes;
        let mut take = |from: &mut u64| {
            let taken = left.min(*from);
            *from -= taken;
            left -= taken;
            taken
        };
        if matches!(may, May::Vram | May::Any) {
            part.vram = take(&mut room.vram);
        }
        if matches!(may, May::Any | May::Below) {
            part.ram = take(&mut room.ram);
        }
        if may != May::Vram {
            part.nvme = take(&mut room.nvme);
        }
        match may {
            May::Vram => self.short_vram += left,
            _ => self.short_nvme += left,
        }
        self.parts.push(part);
        self.parts.last().expect("it was just put")
    }

    /// Whether everything has its place.
    pub fn fits(&self) -> bool {
        self.short_vram == 0 && self.short_nvme == 0
    }

    /// Bytes of all parts in each tier.
    pub fn used(&self) -> Room {
        let sum = |of: fn(&Part) -> u64| self.parts.iter().map(of).fold(0, u64::saturating_add);
        Room { vram: sum(|part| part.vram), ram: sum(|part| part.ram), nvme: sum(|part| part.nvme) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_spill_from_tier_to_tier() {
        let mut room = Room { vram: 10, ram: 5, nvme: 100 };
        let mut placed = Placed::default();
        placed.put(&mut room, "must", 4, May::Vram);
        placed.put(&mut room, "any", 12, May::Any);
        placed.put(&mut room, "below", 3, May::Below);
        placed.put(&mut room, "files", 50, May::Nvme);
        let at = |index: usize| {
            let part: &Part = &placed.parts[index];
            (part.vram, part.ram, part.nvme)
        };
        assert_eq!([at(0), at(1), at(2), at(3)], [(4, 0, 0), (6, 5, 1), (0, 0, 3), (0, 0, 50)]);
        assert!(placed.fits());
        assert_eq!(placed.used(), Room { vram: 10, ram: 5, nvme: 54 });
        placed.put(&mut room, "more", 1, May::Vram);
        placed.put(&mut room, "most", 47, May::Any);
        assert_eq!((placed.short_vram, placed.short_nvme, placed.fits()), (1, 1, false));
    }
}
