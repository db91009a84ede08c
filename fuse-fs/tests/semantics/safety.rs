//! Sections 4 and 5: when things are safe, and who checks sums.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use engine::{FormatOptions, Pool};
use fuse_fs::ErrorKind;
use rustix::io::Errno;

use crate::both_ways;
use crate::common::{self, Mount, Way, errno, pattern, skip, wait_for};

const DAEMON: &str = "NVTIER_TEST_DAEMON";

/// Not a test of its own: `spawn_daemon` runs this test program with only this test and the variable set, and it becomes a mount
/// daemon that can be killed.
#[test]
fn daemon() {
    let Some(words) = std::env::var_os(DAEMON) else { return };
    let words = words.into_string().unwrap();
    let [way, pool, mountpoint] = words.split('|').collect::<Vec<_>>()[..] else { panic!("{words}") };
    let way = if way == "served" { Way::Served } else { Way::Passed };
    let pool = common::open_pool(Path::new(pool), way);
    let mounted = fuse_fs::mount(pool, &common::mount_options(way, Path::new(mountpoint))).unwrap();
    eprintln!("mounted");
    mounted.wait().unwrap();
}

struct Daemon {
    child: Child,
    mountpoint: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = rustix::mount::unmount(&self.mountpoint, rustix::mount::UnmountFlags::DETACH);
    }
}

fn spawn_daemon(way: Way, pool: &Path, mountpoint: &Path) -> Daemon {
    let way = if way == Way::Served { "served" } else { "passed" };
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "safety::daemon", "--nocapture"])
        .env(DAEMON, format!("{way}|{}|{}", pool.display(), mountpoint.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.ends_with("mounted\n") {
        assert_ne!(errors.read_line(&mut said).unwrap(), 0, "the daemon died: {said}");
    }
    // Keeps the pipe drained; ends with the child.
    std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::sink()));
    Daemon { child, mountpoint: mountpoint.to_owned() }
}

both_ways! {
    fn fsync_makes_durable(mount: Mount) {
        let commits = |mount: &Mount| mount.stats()["stat"]["commits"].as_u64().unwrap();
        let before = commits(&mount);
        fs::create_dir(mount.path("d")).unwrap();
        let mut file = File::create(mount.path("d/f")).unwrap();
        file.write_all(&pattern(9, 200_000)).unwrap();
        file.sync_all().unwrap();
        assert!(commits(&mount) > before, "fsync commits");
        drop(file);
        let before = commits(&mount);
        fs::rename(mount.path("d/f"), mount.path("d/g")).unwrap();
        File::open(mount.path("d")).unwrap().sync_all().unwrap();
        assert!(commits(&mount) > before, "fsync of a directory commits");
    }

    fn a_dead_daemon_is_repaired(mount: Mount) {
        let way = mount.way;
        mount.unmount();
        let (pool, root) = (mount.pool_path(), mount.root());
        let mut daemon = spawn_daemon(way, &pool, &root);
        let content = pattern(10, 2 << 20);
        let mut file = File::create(root.join("safe")).unwrap();
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
        let mut half = File::create(root.join("half")).unwrap();
        half.write_all(b"never synced").unwrap();
        let reader = File::open(root.join("safe")).unwrap();
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
        // The connection ends with the process; the kernel notices when it has torn it down.
        let dead = wait_for(|| fs::metadata(root.join("safe")).err());
        assert!(matches!(dead.and_then(|e| e.raw_os_error()), Some(103 | 107)), "ENOTCONN or ECONNABORTED");
        if way == Way::Passed {
            let mut byte = [0u8; 4096];
            reader.read_exact_at(&mut byte, 1 << 20).unwrap();
            assert_eq!(byte[..], content[1 << 20..(1 << 20) + 4096], "passed-through readers go on");
        }
        drop((file, half, reader));
        // The next mount finds the dead one, detaches it and has everything that was synced.
        mount.mount();
        assert!(fs::read(mount.path("safe")).unwrap() == content);
        assert_eq!(errno(fs::metadata(mount.path("half"))), Errno::NOENT, "never synced, never committed");
        // Nothing was left below.
        mount.unmount();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        assert!(!fuse_fs::repair_stale(&root).unwrap());
    }

    fn bad_bytes_are_refused(mount: Mount) {
        // 64 chunks of the default size; one bit of the tenth is turned on the drive.
        let content = pattern(11, 1 << 20);
        fs::write(mount.path("f"), &content).unwrap();
        mount.unmount();
        let damaged = find_file(&mount.pool_path(), &content).expect("the region's file");
        let file = File::options().read(true).write(true).open(&damaged).unwrap();
        let place = 9 * 16384 + 77;
        let times = fs::metadata(&damaged).unwrap().modified().unwrap();
        file.write_all_at(&[content[place] ^ 0x10], place as u64).unwrap();
        file.sync_all().unwrap();
        file.set_modified(times).unwrap(); // as a drive would: no trace in the file system
        drop(file);
        mount.mount();
        if mount.way == Way::Served {
            let file = File::open(mount.path("f")).unwrap();
            let mut buffer = vec![0u8; 4096];
            assert_eq!(errno(file.read_at(&mut buffer, 9 * 16384)), Errno::IO);
            let good = 32 * 16384;
            file.read_exact_at(&mut buffer, good as u64).unwrap();
            assert_eq!(buffer[..], content[good..good + 4096], "the other chunks stay readable");
        }
        // Both ways, verify finds it.
        mount.unmount();
        let pool = common::open_pool(&mount.pool_path(), mount.way);
        let report = pool.verify(None, &mut |_| {}).unwrap();
        assert_eq!(report.bad.len(), 1, "{report:?}");
        pool.close().unwrap();
    }

    fn a_mapping_that_outlives_its_descriptor(mount: Mount) {
        // torch.from_file(shared=True) closes the file and goes on storing. Python's mmap keeps a descriptor, so this asks libc.
        let script = r#"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
size = 1 << 20
fd = os.open("m", os.O_RDWR | os.O_CREAT)
os.write(fd, bytes(size))
m = libc.mmap(None, size, 3, 1, fd, 0)   # PROT_READ | PROT_WRITE, MAP_SHARED
assert m != ctypes.c_void_p(-1).value
ctypes.memmove(m, b"open", 4)
os.close(fd)
# The daemon hears of the close some time later; until then and long after, stores go on.
import time
for i in range(40):
    ctypes.memmove(m + 4096, b"late%d" % (i % 10), 5)
    time.sleep(0.05)
ctypes.memmove(m + 4096, b"last!", 5)
"#;
        let status = Command::new("python3").arg("-c").arg(script).current_dir(mount.root()).status();
        match status {
            Ok(status) => assert!(status.success()),
            Err(error) => return skip(&format!("python3: {error}")),
        }
        mount.unmount();
        let pool = common::open_pool(&mount.pool_path(), mount.way);
        let report = pool.verify(None, &mut |_| {}).unwrap();
        assert!(report.bad.is_empty(), "{report:?}");
        pool.close().unwrap();
        mount.mount();
        let bytes = fs::read(mount.path("m")).unwrap();
        assert_eq!((&bytes[..4], &bytes[4096..4101]), (&b"open"[..], &b"last!"[..]));
    }

    fn unmounting(mount: Mount) {
        let content = pattern(12, 500_000);
        fs::write(mount.path("f"), &content).unwrap();
        let file = File::open(mount.path("f")).unwrap();
        assert_eq!(fuse_fs::unmount(&mount.root()).unwrap_err().kind(), ErrorKind::Busy);
        drop(file);
        // As `nvtier umount` does, from outside of the daemon.
        let gone = wait_for(|| match fuse_fs::unmount(&mount.root()) {
            Ok(()) => Some(()),
            Err(error) if error.kind() == ErrorKind::Busy => None,
            Err(error) => panic!("{error}"),
        });
        assert!(gone.is_some());
        mount.unmount(); // the session ends by itself; this closes the pool
        assert_eq!(fuse_fs::unmount(&mount.root()).unwrap_err().kind(), ErrorKind::Mountpoint);
        mount.mount();
        assert!(fs::read(mount.path("f")).unwrap() == content);
    }
}

/// The file below `folder` that holds exactly these bytes.
fn find_file(folder: &Path, content: &[u8]) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if let Some(found) = find_file(&path, content) {
                return Some(found);
            }
        } else if path.metadata().unwrap().len() >= content.len() as u64 {
            let mut bytes = vec![0; content.len()];
            let mut file = File::open(&path).unwrap();
            if file.read_exact(&mut bytes).is_ok() && bytes == content {
                return Some(path);
            }
        }
    }
    None
}

/// What a mount point must be.
#[test]
fn mount_points_are_checked() {
    if let Some(reason) = common::obstacle() {
        return skip(&reason);
    }
    let Some(mount) = Mount::new(Way::Passed) else { return };
    let refused = |mountpoint: &Path, words: &[&str]| {
        let other = mount.folder().join("other-pool");
        if !other.exists() {
            Pool::format(&other, &FormatOptions::default()).unwrap();
        }
        let pool = common::open_pool(&other, Way::Passed);
        let error = fuse_fs::mount(pool, &common::mount_options(Way::Passed, mountpoint)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mountpoint, "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{error} does not say {word:?}");
        }
    };
    let folder = mount.folder().to_owned();
    refused(&folder.join("missing"), &["does not exist", "mkdir"]);
    refused(&folder.join("missing/deeper"), &[]);
    fs::write(folder.join("file"), b"").unwrap();
    refused(&folder.join("file"), &["not a directory"]);
    refused(&folder, &["not empty"]);
    refused(&mount.root(), &["already carries", &mount.pool_path().display().to_string()]);
    // The table of mounts names the pool.
    let entry = fuse_fs::find_mount(&mount.root()).unwrap().unwrap();
    assert!(entry.is_nvtier(), "{entry:?}");
    assert_eq!(Path::new(&entry.source), mount.pool_path());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.contains(mount.root().to_str().unwrap())).unwrap();
    assert!(line.contains("fuse.nvtier") && line.contains("default_permissions"), "{line}");
}

/// Read-only mounts refuse every change.
#[test]
fn read_only_mounts() {
    if let Some(reason) = common::obstacle() {
        return skip(&reason);
    }
    let Some(mut mount) = Mount::new(Way::Passed) else { return };
    fs::write(mount.path("f"), b"content").unwrap();
    mount.unmount();
    let options = engine::OpenOptions { read_only: true, ..common::open_options(Way::Passed) };
    let pool = Pool::open(&mount.pool_path(), &options).unwrap();
    let mounted = fuse_fs::mount(
        pool,
        &fuse_fs::MountOptions { read_only: true, ..common::mount_options(Way::Passed, &mount.root()) },
    )
    .unwrap();
    assert_eq!(fs::read(mount.path("f")).unwrap(), b"content");
    assert_eq!(errno(fs::write(mount.path("f"), b"")), Errno::ROFS);
    assert_eq!(errno(fs::create_dir(mount.path("d"))), Errno::ROFS);
    assert_eq!(errno(fs::remove_file(mount.path("f"))), Errno::ROFS);
    assert_eq!(errno(fs::rename(mount.path("f"), mount.path("g"))), Errno::ROFS);
    drop(mounted);
    assert_eq!(fs::read_dir(mount.root()).unwrap().count(), 0, "dropping unmounts");
}
