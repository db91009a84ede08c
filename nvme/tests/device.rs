//! Files and block devices through the blocking helpers, and what is refused.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nvme::{
    BlockDevice, Buffer, Device, DeviceKind, DeviceOptions, ErrorKind, FileDevice, Op, Queue, SimDevice,
    SimOptions, SimRng,
};
use proptest::prelude::*;

const READ_ONLY: DeviceOptions = DeviceOptions { direct: true, read_only: true };
const BUFFERED: DeviceOptions = DeviceOptions { direct: false, read_only: false };

/// Random writes and reads at any alignment, against a plain Vec.
fn against_a_model(device: &dyn Device, seed: u64, steps: usize) {
    let len = device.len();
    let mut model = vec![0u8; len as usize];
    device.read_at(0, &mut model).unwrap();
    let mut rng = SimRng::new(seed);
    for step in 0..steps {
        let offset = rng.in_range(0..len);
        let size = rng.in_range(0..(len - offset + 1).min(20_000)) as usize;
        let range = offset as usize..offset as usize + size;
        if rng.in_range(0..2) == 0 {
            let bytes: Vec<u8> = (0..size).map(|_| rng.next_u64() as u8).collect();
            device.write_at(offset, &bytes).unwrap();
            model[range].copy_from_slice(&bytes);
        } else {
            let mut back = vec![0; size];
            device.read_at(offset, &mut back).unwrap();
            assert!(back == model[range], "seed {seed} step {step}: {size} bytes at {offset} differ");
        }
    }
    let mut all = vec![0; len as usize];
    device.read_at(0, &mut all).unwrap();
    assert!(all == model, "seed {seed}: the end differs");
    assert_eq!(device.len(), len, "seed {seed}: the length changed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_alignment_is_served(seed: u64, len in 1u64..100_000, direct: bool) {
        let dir = tempfile::tempdir().unwrap();
        let options = DeviceOptions { direct, read_only: false };
        // A length that is no multiple of a block: the last block is written whole and cut off again.
        let device = FileDevice::create(dir.path().join("f"), len, &options).unwrap();
        against_a_model(&device, seed, 60);
    }
}

#[test]
fn a_simulated_device_serves_any_alignment_too() {
    against_a_model(&SimDevice::new(100 << 10, SimOptions::default()).unwrap(), 11, 300);
}

#[test]
fn concurrent_partial_writes_of_one_block_do_not_undo_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let device = FileDevice::create(dir.path().join("f"), 4096, &DeviceOptions::default()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let device = &device;
            scope.spawn(move || {
                for i in (usize::from(thread)..4096).step_by(4 * 16) {
                    device.write_at(i as u64, &[thread + 1]).unwrap();
                }
            });
        }
    });
    let mut back = [0; 4096];
    device.read_at(0, &mut back).unwrap();
    for (i, &b) in back.iter().enumerate() {
        let expected = if i % 64 < 4 { (i % 64) as u8 + 1 } else { 0 };
        assert_eq!(b, expected, "byte {i}");
    }
}

#[test]
fn a_created_file_has_its_space_and_an_existing_one_is_not_overwritten() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let device = FileDevice::create(&path, 1 << 20, &DeviceOptions::default()).unwrap();
    assert_eq!((device.len(), device.kind()), (1 << 20, DeviceKind::File));
    assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= 1 << 20, "not preallocated");
    device.write_at(0, b"precious").unwrap();
    let error = FileDevice::create(&path, 4096, &DeviceOptions::default()).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EEXIST));
    assert!(std::fs::read(&path).unwrap().starts_with(b"precious"));
    device.allocate(2 << 20).unwrap();
    assert_eq!(device.len(), 2 << 20);
    device.allocate(4096).unwrap();
    assert_eq!(device.len(), 2 << 20, "allocate never shrinks");
    device.set_len(5000).unwrap();
    assert_eq!(device.len(), 5000);
}

#[test]
fn a_file_that_cannot_be_allocated_is_not_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let error = FileDevice::create(&path, 1 << 60, &DeviceOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(!path.exists());
}

#[test]
fn from_file_sets_direct_io_as_told_and_keeps_the_access_mode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, vec![1; 8192]).unwrap();
    let direct =
        FileDevice::from_file(File::options().read(true).write(true).open(&path).unwrap(), "f", true)
            .unwrap();
    assert!(direct.alignment() >= 512);
    direct.write_at(1, &[2]).unwrap();
    let plain = FileDevice::from_file(File::open(&path).unwrap(), "f", false).unwrap();
    assert_eq!(plain.alignment(), 1);
    assert!(plain.read_only());
    let mut back = [0; 3];
    plain.read_at(0, &mut back).unwrap();
    assert_eq!(back, [1, 2, 1]);
    assert_eq!(plain.write_at(0, &[0]).unwrap_err().kind(), ErrorKind::PermissionDenied);
    let directory = FileDevice::from_file(File::open(dir.path()).unwrap(), "d", false);
    assert_eq!(directory.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn what_is_no_device_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let kind = |path: &Path| {
        let error = nvme::open(path, &READ_ONLY).unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        error.kind()
    };
    assert_eq!(kind(dir.path()), ErrorKind::Unsupported);
    assert_eq!(kind(&dir.path().join("missing")), ErrorKind::NotFound);
    assert_eq!(kind(Path::new("/dev/null")), ErrorKind::Unsupported);
    let block = BlockDevice::open(
        File::create(dir.path().join("f")).map(|_| dir.path().join("f")).unwrap(),
        &READ_ONLY,
    );
    assert_eq!(block.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn read_only_is_kept_and_ranges_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, vec![9; 4096]).unwrap();
    let device = nvme::open(&path, &READ_ONLY).unwrap();
    let kind = |result: nvme::Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(device.write_at(0, &[0])), ErrorKind::PermissionDenied);
    assert_eq!(kind(device.discard(0, 4096)), ErrorKind::PermissionDenied);
    assert_eq!(kind(device.read_at(4090, &mut [0; 7])), ErrorKind::OutOfRange);
    assert_eq!(kind(device.read_at(u64::MAX, &mut [0; 7])), ErrorKind::OutOfRange);
    device.read_at(4096, &mut []).unwrap();
    device.flush().unwrap();
    // Root may open anything; for others the mode counts.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    if File::open(&path).is_err() {
        assert_eq!(nvme::open(&path, &READ_ONLY).unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    let writable = nvme::open(Path::new("/proc/version"), &DeviceOptions::default());
    assert!(matches!(
        writable.unwrap_err().kind(),
        ErrorKind::PermissionDenied | ErrorKind::Unsupported | ErrorKind::Io | ErrorKind::Invalid
    ));
}

#[test]
fn a_growing_file_becomes_readable_and_appends_stay_within_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, vec![1; 4096]).unwrap();
    let device: Arc<dyn Device> = Arc::new(FileDevice::open(&path, &BUFFERED).unwrap());
    assert_eq!(device.write_at(4096, &[1]).unwrap_err().kind(), ErrorKind::OutOfRange);
    File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
    device.write_at(4096, &[1]).unwrap();
    let mut queue = Queue::builder().depth(1).build().unwrap();
    File::options().write(true).open(&path).unwrap().set_len(16384).unwrap();
    let done = queue.run(vec![Op::read(device, 12288, Buffer::heap(4096).unwrap())]).unwrap().remove(0);
    assert_eq!(done.result.unwrap(), 4096);
}

/// A loop device over a file, detached at the end.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &Path, flags: &[&str]) -> Option<Loop> {
        let out = Command::new("losetup").args(["--find", "--show"]).args(flags).arg(file).output();
        match out {
            Ok(out) if out.status.success() => Some(Loop(String::from_utf8_lossy(&out.stdout).trim().into())),
            Ok(out) => {
                eprintln!("skipped: no loop device: {}", String::from_utf8_lossy(&out.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("skipped: no loop device: losetup: {error}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

fn image(dir: &tempfile::TempDir, len: u64) -> PathBuf {
    let path = dir.path().join("image");
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

#[test]
fn a_block_device_is_measured_claimed_written_and_discarded() {
    let dir = tempfile::tempdir().unwrap();
    for sector in [512u32, 4096] {
        let image = image(&dir, 8 << 20);
        let Some(disk) = Loop::attach(&image, &["--sector-size", &sector.to_string()]) else { return };
        let device = nvme::open(&disk.0, &DeviceOptions::default()).unwrap();
        assert_eq!((device.kind(), device.len(), device.lba_size()), (DeviceKind::Block, 8 << 20, sector));
        assert!(device.optimal_transfer() >= 4096 && device.optimal_transfer() <= device.max_transfer());
        // Claimed: neither a second writer nor mkfs may have it; a reader may look.
        let second = BlockDevice::open(&disk.0, &DeviceOptions::default()).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::Busy, "{second}");
        let reader = BlockDevice::open(&disk.0, &READ_ONLY).unwrap();
        assert_eq!(reader.write_at(0, &[0]).unwrap_err().kind(), ErrorKind::PermissionDenied);
        drop(reader);

        let mut queue = Queue::builder().depth(8).build().unwrap();
        let block = |i: u64| {
            let mut buffer = Buffer::heap(64 << 10).unwrap();
            buffer.fill(i as u8 + 1);
            Op::write(device.clone(), i * (64 << 10), buffer)
        };
        let mut ops: Vec<Op> = (0..16).map(block).collect();
        ops.push(Op::discard(device.clone(), 4 << 20, 64 << 10));
        for done in queue.run(ops).unwrap() {
            done.result.unwrap();
        }
        queue.run(vec![Op::flush(device.clone())]).unwrap().remove(0).result.unwrap();
        device.discard(64 << 10, 64 << 10).unwrap();
        let mut back = vec![0; 192 << 10];
        device.read_at(0, &mut back).unwrap();
        assert!(back[..64 << 10].iter().all(|&b| b == 1) && back[128 << 10..].iter().all(|&b| b == 3));
        let past = queue.push(Op::read(device.clone(), 8 << 20, Buffer::heap(4096).unwrap())).unwrap_err();
        assert_eq!(past.error.kind(), ErrorKind::OutOfRange);
        against_a_model(&*device, u64::from(sector), 40);
        drop(queue);
    }
}

#[test]
fn a_write_protected_block_device_is_refused_for_writing_only() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Loop::attach(&image(&dir, 1 << 20), &["--read-only"]) else { return };
    let error = nvme::open(&disk.0, &DeviceOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    assert_eq!(nvme::open(&disk.0, &READ_ONLY).unwrap().len(), 1 << 20);
}
