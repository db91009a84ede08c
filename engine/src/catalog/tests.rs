//! The catalog on storage that fails.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use redb::backends::InMemoryBackend;

use super::*;
use crate::layout::Extent;
use crate::namespace::Tree;
use crate::namespace::record::{encode_entry, encode_node, name_key, node_key};
use crate::types::{NewNode, NodeKind, ROOT, Timestamp};

/// Memory whose writes fail when its budget of them is spent. It outlives the database: what reached it is what a crash leaves.
#[derive(Clone, Debug)]
struct Faulty {
    inner: Arc<InMemoryBackend>,
    budget: Arc<AtomicU64>,
    kind: io::ErrorKind,
}

impl Faulty {
    fn new(kind: io::ErrorKind) -> Faulty {
        Faulty { inner: Arc::new(InMemoryBackend::new()), budget: Arc::new(AtomicU64::new(u64::MAX)), kind }
    }

    fn spend(&self) -> io::Result<()> {
        let left = self.budget.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        left.map(drop).map_err(|_| io::Error::new(self.kind, "injected"))
    }
}

impl StorageBackend for Faulty {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.spend()?;
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.spend()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.spend()?;
        self.inner.write(offset, data)
    }
}

fn meta(generation: u64) -> Meta {
    Meta { pool: [3; 16], next_node: 1000, next_file: 7, generation, saved: 9 }
}

/// A snapshot with the root and `count` regions, each with a layout.
fn batch(generation: u64, count: u64) -> Batch {
    let mut tree: Tree<()> = Tree::new(0, 0, Timestamp::default());
    let mut batch = Batch::new(meta(generation));
    for index in 0..count {
        let new = NewNode { kind: NodeKind::Region, mode: 0, uid: 0, gid: 0, rdev: 0, target: None };
        let name = format!("region {index}");
        let id = tree.create(ROOT, name.as_ref(), &new, Timestamp::default()).unwrap();
        let key = name_key(ROOT, name.as_ref());
        let value = encode_entry(&key, id, NodeKind::Region);
        batch.entries.push((key, Some(value)));
        let mut layout = Layout::new(4096);
        layout.set_size(8192);
        layout.set_generation(generation);
        layout.replace(Extent { logical: 0, member: 0, file: index + 1, offset: 0, len: 8192 });
        layout.set_sums(0, &[index as u32, generation as u32]);
        batch.layouts.push((id, layout.changes(None)));
    }
    batch.nodes = tree.iter().map(|(id, node)| (id, encode_node(id, node))).collect();
    batch
}

fn state(catalog: &Catalog) -> (u64, u64) {
    let (meta, tree, _) = catalog.load::<()>(false).unwrap();
    for node in catalog.layout_nodes().unwrap() {
        let layout = catalog.layout(node).unwrap().unwrap();
        assert_eq!(layout.generation(), meta.generation, "a layout of another snapshot");
        assert_eq!(layout.sum(1), meta.generation as u32);
    }
    assert_eq!(catalog.layout_nodes().unwrap().len() as u64, tree.region_count());
    // What the scan of all layouts says is what they say one by one.
    let of_layout = |node: &NodeId| catalog.layout(*node).unwrap().unwrap().extents().copied().collect();
    let one_by_one: Vec<(NodeId, Vec<Extent>)> =
        catalog.layout_nodes().unwrap().iter().map(|node| (*node, of_layout(node))).collect();
    let (again, _, extents) = catalog.load::<()>(true).unwrap();
    let at_once: Vec<_> = extents.unwrap().iter().map(|(node, extents)| (node, extents.to_vec())).collect();
    assert_eq!((again.generation, at_once), (meta.generation, one_by_one));
    (meta.generation, tree.region_count())
}

fn created(store: &Faulty) -> Catalog {
    Catalog::create(Box::new(store.clone()), &batch(1, 20)).unwrap()
}

/// Lets writes fail after each possible number of them during a commit: either snapshot is there then, whole. `begin` gives a catalog of the first
/// one, `check_bytes` is that of the open after the crash.
fn cut_at_every_write(begin: impl Fn(&Faulty) -> Catalog, check_bytes: u64) {
    let mut outcomes = [0; 2];
    for allowed in 0.. {
        let store = Faulty::new(io::ErrorKind::Other);
        let catalog = begin(&store);
        store.budget.store(allowed, Relaxed);
        let applied = catalog.apply(&batch(2, 40));
        drop(catalog);
        let spent = store.budget.swap(u64::MAX, Relaxed) > 0;
        match state(&Catalog::open_checked(Box::new(store), false, check_bytes).unwrap()) {
            (1, 20) => {
                assert!(applied.is_err(), "{allowed} writes: it was said to be durable");
                outcomes[0] += 1;
            }
            (2, 40) => outcomes[1] += 1,
            other => panic!("{allowed} writes: neither before nor after: {other:?}"),
        }
        if applied.is_ok() && spent {
            break;
        }
    }
    assert!(outcomes[0] > 3 && outcomes[1] > 0, "{outcomes:?}");
}

#[test]
fn a_snapshot_is_there_whole_or_not_at_all() {
    cut_at_every_write(created, CHECK_BYTES);
}

/// A large catalog, whose pages nobody walks after a crash: each commit leaves it ready to be opened.
#[test]
fn a_large_catalog_is_whole_after_a_crash_at_any_write() {
    let large = |store: &Faulty| {
        drop(created(store));
        let catalog = Catalog::open_checked(Box::new(store.clone()), false, 0).unwrap();
        catalog.apply(&batch(1, 20)).unwrap();
        catalog
    };
    cut_at_every_write(large, 0);
}

#[test]
fn after_a_failed_write_it_goes_on_once_it_is_opened_again() {
    for allowed in [0, 1, 3, 5] {
        let store = Faulty::new(io::ErrorKind::StorageFull);
        let catalog = Catalog::create(Box::new(store.clone()), &batch(1, 20)).unwrap();
        store.budget.store(allowed, Relaxed);
        let error = catalog.apply(&batch(2, 400)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
        assert_eq!(state_of_old(&catalog), Some(()), "reading goes on");
        store.budget.store(u64::MAX, Relaxed);
        catalog.reopen(|_| Ok(Box::new(store.clone()))).unwrap();
        catalog.apply(&batch(2, 400)).unwrap();
        assert_eq!(state(&catalog), (2, 400));
        catalog.close().unwrap();
        assert_eq!(catalog.meta().unwrap_err().kind(), ErrorKind::Stale);
        assert_eq!(state(&Catalog::open(Box::new(store), false).unwrap()), (2, 400));
    }
}

/// Whatever it says, it must not panic.
fn state_of_old(catalog: &Catalog) -> Option<()> {
    let _ = catalog.meta();
    let _ = catalog.layout(2);
    Some(())
}

#[test]
fn meta_records_are_checked() {
    let good = meta(5).encode();
    assert_eq!(Meta::decode(&good).unwrap(), meta(5));
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Meta::decode(&bad).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    for len in 0..good.len() {
        assert_eq!(Meta::decode(&good[..len]).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    // Numbers that the next creation, file or commit would carry beyond 64 bits, under a right sum.
    for absurd in
        [Meta { next_node: u64::MAX, ..meta(5) }, Meta { next_file: 1 << 62, ..meta(5) }, meta(1 << 63)]
    {
        assert_eq!(Meta::decode(&absurd.encode()).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn a_read_only_open_repairs_in_memory_only() {
    let store = Faulty::new(io::ErrorKind::Other);
    let catalog = Catalog::create(Box::new(store.clone()), &batch(1, 20)).unwrap();
    store.budget.store(0, Relaxed);
    drop(catalog); // without a clean close, as a killed process leaves it
    let read_only = Catalog::open(Box::new(store.clone()), true).unwrap();
    assert_eq!(state(&read_only), (1, 20));
    assert_eq!(store.budget.load(Relaxed), 0);
}

#[test]
fn not_a_catalog() {
    for bytes in [vec![], vec![0; 100], vec![7; 100_000], b"redb\x1a\x0a\xa9\x0d\x0a".to_vec()] {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &bytes).unwrap();
        let error = Catalog::open(Box::new(backend::FileStore(file)), false)
            .map(|catalog| catalog.meta().unwrap_err());
        let error = error.unwrap_or_else(|error| error);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{} bytes: {}", bytes.len(), error.chain());
    }
}

/// All that a tree says, in order of the nodes.
fn told(tree: &Tree<()>) -> Vec<String> {
    let mut nodes: Vec<_> = tree.iter().collect();
    nodes.sort_unstable_by_key(|(id, _)| *id);
    let listing = |id, kind| match kind {
        NodeKind::Directory => tree.readdir(id, 0, usize::MAX).unwrap(),
        _ => Vec::new(),
    };
    nodes.iter().map(|(id, node)| format!("{:?} {:?}", node.attr(*id), listing(*id, node.kind))).collect()
}

/// However many threads read however many parts: the same tree, and the same complaint.
#[test]
fn parts_and_threads_make_no_difference() {
    let store = Faulty::new(io::ErrorKind::Other);
    let catalog = Catalog::create(Box::new(store), &batch(1, 300)).unwrap();
    let load = |threads, count| catalog.load_by::<()>(threads, count, true);
    let (meta, tree, extents) = load(0, 1).unwrap();
    let extents: Vec<_> = extents.unwrap().iter().map(|(node, own)| (node, own.to_vec())).collect();
    assert_eq!((tree.region_count(), extents.len()), (300, 300));
    let several = [(0, 2), (1, 1), (1, 5), (2, 16), (7, 64), (3, 2000)];
    for (threads, count) in several {
        let (again, other, others) = load(threads, count).unwrap();
        let others: Vec<_> = others.unwrap().iter().map(|(node, own)| (node, own.to_vec())).collect();
        assert_eq!(
            (&again, told(&other), others),
            (&meta, told(&tree), extents.clone()),
            "{threads} threads, {count} parts"
        );
    }
    // Two nodes and two layouts go bad: the first of each is named.
    let mut bad = Batch::new(meta);
    for node in [50, 250] {
        bad.nodes.push((node, b"no record".to_vec()));
        let mut changes = Changes::default();
        changes.put.push((0, b"no layout".to_vec()));
        bad.layouts.push((node + 1, changes));
    }
    catalog.apply(&bad).unwrap();
    let of = |threads, count| load(threads, count).map(drop).unwrap_err().chain();
    let said = of(0, 1);
    assert!(said.contains("node 50"), "{said}");
    for (threads, count) in several {
        assert_eq!(of(threads, count), said, "{threads} threads, {count} parts");
    }
    let mut good = Batch::new(catalog.meta().unwrap());
    for node in [50, 250] {
        good.nodes.push((node, encode_node(node, tree.get(node).unwrap())));
    }
    catalog.apply(&good).unwrap();
    let of = |threads, count| load(threads, count).unwrap().2.map(drop).unwrap_err().chain();
    let said = of(0, 1);
    assert!(said.contains("node 51"), "{said}");
    for (threads, count) in several {
        assert_eq!(of(threads, count), said, "{threads} threads, {count} parts");
    }
    // A key that is too short to be one is in some part too.
    let mut short = Batch::new(catalog.meta().unwrap());
    short.entries.push((node_key(9)[..5].to_vec(), Some(b"x".to_vec())));
    catalog.apply(&short).unwrap();
    for (threads, count) in several {
        assert_eq!(
            load(threads, count).unwrap_err().kind(),
            ErrorKind::Corrupt,
            "{threads} threads, {count} parts"
        );
    }
}
