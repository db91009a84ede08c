//! Loads by a simulated cuFile: what its self-test finds out, which way a load takes and says that it took, every way to fail.

mod common;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{checkpoint, contents, fake, pattern, plan, small};
use gpudirect::cufile::fake::{FakeCuFile, FakeCuFileOptions, FakeMode};
use gpudirect::cufile::{CuFile, CuFileOptions};
use gpudirect::driver::fake::{FakeDriver, FakeOptions};
use gpudirect::driver::host::HostDriver;
use gpudirect::paths::{self, System};
use gpudirect::remembered::Remembered;
use gpudirect::{
    CachePolicy, Cancel, Control, Driver, ErrorKind, Lane, Loaded, PathChoice, PathOptions, Paths, Plan,
    PlanOptions, Report, Result,
};

/// A machine that has everything, a device, a library and a checkpoint.
struct Bench {
    folder: tempfile::TempDir,
    device: FakeDriver,
    driver: Arc<dyn Driver>,
    library: FakeCuFile,
    opened: Arc<AtomicU64>,
    paths: Paths,
    files: Vec<PathBuf>,
    expected: HashMap<String, Vec<u8>>,
}

fn options() -> PathOptions {
    PathOptions { cufile: CuFileOptions { chunk: 256 << 10, threads: 3 }, ..PathOptions::default() }
}

fn write(path: PathBuf, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// A machine with nvidia-fs, and with all that peer-to-peer DMA needs, whose NVMe drive holds `folder`.
fn machine(root: &Path, folder: &Path) {
    let dev = std::fs::metadata(folder).unwrap().dev();
    let number = format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
    write(root.join("etc/machine-id"), "0123\n");
    write(root.join("proc/sys/kernel/osrelease"), "6.12.1-test\n");
    write(root.join("proc/driver/nvidia-fs/version"), "version: 2.30.4\n");
    write(
        root.join("proc/driver/nvidia/version"),
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.1\n",
    );
    write(
        root.join("proc/driver/nvidia/params"),
        "RegistryDwords: \"RMForceStaticBar1=1;RmForceDisableIomapWC=1\"\n",
    );
    write(root.join("proc/self/io"), "rchar: 0\n");
    write(
        root.join("proc/self/mountinfo"),
        &format!("30 1 {number} / /data rw - ext4 /dev/nvme0n1p1 rw,discard\n"),
    );
    write(root.join("boot/config-6.12.1-test"), "CONFIG_PCI=y\nCONFIG_PCI_P2PDMA=y\n");
    write(root.join("sys/bus/pci/devices/0000:00:00.0/p2pmem/size"), "1\n");
    write(root.join("sys/bus/pci/devices/0000:00:00.0/iommu_group/type"), "identity\n");
    let drive = root.join("sys/devices/pci0000:00/nvme/nvme0/nvme0n1");
    write(drive.join("nvme0n1p1/partition"), "1\n");
    write(drive.join("device/model"), "TEST DRIVE\n");
    write(drive.join("device/transport"), "pcie\n");
    std::fs::create_dir_all(root.join("sys/dev/block")).unwrap();
    std::os::unix::fs::symlink(drive.join("nvme0n1p1"), root.join("sys/dev/block").join(number)).unwrap();
}

impl Bench {
    /// None, after saying so, where files cannot be read with O_DIRECT.
    fn new() -> Option<Bench> {
        let folder = tempfile::tempdir().unwrap();
        let (device, driver) = fake(FakeOptions::default());
        let root = folder.path().join("machine");
        machine(&root, folder.path());
        let options = FakeCuFileOptions { system: root.clone(), ..FakeCuFileOptions::default() };
        let library = FakeCuFile::new(&device, options);
        let opened = Arc::new(AtomicU64::new(0));
        let (shared, count) = (library.clone(), opened.clone());
        let open = move || {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(Arc::new(shared.clone()) as Arc<dyn CuFile>)
        };
        let remembered = Remembered::at(folder.path().join("cache/paths.json"));
        // Nothing is timed here: any speed will do, unless a test says otherwise.
        let paths = Paths::of(System::at(root), open, remembered).not_slower(0.0);
        let tensors: Vec<(String, Vec<u8>)> = [(5 << 20) + 77, 0, 1, 300_000, 4096, (2 << 20) + 5]
            .into_iter()
            .enumerate()
            .map(|(i, len)| (format!("t{i}"), pattern(i as u64, len)))
            .collect();
        let file = folder.path().join("m.safetensors");
        let list: Vec<(&str, Vec<u8>)> =
            tensors.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
        checkpoint(&file, &list);
        let bench = Bench {
            folder,
            device,
            driver,
            library,
            opened,
            paths,
            files: vec![file],
            expected: tensors.into_iter().collect(),
        };
        match plan(&bench.files, CachePolicy::Direct, &PlanOptions::default()) {
            Ok(_) => Some(bench),
            Err(error) => {
                println!("skipped: direct I/O on {}: {error}", bench.folder.path().display());
                None
            }
        }
    }

    fn fake(&self) -> FakeCuFileOptions {
        FakeCuFileOptions { system: self.root(), ..FakeCuFileOptions::default() }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("machine")
    }

    fn lane(&self) -> Lane {
        Lane::new(self.driver.clone(), small()).unwrap()
    }

    fn plan(&self) -> Plan {
        plan(&self.files, CachePolicy::Direct, &PlanOptions::default()).unwrap()
    }

    fn load(&self, options: &PathOptions) -> Result<Report> {
        self.load_with(options, &mut Control::default())
    }

    /// Loads, compares all bytes, gives everything back, and looks for what was left behind.
    fn load_with(&self, options: &PathOptions, control: &mut Control<'_>) -> Result<Report> {
        let mut lane = self.lane();
        let loaded = gpudirect::load_by(&mut lane, &self.plan(), &self.paths, options, control);
        let report = loaded.map(|loaded| {
            assert!(contents(&lane, &loaded) == self.expected, "other bytes");
            loaded.report
        });
        drop(lane);
        assert_eq!(self.library.leaks(), [""; 0]);
        assert_eq!(self.device.leaks(), [""; 0]);
        report
    }
}

/// Why a way was not taken.
fn why(report: &Report, path: &str) -> String {
    let found = report.not_taken.iter().find(|way| way.path == path);
    found.unwrap_or_else(|| panic!("{path} is not in {:?}", report.not_taken)).why.clone()
}

#[test]
fn every_byte_arrives_by_cufile_and_the_report_says_so() {
    let Some(bench) = Bench::new() else { return };
    let first = bench.load(&options()).unwrap();
    assert_eq!((first.path, first.verified_sources), (paths::NVIDIA_FS, 0));
    assert!(first.staging_bytes > 0 && first.read_bytes >= first.bytes, "{first:?}");
    let tested = bench.library.reads();
    // What the self-test found is remembered; partial reads are gone on with; any size of reads will do.
    for (chunk, threads, short) in
        [(64 << 10, 1, 0), (64 << 10, 8, 5000), (8 << 20, 8, 0), (1 << 20, 2, 4097)]
    {
        bench.library.set(FakeCuFileOptions { short, ..bench.fake() });
        let way = PathOptions { cufile: CuFileOptions { chunk, threads }, ..options() };
        let report = bench.load(&way).unwrap();
        assert_eq!(report.path, paths::NVIDIA_FS, "{:?}", report.not_taken);
        if short == 0 {
            assert!(bench.library.reads() == report.reads, "{tested}, then {}", bench.library.reads());
        }
    }
    assert_eq!(bench.device.leaks(), [""; 0]);
}

#[test]
fn peer_to_peer_is_named_as_such() {
    let Some(bench) = Bench::new() else { return };
    std::fs::remove_dir_all(bench.root().join("proc/driver/nvidia-fs")).unwrap();
    bench.library.set(FakeCuFileOptions { mode: FakeMode::PeerToPeer, ..bench.fake() });
    let loaded = bench.load(&options()).unwrap();
    assert_eq!(loaded.path, paths::PEER_TO_PEER);
    assert!(why(&loaded, paths::NVIDIA_FS).contains("nvidia-fs is not loaded"));
}

/// Both ways are there, and the library takes one of them: the report names that one, not the one that was hoped for.
#[test]
fn a_way_that_the_reads_did_not_take_is_not_named() {
    let Some(bench) = Bench::new() else { return };
    bench.library.set(FakeCuFileOptions { mode: FakeMode::PeerToPeer, ..bench.fake() });
    let report = bench.load(&options()).unwrap();
    assert_eq!(report.path, paths::PEER_TO_PEER);
    let reason = why(&report, paths::NVIDIA_FS);
    assert!(reason.contains("(0 by nvidia-fs, 4 by peer-to-peer DMA)"), "{reason}");
}

/// Whatever cuFile does wrong, the self-test sees it, the load takes the bounce path, and the report has the reason; remembered
/// until a new test is asked for.
#[test]
fn a_cufile_that_cannot_be_trusted_is_refused_with_the_reason() {
    type Change = fn(&mut FakeCuFileOptions);
    let wrong: [(&str, Change); 7] = [
        ("1 are wrong on the device", |fake| fake.wrong = 2),
        ("never arrived", |fake| fake.lost = 1),
        ("100000 came", |fake| fake.short = 100_000),
        ("4 of 4 reads of the self-test by pread", |fake| {
            (fake.mode, fake.system) = (FakeMode::Compat, PathBuf::new());
        }),
        ("bytes read by system calls: that is cuFile's compatibility mode, not GPUDirect", |fake| {
            (fake.mode, fake.counts) = (FakeMode::Compat, false);
        }),
        ("CU_FILE_IO_NOT_SUPPORTED (5008)", |fake| (fake.fail_call, fake.code) = (2, 5008)),
        ("CU_FILE_NVFS_DRIVER_ERROR (5010)", |fake| (fake.fail_call, fake.code) = (4, 5010)),
    ];
    for (words, change) in wrong {
        let Some(bench) = Bench::new() else { return };
        let mut bad = bench.fake();
        change(&mut bad);
        bench.library.set(bad.clone());
        let loaded = bench.load(&options()).unwrap();
        assert_eq!(loaded.path, paths::BOUNCE, "{words}");
        let reason = why(&loaded, paths::NVIDIA_FS);
        assert!(reason.contains(words), "{words}: {reason}");
        // Healthy by now, but nobody knows.
        bench.library.set(bench.fake());
        let again = bench.load(&options()).unwrap();
        assert_eq!((again.path, bench.library.calls()), (paths::BOUNCE, 0), "{words}");
        assert_eq!(why(&again, paths::NVIDIA_FS), reason);
        let forced = bench.load(&PathOptions { choice: PathChoice::CuFile, ..options() }).unwrap_err();
        assert_eq!(forced.kind(), ErrorKind::Unsupported);
        assert!(forced.to_string().contains(words), "{forced}");
        let retested = bench.load(&PathOptions { retest: true, ..options() }).unwrap();
        assert_eq!(retested.path, paths::NVIDIA_FS, "{words}");
    }
}

#[test]
fn what_is_missing_is_named_and_the_library_is_left_alone() {
    type Change = fn(&Path);
    let missing: [(&str, &str, Change); 9] = [
        (paths::NVIDIA_FS, "nvidia-fs is not loaded", |_| {}),
        (paths::PEER_TO_PEER, "the kernel is 6.1.0", |root| {
            write(root.join("proc/sys/kernel/osrelease"), "6.1.0\n");
        }),
        (paths::PEER_TO_PEER, "CONFIG_PCI_P2PDMA=n", |root| {
            write(root.join("boot/config-6.12.1-test"), "CONFIG_PCI=y\n");
        }),
        (paths::PEER_TO_PEER, "proprietary", |root| {
            write(root.join("proc/driver/nvidia/version"), "NVIDIA UNIX x86_64 Kernel Module\n");
        }),
        (paths::PEER_TO_PEER, "RMForceStaticBar1=1 is not among", |root| {
            write(root.join("proc/driver/nvidia/params"), "RegistryDwords: \"\"\n");
        }),
        (paths::PEER_TO_PEER, "no p2pmem", |root| {
            std::fs::remove_dir_all(root.join("sys/bus/pci/devices/0000:00:00.0/p2pmem")).unwrap();
        }),
        (paths::PEER_TO_PEER, "boot with iommu=pt", |root| {
            write(root.join("sys/bus/pci/devices/0000:00:00.0/iommu_group/type"), "DMA-FQ\n");
        }),
        (paths::PEER_TO_PEER, "ext4 is mounted with data=journal", |root| {
            let path = root.join("proc/self/mountinfo");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(path, text.replace("rw,discard", "rw,data=journal")).unwrap();
        }),
        (paths::PEER_TO_PEER, "is reached by tcp", |root| {
            write(root.join("sys/devices/pci0000:00/nvme/nvme0/nvme0n1/device/transport"), "tcp\n");
        }),
    ];
    for (path, words, change) in missing {
        let Some(bench) = Bench::new() else { return };
        std::fs::remove_dir_all(bench.root().join("proc/driver/nvidia-fs")).unwrap();
        if path == paths::NVIDIA_FS {
            std::fs::remove_dir_all(bench.root().join("sys/bus/pci/devices/0000:00:00.0/p2pmem")).unwrap();
        }
        change(&bench.root());
        let loaded = bench.load(&options()).unwrap();
        assert_eq!(loaded.path, paths::BOUNCE, "{words}");
        let reason = why(&loaded, path);
        assert!(reason.contains(words), "{words}: {reason}");
        assert_eq!(bench.opened.load(Ordering::SeqCst), 0, "{words}: the library was opened for nothing");
        let survey = bench.paths.survey(&loaded.device, &bench.files[0]);
        let state = survey.paths.iter().find(|state| state.path == path).unwrap();
        assert_eq!((state.usable, state.why.as_str()), (Some(false), reason.as_str()));
        assert_eq!((survey.place.drive.as_str(), survey.place.model.as_str()), ("nvme0n1", "TEST DRIVE"));
    }
}

/// Stacked and unknown drives: told from the folders that the kernel makes.
#[test]
fn drives_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let sys = |number: &str, drive: &str, more: &[(&str, &str)]| {
        let drive = folder.path().join("sys/devices").join(drive);
        std::fs::create_dir_all(&drive).unwrap();
        more.iter().for_each(|(name, text)| write(drive.join(name), text));
        std::fs::create_dir_all(folder.path().join("sys/dev/block")).unwrap();
        std::os::unix::fs::symlink(&drive, folder.path().join("sys/dev/block").join(number)).unwrap();
        System::at(folder.path()).place_of(number)
    };
    use paths::DriveKind as K;
    assert_eq!(sys("9:0", "virtual/block/md0", &[("md/level", "raid0")]).kind, K::Stacked);
    assert_eq!(sys("253:0", "virtual/block/dm-0", &[("dm/name", "x")]).kind, K::Stacked);
    assert_eq!(sys("254:0", "virtio/vda", &[]).kind, K::Other);
    assert_eq!(sys("259:0", "pci/nvme/nvme0/nvme0n1", &[("device/transport", "pcie")]).kind, K::Nvme);
    let rdma = sys("259:1", "pci/nvme/nvme1/nvme1n1", &[("device/transport", "rdma")]);
    assert_eq!(rdma.kind, K::NvmeFabrics("rdma".into()));
    assert_eq!(sys("259:2", "virtual/nvme-subsystem/nvme-subsys2/nvme2n1", &[]).kind, K::NvmeMultipath);
    assert_eq!(System::at(folder.path()).place_of("0:1").drive, "");
}

/// Each call that cuFile can refuse is refused once, in the self-test and in the load.
#[test]
fn a_cufile_that_fails_anywhere_leaks_nothing_and_the_bounce_path_takes_over() {
    let Some(bench) = Bench::new() else { return };
    bench.load(&options()).unwrap();
    let (mut failed, mut forced) = (0, 0);
    for call in 1.. {
        bench.library.set(FakeCuFileOptions { fail_call: call, ..bench.fake() });
        let loaded = bench.load(&options()).unwrap();
        if bench.library.calls() < call {
            assert_eq!(loaded.path, paths::NVIDIA_FS);
            break;
        }
        assert_eq!(loaded.path, paths::BOUNCE, "call {call}");
        let reason = why(&loaded, paths::NVIDIA_FS);
        assert!(
            reason.contains("the bounce path loaded everything") && reason.contains("(5030)"),
            "{reason}"
        );
        // It is not trusted again without a test: the next load makes one.
        bench.library.set(FakeCuFileOptions { fail_call: call, ..bench.fake() });
        bench.load(&PathOptions { choice: PathChoice::Bounce, ..options() }).unwrap();
        bench.library.set(bench.fake());
        let tested = bench.load(&options()).unwrap();
        assert_eq!(tested.path, paths::NVIDIA_FS);
        assert!(bench.library.reads() > tested.reads, "no self-test was made");
        bench.library.set(FakeCuFileOptions { fail_call: call, ..bench.fake() });
        let error = bench.load(&PathOptions { choice: PathChoice::CuFile, ..options() }).unwrap_err();
        assert!(error.to_string().contains("(5030)"), "{error}");
        forced += 1;
        failed = call;
    }
    // Registering, opening, and every read.
    assert!(failed > 20 && forced == failed, "{failed} calls were made to fail");
}

/// The device refuses in the middle: its copies from the staging memory, its allocations.
#[test]
fn a_device_that_fails_anywhere_leaks_nothing() {
    let Some(bench) = Bench::new() else { return };
    bench.load(&options()).unwrap();
    let mut outcomes = (0, 0);
    // All at the start, some of the many copies later.
    for call in (1..24).chain((24..).step_by(17)) {
        bench.device.set(FakeOptions { fail_call: call, ..FakeOptions::default() });
        let attempt = || -> Result<Loaded> {
            let mut lane = Lane::new(bench.driver.clone(), small())?;
            gpudirect::load_by(&mut lane, &bench.plan(), &bench.paths, &options(), &mut Control::default())
        };
        let result = attempt();
        let reached = bench.device.calls() >= call;
        match result.map(|loaded| loaded.report.path) {
            Ok(_) if !reached => break,
            Ok(_) => outcomes.0 += 1,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Device, "{error}");
                outcomes.1 += 1;
            }
        }
        assert_eq!(bench.device.leaks(), [""; 0], "after call {call}");
        assert_eq!(bench.library.leaks(), [""; 0], "after call {call}");
    }
    bench.device.set(FakeOptions::default());
    println!("{} loads went on by the bounce path, {} failed", outcomes.0, outcomes.1);
    assert!(outcomes.0 > 5 && outcomes.1 > 2, "{outcomes:?}");
}

#[test]
fn a_cancelled_or_late_load_gives_nothing() {
    let Some(bench) = Bench::new() else { return };
    bench.load(&options()).unwrap();
    let mut half = |done: u64, total: u64| done < total / 2;
    let mut control = Control { progress: Some(&mut half), ..Control::default() };
    assert_eq!(bench.load_with(&options(), &mut control).unwrap_err().kind(), ErrorKind::Cancelled);
    let mut control = Control { deadline: Some(Instant::now()), ..Control::default() };
    assert_eq!(bench.load_with(&options(), &mut control).unwrap_err().kind(), ErrorKind::Timeout);
    // A self-test can be given up, too, and nothing is remembered of it.
    let cancel = Cancel::new();
    cancel.cancel();
    let retest = PathOptions { retest: true, ..options() };
    let mut control = Control { cancel, ..Control::default() };
    assert_eq!(bench.load_with(&retest, &mut control).unwrap_err().kind(), ErrorKind::Cancelled);
    // Cancelled from another thread while a read hangs: it ends when the read does.
    bench.library.set(FakeCuFileOptions { delay: Duration::from_millis(50), ..bench.fake() });
    let cancel = Cancel::new();
    let other = cancel.clone();
    let thread = std::thread::spawn(move || other.cancel());
    let mut control = Control { cancel, ..Control::default() };
    assert_eq!(bench.load_with(&options(), &mut control).unwrap_err().kind(), ErrorKind::Cancelled);
    thread.join().unwrap();
    bench.library.set(bench.fake());
    assert_eq!(bench.load(&options()).unwrap().path, paths::NVIDIA_FS);
}

#[test]
fn a_file_that_is_truncated_while_cufile_reads_it_is_an_error_that_says_so() {
    let Some(bench) = Bench::new() else { return };
    bench.load(&options()).unwrap();
    let path = bench.files[0].clone();
    let mut cut = |done: u64, _: u64| {
        if done > 0 {
            File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
        }
        true
    };
    let mut control = Control { progress: Some(&mut cut), ..Control::default() };
    let one = PathOptions { cufile: CuFileOptions { chunk: 64 << 10, threads: 1 }, ..options() };
    let error = bench.load_with(&one, &mut control).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
    assert!(error.to_string().contains("truncated"), "{error}");
}

#[test]
fn without_room_for_staging_the_bounce_path_is_taken_and_nothing_is_forgotten() {
    let Some(bench) = Bench::new() else { return };
    bench.load(&options()).unwrap();
    let room = bench.plan().device_bytes() + (100 << 10);
    bench.device.set(FakeOptions { memory_bytes: room, ..FakeOptions::default() });
    let loaded = bench.load(&options()).unwrap();
    assert_eq!(loaded.path, paths::BOUNCE);
    assert!(why(&loaded, paths::NVIDIA_FS).contains("bytes on the device for cuFile"));
    bench.device.set(FakeOptions::default());
    bench.library.set(bench.fake());
    let again = bench.load(&options()).unwrap();
    assert_eq!((again.path, bench.library.reads()), (paths::NVIDIA_FS, again.reads));
}

#[test]
fn another_driver_another_drive_or_another_library_is_tested_anew() {
    let Some(bench) = Bench::new() else { return };
    bench.load(&options()).unwrap();
    type Change = fn(&Path);
    let changes: [(&str, Change); 4] = [
        ("kernel", |root| write(root.join("proc/sys/kernel/osrelease"), "6.13.0\n")),
        ("nvidia-fs", |root| write(root.join("proc/driver/nvidia-fs/version"), "version: 2.31\n")),
        ("driver", |root| write(root.join("proc/driver/nvidia/version"), "Open Kernel Module 590\n")),
        ("drive", |root| {
            write(root.join("sys/devices/pci0000:00/nvme/nvme0/nvme0n1/device/model"), "OTHER\n");
        }),
    ];
    for (what, change) in changes {
        bench.library.set(bench.fake());
        let before = bench.load(&options()).unwrap();
        assert_eq!(bench.library.reads(), before.reads, "{what}: tested without need");
        change(&bench.root());
        bench.library.set(bench.fake());
        let after = bench.load(&options()).unwrap();
        assert!(bench.library.reads() > after.reads, "{what}: not tested anew");
    }
}

#[test]
fn a_slower_cufile_is_not_taken_unless_it_is_asked_for() {
    let Some(bench) = Bench::new() else { return };
    // Whatever its speed is, it is not enough.
    let bench = Bench { paths: bench.paths.clone().not_slower(f64::INFINITY), ..bench };
    let loaded = bench.load(&options()).unwrap();
    assert_eq!(loaded.path, paths::BOUNCE);
    let reason = why(&loaded, paths::NVIDIA_FS);
    assert!(reason.contains("the bounce path is faster") && reason.contains("GB/s against"), "{reason}");
    bench.library.set(bench.fake());
    let forced = bench.load(&PathOptions { choice: PathChoice::CuFile, ..options() }).unwrap();
    assert_eq!(forced.path, paths::NVIDIA_FS);
}

/// All but the library is there: the real one is looked for, and on most machines is not.
#[test]
fn a_library_that_cannot_be_opened_is_named_with_its_own_words() {
    let Some(bench) = Bench::new() else { return };
    let open = || gpudirect::cufile::open().map(|library| Arc::new(library) as Arc<dyn CuFile>);
    let bench = Bench { paths: Paths::of(System::at(bench.root()), open, Remembered::nowhere()), ..bench };
    let words = match gpudirect::cufile::open() {
        Ok(_) => return println!("skipped: this machine has cuFile"),
        Err(error) => error.to_string(),
    };
    let report = bench.load(&options()).unwrap();
    assert_eq!(report.path, paths::BOUNCE);
    assert!(why(&report, paths::NVIDIA_FS).contains(&words), "{report:?}");
    let forced = bench.load(&PathOptions { choice: PathChoice::CuFile, ..options() }).unwrap_err();
    assert!(forced.to_string().contains(&words), "{forced}");
}

#[test]
fn what_needs_the_host_is_never_read_by_cufile() {
    let Some(bench) = Bench::new() else { return };
    bench.library.set(FakeCuFileOptions { compat_allowed: true, ..bench.fake() });
    let loaded = bench.load(&options()).unwrap();
    let reason = why(&loaded, paths::NVIDIA_FS);
    assert!(loaded.path == paths::BOUNCE && reason.contains("allow_compat_mode"), "{reason}");
    bench.library.set(bench.fake());
    // Out of the page cache.
    let mut lane = bench.lane();
    let cached = plan(&bench.files, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
    let loaded = gpudirect::load_by(&mut lane, &cached, &bench.paths, &options(), &mut Control::default())
        .unwrap()
        .report;
    assert_eq!(loaded.path, paths::BOUNCE);
    assert!(why(&loaded, paths::PEER_TO_PEER).contains("read from memory"));
    // To the host's own memory.
    let mut host = Lane::new(Arc::new(HostDriver::new()), small()).unwrap();
    let loaded =
        gpudirect::load_by(&mut host, &bench.plan(), &bench.paths, &options(), &mut Control::default());
    assert_eq!(loaded.unwrap().report.not_taken, []);
    let forced = PathOptions { choice: PathChoice::CuFile, ..options() };
    let error = gpudirect::load_by(&mut host, &bench.plan(), &bench.paths, &forced, &mut Control::default())
        .unwrap_err();
    assert!(error.to_string().contains("no CUDA device"), "{error}");
    assert_eq!(bench.library.calls(), 0);
}
