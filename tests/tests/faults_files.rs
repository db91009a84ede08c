//! What happens to the files under a pool, behind its back: cut short, removed, on a file system that goes away or fills up.
//!
//! Faults of devices are in `engine/tests/faults`; here the real file system does it to the real command.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nvtier_tests::{Kind, Mounted, Ran, format, nvtier, nvtier_path, pattern, run, scratch, skip, wait_for};
use rustix::mount::{UnmountFlags, unmount};

const LEN: usize = (4 << 20) + 5;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn on(pool: &Path, args: &[&str]) -> Ran {
    run(Command::new(nvtier_path()).args(args).arg("--pool").arg(pool))
}

/// Imports `bytes` from a file beside the pool, which is returned.
fn import(pool: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let source = pool.with_file_name(format!("source-{name}"));
    fs::write(&source, bytes).unwrap();
    on(pool, &["import", text(&source), name]).ok();
    source
}

/// The file under `folder` that holds `mark`, and where in it.
fn find(folder: &Path, mark: &[u8]) -> (PathBuf, u64) {
    let mut todo = vec![folder.to_path_buf()];
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(mark.len()).position(|part| part == mark) {
            return (path, at as u64);
        }
    }
    panic!("these bytes are nowhere in {}", folder.display());
}

/// Reads a file, within the time that everything gets here.
fn read_ends(path: &Path) -> std::io::Result<Vec<u8>> {
    let path = path.to_path_buf();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes).map(|_| bytes)
    });
    wait_for(|| reader.is_finished().then_some(())).expect("the read hangs");
    reader.join().unwrap()
}

#[test]
fn an_image_that_is_cut_short_gives_errors_and_never_wrong_bytes() {
    let folder = scratch();
    let pool = format(Kind::Raw, folder.path());
    let (first, second) = (pattern(1, LEN), pattern(2, LEN));
    import(&pool, "first", &first);
    import(&pool, "second", &second);
    let whole = fs::metadata(&pool).unwrap().len();
    let image = OpenOptions::new().read(true).write(true).open(&pool).unwrap();
    // In the middle of the one that lies further behind.
    let mark = |bytes: &[u8]| find(&pool, &bytes[LEN / 2..LEN / 2 + 64]).1;
    let (low, high) = (mark(&first), mark(&second));
    let (kept, lost, cut) = match low < high {
        true => (("first", &first), ("second", &second), high),
        false => (("second", &second), ("first", &first), low),
    };
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool.clone(), point, folder);
    mounted.mount(&[]).ok();
    image.set_len(cut).unwrap();
    // It may have been read ahead of the cut: then the bytes are right. Else an error, never less or other bytes.
    match read_ends(&mounted.point.join(lost.0)) {
        Ok(bytes) => assert!(bytes == *lost.1, "wrong bytes were handed out"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}"),
    }
    assert!(read_ends(&mounted.point.join(kept.0)).unwrap() == *kept.1);
    mounted.umount();
    assert!(wait_for(|| (!mounted.is_mounted()).then_some(())).is_some());
    // As it is: the pool says what is wrong, or opens and fails on the one region alone.
    let out = mounted.folder().join("out");
    on(&pool, &["export", lost.0, text(&out)]).refused_somehow(&[]);
    assert!(!out.exists(), "a failed export leaves nothing");
    // With its length back (and zeros where the bytes were) the loss is exactly that.
    image.set_len(whole).unwrap();
    on(&pool, &["verify"]).refused(5, &[lost.0]);
    on(&pool, &["export", lost.0, text(&out)]).refused(5, &[lost.0]);
    on(&pool, &["export", kept.0, text(&out)]).ok();
    assert!(fs::read(&out).unwrap() == *kept.1);
    on(
        &pool,
        &["verify", "--repair", "--from", text(&pool.with_file_name(format!("source-{}", lost.0))), lost.0],
    )
    .ok();
    on(&pool, &["verify"]).ok();
}

#[test]
fn files_of_a_directory_member_that_are_cut_or_gone_cost_their_region_alone() {
    let folder = scratch();
    let pool = format(Kind::Directory, folder.path());
    let bytes: Vec<Vec<u8>> = (0..4).map(|seed| pattern(10 + seed, LEN)).collect();
    let names = ["whole", "cut", "gone", "longer"];
    let sources: Vec<PathBuf> =
        names.iter().zip(&bytes).map(|(name, bytes)| import(&pool, name, bytes)).collect();
    let file = |index: usize| find(&pool, &bytes[index][LEN / 2..LEN / 2 + 64]).0;
    let (cut, gone, longer) = (file(1), file(2), file(3));
    OpenOptions::new().write(true).open(&cut).unwrap().set_len(LEN as u64 / 2).unwrap();
    fs::remove_file(&gone).unwrap();
    OpenOptions::new().write(true).open(&longer).unwrap().write_all_at(b"more", LEN as u64).unwrap();
    let out = folder.path().join("out");
    on(&pool, &["verify"]).refused(5, &["cut", "gone"]);
    for name in ["cut", "gone"] {
        on(&pool, &["export", name, text(&out)]).refused_somehow(&[name]);
        assert!(!out.exists(), "a failed export leaves nothing");
    }
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool.clone(), point, folder);
    mounted.mount(&["--verify", "always"]).ok();
    for name in ["cut", "gone"] {
        let error = read_ends(&mounted.point.join(name)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{name}: {error}");
    }
    for index in [0, 3] {
        assert!(read_ends(&mounted.point.join(names[index])).unwrap() == bytes[index], "{}", names[index]);
    }
    // What is damaged can be replaced through the mount.
    fs::copy(&sources[2], mounted.point.join("gone")).unwrap();
    assert!(read_ends(&mounted.point.join("gone")).unwrap() == bytes[2]);
    mounted.umount().ok();
    on(&pool, &["verify", "--repair", "--from", text(&sources[1]), "cut"]).ok();
    on(&pool, &["verify"]).ok();
    on(&pool, &["export", "cut", text(&out)]).ok();
    assert!(fs::read(&out).unwrap() == bytes[1]);
}

/// An ext4 of its own in a file, mounted; unmounted when dropped.
struct Disk {
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    /// `None`, said aloud, where it cannot be had.
    fn new(folder: &Path, mib: u64) -> Option<Disk> {
        let disk = Disk { image: folder.join("disk.img"), at: folder.join("disk") };
        fs::create_dir(&disk.at).unwrap();
        File::create(&disk.image).unwrap().set_len(mib << 20).unwrap();
        let made = Command::new("mkfs.ext4").arg("-q").arg(&disk.image).stderr(Stdio::null()).status();
        if !made.is_ok_and(|status| status.success()) {
            skip("mkfs.ext4 is needed");
            return None;
        }
        if !disk.mount() {
            skip("a loop device and the right to mount it are needed");
            return None;
        }
        Some(disk)
    }

    fn mount(&self) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(&self.image).arg(&self.at);
        mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    }

    /// Ends the file system at once, nothing flushed: `EXT4_IOC_SHUTDOWN` with `EXT4_GOING_FLAGS_NOLOGFLUSH` (fs/ext4/ext4.h).
    fn shut_down(&self) -> bool {
        let python = std::env::var_os("NVTIER_PYTHON").unwrap_or_else(|| "python3".into());
        let script = "import fcntl,os,struct,sys; \
                      fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        let done = Command::new(python).args(["-c", script]).arg(&self.at).stderr(Stdio::null()).status();
        done.is_ok_and(|status| status.success())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.at, UnmountFlags::DETACH);
    }
}

#[test]
fn a_file_system_that_goes_away_under_a_mounted_pool_gives_errors_and_keeps_what_was_synced() {
    for kind in [Kind::Directory, Kind::Raw] {
        let folder = scratch();
        let Some(disk) = Disk::new(folder.path(), 1536) else { return };
        let pool = format(kind, &disk.at);
        let point = folder.path().join("mnt");
        fs::create_dir(&point).unwrap();
        let mounted = Mounted::over(pool.clone(), point, folder);
        mounted.mount(&[]).ok();
        let bytes = pattern(20, LEN);
        fs::write(mounted.point.join("synced"), &bytes).unwrap();
        File::open(mounted.point.join("synced")).unwrap().sync_all().unwrap();
        File::open(&mounted.point).unwrap().sync_all().unwrap();
        if !disk.shut_down() {
            skip("python3 and an ext4 that can be shut down are needed");
            mounted.umount();
            return;
        }
        // Reads give the right bytes, from memory, or an error; writes may seem to work until they are synced.
        if let Ok(read) = read_ends(&mounted.point.join("synced")) {
            assert!(read == bytes, "{kind:?}: wrong bytes were handed out");
        }
        let point = mounted.point.clone();
        let writer = std::thread::spawn(move || -> std::io::Result<()> {
            let file = File::create(point.join("new"))?;
            file.write_all_at(&pattern(21, LEN), 0)?;
            file.sync_all()
        });
        wait_for(|| writer.is_finished().then_some(())).expect("the write hangs");
        let error = writer.join().unwrap().expect_err("a sync succeeded on a file system that is gone");
        assert!(error.raw_os_error().is_some(), "{kind:?}: {error}");
        // It ends, whatever it says; so does the daemon.
        mounted.umount();
        if mounted.is_mounted() {
            unmount(&mounted.point, UnmountFlags::DETACH).unwrap();
        }
        let busy = || unmount(&disk.at, UnmountFlags::empty()).is_ok().then_some(());
        wait_for(busy).expect("the daemon does not let go of the file system");
        // Back again: the pool opens, and what was synced is whole.
        assert!(disk.mount());
        mounted.mount(&[]).ok();
        assert!(
            fs::read(mounted.point.join("synced")).unwrap() == bytes,
            "{kind:?}: what was synced is lost"
        );
        fs::write(mounted.point.join("after"), &bytes).unwrap();
        mounted.finish();
    }
}

#[test]
fn a_sparse_image_on_a_file_system_that_fills_up_fails_writes_and_keeps_what_was_synced() {
    let folder = scratch();
    let Some(disk) = Disk::new(folder.path(), 256) else { return };
    let pool = disk.at.join("pool");
    // Larger than the file system: the pool believes in space that is not there.
    File::create(&pool).unwrap().set_len(1 << 30).unwrap();
    nvtier([OsStr::new("format"), pool.as_os_str(), "--raw".as_ref()]).ok();
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Mounted::over(pool, point, folder);
    mounted.mount(&[]).ok();
    let bytes = pattern(30, LEN);
    fs::write(mounted.point.join("synced"), &bytes).unwrap();
    File::open(mounted.point.join("synced")).unwrap().sync_all().unwrap();
    let filled = |name: &str| -> std::io::Result<()> {
        let file = File::create(mounted.point.join(name))?;
        for step in 0..64 {
            file.write_all_at(&pattern(31 + step, 8 << 20), step * (8 << 20))?;
        }
        file.sync_all()
    };
    let error = filled("too-much").expect_err("512 MiB went into 256");
    let no_space = [rustix::io::Errno::NOSPC.raw_os_error(), rustix::io::Errno::IO.raw_os_error()];
    assert!(error.raw_os_error().is_some_and(|errno| no_space.contains(&errno)), "{error}");
    assert!(read_ends(&mounted.point.join("synced")).unwrap() == bytes);
    let _ = fs::remove_file(mounted.point.join("too-much"));
    mounted.umount();
    assert!(wait_for(|| (!mounted.is_mounted()).then_some(())).is_some());
    mounted.mount(&[]).ok();
    assert!(fs::read(mounted.point.join("synced")).unwrap() == bytes, "what was synced is lost");
    mounted.umount().ok();
    on(&mounted.pool, &["verify", "synced"]).ok();
}
