//! The queue on real descriptors: O_DIRECT files and pipes, every backend the same.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{PipeReader, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nvme::{
    Arena, ArenaOptions, Backend, Buffer, Completion, Device, DeviceKind, DeviceOptions, Error, ErrorKind,
    FileDevice, Op, Queue, Result, SimDecision, SimDevice, SimHook, SimIo, SimOptions, SimRng, Target, Verb,
    with_thread_queue,
};

/// Every backend that this machine allows.
fn backends() -> Vec<Backend> {
    match Queue::builder().backend(Backend::IoUring).depth(1).build() {
        Ok(_) => vec![Backend::IoUring, Backend::Threads],
        Err(error) => {
            eprintln!("skipped: the io_uring half of this test: {error}");
            vec![Backend::Threads]
        }
    }
}

fn queue(backend: Backend, depth: u32, arena: Option<&Arena>) -> Queue {
    Queue::builder().backend(backend).depth(depth).arena(arena).build().unwrap()
}

fn arena(bytes: usize) -> Arena {
    Arena::new(bytes, ArenaOptions::default()).unwrap()
}

fn file(dir: &tempfile::TempDir, len: u64) -> Arc<dyn Device> {
    Arc::new(FileDevice::create(dir.path().join("file"), len, &DeviceOptions::default()).unwrap())
}

/// Bytes that differ everywhere and by seed.
fn pattern(seed: u64, offset: u64, buf: &mut [u8]) {
    for (i, chunk) in buf.chunks_mut(8).enumerate() {
        let value = SimRng::new(seed ^ (offset + 8 * i as u64)).next_u64().to_le_bytes();
        chunk.copy_from_slice(&value[..chunk.len()]);
    }
}

fn expect(seed: u64, offset: u64, buf: &[u8]) {
    let mut want = vec![0; buf.len()];
    pattern(seed, offset, &mut want);
    assert!(buf == want, "bytes at {offset} differ");
}

#[test]
fn what_is_written_is_read_back_whatever_the_backend_and_the_memory() {
    let seed = 0x5eed;
    for backend in backends() {
        for from_arena in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let (len, bs) = (6u64 << 20, 192 << 10);
            let device = file(&dir, len);
            let arena = arena(4 << 20);
            let mut queue = queue(backend, 7, Some(&arena));
            assert_eq!(queue.backend(), backend);
            let memory = || match from_arena {
                true => arena.alloc(bs).unwrap(),
                false => Buffer::heap(bs).unwrap(),
            };
            let offsets = (0..len).step_by(bs);
            for batch in offsets.clone().collect::<Vec<_>>().chunks(16) {
                let ops = batch.iter().map(|&offset| {
                    let mut buffer = memory();
                    pattern(seed, offset, &mut buffer);
                    Op::write(device.clone(), offset, buffer).tag(offset)
                });
                for done in queue.run(ops.collect()).unwrap() {
                    assert_eq!(done.result.unwrap(), bs);
                    assert_eq!((done.tag, done.op.tag), (done.op.offset, done.op.offset));
                }
            }
            let flushed = queue.run(vec![Op::flush(device.clone()).tag(9)]).unwrap();
            assert_eq!((flushed[0].tag, *flushed[0].result.as_ref().unwrap()), (9, 0));
            for batch in offsets.collect::<Vec<_>>().chunks(16) {
                let ops = batch.iter().map(|&offset| Op::read(device.clone(), offset, memory()).tag(offset));
                let all = queue.run(ops.collect()).unwrap();
                assert_eq!(
                    all.iter().map(|done| done.tag).collect::<Vec<_>>(),
                    batch,
                    "not in the order of the ops"
                );
                for done in &all {
                    assert_eq!(*done.result.as_ref().unwrap(), bs);
                    expect(seed, done.tag, done.op.buffer.as_ref().unwrap());
                }
            }
            assert_eq!(arena.free_bytes(), arena.len());
        }
    }
}

#[test]
fn an_arena_that_was_not_prefaulted_is_registered_as_it_is_used() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 24 << 20);
        let mut bytes = vec![0; 24 << 20];
        pattern(6, 0, &mut bytes);
        device.write_at(0, &bytes).unwrap();
        let arena = Arena::new(96 << 20, ArenaOptions { prefault: false, ..Default::default() }).unwrap();
        let mut queue = queue(backend, 4, Some(&arena));
        // Buffers of 24 MiB: the second lies in two parts of 32 MiB, and so does the third.
        let read = |_| Op::read(device.clone(), 0, arena.alloc(24 << 20).unwrap());
        for done in queue.run((0..4).map(read).collect()).unwrap() {
            assert_eq!(done.result.unwrap(), 24 << 20);
            assert!(done.op.buffer.unwrap()[..] == bytes[..]);
        }
        // Ordinary users may lock little memory: then it goes on without, and says so.
        assert_eq!(queue.has_fixed_buffers(), backend == Backend::IoUring && queue.note().is_none());
    }
}

#[test]
fn a_part_of_a_buffer_can_be_moved() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 64 << 10);
        let mut written = vec![0; 64 << 10];
        pattern(1, 0, &mut written);
        device.write_at(0, &written).unwrap();
        let arena = arena(1 << 20);
        let mut queue = queue(backend, 4, Some(&arena));
        let buffer = arena.alloc(32 << 10).unwrap();
        let done = queue.run(vec![Op::read(device, 16 << 10, buffer).range(4096..12288)]).unwrap().remove(0);
        assert_eq!(done.result.unwrap(), 8192);
        let buffer = done.op.buffer.unwrap();
        expect(1, 16 << 10, &buffer[4096..12288]);
        assert!(
            buffer[..4096].iter().chain(&buffer[12288..]).all(|&b| b == 0),
            "bytes outside the range changed"
        );
    }
}

#[test]
fn a_refused_operation_comes_back_with_its_reason() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 64 << 10);
        let path = dir.path().join("file");
        let read_only: Arc<dyn Device> = Arc::new(
            FileDevice::open(path, &DeviceOptions { read_only: true, ..Default::default() }).unwrap(),
        );
        let mut queue = queue(backend, 2, None);
        let buffer = || Buffer::heap(4096).unwrap();
        let mut refused = |op: Op, kind: ErrorKind| {
            let (tag, had) = (op.tag, op.buffer.as_ref().map(|b| b.as_ptr()));
            let refused = queue.push(op).unwrap_err();
            assert_eq!(refused.error.kind(), kind, "{}", refused.error);
            assert_eq!((refused.op.tag, refused.op.buffer.as_ref().map(|b| b.as_ptr())), (tag, had));
        };
        refused(Op::read(device.clone(), 100, buffer()).tag(1), ErrorKind::Misaligned);
        refused(Op::read(device.clone(), 0, buffer()).range(0..100).tag(2), ErrorKind::Misaligned);
        refused(Op::read(device.clone(), 0, buffer()).range(4..4096).tag(3), ErrorKind::Misaligned);
        refused(Op::read(device.clone(), 0, buffer()).range(0..8192), ErrorKind::Invalid);
        refused(Op::read(device.clone(), 0, buffer()).range(5..5), ErrorKind::Invalid);
        refused(Op { buffer: None, ..Op::read(device.clone(), 0, buffer()) }, ErrorKind::Invalid);
        refused(Op::read(device.clone(), 64 << 10, buffer()), ErrorKind::OutOfRange);
        refused(Op::write(device.clone(), (64 << 10) - 512, buffer()), ErrorKind::OutOfRange);
        refused(Op::write(device.clone(), u64::MAX - 4095, buffer()), ErrorKind::OutOfRange);
        refused(Op::discard(device.clone(), 60 << 10, 8192), ErrorKind::OutOfRange);
        refused(Op::write(read_only.clone(), 0, buffer()), ErrorKind::PermissionDenied);
        refused(Op::discard(read_only.clone(), 0, 4096), ErrorKind::PermissionDenied);
        queue.push(Op::read(device.clone(), 0, buffer())).unwrap();
        queue.push(Op::read(device.clone(), 4096, buffer())).unwrap();
        let full = queue.push(Op::read(device.clone(), 8192, buffer()).tag(77)).unwrap_err();
        assert!(full.error.kind().is_queue_full());
        assert_eq!(full.op.tag, 77);
        queue.wait(2).unwrap();
        assert_eq!(queue.reap(|done| assert_eq!(done.result.unwrap(), 4096)), 2);
        queue.push(full.op).unwrap();
        queue.wait(1).unwrap();
        assert_eq!(queue.reap(|done| assert_eq!(done.tag, 77)), 1);
    }
}

#[test]
fn a_refusal_inside_a_batch_is_its_completion() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 64 << 10);
        let mut queue = queue(backend, 2, None);
        let op = |offset| Op::read(device.clone(), offset, Buffer::heap(4096).unwrap()).tag(offset);
        let all = queue.run(vec![op(0), op(1), op(4096), op(1 << 30), op(8192), op(12288)]).unwrap();
        let kinds: Vec<_> = all.iter().map(|done| done.result.as_ref().err().map(Error::kind)).collect();
        assert_eq!(kinds, [None, Some(ErrorKind::Misaligned), None, Some(ErrorKind::OutOfRange), None, None]);
        assert_eq!(all.iter().map(|done| done.tag).collect::<Vec<_>>(), [0, 1, 4096, 1 << 30, 8192, 12288]);
        assert!(queue.run(Vec::new()).unwrap().is_empty());
    }
}

#[test]
fn a_read_across_the_end_of_a_file_gives_what_there_is() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("odd");
        let mut bytes = vec![0; 10_000];
        pattern(3, 0, &mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        let device: Arc<dyn Device> = Arc::new(FileDevice::open(&path, &DeviceOptions::default()).unwrap());
        let lba = u64::from(device.lba_size());
        let mut queue = queue(backend, 4, None);
        let span = 10_000u64.next_multiple_of(lba) as usize;
        let buffer = Buffer::heap(16 << 10).unwrap();
        let done = queue.run(vec![Op::read(device.clone(), 0, buffer).range(0..span)]).unwrap().remove(0);
        assert_eq!(done.result.unwrap(), 10_000);
        expect(3, 0, &done.op.buffer.unwrap()[..10_000]);
        // The file shrinks behind our back: what is missing is an error, never a success.
        File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
        let buffer = Buffer::heap(16 << 10).unwrap();
        let done = queue.run(vec![Op::read(device.clone(), 0, buffer).range(0..8192)]).unwrap().remove(0);
        assert_eq!(done.result.unwrap_err().kind(), ErrorKind::ShortTransfer);
        assert!(done.op.buffer.is_some());
    }
}

#[test]
fn a_discarded_range_reads_as_zeros() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 256 << 10);
        device.write_at(0, &vec![7; 256 << 10]).unwrap();
        let mut queue = queue(backend, 4, None);
        let done = queue.run(vec![Op::discard(device.clone(), 64 << 10, 128 << 10)]).unwrap().remove(0);
        assert_eq!(done.result.unwrap(), 128 << 10);
        let mut back = vec![1; 256 << 10];
        device.read_at(0, &mut back).unwrap();
        let hole = 64 << 10..192 << 10;
        assert!(back.iter().enumerate().all(|(i, &b)| b == if hole.contains(&i) { 0 } else { 7 }));
    }
}

/// The read end of a pipe: gives few bytes at a time, and hangs while it is empty.
#[derive(Debug)]
struct Pipe(PipeReader);

impl Device for Pipe {
    fn kind(&self) -> DeviceKind {
        DeviceKind::File
    }
    fn name(&self) -> &str {
        "pipe"
    }
    fn len(&self) -> u64 {
        1 << 40
    }
    fn lba_size(&self) -> u32 {
        512
    }
    fn alignment(&self) -> u32 {
        1
    }
    fn max_transfer(&self) -> u32 {
        3000
    }
    fn read_only(&self) -> bool {
        true
    }
    fn target(&self) -> Target<'_> {
        Target::Fd(self.0.as_fd())
    }
    fn read_at(&self, _: u64, _: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "a pipe"))
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "a pipe"))
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

#[test]
fn short_transfers_are_continued() {
    if !backends().contains(&Backend::IoUring) {
        return; // said aloud by backends(); pread does not work on pipes
    }
    let (reader, mut writer) = std::io::pipe().unwrap();
    let device: Arc<dyn Device> = Arc::new(Pipe(reader));
    let arena = arena(1 << 20);
    let mut queue = queue(Backend::IoUring, 4, Some(&arena));
    let mut bytes = vec![0; 8192];
    pattern(5, 0, &mut bytes);
    queue.push(Op::read(device, 0, arena.alloc(8192).unwrap())).unwrap();
    // Each piece is its own short transfer, since the queue takes it before the next is written.
    for piece in bytes.chunks(777) {
        writer.write_all(piece).unwrap();
        queue.wait(0).unwrap();
    }
    queue.wait(1).unwrap();
    assert_eq!(
        queue.reap(|done| {
            assert_eq!(done.result.unwrap(), 8192);
            expect(5, 0, &done.op.buffer.unwrap());
        }),
        1
    );
}

#[test]
fn submitting_and_reaping_makes_progress_without_waiting() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 1 << 20);
        let mut queue = queue(backend, 4, None);
        let mut done = 0;
        for block in (0..256u64).cycle() {
            match queue.push(Op::read(device.clone(), block * 4096, Buffer::heap(4096).unwrap())) {
                Ok(()) => {}
                // Full for ever would be a test that never ends: the run's own limit catches that.
                Err(refused) => assert!(refused.error.kind().is_queue_full()),
            }
            queue.submit().unwrap();
            done += queue.reap(|completion| assert_eq!(completion.result.unwrap(), 4096));
            if done >= 1000 {
                break;
            }
        }
    }
}

#[test]
fn the_end_of_the_data_is_an_error_not_a_success() {
    if !backends().contains(&Backend::IoUring) {
        return; // said aloud by backends()
    }
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut queue = queue(Backend::IoUring, 4, None);
    writer.write_all(b"half").unwrap();
    drop(writer);
    let op = Op::read(Arc::new(Pipe(reader)), 0, Buffer::heap(4096).unwrap());
    let done = queue.run(vec![op]).unwrap().remove(0);
    assert_eq!(done.result.unwrap_err().kind(), ErrorKind::ShortTransfer);
}

#[test]
fn an_operation_that_hangs_is_cancelled_at_its_deadline_and_gives_its_memory_back() {
    if !backends().contains(&Backend::IoUring) {
        return; // said aloud by backends()
    }
    let (reader, writer) = std::io::pipe().unwrap();
    let arena = arena(1 << 20);
    let builder = Queue::builder().backend(Backend::IoUring).arena(Some(&arena));
    let mut queue = builder.deadline(Duration::from_millis(20)).build().unwrap();
    let pipe: Arc<dyn Device> = Arc::new(Pipe(reader));
    let done =
        queue.run(vec![Op::read(pipe.clone(), 0, arena.alloc(4096).unwrap()).tag(4)]).unwrap().remove(0);
    assert_eq!(done.result.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(done.tag, 4);
    assert!(done.op.buffer.is_some(), "a read of a pipe can be cancelled");
    drop(done.op);
    // The queue goes on working.
    let dir = tempfile::tempdir().unwrap();
    let done = queue.run(vec![Op::read(file(&dir, 4096), 0, arena.alloc(4096).unwrap())]).unwrap().remove(0);
    assert_eq!(done.result.unwrap(), 4096);
    // Dropping it with another such read in flight ends, and returns the memory.
    queue.push(Op::read(pipe, 0, arena.alloc(4096).unwrap())).unwrap();
    queue.submit().unwrap();
    drop(queue);
    drop(done.op);
    assert_eq!(arena.free_bytes(), arena.len());
    drop(writer);
}

/// A device of which one flush hangs until told otherwise.
#[derive(Debug)]
struct Stuck {
    file: File,
    released: Mutex<bool>,
    changed: Condvar,
}

impl Device for Stuck {
    fn kind(&self) -> DeviceKind {
        DeviceKind::File
    }
    fn name(&self) -> &str {
        "stuck"
    }
    fn len(&self) -> u64 {
        4096
    }
    fn lba_size(&self) -> u32 {
        512
    }
    fn max_transfer(&self) -> u32 {
        4096
    }
    fn read_only(&self) -> bool {
        false
    }
    fn target(&self) -> Target<'_> {
        Target::Fd(self.file.as_fd())
    }
    fn read_at(&self, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        let mut released = self.released.lock().unwrap();
        while !*released {
            released = self.changed.wait(released).unwrap();
        }
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

#[test]
fn what_cannot_be_cancelled_keeps_its_memory_until_it_answers() {
    let arena = arena(64 << 10);
    let file = tempfile::tempfile().unwrap();
    let device = Arc::new(Stuck { file, released: Mutex::new(false), changed: Condvar::new() });
    let builder = Queue::builder().backend(Backend::Threads).depth(2).deadline(Duration::from_millis(8));
    let mut queue = builder.build().unwrap();
    let op = Op { verb: Verb::Flush, buffer: arena.alloc(4096), ..Op::flush(device.clone()) };
    let done = queue.run(vec![op.tag(3)]).unwrap().remove(0);
    assert_eq!((done.tag, done.result.unwrap_err().kind()), (3, ErrorKind::Timeout));
    assert!(done.op.buffer.is_none(), "the memory is still the device's");
    assert_eq!(arena.free_bytes(), arena.len() - 4096);
    // The second of two slots still works; the first comes back with the answer.
    assert_eq!(queue.in_flight(), 0);
    *device.released.lock().unwrap() = true;
    device.changed.notify_all();
    while arena.free_bytes() != arena.len() {
        queue.run(vec![Op::flush(device.clone())]).unwrap().remove(0).result.unwrap();
    }
}

#[test]
fn dropping_a_queue_finishes_what_was_pushed() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 4 << 20);
        let arena = arena(4 << 20);
        let mut queue = queue(backend, 32, Some(&arena));
        for i in 0..32u64 {
            let mut buffer = arena.alloc(128 << 10).unwrap();
            pattern(8, i * (128 << 10), &mut buffer);
            queue.push(Op::write(device.clone(), i * (128 << 10), buffer)).unwrap();
            if i == 15 {
                queue.submit().unwrap();
            }
        }
        assert_eq!(queue.in_flight(), 32);
        drop(queue);
        assert_eq!(arena.free_bytes(), arena.len());
        let mut back = vec![0; 4 << 20];
        device.read_at(0, &mut back).unwrap();
        expect(8, 0, &back);
    }
}

#[test]
fn a_registered_file_is_let_go_with_its_device() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 4096);
        let path = dir.path().join("file");
        let mut queue = queue(backend, 4, None);
        queue.run(vec![Op::read(device.clone(), 0, Buffer::heap(4096).unwrap())]).unwrap();
        queue.forget(&device);
        drop(device);
        assert!(nobody_writes(&File::open(&path).unwrap()), "{backend}: somebody still holds the file");
    }
}

/// fcntl(2): a read lease is refused (EAGAIN) while the file is open for writing anywhere, in a ring's table too, where
/// /proc/self/fd does not show it.
#[allow(unsafe_code)]
fn nobody_writes(file: &File) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: F_SETLEASE takes an int and touches no memory; the lease ends with the descriptor.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) == 0 }
}

#[test]
fn more_devices_than_registered_slots_take_turns() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let devices: Vec<Arc<dyn Device>> = (0..150u64)
            .map(|i| {
                let path = dir.path().join(i.to_string());
                std::fs::write(&path, vec![i as u8; 4096]).unwrap();
                Arc::new(FileDevice::open(path, &DeviceOptions::default()).unwrap()) as Arc<dyn Device>
            })
            .collect();
        let mut queue = queue(backend, 256, None);
        for _ in 0..2 {
            let read = |(i, device): (usize, &Arc<dyn Device>)| {
                Op::read(device.clone(), 0, Buffer::heap(4096).unwrap()).tag(i as u64)
            };
            for done in queue.run(devices.iter().enumerate().map(read).collect()).unwrap() {
                assert_eq!(done.result.unwrap(), 4096);
                assert!(done.op.buffer.unwrap().iter().all(|&b| b == done.tag as u8));
            }
        }
    }
}

#[test]
fn a_queue_may_be_built_on_one_thread_and_used_on_another() {
    for backend in backends() {
        let dir = tempfile::tempdir().unwrap();
        let device = file(&dir, 4096);
        let arena = arena(64 << 10);
        let mut queue = queue(backend, 4, Some(&arena));
        let buffer = arena.alloc(4096).unwrap();
        let moved = std::thread::spawn(move || {
            queue.run(vec![Op::read(device, 0, buffer)]).unwrap().remove(0).result.unwrap();
            queue
        });
        drop(moved.join().unwrap());
    }
}

#[test]
fn the_thread_queue_is_kept_nests_and_survives_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let device = file(&dir, 64 << 10);
    let arena = arena(1 << 20);
    let read = || Op::read(device.clone(), 0, arena.alloc(4096).unwrap());
    let outer = with_thread_queue(Some(&arena), |queue| {
        queue.push(read()).unwrap();
        let inner = with_thread_queue(Some(&arena), |inner| inner.run(vec![read()]).unwrap().len()).unwrap();
        inner + queue.in_flight()
    });
    assert_eq!(outer.unwrap(), 2);
    assert_eq!(arena.free_bytes(), arena.len(), "what was left in flight is drained");
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        with_thread_queue(Some(&arena), |queue| {
            queue.push(read()).unwrap();
            panic!("on purpose");
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(arena.free_bytes(), arena.len());
    let again = with_thread_queue(None, |queue| queue.run(vec![read(), read()]).unwrap().len());
    assert_eq!(again.unwrap(), 2);
}

/// Short by chance, sometimes an error, sometimes silent.
#[derive(Debug)]
struct Faulty;
impl SimHook for Faulty {
    fn decide(&self, io: &SimIo, rng: &mut SimRng) -> SimDecision {
        match rng.in_range(0..10) {
            0 => SimDecision::Fail(libc::EIO),
            1 => SimDecision::Hang,
            2..6 if io.len > 512 => SimDecision::Short(rng.in_range(1..io.len)),
            _ => SimDecision::Proceed,
        }
    }
}

#[test]
fn a_simulated_device_fails_the_same_way_for_the_same_seed() {
    let run = |seed: u64| -> BTreeMap<u64, std::result::Result<u64, ErrorKind>> {
        let options =
            SimOptions { seed, max_transfer: 8192, hook: Some(Arc::new(Faulty)), ..Default::default() };
        let device: Arc<dyn Device> = Arc::new(SimDevice::new(1 << 20, options).unwrap());
        let mut queue = queue(Backend::Threads, 8, None);
        let write = |i: u64| {
            let mut buffer = Buffer::heap(16 << 10).unwrap();
            pattern(seed, i, &mut buffer);
            Op::write(device.clone(), i * (16 << 10), buffer).tag(i)
        };
        let end = |done: Completion| match done.result {
            Ok(moved) => {
                assert_eq!(moved, 16 << 10, "a short transfer came out as a success");
                (done.tag, Ok(done.latency.as_nanos() as u64))
            }
            Err(error) => (done.tag, Err(error.kind())),
        };
        queue.run((0..64).map(write).collect()).unwrap().into_iter().map(end).collect()
    };
    for seed in 0..20 {
        let ends = run(seed);
        assert_eq!(ends, run(seed), "seed {seed}");
        let has = |kind| ends.values().any(|end| *end == Err(kind));
        assert!(
            has(ErrorKind::Io) && has(ErrorKind::Timeout) && ends.values().any(|end| end.is_ok()),
            "seed {seed}"
        );
    }
    assert_ne!(run(1), run(2));
}

#[test]
fn a_polled_queue_works_or_says_that_the_device_cannot_be_polled() {
    let builder = Queue::builder().backend(Backend::IoUring).iopoll(true).depth(4);
    let mut queue = match builder.build() {
        Ok(queue) => queue,
        Err(error) => {
            eprintln!("skipped: no polled ring: {error}");
            return;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let device = file(&dir, 64 << 10);
    let read = Op::read(device.clone(), 0, Buffer::heap(4096).unwrap()).tag(1);
    let write = Op::write(device.clone(), 4096, Buffer::heap(4096).unwrap()).tag(2);
    let all = queue.run(vec![read, write, Op::flush(device.clone()), Op::discard(device, 0, 4096)]).unwrap();
    for done in &all[..2] {
        match &done.result {
            Ok(moved) => assert_eq!(*moved, 4096),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
        }
    }
    // These a polled ring does not know: the queue executes them itself.
    assert_eq!(*all[2].result.as_ref().unwrap(), 0);
    assert_eq!(*all[3].result.as_ref().unwrap(), 4096);
}

#[test]
fn a_queue_that_moves_to_another_thread_after_its_first_submit_says_so() {
    if !backends().contains(&Backend::IoUring) {
        return; // said aloud by backends(); threads do not care
    }
    let dir = tempfile::tempdir().unwrap();
    let device = file(&dir, 4096);
    let mut queue = queue(Backend::IoUring, 4, None);
    let read = || Op::read(device.clone(), 0, Buffer::heap(4096).unwrap());
    queue.run(vec![read()]).unwrap();
    let op = read();
    let moved =
        std::thread::spawn(move || queue.run(vec![op]).map(|all| all.len()).map_err(|error| error.kind()));
    // Kernels before 6.1 have rings that any thread may use.
    let outcome = moved.join().unwrap();
    assert!(matches!(outcome, Ok(1) | Err(ErrorKind::Invalid)), "{outcome:?}");
}

#[test]
fn senseless_settings_are_refused() {
    let kind = |builder: nvme::QueueBuilder| builder.build().unwrap_err().kind();
    assert_eq!(kind(Queue::builder().depth(0)), ErrorKind::Invalid);
    assert_eq!(kind(Queue::builder().depth(1 << 20)), ErrorKind::Invalid);
    assert_eq!(kind(Queue::builder().deadline(Duration::ZERO)), ErrorKind::Invalid);
}
