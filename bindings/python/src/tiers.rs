//! RAM tiers of pools that this process owns, known to its devices: what is in one goes to a device from where it lies.

use std::sync::Arc;
use std::sync::{Mutex, PoisonError};

use engine::Session;
use gpudirect::{Lane, PinnedTier, Plan};

use crate::memory::aside;
use crate::process::{Born, Mine};

/// Of one pool: its tier, by device. Pinned once, at the first load that finds something in it.
#[derive(Debug)]
pub struct Tiers {
    pinned: Mutex<Vec<(String, Mine<Arc<PinnedTier>>)>>,
    born: Born,
}

impl Default for Tiers {
    fn default() -> Tiers {
        Tiers { pinned: Mutex::default(), born: Born::now() }
    }
}

impl Tiers {
    /// Lets a lane take what the tier has of a plan. Says why where that cannot be: the load goes on without.
    pub fn lend(&self, session: &Session, plan: &Plan, lane: &mut Lane, device: &str) -> Option<String> {
        let arena = session.pool()?.ram_arena()?;
        if !plan.wants_tier() {
            return None;
        }
        let mut lent = || -> gpudirect::Result<()> {
            // A lane may have a driver of its own: what is pinned already is only counted then.
            let tier = PinnedTier::new(lane.driver(), arena)?;
            let mut tiers = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
            if !tiers.iter().any(|(known, _)| known == device) {
                tiers.push((device.to_owned(), Mine::new(tier.clone())));
            }
            drop(tiers);
            lane.use_tier(tier)
        };
        lent()
            .err()
            .map(|error| format!("what the RAM tier of the pool has was read from its members: {error}"))
    }

    /// Lets go of it.
    pub fn clear(&self) {
        // In a child that was forked the lock may be held for ever.
        if !self.born.here() {
            return;
        }
        let tiers = std::mem::take(&mut *self.pinned.lock().unwrap_or_else(PoisonError::into_inner));
        if tiers.iter().any(|(device, _)| device.starts_with("cuda")) {
            aside(move || drop(tiers));
        }
    }
}

impl Drop for Tiers {
    fn drop(&mut self) {
        self.clear();
    }
}
