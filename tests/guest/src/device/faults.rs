//! Commands that the drive refuses, and blocks that it cannot read or write.

use std::error::Error as _;

use nvme::passthrough::Status;
use nvme::{Backend, Buffer, Device, ErrorKind, Op, Queue};
use std::sync::Arc;

use super::{node, open, output};
use crate::report::{Checked, Report, chain, ensure, equal};

/// Where blocks cannot be read and written, bytes.
const BAD_READ: u64 = 2048 * 512;
const BAD_WRITE: u64 = 4096 * 512;

pub fn run(report: &mut Report) {
    report.check("an_unreadable_block_is_a_media_error_by_both_ways", unreadable);
    report.check("an_unwritable_block_is_a_media_error_by_both_ways", unwritable);
    report.check("a_read_past_the_end_of_a_namespace_that_shrank_is_lba_out_of_range", out_of_range);
}

/// How an operation fails: through each backend of a queue, and by the blocking call.
pub fn failures(device: &Arc<dyn Device>, offset: u64, write: bool) -> Checked<Vec<nvme::Error>> {
    let mut failures = Vec::new();
    let fine = |what: &str| format!("{what} at {offset} of {} did not fail", device.name());
    for backend in [Backend::IoUring, Backend::Threads] {
        let mut queue = Queue::builder().depth(4).backend(backend).build()?;
        let buffer = Buffer::heap(4096)?;
        let op = match write {
            true => Op::write(device.clone(), offset, buffer),
            false => Op::read(device.clone(), offset, buffer),
        };
        let done = queue.run(vec![op])?.pop().ok_or("no completion")?;
        failures.push(done.result.err().ok_or_else(|| fine("an operation"))?);
    }
    let mut bytes = vec![0; 4096];
    let done = match write {
        true => device.write_at(offset, &bytes),
        false => device.read_at(offset, &mut bytes),
    };
    failures.push(done.err().ok_or_else(|| fine("a blocking call"))?);
    Ok(failures)
}

fn named(failures: &[nvme::Error], kind: ErrorKind, raw: u16, name: &str) -> Checked {
    for error in failures {
        let text = chain(error);
        equal(&text, error.kind(), kind)?;
        equal(&text, error.nvme_status().map(Status::raw), Some(raw))?;
        ensure(text.contains(name) && text.contains("/dev/ng"), || {
            format!("{text}: no {name:?} with the device's name")
        })?;
    }
    Ok(())
}

fn errnos(failures: &[nvme::Error], kind: ErrorKind) -> Checked {
    for error in failures {
        let text = chain(error);
        equal(&text, error.kind(), kind)?;
        ensure(error.source().is_some() && text.contains("/dev/nvme"), || {
            format!("{text}: no device's name")
        })?;
    }
    Ok(())
}

fn unreadable() -> Checked {
    let (generic, block) = (open("m-ng", true)?, open("m", true)?);
    named(&failures(&generic, BAD_READ, false)?, ErrorKind::Media, 0x281, "Unrecovered Read Error")?;
    errnos(&failures(&block, BAD_READ, false)?, ErrorKind::Media)?;
    let mut bytes = vec![0; 4096];
    for device in [generic, block] {
        for offset in [BAD_READ - 4096, BAD_READ + 4096] {
            device.read_at(offset, &mut bytes)?;
        }
    }
    Ok(())
}

fn unwritable() -> Checked {
    {
        let generic = open("m-ng", false)?;
        named(&failures(&generic, BAD_WRITE, true)?, ErrorKind::Media, 0x280, "Write Fault")?;
        generic.write_at(BAD_WRITE + 4096, &[1; 4096])?;
    }
    let block = open("m", false)?;
    let seen = failures(&block, BAD_WRITE, true)?;
    errnos(&seen, seen[0].kind())?;
    ensure(matches!(seen[0].kind(), ErrorKind::Io | ErrorKind::Media), || chain(&seen[0]))
}

/// Formatted with larger blocks, a namespace has fewer: who had opened it before does not know.
fn out_of_range() -> Checked {
    let path = node("f")?;
    let (generic, block) = (open("f-ng", true)?, open("f", true)?);
    equal("blocks before", (generic.lba_size(), block.lba_size()), (512, 512))?;
    let last = generic.len() - 4096;
    output("nvme", &["format", &path.to_string_lossy(), "--lbaf=4", "--force"])?;
    named(&failures(&generic, last, false)?, ErrorKind::OutOfRange, 0x4080, "LBA Out of Range")?;
    let (again, block) = (open("f-ng", false)?, open("f", true)?);
    equal("blocks after", (again.lba_size(), block.lba_size()), (4096, 4096))?;
    equal("bytes after", (again.len(), block.len()), (generic.len(), generic.len()))?;
    again.write_at(last, &[7; 4096])?;
    let mut bytes = vec![0; 4096];
    block.read_at(last, &mut bytes)?;
    ensure(bytes == [7; 4096], || "other bytes than written after the format".into())
}
