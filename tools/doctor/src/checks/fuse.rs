//! Mounts.

use std::fs::OpenOptions;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::{Finding, System};

pub(super) fn check(system: &System, _path: &Path, out: &mut Vec<Finding>) {
    out.push(device(system));
    out.push(passthrough(system));
    if !system.may_mount() {
        out.push(helper(system));
    }
    if let Some(pages) = system.number("/proc/sys/fs/fuse/max_pages_limit") {
        let size = crate::system::human(pages * 4096);
        out.push(
            Finding::info("fuse", "largest request", format!("{pages} pages ({size})"))
                .needs("256 pages (1 MiB), what this version asks for"),
        );
    }
    let uring = system.read("/sys/module/fuse/parameters/enable_uring");
    if let Some(uring) = uring {
        let on = matches!(uring.as_str(), "Y" | "1");
        let found = if on { "on; not used by this version" } else { "off; not used by this version" };
        out.push(Finding::info("fuse", "FUSE over io_uring", found).needs("neither"));
    }
}

fn device(system: &System) -> Finding {
    let no_mounts = "pools cannot be mounted; import, export, load and Python work without";
    if !system.exists("/dev/fuse") {
        let in_container = system.exists("/.dockerenv") || system.exists("/run/.containerenv");
        let finding = Finding::ok("fuse", "/dev/fuse", "is not there").needs("is there and can be opened");
        return match in_container {
            true => finding
                .degraded(no_mounts, "hand the device to the container")
                .command("docker run --device /dev/fuse --cap-add SYS_ADMIN ..."),
            false => finding.degraded(no_mounts, "load the kernel's module").command("sudo modprobe fuse"),
        };
    }
    if !system.is_live() {
        return Finding::ok("fuse", "/dev/fuse", "is there").needs("is there and can be opened");
    }
    match OpenOptions::new().read(true).write(true).open("/dev/fuse").and_then(|file| Ok(file.metadata()?.rdev())) {
        // Linux: Documentation/admin-guide/devices.txt
        Ok(device) if device == rustix::fs::makedev(10, 229) => {
            Finding::ok("fuse", "/dev/fuse", "can be opened").needs("can be opened")
        }
        Ok(_) => Finding::ok("fuse", "/dev/fuse", "is another device (hidden by a container?)")
            .needs("the kernel's FUSE device, 10:229")
            .degraded(no_mounts, "hand the device to the container"),
        Err(error) => Finding::ok("fuse", "/dev/fuse", format!("cannot be opened: {error}")).needs("can be opened").degraded(
            no_mounts,
            "permission for /dev/fuse (mode 0666 by default); in a container, the device and its cgroup rule",
        ),
    }
}

fn passthrough(system: &System) -> Finding {
    let finding = Finding::ok("fuse", "passthrough", "").needs("Linux 6.9, and CAP_SYS_ADMIN for the daemon");
    let old = system.kernel().is_some_and(|version| version < (6, 9));
    let effect = "the daemon serves every read of a mount: about a third of the speed, and CPU time";
    match (old, system.may_mount()) {
        (true, _) => Finding { found: "the kernel is too old".into(), ..finding }
            .degraded(effect, "use Linux 6.9 or newer"),
        (_, false) if system.is_root() => {
            Finding { found: "this root has no CAP_SYS_ADMIN".into(), ..finding }.degraded(
                effect,
                "give the container the capability (--cap-add SYS_ADMIN), or mount on the host",
            )
        }
        (_, false) => Finding { found: "not for an ordinary user's mounts".into(), ..finding }
            .degraded(
                effect,
                "mount as root, with --allow-other for others, or give the user's unit CAP_SYS_ADMIN",
            )
            .root_adds("mounts with passthrough"),
        _ => Finding { found: "possible".into(), ..finding },
    }
}

fn helper(system: &System) -> Finding {
    let found = ["/usr/bin/fusermount3", "/bin/fusermount3", "/usr/local/bin/fusermount3"]
        .into_iter()
        .find(|path| system.exists(path));
    match found {
        Some(path) => Finding::ok("fuse", "fusermount3", path).needs("for mounts without CAP_SYS_ADMIN"),
        None => Finding::ok("fuse", "fusermount3", "is not installed")
            .needs("for mounts without CAP_SYS_ADMIN")
            .degraded("an ordinary user cannot mount", "install fuse3, or mount as root")
            .command("sudo apt install fuse3"),
    }
}
