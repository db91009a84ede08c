//! Units between a pool in a folder and host memory, by real threads, against a model.

use std::sync::Arc;
use std::time::Duration;

use engine::state::{StateOptions, StateStore};
use engine::{FormatOptions, Pool, Session, SessionOptions};
use nvme::{Arena, ArenaOptions, Buffer, SimRng};

use super::*;
use crate::driver::host::HostDriver;
use crate::driver::{Batch, DeviceMemory, Direction, Part};

const BLOCK: u32 = 5000;
const LENS: [u64; 6] = [1, 5000, 12_345, 90_000, 33_000, 90_000];
const RAM: [u32; 2] = [1, 3];
const LONG: Duration = Duration::from_secs(30);

fn options() -> StateOptions {
    StateOptions { name: "run".into(), budget_bytes: 64 << 20, block_bytes: BLOCK, deadline: LONG }
}

struct Rig {
    _folder: tempfile::TempDir,
    path: std::path::PathBuf,
    driver: Arc<dyn Driver>,
}

impl Rig {
    fn new() -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pool");
        Pool::format(&path, &FormatOptions::default()).unwrap();
        Rig { _folder: folder, path, driver: Arc::new(HostDriver::new()) }
    }

    fn open(&self) -> (Session, Residency) {
        let session = Session::open(&self.path, SessionOptions::default()).unwrap();
        let arena = Arena::new(8 << 20, ArenaOptions::default()).unwrap();
        let store = StateStore::open(&session, &options(), Some(&arena)).unwrap();
        let residency =
            Residency::new(store, arena, ResidencyOptions { batch: 2, ..Default::default() }).unwrap();
        (session, residency)
    }

    fn tensor(&self, bytes: &[u8]) -> DeviceMemory {
        let memory = DeviceMemory::new(&self.driver, bytes.len() as u64).unwrap();
        self.copy(&memory, Direction::ToDevice, bytes);
        memory
    }

    fn read(&self, memory: &DeviceMemory) -> Vec<u8> {
        self.copy(memory, Direction::ToHost, &vec![0; memory.len() as usize])
    }

    fn copy(&self, memory: &DeviceMemory, direction: Direction, bytes: &[u8]) -> Vec<u8> {
        let mut buffer = Buffer::heap(bytes.len()).unwrap();
        buffer[..bytes.len()].copy_from_slice(bytes);
        let part = Part { buffer: 0, offset: 0, device: memory.address(), len: bytes.len() };
        let mut stream = self.driver.stream().unwrap();
        let batch = Batch { buffers: vec![buffer], parts: vec![part], ..Batch::new(direction) };
        stream.copy(batch).unwrap();
        let mut back = Vec::new();
        stream.finish(&mut |batch| back.extend_from_slice(&batch.buffers[0][..bytes.len()])).unwrap();
        back
    }

    fn target(&self, memory: &DeviceMemory) -> Target {
        Target { driver: self.driver.clone(), address: memory.address(), after: 0, keep: None }
    }
}

fn content(unit: u32, version: u64) -> Vec<u8> {
    let mut rng = SimRng::new(u64::from(unit) << 40 ^ version ^ 0x73_74);
    let len = LENS[unit as usize] as usize;
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

fn done(ticket: &Ticket) -> Result<()> {
    match ticket.wait(Stage::Done, LONG)? {
        true => Ok(()),
        false => panic!("nothing came of it in {LONG:?}"),
    }
}

/// Stores, fetches and commits in any order come out as if they had been done one after the other; and what a commit names is what was stored
/// before it, however many stores were under way then.
#[test]
fn it_is_as_if_one_thing_came_after_the_other() {
    for seed in 0..12 {
        println!("seed {seed}");
        let rig = Rig::new();
        let mut rng = SimRng::new(seed);
        let mut versions = [0u64; LENS.len()];
        let mut committed: Option<[u64; LENS.len()]> = None;
        for round in 0..3u64 {
            let (session, residency) = rig.open();
            if round == 0 {
                assert_eq!(residency.add(&LENS).unwrap(), 0);
            }
            assert_eq!(
                residency.store().units(),
                if round == 0 || committed.is_some() { LENS.to_vec() } else { vec![] }
            );
            if residency.store().units().is_empty() {
                residency.add(&LENS).unwrap();
            }
            RAM.iter().for_each(|unit| residency.keep_in_ram(*unit).unwrap());
            versions = committed.unwrap_or_default();
            // Under way: what is kept until it is done.
            let mut tickets: Vec<Arc<Ticket>> = Vec::new();
            let mut stored: Vec<(DeviceMemory, Arc<Ticket>)> = Vec::new();
            let mut fetched: Vec<(DeviceMemory, Vec<u8>, Arc<Ticket>)> = Vec::new();
            for step in 0..60u64 {
                let unit = rng.in_range(0..LENS.len() as u64) as u32;
                match rng.in_range(0..12) {
                    0..5 => {
                        versions[unit as usize] = 1 + round * 1000 + step;
                        let memory = rig.tensor(&content(unit, versions[unit as usize]));
                        let write = rng.in_range(0..3) > 0;
                        let ticket = residency.store_unit(unit, rig.target(&memory), write).unwrap();
                        tickets.push(ticket.clone());
                        stored.push((memory, ticket));
                    }
                    5..9 if versions[unit as usize] > 0 => {
                        let memory = rig.tensor(&vec![0xee; LENS[unit as usize] as usize]);
                        let ticket = residency.fetch(unit, rig.target(&memory), None).unwrap();
                        fetched.push((memory, content(unit, versions[unit as usize]), ticket));
                    }
                    9 => {
                        let meta = [round, step].map(u64::to_le_bytes).concat();
                        tickets.push(residency.commit(meta));
                        committed = Some(versions);
                    }
                    10..12 if versions[unit as usize] > 0 => {
                        // Into a tensor that is copied from still.
                        let wanted = content(unit, versions[unit as usize]);
                        let fits = |(memory, _): &(DeviceMemory, _)| memory.len() == wanted.len() as u64;
                        let Some(at) = stored.iter().rposition(fits) else { continue };
                        let (memory, before) = stored.swap_remove(at);
                        let ticket = residency.fetch(unit, rig.target(&memory), Some(before)).unwrap();
                        fetched.push((memory, wanted, ticket));
                    }
                    _ => {}
                }
            }
            for (memory, wanted, ticket) in &fetched {
                done(ticket).unwrap();
                assert!(rig.read(memory) == *wanted, "a fetch gave something else than was stored before it");
            }
            tickets.iter().for_each(|ticket| done(ticket).unwrap());
            let moved = residency.moved();
            assert!(moved.fetched_bytes >= moved.ram_bytes && moved.stored_bytes > 0);
            drop(residency);
            drop(session);
        }
        let _ = versions;
        let (_session, residency) = rig.open();
        let Some(versions) = committed else { continue };
        for unit in 0..LENS.len() as u32 {
            let version = versions[unit as usize];
            assert_eq!(residency.store().has(unit), version > 0);
            if version > 0 {
                let memory = rig.tensor(&vec![0xee; LENS[unit as usize] as usize]);
                done(&residency.fetch(unit, rig.target(&memory), None).unwrap()).unwrap();
                assert!(
                    rig.read(&memory) == content(unit, version),
                    "unit {unit} is not as it was committed"
                );
            }
        }
    }
}

#[test]
fn after_a_failure_nothing_succeeds_and_the_last_commit_counts() {
    let rig = Rig::new();
    let (session, residency) = rig.open();
    residency.add(&LENS).unwrap();
    let memory = rig.tensor(&content(2, 1));
    let first = residency.store_unit(2, rig.target(&memory), true).unwrap();
    done(&residency.commit(b"good".to_vec())).unwrap();
    done(&first).unwrap();
    // What nobody stored cannot be fetched: that is an error of the whole.
    let room = rig.tensor(&content(4, 1));
    let error = done(&residency.fetch(4, rig.target(&room), None).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let second = residency.store_unit(2, rig.target(&memory), true).unwrap();
    assert!(done(&second).is_err());
    assert!(done(&residency.commit(b"bad".to_vec())).is_err());
    assert!(residency.fetch(9, rig.target(&room), None).is_err(), "no such unit");
    let short = rig.tensor(&[1]);
    assert!(residency.fetch(2, rig.target(&short), None).is_err(), "a tensor that is too short");
    drop(residency);
    let store = StateStore::open(&session, &options(), None).unwrap();
    assert_eq!(store.meta().unwrap().as_deref(), Some(&b"good"[..]));
}

#[test]
fn what_waits_for_a_tensor_hears_of_a_failure_and_of_the_end() {
    let rig = Rig::new();
    let (_session, residency) = rig.open();
    residency.add(&LENS).unwrap();
    let memory = rig.tensor(&content(3, 1));
    let before = residency.store_unit(3, rig.target(&memory), true).unwrap();
    let behind = residency.fetch(3, rig.target(&memory), Some(before.clone())).unwrap();
    done(&behind).unwrap();
    // Unit 5 was never stored: whatever waits fails with it, and nothing waits for ever.
    let mut tickets = vec![before];
    for _ in 0..20 {
        tickets.push(residency.store_unit(3, rig.target(&memory), true).unwrap());
        let last = tickets.last().cloned();
        tickets.push(residency.fetch(5, rig.target(&memory), last).unwrap());
    }
    tickets[1..].iter().for_each(|ticket| {
        let _ = done(ticket);
    });
    assert_eq!(done(tickets.last().unwrap()).unwrap_err().kind(), ErrorKind::NotFound);
    // A ticket that nothing carries out.
    let late = residency.fetch(3, rig.target(&memory), Some(Arc::default())).unwrap();
    drop(residency);
    assert!(late.wait(Stage::Done, Duration::ZERO).is_err());
}

#[test]
fn what_is_under_way_when_it_is_closed_is_told() {
    let rig = Rig::new();
    let (_session, residency) = rig.open();
    residency.add(&LENS).unwrap();
    let memory = rig.tensor(&content(3, 1));
    let tickets: Vec<_> =
        (0..50).map(|_| residency.store_unit(3, rig.target(&memory), true).unwrap()).collect();
    let commit = residency.commit(Vec::new());
    drop(residency);
    assert!(
        tickets
            .iter()
            .chain([&commit])
            .all(|ticket| ticket.wait(Stage::Done, Duration::ZERO).unwrap_or(true))
    );
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let rig = Rig::new();
    let session = Session::open(&rig.path, SessionOptions::default()).unwrap();
    let arena = Arena::new(2 << 20, ArenaOptions::default()).unwrap();
    let store = StateStore::open(&session, &options(), Some(&arena)).unwrap();
    let residency = Residency::new(store, arena, ResidencyOptions::default()).unwrap();
    residency.add(&[4 << 20]).unwrap();
    assert_eq!(residency.keep_in_ram(0).unwrap_err().kind(), ErrorKind::OutOfHostMemory);
}
