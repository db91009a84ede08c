//! Doors for the fuzz targets: an index out of any bytes.

use std::ffi::OsStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nvme::{Buffer, Device, SimDevice, SimImage, SimOptions};

use super::record::{Header, PAGE, PAGE_ROOM, PageWriter, Record, decode_all, raw_page, read_page};
use super::{Clock, Get, Key, Put, Store, StoreOptions, Stored};
use crate::error::Result;
use crate::pool::{FormatOptions, OpenOptions, Pool};

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 12;

/// What a page of these bytes says: what is decoded comes back from a page of its own making. Returns what it showed.
pub fn records(input: &[u8]) -> Result<String> {
    let header = Header::decode(&[input, &[0; PAGE]].concat()[..PAGE])?;
    let found = decode_all(input);
    let mut pages = PageWriter::new(7, 3);
    found.iter().for_each(|record| pages.push(record));
    let pages = pages.finish();
    let mut again = Vec::new();
    for (index, page) in (3..).zip(pages.chunks(PAGE)) {
        assert!(
            read_page(page, 7, index, &mut |record| again.push(record)),
            "a page of our own cannot be read"
        );
    }
    assert_eq!(found, again, "records do not come back as they were");
    let encoded: usize = found.iter().map(Record::len).sum();
    assert!(encoded <= input.len(), "more was read than there is");
    Ok(format!("{header:?} {found:?}"))
}

fn options() -> StoreOptions {
    StoreOptions {
        window: Duration::ZERO,
        budget_bytes: Some(1 << 20),
        slab_bytes: Some(32 << 10),
        log_pages: 8,
        clock: Clock::Manual(Default::default()),
        ..StoreOptions::default()
    }
}

struct Image {
    device: SimImage,
    log: u64,
    pages: u64,
    nonce: u64,
}

fn key(n: u64) -> Key {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Key::new(&bytes).unwrap_or_else(|_| unreachable!("32 bytes are a key"))
}

fn content(n: u64) -> [u8; BLOCK as usize] {
    [n as u8 + 1; BLOCK as usize]
}

fn device(image: &SimImage) -> Result<Arc<dyn Device>> {
    Ok(Arc::new(SimDevice::from_image(image, SimOptions::default())?))
}

fn open(device: &Arc<dyn Device>) -> Result<Pool> {
    let options = OpenOptions { commit_interval_ms: 0, ram_bytes: 0, ..OpenOptions::default() };
    Pool::open_devices(std::slice::from_ref(device), &options)
}

fn put(store: &Store, numbers: std::ops::Range<u64>) -> Result<u64> {
    let view = store.view(b"weights", BLOCK, "")?;
    let mut lane = store.lane(None)?;
    let mut puts = Vec::new();
    for n in numbers {
        let mut buffer = Buffer::heap(BLOCK as usize)?;
        buffer.copy_from_slice(&content(n));
        puts.push(Put { key: key(n), buffer, start: 0 });
    }
    Ok(lane.put(&view, puts)?.iter().filter(|done| matches!(done.result, Stored::New)).count() as u64)
}

fn hits(store: &Store, numbers: std::ops::Range<u64>) -> Result<u64> {
    let view = store.view(b"weights", BLOCK, "")?;
    let mut lane = store.lane(None)?;
    let mut gets = Vec::new();
    for n in numbers.clone() {
        gets.push(Get { key: key(n), buffer: Buffer::heap(BLOCK as usize)?, start: 0 });
    }
    let mut hits = 0;
    for (n, done) in numbers.zip(lane.get(&view, gets)?) {
        if let (Ok(()), Some(buffer)) = (done.result, done.buffer) {
            assert!(buffer[..] == content(n)[..], "wrong bytes are served");
            hits += 1;
        }
    }
    Ok(hits)
}

fn make() -> Result<Image> {
    let empty: Arc<dyn Device> = Arc::new(SimDevice::new((20 << 20) + PAGE as u64, SimOptions::default())?);
    Pool::format_devices(
        std::slice::from_ref(&empty),
        &FormatOptions { chunk_size: 4096, ..FormatOptions::default() },
    )?;
    let pool = open(&empty)?;
    let store = Store::open(&pool, options())?;
    put(&store, 0..BLOCKS)?;
    store.checkpoint()?;
    put(&store, BLOCKS..2 * BLOCKS)?;
    store.close()?;
    let dir = pool.resolve(&format!("{}/default", super::DIRECTORY))?.node;
    let (log, found) = super::log::Log::open(&pool, dir, 8)?;
    let name = super::log::NAMES[log.current()];
    let slab = pool.open_slab(pool.lookup(dir, OsStr::new(name))?.node)?;
    let (start, pages) = (slab.pieces()[0].offset, slab.pieces()[0].len / PAGE as u64);
    drop((slab, log));
    pool.close()?;
    let mut bytes = vec![0; empty.len() as usize];
    empty.read_at(0, &mut bytes)?;
    let copy = SimDevice::new(empty.len(), SimOptions::default())?;
    copy.write_at(0, &bytes)?;
    let nonce = found.header.map_or(0, |header| header.nonce);
    Ok(Image { device: copy.image(), log: start, pages, nonce })
}

/// Opens a store whose log has pages of these bytes (with right sums, or where the first byte is odd as they are), and uses it.
pub fn store(input: &[u8]) -> Result<String> {
    static MADE: OnceLock<Option<Image>> = OnceLock::new();
    let Some(image) = MADE.get_or_init(|| make().ok()) else { panic!("the fuzzed store cannot be made") };
    let (&[flags, first, count], body) = input.split_first_chunk::<3>().unwrap_or((&[0; 3], &[]));
    let device = device(&image.device)?;
    let first = u64::from(first) % image.pages;
    for (index, part) in (first..image.pages).zip(body.chunks(PAGE_ROOM)) {
        let page = match flags & 1 {
            0 => raw_page(part, u32::from(count), image.nonce, index),
            _ => part.to_vec(),
        };
        device.write_at(image.log + index * PAGE as u64, &page)?;
    }
    let pool = open(&device)?;
    let store = Store::open(&pool, options())?;
    let opened = store.stat();
    assert!(opened.allocated_bytes <= opened.budget_bytes, "{opened:?}");
    let before = hits(&store, 0..3 * BLOCKS)?;
    let stored = put(&store, 100..104)?;
    assert!(hits(&store, 100..104)? >= stored);
    store.flush()?;
    let blocks = store.stat().blocks;
    store.close()?;
    let store = Store::open(&pool, options())?;
    assert_eq!(store.stat().blocks, blocks, "the index does not come back as it was");
    assert!(hits(&store, 100..104)? >= stored);
    Ok(format!("{} {before} {stored} {blocks}", opened.blocks))
}

/// One record of each kind.
pub fn seed() -> Vec<u8> {
    let block = super::record::Block {
        key: key(1),
        flags: 1,
        namespace: 0,
        tenant: 0,
        slab: 0,
        slot: 3,
        generation: 900,
        sum: 77,
        expires: 0,
    };
    let records = [
        Record::Namespace { id: 1, block_bytes: BLOCK, fingerprint: b"other".to_vec() },
        Record::Tenant { id: 1, quota: 8192, name: b"tenant".to_vec() },
        Record::Put(block),
        Record::Drop { key: key(2), namespace: 0, tenant: 0, generation: 2 },
        Record::Ledger { day: 1, today: 2, total: 3 },
    ];
    let mut out = Vec::new();
    records.iter().for_each(|record| record.encode(&mut out));
    out
}
