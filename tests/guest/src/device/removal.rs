//! A drive that goes away while it is used, and comes back.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use engine::{FormatOptions, Pool, Session, SessionOptions, WriterOptions};
use nvme::{Backend, Buffer, Device, DeviceOptions, ErrorKind, Op, Queue};

use super::{node, open, output};
use crate::report::{Checked, Report, chain, ensure};
use crate::workload;

/// How long anything may take before it counts as a hang: more than the driver's own limit of 30 s.
const LIMIT: Duration = Duration::from_secs(45);
const SEED: u64 = 7;

pub fn run(report: &mut Report) {
    report.check("reads_of_a_removed_drive_end_as_errors_by_both_ways", || reads(&["r-ng", "r"]));
    report.check("writes_to_a_removed_drive_say_that_it_is_gone", writes);
    report.check("a_striped_pool_finds_a_member_that_came_back_under_another_name", renamed);
    report.check("a_pool_whose_drive_is_removed_fails_and_keeps_its_commits_when_it_is_back", pool);
}

/// The controller's device on the PCI bus.
fn pci(name: &str) -> Checked<PathBuf> {
    let controller = node(&format!("{name}-ctrl"))?;
    let controller = controller.file_name().ok_or("no name")?;
    Ok(std::fs::canonicalize(Path::new("/sys/class/nvme").join(controller).join("device"))?)
}

fn remove(device: &Path) -> Checked {
    Ok(std::fs::write(device.join("remove"), "1")?)
}

/// Scans the bus again until the drive is back.
fn replug(name: &str) -> Checked {
    std::fs::write("/sys/bus/pci/rescan", "1")?;
    let started = Instant::now();
    loop {
        output("sh", &["/bin/name-drives"])?;
        if node(name).is_ok() && node(&format!("{name}-ng")).is_ok() {
            return Ok(());
        }
        ensure(started.elapsed() < LIMIT, || "the drive did not come back".into())?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn reads(names: &[&str]) -> Checked {
    for name in names {
        for backend in [Backend::IoUring, Backend::Threads] {
            let device = open(name, true)?;
            let bus = pci("r")?;
            let reads = Arc::new(AtomicU64::new(0));
            let (sender, ended) = mpsc::channel();
            let reader = std::thread::spawn({
                let (device, reads) = (device.clone(), reads.clone());
                move || {
                    let _ = sender.send(until_error(device, backend, &reads).map_err(|error| chain(&*error)));
                }
            });
            let started = Instant::now();
            while reads.load(Ordering::Relaxed) < 50 {
                ensure(started.elapsed() < LIMIT && !reader.is_finished(), || {
                    "the reads did not begin".into()
                })?;
                std::thread::sleep(Duration::from_millis(5));
            }
            remove(&bus)?;
            let error = ended
                .recv_timeout(LIMIT)
                .map_err(|_| format!("reads of {name} through {backend} hang"))??;
            let text = chain(&error);
            ensure(
                matches!(error.kind(), ErrorKind::Gone | ErrorKind::Io | ErrorKind::ShortTransfer),
                || text.clone(),
            )?;
            // And it stays so, by the blocking call as well.
            let again = device.read_at(0, &mut [0; 4096]);
            ensure(again.is_err(), || format!("{name}: a read of a drive that is gone succeeded"))?;
            println!(
                "  {name} through {backend}: {text}; then: {}",
                again.err().map_or_else(String::new, |error| chain(&error))
            );
            drop(device);
            replug("r")?;
            open(name, true)?.read_at(0, &mut [0; 4096])?;
        }
    }
    Ok(())
}

/// The kernel answers ENOSPC for a block device that is gone, which is not to be taken for a full one.
fn writes() -> Checked {
    for name in ["r-ng", "r"] {
        let device = open(name, false)?;
        device.write_at(0, &[1; 4096])?;
        remove(&pci("r")?)?;
        let mut failures = super::faults::failures(&device, 8192, true)?;
        // Less than a block as well: it is read first.
        failures.extend(device.write_at(100, &[1; 10]).err());
        for error in &failures {
            ensure(error.kind() == ErrorKind::Gone, || chain(error))?;
        }
        ensure(failures.len() == 4, || format!("{name}: a write to a drive that is gone succeeded"))?;
        ensure(device.flush().is_err(), || format!("{name}: a flush of a drive that is gone succeeded"))?;
        println!("  {name}: {}", chain(&failures[0]));
        drop(device);
        replug("r")?;
    }
    Ok(())
}

/// Reads until that fails; the failure.
fn until_error(device: Arc<dyn Device>, backend: Backend, reads: &AtomicU64) -> Checked<nvme::Error> {
    let mut queue = Queue::builder().depth(8).backend(backend).build()?;
    for round in 0_u64.. {
        let ops = (0..8).map(|index| {
            let offset = (round * 8 + index) % 1000 * 4096;
            Ok(Op::read(device.clone(), offset, Buffer::heap(4096)?))
        });
        for done in queue.run(ops.collect::<Checked<_>>()?)? {
            match done.result {
                Ok(4096) => reads.fetch_add(1, Ordering::Relaxed),
                Ok(len) => return Err(format!("a read of {len} bytes succeeded").into()),
                Err(error) => return Ok(error),
            };
        }
    }
    unreachable!("an endless loop")
}

/// What is plugged in again while its old node is held gets another number.
fn renamed() -> Checked {
    let (a, was) = (node("a")?, node("r")?);
    let pool = Path::new("/tmp/renamed");
    let options =
        FormatOptions { members: vec![a.clone(), was.clone()], force: true, ..FormatOptions::default() };
    Pool::format(pool, &options)?;
    let bytes = nvtier_tests::pattern(3, 9_000_000);
    let session = Session::open(pool, SessionOptions::default())?;
    let mut writer = session.writer("x", None, WriterOptions::default())?;
    writer.write_all(&bytes)?;
    writer.commit()?;
    session.close()?;
    let held = open("r-ng", true)?;
    remove(&pci("r")?)?;
    replug("r")?;
    let is = node("r")?;
    ensure(is != was, || format!("{} kept its name", is.display()))?;
    for path in [pool, &a, &is] {
        let session = Session::open(path, SessionOptions::default())?;
        let reader = session.reader("x")?;
        let mut back = vec![0; bytes.len()];
        reader.read_exact_at(0, &mut back)?;
        ensure(back == bytes, || format!("other bytes by {}", path.display()))?;
        drop(reader);
        session.close()?;
    }
    drop(held);
    Ok(())
}

fn pool() -> Checked {
    let path = node("r")?;
    nvme::open(&path, &DeviceOptions::default())?.discard(0, 96 << 20)?;
    let bus = pci("r")?;
    // In a process of its own, as a machine's writer is.
    let mut child = std::process::Command::new("/proc/self/exe")
        .args(["write", &path.to_string_lossy(), &u64::MAX.to_string(), &SEED.to_string()])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().ok_or("no pipe")?;
    let (mut acked, mut removed) = (None, false);
    for line in std::io::BufRead::lines(std::io::BufReader::new(out)) {
        let line = line?;
        let mut words = line.split(' ');
        if words.next() == Some("acked") {
            acked = words.next().and_then(|version| version.parse::<u64>().ok());
        }
        if !removed && acked >= Some(20) {
            removed = true;
            remove(&bus)?;
        }
    }
    // The end of its output is the end of it; if not, it hangs.
    let started = Instant::now();
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if started.elapsed() > LIMIT => {
                child.kill()?;
                return Err("the writer hangs without its drive".into());
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().ok_or("no pipe")?, &mut said)?;
    ensure(status.code() == Some(1) && !said.contains("panicked"), || {
        format!("the writer ended with {status}: {said}")
    })?;
    ensure(removed, || format!("the writer ended before its drive was removed: {said}"))?;
    // What was in flight fails with EIO, what came later because the drive is gone; never as if the pool were full.
    ensure((said.contains("gone") || said.contains("os error 5")) && !said.contains("no space"), || {
        format!("the writer does not say what happened: {said}")
    })?;
    println!("  the writer, after version {acked:?}: {}", said.trim());
    replug("r")?;
    let newest = workload::check(&node("r")?, acked, SEED)?;
    println!("  back: {newest:?}");
    Ok(())
}
