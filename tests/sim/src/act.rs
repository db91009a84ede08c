//! Acts: what a workload does to a pool, one line each, and how they are drawn from a seed.
//!
//! To add one: a variant here, its words in `Display`, its chance in [`draw`], and what it does to pool and model in `world.rs`.

use std::fmt;

use nvme::SimRng;

/// Handles that a workload may have open at a time. Each is an actor of its own: their writes interleave as the seed says.
pub const SLOTS: usize = 4;

/// One act.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are what they are called; offsets and lengths in bytes
pub enum Act {
    /// Makes an empty region.
    Create {
        path: String,
    },
    /// Makes a region where there is none, and writes it whole.
    Put {
        path: String,
        len: usize,
        fill: u64,
    },
    /// Opens, writes somewhere, closes: copy on write.
    Write {
        path: String,
        offset: usize,
        len: usize,
        fill: u64,
    },
    /// `truncate(2)`.
    Truncate {
        path: String,
        len: usize,
    },
    /// Through a `RegionWriter`: whole or not at all.
    Import {
        path: String,
        len: usize,
        fill: u64,
        reserve: bool,
        commit: bool,
    },
    Mkdir {
        path: String,
    },
    Rmdir {
        path: String,
    },
    Symlink {
        path: String,
        target: String,
    },
    Link {
        from: String,
        to: String,
    },
    Rename {
        from: String,
        to: String,
        exchange: bool,
    },
    Unlink {
        path: String,
    },
    Chmod {
        path: String,
        mode: u32,
    },
    SetXattr {
        path: String,
        name: String,
        len: usize,
        fill: u64,
    },
    RemoveXattr {
        path: String,
        name: String,
    },
    /// Opens for writing, and keeps it open.
    Open {
        slot: usize,
        path: String,
        truncate: bool,
    },
    WriteAt {
        slot: usize,
        offset: usize,
        len: usize,
        fill: u64,
    },
    SetLen {
        slot: usize,
        len: usize,
    },
    Punch {
        slot: usize,
        offset: usize,
        len: usize,
    },
    Reserve {
        slot: usize,
        offset: usize,
        len: usize,
    },
    /// `fsync(2)`.
    Fsync {
        slot: usize,
    },
    Close {
        slot: usize,
    },
    /// A snapshot of everything that is committed.
    Sync,
    /// Compares what handles see.
    Read {
        path: String,
    },
    /// Keeps generations of a region when it is replaced.
    Keep {
        path: String,
        count: u32,
    },
    /// Puts a generation back, counted from the oldest, as far as there are some.
    RollBack {
        path: String,
        which: usize,
    },
    /// Stores blocks in the KV store; those that are full make room.
    KvPut {
        space: usize,
        first: u64,
        count: u64,
    },
    KvGet {
        space: usize,
        first: u64,
        count: u64,
    },
    KvRemove {
        space: usize,
        first: u64,
        count: u64,
    },
    /// Some of a checkpoint of the KV store, where one is under way or due.
    KvStep,
    /// Makes the KV store durable; `whole`: with a checkpoint.
    KvFlush {
        whole: bool,
    },
    /// Closes everything, then the pool, and opens it again.
    Reopen,
    /// Closes everything, takes a snapshot, and counts the space.
    Count,
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Act::Create { path } => write!(f, "create {path}"),
            Act::Put { path, len, fill } => write!(f, "put {path}: {len} bytes (noise {fill})"),
            Act::Write { path, offset, len, fill } => {
                write!(f, "write {path}: {len} bytes at {offset} (noise {fill})")
            }
            Act::Truncate { path, len } => write!(f, "truncate {path} to {len}"),
            Act::Import { path, len, fill, reserve, commit } => write!(
                f,
                "import {path}: {len} bytes (noise {fill}){}{}",
                if *reserve { ", reserved" } else { "" },
                if *commit { "" } else { ", given up" }
            ),
            Act::Mkdir { path } => write!(f, "mkdir {path}"),
            Act::Rmdir { path } => write!(f, "rmdir {path}"),
            Act::Symlink { path, target } => write!(f, "symlink {path} -> {target}"),
            Act::Link { from, to } => write!(f, "link {from} as {to}"),
            Act::Rename { from, to, exchange: false } => write!(f, "rename {from} to {to}"),
            Act::Rename { from, to, exchange: true } => write!(f, "exchange {from} and {to}"),
            Act::Unlink { path } => write!(f, "unlink {path}"),
            Act::Chmod { path, mode } => write!(f, "chmod {mode:o} {path}"),
            Act::SetXattr { path, name, len, fill } => {
                write!(f, "setxattr {path} {name}: {len} bytes (noise {fill})")
            }
            Act::RemoveXattr { path, name } => write!(f, "removexattr {path} {name}"),
            Act::Open { slot, path, truncate } => {
                write!(f, "#{slot}: open {path}{}", if *truncate { ", truncated" } else { "" })
            }
            Act::WriteAt { slot, offset, len, fill } => {
                write!(f, "#{slot}: write {len} bytes at {offset} (noise {fill})")
            }
            Act::SetLen { slot, len } => write!(f, "#{slot}: set the size to {len}"),
            Act::Punch { slot, offset, len } => write!(f, "#{slot}: punch {len} bytes at {offset}"),
            Act::Reserve { slot, offset, len } => write!(f, "#{slot}: reserve {len} bytes at {offset}"),
            Act::Fsync { slot } => write!(f, "#{slot}: fsync"),
            Act::Close { slot } => write!(f, "#{slot}: close"),
            Act::Sync => f.write_str("sync"),
            Act::Read { path } => write!(f, "read {path}"),
            Act::Keep { path, count } => write!(f, "keep {count} generations of {path}"),
            Act::RollBack { path, which } => write!(f, "roll {path} back to generation {which}"),
            Act::KvPut { space, first, count } => write!(f, "KV {space}: put {count} from {first}"),
            Act::KvGet { space, first, count } => write!(f, "KV {space}: get {count} from {first}"),
            Act::KvRemove { space, first, count } => write!(f, "KV {space}: remove {count} from {first}"),
            Act::KvStep => f.write_str("KV step of a checkpoint"),
            Act::KvFlush { whole: false } => f.write_str("KV flush"),
            Act::KvFlush { whole: true } => f.write_str("KV checkpoint"),
            Act::Reopen => f.write_str("close and open the pool"),
            Act::Count => f.write_str("count the space"),
        }
    }
}

impl Act {
    /// The slot it uses, for shrinking to fewer actors.
    pub fn slot(&self) -> Option<usize> {
        match self {
            Act::Open { slot, .. }
            | Act::WriteAt { slot, .. }
            | Act::SetLen { slot, .. }
            | Act::Punch { slot, .. }
            | Act::Reserve { slot, .. }
            | Act::Fsync { slot }
            | Act::Close { slot } => Some(*slot),
            _ => None,
        }
    }

    /// The same with half of its bytes, if it has any.
    pub fn smaller(&self) -> Option<Act> {
        let mut act = self.clone();
        if let Act::KvPut { count, .. } | Act::KvGet { count, .. } | Act::KvRemove { count, .. } = &mut act {
            *count /= 2;
            return (*count > 0).then_some(act);
        }
        let (Act::Put { len, .. }
        | Act::Write { len, .. }
        | Act::Import { len, .. }
        | Act::WriteAt { len, .. }
        | Act::SetXattr { len, .. }) = &mut act
        else {
            return None;
        };
        *len /= 2;
        (*len > 0).then_some(act)
    }
}

/// What acts are drawn for.
#[derive(Clone, Copy, Debug)]
pub struct Taste {
    /// Bytes of a chunk.
    pub chunk: usize,
    /// Largest write.
    pub most: usize,
    /// Handles at a time, 0 to [`SLOTS`].
    pub slots: usize,
    /// With a KV store.
    pub kv: bool,
    /// With generations that are kept.
    pub keep: bool,
}

const DIRECTORIES: [&str; 3] = ["d", "e", "d/s"];
const FILES: u64 = 5;

fn one_of<'a>(rng: &mut SimRng, list: &[&'a str]) -> &'a str {
    list[rng.in_range(0..list.len() as u64) as usize]
}

/// What drawing knows of the acts it has drawn: enough to make most of them meet something.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    files: Vec<String>,
    open: [bool; SLOTS],
}

impl Memory {
    /// The power went: no handle is open.
    pub fn crashed(&mut self) {
        self.open = Default::default();
    }

    /// A path that may be anything.
    fn new_path(&mut self, rng: &mut SimRng) -> String {
        let path = path(rng);
        if !self.files.contains(&path) {
            self.files.push(path.clone());
        }
        path
    }

    /// Most often a path that was made before.
    fn old_path(&mut self, rng: &mut SimRng) -> String {
        if self.files.is_empty() || rng.in_range(0..10) == 0 {
            return path(rng);
        }
        self.files[rng.in_range(0..self.files.len() as u64) as usize].clone()
    }
}

/// A path from a small space, so that acts meet each other.
fn path(rng: &mut SimRng) -> String {
    let file = rng.in_range(0..FILES);
    match rng.in_range(0..8) {
        0..=5 => format!("f{file}"),
        6 => format!("d/f{file}"),
        _ => format!("{}/f{file}", one_of(rng, &DIRECTORIES)),
    }
}

fn any_path(rng: &mut SimRng) -> String {
    if rng.in_range(0..5) == 0 { one_of(rng, &DIRECTORIES).to_owned() } else { path(rng) }
}

/// A length that is interesting: around chunks, tiny, or large.
fn length(rng: &mut SimRng, taste: &Taste) -> usize {
    let chunk = taste.chunk as u64;
    let len = match rng.in_range(0..8) {
        0 => rng.in_range(1..600),
        1 | 2 => rng.in_range(1..chunk * 2),
        3 => chunk * rng.in_range(1..5),
        4 => chunk * rng.in_range(1..5) + rng.in_range(0..3) - 1,
        5 | 6 => rng.in_range(1..chunk * 12),
        _ => rng.in_range(1..taste.most as u64),
    };
    (len as usize).min(taste.most)
}

fn place(rng: &mut SimRng, taste: &Taste) -> usize {
    let chunk = taste.chunk as u64;
    let at = match rng.in_range(0..5) {
        0 => 0,
        1 => rng.in_range(0..chunk * 2),
        2 => chunk * rng.in_range(0..6),
        3 => chunk * rng.in_range(1..6) - 1,
        _ => rng.in_range(0..chunk * 20),
    };
    at as usize
}

/// One act of the KV store.
fn draw_kv(rng: &mut SimRng) -> Act {
    let space = [0, 0, 0, 1, 2][rng.in_range(0..5) as usize];
    // Few blocks, so that they meet again; more than fit, so that some make room.
    let (first, count) = (rng.in_range(0..50), rng.in_range(1..9));
    match rng.in_range(0..28) {
        20.. => Act::KvStep,
        0..=9 => Act::KvPut { space, first, count },
        10..=12 => Act::KvGet { space, first, count },
        13 => Act::KvRemove { space, first, count },
        14..=18 => Act::KvFlush { whole: false },
        _ => Act::KvFlush { whole: true },
    }
}

/// One act by chance.
pub fn draw(rng: &mut SimRng, taste: &Taste, memory: &mut Memory) -> Act {
    let fill = rng.next_u64() >> 48;
    if taste.kv && rng.in_range(0..100) < 40 {
        return draw_kv(rng);
    }
    if taste.keep && rng.in_range(0..100) < 30 {
        let path = memory.old_path(rng);
        return match rng.in_range(0..10) {
            0..=2 => Act::Keep { path, count: rng.in_range(0..4) as u32 },
            3..=5 => Act::RollBack { path, which: rng.in_range(0..3) as usize },
            _ => Act::Import { path, len: length(rng, taste), fill, reserve: false, commit: true },
        };
    }
    if taste.slots > 0 && rng.in_range(0..100) < 40 {
        let slot = rng.in_range(0..taste.slots as u64) as usize;
        if !memory.open[slot] {
            memory.open[slot] = true;
            return Act::Open { slot, path: memory.old_path(rng), truncate: rng.in_range(0..4) == 0 };
        }
        return match rng.in_range(0..20) {
            0..=9 => Act::WriteAt { slot, offset: place(rng, taste), len: length(rng, taste), fill },
            10..=11 => Act::SetLen { slot, len: place(rng, taste) },
            12 => Act::Punch { slot, offset: place(rng, taste), len: length(rng, taste) },
            13 => Act::Reserve { slot, offset: place(rng, taste), len: length(rng, taste) },
            14..=16 => Act::Fsync { slot },
            _ => {
                memory.open[slot] = false;
                Act::Close { slot }
            }
        };
    }
    match rng.in_range(0..100) {
        0..=18 => Act::Put { path: memory.new_path(rng), len: length(rng, taste), fill },
        19..=21 => Act::Create { path: memory.new_path(rng) },
        22..=33 => Act::Write {
            path: memory.old_path(rng),
            offset: place(rng, taste),
            len: length(rng, taste),
            fill,
        },
        34..=38 => Act::Truncate { path: memory.old_path(rng), len: place(rng, taste) },
        39..=47 => Act::Import {
            path: memory.new_path(rng),
            len: length(rng, taste),
            fill,
            reserve: rng.in_range(0..2) == 0,
            commit: rng.in_range(0..5) > 0,
        },
        48..=51 => Act::Mkdir { path: one_of(rng, &DIRECTORIES).to_owned() },
        52 => Act::Rmdir { path: one_of(rng, &DIRECTORIES).to_owned() },
        53 => Act::Symlink { path: path(rng), target: path(rng) },
        54..=56 => Act::Link { from: memory.old_path(rng), to: memory.new_path(rng) },
        57..=63 => {
            let exchange = rng.in_range(0..5) == 0;
            let (from, to) = match rng.in_range(0..5) {
                0 => (any_path(rng), any_path(rng)),
                _ => (memory.old_path(rng), memory.new_path(rng)),
            };
            Act::Rename { from, to, exchange }
        }
        64..=70 => Act::Unlink { path: memory.old_path(rng) },
        71..=72 => Act::Chmod { path: any_path(rng), mode: rng.in_range(0..0o1000) as u32 },
        73..=75 => {
            let name = one_of(rng, &["user.a", "user.b"]).to_owned();
            let len = [3, 200, 9000][rng.in_range(0..3) as usize];
            Act::SetXattr { path: memory.old_path(rng), name, len, fill }
        }
        76 => Act::RemoveXattr { path: memory.old_path(rng), name: "user.a".into() },
        77..=92 => Act::Sync,
        93..=94 => Act::Read { path: memory.old_path(rng) },
        act => {
            memory.crashed();
            if act <= 97 { Act::Count } else { Act::Reopen }
        }
    }
}
