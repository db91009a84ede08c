//! What redb writes to: a file, or nothing (an overlay in memory over what must stay untouched).

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use redb::StorageBackend;

/// A boxed backend, since redb wants a type.
#[derive(Debug)]
pub(crate) struct Boxed(pub Box<dyn StorageBackend>);

impl StorageBackend for Boxed {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }
}

/// A file. Takes no lock: the pool's owner lock covers it.
#[derive(Debug)]
pub(crate) struct FileStore(pub File);

impl StorageBackend for FileStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

const PAGE: u64 = 4096;

/// Reads go to `base` until something was written over it; writes stay in memory. This is how a catalog is opened read-only even
/// where redb has to repair it first.
#[derive(Debug)]
pub(crate) struct Overlay {
    base: Box<dyn StorageBackend>,
    state: Mutex<State>,
}

struct State {
    len: u64,
    /// What of `base` still shows.
    base_len: u64,
    pages: HashMap<u64, Box<[u8]>>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, {} pages written", self.len, self.pages.len())
    }
}

impl Overlay {
    pub(crate) fn new(base: Box<dyn StorageBackend>) -> io::Result<Overlay> {
        let len = base.len()?;
        Ok(Overlay { base, state: Mutex::new(State { len, base_len: len, pages: HashMap::new() }) })
    }

    fn page(&self, state: &State, index: u64) -> io::Result<Box<[u8]>> {
        if let Some(page) = state.pages.get(&index) {
            return Ok(page.clone());
        }
        let mut page = vec![0; PAGE as usize].into_boxed_slice();
        let start = index * PAGE;
        let there = state.base_len.saturating_sub(start).min(PAGE) as usize;
        if there > 0 {
            self.base.read(start, &mut page[..there])?;
        }
        Ok(page)
    }
}

/// `(page, offset in it, length)` of every page that `offset .. offset + len` touches.
fn spans(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset + len as u64;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (page, within) = (at / PAGE, at % PAGE);
        let take = (PAGE - within).min(end - at);
        at += take;
        Some((page, within as usize, take as usize))
    })
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner).len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > state.len) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "read beyond the end of the catalog"));
        }
        let mut done = 0;
        for (page, within, len) in spans(offset, out.len()) {
            out[done..done + len].copy_from_slice(&self.page(&state, page)?[within..within + len]);
            done += len;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if len < state.len {
            let state = &mut *state;
            state.base_len = state.base_len.min(len);
            let (last, within) = (len / PAGE, (len % PAGE) as usize);
            state.pages.retain(|page, bytes| {
                if *page == last {
                    bytes[within..].fill(0);
                }
                *page < last || (*page == last && within > 0)
            });
        }
        state.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        for (index, within, len) in spans(offset, data.len()) {
            let mut page = self.page(&state, index)?;
            page[within..within + len].copy_from_slice(&data[done..done + len]);
            state.pages.insert(index, page);
            done += len;
        }
        state.len = state.len.max(offset + data.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use redb::backends::InMemoryBackend;

    use super::*;

    fn contents(backend: &dyn StorageBackend) -> Vec<u8> {
        let mut bytes = vec![0; backend.len().unwrap() as usize];
        backend.read(0, &mut bytes).unwrap();
        bytes
    }

    proptest! {
        /// An overlay behaves as the storage it lies over, which stays as it was.
        #[test]
        fn overlay_is_a_copy(base in proptest::collection::vec(any::<u8>(), 0..20_000), ops in proptest::collection::vec((0u64..30_000, 0usize..9000, any::<u8>(), any::<bool>()), 0..20)) {
            let below = InMemoryBackend::new();
            below.set_len(base.len() as u64).unwrap();
            below.write(0, &base).unwrap();
            let overlay = Overlay::new(Box::new(below)).unwrap();
            let mut model = base.clone();
            for (offset, len, byte, resize) in ops {
                if resize {
                    overlay.set_len(offset).unwrap();
                    model.resize(offset as usize, 0);
                } else {
                    let offset = offset.min(model.len() as u64);
                    overlay.write(offset, &vec![byte; len]).unwrap();
                    let end = offset as usize + len;
                    model.resize(model.len().max(end), 0);
                    model[offset as usize..end].fill(byte);
                }
                prop_assert_eq!(contents(&overlay), model.clone());
            }
            prop_assert!(overlay.read(model.len() as u64, &mut [0]).is_err());
            prop_assert_eq!(contents(&*overlay.base), base);
        }
    }
}
