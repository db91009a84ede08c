//! What the figures were measured on.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A paragraph of Markdown.
pub fn describe(dir: &Path, rounds: usize, rehearsed: bool) -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    let gib = field_kib("/proc/meminfo", "MemTotal") >> 20;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut text = String::new();
    let _ = writeln!(text, "\n# Run of {}\n", output("date", &["-u", "+%Y-%m-%d %H:%M UTC"]));
    let _ = writeln!(text, "- commit: {}", output("git", &["rev-parse", "--short", "HEAD"]));
    let _ = writeln!(text, "- CPU: {} x {}, memory: {gib} GiB", cpus, model.unwrap_or("unknown").trim());
    let _ = writeln!(text, "- kernel: {}", output("uname", &["-sr"]));
    let _ = writeln!(text, "- fio: {}", output("fio", &["--version"]));
    let source = output("findmnt", &["-no", "SOURCE,FSTYPE,OPTIONS", "-T", &dir.display().to_string()]);
    let _ = writeln!(text, "- directory: on {source}");
    let _ = writeln!(
        text,
        "- each row: {rounds} rounds, A B B A, medians with (min..max); caches dropped and the mount made anew (empty RAM tier) before every cold run"
    );
    if rehearsed {
        let _ = writeln!(
            text,
            "- cold runs that need much memory are done twice, the second time when no other process is at work, and the second one counts: it finds its memory present (docs/bench.md)"
        );
    }
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let _ = writeln!(text, "- load before the first row: {}", load.trim());
    let _ = writeln!(
        text,
        "- CPU: user and system time of the measuring process and of the mount's daemon, per 10^9 bytes"
    );
    text
}

fn output(command: &str, args: &[&str]) -> String {
    Command::new(command)
        .args(args)
        .output()
        .map_or_else(|_| "not installed".into(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// Writes dirty pages back and empties the page cache; says once when it may not.
pub fn drop_caches() {
    rustix::fs::sync();
    if let Err(error) = fs::write("/proc/sys/vm/drop_caches", "3") {
        eprintln!("compare: cannot drop caches ({error}): cold rows are not cold; run as root");
    }
}

/// Waits until the kernel has handed free pages back to the host of a virtual machine: it begins 2 s after they were freed (`PAGE_REPORTING_DELAY`)
/// and goes on every 2 s. Waits on, for a minute at most, while other processes are at work.
pub fn settle() {
    const REPORTED: Duration = Duration::from_millis(4500);
    /// Of one CPU.
    const QUIET: f64 = 0.1;
    for _ in 0..13 {
        let before = busy_seconds();
        std::thread::sleep(REPORTED);
        if busy_seconds() - before <= QUIET * REPORTED.as_secs_f64() {
            return;
        }
    }
    eprintln!("compare: other processes are at work; what is measured now says little");
}

/// CPU time of all processes and of the kernel, seconds.
fn busy_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks =
        |index| stat.split_whitespace().nth(index).and_then(|field| field.parse().ok()).unwrap_or(0u64);
    // proc_stat(5): user, nice and system, in ticks of 10 ms.
    (ticks(1) + ticks(2) + ticks(3)) as f64 / 100.0
}

/// CPU time of a process, seconds; 0 when it is gone.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let fields: Vec<u64> = after.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    // proc(5): utime and stime are fields 14 and 15, in ticks of 10 ms.
    (fields.get(11).unwrap_or(&0) + fields.get(12).unwrap_or(&0)) as f64 / 100.0
}

/// A field of /proc/PID/status in KiB, such as `VmHWM`.
pub fn status_kib(pid: u32, field: &str) -> u64 {
    field_kib(&format!("/proc/{pid}/status"), field)
}

fn field_kib(path: &str, field: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .find_map(|line| {
            line.strip_prefix(field)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse().ok()
        })
        .unwrap_or(0)
}
