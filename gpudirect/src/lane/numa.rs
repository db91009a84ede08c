//! Memory near a device: on the NUMA node that its bus is attached to.
//!
//! No call binds memory. Pages come from the node of the processor that touches them first (the kernel's default policy), so the
//! ring is taken by a thread that runs on the device's node only; the threads that prefault it inherit that.

use std::path::Path;

use rustix::thread::{CpuSet, sched_setaffinity};

/// The processors next to a device on the PCI bus, `0000:3b:00.0`. None where the machine has one node, or does not say.
pub(super) fn processors_near(pci: &str) -> Option<Vec<usize>> {
    let nodes = std::fs::read_to_string("/sys/devices/system/node/online").ok()?;
    if pci.is_empty() || !pci.bytes().all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.') {
        return None;
    }
    (parse(&nodes)?.len() > 1).then_some(())?;
    of_device(&Path::new("/sys/bus/pci/devices").join(pci))
}

fn of_device(folder: &Path) -> Option<Vec<usize>> {
    // -1: the firmware does not say.
    let node: i64 = std::fs::read_to_string(folder.join("numa_node")).ok()?.trim().parse().ok()?;
    if node < 0 {
        return None;
    }
    let processors = parse(&std::fs::read_to_string(folder.join("local_cpulist")).ok()?)?;
    (!processors.is_empty()).then_some(processors)
}

/// A list as the kernel writes it, `0-3,8,10-11`.
fn parse(list: &str) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last >= CpuSet::MAX_CPU {
            return None;
        }
        found.extend(first..=last);
    }
    Some(found)
}

/// Calls `f` on a thread that runs on these processors only; on the caller's own where that is not allowed.
pub(super) fn on<T: Send>(processors: &[usize], f: impl Fn() -> T + Sync) -> T {
    let mut set = CpuSet::new();
    for processor in processors {
        set.set(*processor);
    }
    let result = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("nvtier-near".into()).spawn_scoped(scope, || {
            // A container may have none of them.
            sched_setaffinity(None, &set).ok().map(|()| f())
        });
        thread.ok().and_then(|thread| thread.join().ok().flatten())
    });
    result.unwrap_or_else(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(parse("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse("\n"), Some(vec![]));
        for bad in ["x", "3-1", "1-", "0-99999999999", "4096"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_the_kernel_says_of_a_device() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(of_device(folder.path()), None);
        write("numa_node", "1\n");
        write("local_cpulist", "4-5\n");
        assert_eq!(of_device(folder.path()), Some(vec![4, 5]));
        write("numa_node", "-1\n");
        assert_eq!(of_device(folder.path()), None);
        assert_eq!(processors_near("../../x"), None);
        assert_eq!(processors_near(""), None);
    }

    #[test]
    fn work_runs_there_and_the_caller_stays_where_it_was() {
        let before = rustix::thread::sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| before.is_set(*cpu)).unwrap();
        let there = on(&[first], || rustix::thread::sched_getaffinity(None).unwrap());
        assert_eq!((there.count(), there.is_set(first)), (1, true));
        assert_eq!(rustix::thread::sched_getaffinity(None).unwrap(), before);
        // Processors that there are not: the caller does it.
        assert_eq!(on(&[], || 7), 7);
    }
}
