//! `nvtier verify --repair` on pools with real damage: what it mends, from what, and what it leaves alone.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nvtier_tests::{KINDS, Kind, Mounted, Ran, format, nvtier_path, pattern, run, scratch, skip};
use serde_json::Value;

const LEN: usize = (1 << 20) + 12_345;

struct Pool {
    path: PathBuf,
    folder: tempfile::TempDir,
}

fn command(pool: &Path, args: &[&str]) -> Ran {
    run(Command::new(nvtier_path()).args(args).arg("--pool").arg(pool))
}

impl Pool {
    fn new(kind: Kind) -> Self {
        let folder = scratch();
        Self { path: format(kind, folder.path()), folder }
    }

    fn run(&self, args: &[&str]) -> Ran {
        command(&self.path, args)
    }

    fn local(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.local(name), bytes).unwrap();
        self.local(name)
    }

    fn import(&self, name: &str, bytes: &[u8]) -> String {
        let source = self.file(&format!("source-{name}"), bytes);
        self.run(&["import", &source, name]).ok();
        source
    }

    /// Flips a bit of the first place that holds `mark`.
    fn damage(&self, mark: &[u8]) {
        let (path, at) = files(self.folder.path())
            .into_iter()
            .filter(|path| !path.file_name().unwrap().to_str().unwrap().starts_with("source-"))
            .find_map(|path| {
                let bytes = fs::read(&path).unwrap();
                bytes.windows(mark.len()).position(|part| part == mark).map(|at| (path, at as u64))
            })
            .expect("the pool holds these bytes somewhere");
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        file.sync_all().unwrap();
    }

    #[track_caller]
    fn holds(&self, name: &str, bytes: &[u8]) {
        let out = self.local("out");
        self.run(&["export", name, &out, "--force"]).ok();
        assert!(fs::read(out).unwrap() == bytes, "{name} came back differently");
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => found.extend(files(&entry.path())),
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

fn repaired(ran: Ran) -> (Value, Value) {
    let json = ran.json();
    (json["repair"]["repaired_chunks"].clone(), json["repair"]["left_chunks"].clone())
}

#[test]
fn damaged_chunks_come_back_from_their_source_and_from_nothing_else() {
    for kind in KINDS {
        let pool = Pool::new(kind);
        let bytes = pattern(7, LEN);
        let source = pool.import("r", &bytes);
        let other = pool.import("untouched", &pattern(8, LEN));
        pool.damage(&bytes[100_000..100_032]);
        pool.damage(&bytes[LEN - 40..]); // the last, short chunk
        pool.run(&["verify"]).refused(5, &["2 corrupt chunks", "--repair"]);
        // Nothing to take the bytes from: said so, nothing changes.
        pool.run(&["verify", "--repair"]).refused(5, &["2 chunks that could not be repaired", "--from"]);
        // Bytes that are not the committed ones are never put in.
        pool.run(&["verify", "--repair", "--from", &other, "r"]).refused(5, &["could not be repaired"]);
        let short = pool.file("short", &bytes[..50_000]);
        pool.run(&["verify", "--repair", "--from", &short, "r"]).refused(5, &["could not be repaired"]);
        pool.run(&["verify", "--repair", "--from", "/no/such/file", "r"]).refused_somehow(&["/no/such/file"]);
        pool.run(&["verify", "--repair", "--from", &source, "r"]).ok();
        pool.run(&["verify"]).ok();
        pool.holds("r", &bytes);
        pool.holds("untouched", &pattern(8, LEN));
    }
}

#[test]
fn a_copy_in_the_pool_is_a_source_too() {
    for kind in KINDS {
        let pool = Pool::new(kind);
        let bytes = pattern(9, LEN);
        pool.import("a", &bytes);
        pool.import("b", &bytes);
        // The same size, other bytes: never taken for a copy.
        pool.import("c", &pattern(10, LEN));
        pool.damage(&bytes[500_000..500_032]);
        let ran =
            run(Command::new(nvtier_path()).args(["verify", "--repair", "--json", "--pool"]).arg(&pool.path))
                .ok();
        assert_eq!(repaired(ran), (1.into(), 0.into()), "{kind:?}");
        for name in ["a", "b"] {
            pool.holds(name, &bytes);
        }
    }
}

#[test]
fn a_mounted_pool_is_repaired_through_its_owner() {
    if !Path::new("/dev/fuse").exists() {
        return skip("no /dev/fuse: pools cannot be mounted");
    }
    for kind in KINDS {
        let mounted = Mounted::new(kind, &[]);
        let bytes = pattern(11, LEN);
        let source = mounted.folder().join("source-r");
        fs::write(&source, &bytes).unwrap();
        let pool = Pool { path: mounted.pool.clone(), folder: scratch() };
        pool.run(&["import", source.to_str().unwrap(), "r"]).ok();
        mounted.umount().ok();
        // Below the mount, while nobody has it in memory.
        let damaged = files(mounted.folder())
            .into_iter()
            .filter(|path| *path != source)
            .find_map(|path| {
                let all = fs::read(&path).unwrap();
                let at = all.windows(32).position(|part| part == &bytes[200_000..200_032])?;
                Some((path, at as u64))
            })
            .expect("the pool holds these bytes");
        let file = OpenOptions::new().write(true).open(damaged.0).unwrap();
        file.write_all_at(b"never these", damaged.1).unwrap();
        file.sync_all().unwrap();
        drop(file);
        mounted.mount(&[]).ok();
        pool.run(&["verify", "r"]).refused(5, &["1 corrupt chunk"]);
        pool.run(&["verify", "--repair", "--from", source.to_str().unwrap(), "r"]).ok();
        pool.run(&["verify"]).ok();
        assert!(fs::read(mounted.point.join("r")).unwrap() == bytes, "{kind:?}");
        mounted.finish();
    }
}

#[test]
fn superblocks_and_orphans_are_mended() {
    let pool = Pool::new(Kind::Directory);
    let bytes = pattern(12, LEN);
    pool.import("r", &bytes);
    let superblock = pool.path.join("superblock");
    let file = File::options().write(true).open(&superblock).unwrap();
    file.write_all_at(b"garbage", 16).unwrap();
    drop(file);
    // A file with a number that was given out, and no region.
    let region = files(&pool.path.join("regions")).pop().unwrap();
    let orphan = region.with_file_name("0000000000000001");
    if !orphan.exists() {
        fs::write(&orphan, b"left behind").unwrap();
    }
    pool.run(&["verify", "--repair"]).ok();
    pool.holds("r", &bytes);
    let regions = files(&pool.path.join("regions"));
    assert_eq!(regions.len(), 1, "{regions:?}");
    assert!(fs::read(&superblock).unwrap().windows(7).all(|part| part != b"garbage"));
}
