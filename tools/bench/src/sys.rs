//! What the kernel counts: CPU time, faults and switches of a thread, blocks moved by a disk.

use std::fs;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};

/// CPU use of one thread since it began.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThreadUsage {
    /// CPU time, nanoseconds (exact).
    pub cpu_ns: u64,
    /// Time spent ready to run and waiting for a CPU, nanoseconds (Documentation/scheduler/sched-stats.rst).
    pub waited_ns: u64,
    /// User time, clock ticks.
    pub user_ticks: u64,
    /// System time, clock ticks.
    pub system_ticks: u64,
    /// Minor page faults.
    pub minor_faults: u64,
    /// Major page faults.
    pub major_faults: u64,
    /// Context switches, voluntary or not.
    pub switches: u64,
}

impl ThreadUsage {
    /// The calling thread's use until now.
    pub fn now() -> ThreadUsage {
        let mut usage = ThreadUsage { cpu_ns: clock_ns(ClockId::ThreadCPUTime), ..ThreadUsage::default() };
        if let Some(fields) = stat_fields("/proc/thread-self/stat") {
            // proc(5): after the command's ')', field 3 is first; minflt is 10, majflt 12, utime 14, stime 15.
            let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
            usage.minor_faults = field(10);
            usage.major_faults = field(12);
            usage.user_ticks = field(14);
            usage.system_ticks = field(15);
        }
        let scheduled = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        usage.waited_ns =
            scheduled.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
        let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        usage.switches = status
            .lines()
            .filter(|line| line.contains("ctxt_switches"))
            .filter_map(|line| line.rsplit('\t').next()?.trim().parse::<u64>().ok())
            .sum();
        usage
    }

    /// What was used between `earlier` and this.
    pub fn since(&self, earlier: &ThreadUsage) -> ThreadUsage {
        ThreadUsage {
            cpu_ns: self.cpu_ns.saturating_sub(earlier.cpu_ns),
            waited_ns: self.waited_ns.saturating_sub(earlier.waited_ns),
            user_ticks: self.user_ticks.saturating_sub(earlier.user_ticks),
            system_ticks: self.system_ticks.saturating_sub(earlier.system_ticks),
            minor_faults: self.minor_faults.saturating_sub(earlier.minor_faults),
            major_faults: self.major_faults.saturating_sub(earlier.major_faults),
            switches: self.switches.saturating_sub(earlier.switches),
        }
    }

    /// Adds another thread's use.
    pub fn merge(&mut self, other: &ThreadUsage) {
        self.cpu_ns += other.cpu_ns;
        self.waited_ns += other.waited_ns;
        self.user_ticks += other.user_ticks;
        self.system_ticks += other.system_ticks;
        self.minor_faults += other.minor_faults;
        self.major_faults += other.major_faults;
        self.switches += other.switches;
    }

    /// User and system time, nanoseconds: the exact sum, split as the ticks are.
    pub fn user_system_ns(&self) -> (f64, f64) {
        let ticks = (self.user_ticks + self.system_ticks) as f64;
        // Too short for a tick: call it system time, where I/O spends most of it.
        let user = if ticks == 0.0 { 0.0 } else { self.user_ticks as f64 / ticks };
        (self.cpu_ns as f64 * user, self.cpu_ns as f64 * (1.0 - user))
    }
}

/// CPU time of the whole process (io_uring's kernel workers and a pool's threads included), nanoseconds.
pub fn process_cpu_ns() -> u64 {
    clock_ns(ClockId::ProcessCPUTime)
}

/// CPU time of all processes on all CPUs, and the idle time, clock ticks: the first line of /proc/stat.
pub fn machine_ticks() -> (u64, u64) {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or("")
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    let idle = fields.get(3).unwrap_or(&0) + fields.get(4).unwrap_or(&0);
    // Fields 9 and 10 (guest) are contained in the first two.
    (fields.iter().take(8).sum::<u64>() - idle, idle)
}

fn clock_ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn stat_fields(path: &str) -> Option<Vec<u64>> {
    let stat = fs::read_to_string(path).ok()?;
    let after = &stat[stat.rfind(')')? + 1..];
    // Field 3 (state) is a letter and some are negative: they count as 0, their place must stay.
    Some(after.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect())
}

/// One block device's counters (Documentation/admin-guide/iostats.rst).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskStat {
    /// Name, such as `nvme0n1`.
    pub name: String,
    /// Reads completed, merged, sectors, milliseconds.
    pub read: [u64; 4],
    /// Writes completed, merged, sectors, milliseconds.
    pub write: [u64; 4],
    /// Milliseconds during which anything was in flight.
    pub busy_ms: u64,
    /// Milliseconds summed over everything in flight.
    pub queue_ms: u64,
}

impl DiskStat {
    /// What happened between `earlier` and this.
    pub fn since(&self, earlier: &DiskStat) -> DiskStat {
        let difference = |a: [u64; 4], b: [u64; 4]| std::array::from_fn(|i| a[i].wrapping_sub(b[i]));
        DiskStat {
            name: self.name.clone(),
            read: difference(self.read, earlier.read),
            write: difference(self.write, earlier.write),
            busy_ms: self.busy_ms.saturating_sub(earlier.busy_ms),
            queue_ms: self.queue_ms.saturating_sub(earlier.queue_ms),
        }
    }

    /// Bytes read and written.
    pub fn bytes(&self) -> [u64; 2] {
        [self.read[2] * 512, self.write[2] * 512]
    }
}

/// Counters of all disks, from /proc/diskstats; empty where there is none.
pub fn disk_stats() -> Vec<DiskStat> {
    parse_disk_stats(&fs::read_to_string("/proc/diskstats").unwrap_or_default())
}

pub(crate) fn parse_disk_stats(text: &str) -> Vec<DiskStat> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let number = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
        Some(DiskStat {
            name: fields.get(2)?.to_string(),
            read: [number(3)?, number(4)?, number(5)?, number(6)?],
            write: [number(7)?, number(8)?, number(9)?, number(10)?],
            busy_ms: number(12)?,
            queue_ms: number(13)?,
        })
    };
    text.lines().filter_map(parse).collect()
}

/// Name of the disk a file lies on; `None` for tmpfs, FUSE and the like.
pub fn disk_of(path: &Path) -> Option<String> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata = fs::metadata(path).ok()?;
    let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let link = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    // A partition's directory lies in its disk's, which is the one with the queue.
    let disk = if link.join("partition").exists() { link.parent()?.to_path_buf() } else { link };
    Some(disk.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_moves_with_work() {
        let before = ThreadUsage::now();
        let mut sum = 0u64;
        while ThreadUsage::now().since(&before).cpu_ns < 1_000_000 {
            sum = crate::offsets::mix(sum);
        }
        let used = ThreadUsage::now().since(&before);
        assert!(used.cpu_ns >= 1_000_000, "{sum}");
        let (user, system) = used.user_system_ns();
        assert!((user + system - used.cpu_ns as f64).abs() < 1.0);
        assert!(process_cpu_ns() >= used.cpu_ns);
    }

    #[test]
    fn disk_stats_are_read_by_column() {
        let text = " 254 0 vda 10 1 80 5 20 2 160 7 0 9 12 0 0 0 0 0 0\n";
        let [disk] = &parse_disk_stats(text)[..] else { panic!() };
        assert_eq!((disk.name.as_str(), disk.bytes()), ("vda", [80 * 512, 160 * 512]));
        assert_eq!((disk.busy_ms, disk.queue_ms), (9, 12));
        assert_eq!(disk.since(disk).bytes(), [0, 0]);
        assert!(parse_disk_stats("garbage\n").is_empty());
    }
}
