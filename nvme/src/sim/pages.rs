//! Sparse storage of a simulated device: pages that copies share until one of them is written.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Granule of the sparse storage, bytes: a multiple of every block size.
pub(super) const PAGE: u64 = 4 << 10;

type Page = Arc<Vec<u8>>;

/// Pages by number; one that is absent holds zeros.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages(HashMap<u64, Page>);

/// Calls `each(page, range in page, range in buffer)` for every page the range touches.
fn for_pages(offset: u64, len: u64, mut each: impl FnMut(u64, Range<usize>, Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let start = at % PAGE;
        let part = (PAGE - start).min(len - done);
        each(at / PAGE, start as usize..(start + part) as usize, done as usize..(done + part) as usize);
        done += part;
    }
}

impl Pages {
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        for_pages(offset, buf.len() as u64, |page, inside, outside| match self.0.get(&page) {
            Some(bytes) => buf[outside].copy_from_slice(&bytes[inside]),
            None => buf[outside].fill(0),
        });
    }

    pub fn write(&mut self, offset: u64, buf: &[u8]) {
        for_pages(offset, buf.len() as u64, |page, inside, outside| {
            let data = &buf[outside];
            match self.0.get_mut(&page) {
                Some(bytes) => Arc::make_mut(bytes)[inside].copy_from_slice(data),
                // Zeros over zeros: growing catalogs write a lot of them.
                None if data.iter().all(|byte| *byte == 0) => {}
                None => {
                    let mut bytes = vec![0; PAGE as usize];
                    bytes[inside].copy_from_slice(data);
                    self.0.insert(page, Arc::new(bytes));
                }
            }
        });
    }

    /// Makes zeros of a range. By what is stored, not by what is named: a range may span petabytes of holes.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        self.0.retain(|&page, bytes| {
            let start = page * PAGE;
            let (from, to) = (offset.max(start), end.min(start + PAGE));
            if from < to {
                if from == start && to == start + PAGE {
                    return false;
                }
                Arc::make_mut(bytes)[(from - start) as usize..(to - start) as usize].fill(0);
            }
            true
        });
    }

    pub fn page(&self, page: u64) -> Option<Page> {
        self.0.get(&page).cloned()
    }

    pub fn set_page(&mut self, page: u64, bytes: Option<Page>) {
        match bytes {
            Some(bytes) => drop(self.0.insert(page, bytes)),
            None => drop(self.0.remove(&page)),
        }
    }

    /// Numbers of the pages within a range that are stored.
    pub fn stored_within(&self, range: Range<u64>) -> Vec<u64> {
        let (first, last) = (range.start / PAGE, range.end.div_ceil(PAGE));
        if last - first < self.0.len() as u64 {
            return (first..last).filter(|page| self.0.contains_key(page)).collect();
        }
        self.0.keys().copied().filter(|page| (first..last).contains(page)).collect()
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }
}
