//! A state on simulated devices: what a commit promises, power cuts at every write included.

use std::sync::Arc;

use nvme::{Device, SimDevice, SimImage, SimOptions, SimPower, SimRng, Survivors};

use super::*;
use crate::pool::{FormatOptions, OpenOptions, Pool};
use crate::session::SessionOptions;

const BLOCK: u32 = 6000;
const LENS: [u64; 4] = [1, 6000, 6001, 40_000];

struct Rig {
    device: Arc<SimDevice>,
    power: Arc<SimPower>,
}

fn sim(power: &Arc<SimPower>) -> SimOptions {
    SimOptions {
        seed: 7,
        lba_size: 512,
        volatile_cache: true,
        power: Some(power.clone()),
        ..SimOptions::default()
    }
}

impl Rig {
    fn new() -> Rig {
        Rig::of(48 << 20)
    }

    fn of(bytes: u64) -> Rig {
        let power = Arc::new(SimPower::new());
        let device = Arc::new(SimDevice::new(bytes, sim(&power)).unwrap());
        let format = FormatOptions { chunk_size: 4096, stripe_unit: 16 << 10, ..FormatOptions::default() };
        Pool::format_devices(&[device.clone() as Arc<dyn Device>], &format).unwrap();
        Rig { device, power }
    }

    fn from(image: &SimImage) -> Rig {
        let power = Arc::new(SimPower::new());
        Rig { device: Arc::new(SimDevice::from_image(image, sim(&power)).unwrap()), power }
    }

    fn session(&self) -> Session {
        self.try_session().unwrap()
    }

    fn try_session(&self) -> Result<Session> {
        let options = OpenOptions { commit_interval_ms: 0, ram_bytes: 0, ..OpenOptions::default() };
        let pool = Pool::open_devices(&[self.device.clone() as Arc<dyn Device>], &options)?;
        Ok(Session::over(pool, &SessionOptions::default()))
    }
}

fn options() -> StateOptions {
    StateOptions {
        name: "run".into(),
        budget_bytes: 32 << 20,
        block_bytes: BLOCK,
        deadline: Duration::from_secs(30),
    }
}

fn bytes(unit: u32, version: u64, len: u64) -> Vec<u8> {
    let mut rng = SimRng::new(u64::from(unit) << 32 ^ version);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    bytes.truncate(len as usize);
    bytes
}

fn buffers(store: &StateStore, content: &[u8]) -> Vec<Buffer> {
    let buffer = |part: &[u8]| {
        let mut buffer = Buffer::heap(store.slot_bytes()).unwrap();
        buffer[..part.len()].copy_from_slice(part);
        buffer[part.len()..].fill(0);
        buffer
    };
    content.chunks(BLOCK as usize).map(buffer).collect()
}

fn write(store: &StateStore, unit: u32, version: u64) -> Result<()> {
    let draft = store.begin(unit)?;
    let content = buffers(store, &bytes(unit, version, LENS[unit as usize]));
    match store.write(&draft, 0, content) {
        Ok(_) => store.publish(&draft),
        Err(error) => {
            store.abandon(&draft);
            Err(error)
        }
    }
}

fn read(store: &StateStore, unit: u32) -> Result<Vec<u8>> {
    let len = LENS[unit as usize];
    let room =
        (0..len.div_ceil(u64::from(BLOCK))).map(|_| Buffer::heap(store.slot_bytes()).unwrap()).collect();
    let mut all: Vec<u8> = Vec::new();
    for buffer in store.read(unit, 0, room)? {
        all.extend_from_slice(&buffer[..BLOCK as usize]);
    }
    all.truncate(len as usize);
    Ok(all)
}

#[test]
fn what_is_committed_comes_back_and_nothing_else() {
    let rig = Rig::new();
    let session = rig.session();
    {
        let store = StateStore::open(&session, &options(), None).unwrap();
        assert_eq!(store.meta().unwrap(), None);
        assert_eq!(store.add(&LENS).unwrap(), 0);
        assert_eq!(read(&store, 0).unwrap_err().kind(), ErrorKind::NotFound);
        for unit in 0..3 {
            write(&store, unit, 1).unwrap();
        }
        store.commit(b"one").unwrap();
        // Written twice since, and not committed.
        for version in 2..5 {
            write(&store, 2, version).unwrap();
            write(&store, 3, version).unwrap();
        }
        assert_eq!(read(&store, 2).unwrap(), bytes(2, 4, LENS[2]));
        assert!(store.begin(9).is_err() && store.read(9, 0, Vec::new()).is_err());
        let draft = store.begin(1).unwrap();
        assert_eq!(store.begin(1).unwrap_err().kind(), ErrorKind::Busy);
        let too_many = buffers(&store, &[0; 2 * BLOCK as usize]);
        assert_eq!(store.write(&draft, 0, too_many).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    let store = StateStore::open(&session, &options(), None).unwrap();
    assert_eq!(store.meta().unwrap().as_deref(), Some(&b"one"[..]));
    assert_eq!(store.units(), LENS);
    for unit in 0..3 {
        assert_eq!(read(&store, unit).unwrap(), bytes(unit, 1, LENS[unit as usize]));
    }
    assert!(!store.has(3));
    let other = StateOptions { block_bytes: 4096, ..options() };
    assert_eq!(StateStore::open(&session, &other, None).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(StateStore::look(&session, "run").unwrap(), Some((BLOCK, b"one".to_vec())));
    assert_eq!(StateStore::look(&session, "none").unwrap(), None);
}

#[test]
fn whoever_opens_it_as_a_cache_gets_what_lasts() {
    let rig = Rig::new();
    {
        let session = rig.session();
        let store = StateStore::open(&session, &options(), None).unwrap();
        store.add(&LENS).unwrap();
        (0..4).for_each(|unit| write(&store, unit, 1).unwrap());
        store.commit(b"one").unwrap();
    }
    {
        // More than fits, by somebody who takes it for a cache.
        let session = rig.session();
        let settings = Settings { name: "run".into(), budget_bytes: Some(1 << 20), ..Settings::default() };
        let blocks = session.blocks(&settings, b"another", 8192, "", None).unwrap();
        let mut refused = 0;
        for n in 0..3000 {
            let buffer = Buffer::heap(blocks.slot_bytes()).unwrap();
            let put = Put { key: key(n, 9, 9), buffer, start: 0 };
            let done = blocks.put(vec![put], Instant::now() + Duration::from_secs(30)).pop().unwrap();
            refused += u32::from(matches!(done.result, Stored::Refused(Refusal::Space)));
        }
        assert!(refused > 0, "all of it fitted");
    }
    let session = rig.session();
    let store = StateStore::open(&session, &options(), None).unwrap();
    assert_eq!(store.meta().unwrap().as_deref(), Some(&b"one"[..]));
    for unit in 0..4 {
        assert_eq!(read(&store, unit).unwrap(), bytes(unit, 1, LENS[unit as usize]));
    }
}

#[test]
fn space_is_given_back_and_its_end_is_an_error() {
    let rig = Rig::new();
    let session = rig.session();
    let store = StateStore::open(&session, &options(), None).unwrap();
    store.add(&LENS).unwrap();
    // Many times what fits.
    for version in 0..400 {
        for unit in 0..LENS.len() as u32 {
            write(&store, unit, version).unwrap();
        }
        if version % 3 == 0 {
            store.commit(&vec![version as u8; 100_000]).unwrap();
        }
    }
    assert_eq!(store.meta().unwrap(), Some(vec![(399 % 256) as u8; 100_000]));
    // And what does not fit is an error that leaves what is there.
    store.add(&[32 << 20]).unwrap();
    let draft = store.begin(4).unwrap();
    let mut block = 0;
    let error = loop {
        match store.write(&draft, block, buffers(&store, &[1; BLOCK as usize])) {
            Ok(_) => block += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    store.abandon(&draft);
    assert_eq!(read(&store, 3).unwrap(), bytes(3, 399, LENS[3]));
}

#[test]
fn heads_of_other_bytes_are_refused_and_nothing_more() {
    let head = Head {
        sequence: 9,
        block_bytes: BLOCK,
        units: vec![(1, None), (70, Some(2))],
        meta: b"what".to_vec(),
    };
    let bytes = head.encode();
    assert_eq!(Head::decode(&bytes).unwrap(), head);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut other = bytes.clone();
            other[at] ^= 1 << bit;
            assert_eq!(Head::decode(&other).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        assert!(Head::decode(&bytes[..at]).is_err());
    }
    // Of a right sum, and yet impossible.
    let mut rng = SimRng::new(11);
    for _ in 0..20_000 {
        let mut other = bytes.clone();
        let at = rng.in_range(8..40) as usize;
        other[at] = rng.next_u64() as u8;
        other[40..44].fill(0);
        let sum = crc32fast::hash(&other);
        other[40..44].copy_from_slice(&sum.to_le_bytes());
        if let Ok(found) = Head::decode(&other) {
            assert_eq!(found.encode(), other);
        }
    }
}

/// Seven steps of what a training run does, until the power goes. The number of the last commit that returned, and of the one after it.
fn steps(rig: &Rig) -> (u64, u64) {
    let mut returned = 0;
    let mut run = || -> Result<()> {
        let session = rig.try_session()?;
        let store = StateStore::open(&session, &options(), None)?;
        store.add(&LENS)?;
        for step in 1..8 {
            for unit in 0..LENS.len() as u32 {
                if unit == 0 || !(step + u64::from(unit)).is_multiple_of(3) {
                    write(&store, unit, step)?;
                }
            }
            store.commit(&step.to_le_bytes())?;
            returned = step;
        }
        Ok(())
    };
    let _ = run();
    (returned, returned + 1)
}

/// What a unit holds after a step of `steps`.
fn version(unit: u32, step: u64) -> Option<u64> {
    (1..=step).rev().find(|step| unit == 0 || !(step + u64::from(unit)).is_multiple_of(3))
}

#[test]
fn a_power_cut_at_any_write_leaves_a_whole_commit() {
    let whole = Rig::new();
    let before = whole.power.changes();
    assert_eq!(steps(&whole).0, 7);
    let all = whole.power.changes() - before;
    assert!(all > 100, "{all} writes and flushes");
    for cut in 0..all {
        let rig = Rig::new();
        rig.power.cut_after(cut);
        let (returned, next) = steps(&rig);
        for survivors in [Survivors::None, Survivors::All, Survivors::Random(cut), Survivors::Random(!cut)] {
            let after = Rig::from(&rig.device.survivors(survivors));
            let session = after.session();
            let store = StateStore::open(&session, &options(), None).unwrap();
            let step = store.meta().unwrap().map_or(0, |meta| u64::from_le_bytes(meta.try_into().unwrap()));
            assert!(
                step == returned || step == next,
                "cut {cut}, {survivors:?}: {step}, not {returned} or {next}"
            );
            for unit in 0..store.units().len() as u32 {
                match version(unit, step) {
                    Some(version) => {
                        let there = read(&store, unit).unwrap_or_else(|error| {
                            panic!("cut {cut}, {survivors:?}, unit {unit}: {}", error.chain())
                        });
                        assert!(there == bytes(unit, version, LENS[unit as usize]), "cut {cut}, unit {unit}");
                    }
                    None => assert!(!store.has(unit)),
                }
            }
        }
    }
}

#[test]
fn a_commit_that_is_held_can_be_gone_back_to() {
    let rig = Rig::new();
    let session = rig.session();
    let step = |store: &StateStore, version: u64| {
        for unit in 0..LENS.len() as u32 {
            write(store, unit, version).unwrap();
        }
    };
    let store = StateStore::open_held(&session, &options(), None, None).unwrap();
    store.add(&LENS).unwrap();
    step(&store, 1);
    store.commit(b"one").unwrap();
    assert_eq!(store.commit(b"two").unwrap_err().kind(), ErrorKind::InvalidArgument);
    store.settle().unwrap();
    step(&store, 2);
    store.commit(b"two").unwrap();
    // Twice, so that no version is left that is not wanted.
    step(&store, 3);
    step(&store, 4);
    drop(store);
    let found: Vec<_> = StateStore::commits(&session, "run").unwrap();
    let found: Vec<_> = found.iter().map(|commit| (commit.sequence, &commit.meta[..])).collect();
    assert_eq!(found, [(2, &b"two"[..]), (1, &b"one"[..])]);
    let error = StateStore::open_held(&session, &options(), None, Some(3)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);

    let store = StateStore::open_held(&session, &options(), None, Some(1)).unwrap();
    for unit in 0..LENS.len() as u32 {
        assert_eq!(read(&store, unit).unwrap(), bytes(unit, 1, LENS[unit as usize]));
    }
    assert_eq!(store.meta().unwrap().as_deref(), Some(&b"one"[..]), "what comes after is forgotten");
    step(&store, 5);
    store.commit(b"another two").unwrap();
    store.settle().unwrap();
    store.settle().unwrap();
    drop(store);
    let store = StateStore::open(&session, &options(), None).unwrap();
    assert_eq!(store.meta().unwrap().as_deref(), Some(&b"another two"[..]));
    for unit in 0..LENS.len() as u32 {
        assert_eq!(read(&store, unit).unwrap(), bytes(unit, 5, LENS[unit as usize]));
    }
}

fn named(name: &str) -> StateOptions {
    StateOptions { name: name.into(), ..options() }
}

/// Four steps of two stores that are committed together. The last commit that both returned from.
fn steps_of_two(rig: &Rig) -> u64 {
    let mut returned = 0;
    let mut run = || -> Result<()> {
        let session = rig.try_session()?;
        let stores = [
            StateStore::open_held(&session, &named("a"), None, None)?,
            StateStore::open_held(&session, &named("b"), None, None)?,
        ];
        for store in &stores {
            store.add(&LENS)?;
        }
        for step in 1..5 {
            for store in &stores {
                for unit in (0..LENS.len() as u32).filter(|unit| (step + u64::from(*unit)) % 3 != 0) {
                    write(store, unit, step)?;
                }
            }
            stores.iter().try_for_each(StateStore::settle)?;
            for store in &stores {
                store.commit(&step.to_le_bytes())?;
            }
            returned = step;
        }
        Ok(())
    };
    let _ = run();
    returned
}

#[test]
fn a_power_cut_leaves_a_commit_that_both_have() {
    let whole = Rig::of(96 << 20);
    let before = whole.power.changes();
    assert_eq!(steps_of_two(&whole), 4);
    let all = whole.power.changes() - before;
    let mut gone_back = 0;
    for cut in 0..all {
        let rig = Rig::of(96 << 20);
        rig.power.cut_after(cut);
        let returned = steps_of_two(&rig);
        let after = Rig::from(&rig.device.survivors(Survivors::Random(cut)));
        let session = after.session();
        let last = |name: &str| -> u64 {
            StateStore::commits(&session, name).unwrap().first().map_or(0, |commit| commit.sequence)
        };
        let (a, b) = (last("a"), last("b"));
        let agreed = a.min(b);
        gone_back += u64::from(a != b && agreed > 0);
        assert!((returned..=returned + 1).contains(&agreed), "cut {cut}: {a} and {b}, not {returned}");
        for name in ["a", "b"] {
            if agreed == 0 {
                continue;
            }
            let store = StateStore::open_held(&session, &named(name), None, Some(agreed)).unwrap();
            for unit in 0..store.units().len() as u32 {
                let version = (1..=agreed).rev().find(|step| (step + u64::from(unit)) % 3 != 0);
                match version {
                    Some(version) => {
                        let there = read(&store, unit).unwrap_or_else(|error| {
                            panic!("cut {cut}, {name}, unit {unit}: {}", error.chain())
                        });
                        assert!(
                            there == bytes(unit, version, LENS[unit as usize]),
                            "cut {cut}, {name}, {unit}"
                        );
                    }
                    None => assert!(!store.has(unit)),
                }
            }
        }
    }
    assert!(gone_back > 0, "no cut was between the two commits");
}
