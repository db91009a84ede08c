//! How values are read: words, sizes, pairs, lists.

use std::path::PathBuf;

use crate::settings::{Amount, EngineKind, Pattern, Settings};
use crate::units::{parse_bytes, parse_int};

pub(super) const RW: &[(&str, &str)] = &[
    ("read", "sequential reads"),
    ("write", "sequential writes"),
    ("randread", "random reads"),
    ("randwrite", "random writes"),
    ("rw", "sequential reads and writes"),
    ("readwrite", "the same as rw"),
    ("randrw", "random reads and writes"),
];

pub(super) const ENGINES: &[(&str, &str)] = &[
    ("io_uring", "io_uring with registered files and buffers, one submit a batch"),
    ("io_uring_cmd", "NVMe commands to /dev/ngXnY through io_uring, past the block layer"),
    ("pread", "pread(2) and pwrite(2), one at a time (also: psync, sync, pvsync, vsync)"),
    ("mmap", "loads and stores through a mapping"),
    ("pool", "a region of an nvtier pool, through the engine, checksums verified (needs --pool)"),
    ("mount", "a file that must lie on an nvtier mount: io_uring when iodepth > 1, else pread"),
    ("bounce", "reads, and copies to a device by pinned memory, as nvtier load does (needs a device=)"),
    ("cufile", "NVIDIA's cuFile, straight to or from a device; refused where it would not be GPUDirect"),
    ("vram-write", "copies from a device to pinned memory, and writes, as nvtier load --save does"),
    ("null", "no transfer at all: what the harness itself costs"),
];

pub(super) const VERIFIES: &[(&str, &str)] = &[
    ("0", "no verification"),
    ("crc32", "CRC-32 (IEEE) in every block"),
    ("crc32c", "CRC-32C in every block, in hardware where there is any (also: crc32c-intel)"),
    ("xxhash", "32-bit xxHash in every block"),
];

pub(super) const PROFILES: &[(&str, &str)] = &[
    ("model-load", "the tensors of a checkpoint, in order, in large direct reads, after opening it"),
    ("kv-restore", "KV-cache blocks of 128 KiB to 2 MiB at random places, by several sessions"),
];

pub(super) fn set_rw(s: &mut Settings, v: &str) -> Result<(), String> {
    let (read, write, random) = match v {
        "read" => (true, false, false),
        "write" => (false, true, false),
        "randread" => (true, false, true),
        "randwrite" => (false, true, true),
        "rw" | "readwrite" => (true, true, false),
        "randrw" => (true, true, true),
        "trim" | "randtrim" | "trimwrite" | "randtrimwrite" => {
            return Err(format!("trims are not supported; {}", not_one_of(v, RW)));
        }
        _ => return Err(not_one_of(v, RW)),
    };
    s.pattern = Pattern { read, write, random };
    Ok(())
}

pub(super) fn set_bs(s: &mut Settings, v: &str) -> Result<(), String> {
    if v.contains('-') || v.contains(':') {
        return Err(
            "ranges of block sizes (fio's bsrange) are not supported: give one size, or READ,WRITE".into()
        );
    }
    let sizes = pair(v, |part| parse_bytes(part, s.kb_base))?;
    for size in sizes.into_iter().flatten() {
        if !(512..=64 << 20).contains(&size) {
            return Err("a block is between 512 bytes and 64m".into());
        }
    }
    s.block_bytes = [sizes[0].unwrap_or(s.block_bytes[0]), sizes[1].unwrap_or(s.block_bytes[1])];
    Ok(())
}

pub(super) fn set_engine(s: &mut Settings, v: &str) -> Result<(), String> {
    s.engine = match v {
        "io_uring" => EngineKind::IoUring,
        "io_uring_cmd" => EngineKind::IoUringCmd,
        "pread" | "psync" | "sync" | "pvsync" | "vsync" => EngineKind::Pread,
        "mmap" => EngineKind::Mmap,
        "pool" => EngineKind::Pool,
        "mount" => EngineKind::Mount,
        "bounce" => EngineKind::Bounce,
        "cufile" => EngineKind::CuFile,
        "vram-write" => EngineKind::VramWrite,
        "null" => EngineKind::Null,
        _ => return Err(not_one_of(v, ENGINES)),
    };
    Ok(())
}

pub(super) fn set_percentiles(s: &mut Settings, v: &str) -> Result<(), String> {
    let parse = |part: &str| match part.trim().parse::<f64>() {
        Ok(percentile) if (0.0..=100.0).contains(&percentile) => Ok(percentile),
        _ => Err(format!("'{part}' is not a percentile between 0 and 100")),
    };
    let mut list = v.split(':').map(parse).collect::<Result<Vec<_>, _>>()?;
    if list.len() > 20 {
        return Err("at most 20 percentiles, as in fio".into());
    }
    list.sort_by(f64::total_cmp);
    list.dedup();
    s.percentiles = list;
    Ok(())
}

pub(super) fn amount(s: &Settings, v: &str) -> Result<Amount, String> {
    match v.strip_suffix('%') {
        Some(percent) => Ok(Amount::Percent(ranged(percent, 0, 100)?)),
        None => parse_bytes(v, s.kb_base).map(Amount::Bytes),
    }
}

pub(super) fn boolean(v: &str) -> Result<bool, String> {
    match v {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(format!("'{v}' is not 0 or 1")),
    }
}

pub(super) fn ranged(v: &str, low: u64, high: u64) -> Result<u64, String> {
    let value = parse_int(v)?;
    if (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{value} is not between {low} and {high}"))
    }
}

/// fio's `READ,WRITE`: one value counts for both, an empty one leaves its direction alone.
pub(super) fn pair(v: &str, parse: impl Fn(&str) -> Result<u64, String>) -> Result<[Option<u64>; 2], String> {
    let parts: Vec<&str> = v.split(',').collect();
    let one = |part: &str| if part.trim().is_empty() { Ok(None) } else { parse(part).map(Some) };
    match parts[..] {
        [both] => Ok([one(both)?; 2]),
        [read, write] => Ok([one(read)?, one(write)?]),
        _ => Err("expected one value, or READ,WRITE".into()),
    }
}

/// fio separates file names by ':' and lets '\:' stand for a colon.
pub(super) fn split_filenames(v: &str) -> Vec<PathBuf> {
    let mut names = vec![String::new()];
    let mut chars = v.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.peek() == Some(&':') => names.last_mut().expect("never empty").extend(chars.next()),
            ':' => names.push(String::new()),
            _ => names.last_mut().expect("never empty").push(c),
        }
    }
    names.into_iter().filter(|name| !name.is_empty()).map(PathBuf::from).collect()
}

pub(super) fn cpu_list(v: &str) -> Result<Vec<usize>, String> {
    let mut cpus = Vec::new();
    for part in v.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (ranged(first, 0, 1023)?, ranged(last, 0, 1023)?);
        cpus.extend((first..=last).map(|cpu| cpu as usize));
    }
    Ok(cpus)
}

pub(super) fn not_one_of(v: &str, words: &[(&str, &str)]) -> String {
    let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    format!("'{v}' is not one of {}", words.join(", "))
}
