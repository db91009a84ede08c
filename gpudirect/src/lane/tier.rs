//! The RAM tier of a pool as a source of copies.

use std::sync::Arc;

use engine::Resident;
use nvme::Arena;

use super::Lane;
use super::lend::Loan;
use super::pieces::Run;
use crate::driver::{Driver, Lent};
use crate::error::{Error, ErrorKind, Result};

/// A pool's RAM tier, known to a device, so that what is in it is copied from where it is. Pinning takes all of the tier's
/// budget from the machine's memory, whether bytes are in it or not; one of these is enough for all lanes of a device.
#[derive(Debug)]
pub struct PinnedTier {
    driver: Arc<dyn Driver>,
    arena: Arena,
}

impl PinnedTier {
    /// Pins the arena of a tier: [`engine::Pool::ram_arena`].
    pub fn new(driver: &Arc<dyn Driver>, arena: &Arena) -> Result<Arc<PinnedTier>> {
        driver.pin(arena).map_err(|error| error.context("pin the RAM tier of a pool"))?;
        Ok(Arc::new(PinnedTier { driver: driver.clone(), arena: arena.clone() }))
    }

    /// The device that knows it.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Bytes that are pinned.
    pub fn len(&self) -> u64 {
        self.arena.len() as u64
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is this arena.
    pub(super) fn is(&self, arena: &Arena) -> bool {
        self.arena.as_ptr() == arena.as_ptr()
    }
}

impl Drop for PinnedTier {
    fn drop(&mut self) {
        if let Err(error) = self.driver.unpin(&self.arena) {
            // The device may still know these pages: they must not become somebody else's.
            tracing::error!("{error}; the RAM tier's {} bytes stay mapped", self.arena.len());
            std::mem::forget(self.arena.clone());
        }
    }
}

impl Lane {
    /// From now on what this tier has is copied from there: it is neither read nor copied on the host.
    pub fn use_tier(&mut self, tier: Arc<PinnedTier>) -> Result<()> {
        if !Arc::ptr_eq(&tier.driver, &self.driver) {
            return Err(Error::new(ErrorKind::Invalid, "use a RAM tier that is pinned for another device"));
        }
        if !self.tiers.iter().any(|other| Arc::ptr_eq(other, &tier)) {
            self.tiers.push(tier);
        }
        Ok(())
    }

    /// Uses no RAM tier from now on: they may be unpinned.
    pub fn leave_tiers(&mut self) {
        self.tiers.clear();
    }
}

/// Takes out of `runs` (of one source) what is resident; the pages are held by the loans. Both are in order.
pub(super) fn split(runs: Vec<Run>, resident: &[Resident], rest: &mut Vec<Run>, loans: &mut Vec<Loan>) {
    for run in runs {
        let (mut at, end) = (run.offset, run.offset + run.len);
        let part = |from: u64, until: u64| Run {
            offset: from,
            len: until - from,
            device: run.device + (from - run.offset),
            ..run
        };
        let first = resident.partition_point(|r| r.logical + r.bytes.len() as u64 <= at);
        for page in resident[first..].iter().take_while(|page| page.logical < end) {
            let from = page.logical.max(at);
            let until = (page.logical + page.bytes.len() as u64).min(end);
            if from >= until {
                continue;
            }
            if at < from {
                rest.push(part(at, from));
            }
            loans.push(Loan {
                lent: Lent::Page(page.page.clone()),
                offset: page.bytes.start + (from - page.logical) as usize,
                device: run.device + (from - run.offset),
                len: (until - from) as usize,
            });
            at = until;
        }
        if at < end {
            rest.push(part(at, end));
        }
    }
}
