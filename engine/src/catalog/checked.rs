//! Reads of the catalog that are believed only when they fit what is known of the page.
//!
//! The store (redb) compares its pages with their sums when it opens a database, and believes what it reads from then on. A page that
//! comes back wrong later, a bit flipped on its way or another page in its place, would be copied into the next transaction, with a
//! good sum. So the first sight of a page (which the check at open vouches for) and every write of one leave its sum here, and every
//! later read must fit it. A read that does not, or fails, is made once more.
//!
//! The first 4096 bytes are left to the store: they have two sums of their own, and hold the word on which transaction counts.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

const PAGE: u64 = 4096;
/// No sum is known: the sum of a page that has this one is not remembered, at a price of one page in 2^32.
const UNKNOWN: u32 = 0;

/// A backend whose pages are compared with what they were.
#[derive(Debug)]
pub(crate) struct Checked {
    inner: Box<dyn StorageBackend>,
    /// What messages call it.
    name: String,
    sums: Mutex<Vec<u32>>,
}

impl Checked {
    pub(crate) fn new(inner: Box<dyn StorageBackend>, name: String) -> Checked {
        Checked { inner, name, sums: Mutex::default() }
    }

    fn sums(&self) -> MutexGuard<'_, Vec<u32>> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first page of `bytes` that is not what it was.
    fn differs(&self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let sums = self.sums();
        whole_pages(offset, bytes).find_map(|(page, bytes)| {
            let known = sums.get(page as usize).copied().unwrap_or(UNKNOWN);
            (known != UNKNOWN && crc32fast::hash(bytes) != known).then_some(page * PAGE)
        })
    }

    fn remember(&self, offset: u64, bytes: &[u8]) {
        let mut sums = self.sums();
        for (page, bytes) in whole_pages(offset, bytes) {
            let index = page as usize;
            if sums.len() <= index {
                sums.resize(index + 1, UNKNOWN);
            }
            sums[index] = crc32fast::hash(bytes);
        }
    }

    fn forget(&self, from: u64, to: u64) {
        let mut sums = self.sums();
        let end = (to.div_ceil(PAGE) as usize).min(sums.len());
        let start = ((from / PAGE) as usize).min(end);
        sums[start..end].fill(UNKNOWN);
    }
}

/// The whole pages of a transfer, without page 0.
fn whole_pages(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let first = offset.div_ceil(PAGE).max(1);
    let skip = (first * PAGE).saturating_sub(offset).min(bytes.len() as u64) as usize;
    (first..).zip(bytes[skip..].chunks_exact(PAGE as usize))
}

impl StorageBackend for Checked {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let first = self.inner.read(offset, out);
        let wrong = match &first {
            Ok(()) => match self.differs(offset, out) {
                None => {
                    self.remember(offset, out);
                    return Ok(());
                }
                Some(page) => format!("the page at {page} is another one than before"),
            },
            // Beyond the end: not a matter of trying again.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return first,
            Err(error) => error.to_string(),
        };
        tracing::warn!(offset, len = out.len(), "{}: {wrong}; reading it again", self.name);
        self.inner.read(offset, out)?;
        if let Some(page) = self.differs(offset, out) {
            let text = format!("the page at {page} of {} is not what was written there", self.name);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        self.remember(offset, out);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let done = self.inner.set_len(len);
        self.forget(len, u64::MAX);
        done
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.forget(offset, offset + data.len() as u64);
        self.inner.write(offset, data)?;
        self.remember(offset, data);
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use redb::ReadableDatabase;
    use redb::backends::InMemoryBackend;

    use super::*;

    /// Memory, below which a test can reach, that flips a bit in the next read or fails it.
    #[derive(Debug, Default)]
    struct Fickle {
        memory: InMemoryBackend,
        flip: Mutex<u32>,
        fail: Mutex<u32>,
    }

    #[derive(Debug)]
    struct Shared(Arc<Fickle>);

    impl StorageBackend for Shared {
        fn len(&self) -> io::Result<u64> {
            self.0.memory.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            let spend = |left: &Mutex<u32>| {
                let mut left = left.lock().unwrap();
                let some = *left > 0;
                *left -= u32::from(some);
                some
            };
            if spend(&self.0.fail) {
                return Err(io::Error::other("injected"));
            }
            self.0.memory.read(offset, out)?;
            if spend(&self.0.flip) {
                out[7] ^= 1;
            }
            Ok(())
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.memory.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            Ok(())
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.memory.write(offset, data)
        }
    }

    #[test]
    fn a_page_that_changed_on_its_way_is_read_again() {
        let below = Arc::new(Fickle::default());
        let checked = Checked::new(Box::new(Shared(below.clone())), "it".into());
        checked.set_len(5 * PAGE).unwrap();
        let page = |byte| vec![byte; PAGE as usize];
        for at in 1..5 {
            checked.write(at * PAGE, &page(at as u8)).unwrap();
        }
        let read = |at: u64, pages: usize| {
            let mut bytes = vec![0; pages * PAGE as usize];
            checked.read(at * PAGE, &mut bytes).map(|()| bytes)
        };
        *below.flip.lock().unwrap() = 1;
        assert_eq!(read(2, 2).unwrap(), [page(2), page(3)].concat());
        *below.fail.lock().unwrap() = 1;
        assert_eq!(read(1, 1).unwrap(), page(1));
        *below.fail.lock().unwrap() = 2;
        assert_eq!(read(1, 1).unwrap_err().kind(), io::ErrorKind::Other);
        // A write that was acknowledged and never done, or went astray.
        below.memory.write(3 * PAGE, &page(9)).unwrap();
        let error = read(3, 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("12288 of it"), "{error}");
        // Written over, it is what it is now; a part of a page leaves it unknown.
        checked.write(3 * PAGE, &page(10)).unwrap();
        assert_eq!(read(3, 1).unwrap(), page(10));
        checked.write(3 * PAGE + 5, b"part").unwrap();
        assert_eq!(&read(3, 1).unwrap()[5..9], b"part");
        checked.set_len(3 * PAGE).unwrap();
        checked.set_len(5 * PAGE).unwrap();
        assert_eq!(read(3, 1).unwrap(), page(0));
    }

    #[test]
    fn a_database_lives_on_it() {
        let below = Arc::new(Fickle::default());
        let table: redb::TableDefinition<'_, u64, &[u8]> = redb::TableDefinition::new("t");
        let db = redb::Database::builder()
            .set_cache_size(0)
            .create_with_backend(super::super::backend::Boxed(Box::new(Checked::new(
                Box::new(Shared(below.clone())),
                "it".into(),
            ))))
            .unwrap();
        for round in 0..20u64 {
            let txn = db.begin_write().unwrap();
            for key in 0..50 {
                // Every read of a page may be wrong once.
                *below.flip.lock().unwrap() = u32::from(key % 3 == 0);
                txn.open_table(table).unwrap().insert(key, &[round as u8; 300][..]).unwrap();
            }
            txn.commit().unwrap();
            let txn = db.begin_read().unwrap();
            let table = txn.open_table(table).unwrap();
            for key in 0..50 {
                *below.flip.lock().unwrap() = u32::from(key % 2 == 0);
                assert_eq!(table.get(key).unwrap().unwrap().value(), [round as u8; 300]);
            }
        }
    }
}
