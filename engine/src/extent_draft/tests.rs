use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use nvme::{Device, SimDecision, SimDevice, SimHook, SimIo, SimOptions, SimRng, Verb};

use super::*;
use crate::extent_io::{ExtentContent, ExtentIoOptions};
use crate::member::Member;
use crate::member::extent_files::{ExtentDirectory, ExtentDirectoryOptions};
use crate::member::raw::{RawGeometry, RawMember};
use crate::types::Borrower;

const CHUNK: u32 = 16 << 10;
const NODE: NodeId = 42;

/// A small xorshift, so that a printed seed repeats a test.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

type Devices = Vec<Arc<dyn Device>>;
type Members = Vec<Arc<dyn Member>>;

fn sims(count: u16, len: u64) -> (Devices, Members) {
    let devices: Devices = (0..count)
        .map(|_| Arc::new(SimDevice::new(len, SimOptions::default()).unwrap()) as Arc<dyn Device>)
        .collect();
    let members = devices
        .iter()
        .enumerate()
        .map(|(index, device)| {
            let geometry = RawGeometry::plan(len, CHUNK, false).unwrap();
            Arc::new(
                RawMember::new(
                    index as u16,
                    Path::new(&format!("sim{index}")),
                    device.clone(),
                    geometry,
                    CHUNK,
                )
                .unwrap(),
            ) as Arc<dyn Member>
        })
        .collect();
    (devices, members)
}

fn io_of(members: Members, ram_bytes: u64) -> Arc<ExtentIo> {
    ExtentIo::new(
        members,
        &ExtentIoOptions { chunk_size: CHUNK, stripe_unit: 256 << 10, ram_bytes, verify: true, writers: 2 },
    )
    .unwrap()
}

fn free(io: &ExtentIo) -> u64 {
    io.stripes().members().iter().map(|member| member.free_bytes()).sum()
}

fn empty() -> Arc<Layout> {
    Arc::new(Layout::new(CHUNK))
}

/// What the pool does at a commit: gives the layout its generation, and frees what the old one had and the new one has not.
fn commit(io: &ExtentIo, draft: &ExtentDraft, old: &Arc<Layout>) -> Arc<Layout> {
    let committed = draft.commit(true, &AtomicBool::new(false)).unwrap().unwrap();
    let mut layout = committed.layout;
    layout.set_generation(old.generation() + 1);
    let mut gone = ExtentSet::default();
    old.extents().for_each(|extent| gone.insert(extent));
    layout.extents().for_each(|extent| drop(gone.remove(extent)));
    io.stripes().free(&gone.extents()).unwrap();
    Arc::new(layout)
}

fn read_all(content: &dyn Content) -> Vec<u8> {
    let mut bytes = vec![0xee; content.size() as usize + 10];
    let n = content.read_at(0, &mut bytes).unwrap();
    bytes.truncate(n);
    bytes
}

#[test]
fn what_is_written_is_read_before_and_after_the_commit() {
    let (_devices, members) = sims(1, 64 << 20);
    let io = io_of(members, 8 << 20);
    let before = free(&io);
    let draft = ExtentDraft::new(&io, NODE, empty());
    let data = Random(7).bytes(3_000_001);
    for (index, piece) in data.chunks(100_000).enumerate() {
        assert_eq!(draft.write_at(index as u64 * 100_000, piece).unwrap(), piece.len());
    }
    assert_eq!(draft.size(), data.len() as u64);
    assert!(read_all(&draft) == data);
    let layout = commit(&io, &draft, &empty());
    assert_eq!(
        layout.extent_count(),
        1,
        "a stream lies in one piece: {:?}",
        layout.extents().collect::<Vec<_>>()
    );
    let content = ExtentContent::new(&io, NODE, layout.clone());
    assert!(read_all(&content) == data);
    let mut pieces = Vec::new();
    let n = content
        .read_with(12_345, 2_000_000, Borrower::Program, &mut |slices| pieces = slices.concat())
        .unwrap();
    assert!(pieces == data[12_345..12_345 + n] && n == 2_000_000);
    assert!(read_all(&draft) == data, "a draft reads on after its commit");
    draft.discard();
    assert_eq!(draft.size(), data.len() as u64, "whoever still holds the draft sees an empty region");
    assert!(read_all(&draft) == data, "and reads it");
    drop(draft);
    assert_eq!(before - free(&io), layout.allocated(), "the commit's space stays, all other came back");
}

#[test]
fn a_dropped_draft_gives_everything_back_and_the_old_content_stays() {
    let (_devices, members) = sims(3, 32 << 20);
    let io = io_of(members, 4 << 20);
    let first = ExtentDraft::new(&io, NODE, empty());
    let data = Random(9).bytes(2 << 20);
    first.write_at(0, &data).unwrap();
    let layout = commit(&io, &first, &empty());
    drop(first);
    let before = free(&io);
    let draft = ExtentDraft::new(&io, NODE, layout.clone());
    draft.write_at(100_000, &Random(3).bytes(1 << 20)).unwrap();
    draft.allocate(8 << 20, 4 << 20, Allocate::Reserve { keep_size: false }).unwrap();
    draft.set_len(5 << 20).unwrap();
    draft.write_at(9 << 20, &[1, 2, 3]).unwrap();
    assert!(free(&io) < before);
    drop(draft);
    assert_eq!(free(&io), before);
    assert!(read_all(&ExtentContent::new(&io, NODE, layout)) == data);
}

#[test]
fn a_full_pool_says_so_at_the_write_and_loses_nothing() {
    let (_devices, members) = sims(2, 8 << 20);
    let io = io_of(members, 4 << 20);
    let before = free(&io);
    let keep = ExtentDraft::new(&io, 1, empty());
    let kept = Random(5).bytes(1 << 20);
    keep.write_at(0, &kept).unwrap();
    let layout = commit(&io, &keep, &empty());
    drop(keep);
    let rest = free(&io);
    let draft = ExtentDraft::new(&io, 2, empty());
    let data = Random(6).bytes(100_003);
    let mut written = 0u64;
    let error = loop {
        match draft.write_at(written, &data) {
            Ok(n) => written += n as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    assert_eq!(written, rest, "every chunk can be used");
    assert_eq!(draft.size(), written);
    draft.flush().unwrap();
    let mut back = vec![0; data.len()];
    draft.read_at(data.len() as u64, &mut back).unwrap();
    assert!(back == data, "what was written before it was full is there");
    assert_eq!(
        draft.allocate(0, written + 1, Allocate::Reserve { keep_size: true }).unwrap_err().kind(),
        ErrorKind::NoSpace
    );
    drop(draft);
    assert_eq!(free(&io), rest);
    assert!(read_all(&ExtentContent::new(&io, 1, layout.clone())) == kept);
    io.stripes().free(&layout.extents().copied().collect::<Vec<_>>()).unwrap();
    assert_eq!(free(&io), before);
}

#[test]
fn reserved_space_is_there_when_the_pool_is_full() {
    let (_devices, members) = sims(1, 8 << 20);
    let io = io_of(members, 4 << 20);
    let draft = ExtentDraft::new(&io, 1, empty());
    draft.allocate(0, 2 << 20, Allocate::Reserve { keep_size: false }).unwrap();
    assert_eq!((draft.size(), draft.allocated()), (2 << 20, 2 << 20));
    let hog = ExtentDraft::new(&io, 2, empty());
    hog.allocate(0, free(&io), Allocate::Reserve { keep_size: true }).unwrap();
    assert_eq!(free(&io), 0);
    assert_eq!(hog.size(), 0);
    let data = Random(2).bytes(40_000);
    // Backwards and in odd places, so that every run is a new one.
    for at in (0..(2 << 20) - 40_000).step_by(190_000).rev() {
        draft.write_at(at as u64, &data).unwrap();
    }
    draft.flush().unwrap();
    let mut back = vec![0; data.len()];
    draft.read_at(190_000, &mut back).unwrap();
    assert!(back == data);
    draft.allocate(0, 2 << 20, Allocate::PunchHole).unwrap();
    assert_eq!(free(&io), 2 << 20);
    assert!(read_all(&draft).iter().all(|byte| *byte == 0));
    assert_eq!(draft.size(), 2 << 20);
}

#[test]
fn one_bad_byte_is_named_and_not_handed_out() {
    let (devices, members) = sims(2, 32 << 20);
    let io = io_of(members, 4 << 20);
    let draft = ExtentDraft::new(&io, NODE, empty());
    let data = Random(11).bytes(1 << 20);
    draft.write_at(0, &data).unwrap();
    let layout = commit(&io, &draft, &empty());
    let bad = 40u64;
    let extent = layout.extent_at(bad * CHUNK as u64).unwrap();
    let at = extent.offset + (bad * CHUNK as u64 - extent.logical) + 77;
    let device = &devices[extent.member as usize];
    let mut byte = [0];
    device.read_at(at, &mut byte).unwrap();
    device.write_at(at, &[byte[0] ^ 0x10]).unwrap();
    let content = ExtentContent::new(&io, NODE, layout.clone());
    let mut buf = vec![0; 4096];
    // Any byte of that chunk, by both ways, again and again; its neighbours are fine.
    for _ in 0..2 {
        for offset in [bad * CHUNK as u64, (bad + 1) * CHUNK as u64 - 4096] {
            let error = content.read_at(offset, &mut buf).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let text = error.chain();
            for part in [
                "node 42".to_owned(),
                format!("chunk {bad} "),
                format!("member {}", extent.member),
                format!("offset {}", at - 77),
            ] {
                assert!(text.contains(&part), "{text:?} lacks {part:?}");
            }
            assert_eq!(
                content
                    .read_with(offset, 10, Borrower::PageCache, &mut |_| panic!("bad bytes were lent"))
                    .unwrap_err()
                    .kind(),
                ErrorKind::Corrupt
            );
        }
        for chunk in [bad - 1, bad + 1] {
            let offset = (chunk * CHUNK as u64) as usize;
            content.read_at(offset as u64, &mut buf).unwrap();
            assert!(buf == data[offset..offset + 4096]);
        }
    }
    let next = ExtentDraft::new(&io, NODE, layout);
    assert_eq!(
        next.write_at(bad * CHUNK as u64 + 5, b"x").unwrap_err().kind(),
        ErrorKind::Corrupt,
        "a partial overwrite does not launder it"
    );
    next.write_at(bad * CHUNK as u64, &data[..CHUNK as usize]).unwrap();
    assert!(io.reader().stats().corrupt_chunks >= 5);
}

#[test]
fn growth_over_a_cut_tail_shows_zeros() {
    let (_devices, members) = sims(1, 32 << 20);
    let io = io_of(members, 4 << 20);
    let draft = ExtentDraft::new(&io, NODE, empty());
    draft.write_at(0, &[7; 50_000]).unwrap();
    let layout = commit(&io, &draft, &empty());
    drop(draft);
    // Cut within a chunk, commit, and grow again in a later draft: the old bytes must not come back.
    let draft = ExtentDraft::new(&io, NODE, layout.clone());
    draft.set_len(20_000).unwrap();
    let layout = commit(&io, &draft, &layout);
    drop(draft);
    assert!(read_all(&ExtentContent::new(&io, NODE, layout.clone())) == [7; 20_000]);
    let draft = ExtentDraft::new(&io, NODE, layout.clone());
    draft.write_at(30_000, &[9; 10]).unwrap();
    let mut want = vec![7; 20_000];
    want.resize(30_000, 0);
    want.extend([9; 10]);
    assert!(read_all(&draft) == want);
    let layout = commit(&io, &draft, &layout);
    assert!(read_all(&ExtentContent::new(&io, NODE, layout)) == want);
}

#[test]
fn many_drafts_share_the_dirty_memory() {
    let (_devices, members) = sims(1, 256 << 20);
    let io = io_of(members, 0);
    // Each holds a gathered chunk for ever; together they are far over the limit of 8 MiB.
    let drafts: Vec<_> = (0..700).map(|node| ExtentDraft::new(&io, node, empty())).collect();
    for draft in &drafts {
        draft.write_at(5, &[draft.shared.node as u8; 100]).unwrap();
        assert!(io.writes().dirty_bytes() <= 8 << 20);
    }
    for draft in &drafts {
        let bytes = read_all(draft);
        assert!(bytes[..5] == [0; 5] && bytes[5..] == [draft.shared.node as u8; 100]);
    }
}

/// Fails writes (or reads) while it is switched on.
#[derive(Debug, Default)]
struct Faults {
    writes: AtomicBool,
    reads: AtomicBool,
    hang: AtomicBool,
}

impl SimHook for Faults {
    fn decide(&self, io: &SimIo, _random: &mut SimRng) -> SimDecision {
        if io.verb == Verb::Write && self.hang.load(Relaxed) {
            return SimDecision::Hang;
        }
        let fails = match io.verb {
            Verb::Write => self.writes.load(Relaxed),
            Verb::Read => self.reads.load(Relaxed),
            _ => false,
        };
        if fails { SimDecision::Fail(5) } else { SimDecision::Proceed }
    }
}

fn faulty() -> (Arc<Faults>, Arc<ExtentIo>) {
    let faults = Arc::new(Faults::default());
    let options = SimOptions { hook: Some(faults.clone()), ..SimOptions::default() };
    let len = 32 << 20;
    let device: Arc<dyn Device> = Arc::new(SimDevice::new(len, options).unwrap());
    let geometry = RawGeometry::plan(len, CHUNK, false).unwrap();
    let member = RawMember::new(0, Path::new("sim"), device, geometry, CHUNK).unwrap();
    (faults, io_of(vec![Arc::new(member)], 4 << 20))
}

#[test]
fn a_failed_write_is_told_by_flush_and_never_committed() {
    let (faults, io) = faulty();
    let before = free(&io);
    let draft = ExtentDraft::new(&io, NODE, empty());
    let data = Random(4).bytes(600_000);
    draft.write_at(0, &data).unwrap();
    let layout = commit(&io, &draft, &empty());
    drop(draft);
    let used = free(&io);
    let draft = ExtentDraft::new(&io, NODE, layout.clone());
    faults.writes.store(true, Relaxed);
    // Behind the writer's back: the write itself succeeds.
    assert_eq!(draft.write_at(1000, &data[..50_000]).unwrap(), 50_000);
    let error = draft.flush().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{}", error.chain());
    assert!(error.chain().contains("sim"), "{}", error.chain());
    draft.flush().unwrap();
    faults.writes.store(false, Relaxed);
    assert_eq!(
        draft.write_at(0, b"x").unwrap_err().kind(),
        ErrorKind::Io,
        "the draft is not what was written"
    );
    assert_eq!(draft.commit(true, &AtomicBool::new(false)).unwrap_err().kind(), ErrorKind::Io);
    drop(draft);
    assert_eq!(free(&io), used);
    assert!(read_all(&ExtentContent::new(&io, NODE, layout.clone())) == data, "the old content is whole");
    io.stripes().free(&layout.extents().copied().collect::<Vec<_>>()).unwrap();
    assert_eq!(free(&io), before);
}

#[test]
fn space_under_a_write_that_never_came_back_is_not_used_again() {
    let (faults, io) = faulty();
    let before = free(&io);
    let draft = ExtentDraft::new(&io, NODE, empty());
    faults.hang.store(true, Relaxed);
    draft.write_at(0, &[1; 100_000]).unwrap();
    assert_eq!(draft.flush().unwrap_err().kind(), ErrorKind::Timeout);
    drop(draft);
    assert!(free(&io) < before, "the device may still write there");
}

#[test]
fn a_failed_read_leaves_the_draft_as_it_was() {
    let (faults, io) = faulty();
    let draft = ExtentDraft::new(&io, NODE, empty());
    let data = Random(4).bytes(600_000);
    draft.write_at(0, &data).unwrap();
    let layout = commit(&io, &draft, &empty());
    drop(draft);
    let draft = ExtentDraft::new(&io, NODE, layout);
    faults.reads.store(true, Relaxed);
    // Each needs the rest of a chunk; each is refused, and may be tried again.
    assert!(draft.write_at(100, b"partly").is_err());
    assert!(draft.set_len(5000).is_err());
    assert!(draft.allocate(10, 10, Allocate::PunchHole).is_err());
    assert!(draft.write_at(700_000, b"gap").is_err());
    assert!(draft.read_at(0, &mut [0; 10]).is_err());
    assert_eq!(draft.size(), 600_000);
    faults.reads.store(false, Relaxed);
    assert!(read_all(&draft) == data);
    draft.set_len(5000).unwrap();
    draft.write_at(100, b"partly").unwrap();
    let mut want = data[..5000].to_vec();
    want[100..106].copy_from_slice(b"partly");
    assert!(read_all(&draft) == want);
}

/// Every operation against a vector, with commits, abandoned drafts and reopening in between.
fn model(io: &Arc<ExtentIo>, seed: u64, steps: usize, max: u64) {
    println!("seed {seed}");
    let mut random = Random(seed | 1);
    let before = free(io);
    let mut committed = empty();
    let mut saved: Vec<u8> = Vec::new();
    let mut draft = ExtentDraft::new(io, NODE, committed.clone());
    let mut now: Vec<u8> = Vec::new();
    for step in 0..steps {
        let at = random.below(max);
        let len = match random.below(4) {
            0 => random.below(300),
            1 => random.below(max - at + 1),
            2 => random.below(70_000).min(max - at),
            _ => (random.below(8) + 1) * CHUNK as u64,
        }
        .min(max - at)
        .max(1);
        let at = if random.below(3) == 0 { at / CHUNK as u64 * CHUNK as u64 } else { at };
        let end = (at + len) as usize;
        let op = random.below(14);
        match op {
            0..=4 => {
                let data = random.bytes(len as usize);
                assert_eq!(draft.write_at(at, &data).unwrap(), data.len());
                if now.len() < end {
                    now.resize(end, 0);
                }
                now[at as usize..end].copy_from_slice(&data);
            }
            5 => {
                draft.set_len(at).unwrap();
                now.resize(at as usize, 0);
            }
            6 => {
                draft.allocate(at, len, Allocate::PunchHole).unwrap();
                let size = now.len();
                now[size.min(at as usize)..size.min(end)].fill(0);
            }
            7 => {
                let keep_size = random.below(2) == 0;
                draft.allocate(at, len, Allocate::ZeroRange { keep_size }).unwrap();
                let size = now.len();
                now[size.min(at as usize)..size.min(end)].fill(0);
                if !keep_size && end > size {
                    now.resize(end, 0);
                }
            }
            8 => {
                let keep_size = random.below(2) == 0;
                draft.allocate(at, len, Allocate::Reserve { keep_size }).unwrap();
                if !keep_size && end > now.len() {
                    now.resize(end, 0);
                }
            }
            9 => {
                committed = commit(io, &draft, &committed);
                saved = now.clone();
            }
            10 => {
                committed = commit(io, &draft, &committed);
                saved = now.clone();
                draft = ExtentDraft::new(io, NODE, committed.clone());
            }
            11 => {
                draft = ExtentDraft::new(io, NODE, committed.clone());
                now = saved.clone();
            }
            12 => draft.flush().unwrap(),
            _ => {
                let content = ExtentContent::new(io, NODE, committed.clone());
                let mut buf = vec![1; len as usize];
                let n = content.read_at(at, &mut buf).unwrap();
                let want = saved.get(at as usize..saved.len().min(end)).unwrap_or_default();
                assert!(buf[..n] == *want, "seed {seed} step {step}: committed content at {at}+{len}");
            }
        }
        assert_eq!(draft.size(), now.len() as u64, "seed {seed} step {step}");
        let from = random.below(max) as usize;
        let mut buf = vec![2; random.below(60_000) as usize];
        let n = draft.read_at(from as u64, &mut buf).unwrap();
        let want = now.get(from..now.len().min(from + buf.len())).unwrap_or_default();
        assert!(buf[..n] == *want, "seed {seed} step {step}: draft at {from}");
    }
    assert!(read_all(&draft) == now, "seed {seed}");
    committed = commit(io, &draft, &committed);
    drop(draft);
    assert!(read_all(&ExtentContent::new(io, NODE, committed.clone())) == now, "seed {seed}");
    assert_eq!(before - free(io), committed.allocated(), "seed {seed}: space");
    io.stripes().free(&committed.extents().copied().collect::<Vec<_>>()).unwrap();
    assert_eq!(free(io), before, "seed {seed}: space");
}

#[test]
fn one_raw_member_agrees_with_a_vector() {
    for seed in 1..13 {
        let (_devices, members) = sims(1, 64 << 20);
        model(&io_of(members, if seed % 3 == 0 { 0 } else { 4 << 20 }), seed, 150, 2_000_000);
    }
}

#[test]
fn three_raw_members_agree_with_a_vector() {
    for seed in 100..112 {
        let (_devices, members) = sims(3, 32 << 20);
        model(&io_of(members, if seed % 3 == 0 { 0 } else { 4 << 20 }), seed, 150, 2_000_000);
    }
}

#[test]
fn striped_directories_agree_with_a_vector() {
    for seed in 200..204 {
        let folder = tempfile::tempdir().unwrap();
        let members: Vec<_> = (0..2u16)
            .map(|index| {
                let path = folder.path().join(index.to_string());
                std::fs::create_dir(&path).unwrap();
                let options = ExtentDirectoryOptions {
                    index,
                    chunk_size: CHUNK,
                    quota: Some(64 << 20),
                    read_only: false,
                };
                Arc::new(ExtentDirectory::new(&path, &options).unwrap()) as Arc<dyn Member>
            })
            .collect();
        model(&io_of(members, 4 << 20), seed, 150, 2_000_000);
        for index in 0..2 {
            let left =
                std::fs::read_dir(folder.path().join(index.to_string()).join("extents")).unwrap().count();
            assert_eq!(left, 0, "seed {seed}: files without extents are removed");
        }
    }
}
