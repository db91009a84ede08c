//! The checks, shown machines that this one is not.

use std::fs;
use std::path::Path;

use doctor::{Finding, Report, Status, System, examine};

/// Files of a machine, made below a temporary directory.
struct Machine(tempfile::TempDir);

impl Machine {
    /// A good one: new kernel, many cores, much memory, one NVMe drive with ext4, one GPU of the table.
    fn good() -> Machine {
        let machine = Machine(tempfile::tempdir().unwrap());
        let processor = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz\n\n";
        let controller = "/sys/class/nvme/nvme0";
        let gpu = "/sys/bus/pci/devices/0000:41:00.0";
        machine
            .file("/etc/os-release", "NAME=\"Ubuntu\"\nPRETTY_NAME=\"Ubuntu 24.04.3 LTS\"\n")
            .file("/proc/sys/kernel/osrelease", "6.14.0-29-generic\n")
            .file("/proc/cpuinfo", &processor.repeat(28))
            .file("/proc/meminfo", "MemTotal:       131072000 kB\nMemFree:        1 kB\n")
            .file("/proc/self/limits", "Limit                     Soft Limit           Hard Limit           Units     \nMax locked memory         unlimited            unlimited            bytes     \n")
            .file("/proc/self/mountinfo", "29 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,discard\n30 29 0:26 / /tmp rw - tmpfs tmpfs rw\n")
            .file("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
            .file("/dev/fuse", "")
            .file("/proc/sys/fs/fuse/max_pages_limit", "256\n")
            .file(&format!("{controller}/model"), "Samsung SSD 990 PRO 4TB     \n")
            .file("/sys/block/nvme0n1/device/model", "Samsung SSD 990 PRO 4TB     \n")
            .file(&format!("{controller}/firmware_rev"), "1.0     \n")
            .file(&format!("{controller}/transport"), "pcie\n")
            .file("/sys/block/nvme0n1/size", "7814037168\n")
            .file("/sys/block/nvme0n1/queue/logical_block_size", "512\n")
            .file("/sys/block/nvme0n1/queue/max_hw_sectors_kb", "2048\n")
            .file("/sys/block/nvme0n1/queue/max_sectors_kb", "1280\n")
            .file("/sys/block/nvme0n1/queue/rotational", "0\n")
            .file("/sys/block/nvme0n1/nvme0n1p2/partition", "2\n")
            .link_speed(&format!("{controller}/device"), "16.0 GT/s PCIe", "4", "16.0 GT/s PCIe", "4")
            .file(&format!("{gpu}/class"), "0x030000\n")
            .file(&format!("{gpu}/vendor"), "0x10de\n")
            .link_speed(gpu, "2.5 GT/s PCIe", "16", "16.0 GT/s PCIe", "16")
            .file("/proc/driver/nvidia/gpus/0000:41:00.0/information", "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 100\n")
            .file("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\n")
            .file("/proc/driver/nvidia/params", "RegistryDwords: \"\"\n");
        let dev = machine.0.path().join("sys/dev/block");
        fs::create_dir_all(&dev).unwrap();
        std::os::unix::fs::symlink("../../devices/x/nvme0n1/nvme0n1p2", dev.join("259:2")).unwrap();
        machine
    }

    /// Of a file that lists a machine's: `== PATH` begins one, `-> TARGET` makes it a link.
    fn listed(text: &str) -> Machine {
        let machine = Machine(tempfile::tempdir().unwrap());
        for part in text.split("\n== ").skip(1) {
            let (path, content) = part.split_once('\n').unwrap_or((part, ""));
            match content.strip_prefix("-> ") {
                Some(target) => {
                    let path = machine.0.path().join(path.trim_start_matches('/'));
                    fs::create_dir_all(path.parent().unwrap()).unwrap();
                    std::os::unix::fs::symlink(target.trim(), path).unwrap();
                }
                None => drop(machine.file(path, content)),
            }
        }
        machine
    }

    fn file(&self, path: &str, text: &str) -> &Machine {
        let path = self.0.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn without(&self, path: &str) -> &Machine {
        let path = self.0.path().join(path.trim_start_matches('/'));
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap()
        } else {
            fs::remove_file(path).unwrap()
        }
        self
    }

    fn link_speed(&self, device: &str, now: &str, lanes: &str, best: &str, best_lanes: &str) -> &Machine {
        self.file(&format!("{device}/current_link_speed"), now)
            .file(&format!("{device}/current_link_width"), lanes)
            .file(&format!("{device}/max_link_speed"), best)
            .file(&format!("{device}/max_link_width"), best_lanes)
    }

    fn report(&self) -> Report {
        let report = examine(&System::below(self.0.path()), Path::new("/"));
        every_line_is_whole(&report);
        report
    }

    #[track_caller]
    fn finding(&self, area: &str, item: &str) -> Finding {
        let report = self.report();
        let found = report.findings.iter().find(|finding| finding.area == area && finding.item == item);
        found.unwrap_or_else(|| panic!("no {area}/{item} in {report:#?}")).clone()
    }
}

/// Found, needed, effect, remedy.
#[track_caller]
fn every_line_is_whole(report: &Report) {
    for finding in &report.findings {
        let bad = finding.status >= Status::Degraded;
        assert!(!finding.needed.is_empty(), "nothing says what is needed: {finding:#?}");
        assert!(!bad || !finding.effect.is_empty() && !finding.remedy.is_empty(), "{finding:#?}");
        assert!(
            finding.effect.is_empty() || !finding.remedy.is_empty(),
            "an effect without a remedy: {finding:#?}"
        );
    }
}

#[test]
fn a_good_machine_is_good() {
    let report = Machine::good().report();
    let bad: Vec<_> = report.findings.iter().filter(|finding| finding.status >= Status::Degraded).collect();
    assert!(bad.is_empty() && report.verdict == Status::Ok, "{bad:#?}");
    let said: Vec<&str> = report.findings.iter().map(|finding| finding.found.as_str()).collect();
    for part in [
        "Ubuntu 24.04.3 LTS",
        "28 threads",
        "64 (Xeon Gold 6330)",
        "125.0 GiB",
        "Samsung SSD 990 PRO 4TB, firmware 1.0, pcie",
        "3.6 TiB",
        "PCIe 4 x4 now",
        "Ada Lovelace, 24 GB GDDR6X, validated by aiDAPTIV's vendor, nvtier did not run on it",
        "580.65.06, open kernel modules",
        "2400 TB to be written in its life (by its maker)",
    ] {
        assert!(said.iter().any(|found| found.contains(part)), "nothing says {part:?}: {said:#?}");
    }
}

#[test]
fn each_fault_is_found_by_itself_with_its_effect_and_remedy() {
    type Fault = fn(&Machine) -> &Machine;
    let faults: [(&str, &str, Fault, &[&str]); 23] = [
        (
            "platform",
            "kernel",
            |m| m.file("/proc/sys/kernel/osrelease", "6.8.0-45-generic"),
            &["FUSE passthrough", "page cache"],
        ),
        (
            "platform",
            "processor",
            |m| m.file("/proc/cpuinfo", "processor\t: 0\nmodel name\t: X\nprocessor\t: 1\n"),
            &["cores"],
        ),
        (
            "platform",
            "PCIe lanes",
            |m| {
                m.file(
                    "/proc/cpuinfo",
                    &"processor\t: 0\nmodel name\t: 13th Gen Intel(R) Core(TM) i9-13900\n".repeat(32),
                )
            },
            &["lanes"],
        ),
        ("memory", "RAM", |m| m.file("/proc/meminfo", "MemTotal:       16384000 kB\n"), &["RAM"]),
        ("memory", "RAM", |m| m.file("/sys/fs/cgroup/memory.max", "8589934592\n"), &["cgroup", "8.0 GiB"]),
        (
            "memory",
            "huge pages",
            |m| m.file("/sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]"),
            &["4 KiB pages", "madvise"],
        ),
        (
            "memory",
            "locked memory (memlock)",
            |m| {
                m.file(
                    "/proc/self/limits",
                    "Max locked memory         65536                65536                bytes     \n",
                )
            },
            &["64.0 KiB", "ulimit -l"],
        ),
        (
            "io",
            "io_uring",
            |m| m.file("/proc/sys/kernel/io_uring_disabled", "2"),
            &["kernel.io_uring_disabled", "threads"],
        ),
        ("fuse", "/dev/fuse", |m| m.without("/dev/fuse"), &["modprobe fuse", "cannot be mounted"]),
        ("fuse", "/dev/fuse", |m| m.without("/dev/fuse").file("/.dockerenv", ""), &["--device /dev/fuse"]),
        ("fuse", "passthrough", |m| m.file("/proc/sys/kernel/osrelease", "6.8.0"), &["6.9"]),
        (
            "file system",
            "/",
            |m| m.file("/proc/self/mountinfo", "29 1 0:30 / / rw - overlay overlay rw,lowerdir=/x\n"),
            &["docker run -v"],
        ),
        ("drive", "NVMe", |m| m.without("/sys/class/nvme"), &["virtual disk"]),
        (
            "drive",
            "nvme0 link",
            |m| m.link_speed("/sys/class/nvme/nvme0/device", "16.0 GT/s PCIe", "2", "16.0 GT/s PCIe", "4"),
            &["2 of 4 lanes", "slot"],
        ),
        (
            "drive",
            "nvme0 link",
            |m| m.link_speed("/sys/class/nvme/nvme0/device", "8.0 GT/s PCIe", "4", "16.0 GT/s PCIe", "4"),
            &["PCIe 3"],
        ),
        (
            "iommu",
            "mode",
            |m| {
                m.file("/sys/class/iommu/dmar0/x", "")
                    .file("/sys/kernel/iommu_groups/1/type", "DMA-FQ")
                    .file("/sys/block/nvme0n1/queue/max_hw_sectors_kb", "128")
            },
            &["128 KiB", "iommu=pt", "nvme0n1"],
        ),
        ("gpu", "0000:41:00.0", |m| m.without("/proc/driver/nvidia/gpus"), &["driver"]),
        (
            "gpu",
            "driver",
            |m| {
                m.file("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version:  gcc version 12.3.0\n")
            },
            &["535.183.01, proprietary", "batched copies", "570.26"],
        ),
        (
            "gpu",
            "driver",
            |m| m.without("/proc/driver/nvidia/version").file("/sys/module/nvidia/version", "460.32.03\n"),
            &["460.32.03", "all of VRAM", "a newer driver"],
        ),
        (
            "platform",
            "cgroup CPU limit",
            |m| m.file("/sys/fs/cgroup/cpu.max", "200000 100000\n"),
            &["2.0 CPUs", "--cpus"],
        ),
        (
            "platform",
            "cgroup task limit",
            |m| {
                m.file("/proc/self/cgroup", "0::/a/b\n")
                    .file("/sys/fs/cgroup/a/pids.max", "100\n")
                    .file("/sys/fs/cgroup/a/b/pids.max", "max\n")
            },
            &["100 threads", "TasksMax"],
        ),
        (
            "memory",
            "RAM",
            |m| m.file("/proc/self/cgroup", "0::/a/b\n").file("/sys/fs/cgroup/a/memory.max", "4294967296\n"),
            &["4.0 GiB", "cgroup"],
        ),
        (
            "gpu",
            "0000:41:00.0 link",
            |m| {
                m.link_speed(
                    "/sys/bus/pci/devices/0000:41:00.0",
                    "16.0 GT/s PCIe",
                    "4",
                    "16.0 GT/s PCIe",
                    "16",
                )
            },
            &["4 of 16 lanes"],
        ),
    ];
    for (area, item, fault, words) in faults {
        let machine = Machine::good();
        fault(&machine);
        let finding = machine.finding(area, item);
        assert_eq!(finding.status, Status::Degraded, "{finding:#?}");
        assert!(
            !finding.needed.is_empty() && !finding.effect.is_empty() && !finding.remedy.is_empty(),
            "{finding:#?}"
        );
        let all = format!("{finding:?}");
        for word in words {
            assert!(all.contains(word), "{word:?} is not in {finding:#?}");
        }
        assert_eq!(machine.report().verdict, Status::Degraded);
    }
}

/// A real machine, as its files are.
#[test]
fn a_virtual_machine_with_an_h200_is_seen_as_it_is() {
    let machine = Machine::listed(include_str!("data/h200.txt"));
    let report = machine.report();
    let worse: Vec<_> = report.findings.iter().filter(|finding| finding.status >= Status::Degraded).collect();
    assert!(
        worse.len() == 1 && worse[0].item == "NVMe" && worse[0].found.contains("no NVMe drive"),
        "{worse:#?}"
    );
    assert_eq!(report.verdict, Status::Degraded);
    for (area, item, status, found) in [
        ("platform", "operating system", Status::Ok, "Ubuntu 24.04.3 LTS"),
        ("platform", "kernel", Status::Ok, "6.18.44"),
        ("platform", "processor", Status::Ok, "Intel(R) Xeon(R) Processor, 16 threads"),
        ("platform", "PCIe lanes", Status::Info, "not in the table"),
        ("platform", "container", Status::Info, "/.dockerenv"),
        ("memory", "RAM", Status::Ok, "125.9 GiB"),
        ("memory", "huge pages", Status::Ok, "transparent: madvise"),
        ("memory", "locked memory (memlock)", Status::Ok, "unlimited"),
        ("io", "io_uring", Status::Ok, "not turned off"),
        ("fuse", "passthrough", Status::Ok, "possible"),
        ("fuse", "FUSE over io_uring", Status::Info, "off"),
        ("file system", "/", Status::Ok, "ext4 on /dev/vda"),
        ("drive", "vda queue", Status::Info, "commands of up to 4096 KiB, no limit"),
        ("iommu", "mode", Status::Ok, "none in use"),
        ("gpu", "driver", Status::Ok, "580.159.04, open kernel modules"),
        (
            "gpu",
            "0000:00:06.0",
            Status::Info,
            "NVIDIA H200: not in the table of validated GPUs, nvtier ran on it",
        ),
        ("gpu", "0000:00:06.0 link", Status::Ok, "PCIe 5 x16 now"),
        ("gpudirect", "cuda:0: bounce", Status::Ok, "always works"),
        ("gpudirect", "cuda:0: cuFile on nvidia-fs", Status::Info, "nvidia-fs is not loaded"),
        ("gpudirect", "  NVIDIA's open kernel driver", Status::Ok, "open"),
        ("gpudirect", "  the driver's option RMForceStaticBar1=1", Status::Info, "not among"),
        ("gpudirect", "  the IOMMU is off or passes through", Status::Ok, "no IOMMU"),
    ] {
        let finding = machine.finding(area, item);
        assert!(
            finding.status == status && finding.found.contains(found),
            "{found:?}, {status:?}: {finding:#?}"
        );
    }
}

/// What is smaller than some tasks ask for is told, and is no fault.
#[test]
fn a_card_says_what_it_is_enough_for_and_a_drive_of_no_table_that_its_rating_is_not_known() {
    let machine = Machine::good();
    let card = "/proc/driver/nvidia/gpus/0000:41:00.0/information";
    machine.file(card, "Model: \t NVIDIA GeForce RTX 5080\n");
    let small = machine.finding("gpu", "0000:41:00.0");
    assert!(small.status == Status::Info && small.effect.contains("fine-tune"), "{small:#?}");
    machine.file(card, "Model: \t NVIDIA H200\n");
    let ran = machine.finding("gpu", "0000:41:00.0");
    assert!(
        ran.status == Status::Info
            && ran.found.contains("not in the table")
            && ran.found.contains("nvtier ran on it"),
        "{ran:#?}"
    );
    machine.file("/sys/block/nvme0n1/device/model", "A drive of nobody");
    let rating = machine.finding("drive", "nvme0n1 rated endurance");
    assert!(rating.status == Status::Unknown && rating.found.contains("`A drive of nobody`"), "{rating:#?}");
    assert_eq!(machine.report().verdict, Status::Ok);
}

#[test]
fn a_file_system_that_cannot_be_written_cannot_hold_a_pool() {
    let machine = Machine::good();
    machine.file("/proc/self/mountinfo", "29 1 259:2 / / ro,relatime - ext4 /dev/nvme0n1p2 ro\n");
    assert_eq!(machine.finding("file system", "/").status, Status::CannotRun);
    assert_eq!(machine.report().verdict, Status::CannotRun);
}

#[test]
fn direct_ways_to_the_gpu_are_told_condition_by_condition_and_are_no_fault() {
    let machine = Machine::good();
    let says = |item: &str| machine.finding("gpudirect", item);
    for way in ["cuFile on nvidia-fs", "cuFile by PCI peer-to-peer", "io_uring with a dma-buf"] {
        let finding = says(&format!("cuda:0: {way}"));
        assert_eq!(finding.status, Status::Info, "{finding:#?}");
        assert!(finding.found.contains("not here") && finding.effect.contains("pinned"), "{finding:#?}");
    }
    assert_eq!(says("cuda:0: bounce").status, Status::Ok);
    for item in ["nvidia-fs is loaded", "the driver's option RMForceStaticBar1=1"] {
        assert_eq!(says(&format!("  {item}")).status, Status::Info, "{item}");
    }
    for item in ["NVIDIA's open kernel driver", "Linux 6.2 or newer"] {
        assert_eq!(says(&format!("  {item}")).status, Status::Ok, "{item}");
    }
    machine.file("/proc/driver/nvidia-fs/version", "2.30").file(
        "/proc/driver/nvidia/params",
        "RegistryDwords: \"RMForceStaticBar1=1;RmForceDisableIomapWC=1\"\n",
    );
    assert_eq!(says("  nvidia-fs is loaded").status, Status::Ok);
    assert_eq!(says("  the driver's option RMForceStaticBar1=1").status, Status::Ok);
    machine.without("/proc/driver/nvidia/gpus");
    assert!(says("direct ways to the GPU").found.contains("no GPU"));
}

/// Whatever is missing or says nonsense: findings, no panic.
#[test]
fn nonsense_is_survived() {
    let empty = tempfile::tempdir().unwrap();
    let report = examine(&System::below(empty.path()), Path::new("/no/such/path"));
    every_line_is_whole(&report);
    assert!(report.findings.iter().any(|finding| finding.status == Status::Unknown), "{report:#?}");
    let machine = Machine::good();
    let mut files = vec![machine.0.path().to_path_buf()];
    let mut count = 0;
    while let Some(path) = files.pop() {
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            files.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let good = fs::read(&path).unwrap();
        for bad in [
            &b""[..],
            b"\xff\xfe",
            b"-1",
            b"999999999999999999999999",
            b": - :\n - \n[[\n",
            &good[..good.len() / 2],
        ] {
            fs::write(&path, bad).unwrap();
            machine.report();
        }
        fs::write(&path, good).unwrap();
        count += 1;
    }
    assert!(count > 25, "{count} files");
}
