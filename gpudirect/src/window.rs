//! A window: addresses on the device for all of a region, and memory for a part of it.
//!
//! ```text
//! addresses   |----page----|----page----|----page----|----page----|   reserved once; a tensor's never changes
//! memory           #0                        #1                       never more than the budget
//! ```
//!
//! [`Window::ensure`] brings pages in, reading what is missing through a lane, and pins them for as long as the [`Pin`] lives;
//! the page that was asked for longest ago and is not pinned gives its memory to the next one. Memory that was evicted is not
//! given back to the device but mapped elsewhere.
//!
//! The budget is hard: that many physical pages are taken and no more. What cannot be held at once is an error before
//! anything is evicted. When a read fails, the pages that were to be filled are gone, and all others are as they were or,
//! where they gave way, gone.
//!
//! Windows are for reading. Whoever changes bytes in a window writes them back before it lets go of the pin
//! ([`Window::write_back`]): an evicted page is forgotten.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme::Device;

use crate::control::Control;
use crate::driver::{Driver, VirtualMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::lane::{Lane, Run};
use crate::source::Source;

/// Bytes that are written back at a time.
const WRITE_STEP: u64 = 4 << 20;

/// Addresses with memory for some; see the module documentation. Clones share it.
#[derive(Clone)]
pub struct Window {
    inner: Arc<Inner>,
}

struct Inner {
    driver: Arc<dyn Driver>,
    address: u64,
    len: u64,
    page: u64,
    budget_pages: usize,
    /// Holders of each page. Raised under the lock, lowered without.
    pins: Vec<AtomicU32>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Pages with memory: which memory, and when they were asked for last.
    resident: BTreeMap<usize, (u64, u64)>,
    /// Physical memory that is mapped nowhere.
    spare: Vec<u64>,
    /// Physical memory that could not be unmapped, given up.
    lost: usize,
    clock: u64,
    stats: WindowStats,
}

/// What a window did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct WindowStats {
    /// Bytes that have memory now.
    pub resident_bytes: u64,
    /// Physical memory taken, mapped or not.
    pub physical_bytes: u64,
    /// Pages that were there when they were asked for.
    pub hits: u64,
    /// Pages that were filled.
    pub fills: u64,
    /// Pages that gave way.
    pub evictions: u64,
}

/// Pages that stay until this is dropped. Drop it when what uses them on the device has ended.
#[derive(Debug)]
pub struct Pin {
    window: Window,
    pages: Range<usize>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        for pins in &self.window.inner.pins[self.pages.clone()] {
            pins.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn memory(driver: &dyn Driver) -> Result<&dyn VirtualMemory> {
    driver.virtual_memory().ok_or_else(|| {
        let context = "make a window: this device or its driver cannot reserve addresses without memory";
        Error::new(ErrorKind::Unsupported, context)
    })
}

impl Window {
    /// Reserves addresses for `len` bytes; `budget` is the most memory that it takes. Pages are as small as the device has
    /// them, 2 MiB on a GPU.
    pub fn new(driver: &Arc<dyn Driver>, len: u64, budget: u64) -> Result<Window> {
        Window::with_page(driver, len, budget, 1)
    }

    /// As [`new`](Self::new), with pages of at least `page` bytes: larger ones cost fewer calls of the driver.
    pub fn with_page(driver: &Arc<dyn Driver>, len: u64, budget: u64, page: u64) -> Result<Window> {
        let memory = memory(&**driver)?;
        let granularity = memory.granularity()?.max(1);
        let rounded = |value: u64, to: u64| {
            value.max(1).checked_next_multiple_of(to).ok_or_else(|| {
                Error::new(ErrorKind::Invalid, format!("a window of {len} bytes in pages of {page}"))
            })
        };
        let page = rounded(page, granularity)?;
        let whole = rounded(len, page)?;
        let budget_pages = usize::try_from(budget / page).unwrap_or(usize::MAX);
        if budget_pages == 0 {
            let context = format!("a window with a budget of {budget} bytes: one page has {page}");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let address = memory.reserve(whole)?;
        let pins = (0..whole / page).map(|_| AtomicU32::new(0)).collect();
        let state = Mutex::default();
        Ok(Window {
            inner: Arc::new(Inner { driver: driver.clone(), address, len, page, budget_pages, pins, state }),
        })
    }

    /// First byte on the device. Only what is pinned may be touched.
    pub fn address(&self) -> u64 {
        self.inner.address
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.inner.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> u64 {
        self.inner.page
    }

    /// The most memory that it takes.
    pub fn budget_bytes(&self) -> u64 {
        self.inner.budget_pages as u64 * self.inner.page
    }

    /// Counters now.
    pub fn stats(&self) -> WindowStats {
        let state = self.inner.state();
        WindowStats {
            resident_bytes: state.resident.len() as u64 * self.inner.page,
            physical_bytes: state.taken() as u64 * self.inner.page,
            ..state.stats
        }
    }

    /// Makes a range resident and pins it. What is missing is read from `source`, whose byte `offset` is the window's first; bytes
    /// behind the source's end are anything. One caller at a time reads, others wait for it.
    pub fn ensure(
        &self,
        lane: &mut Lane,
        source: &Source,
        offset: u64,
        range: Range<u64>,
        control: &mut Control<'_>,
    ) -> Result<Pin> {
        if !Arc::ptr_eq(lane.driver(), &self.inner.driver) {
            return Err(Error::new(ErrorKind::Invalid, "fill a window by a lane of another device"));
        }
        let sources = std::slice::from_ref(source);
        self.ensure_with(range, &mut |missing| {
            let mut runs = Vec::with_capacity(missing.len());
            for range in missing {
                let from = offset.saturating_add(range.start).min(source.len());
                let until = offset.saturating_add(range.end).min(source.len());
                if from < until {
                    runs.push(Run {
                        source: 0,
                        offset: from,
                        len: until - from,
                        device: self.inner.address + range.start,
                        tensor: 0,
                    });
                }
            }
            let read = lane.read(sources, &runs, &|_| format!("a window of {}", source.name()), control);
            if let Err(error) = read {
                if error.kind() != ErrorKind::Cancelled {
                    source.check_unchanged()?;
                }
                return Err(error);
            }
            source.check_unchanged()
        })
    }

    /// As [`ensure`](Self::ensure), with what is missing filled by `fill`: it gets ranges of the window, in order, that have memory
    /// now, at [`address`](Self::address) plus their offsets. It returns when all copies have ended.
    pub fn ensure_with(
        &self,
        range: Range<u64>,
        fill: &mut dyn FnMut(&[Range<u64>]) -> Result<()>,
    ) -> Result<Pin> {
        let inner = &*self.inner;
        let pages = inner.pages(&range)?;
        let mut state = inner.state();
        let missing: Vec<usize> = pages.clone().filter(|page| !state.resident.contains_key(page)).collect();
        // Held from here on: room is not made by what was asked for.
        let pin = self.pin(pages.clone());
        state.stats.hits += (pages.len() - missing.len()) as u64;
        if !missing.is_empty() {
            inner.make_room(&mut state, missing.len(), &range)?;
            let mut filling = Filling { inner, state: &mut state, pages: &missing };
            inner.map_all(filling.state, &missing)?;
            fill(&inner.ranges(&missing))?;
            filling.pages = &[];
            drop(filling);
            state.stats.fills += missing.len() as u64;
        }
        state.clock += 1;
        let clock = state.clock;
        for page in pages {
            if let Some((_, used)) = state.resident.get_mut(&page) {
                *used = clock;
            }
        }
        Ok(pin)
    }

    /// Forgets the pages that lie within a range and are not pinned. Returns their bytes.
    pub fn release(&self, range: Range<u64>) -> Result<u64> {
        let inner = &*self.inner;
        let touched = inner.pages(&range)?;
        let mut state = inner.state();
        let whole: Vec<usize> = state
            .resident
            .range(touched)
            .map(|(page, _)| *page)
            .filter(|page| {
                let start = *page as u64 * inner.page;
                start >= range.start && (start + inner.page).min(inner.len) <= range.end
            })
            .filter(|page| !inner.is_pinned(*page))
            .collect();
        for page in &whole {
            inner.drop_page(&mut state, *page);
        }
        Ok(whole.len() as u64 * inner.page)
    }

    /// Whether a range has memory, all of it.
    pub fn is_resident(&self, range: Range<u64>) -> bool {
        let state = self.inner.state();
        self.inner.pages(&range).is_ok_and(|mut pages| pages.all(|page| state.resident.contains_key(&page)))
    }

    /// Writes a range that `pin` holds to a device of storage, to `offset` there and on. For changed weights, not for speed;
    /// nothing is flushed.
    pub fn write_back(
        &self,
        lane: &Lane,
        pin: &Pin,
        range: Range<u64>,
        target: &dyn Device,
        offset: u64,
    ) -> Result<()> {
        let pages = self.inner.pages(&range)?;
        let held = Arc::ptr_eq(&pin.window.inner, &self.inner)
            && pages.start >= pin.pages.start
            && pages.end <= pin.pages.end;
        if !held || offset.checked_add(range.end - range.start).is_none() {
            let context = format!("write {range:?} of a window back: it is not pinned by what was given");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let mut bytes = vec![0; (range.end - range.start).min(WRITE_STEP) as usize];
        let mut at = range.start;
        while at < range.end {
            let part = &mut bytes[..(range.end - at).min(WRITE_STEP) as usize];
            lane.read_device(self.inner.address + at, part)?;
            target.write_at(offset + (at - range.start), part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn pin(&self, pages: Range<usize>) -> Pin {
        for pins in &self.inner.pins[pages.clone()] {
            pins.fetch_add(1, Ordering::AcqRel);
        }
        Pin { window: self.clone(), pages }
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.inner;
        f.debug_struct("Window").field("len", &inner.len).field("page", &inner.page).finish_non_exhaustive()
    }
}

impl State {
    fn taken(&self) -> usize {
        self.resident.len() + self.spare.len() + self.lost
    }
}

/// Pages that have memory and not yet their bytes: gone again, unless they are taken out of here.
struct Filling<'a> {
    inner: &'a Inner,
    state: &'a mut State,
    pages: &'a [usize],
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        for page in self.pages {
            self.inner.drop_page(self.state, *page);
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // A caller's `fill` that panicked left no page behind: see `Filling`.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages that a range touches.
    fn pages(&self, range: &Range<u64>) -> Result<Range<usize>> {
        if range.start > range.end || range.end > self.len {
            let context = format!("{range:?} of a window of {} bytes", self.len);
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        if range.start == range.end {
            return Ok(0..0);
        }
        Ok((range.start / self.page) as usize..range.end.div_ceil(self.page) as usize)
    }

    fn at(&self, page: usize) -> u64 {
        self.address + page as u64 * self.page
    }

    fn is_pinned(&self, page: usize) -> bool {
        self.pins[page].load(Ordering::Acquire) > 0
    }

    /// Neighbouring pages as ranges of the window, cut at its end.
    fn ranges(&self, pages: &[usize]) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for page in pages {
            let start = *page as u64 * self.page;
            let end = (start + self.page).min(self.len);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// Evicts until `count` pages can be mapped, or says that this cannot be before it evicts any.
    fn make_room(&self, state: &mut State, count: usize, range: &Range<u64>) -> Result<()> {
        let unused = self.budget_pages.saturating_sub(state.taken()) + state.spare.len();
        let mut idle: Vec<(u64, usize)> = state
            .resident
            .iter()
            .filter(|(page, _)| !self.is_pinned(**page))
            .map(|(page, (_, used))| (*used, *page))
            .collect();
        if unused + idle.len() < count {
            let context = format!(
                "make {range:?} of a window resident: {} bytes of its budget of {} are pinned, {} are needed; let go of \
                 pins, or ask for less at a time",
                (self.budget_pages - unused - idle.len()) as u64 * self.page,
                self.budget_pages as u64 * self.page,
                count as u64 * self.page
            );
            return Err(Error::new(ErrorKind::OutOfDeviceMemory, context));
        }
        idle.sort_unstable();
        for (_, page) in idle.into_iter().take(count.saturating_sub(unused)) {
            self.drop_page(state, page);
            state.stats.evictions += 1;
        }
        Ok(())
    }

    /// Gives each page memory. After an error those before it have some.
    fn map_all(&self, state: &mut State, pages: &[usize]) -> Result<()> {
        let memory = memory(&*self.driver)?;
        for page in pages {
            let physical = match state.spare.pop() {
                Some(physical) => physical,
                None if state.taken() >= self.budget_pages => {
                    let context = "map a page of a window: memory of it could not be unmapped before";
                    return Err(Error::new(ErrorKind::OutOfDeviceMemory, context));
                }
                None => memory.create(self.page)?,
            };
            if let Err(error) = memory.map(self.at(*page), self.page, physical) {
                state.spare.push(physical);
                return Err(error);
            }
            state.resident.insert(*page, (physical, 0));
        }
        Ok(())
    }

    /// Takes a page's memory away, if it has some, and keeps that for another one.
    fn drop_page(&self, state: &mut State, page: usize) {
        let Some((physical, _)) = state.resident.remove(&page) else { return };
        let unmapped = memory(&*self.driver).and_then(|memory| memory.unmap(self.at(page), self.page));
        match unmapped {
            Ok(()) => state.spare.push(physical),
            Err(error) => {
                // It cannot be mapped elsewhere, nor anything here: the budget shrinks.
                tracing::error!("evict a page of a window: {error}");
                state.lost += 1;
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Ok(memory) = memory(&*self.driver) else { return };
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut failed = state.lost > 0;
        let give_back = |result: Result<()>| {
            result.inspect_err(|error| tracing::error!("close a window: {error}")).is_err()
        };
        for (page, (physical, _)) in std::mem::take(&mut state.resident) {
            failed |= give_back(memory.unmap(self.address + page as u64 * self.page, self.page));
            state.spare.push(physical);
        }
        for physical in std::mem::take(&mut state.spare) {
            failed |= give_back(memory.release(physical));
        }
        let whole = self.pins.len() as u64 * self.page;
        if !failed {
            give_back(memory.unreserve(self.address, whole));
        }
    }
}
