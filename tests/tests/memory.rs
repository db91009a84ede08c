//! The daemon stays within its memory budget, whatever streams through it.

use std::fs::{self, File};
use std::io::{Read, Write};

use nvtier_tests::{Kind, Mounted, pattern};

const MIB: u64 = 1 << 20;

/// Highest resident set that the process ever had, in bytes (`VmHWM`, proc_pid_status(5)).
fn peak_resident(pid: rustix::process::Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn streaming_many_times_the_budget_stays_within_it() {
    for kind in [Kind::Directory, Kind::Raw] {
        let mounted = Mounted::new(kind, &["--ram", "64MiB", "--verify", "always"]);
        let block = pattern(6, 4 << 20);
        let path = mounted.point.join("large");
        let mut file = File::create(&path).unwrap();
        for _ in 0..128 {
            file.write_all(&block).unwrap();
        }
        file.sync_all().unwrap();
        drop(file);
        // Remounted, so that the kernel has nothing cached and the daemon must read it all.
        mounted.umount().ok();
        mounted.mount(&["--ram", "64MiB", "--verify", "always"]).ok();
        for _ in 0..2 {
            let mut file = File::open(&path).unwrap();
            let mut buffer = vec![0; block.len()];
            for index in 0..128 {
                file.read_exact(&mut buffer).unwrap();
                assert!(buffer == block, "{kind:?}: other bytes in block {index}");
            }
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        let peak = peak_resident(mounted.daemon());
        println!("{kind:?}: peak resident {} MiB for a budget of 64 MiB", peak / MIB);
        assert!(peak <= (64 + 64) * MIB, "{kind:?}: the daemon grew to {} MiB", peak / MIB);
        mounted.finish();
    }
}
