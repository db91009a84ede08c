//! How fast, and at what CPU cost, one queue reads or writes a file: for comparing with fio.
//!
//! ```text
//! cargo run --release -p nvtier-nvme --example qd -- FILE read|write|randread BS DEPTH SECONDS [threads] [nofixed] [nofiles] [lat]
//! fio --name=x --filename=FILE --rw=read --bs=1m --iodepth=32 --ioengine=io_uring --direct=1 --time_based --runtime=5
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme::{Arena, ArenaOptions, Backend, Device, DeviceOptions, ErrorKind, Op, Queue, SimRng, Verb};

fn cpu_seconds() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name in parentheses: utime and stime are fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0) / 100.0;
    (ticks(11), ticks(12))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, path, rw, bs, depth, seconds, flags @ ..] = &args[..] else {
        return Err(
            "usage: qd FILE read|write|randread BS DEPTH SECONDS [threads] [nofixed] [nofiles] [lat]".into(),
        );
    };
    let (bs, depth): (usize, usize) = (bs.parse()?, depth.parse()?);
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    let verb = if rw == "write" { Verb::Write } else { Verb::Read };
    let device: Arc<dyn Device> =
        nvme::open(path, &DeviceOptions { direct: true, read_only: verb == Verb::Read })?;
    let blocks = device.len() / bs as u64;
    let arena = Arena::new(bs * depth, ArenaOptions::default())?;
    let mut queue = Queue::builder()
        .depth(depth as u32)
        .arena((!has("nofixed")).then_some(&arena))
        .backend(if has("threads") { Backend::Threads } else { Backend::Auto })
        .register_files(!has("nofiles"))
        .measure_latency(has("lat"))
        .build()?;
    if let Some(note) = queue.note() {
        eprintln!("{note}");
    }
    let mut rng = SimRng::new(1);
    let mut next = 0u64;
    let mut offset = || {
        let block = if rw == "randread" { rng.in_range(0..blocks) } else { next % blocks };
        next += 1;
        block * bs as u64
    };
    let mut idle: Vec<Op> = Vec::with_capacity(depth);
    for _ in 0..depth {
        let mut buffer = arena.alloc(bs).ok_or("arena too small")?;
        buffer.fill(0x5a);
        idle.push(Op { verb, ..Op::read(device.clone(), 0, buffer) });
    }
    let (started, cpu) = (Instant::now(), cpu_seconds());
    let limit = Duration::from_secs_f64(seconds.parse()?);
    let (mut bytes, mut count, mut failed) = (0u64, 0u64, None);
    while started.elapsed() < limit {
        for mut op in idle.drain(..) {
            op.offset = offset();
            queue.push(op)?;
        }
        if has("submit") {
            queue.submit()?;
        }
        queue.wait(1)?;
        queue.reap(|done| {
            match done.result {
                Ok(moved) => bytes += moved as u64,
                Err(error) if error.kind() != ErrorKind::Timeout => failed = Some(error),
                Err(_) => {}
            }
            count += 1;
            idle.push(done.op);
        });
        if let Some(error) = failed.take() {
            return Err(error.into());
        }
    }
    let (elapsed, end) = (started.elapsed().as_secs_f64(), cpu_seconds());
    let (user, system) = (end.0 - cpu.0, end.1 - cpu.1);
    let gb = bytes as f64 / 1e9;
    println!(
        "{} fixed={} {:.3} GB/s {:.0} IOPS user {user:.2} s sys {system:.2} s = {:.4} CPU s/GB {:.2} CPU us/op",
        queue.backend(),
        queue.has_fixed_buffers(),
        gb / elapsed,
        count as f64 / elapsed,
        (user + system) / gb,
        (user + system) * 1e6 / count as f64,
    );
    Ok(())
}
