//! Daemons that die: by `kill -9`, by signals that mean "please stop", and commands that are interrupted.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use nvtier_tests::{
    KINDS, Kind, Mounted, ended, format, nvtier, nvtier_path, pattern, run, scratch, wait_for,
};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

fn write_synced(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_mount_whose_daemon_was_killed_is_repaired_by_the_next_mount() {
    for kind in KINDS {
        let mounted = Mounted::new(kind, &[]);
        let (old, new) = (pattern(1, 3_000_001), pattern(2, 2_500_000));
        fs::create_dir(mounted.point.join("deep")).unwrap();
        write_synced(&mounted.point.join("deep/committed"), &old);
        write_synced(&mounted.point.join("replaced"), &old);
        write_synced(&mounted.point.join("replaced.tmp"), &new);
        fs::rename(mounted.point.join("replaced.tmp"), mounted.point.join("replaced")).unwrap();
        File::open(&mounted.point).unwrap().sync_all().unwrap();
        // Never synced: may be there or not, but never as a file with other bytes.
        fs::write(mounted.point.join("unsynced"), &new).unwrap();

        mounted.signal(Signal::KILL);
        // The call that meets the death of the daemon may be told ECONNABORTED; from then on it is ENOTCONN.
        let errno = wait_for(|| {
            let error = fs::metadata(&mounted.point).unwrap_err().raw_os_error();
            (error != Some(Errno::CONNABORTED.raw_os_error())).then_some(error)
        });
        assert_eq!(errno.flatten(), Some(Errno::NOTCONN.raw_os_error()), "{kind:?}");
        mounted.mount(&[]).ok();

        assert_eq!(fs::read(mounted.point.join("deep/committed")).unwrap(), old, "{kind:?}");
        assert_eq!(fs::read(mounted.point.join("replaced")).unwrap(), new, "{kind:?}");
        assert!(!mounted.point.join("replaced.tmp").exists(), "{kind:?}: a synced rename was undone");
        if let Ok(bytes) = fs::read(mounted.point.join("unsynced")) {
            assert!(
                bytes == new || bytes.is_empty(),
                "{kind:?}: a torn file of {} bytes is visible",
                bytes.len()
            );
        }
        mounted.finish();
    }
}

#[test]
fn every_write_that_was_acknowledged_by_fsync_survives_kills() {
    for kind in [Kind::Directory, Kind::Raw] {
        let mounted = Mounted::new(kind, &[]);
        let mut acknowledged = 0_u64;
        for round in 0..5_u64 {
            let (sender, receiver) = std::sync::mpsc::channel();
            let folder = mounted.point.clone();
            let first = acknowledged;
            let writer = std::thread::spawn(move || {
                for number in first.. {
                    let path = folder.join(format!("file-{number}"));
                    let write = || -> std::io::Result<()> {
                        let mut file = File::create(&path)?;
                        file.write_all(&pattern(number, 10_000 + (number as usize % 7) * 50_000))?;
                        file.sync_all()?;
                        File::open(&folder)?.sync_all()
                    };
                    if write().is_err() || sender.send(number).is_err() {
                        return; // the daemon is gone
                    }
                }
            });
            // Another number of files before each kill.
            for _ in 0..3 + round * 2 {
                acknowledged = receiver.recv().unwrap() + 1;
            }
            mounted.signal(Signal::KILL);
            acknowledged = receiver.into_iter().last().map_or(acknowledged, |number| number + 1);
            writer.join().unwrap();
            mounted.mount(&[]).ok();
            for number in 0..acknowledged {
                let bytes = fs::read(mounted.point.join(format!("file-{number}")))
                    .unwrap_or_else(|error| panic!("{kind:?}, round {round}, file {number}: {error}"));
                assert_eq!(
                    bytes,
                    pattern(number, 10_000 + (number as usize % 7) * 50_000),
                    "{kind:?}, round {round}, file {number}"
                );
            }
        }
        mounted.finish();
    }
}

#[test]
fn names_of_files_that_were_closed_survive_after_an_fsync_of_their_directory() {
    for kind in KINDS {
        let mounted = Mounted::new(kind, &[]);
        // Its checksums take a while after the close.
        let bytes = pattern(11, 48 << 20);
        let names = ["first", "second", "third"];
        for name in names {
            fs::write(mounted.point.join(name), &bytes).unwrap();
        }
        File::open(&mounted.point).unwrap().sync_all().unwrap();
        mounted.signal(Signal::KILL);
        mounted.mount(&[]).ok();
        for name in names {
            let found = fs::read(mounted.point.join(name));
            assert!(
                found.unwrap_or_else(|error| panic!("{kind:?}, {name}: {error}")) == bytes,
                "{kind:?}, {name}"
            );
        }
        mounted.finish();
    }
}

#[test]
fn signals_that_ask_to_stop_unmount_cleanly() {
    for kind in KINDS {
        for signal in [Signal::TERM, Signal::INT] {
            let mounted = Mounted::new(kind, &[]);
            let bytes = pattern(3, 1_234_567);
            // Not synced: a clean end must write it out.
            fs::write(mounted.point.join("late"), &bytes).unwrap();
            mounted.signal(signal);
            assert!(!mounted.is_mounted(), "{kind:?}: still mounted after {signal:?}");
            mounted.mount(&[]).ok();
            assert_eq!(fs::read(mounted.point.join("late")).unwrap(), bytes, "{kind:?} after {signal:?}");
            mounted.finish();
        }
    }
}

#[test]
fn a_signal_ends_the_mount_even_while_files_are_open() {
    let mounted = Mounted::new(Kind::Raw, &[]);
    let bytes = pattern(4, 600_000);
    let mut open = File::create(mounted.point.join("open")).unwrap();
    open.write_all(&bytes).unwrap();
    open.sync_all().unwrap();
    mounted.signal(Signal::TERM);
    assert!(!mounted.is_mounted());
    drop(open);
    mounted.mount(&[]).ok();
    assert_eq!(fs::read(mounted.point.join("open")).unwrap(), bytes);
    mounted.finish();
}

#[test]
fn a_mount_in_the_foreground_ends_with_its_signal() {
    for signal in [Signal::INT, Signal::TERM] {
        let folder = scratch();
        let pool = format(Kind::Directory, folder.path());
        let point = folder.path().join("mnt");
        fs::create_dir(&point).unwrap();
        let mut child = Command::new(nvtier_path())
            .args(["mount", "--foreground", "--ram", "64MiB"])
            .args([&pool, &point])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stats = point.join(".nvtier/stats.json");
        assert!(wait_for(|| stats.exists().then_some(())).is_some(), "the mount did not come up");
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = wait_for(|| child.try_wait().unwrap()).expect("the daemon did not end");
        assert!(status.code().is_some(), "the daemon died of {status} instead of ending");
        assert!(!stats.exists(), "still mounted");
        assert!(run(Command::new("mountpoint").arg("-q").arg(&point)).code != 0);
    }
}

/// Interrupts `nvtier` once it has read `after` bytes; true when the signal came in time.
fn interrupted(arguments: &[&str], after: u64) -> bool {
    let mut child = Command::new(nvtier_path())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = Pid::from_child(&child);
    let progress = || {
        let io = fs::read_to_string(format!("/proc/{}/io", pid.as_raw_nonzero())).unwrap_or_default();
        let read =
            io.lines().find_map(|line| line.strip_prefix("rchar: ")).and_then(|n| n.parse::<u64>().ok());
        (read.is_none_or(|read| read >= after) || child.try_wait().unwrap().is_some()).then_some(())
    };
    wait_for(progress).expect("the command made no progress");
    let _ = kill_process(pid, Signal::INT);
    let status = wait_for(|| child.try_wait().unwrap()).expect("the command did not end after SIGINT");
    assert!(ended(pid));
    match status.code() {
        Some(0) => false,
        Some(130) => true,
        other => panic!("after SIGINT the command ended with {other:?} ({status}), not 130"),
    }
}

#[test]
fn an_interrupted_import_leaves_nothing_visible_and_can_be_done_again() {
    for kind in [Kind::Directory, Kind::Raw] {
        let folder = scratch();
        let pool = format(kind, folder.path());
        let source = folder.path().join("source.bin");
        let bytes = pattern(5, 96 << 20);
        fs::write(&source, &bytes).unwrap();
        let (pool, source) = (pool.to_str().unwrap(), source.to_str().unwrap());
        let mut in_time = 0;
        for megabytes in [1, 8, 20, 40, 70] {
            if interrupted(&["import", source, "r", "--pool", pool, "--no-resume"], megabytes << 20) {
                in_time += 1;
                nvtier(["stat", "r", "--pool", pool]).refused(3, &["r"]);
            } else {
                nvtier(["rm", "r", "--pool", pool]).ok();
            }
            nvtier(["verify", "--pool", pool]).ok();
        }
        println!("{kind:?}: {in_time} of 5 signals came in time");
        nvtier(["import", source, "r", "--pool", pool]).ok();
        let back = folder.path().join("back");
        nvtier(["export", "r", back.to_str().unwrap(), "--pool", pool]).ok();
        assert!(fs::read(&back).unwrap() == bytes, "{kind:?}: other bytes came back");
    }
}
