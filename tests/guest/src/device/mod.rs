//! What runs in the guest: the drives through the `nvme` crate, pools on them through the command.

mod faults;
mod identity;
mod pools;
mod removal;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nvme::{Arena, ArenaOptions, Backend, Buffer, Device, DeviceOptions, Op, Queue};
use serde_json::Value;

use crate::report::{Checked, Report, ensure, equal};

/// Runs all checks whose name contains `filter`.
pub fn run(filter: Option<&str>) -> Checked<bool> {
    let mut report = Report::new("guest: drives", filter);
    for (drive, lba) in [("a", 512), ("b", 4096)] {
        report
            .check(&format!("passthrough_and_block_device_hold_equal_bytes_{lba}"), || transfers(drive, lba));
        report.check(&format!("transfers_are_split_at_mdts_{lba}"), || split(drive));
        report.check(&format!("identify_and_smart_equal_nvme_cli_{lba}"), || {
            identity::equal_nvme_cli(drive, lba)
        });
    }
    for (drive, lba) in [("a", 512), ("b", 4096)] {
        report.check(&format!("nvtier_info_tells_what_the_drive_is_{lba}"), || identity::command(drive, lba));
        report
            .check(&format!("nvtier_doctor_tells_what_the_drive_is_{lba}"), || identity::doctor(drive, lba));
    }
    report.check("bench_moves_and_verifies_blocks_by_passthrough", bench);
    faults::run(&mut report);
    pools::run(&mut report);
    removal::run(&mut report);
    Ok(report.finish())
}

/// A drive's node by its serial number, under the kernel's own name: `/dev/nvme0n1` of "a", `/dev/ng0n1` of "a-ng".
fn node(name: &str) -> Checked<PathBuf> {
    let link = Path::new("/dev/drives").join(name);
    Ok(std::fs::canonicalize(&link).map_err(|error| format!("{}: {error}", link.display()))?)
}

fn open(name: &str, read_only: bool) -> Checked<Arc<dyn Device>> {
    Ok(nvme::open(node(name)?, &DeviceOptions { direct: true, read_only })?)
}

/// Output of a program that must succeed.
fn output(program: &str, args: &[&str]) -> Checked<String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure(output.status.success(), || {
        format!("{program} {args:?}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
    })?;
    Ok(text(&output.stdout))
}

fn nvme_json(args: &[&str]) -> Checked<Value> {
    Ok(serde_json::from_str(&output("nvme", &[args, &["-o", "json"]].concat())?)?)
}

/// The example of the `nvme` crate.
fn transfers(drive: &str, lba: u32) -> Checked {
    let (generic, block) = (node(&format!("{drive}-ng"))?, node(drive)?);
    let text = output("passthrough", &[&generic.to_string_lossy(), &block.to_string_lossy()])?;
    ensure(text.ends_with("ok\n"), || text.clone())?;
    // It must have tried what it is for, not a fallback.
    for line in [
        format!("blocks of {lba},"),
        "through io_uring (asked: io_uring), registered memory: true".into(),
        "through threads".into(),
    ] {
        ensure(text.contains(&line), || format!("no {line:?} in {text}"))?;
    }
    Ok(())
}

/// One transfer of several times the limit is as many commands as it must be: the drive counts them.
fn split(drive: &str) -> Checked {
    let device = open(&format!("{drive}-ng"), false)?;
    let controller = nvme_json(&["id-ctrl", &node(drive)?.to_string_lossy()])?;
    let mdts = 4096_u64 << controller["mdts"].as_u64().ok_or("no mdts")?;
    equal("largest transfer", u64::from(device.max_transfer()), mdts)?;
    let len = (3 * mdts + u64::from(device.lba_size())) as usize;
    let smart =
        || -> Checked<_> { Ok(nvme::passthrough::Drive::open(node(&format!("{drive}-ctrl"))?)?.smart()?) };
    for backend in [Backend::IoUring, Backend::Threads] {
        let arena = Arena::new(4 << 20, ArenaOptions::default())?;
        let mut queue = Queue::builder().depth(4).backend(backend).arena(Some(&arena)).build()?;
        let before = smart()?;
        let mut buffer = arena.alloc(len.next_multiple_of(4096)).ok_or("the arena is full")?;
        buffer.fill(0x5a);
        let buffer = one(&mut queue, Op::write(device.clone(), 0, buffer).range(0..len))?;
        one(&mut queue, Op::read(device.clone(), 0, buffer).range(0..len))?;
        let after = smart()?;
        equal("write commands", after.host_write_commands - before.host_write_commands, 4)?;
        equal("read commands", after.host_read_commands - before.host_read_commands, 4)?;
    }
    Ok(())
}

/// `nvtier bench`: blocks with sums, written and read again; the drive counts the commands.
fn bench() -> Checked {
    let smart = || -> Checked<_> { Ok(nvme::passthrough::Drive::open(node("a-ng")?)?.smart()?) };
    let before = smart()?;
    let filename = format!("--filename={}", node("a-ng")?.display());
    let job = [
        "bench",
        "--name=x",
        "--ioengine=io_uring_cmd",
        "--direct=1",
        "--bs=64k",
        "--iodepth=8",
        "--size=16m",
    ];
    for rw in ["--rw=write", "--rw=randread"] {
        output("nvtier", &[&job[..], &[rw, "--verify=crc32c", "--ceiling=off", &filename]].concat())?;
    }
    let after = smart()?;
    ensure(after.host_write_commands - before.host_write_commands >= 256, || "too few writes".into())?;
    ensure(after.host_read_commands - before.host_read_commands >= 256, || "too few reads".into())?;
    let refused = Command::new("nvtier").args(job).args(["--rw=read", "--filename=/dev/null"]).output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure(!refused.status.success() && said.contains("/dev/ng0n1"), || said.clone())
}

/// Runs one operation; its buffer comes back.
fn one(queue: &mut Queue, op: Op) -> Checked<Buffer> {
    let done = queue.run(vec![op])?.pop().ok_or("no completion")?;
    done.result?;
    Ok(done.op.buffer.ok_or("no buffer")?)
}
