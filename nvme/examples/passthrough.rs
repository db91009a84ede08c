//! Checks NVMe passthrough on a drive: what `/dev/ngXnY` wrote its block device must read, and the other way round.
//!
//! **It overwrites the start of the namespace.** It needs root. `cargo xtask guest` runs it on emulated drives.
//!
//! ```text
//! cargo run -p nvtier-nvme --example passthrough -- /dev/ng0n1 /dev/nvme0n1
//! ```
//!
//! For both ways of sending commands (io_uring, ioctl), from buffers within and outside a registered arena, at page-aligned and
//! skewed addresses, in sizes from one block to several times the drive's largest transfer (MDTS).

use std::error::Error;
use std::sync::Arc;

use nvme::passthrough::Drive;
use nvme::{Arena, ArenaOptions, Backend, Buffer, Device, DeviceOptions, Op, Queue, SimRng};

type Checked = Result<(), Box<dyn Error>>;

fn main() -> Checked {
    let args: Vec<String> = std::env::args().collect();
    let [_, generic, block] = &args[..] else {
        return Err("usage: passthrough /dev/ngXnY /dev/nvmeXnY (its start is overwritten!)".into());
    };
    describe(generic)?;
    let by_command = nvme::open(generic, &DeviceOptions::default())?;
    // Not for writing: the block device is claimed by the open above.
    let by_block = nvme::open(block, &DeviceOptions { read_only: true, ..DeviceOptions::default() })?;
    println!(
        "{}: {} bytes, blocks of {}, at most {} bytes a command",
        by_command.name(),
        by_command.len(),
        by_command.lba_size(),
        by_command.max_transfer()
    );
    if (by_command.len(), by_command.lba_size()) != (by_block.len(), by_block.lba_size()) {
        return Err(format!("the block device differs: {by_command:?}, {by_block:?}").into());
    }
    for backend in [Backend::IoUring, Backend::Threads] {
        for registered in [true, false] {
            transfers(&by_command, &by_block, backend, registered)?;
        }
    }
    helpers(&by_command, &by_block)?;
    println!("ok");
    Ok(())
}

/// What the drive says about itself.
fn describe(path: &str) -> Checked {
    let drive = Drive::open(path)?;
    let controller = drive.controller()?;
    println!(
        "{} {} (firmware {}), NVMe {}",
        controller.model, controller.serial, controller.firmware, controller.version
    );
    for id in drive.namespaces()? {
        let namespace = drive.identify_namespace(id)?;
        println!("namespace {id}: {:?} bytes, format {:?}", namespace.size_bytes(), namespace.format());
    }
    println!("{:?}", drive.smart()?);
    println!("error log: {:?}", drive.error_log(controller.error_log_entries)?);
    Ok(())
}

/// Bytes of which no two places are alike.
fn pattern(seed: u64, buf: &mut [u8]) {
    let mut rng = SimRng::new(seed);
    for word in buf.chunks_mut(8) {
        let random = rng.next_u64().to_le_bytes();
        word.copy_from_slice(&random[..word.len()]);
    }
}

fn compare(what: &str, got: &[u8], want: &[u8]) -> Checked {
    match got.iter().zip(want).position(|(a, b)| a != b) {
        None if got.len() == want.len() => Ok(()),
        at => Err(format!("{what}: other bytes than written, from {at:?} of {}", want.len()).into()),
    }
}

/// Writes, flushes and reads through a queue, many commands at once.
fn transfers(
    by_command: &Arc<dyn Device>,
    by_block: &Arc<dyn Device>,
    backend: Backend,
    registered: bool,
) -> Checked {
    let lba = by_command.lba_size() as usize;
    let max = by_command.max_transfer() as usize;
    let arena = Arena::new(64 << 20, ArenaOptions::default())?;
    let mut queue =
        Queue::builder().depth(16).backend(backend).arena(registered.then_some(&arena)).build()?;
    let alloc = |len: usize| -> Result<Buffer, Box<dyn Error>> {
        match registered {
            true => arena.alloc(len).ok_or_else(|| "the arena is full".into()),
            false => Ok(Buffer::heap(len)?),
        }
    };
    let lens = [lba, 4096, 64 << 10, max - lba, max, max + lba, 3 * max + 5 * lba];
    let (mut writes, mut expected, mut offset) = (Vec::new(), Vec::new(), lba as u64);
    for (index, len) in lens.into_iter().enumerate() {
        for skew in [0, lba % 4096] {
            let mut buffer = alloc((len + skew).next_multiple_of(4096))?;
            pattern(offset ^ (index as u64) << 40, &mut buffer[skew..skew + len]);
            expected.push((offset, skew, buffer[skew..skew + len].to_vec()));
            writes.push(Op::write(by_command.clone(), offset, buffer).range(skew..skew + len));
            offset += (len + lba) as u64;
        }
    }
    for done in queue.run(writes)? {
        let len = done.op.range.len();
        if done.result? != len {
            return Err(format!("a write of {len} bytes was short").into());
        }
    }
    for done in queue.run(vec![Op::flush(by_command.clone())])? {
        done.result?;
    }
    for device in [by_command, by_block] {
        let reads = expected.iter().map(|(offset, skew, bytes)| {
            let buffer = alloc((bytes.len() + skew).next_multiple_of(4096))?;
            Ok(Op::read(device.clone(), *offset, buffer).range(*skew..skew + bytes.len()))
        });
        let reads: Vec<Op> = reads.collect::<Result<_, Box<dyn Error>>>()?;
        for (done, (offset, _, bytes)) in queue.run(reads)?.into_iter().zip(&expected) {
            let what = format!("{} bytes at {offset} of {}", bytes.len(), device.name());
            done.result.map_err(|error| format!("{what}: {error}"))?;
            let buffer = done.op.buffer.ok_or("a read that ended has its buffer")?;
            compare(&what, &buffer[done.op.range], bytes)?;
        }
    }
    println!(
        "{} transfers through {} (asked: {backend}), registered memory: {}{}",
        expected.len(),
        queue.backend(),
        queue.has_fixed_buffers(),
        queue.note().map(|note| format!(" ({note})")).unwrap_or_default()
    );
    Ok(())
}

/// The blocking calls, which take any alignment.
fn helpers(by_command: &Arc<dyn Device>, by_block: &Arc<dyn Device>) -> Checked {
    let max = by_command.max_transfer() as usize;
    let mut whole = vec![0; 4 * max];
    pattern(1, &mut whole);
    by_command.write_at(0, &whole)?;
    for (seed, (offset, len)) in
        [(1, 1), (511, 2), (4095, 4098), (100_003, 2 * max + 7), (5, max)].into_iter().enumerate()
    {
        pattern(seed as u64, &mut whole[offset..offset + len]);
        by_command.write_at(offset as u64, &whole[offset..offset + len])?;
        let mut back = vec![0; len];
        by_command.read_at(offset as u64, &mut back)?;
        compare("read_at", &back, &whole[offset..offset + len])?;
    }
    by_command.flush()?;
    let mut back = vec![0; whole.len()];
    by_block.read_at(0, &mut back)?;
    compare("read_at of the block device", &back, &whole)?;
    by_command.discard(4096, 8192)?;
    by_command.read_at(0, &mut back[..4096])?;
    compare("read_at before what was discarded", &back[..4096], &whole[..4096])?;
    by_command.read_at(4096 + 8192, &mut back[..4096])?;
    compare("read_at after what was discarded", &back[..4096], &whole[4096 + 8192..][..4096])?;
    println!("the blocking calls, aligned or not, and discard");
    Ok(())
}
