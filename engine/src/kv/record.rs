//! What the log holds, byte by byte; see docs/format.md.
//!
//! A log is pages of 4096 bytes: a header, a checkpoint, then what changed since. Each page stands alone: it says which life of which log it
//! belongs to, where, and has a sum. A page that fails is skipped: the index is a hint, and what it says of a block is checked when the block
//! is read.

use crate::error::{Error, ErrorKind, Result};

use super::Key;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
const HEAD: usize = 40;
/// Bytes of a page that hold records.
pub(crate) const PAGE_ROOM: usize = PAGE - HEAD;
const PAGE_MAGIC: &[u8; 8] = b"NVTKVLOG";
const HEADER_MAGIC: &[u8; 8] = b"NVTKVIDX";
/// Version of all of it.
pub(crate) const VERSION: u32 = 1;
/// Most bytes of a fingerprint.
pub const FINGERPRINT_MAX: usize = 1024;
/// Most bytes of a tenant's name.
pub const TENANT_MAX: usize = 255;

const PUT: u8 = 1;
const DROP: u8 = 2;
const NAMESPACE: u8 = 3;
const TENANT: u8 = 4;
const LEDGER: u8 = 5;

const PUT_LEN: usize = 64;
/// Blocks of which a page tells.
pub(crate) const PUTS_PER_PAGE: u64 = (PAGE_ROOM / PUT_LEN) as u64;
const DROP_LEN: usize = 48;
const LEDGER_LEN: usize = 24;

/// Generations and epochs stay below.
pub(crate) const GENERATION_MAX: u64 = 1 << 62;
/// Numbers of slabs stay below.
pub(crate) const SLAB_MAX: u32 = 1 << 31;

/// Kept when everything else would go.
pub(crate) const PINNED: u8 = 1;

/// A block as the index knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub key: Key,
    pub flags: u8,
    pub namespace: u16,
    pub tenant: u16,
    pub slab: u32,
    pub slot: u32,
    /// Another one for each put, ever.
    pub generation: u64,
    /// Of what the block is, and of its bytes: see [`super::sum_of`].
    pub sum: u32,
    /// Seconds since the epoch, 0: never.
    pub expires: u32,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// A block is there (or has other flags).
    Put(Block),
    /// A block is gone.
    Drop { key: Key, namespace: u16, tenant: u16, generation: u64 },
    /// What a namespace's number stands for.
    Namespace { id: u16, block_bytes: u32, fingerprint: Vec<u8> },
    /// What a tenant's number stands for. Quota in bytes, 0: none.
    Tenant { id: u16, quota: u64, name: Vec<u8> },
    /// Bytes of blocks written: on this day (since the epoch), and ever.
    Ledger { day: u32, today: u64, total: u64 },
}

/// The first page of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub pool: [u8; 16],
    /// Rises with each checkpoint.
    pub epoch: u64,
    /// What this life's pages carry.
    pub nonce: u64,
    /// Pages of the checkpoint, after the header.
    pub checkpoint_pages: u64,
    /// Generations below were given out.
    pub next_generation: u64,
    /// Slabs below were made.
    pub next_slab: u32,
}

fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Reads numbers off the front of a slice.
struct Take<'a>(&'a [u8]);

impl<'a> Take<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        if self.0.len() < len {
            return None;
        }
        let (head, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        Some(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.array()?))
    }

    fn key(&mut self, len: u8) -> Option<Key> {
        let bytes: [u8; 32] = self.array()?;
        Key::from_padded(bytes, len)
    }
}

impl Record {
    /// Bytes that it takes.
    pub(crate) fn len(&self) -> usize {
        match self {
            Record::Put(_) => PUT_LEN,
            Record::Drop { .. } => DROP_LEN,
            Record::Namespace { fingerprint, .. } => 10 + fingerprint.len(),
            Record::Tenant { name, .. } => 14 + name.len(),
            Record::Ledger { .. } => LEDGER_LEN,
        }
    }

    /// Appends it.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Record::Put(block) => {
                out.extend_from_slice(&[PUT, block.flags, block.key.len() as u8, 0]);
                put_u16(out, block.namespace);
                put_u16(out, block.tenant);
                put_u32(out, block.slab);
                put_u32(out, block.slot);
                put_u64(out, block.generation);
                put_u32(out, block.sum);
                put_u32(out, block.expires);
                out.extend_from_slice(block.key.padded());
            }
            Record::Drop { key, namespace, tenant, generation } => {
                out.extend_from_slice(&[DROP, 0, key.len() as u8, 0]);
                put_u16(out, *namespace);
                put_u16(out, *tenant);
                put_u64(out, *generation);
                out.extend_from_slice(key.padded());
            }
            Record::Namespace { id, block_bytes, fingerprint } => {
                out.extend_from_slice(&[NAMESPACE, 0]);
                put_u16(out, fingerprint.len() as u16);
                put_u16(out, *id);
                put_u32(out, *block_bytes);
                out.extend_from_slice(fingerprint);
            }
            Record::Tenant { id, quota, name } => {
                out.extend_from_slice(&[TENANT, 0]);
                put_u16(out, name.len() as u16);
                put_u16(out, *id);
                put_u64(out, *quota);
                out.extend_from_slice(name);
            }
            Record::Ledger { day, today, total } => {
                out.extend_from_slice(&[LEDGER, 0, 0, 0]);
                put_u32(out, *day);
                put_u64(out, *today);
                put_u64(out, *total);
            }
        }
    }

    /// The next record of `bytes`; `None` where there is none, or none that this program understands.
    fn decode(take: &mut Take<'_>) -> Option<Record> {
        let (kind, flags) = (take.u8()?, take.u8()?);
        match kind {
            PUT => {
                let (len, _) = (take.u8()?, take.u8()?);
                let (namespace, tenant) = (take.u16()?, take.u16()?);
                let (slab, slot, generation) = (take.u32()?, take.u32()?, take.u64()?);
                let (sum, expires) = (take.u32()?, take.u32()?);
                let key = take.key(len)?;
                Some(Record::Put(Block {
                    key,
                    flags,
                    namespace,
                    tenant,
                    slab,
                    slot,
                    generation,
                    sum,
                    expires,
                }))
            }
            DROP => {
                let (len, _) = (take.u8()?, take.u8()?);
                let (namespace, tenant, generation) = (take.u16()?, take.u16()?, take.u64()?);
                let key = take.key(len)?;
                Some(Record::Drop { key, namespace, tenant, generation })
            }
            NAMESPACE => {
                let (len, id, block_bytes) = (take.u16()? as usize, take.u16()?, take.u32()?);
                let fingerprint = take.bytes(len).filter(|_| len <= FINGERPRINT_MAX)?.to_vec();
                Some(Record::Namespace { id, block_bytes, fingerprint })
            }
            TENANT => {
                let (len, id, quota) = (take.u16()? as usize, take.u16()?, take.u64()?);
                let name = take.bytes(len).filter(|_| len <= TENANT_MAX)?.to_vec();
                Some(Record::Tenant { id, quota, name })
            }
            LEDGER => {
                take.u16()?;
                Some(Record::Ledger { day: take.u32()?, today: take.u64()?, total: take.u64()? })
            }
            _ => None,
        }
    }
}

/// Fills pages with records.
#[derive(Debug)]
pub(crate) struct PageWriter {
    nonce: u64,
    first: u64,
    pages: Vec<u8>,
    /// Of the last page.
    used: usize,
    count: u32,
}

impl PageWriter {
    /// Pages from index `first` of the log's life `nonce` on.
    pub(crate) fn new(nonce: u64, first: u64) -> PageWriter {
        PageWriter { nonce, first, pages: Vec::new(), used: PAGE_ROOM, count: 0 }
    }

    /// The next record.
    pub(crate) fn push(&mut self, record: &Record) {
        if self.used + record.len() > PAGE_ROOM {
            self.seal();
            self.pages.resize(self.pages.len() + HEAD, 0);
            (self.used, self.count) = (0, 0);
        }
        let before = self.pages.len();
        record.encode(&mut self.pages);
        debug_assert_eq!(self.pages.len() - before, record.len());
        self.used += record.len();
        self.count += 1;
    }

    fn seal(&mut self) {
        if self.count == 0 {
            return;
        }
        self.pages.resize(self.pages.len().next_multiple_of(PAGE), 0);
        let start = self.pages.len() - PAGE;
        let index = self.first + (start / PAGE) as u64;
        let page = &mut self.pages[start..];
        page[..8].copy_from_slice(PAGE_MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[12..16].copy_from_slice(&(self.used as u32).to_le_bytes());
        page[16..24].copy_from_slice(&self.nonce.to_le_bytes());
        page[24..32].copy_from_slice(&index.to_le_bytes());
        page[32..36].copy_from_slice(&self.count.to_le_bytes());
        let sum = page_sum(page);
        page[36..40].copy_from_slice(&sum.to_le_bytes());
        self.count = 0;
    }

    /// Whole pages.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.seal();
        self.pages
    }
}

fn page_sum(page: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&page[..36]);
    hasher.update(&page[40..]);
    hasher.finalize()
}

/// Gives the records of a page to `each`. `false`: it is no page of this life at this place, or it is damaged.
pub(crate) fn read_page(page: &[u8], nonce: u64, index: u64, each: &mut dyn FnMut(Record)) -> bool {
    if page.len() != PAGE || &page[..8] != PAGE_MAGIC {
        return false;
    }
    let mut head = Take(&page[8..HEAD]);
    let fields = (|| Some((head.u32()?, head.u32()?, head.u64()?, head.u64()?, head.u32()?, head.u32()?)))();
    let Some((version, used, its_nonce, its_index, count, sum)) = fields else { return false };
    let fits = version == VERSION && its_nonce == nonce && its_index == index && used as usize <= PAGE_ROOM;
    if !fits || sum != page_sum(page) {
        return false;
    }
    let mut take = Take(&page[HEAD..HEAD + used as usize]);
    // All of a page or nothing: what is half applied would be in memory and in no log.
    let mut records = Vec::with_capacity((count as usize).min(PAGE_ROOM / LEDGER_LEN));
    for _ in 0..count {
        match Record::decode(&mut take) {
            Some(record) => records.push(record),
            None => return false,
        }
    }
    records.into_iter().for_each(each);
    true
}

/// All records from the front of `bytes` that can be read: for the fuzz targets.
pub(crate) fn decode_all(bytes: &[u8]) -> Vec<Record> {
    let mut take = Take(bytes);
    std::iter::from_fn(|| Record::decode(&mut take)).collect()
}

/// A page that holds these bytes, whatever they are: for the fuzz targets.
pub(crate) fn raw_page(bytes: &[u8], count: u32, nonce: u64, index: u64) -> Vec<u8> {
    let mut writer = PageWriter { nonce, first: index, pages: vec![0; HEAD], used: bytes.len(), count };
    writer.pages.extend_from_slice(bytes);
    writer.finish()
}

impl Header {
    /// A page.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE);
        page.extend_from_slice(HEADER_MAGIC);
        put_u32(&mut page, VERSION);
        put_u32(&mut page, 0);
        page.extend_from_slice(&self.pool);
        put_u64(&mut page, self.epoch);
        put_u64(&mut page, self.nonce);
        put_u64(&mut page, self.checkpoint_pages);
        put_u64(&mut page, self.next_generation);
        put_u32(&mut page, self.next_slab);
        page.resize(PAGE, 0);
        let sum = header_sum(&page);
        page[12..16].copy_from_slice(&sum.to_le_bytes());
        page
    }

    /// `None`: there is no header, or a damaged one. An error: one of a newer version.
    pub(crate) fn decode(page: &[u8]) -> Result<Option<Header>> {
        if page.len() != PAGE || &page[..8] != HEADER_MAGIC {
            return Ok(None);
        }
        let mut take = Take(&page[8..]);
        let head = (|| Some((take.u32()?, take.u32()?)))();
        let Some((version, sum)) = head else { return Ok(None) };
        if sum != header_sum(page) {
            return Ok(None);
        }
        if version > VERSION {
            return Err(Error::new(
                ErrorKind::NewerFormat,
                format!("the KV store's index has version {version}, this program knows {VERSION}"),
            ));
        }
        let header = (|| {
            Some(Header {
                pool: take.array()?,
                epoch: take.u64()?,
                nonce: take.u64()?,
                checkpoint_pages: take.u64()?,
                next_generation: take.u64()?,
                next_slab: take.u32()?,
            })
        })();
        Ok(header.filter(|header| {
            header.epoch.max(header.next_generation) < GENERATION_MAX && header.next_slab < SLAB_MAX
        }))
    }
}

fn header_sum(page: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&page[..12]);
    hasher.update(&page[16..]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let key = |n: u8| Key::new(&[n; 20]).unwrap();
        let block = |n: u8| Block {
            key: key(n),
            flags: n & 1,
            namespace: 3,
            tenant: n.into(),
            slab: 7,
            slot: 900 + u32::from(n),
            generation: u64::MAX - u64::from(n),
            sum: 0xdead_beef,
            expires: n.into(),
        };
        let mut all = vec![
            Record::Namespace { id: 3, block_bytes: 65_536, fingerprint: vec![9; FINGERPRINT_MAX] },
            Record::Tenant { id: 1, quota: 1 << 40, name: b"tenant".to_vec() },
            Record::Ledger { day: 20_000, today: 1, total: u64::MAX },
            Record::Drop { key: key(200), namespace: 3, tenant: 0, generation: 5 },
        ];
        all.extend((0..150).map(|n| Record::Put(block(n))));
        all
    }

    fn read(pages: &[u8], nonce: u64, first: u64) -> (Vec<Record>, usize) {
        let mut found = Vec::new();
        let mut bad = 0;
        for (index, page) in (first..).zip(pages.chunks(PAGE)) {
            if !read_page(page, nonce, index, &mut |record| found.push(record)) {
                bad += 1;
            }
        }
        (found, bad)
    }

    #[test]
    fn records_come_back_from_their_place_and_life_only() {
        let mut writer = PageWriter::new(77, 5);
        records().iter().for_each(|record| writer.push(record));
        let pages = writer.finish();
        assert_eq!(pages.len() % PAGE, 0);
        assert_eq!(read(&pages, 77, 5), (records(), 0));
        let count = pages.len() / PAGE;
        assert_eq!(read(&pages, 78, 5), (vec![], count));
        assert_eq!(read(&pages, 77, 6), (vec![], count));
    }

    #[test]
    fn any_flipped_bit_makes_a_page_worthless() {
        let mut writer = PageWriter::new(1, 0);
        records().iter().take(4).for_each(|record| writer.push(record));
        let mut page = writer.finish();
        assert_eq!(page.len(), PAGE);
        for bit in (0..PAGE * 8).step_by(37) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(&page, 1, 0), (vec![], 1), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_header_is_whole_or_nothing() {
        let header = Header {
            pool: [5; 16],
            epoch: 9,
            nonce: 8,
            checkpoint_pages: 7,
            next_generation: 6,
            next_slab: 5,
        };
        let mut page = header.encode();
        assert_eq!(Header::decode(&page).unwrap(), Some(header));
        for bit in (0..PAGE * 8).step_by(29) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&page).unwrap(), None);
            page[bit / 8] ^= 1 << (bit % 8);
        }
        page[8] = 2;
        let sum = header_sum(&page);
        page[12..16].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Header::decode(&page).unwrap_err().kind(), ErrorKind::NewerFormat);
    }
}
