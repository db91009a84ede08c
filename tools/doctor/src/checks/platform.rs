//! Operating system, kernel, processor, container.

use std::path::Path;

use crate::{Finding, System, tables};

/// What older kernels lose, by the version that brought it.
const KERNELS: [((u32, u32), &str); 6] = [
    ((5, 11), "io_uring as nvtier uses it: reads and writes go through a pool of threads"),
    ((5, 19), "NVMe commands through io_uring: no raw pools on /dev/ngXnY"),
    ((6, 1), "io_uring without needless wake-ups (DEFER_TASKRUN)"),
    ((6, 9), "FUSE passthrough: the daemon serves every read of a mount, at about a third of the speed"),
    ((6, 10), "writes to a mount around the page cache: `cp` into raw pools copies twice"),
    ((6, 14), "FUSE over io_uring, which later versions of nvtier may use"),
];
const RECOMMENDED: (u32, u32) = (6, 14);
const OS: &str = "any Linux; the published requirements name Ubuntu 24.04.3";
const KERNEL: &str = "6.14 or newer (5.11 at least)";
const FEW_CORES: &str =
    "checksums, copies and the framework share few cores: loads from memory and served mounts bind on them";
/// What the table of requirements asks for.
pub(crate) const CORES: usize = 8;
pub(crate) const LANES: u32 = 24;
const LANES_NEEDED: &str = "24: 16 for a GPU and 4 for each of two drives";

pub(super) fn check(system: &System, _path: &Path, out: &mut Vec<Finding>) {
    out.push(os(system));
    out.push(kernel(system));
    out.push(cores(system));
    out.push(lanes(system));
    container(system, out);
}

fn os(system: &System) -> Finding {
    let name = system.read("/etc/os-release").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
        Some(line.trim_matches('"').to_owned())
    });
    match name {
        Some(name) => Finding::ok("platform", "operating system", name).needs(OS),
        None => Finding::unknown("platform", "operating system", "there is no /etc/os-release").needs(OS),
    }
}

fn kernel(system: &System) -> Finding {
    let Some((major, minor)) = system.kernel() else {
        return Finding::unknown("platform", "kernel", "/proc/sys/kernel/osrelease says nothing")
            .needs(KERNEL);
    };
    let release = system.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let finding = Finding::ok("platform", "kernel", release).needs(KERNEL);
    let lost: Vec<&str> =
        KERNELS.iter().filter(|(version, _)| (major, minor) < *version).map(|(_, what)| *what).collect();
    if (major, minor) >= RECOMMENDED {
        return finding;
    }
    finding.degraded(
        format!("lost: {}", lost.join("; ")),
        "use a newer kernel (Ubuntu 24.04: linux-generic-hwe-24.04)",
    )
}

fn cores(system: &System) -> Finding {
    let text = system.read("/proc/cpuinfo").unwrap_or_default();
    let model =
        text.lines().find_map(|line| line.strip_prefix("model name")).and_then(|line| line.split_once(':'));
    let model =
        model.map_or_else(|| "a processor without a name".to_owned(), |(_, name)| name.trim().to_owned());
    let threads = text.lines().filter(|line| line.starts_with("processor")).count();
    let allowed = match system.is_live() {
        true => std::thread::available_parallelism().map_or(threads, std::num::NonZero::get),
        false => threads,
    };
    let limited =
        if allowed < threads { format!(", of which {allowed} may be used here") } else { String::new() };
    let finding =
        Finding::ok("platform", "processor", format!("{model}, {threads} threads{limited}")).needs("8 cores");
    if allowed >= CORES {
        return finding;
    }
    finding.degraded(FEW_CORES, "more cores; in a container or virtual machine, a higher limit")
}

fn lanes(system: &System) -> Finding {
    let model = system.field("/proc/cpuinfo", "model name").unwrap_or_default();
    match tables::cpu(&model) {
        Some(row) if row.pcie_lanes < LANES => Finding::ok(
            "platform",
            "PCIe lanes",
            format!("{} ({})", row.pcie_lanes, row.model),
        )
        .needs(LANES_NEEDED)
        .degraded(
            "a GPU at x16 leaves lanes for one drive at most; others share the chipset's link",
            "put the drive of the pool on the processor's own lanes (the board's manual says which slot)",
        ),
        Some(row) => Finding::ok("platform", "PCIe lanes", format!("{} ({})", row.pcie_lanes, row.model))
            .needs(LANES_NEEDED),
        None => Finding::info(
            "platform",
            "PCIe lanes",
            "this processor is not in the table; what each device has is below",
        )
        .needs(LANES_NEEDED),
    }
}

fn container(system: &System, out: &mut Vec<Finding>) {
    let inside = ["/.dockerenv", "/run/.containerenv"].into_iter().find(|path| system.exists(path));
    if let Some(file) = inside {
        out.push(Finding::info("platform", "container", format!("yes ({file})")).needs(
            "--device /dev/fuse --cap-add SYS_ADMIN for mounts, --ulimit memlock=-1, and a seccomp profile that allows io_uring",
        ));
    }
    // Of memory the line of RAM tells.
    let shares = system.cgroup("cpu.max").into_iter().filter_map(|limit| {
        // "200000 100000": microseconds in each period; "max 100000".
        let (quota, period) = limit.split_once(' ')?;
        Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok().filter(|period| *period > 0.0)?)
    });
    if let Some(share) = shares.min_by(f64::total_cmp) {
        let finding = Finding::info("platform", "cgroup CPU limit", format!("the time of {share:.1} CPUs"));
        out.push(limited(finding.needs("none, or the time of 8"), share < CORES as f64, FEW_CORES));
    }
    let tasks = system.cgroup("pids.max").into_iter().filter_map(|limit| limit.parse::<u64>().ok()).min();
    if let Some(tasks) = tasks {
        let finding =
            Finding::info("platform", "cgroup task limit", format!("{tasks} threads and processes"));
        let effect = "threads that cannot be started are an error in the middle of a load";
        out.push(limited(finding.needs("1024 or more"), tasks < 1024, effect));
    }
}

fn limited(finding: Finding, low: bool, effect: &str) -> Finding {
    match low {
        true => finding.degraded(
            effect,
            "a higher limit: docker run --cpus, --pids-limit; CPUQuota= and TasksMax= of a unit; resources.limits of a pod",
        ),
        false => finding,
    }
}
