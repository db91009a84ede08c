//! io_uring.

use std::path::Path;

use crate::{Finding, System};

pub(super) fn check(system: &System, _path: &Path, out: &mut Vec<Finding>) {
    let setting = match system.read("/proc/sys/kernel/io_uring_disabled").as_deref() {
        Some("2") => Some("kernel.io_uring_disabled is 2: nobody may use it"),
        Some("1") => Some("kernel.io_uring_disabled is 1: only root and one group may use it"),
        _ => None,
    };
    if !system.is_live() {
        let finding = Finding::ok("io", "io_uring", setting.unwrap_or("not turned off")).needs("works");
        out.push(if setting.is_some() { refused(finding, setting) } else { finding });
        return;
    }
    match nvme::Queue::builder().depth(2).backend(nvme::Backend::IoUring).build() {
        Ok(_) => out.push(Finding::ok("io", "io_uring", "works").needs("works")),
        Err(error) => out.push(refused(Finding::ok("io", "io_uring", format!("refused: {error}")), setting)),
    }
    registered(out);
}

fn refused(finding: Finding, setting: Option<&str>) -> Finding {
    let finding = finding.needs("works").degraded(
        "a pool of threads reads and writes instead: more CPU time for each GB, fewer IOPS",
        match setting {
            Some(setting) => format!("{setting}; set it to 0"),
            None => "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile".to_owned(),
        },
    );
    match setting {
        Some(_) => finding.command("sudo sysctl kernel.io_uring_disabled=0"),
        None => finding.command("docker run --security-opt seccomp=unconfined ..."),
    }
}

fn registered(out: &mut Vec<Finding>) {
    let Ok(arena) = nvme::Arena::new(4 << 20, nvme::ArenaOptions::default()) else { return };
    let Ok(queue) = nvme::Queue::builder().depth(2).arena(Some(&arena)).build() else { return };
    let finding = Finding::ok(
        "io",
        "registered buffers",
        if queue.has_fixed_buffers() { "work" } else { "are not used" },
    )
    .needs("work");
    out.push(match queue.note() {
        Some(note) if !queue.has_fixed_buffers() => finding.degraded(
            format!("pages are pinned anew for each transfer: {note}"),
            "see io_uring and locked memory",
        ),
        _ => finding,
    });
}
