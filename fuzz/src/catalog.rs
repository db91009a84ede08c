//! The catalog: its records, layouts, the database they lie in, and a pool opened over all of it.
//!
//! Plain bytes would stop at the first checksum, so an input is a *plan*: fields that are put together to records and sealed.
//! A plan may also hold raw records, sealed or not.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use engine::fuzzing::{self, LoadedNode, Record, Records};
use engine::layout::{Layout, Piece};
use engine::tensors::Format;
use engine::{
    Access, Attr, FormatOptions, NewNode, NodeId, NodeKind, OpenOptions, Pool, ROOT, Seek as Seeks, format,
};
use nvme::{DeviceOptions, FileDevice};

use crate::source::Source;
use crate::{digest, scratch};

const REGIONS: u64 = 4;
const IMAGE_BYTES: u64 = 24 << 20;

/// A tree out of records, and back.
pub fn records(input: &[u8]) -> u64 {
    let plan = plan(&mut Source::new(input));
    let meta = fuzzing::meta(&plan);
    match fuzzing::meta_again(&meta) {
        Ok(again) => assert_eq!(again, meta),
        Err(error) => {
            assert!(
                plan.next_node.max(plan.next_file).max(plan.generation) >= 1 << 62,
                "a meta record of our own: {error:?}"
            )
        }
    }
    if fuzzing::meta_again(input).is_ok_and(|again| again != input) {
        panic!("a meta record that is read as something else");
    }
    let tree = fuzzing::tree(&plan);
    if let Ok(nodes) = &tree {
        whole(nodes);
        comes_back(&plan, nodes);
    }
    digest(&tree.map_err(|error| error.kind())) // the message names the node that was met first, in a hash map
}

/// What everything above the tree takes for granted: it ends, and every node is where its path says.
fn whole(nodes: &[LoadedNode]) {
    let by_id: BTreeMap<NodeId, &LoadedNode> = nodes.iter().map(|node| (node.attr.node, node)).collect();
    let mut visits = 0;
    let mut open = vec![ROOT];
    while let Some(id) = open.pop() {
        visits += 1;
        assert!(visits <= nodes.len(), "a walk from the root comes to a directory twice");
        for (_, child) in &by_id[&id].entries {
            if by_id[child].attr.kind == NodeKind::Directory {
                open.push(*child);
            }
        }
    }
    let names: usize = nodes.iter().map(|node| node.entries.len()).sum();
    let links: u64 = nodes
        .iter()
        .filter(|node| node.attr.kind != NodeKind::Directory)
        .map(|node| u64::from(node.attr.nlink))
        .sum();
    let directories = nodes.iter().filter(|node| node.attr.kind == NodeKind::Directory).count();
    assert_eq!(names as u64, links + directories as u64 - 1, "names and link counts");
    for node in nodes {
        if let Some(target) = &node.target {
            assert!((1..4096).contains(&target.len()), "a symbolic link to {} bytes", target.len());
        }
    }
}

/// Encoding what was loaded gives what was loaded.
fn comes_back(plan: &Records, nodes: &[LoadedNode]) {
    let again = Records {
        nodes: nodes.iter().map(|node| node.record.clone()).collect(),
        entries: nodes
            .iter()
            .flat_map(|node| node.entries.iter().map(|(record, _)| record.clone()))
            .collect(),
        xattrs: nodes.iter().flat_map(|node| node.xattrs.clone()).collect(),
        ..plan.clone()
    };
    let second = fuzzing::tree(&again).expect("what was loaded and stored can be loaded");
    assert_eq!(second.len(), nodes.len());
    for (a, b) in nodes.iter().zip(&second) {
        assert_eq!((&a.attr, &a.record, &a.target, &a.xattrs), (&b.attr, &b.record, &b.target, &b.xattrs));
        let (mut ours, mut theirs) = (a.entries.clone(), b.entries.clone());
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs);
    }
}

/// One layout out of its records, and back.
pub fn layout(input: &[u8]) -> u64 {
    let mut source = Source::new(input);
    let members = u16::from(source.u8() % 4);
    let mut stored: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    if source.u8().is_multiple_of(4) {
        while !source.is_empty() {
            let (part, kind) =
                (u32::from(source.u8() % 4) << 28 | u32::from(source.u8() % 4), source.u8() % 4);
            stored.insert(part, seal_part(kind, source.bytes()));
        }
    } else {
        stored.extend(layout_records(&mut source));
    }
    let read = Layout::from_records(|part| Ok(stored.get(&part).cloned()));
    let Ok(layout) = &read else { return digest(&read.map_err(|error| error.chain())) };
    let written: BTreeMap<u32, Vec<u8>> = layout.records().into_iter().collect();
    let again = Layout::from_records(|part| Ok(written.get(&part).cloned())).expect("what was written");
    assert_eq!(again, *layout);
    assert!(layout.changes(Some(&again)).delete.is_empty());
    if layout.validate(members).is_ok() {
        valid_layout(layout, members);
    }
    digest(layout)
}

/// Ranges of a layout that may be used: nothing overlaps, nothing overflows, pieces fit together.
fn valid_layout(layout: &Layout, members: u16) {
    let mut end = 0;
    for extent in layout.extents() {
        assert!(extent.logical >= end && extent.len > 0 && extent.member < members, "{extent:?}");
        end = extent.logical.checked_add(extent.len).expect("checked");
        extent.offset.checked_add(extent.len).expect("checked");
    }
    assert!(layout.allocated() <= end);
    let marks: Vec<u64> = layout.extents().flat_map(|e| [e.logical, e.logical_end() - 1]).take(16).collect();
    for at in marks.into_iter().chain([0, layout.size(), u64::MAX]) {
        for len in [1, u64::from(layout.chunk_size()), u64::MAX] {
            let wanted = at.saturating_add(len);
            let mut here = at;
            for piece in layout.lookup(at, len) {
                assert_eq!(piece.logical(), here);
                if let Piece::Data(extent) = piece {
                    let whole = layout.extent_at(extent.logical).expect("it was found there");
                    assert_eq!(whole.offset + (extent.logical - whole.logical), extent.offset);
                }
                here += piece.len();
            }
            assert_eq!(here, wanted, "pieces of {len} bytes at {at}");
        }
        assert!(layout.next_hole(at) >= at);
        assert!(layout.next_data(at).is_none_or(|next| next >= at));
    }
    let mut cut = layout.clone();
    let half = layout.size() / 2;
    cut.truncate(half);
    assert!(cut.validate(members).is_ok() && cut.size() == half);
    let chunk = u64::from(layout.chunk_size());
    assert!(cut.extents().all(|e| e.logical_end() <= half.div_ceil(chunk).saturating_mul(chunk)));
}

/// A database with these records, damaged byte by byte, opened through the backends that pools use.
pub fn image(input: &[u8]) -> u64 {
    let mut source = Source::new(input);
    let flags = source.u8();
    let plan = plan(&mut Source::new(source.bytes()));
    let mut bytes = database(&plan);
    // The first pages are redb's headers, worth most edits; elsewhere an edit may fall anywhere.
    while !source.is_empty() {
        let (near, at, value) = (source.u8(), source.u32() as usize, source.u8());
        let len = bytes.len();
        let at = if near & 1 == 0 { at % len.min(512) } else { at % len };
        match near >> 1 & 3 {
            0 => bytes[at] = value,
            1 => bytes[at] ^= 1 << (value % 8),
            2 => bytes[at..len.min(at + 64)].fill(value),
            _ if near >> 3 == 7 => bytes.truncate(at),
            _ => bytes[at] = bytes[at].wrapping_add(value),
        }
        if bytes.is_empty() {
            break;
        }
    }
    let opened = if flags & 1 == 0 {
        let file = memory_file();
        file.write_all_at(&bytes, 0).expect("memory");
        fuzzing::read_catalog(file, flags & 2 == 0)
    } else {
        zone(&bytes, flags)
    };
    digest(&opened.map_err(|error| error.kind()))
}

/// The same in a zone of a device, whose header may be damaged as well.
fn zone(database: &[u8], flags: u8) -> engine::Result<(usize, usize)> {
    const ZONE: u64 = 8 << 20;
    let file = memory_file();
    file.set_len(ZONE).expect("memory");
    let raw = file.try_clone().expect("a descriptor");
    let device = Arc::new(FileDevice::from_file(file, "fuzzed", false).expect("a device"));
    fuzzing::write_catalog_zone(device.clone(), 0, ZONE, database)?;
    for slot in [0, 4096] {
        if flags >> 2 & 3 == 0 {
            break;
        }
        // A wrong header under a right sum: sequence and length as the flags say.
        let mut header = [0; 36];
        raw.read_exact_at(&mut header, slot).expect("memory");
        let at = if flags & 4 == 0 { 16 } else { 24 };
        header[at + usize::from(flags >> 4 & 7)] ^= flags;
        let sum = crc32fast::hash(&header[..32]);
        header[32..].copy_from_slice(&sum.to_le_bytes());
        raw.write_all_at(&header, slot).expect("memory");
    }
    fuzzing::read_catalog_zone(device, 0, ZONE, flags & 2 == 0)
}

fn memory_file() -> File {
    let fd = rustix::fs::memfd_create("nvtier-fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memory file");
    File::from(fd)
}

fn database(plan: &Records) -> Vec<u8> {
    let mut file = memory_file();
    fuzzing::write_catalog(file.try_clone().expect("a descriptor"), plan).expect("a database of any records");
    let mut bytes = Vec::new();
    file.rewind().expect("memory");
    file.read_to_end(&mut bytes).expect("memory");
    bytes
}

/// A pool whose catalog holds these records: opened, walked, read, and where it may be written, written and opened again.
pub fn pool(input: &[u8]) -> u64 {
    let mut source = Source::new(input);
    let flags = source.u8();
    let mut plan = plan(&mut source);
    let scratch = scratch();
    let path = scratch.path().join("pool");
    if flags & 1 == 0 {
        directory_pool(&path, &mut plan)
    } else {
        image_pool(&path, &mut plan)
    }
    let read_only = flags & 2 == 0;
    let options = OpenOptions { read_only, ram_bytes: 0, commit_interval_ms: 0, ..OpenOptions::default() };
    let opened = match Pool::open(&path, &options) {
        Ok(pool) => pool,
        Err(error) => return digest(&error.kind()),
    };
    let seen = walk(&opened, plan.nodes.len());
    if read_only {
        return seen;
    }
    let new = NewNode { kind: NodeKind::Region, mode: 0o600, uid: 0, gid: 0, rdev: 0, target: None };
    let made = opened.create(ROOT, "made by the fuzzer".as_ref(), &new).and_then(|attr| {
        let handle = opened.open_region(attr.node, Access::ReadWrite, false)?;
        handle.write_at(0, &[7; 5000])?;
        handle.sync()
    });
    let closed = made.is_ok() && opened.sync().is_ok() && opened.close().is_ok();
    if closed {
        let again = Pool::open(&path, &OpenOptions { read_only: true, ..options });
        let again = again.expect("a pool that was opened, written and closed opens again");
        let attr = again.resolve("made by the fuzzer").expect("what was written is there");
        let handle = again.open_region(attr.node, Access::Read, false).expect("it opens");
        let mut bytes = [0; 6000];
        assert_eq!(handle.read_at(0, &mut bytes).expect("it is read"), 5000);
        assert!(bytes[..5000].iter().all(|byte| *byte == 7));
    }
    digest(&closed) // what is read depends on how far the background has come with sums that a crash left out
}

fn walk(pool: &Pool, most: usize) -> u64 {
    let mut seen = Vec::new();
    let mut directories = vec![ROOT];
    let mut visits = 0;
    while let Some(id) = directories.pop() {
        visits += 1;
        assert!(visits <= most, "a walk from the root comes to a directory twice");
        let mut cookie = 0;
        while let Ok(page) = pool.readdir(id, cookie, 7) {
            let Some((last, _)) = page.last() else { break };
            assert!(*last > cookie);
            cookie = *last;
            for (_, entry) in page {
                let attr = pool.getattr(entry.node).expect("a listed node");
                assert_eq!(pool.lookup(id, &entry.name).expect("a listed name").node, attr.node);
                let sums = node(pool, &attr);
                seen.push((entry.name, sums));
                if attr.kind == NodeKind::Directory {
                    directories.push(attr.node);
                }
            }
        }
    }
    seen.sort();
    let stat = pool.stat();
    digest(&(seen, stat.nodes, stat.regions))
}

fn node(pool: &Pool, attr: &Attr) -> u64 {
    let path = pool.path_of(attr.node).expect("a path");
    for name in pool.listxattr(attr.node).expect("attributes") {
        pool.getxattr(attr.node, &name).expect("a listed attribute");
    }
    let _ = pool.readlink(attr.node);
    if attr.kind != NodeKind::Region {
        return 0;
    }
    let mut read = Vec::new();
    if let Ok(handle) = pool.open_region(attr.node, Access::Read, false) {
        let size = handle.size();
        let mut buffer = [0; 20_000];
        for offset in [0, 5, size / 2, size.saturating_sub(1), size, u64::MAX - 3] {
            if let Ok(n) = handle.read_at(offset, &mut buffer) {
                assert!(
                    n as u64 <= size.saturating_sub(offset).min(buffer.len() as u64),
                    "{n} bytes at {offset}"
                );
                read.push(crc32fast::hash(&buffer[..n]));
            }
        }
        for what in [Seeks::Data, Seeks::Hole] {
            let _ = handle.seek(size / 2, what);
        }
    }
    if let Ok(lease) = pool.lease(attr.node, 1, u64::MAX) {
        let range = lease.range();
        assert!(range.start <= range.end && range.end <= lease.size());
        for extent in lease.extents() {
            assert!(extent.logical >= range.start && extent.logical + extent.len <= range.end);
        }
    }
    if Format::of_name(&path).is_some() {
        let _ = pool.tensors(attr.node);
    }
    digest(&read)
}

/// The id, and both copies of the superblock, of an empty pool.
struct Template {
    pool: [u8; 16],
    first: Vec<u8>,
    second: Vec<u8>,
    zone: (u64, u64),
}

fn template(image: bool) -> &'static Template {
    static DIRECTORY: OnceLock<Template> = OnceLock::new();
    static IMAGE: OnceLock<Template> = OnceLock::new();
    let cell = if image { &IMAGE } else { &DIRECTORY };
    cell.get_or_init(|| {
        let scratch = scratch();
        let path = scratch.path().join("pool");
        let size = image.then_some(IMAGE_BYTES);
        Pool::format(&path, &FormatOptions { raw: image, size, ..FormatOptions::default() }).expect("a pool");
        let file = if image { path.clone() } else { path.join(format::SUPERBLOCK_FILE) };
        let file = File::open(file).expect("a superblock");
        let at = if image { IMAGE_BYTES - 4096 } else { 4096 };
        let (mut first, mut second) = (vec![0; 4096], vec![0; 4096]);
        file.read_exact_at(&mut first, 0).expect("a superblock");
        file.read_exact_at(&mut second, at).expect("a superblock");
        let superblock = fuzzing::superblock(&[&first, &second]).expect("a superblock").superblock;
        let zone = (superblock.catalog_offset, superblock.catalog_len / 2);
        Template { pool: superblock.pool, first, second, zone }
    })
}

fn directory_pool(path: &Path, plan: &mut Records) {
    let template = template(false);
    plan.pool = template.pool;
    fs::create_dir_all(path).expect("a folder");
    let mut superblock = File::create_new(path.join(format::SUPERBLOCK_FILE)).expect("a file");
    superblock.write_all(&[&template.first[..], &template.second].concat()).expect("a superblock");
    for number in 1..=REGIONS {
        let folder = path.join(format!("regions/{:02x}", number >> 8));
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(format!("{number:016x}")), vec![number as u8; 9000 * number as usize])
            .expect("a region");
    }
    let file = File::options().read(true).write(true).create_new(true).open(path.join("catalog.redb"));
    fuzzing::write_catalog(file.expect("a file"), plan).expect("a catalog");
}

fn image_pool(path: &Path, plan: &mut Records) {
    let template = template(true);
    plan.pool = template.pool;
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("an image");
    file.set_len(IMAGE_BYTES).expect("memory");
    file.write_all_at(&template.first, 0).expect("memory");
    file.write_all_at(&template.second, IMAGE_BYTES - 4096).expect("memory");
    let device =
        FileDevice::open(path, &DeviceOptions { direct: false, read_only: false }).expect("a device");
    let bytes = database(plan);
    fuzzing::write_catalog_zone(Arc::new(device), template.zone.0, template.zone.1, &bytes).expect("a zone");
}

/// Reads a plan: what a catalog holds, right or wrong.
fn plan(source: &mut Source<'_>) -> Records {
    let mut records = Records {
        next_node: source.number(),
        next_file: source.number(),
        generation: source.number(),
        ..Records::default()
    };
    let mut nodes = BTreeMap::new();
    let mut entries = BTreeMap::new();
    let mut xattrs = BTreeMap::new();
    let mut layouts = BTreeMap::new();
    while !source.is_empty() {
        match source.u8() % 8 {
            0..=2 => drop(node_record(source).map(|(key, value)| nodes.insert(key, value))),
            3 | 4 => drop(entry_record(source).map(|(key, value)| entries.insert(key, value))),
            5 => drop(xattr_record(source).map(|(key, value)| xattrs.insert(key, value))),
            6 => {
                let node = u64::from(source.u8());
                layouts.extend(layout_records(source).into_iter().map(|(part, value)| ((node, part), value)));
            }
            _ => {
                let (table, sealed) = (source.u8(), source.u8() & 3 != 0);
                let (key, value) = (source.bytes().to_vec(), source.bytes());
                let value = if sealed { seal(&key, value) } else { value.to_vec() };
                match table % 3 {
                    0 if key.len() >= 8 => {
                        drop(nodes.insert(key[..8].to_vec(), seal_again(&key[..8], &value, sealed)))
                    }
                    1 => drop(entries.insert(key, value)),
                    _ => drop(xattrs.insert(key, value)),
                }
            }
        }
    }
    records.nodes = nodes.into_iter().collect();
    records.entries = entries.into_iter().collect();
    records.xattrs = xattrs.into_iter().collect();
    records.layouts = layouts.into_iter().map(|((node, part), value)| (node, part, value)).collect();
    records
}

/// A value with the sum over its key.
fn seal(key: &[u8], body: &[u8]) -> Vec<u8> {
    let mut sum = crc32fast::Hasher::new();
    sum.update(key);
    sum.update(body);
    [body, &sum.finalize().to_le_bytes()].concat()
}

/// A value that was sealed for a longer key, under this one.
fn seal_again(key: &[u8], value: &[u8], sealed: bool) -> Vec<u8> {
    match value.len().checked_sub(4) {
        Some(body) if sealed => seal(key, &value[..body]),
        _ => value.to_vec(),
    }
}

fn node_record(source: &mut Source<'_>) -> Option<Record> {
    let key = u64::from(source.u8()).to_be_bytes().to_vec();
    let mut value = vec![1, source.u8(), source.u8(), 0];
    let (mode, nlink) = (u32::from(source.u16()), u32::from(source.u8()));
    for field in [mode, u32::from(source.u8()), 0, nlink] {
        value.extend(field.to_le_bytes());
    }
    let (size, allocated) = (source.number(), source.number());
    let (generation, file) = (u64::from(source.u8()), u64::from(source.u8()));
    for field in [u64::from(source.u8()), size, allocated, generation, file] {
        value.extend(field.to_le_bytes());
    }
    let (secs, nanos) = (source.number(), source.u32());
    for _ in 0..4 {
        value.extend(secs.to_le_bytes());
        value.extend(nanos.to_le_bytes());
    }
    value.extend(source.bytes());
    Some((key.clone(), seal(&key, &value)))
}

fn entry_record(source: &mut Source<'_>) -> Option<Record> {
    let (parent, kind, node) = (u64::from(source.u8()), source.u8(), u64::from(source.u8()));
    let key = [&parent.to_be_bytes()[..], source.bytes()].concat();
    let value = [&[1, kind][..], &node.to_le_bytes()].concat();
    Some((key.clone(), seal(&key, &value)))
}

fn xattr_record(source: &mut Source<'_>) -> Option<Record> {
    let node = u64::from(source.u8());
    let key = [&node.to_be_bytes()[..], source.bytes()].concat();
    let value = [&[1][..], source.bytes()].concat();
    Some((key.clone(), seal(&key, &value)))
}

/// Records of one layout from its fields.
fn layout_records(source: &mut Source<'_>) -> Vec<(u32, Vec<u8>)> {
    let (size, generation, chunk) = (source.number(), source.number(), source.u8());
    let chunk = if chunk < 32 { 1u32 << chunk } else { u32::from(chunk) << 8 };
    let (extents, lie) = (source.u8() % 9, source.u8());
    let mut body = Vec::new();
    for _ in 0..extents {
        let (gap, len, scale) = (source.number(), source.number(), source.u8());
        // Whole chunks mostly: only those get far.
        let whole = |value: u64| if scale & 1 == 0 { value.wrapping_mul(u64::from(chunk)) } else { value };
        let fields =
            [whole(gap), whole(len), u64::from(source.u8() % 3), u64::from(source.u8() % 8), source.number()];
        let offset = if scale & 2 == 0 { (17 << 20) + whole(fields[4] % 64) } else { whole(fields[4]) };
        for value in [fields[0], fields[1], fields[2], fields[3], offset] {
            varint(&mut body, value);
        }
    }
    let mut records = Vec::new();
    if extents > 0 {
        records.push((0x1000_0000, seal_part(1, &body)));
    }
    let segments = u32::from(source.u8() % 3);
    for segment in 0..segments {
        let sums = source.u8() as usize;
        let mut body = source.take(4 * sums).to_vec();
        body.truncate(body.len() / 4 * 4);
        records.push((0x2000_0000 + segment, seal_part(2, &body)));
    }
    let mut head = Vec::new();
    head.extend(size.to_le_bytes());
    head.extend(generation.to_le_bytes());
    head.extend(chunk.to_le_bytes());
    head.extend(u32::from(if lie == 255 { extents + 1 } else { extents }).to_le_bytes());
    head.extend(segments.to_le_bytes());
    records.push((0, seal_part(0, &head)));
    records
}

fn seal_part(part: u8, body: &[u8]) -> Vec<u8> {
    let mut value = [&[1, part][..], body].concat();
    let sum = crc32fast::hash(&value);
    value.extend(sum.to_le_bytes());
    value
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
