//! What watching costs on the hot path: reads of 4 KiB and 128 KiB that the mount serves from its RAM tier, nothing of a drive.
//!
//! Part one prices the parts: the counters and clock of a request, its two spans when nobody listens and when they are logged. Part two
//! runs whole mounts in turns (A B C D E, A B C D E, ...), with the CPU time of the daemon, because rates on a shared machine drift.
//! `OBSERVE_ROUNDS` says how many turns (default 7); `NVTIER_BIN` names the command (default: `target/release/nvtier`).
#![allow(missing_docs)]

use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fuse_fs::fs::{Counters, Operation, Timed};
use rustix::fs::OFlags;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

const REGION: u64 = 64 << 20;

/// Nanoseconds of one call: the best of some runs, since whatever disturbs only adds.
fn price(mut call: impl FnMut(u64)) -> f64 {
    const CALLS: u64 = 200_000;
    let run = |call: &mut dyn FnMut(u64)| {
        let start = Instant::now();
        for index in 0..CALLS {
            call(index);
        }
        start.elapsed().as_nanos() as f64 / CALLS as f64
    };
    (0..9).map(|_| run(&mut call)).fold(f64::INFINITY, f64::min)
}

/// As the adapter and the region's reader make them.
fn spans(offset: u64) {
    let _outer = tracing::trace_span!("fuse_read", fh = 1u64, offset, size = 4096u32).entered();
    let _inner = tracing::trace_span!("region_read", node = 2u64, offset, len = 4096usize).entered();
    black_box(offset);
}

fn parts() {
    let counters = Counters::default();
    let empty = price(|index| {
        black_box(index);
    });
    let counted = price(|index| {
        let running = counters.time(Timed::Read);
        counters.count(Operation::Read, &Ok::<u64, ()>(black_box(index)));
        drop(running);
    });
    let priced = |directives: &str| {
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::builder().parse(directives).expect("directives"))
            .with_span_events(FmtSpan::CLOSE)
            .with_ansi(false)
            .with_target(false)
            .with_writer(Mutex::new(OpenOptions::new().write(true).open("/dev/null").expect("/dev/null")))
            .finish();
        tracing::subscriber::with_default(subscriber, || price(spans))
    };
    println!("counters and clock of a request      {:8.1} ns", counted - empty);
    println!("its two spans, not logged (info)     {:8.1} ns", priced("info") - empty);
    println!("its two spans, logged (trace)        {:8.1} ns", priced("trace") - empty);
}

/// A mounted pool with one region, read once so that the RAM tier holds it.
struct Mount {
    point: PathBuf,
    daemon: Child,
}

/// How it is watched.
#[derive(Clone, Copy, PartialEq)]
enum Watch {
    Silent,
    Default,
    Scraped,
    Debug,
    Traced,
}

const WATCHES: [(Watch, &str); 5] = [
    (Watch::Silent, "NVTIER_LOG=off, no metrics served"),
    (Watch::Default, "as it comes (info)"),
    (Watch::Scraped, "--metrics, scraped each second"),
    (Watch::Debug, "--metrics, scraped; NVTIER_LOG=debug, to a file"),
    (Watch::Traced, "fuse_fs=trace,engine::region_read=trace to a file"),
];

fn nvtier() -> PathBuf {
    std::env::var_os("NVTIER_BIN")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/nvtier"), PathBuf::from)
}

const PORT: &str = "127.0.0.1:19299";

impl Mount {
    fn new(folder: &Path, watch: Watch) -> Mount {
        let point = folder.join("mnt");
        let _ = fs::create_dir(&point);
        let log = File::create(folder.join("log")).expect("a log");
        let mut command = Command::new(nvtier());
        command.arg("mount").arg(folder.join("pool")).arg(&point).args(["--foreground", "--ram", "256MiB"]);
        command
            .env_remove("RUST_LOG")
            .env_remove("NVTIER_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        match watch {
            Watch::Silent => drop(command.env("NVTIER_LOG", "off")),
            Watch::Default => {}
            Watch::Scraped => drop(command.args(["--metrics", PORT])),
            Watch::Debug => drop(command.args(["--metrics", PORT]).env("NVTIER_LOG", "debug")),
            Watch::Traced => drop(command.env("NVTIER_LOG", "fuse_fs=trace,engine::region_read=trace,info")),
        }
        let daemon = command.spawn().expect("nvtier: build it with --release, or set NVTIER_BIN");
        let mount = Mount { point, daemon };
        let start = Instant::now();
        while !mount.point.join(".nvtier").exists() {
            assert!(start.elapsed() < Duration::from_secs(30), "it was not mounted");
            std::thread::sleep(Duration::from_millis(5));
        }
        mount
    }

    /// CPU seconds of all its threads that are alive, from the scheduler's own count.
    fn cpu(&self) -> f64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.daemon.id())).expect("its threads");
        let nanos = tasks.flatten().filter_map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<f64>().ok()
        });
        nanos.sum::<f64>() / 1e9
    }

    /// Reads all of the region in random order; reads a second, and microseconds of the daemon's CPU time a read.
    fn read(&self, bs: usize) -> (f64, f64) {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::DIRECT.bits() as i32)
            .open(self.point.join("f"))
            .expect("the region");
        let mut memory = vec![0; bs + 4096];
        let start = memory.as_ptr().align_offset(4096);
        let buf = &mut memory[start..start + bs];
        let blocks = REGION / bs as u64;
        let reads = blocks.max(16_384);
        let mut pass = |reads: u64| {
            for index in 0..reads {
                let block = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks;
                file.read_exact_at(buf, block * bs as u64).expect("a read");
            }
        };
        pass(blocks);
        let (began, cpu) = (Instant::now(), self.cpu());
        pass(reads);
        let seconds = began.elapsed().as_secs_f64();
        (reads as f64 / seconds, (self.cpu() - cpu) / reads as f64 * 1e6)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new(nvtier()).arg("umount").arg(&self.point).status();
        let _ = self.daemon.wait();
    }
}

fn scrape() -> std::io::Result<usize> {
    let mut stream = TcpStream::connect(PORT)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn mounts(rounds: usize) {
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let pool = folder.path().join("pool");
    let made = Command::new(nvtier()).arg("format").arg(&pool).args(["--raw", "--size", "256MiB"]).status();
    assert!(made.is_ok_and(|status| status.success()), "no pool");
    let source = folder.path().join("f");
    let bytes: Vec<u8> = (0..REGION as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(&source, bytes).expect("a source");
    let filled = Command::new(nvtier()).arg("import").arg(&source).args(["f", "--pool"]).arg(&pool).status();
    assert!(filled.is_ok_and(|status| status.success()), "nothing imported");
    for bs in [4usize << 10, 128 << 10] {
        let mut all = vec![(Vec::new(), Vec::new()); WATCHES.len()];
        for _ in 0..rounds {
            for ((watch, _), (rates, cpus)) in WATCHES.iter().zip(&mut all) {
                let mount = Mount::new(folder.path(), *watch);
                let done = AtomicBool::new(false);
                let (rate, cpu) = std::thread::scope(|scope| {
                    if matches!(watch, Watch::Scraped | Watch::Debug) {
                        scope.spawn(|| {
                            while !done.load(Relaxed) {
                                assert!(scrape().expect("a scrape") > 1000);
                                std::thread::sleep(Duration::from_secs(1));
                            }
                        });
                    }
                    let result = mount.read(bs);
                    done.store(true, Relaxed);
                    result
                });
                rates.push(rate);
                cpus.push(cpu);
            }
        }
        let base = (median(&mut all[0].0), median(&mut all[0].1));
        println!(
            "{} KiB, {rounds} rounds: reads/s (min..max), daemon's CPU us a read, both against the first",
            bs >> 10
        );
        for ((_, name), (rates, cpus)) in WATCHES.iter().zip(&mut all) {
            let (rate, cpu) = (median(rates), median(cpus));
            println!(
                "  {name:50} {rate:9.0} ({:.0}..{:.0}) {:+6.1} %   {cpu:7.2} ({:.2}..{:.2}) {:+6.1} %",
                rates[0],
                rates[rates.len() - 1],
                (rate / base.0 - 1.0) * 100.0,
                cpus[0],
                cpus[cpus.len() - 1],
                (cpu / base.1 - 1.0) * 100.0,
            );
        }
    }
}

fn main() {
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    parts();
    let rounds = std::env::var("OBSERVE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    mounts(rounds);
}
