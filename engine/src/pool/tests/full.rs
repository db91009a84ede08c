//! A file system that runs full under a pool.

use std::process::Command;

use super::*;

/// A small file system of its own; unmounted when dropped.
struct Small(TempDir);

impl Small {
    fn mount(bytes: u64) -> Option<Small> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={bytes}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "nvtier-test"])
            .arg(dir.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Small(dir)),
            other => {
                eprintln!("skipped: cannot mount a small file system here: {other:?}");
                None
            }
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn a_full_file_system_keeps_the_old_and_gives_space_back() {
    let Some(small) = Small::mount(48 << 20) else { return };
    let path = small.0.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let pool = open(&path);
    put(&pool, "old", &noise(1, 5 << 20));
    pool.sync().unwrap();
    for round in 0..3 {
        let attr = pool.create(ROOT, name("new"), &region(0o644)).unwrap();
        let writer = pool.open_region(attr.node, Access::Write, false).unwrap();
        // As the kernel does it for a mount: past everything that could count.
        let file = writer.backing().unwrap();
        let piece = noise(2, 1 << 20);
        let mut at = 0u64;
        let error = loop {
            match std::os::unix::fs::FileExt::write_at(&*file, &piece, at) {
                Ok(written) => at += written as u64,
                Err(error) => break error,
            }
            assert!(at < 64 << 20);
        };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        let stat = pool.stat();
        assert!(stat.free_bytes < 1 << 20, "round {round}: {stat:?}");
        assert!(stat.used_bytes >= at, "round {round}: what the kernel wrote counts");
        // Names do not need much, but more than nothing: the catalog goes on in what was set aside.
        for index in 0..2000 {
            pool.create(
                ROOT,
                name(&format!("{round} and some long name to fill the catalog {index}")),
                &region(0o644),
            )
            .unwrap();
        }
        pool.sync().unwrap_or_else(|error| panic!("round {round}: {}", error.chain()));
        drop((writer, file));
        pool.unlink(ROOT, name("new")).unwrap();
        pool.sync().unwrap();
        // A process that another test is starting has all files of this one for a moment.
        let start = std::time::Instant::now();
        while pool.stat().free_bytes <= 30 << 20 {
            assert!(start.elapsed().as_secs() < 20, "round {round}: {:?}", pool.stat());
            std::thread::yield_now();
        }
        // What was set aside is there again.
        pool.sync().unwrap();
        assert!(get(&pool, "old") == noise(1, 5 << 20));
    }
    assert_eq!(pool.stat().commit_error, "");
    pool.close().unwrap();
    let pool = open(&path);
    assert_eq!(pool.readdir(ROOT, 0, 10_000).unwrap().len(), 6001);
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
    pool.close().unwrap();
}

#[test]
fn a_served_writer_is_told_and_can_go_on() {
    let Some(small) = Small::mount(32 << 20) else { return };
    let path = small.0.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let pool = open(&path);
    let attr = pool.create(ROOT, name("a"), &region(0o644)).unwrap();
    let writer = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    let error = writer.write_at(0, &noise(1, 40 << 20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
    writer.set_len(0).unwrap();
    writer.write_at(0, b"fits").unwrap();
    drop(writer);
    assert_eq!(get(&pool, "a"), b"fits");
    pool.close().unwrap();
}
