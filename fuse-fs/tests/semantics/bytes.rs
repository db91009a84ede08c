//! Section 3: bytes.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use engine::FormatOptions;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags};
use rustix::io::Errno;

use crate::both_ways;
use crate::common::{Mount, Way, errno, pattern, skip, wait_for};

const PAGE: usize = 4096;

/// Runs a Python script with the mount as working directory: mapping memory is `unsafe` in Rust and not worth it in a test.
/// `None`, said aloud, without Python.
fn python(mount: &Mount, script: &str) -> Option<String> {
    let output = match Command::new("python3").arg("-c").arg(script).current_dir(mount.root()).output() {
        Ok(output) => output,
        Err(error) => {
            skip(&format!("python3: {error}"));
            return None;
        }
    };
    assert!(output.status.success(), "{}\n{}", script, String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Memory as O_DIRECT wants it, without `unsafe`: a vector with room to move the start to a page.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Aligned {
        let memory = vec![0u8; len + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        Aligned { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// truncate(2): by name, without opening.
fn truncate(path: &Path, len: u64) {
    let status = Command::new("truncate").arg("-s").arg(len.to_string()).arg(path).status().unwrap();
    assert!(status.success());
}

fn direct(mount: &Mount, name: &str) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(mount.path(name))
        .unwrap()
}

both_ways! {
    fn readers_see_writers(mount: Mount) {
        let path = mount.path("f");
        let content = pattern(3, 1 << 20);
        fs::write(&path, &content).unwrap();
        let reader = File::open(&path).unwrap();
        let mut buffer = vec![0u8; 1 << 20];
        reader.read_exact_at(&mut buffer, 0).unwrap(); // fills the page cache
        assert!(buffer == content);

        let mut writer = File::options().write(true).open(&path).unwrap();
        let late = File::open(&path).unwrap();
        writer.write_all_at(b"CHANGED", 5000).unwrap();
        for file in [&reader, &late] {
            let mut word = [0u8; 7];
            file.read_exact_at(&mut word, 5000).unwrap();
            assert_eq!(&word, b"CHANGED");
        }
        // Growth: size and time by name, by reader and by writer.
        let before = fs::metadata(&path).unwrap();
        writer.seek(SeekFrom::End(0)).unwrap();
        for i in 1..=20u64 {
            writer.write_all(b"tail").unwrap();
            let expected = (1 << 20) + 4 * i;
            assert_eq!(fs::metadata(&path).unwrap().len(), expected);
            assert_eq!(late.metadata().unwrap().len(), expected);
            assert_eq!(writer.metadata().unwrap().len(), expected);
        }
        let after = fs::metadata(&path).unwrap();
        assert!((after.mtime(), after.mtime_nsec()) >= (before.mtime(), before.mtime_nsec()));
        let mut tail = [0u8; 4];
        reader.read_exact_at(&mut tail, (1 << 20) + 76).unwrap();
        assert_eq!(&tail, b"tail");
        // Truncation from another descriptor, and by name.
        fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert_eq!(late.metadata().unwrap().len(), 100);
        assert_eq!(reader.read_at(&mut buffer, 0).unwrap(), 100);
        drop(writer);
        truncate(&path, 50);
        assert_eq!(reader.read_at(&mut buffer, 0).unwrap(), 50);
        assert_eq!(buffer[..50], content[..50]);
        // Growing again shows zeros, not the old bytes.
        truncate(&path, 200);
        assert_eq!(reader.read_at(&mut buffer, 0).unwrap(), 200);
        assert!(buffer[50..200].iter().all(|&byte| byte == 0));

        // O_APPEND from two descriptors interleaves whole records.
        let log = mount.path("log");
        let mut writers: Vec<_> = (0..2)
            .map(|_| File::options().append(true).create(true).open(&log).unwrap())
            .collect();
        for i in 0..100u32 {
            writers[i as usize % 2].write_all(format!("{i:04}\n").as_bytes()).unwrap();
        }
        drop(writers);
        let text = fs::read_to_string(&log).unwrap();
        assert_eq!(text.lines().map(|l| l.parse::<u32>().unwrap()).collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());

        // O_TRUNC on an open file is seen by its reader.
        let reader = File::open(&log).unwrap();
        fs::write(&log, b"short").unwrap();
        assert_eq!(reader.metadata().unwrap().len(), 5);
        assert_eq!(std::io::read_to_string(&reader).unwrap(), "short");
    }

    fn a_lone_writer_is_seen_at_once_by_who_comes_later(mount: Mount) {
        // Opened first and for writing only: where the daemon serves it, its writes go around the page cache.
        let writer = File::create(mount.path("f")).unwrap();
        let mut expected = pattern(6, 300_000);
        writer.write_all_at(&expected, 0).unwrap();
        let readers: Vec<File> = (0..2).map(|_| File::open(mount.path("f")).unwrap()).collect();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Reads all the time, so that many meet a write under way: what it leaves in the page cache must not outlive the write.
            scope.spawn(|| {
                let mut all = vec![0; 1 << 20];
                while !stop.load(Relaxed) {
                    readers[0].read_at(&mut all, 0).unwrap();
                }
            });
            // Over pages, within one, and at the end, which lies in the middle of a page.
            for round in 0..400u64 {
                let bytes = pattern(round, [1, 700, 4096, 9000][round as usize % 4]);
                let at = match round % 5 {
                    0 => expected.len(),
                    n => (round.wrapping_mul(n * 7919 + 13) % 290_000) as usize,
                };
                writer.write_all_at(&bytes, at as u64).unwrap();
                let end = at + bytes.len();
                if end > expected.len() {
                    expected.resize(end, 0);
                }
                expected[at..end].copy_from_slice(&bytes);
                for reader in &readers {
                    let mut read = vec![0; bytes.len()];
                    reader.read_exact_at(&mut read, at as u64).unwrap();
                    assert!(read == bytes, "round {round}: {} bytes at {at} are not those written", bytes.len());
                    assert_eq!(reader.metadata().unwrap().len(), expected.len() as u64);
                }
            }
            stop.store(true, Relaxed);
        });
        for reader in &readers {
            let mut all = vec![0; expected.len()];
            reader.read_exact_at(&mut all, 0).unwrap();
            assert!(all == expected);
        }
        drop((writer, readers));
        assert!(fs::read(mount.path("f")).unwrap() == expected);
    }

    fn a_mapping_sees_a_lone_writer(mount: Mount) {
        let script = r#"
import mmap, os
w = os.open("m", os.O_WRONLY | os.O_CREAT, 0o644)
os.pwrite(w, bytes(100000), 0)
r = os.open("m", os.O_RDONLY)
m = mmap.mmap(r, 100000, prot=mmap.PROT_READ)
assert m[:] == bytes(100000)
for i in range(300):
    at, word = (i * 7919) % 99000, b"%07d" % i
    os.pwrite(w, word, at)
    assert m[at:at + 7] == word, (i, at, m[at:at + 7])
    assert os.pread(r, 7, at) == word
os.close(w)
assert m[at:at + 7] == word
print("ok")
"#;
        if let Some(out) = python(&mount, script) {
            assert_eq!(out, "ok\n");
        }
    }

    fn content_survives_a_remount(mount: Mount) {
        let sizes = [0usize, 1, 4095, 4096, 4097, 16384, 100_000, 5_000_001];
        for size in sizes {
            fs::write(mount.path(size.to_string()), pattern(size as u64, size)).unwrap();
        }
        mount.unmount();
        mount.mount();
        for size in sizes {
            let read = fs::read(mount.path(size.to_string())).unwrap();
            assert!(read == pattern(size as u64, size), "{size} bytes came back wrong");
            // A rewrite of a part, in place.
            if size > 5000 {
                let file = File::options().write(true).open(mount.path(size.to_string())).unwrap();
                file.write_all_at(b"middle", 4093).unwrap();
            }
        }
        mount.unmount();
        mount.mount();
        for size in sizes.into_iter().filter(|&size| size > 5000) {
            let mut expected = pattern(size as u64, size);
            expected[4093..4099].copy_from_slice(b"middle");
            assert!(fs::read(mount.path(size.to_string())).unwrap() == expected, "{size} bytes after a rewrite");
        }
    }

    fn shared_mappings(mount: Mount) {
        let script = r#"
import mmap, os, signal, subprocess, sys
size = 1 << 20
with open("m", "wb") as f: f.write(bytes(size))
f = open("m", "r+b")
a = mmap.mmap(f.fileno(), size)
g = open("m", "r+b")
b = mmap.mmap(g.fileno(), size)
a[5000:5005] = b"store"
assert b[5000:5005] == b"store", "another mapping"
f.seek(5000); assert f.read(5) == b"store", "read() sees a store"
os.pwrite(f.fileno(), b"write", 9000)
assert a[9000:9005] == b"write" and b[9000:9005] == b"write", "a mapping sees write()"
p = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY)
p[0:4] = b"mine"
assert a[0:4] == bytes(4), "private stores stay private"
b.flush(); f.close(); g.close()
a[20000:20004] = b"late"          # the descriptor is closed, the mapping is not
a.flush()
assert open("m", "rb").read()[20000:20004] == b"late"
a.close(); b.close(); p.close()
# Beyond the end of a truncated file: SIGBUS, for the one who touches it.
child = subprocess.run([sys.executable, "-c", """
import mmap, os
f = open("m", "r+b")
m = mmap.mmap(f.fileno(), 1 << 20)
assert m[1 << 19] is not None
os.truncate("m", 4096)
assert m[100] is not None
m[1 << 19]
"""])
assert child.returncode == -signal.SIGBUS, child.returncode
assert os.stat("m").st_size == 4096
print("ok")
"#;
        if let Some(out) = python(&mount, script) {
            assert_eq!(out, "ok\n");
        }
    }

    fn direct_io(mount: Mount) {
        let content = pattern(4, 1 << 20);
        let file = direct(&mount, "d");
        let mut buffer = Aligned::new(1 << 20);
        buffer.bytes().copy_from_slice(&content);
        file.write_all_at(buffer.bytes(), 0).unwrap();
        buffer.bytes().fill(0);
        file.read_exact_at(buffer.bytes(), 0).unwrap();
        assert!(buffer.bytes() == content);
        // Mixed with the page cache, both ways.
        let plain = File::options().read(true).write(true).open(mount.path("d")).unwrap();
        let mut page = vec![0u8; PAGE];
        plain.read_exact_at(&mut page, 8192).unwrap();
        assert!(page == content[8192..8192 + PAGE]);
        let mut aligned = Aligned::new(PAGE);
        aligned.bytes().fill(0xaa);
        file.write_all_at(aligned.bytes(), 8192).unwrap();
        plain.read_exact_at(&mut page, 8192).unwrap();
        assert!(page.iter().all(|&byte| byte == 0xaa), "buffered read after a direct write");
        plain.write_all_at(&[0xbb; PAGE], 16384).unwrap();
        file.read_exact_at(aligned.bytes(), 16384).unwrap();
        assert!(aligned.bytes().iter().all(|&byte| byte == 0xbb), "direct read after a buffered write");
        // A read that ends at the end of the file is short, one behind it is empty.
        plain.set_len((1 << 20) - 1000).unwrap();
        assert_eq!(file.read_at(aligned.bytes(), (1 << 20) - PAGE as u64).unwrap(), PAGE - 1000);
        assert_eq!(file.read_at(aligned.bytes(), 1 << 20).unwrap(), 0);
        let mut odd = [0u8; 100];
        let result = file.read_at(&mut odd, 33);
        match mount.way {
            Way::Served => {
                assert_eq!(result.unwrap(), 100);
                assert_eq!(odd[..], content[33..133]);
            }
            // The file system below decides; tmpfs takes any alignment.
            Way::Passed => assert!(result.is_err_and(|e| e.raw_os_error() == Some(22)) || odd[..] == content[33..133]),
        }
    }

    fn holes_and_space(mount: Mount) {
        let path = mount.path("h");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.write_all_at(&[1u8; 65536], 1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), (1 << 20) + 65536);
        assert!(file.metadata().unwrap().blocks() * 512 <= 1 << 19, "a hole takes no space");
        let seek = |offset, data| {
            let from = if data { rustix::fs::SeekFrom::Data(offset) } else { rustix::fs::SeekFrom::Hole(offset) };
            rustix::fs::seek(&file, from)
        };
        assert_eq!(seek(0, true), Ok(1 << 20));
        assert_eq!(seek(0, false), Ok(0));
        assert_eq!(seek(1 << 20, false), Ok((1 << 20) + 65536));
        assert_eq!(seek(2 << 20, true), Err(Errno::NXIO));
        let allocate = |mode, offset, len| rustix::fs::fallocate(&file, mode, offset, len);
        let keep = FallocateFlags::KEEP_SIZE;
        allocate(FallocateFlags::PUNCH_HOLE | keep, 1 << 20, 16384).unwrap();
        let mut buffer = vec![9u8; 65536];
        file.read_exact_at(&mut buffer, 1 << 20).unwrap();
        assert!(buffer[..16384].iter().all(|&b| b == 0) && buffer[16384..].iter().all(|&b| b == 1));
        allocate(FallocateFlags::ZERO_RANGE | keep, (1 << 20) + 16384, 5000).unwrap();
        file.read_exact_at(&mut buffer, 1 << 20).unwrap();
        assert!(buffer[..21384].iter().all(|&b| b == 0) && buffer[21384..].iter().all(|&b| b == 1));
        let len = file.metadata().unwrap().len();
        allocate(keep, len, 1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), len);
        allocate(FallocateFlags::empty(), len, 1000).unwrap();
        assert_eq!(file.metadata().unwrap().len(), len + 1000);
        assert_eq!(allocate(FallocateFlags::COLLAPSE_RANGE, 0, 4096), Err(Errno::OPNOTSUPP));
        assert_eq!(allocate(FallocateFlags::PUNCH_HOLE, 0, 4096), Err(Errno::OPNOTSUPP));

        // copy_file_range, and what std makes of it.
        let content = pattern(5, 3 << 20);
        fs::write(mount.path("from"), &content).unwrap();
        fs::copy(mount.path("from"), mount.path("to")).unwrap();
        assert!(fs::read(mount.path("to")).unwrap() == content);
        let (from, to) = (File::open(mount.path("from")).unwrap(), File::options().write(true).open(mount.path("to")).unwrap());
        let (mut a, mut b) = (1000, 10);
        let copied = rustix::fs::copy_file_range(&from, Some(&mut a), &to, Some(&mut b), 5000).unwrap();
        assert_eq!(copied, 5000);
        let read = fs::read(mount.path("to")).unwrap();
        assert!(read[10..5010] == content[1000..6000] && read[5010..] == content[5010..]);
        // An ioctl that the kernel leaves to the file system.
        assert_eq!(rustix::fs::ioctl_getflags(&from), Err(Errno::NOTTY));
    }

    fn locks_are_local(mount: Mount) {
        fs::write(mount.path("l"), b"").unwrap();
        let (a, b) = (File::open(mount.path("l")).unwrap(), File::open(mount.path("l")).unwrap());
        rustix::fs::flock(&a, FlockOperation::LockExclusive).unwrap();
        assert_eq!(rustix::fs::flock(&b, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
        drop(a);
        rustix::fs::flock(&b, FlockOperation::NonBlockingLockExclusive).unwrap();
        if python(&mount, "import fcntl; f=open('p','w'); fcntl.lockf(f, fcntl.LOCK_EX, 10)").is_some() {
            assert!(mount.path("p").exists());
        }
    }
}

/// A quota: what is there stays, what does not fit is refused, removing gives the space back.
#[test]
fn a_full_pool_says_enospc() {
    full_pool(Way::Passed);
    full_pool(Way::Served);
}

fn full_pool(way: Way) {
    let quota = 16 << 20;
    let options = FormatOptions { size: Some(quota), ..FormatOptions::default() };
    let Some(mount) = Mount::with(way, &options) else { return };
    let old = pattern(6, 4 << 20);
    fs::write(mount.path("old"), &old).unwrap();
    let fill = || -> std::io::Result<u64> {
        let mut file = File::create(mount.path("big"))?;
        let piece = vec![5u8; 1 << 20];
        let mut written = 0;
        for _ in 0..64 {
            file.write_all(&piece)?;
            written += piece.len() as u64;
        }
        file.sync_all()?;
        Ok(written)
    };
    assert_eq!(errno(fill()), Errno::NOSPC);
    assert!(fs::read(mount.path("old")).unwrap() == old, "old data must stay");
    assert_eq!(fs::read_dir(mount.root()).unwrap().count(), 2);
    fs::remove_file(mount.path("big")).unwrap();
    let statvfs = || rustix::fs::statvfs(mount.root()).unwrap();
    let enough = wait_for(|| (statvfs().f_bavail * statvfs().f_frsize >= 8 << 20).then_some(()));
    assert!(enough.is_some(), "the space did not come back: {} blocks free", statvfs().f_bavail);
    assert!(statvfs().f_blocks * statvfs().f_frsize <= quota, "{} blocks", statvfs().f_blocks);
    let small = pattern(7, 6 << 20);
    fs::write(mount.path("small"), &small).unwrap();
    assert!(fs::read(mount.path("small")).unwrap() == small);
}

/// statfs tells the truth about free space: it shrinks by what is written.
#[test]
fn statfs_tells_the_truth() {
    let options = FormatOptions { size: Some(64 << 20), ..FormatOptions::default() };
    for way in [Way::Passed, Way::Served] {
        let Some(mount) = Mount::with(way, &options) else { return };
        let free = || {
            let stat = rustix::fs::statvfs(mount.root()).unwrap();
            stat.f_bavail * stat.f_frsize
        };
        let before = free();
        let mut file = File::create(mount.path("f")).unwrap();
        file.write_all(&pattern(8, 8 << 20)).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let taken =
            wait_for(|| Some(before.saturating_sub(free())).filter(|taken| *taken >= 8 << 20)).unwrap_or(0);
        assert!((8 << 20..10 << 20).contains(&taken), "{way:?}: 8 MiB took {taken} bytes of free space");
    }
}
