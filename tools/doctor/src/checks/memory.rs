//! RAM, huge pages, locked memory.

use std::path::Path;

use crate::system::human;
use crate::{Finding, System};

/// 64 GB, as the sizing table asks for models up to 34B; less than that may be reported for what the firmware keeps.
const RECOMMENDED: u64 = 60_000_000_000;
const RAM: &str = "64 GB for models up to 34B, 128 GB up to 70B";
/// Two rings of 256 MiB and the queues.
const MEMLOCK: u64 = 512 << 20;

pub(super) fn check(system: &System, _path: &Path, out: &mut Vec<Finding>) {
    out.push(total(system));
    out.push(huge_pages(system));
    out.push(memlock(system));
}

fn kib(system: &System, name: &str) -> Option<u64> {
    let text = system.field("/proc/meminfo", name)?;
    text.split(' ').next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

fn total(system: &System) -> Finding {
    let Some(total) = kib(system, "MemTotal") else {
        return Finding::unknown("memory", "RAM", "/proc/meminfo says nothing").needs(RAM);
    };
    let limits = system.cgroup("memory.max").into_iter().filter_map(|limit| limit.parse().ok());
    let older = system.number("/sys/fs/cgroup/memory/memory.limit_in_bytes");
    let limit = limits.chain(older).min().filter(|limit| *limit < total);
    let found = match limit {
        Some(limit) => {
            format!("{} of {} may be used in this cgroup", human(limit), human(total))
        }
        None => human(total),
    };
    let finding = Finding::ok("memory", "RAM", found).needs(RAM);
    if limit.unwrap_or(total) >= RECOMMENDED {
        return finding;
    }
    finding.degraded(
        "a small RAM tier: more is read from the drive again; fine-tuning holds less between steps",
        "more RAM, or a smaller model; give the tier a share that leaves room for the framework (--ram)",
    )
}

fn huge_pages(system: &System) -> Finding {
    let reserved = system.number("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or(0);
    let transparent = system.read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let mode = transparent.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned();
    let found = format!("{reserved} reserved and free (2 MiB), transparent: {mode}");
    let finding = Finding::ok("memory", "huge pages", found)
        .needs("transparent huge pages: always or madvise, or 256 reserved");
    match (mode.as_str(), reserved) {
        ("always" | "madvise", _) | (_, 256..) => finding,
        _ => finding
            .degraded(
                "buffers lie in 4 KiB pages: more work for each transfer, and pinning takes longer",
                "turn transparent huge pages on for those who ask for them",
            )
            .command("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"),
    }
}

fn memlock(system: &System) -> Finding {
    // "Max locked memory         8388608              8388608              bytes"
    let line = system.read("/proc/self/limits").unwrap_or_default();
    let line = line
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .map(str::trim)
        .unwrap_or_default()
        .to_owned();
    let soft = line.split_whitespace().next().unwrap_or("unknown");
    let shown = soft.parse().map_or_else(|_| soft.to_owned(), human);
    let finding = Finding::ok("memory", "locked memory (memlock)", shown).needs("512 MiB or unlimited");
    match soft.parse::<u64>() {
        Err(_) if soft == "unlimited" => finding,
        Err(_) => Finding::unknown("memory", "locked memory (memlock)", "/proc/self/limits says nothing")
            .needs("512 MiB or unlimited"),
        Ok(limit) if limit >= MEMLOCK => finding,
        Ok(_) if system.is_live() && system.is_root() => finding.needs("nothing: root is not held to it"),
        Ok(_) => finding
            .degraded(
                "buffers cannot be registered with io_uring, and CUDA may refuse to pin them: each transfer costs more",
                "raise the limit: in the shell, in /etc/security/limits.conf (memlock), in a unit (LimitMEMLOCK=infinity), for a container \
                 (--ulimit memlock=-1)",
            )
            .command("ulimit -l unlimited"),
    }
}
