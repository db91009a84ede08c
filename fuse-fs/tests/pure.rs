//! The file system without a kernel: what it decides about modes, counts and listings.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::{FormatOptions, NodeKind, OpenOptions, Pool, ROOT, RenameFlags, SetAttr};
use fuse_fs::Errno;
use fuse_fs::fs::{Access, Caller, Fs, FsOptions, IoPath, NewNodeRequest, Operation, Passthrough};

const ME: Caller = Caller { uid: 0, gid: 0 };
const READ: Access = Access { read: true, write: false, truncate: false, direct: false };
const WRITE: Access = Access { read: true, write: true, truncate: false, direct: false };

/// Stands for a backing id; counts how many are alive.
struct Token {
    alive: Arc<AtomicUsize>,
}

impl Drop for Token {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Bench {
    fs: Fs<Token>,
    alive: Arc<AtomicUsize>,
    registered: Arc<AtomicUsize>,
    _folder: tempfile::TempDir,
}

impl Bench {
    fn new(read_only: bool) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pool");
        Pool::format(&path, &FormatOptions::default()).unwrap();
        let pool = Pool::open(&path, &OpenOptions { ram_bytes: 8 << 20, ..OpenOptions::default() }).unwrap();
        let fs = Fs::new(pool, FsOptions { owner: ME, read_only, mountpoint: "nowhere".to_owned() });
        Bench { fs, alive: Arc::default(), registered: Arc::default(), _folder: folder }
    }

    fn register(&self) -> impl FnMut(&File) -> io::Result<Token> + use<> {
        let (alive, registered) = (self.alive.clone(), self.registered.clone());
        move |file| {
            assert!(file.as_raw_fd() > 2);
            alive.fetch_add(1, Ordering::SeqCst);
            registered.fetch_add(1, Ordering::SeqCst);
            Ok(Token { alive: alive.clone() })
        }
    }

    fn make(&self, parent: u64, name: &str, kind: NodeKind) -> u64 {
        let request = NewNodeRequest { kind, mode: 0o644, rdev: 0, target: None };
        self.fs.make_node(parent, OsStr::new(name), request, ME).unwrap().attr.node
    }

    fn list(&self, ino: u64, offset: u64, room: usize) -> Vec<(String, u64)> {
        let mut names = Vec::new();
        self.fs
            .read_dir(ino, offset, false, &mut |entry| {
                if names.len() == room {
                    return true;
                }
                names.push((entry.name.to_str().unwrap().to_owned(), entry.next));
                false
            })
            .unwrap();
        names
    }
}

#[test]
fn one_backing_id_per_node_for_as_long_as_it_is_open() {
    let bench = Bench::new(false);
    bench.fs.set_passthrough(Passthrough::On);
    let ino = bench.make(ROOT, "f", NodeKind::Region);
    let mut opened = Vec::new();
    for access in [WRITE, READ, Access { truncate: true, ..WRITE }] {
        opened.push(bench.fs.open(ino, access, ME, &mut bench.register()).unwrap());
    }
    assert_eq!(bench.registered.load(Ordering::SeqCst), 1, "all opens share one");
    for opened in &opened {
        assert!(matches!(opened.path, IoPath::Passthrough(_)));
        assert!(!opened.flush_on_close);
    }
    let numbers: Vec<u64> = opened.iter().map(|opened| opened.fh).collect();
    drop(opened); // the answers are sent; only the file system keeps the id now
    for (i, fh) in numbers.iter().enumerate() {
        assert_eq!(bench.alive.load(Ordering::SeqCst), 1, "before release {i}");
        bench.fs.release(*fh).unwrap();
    }
    assert_eq!(bench.alive.load(Ordering::SeqCst), 0, "released with the last file");
    assert_eq!(bench.fs.release(numbers[0]), Err(Errno::EBADF));
}

#[test]
fn a_refusal_of_the_kernel_serves_from_then_on() {
    let bench = Bench::new(false);
    bench.fs.set_passthrough(Passthrough::On);
    let ino = bench.make(ROOT, "f", NodeKind::Region);
    let opened = bench.fs.open(ino, WRITE, ME, &mut |_| Err(io::Error::from_raw_os_error(1))).unwrap();
    assert!(matches!(opened.path, IoPath::Cached { .. }));
    assert!(opened.flush_on_close);
    assert!(matches!(bench.fs.passthrough(), Passthrough::Off(reason) if reason.contains("refused")));
    assert_eq!(bench.fs.write(opened.fh, 3, b"abc", false).unwrap(), 3);
    let mut read = Vec::new();
    let count = bench.fs.read(opened.fh, 0, 100, &mut |slices| read = slices.concat()).unwrap();
    assert_eq!((count, read.as_slice()), (6, &b"\0\0\0abc"[..]));
    assert_eq!(bench.fs.stats()["mount"]["opens"]["served"], 1);
}

#[test]
fn the_mode_of_an_open_node_never_changes() {
    let bench = Bench::new(false);
    let ino = bench.make(ROOT, "f", NodeKind::Region);
    let first = bench.fs.open(ino, READ, ME, &mut bench.register()).unwrap();
    assert!(matches!(first.path, IoPath::Cached { .. }));
    bench.fs.set_passthrough(Passthrough::On);
    let second = bench.fs.open(ino, READ, ME, &mut bench.register()).unwrap();
    assert!(matches!(second.path, IoPath::Cached { .. }), "served while it is open served");
    bench.fs.release(first.fh).unwrap();
    bench.fs.release(second.fh).unwrap();
}

#[test]
fn pages_are_kept_while_the_content_is_the_same() {
    let bench = Bench::new(false);
    let ino = bench.make(ROOT, "f", NodeKind::Region);
    let open = |access| {
        let opened = bench.fs.open(ino, access, ME, &mut bench.register()).unwrap();
        let kept = match opened.path {
            IoPath::Cached { keep_cache } => keep_cache,
            _ => panic!("served"),
        };
        (opened.fh, kept)
    };
    let close = |fh| bench.fs.release(fh).unwrap();
    let (fh, _) = open(WRITE);
    bench.fs.write(fh, 0, b"first", false).unwrap();
    close(fh);
    // Sealing makes one more generation, some time after the release.
    let start = std::time::Instant::now();
    loop {
        let (fh, kept) = open(READ);
        close(fh);
        if kept {
            break;
        }
        assert!(start.elapsed().as_secs() < 60, "pages are never kept");
    }
    // Somebody else (a control client of the pool) replaces the content.
    let other = bench.fs.pool().open_region(ino, engine::Access::Write, true).unwrap();
    other.write_at(0, b"second").unwrap();
    drop(other);
    let (fh, kept) = open(READ);
    assert!(!kept, "the kernel's pages are of the old content");
    close(fh);
    let direct = bench.fs.open(ino, Access { direct: true, ..READ }, ME, &mut bench.register()).unwrap();
    assert!(matches!(direct.path, IoPath::Direct));
}

#[test]
fn listings_resume_anywhere() {
    let bench = Bench::new(false);
    let directory = bench.make(ROOT, "d", NodeKind::Directory);
    for i in 0..700 {
        bench.make(directory, &format!("n{i}"), NodeKind::Fifo);
    }
    let whole = bench.list(directory, 0, usize::MAX);
    assert_eq!(whole.len(), 702);
    assert_eq!((whole[0].0.as_str(), whole[1].0.as_str()), (".", ".."));
    // One entry at a time gives the same.
    let mut offset = 0;
    for expected in &whole {
        let one = bench.list(directory, offset, 1);
        assert_eq!(&one[0], expected);
        offset = one[0].1;
    }
    assert!(bench.list(directory, offset, 1).is_empty());
    assert_eq!(bench.list(ROOT, 2, usize::MAX).len(), 1, "virtual trees are hidden");
}

#[test]
fn a_node_without_a_name_keeps_its_attributes_until_it_is_forgotten() {
    let bench = Bench::new(false);
    let ino = bench.make(ROOT, "f", NodeKind::Region);
    bench.fs.unlink(ROOT, OsStr::new("f")).unwrap();
    let attr = bench.fs.getattr(ino).unwrap().attr;
    assert_eq!((attr.node, attr.nlink), (ino, 0));
    bench.fs.forget(ino, 1);
    assert_eq!(bench.fs.getattr(ino).unwrap_err(), Errno::ESTALE);
}

#[test]
fn reserved_names_cannot_be_taken() {
    let bench = Bench::new(false);
    let file = bench.make(ROOT, "f", NodeKind::Region);
    for name in [".tensors", ".nvtier"] {
        let name = OsStr::new(name);
        let request = NewNodeRequest { kind: NodeKind::Directory, mode: 0o755, rdev: 0, target: None };
        assert_eq!(bench.fs.make_node(ROOT, name, request, ME).unwrap_err(), Errno::EEXIST);
        assert_eq!(bench.fs.link(file, ROOT, name).unwrap_err(), Errno::EEXIST);
        assert_eq!(
            bench.fs.rename(ROOT, OsStr::new("f"), ROOT, name, RenameFlags::default()),
            Err(Errno::EBUSY)
        );
        assert_eq!(bench.fs.rmdir(ROOT, name), Err(Errno::EBUSY));
        let entry = bench.fs.lookup(ROOT, name).unwrap();
        assert_eq!(entry.attr.kind, NodeKind::Directory);
        bench.fs.forget(entry.attr.node, 1);
    }
    // Below the root they are names like any other.
    let directory = bench.make(ROOT, "d", NodeKind::Directory);
    bench.make(directory, ".nvtier", NodeKind::Directory);
}

#[test]
fn read_only_refuses_every_change() {
    let bench = Bench::new(true);
    let request = NewNodeRequest { kind: NodeKind::Region, mode: 0o644, rdev: 0, target: None };
    let (name, other) = (OsStr::new("f"), OsStr::new("g"));
    assert_eq!(bench.fs.make_node(ROOT, name, request, ME).unwrap_err(), Errno::EROFS);
    assert_eq!(bench.fs.unlink(ROOT, name), Err(Errno::EROFS));
    assert_eq!(bench.fs.rmdir(ROOT, name), Err(Errno::EROFS));
    assert_eq!(bench.fs.rename(ROOT, name, ROOT, other, RenameFlags::default()), Err(Errno::EROFS));
    assert_eq!(bench.fs.setattr(ROOT, &SetAttr::default(), None, ME).unwrap_err(), Errno::EROFS);
    assert_eq!(bench.fs.removexattr(ROOT, OsStr::new("user.a")), Err(Errno::EROFS));
    assert!(bench.fs.getattr(ROOT).is_ok());
}

#[test]
fn after_the_end_every_request_is_refused() {
    let bench = Bench::new(false);
    bench.fs.set_passthrough(Passthrough::On);
    let ino = bench.make(ROOT, "f", NodeKind::Region);
    let opened = bench.fs.open(ino, WRITE, ME, &mut bench.register()).unwrap();
    let fh = opened.fh;
    drop(opened);
    bench.fs.shut_down();
    assert_eq!(bench.alive.load(Ordering::SeqCst), 0, "open files are dropped");
    assert_eq!(bench.fs.getattr(ROOT).unwrap_err(), Errno::ENOTCONN);
    assert_eq!(bench.fs.lookup(ROOT, OsStr::new("f")).unwrap_err(), Errno::ENOTCONN);
    assert_eq!(bench.fs.read(fh, 0, 1, &mut |_| {}).unwrap_err(), Errno::ENOTCONN);
    assert_eq!(bench.fs.counters().of(Operation::Read), (0, 0), "the adapter counts, not the file system");
}
