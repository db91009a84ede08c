//! Loading: all records of a catalog, read once, checked, and put together.
//!
//! The tables are cut into parts by ranges of node numbers. Of a large catalog, several threads read and decode parts, each in a read transaction
//! of its own, while the caller's thread puts together what is ready; a small one is read part by part by the caller's thread alone.
//! Nodes come first, since entries lead to them; layouts need neither.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;

use redb::{ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};

use super::{CHECK_BYTES, Catalog, Clock, ENTRIES, LAYOUTS, Meta, NODES, XATTRS, guard};
use crate::error::{Error, Result};
use crate::layout::Extent;
use crate::layout::record::Scan;
use crate::namespace::record::{Entries, decode_node, node_key, split_key};
use crate::namespace::{Node, Tree};
use crate::types::NodeId;

/// Parts that each table of a large catalog is cut into: more than threads, so that all of these end at about the same time.
const PARTS: u64 = 16;
/// Most threads that read: beyond it the one that puts together binds.
const THREADS: usize = 8;

/// The extents of all regions, in order of the nodes.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    all: Vec<Extent>,
    /// How many each node has.
    nodes: Vec<(NodeId, usize)>,
}

impl Extents {
    /// Node by node.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (NodeId, &[Extent])> {
        let mut rest = self.all.as_slice();
        self.nodes.iter().map(move |(node, count)| {
            let (own, others) = rest.split_at(*count);
            rest = others;
            (*node, own)
        })
    }

    fn append(&mut self, mut later: Extents) {
        self.all.append(&mut later.all);
        self.nodes.append(&mut later.nodes);
    }
}

/// Takes one record.
type Take<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<()>;

/// What to read: records of these nodes.
#[derive(Clone, Debug)]
enum Part {
    Nodes(Range<NodeId>),
    Entries(Range<NodeId>),
    Layouts(Range<NodeId>),
}

/// What was read.
enum Read<L> {
    Nodes(Vec<(NodeId, Node<L>)>),
    Entries(Entries),
    Layouts(Extents),
}

/// The order of the table whole, or of its parts.
fn parts(next_node: NodeId, count: u64, layouts: bool) -> Vec<Part> {
    let bound = |part: u64| match part {
        0 => 0,
        // Also of what was never given out: it is refused, not skipped.
        _ if part == count => NodeId::MAX,
        _ => (u128::from(next_node) * u128::from(part) / u128::from(count)) as NodeId,
    };
    let ranges = || (0..count).map(|part| bound(part)..bound(part + 1));
    let nodes = ranges().map(Part::Nodes);
    let entries = ranges().map(Part::Entries);
    nodes.chain(entries).chain(ranges().map(Part::Layouts).filter(|_| layouts)).collect()
}

/// Puts together what was read.
struct Whole<L> {
    tree: Tree<L>,
    /// Parts of nodes that are still to come.
    nodes_left: usize,
    /// Entries that wait for nodes.
    entries: Vec<Entries>,
    extents: Vec<(usize, Extents)>,
    /// The first part, in their order, that could not be read, of names and of layouts.
    bad: Option<(usize, Error)>,
    bad_layouts: Option<(usize, Error)>,
}

impl<L> Whole<L> {
    fn take(&mut self, number: usize, layouts: bool, read: Result<Read<L>>) {
        let done = read.and_then(|read| match read {
            Read::Nodes(nodes) => {
                self.nodes_left -= 1;
                nodes.into_iter().try_for_each(|(id, node)| self.tree.add_node(id, node))?;
                match self.nodes_left {
                    0 => self.entries.drain(..).try_for_each(|entries| self.tree.add_entries(entries)),
                    _ => Ok(()),
                }
            }
            Read::Entries(entries) if self.nodes_left > 0 => {
                self.entries.push(entries);
                Ok(())
            }
            Read::Entries(entries) => self.tree.add_entries(entries),
            Read::Layouts(extents) => {
                self.extents.push((number, extents));
                Ok(())
            }
        });
        let bad = if layouts { &mut self.bad_layouts } else { &mut self.bad };
        if let Err(error) = done
            && bad.as_ref().is_none_or(|(first, _)| number < *first)
        {
            *bad = Some((number, error));
        }
    }
}

/// All that was loaded; of the layouts, or what is wrong with them.
pub(crate) type Everything<L> = (Meta, Tree<L>, Result<Extents>);

impl Catalog {
    /// Reads names and attributes, and the extents of all layouts with `layouts`, and checks that they fit together. What is wrong with the layouts is
    /// told apart from what is wrong with the rest.
    pub(crate) fn load<L: Send + Sync>(&self, layouts: bool) -> Result<Everything<L>> {
        let large = self.window.len() > CHECK_BYTES;
        let threads = match large {
            true => std::thread::available_parallelism().map_or(1, |threads| threads.get().min(THREADS)),
            false => 0,
        };
        let loaded = self.load_by(threads, if large { PARTS } else { 1 }, layouts);
        // No more reads of all of it are to come: gives back the memory that made them fast.
        self.window.close();
        loaded
    }

    /// The same, with so many threads beside this one and so many parts of a table.
    pub(super) fn load_by<L: Send + Sync>(
        &self,
        threads: usize,
        count: u64,
        layouts: bool,
    ) -> Result<Everything<L>> {
        let mut clock = Clock::start();
        let meta = self.meta()?;
        let mut tree = Tree::empty(meta.next_node);
        // What the table says of itself may be anything; a record of a node has more than 64 bytes.
        let db = self.db()?;
        let room = guard("read the catalog", || Ok(db.begin_read()?.open_table(NODES)?.len()?))?;
        tree.reserve(room.min(self.window.len() / 64) as usize);
        let parts = parts(meta.next_node, count, layouts);
        let mut whole = Whole {
            tree,
            nodes_left: count as usize,
            entries: Vec::new(),
            extents: Vec::new(),
            bad: None,
            bad_layouts: None,
        };
        let is_layouts = |number: usize| matches!(parts[number], Part::Layouts(_));
        if threads == 0 {
            for (number, part) in parts.iter().enumerate() {
                whole.take(number, is_layouts(number), self.read(part));
            }
        } else {
            let next = AtomicUsize::new(0);
            let (send, ready) = mpsc::channel();
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    let (send, next, parts) = (send.clone(), &next, &parts);
                    scope.spawn(move || {
                        while let Some((number, part)) = {
                            let number = next.fetch_add(1, Relaxed);
                            parts.get(number).map(|part| (number, part))
                        } {
                            if send.send((number, self.read(part))).is_err() {
                                break;
                            }
                        }
                    });
                }
                drop(send);
                for (number, read) in ready {
                    whole.take(number, is_layouts(number), read);
                }
            });
        }
        clock.lap("nodes, entries and layouts read");
        if let Some((_, error)) = whole.bad {
            return Err(error);
        }
        let mut tree = whole.tree;
        let mut load = |key: &[u8], value: &[u8]| tree.load_xattr(key, value);
        self.each(XATTRS, 0..NodeId::MAX, &mut load)?;
        clock.lap("extended attributes read");
        tree.check()?;
        clock.lap("tree checked");
        whole.extents.sort_unstable_by_key(|(number, _)| *number);
        let extents = match whole.bad_layouts {
            Some((_, error)) => Err(error),
            None => Ok(whole.extents.into_iter().map(|(_, extents)| extents).fold(
                Extents::default(),
                |mut all, later| {
                    all.append(later);
                    all
                },
            )),
        };
        Ok((meta, tree, extents))
    }

    /// Calls `take` with each record of nodes of `range`, in order of the keys, up to the first that it refuses. The range ends with the number
    /// `MAX` in it.
    fn each(&self, table: TableDefinition<&[u8], &[u8]>, range: Range<NodeId>, take: Take<'_>) -> Result<()> {
        let db = self.db()?;
        let mut bad = None;
        guard("read the catalog", || {
            let txn = db.begin_read()?;
            let table = txn.open_table(table)?;
            let (first, end) = (node_key(range.start), node_key(range.end));
            let records = match (range.start, range.end) {
                (0, NodeId::MAX) => table.iter()?,
                // Also keys that are too short to be any: they are refused.
                (0, _) => table.range(..end.as_slice())?,
                (_, NodeId::MAX) => table.range(first.as_slice()..)?,
                _ => table.range(first.as_slice()..end.as_slice())?,
            };
            for record in records {
                let (key, value) = record?;
                if let Err(error) = take(key.value(), value.value()) {
                    bad = Some(error);
                    break;
                }
            }
            Ok(())
        })?;
        bad.map_or(Ok(()), Err)
    }

    fn read<L>(&self, part: &Part) -> Result<Read<L>> {
        match part {
            Part::Nodes(range) => {
                let mut nodes = Vec::new();
                let mut take = |key: &[u8], value: &[u8]| {
                    nodes.push(decode_node(key, value)?);
                    Ok(())
                };
                self.each(NODES, range.clone(), &mut take)?;
                Ok(Read::Nodes(nodes))
            }
            Part::Entries(range) => {
                let mut entries = Entries::default();
                self.each(ENTRIES, range.clone(), &mut |key, value| entries.record(key, value))?;
                Ok(Read::Entries(entries))
            }
            Part::Layouts(range) => self.extents(range.clone()).map(Read::Layouts),
        }
    }

    /// The extents of the layouts of some nodes, whose records are checked as [`layout`](Self::layout) does.
    fn extents(&self, range: Range<NodeId>) -> Result<Extents> {
        let mut extents = Extents::default();
        let mut at: Option<(NodeId, Scan)> = None;
        self.each(LAYOUTS, range, &mut |key, value| {
            let (node, _) = split_key(key)?;
            if at.as_ref().is_none_or(|(current, _)| *current != node) {
                finish(at.take())?;
                extents.nodes.push((node, 0));
                at = Some((node, Scan::default()));
            }
            let Some((_, scan)) = &mut at else { return Ok(()) };
            // As `layout` reads it: a short part counts as 0.
            let part = u32::from_be_bytes(key[8..].try_into().unwrap_or_default());
            let before = extents.all.len();
            let done = scan.record(part, value, &mut |extent| extents.all.push(extent));
            if let Some((_, count)) = extents.nodes.last_mut() {
                *count += extents.all.len() - before;
            }
            done.map_err(|error| of_layout(node, error))
        })?;
        finish(at)?;
        Ok(extents)
    }
}

fn of_layout(node: NodeId, error: Error) -> Error {
    error.context(format!("read the layout of node {node}"))
}

/// Ends the layout of a node.
fn finish(at: Option<(NodeId, Scan)>) -> Result<()> {
    at.map_or(Ok(()), |(node, scan)| scan.finish().map_err(|error| of_layout(node, error)))
}
