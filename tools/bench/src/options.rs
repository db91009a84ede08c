//! The job options, as data: one row each, from which parsing, `--cmdhelp`, completions and man pages come.
//!
//! Names, meanings and defaults are fio's (HOWTO, "Job parameters"); a row says so where ours differ. What fio has
//! and we do not is in [`UNSUPPORTED`], so that a refusal can tell "not supported here" from "no such option".

use std::path::PathBuf;

use crate::settings::{Amount, EngineKind, Pattern, Profile, Settings, Verify};
use crate::units::{parse_bytes, parse_int, parse_time_us};

/// Shape of an option's value, for help texts and for `--opt` without a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// Any text.
    Text,
    /// Whole number.
    Int,
    /// Amount of data with an optional suffix.
    Bytes,
    /// Time with an optional suffix.
    Time,
    /// 0 or 1; the bare name means 1.
    Bool,
    /// One of the words.
    Choice(&'static [(&'static str, &'static str)]),
}

/// One option.
#[derive(Debug)]
pub struct Spec {
    /// fio's name.
    pub name: &'static str,
    /// Other names of the same option.
    pub alias: &'static [&'static str],
    /// Shape of the value.
    pub value: Value,
    /// Default, as one would write it.
    pub default: &'static str,
    /// One line of help; names any difference from fio.
    pub help: &'static str,
    /// Parses and stores a value.
    pub set: fn(&mut Settings, &str) -> Result<(), String>,
}

const RW: &[(&str, &str)] = &[
    ("read", "sequential reads"),
    ("write", "sequential writes"),
    ("randread", "random reads"),
    ("randwrite", "random writes"),
    ("rw", "sequential reads and writes"),
    ("readwrite", "the same as rw"),
    ("randrw", "random reads and writes"),
];

const ENGINES: &[(&str, &str)] = &[
    ("io_uring", "io_uring with registered files and buffers, one submit a batch"),
    ("pread", "pread(2) and pwrite(2), one at a time (also: psync, sync, pvsync, vsync)"),
    ("mmap", "loads and stores through a mapping"),
    ("pool", "a region of an nvtier pool, through the engine, checksums verified (needs --pool)"),
    ("mount", "a file that must lie on an nvtier mount: io_uring when iodepth > 1, else pread"),
    ("null", "no transfer at all: what the harness itself costs"),
];

const VERIFIES: &[(&str, &str)] = &[
    ("0", "no verification"),
    ("crc32", "CRC-32 (IEEE) in every block"),
    ("crc32c", "CRC-32C in every block, in hardware where there is any (also: crc32c-intel)"),
    ("xxhash", "32-bit xxHash in every block"),
];

const PROFILES: &[(&str, &str)] = &[
    ("model-load", "the tensors of a checkpoint, in order, in large direct reads, after opening it"),
    ("kv-restore", "KV-cache blocks of 128 KiB to 2 MiB at random places, by several sessions"),
];

macro_rules! spec {
    ($name:literal, [$($alias:literal),*], $value:expr, $default:literal, $help:literal, $set:expr) => {
        Spec { name: $name, alias: &[$($alias),*], value: $value, default: $default, help: $help, set: $set }
    };
}

/// Every job option there is.
pub static OPTIONS: &[Spec] = &[
    spec!("name", [], Value::Text, "", "name of the job; on the command line it starts a new one", |s, v| {
        s.name = v.to_owned();
        Ok(())
    }),
    spec!("description", [], Value::Text, "", "text for the report", |s, v| {
        s.description = Some(v.to_owned());
        Ok(())
    }),
    spec!("rw", ["readwrite"], Value::Choice(RW), "read", "direction and order of the transfers", set_rw),
    spec!("bs", ["blocksize"], Value::Bytes, "4k", "block size; READ,WRITE for two sizes", set_bs),
    spec!(
        "iodepth",
        [],
        Value::Int,
        "1",
        "operations in flight; one for engines that cannot do more",
        |s, v| {
            s.iodepth = ranged(v, 1, 4096)? as u32;
            Ok(())
        }
    ),
    spec!(
        "iodepth_batch",
        ["iodepth_batch_submit"],
        Value::Int,
        "0",
        "most operations in one submit; 0 = all that are free (fio's default is 1)",
        |s, v| {
            s.batch_submit = ranged(v, 0, 4096)? as u32;
            Ok(())
        }
    ),
    spec!(
        "iodepth_batch_complete_min",
        ["iodepth_batch_complete"],
        Value::Int,
        "1",
        "fewest completions to wait for at a time",
        |s, v| {
            s.batch_complete_min = ranged(v, 1, 4096)? as u32;
            Ok(())
        }
    ),
    spec!("numjobs", [], Value::Int, "1", "workers running this job at once", |s, v| {
        s.numjobs = ranged(v, 1, 1024)? as u32;
        Ok(())
    }),
    spec!(
        "size",
        [],
        Value::Bytes,
        "the file's",
        "part of the file that is used, bytes or percent",
        |s, v| {
            s.size = Some(amount(s, v)?);
            Ok(())
        }
    ),
    spec!(
        "io_size",
        ["io_limit"],
        Value::Bytes,
        "size",
        "bytes to move in all, wrapping around in `size`",
        |s, v| {
            s.io_bytes = Some(amount(s, v)?);
            Ok(())
        }
    ),
    spec!("number_ios", [], Value::Int, "", "operations to make in all", |s, v| {
        s.number_ios = Some(ranged(v, 1, u64::MAX)?);
        Ok(())
    }),
    spec!("offset", [], Value::Bytes, "0", "where in the file to start, bytes or percent", |s, v| {
        s.offset = amount(s, v)?;
        Ok(())
    }),
    spec!("offset_increment", [], Value::Bytes, "0", "added to offset for each further worker", |s, v| {
        s.offset_increment = amount(s, v)?;
        Ok(())
    }),
    spec!("runtime", ["timeout"], Value::Time, "0", "stop after this time (bare number: seconds)", |s, v| {
        s.runtime_us = parse_time_us(v, 1_000_000)?;
        Ok(())
    }),
    spec!("time_based", [], Value::Bool, "0", "repeat until runtime is over", |s, v| {
        s.time_based = boolean(v)?;
        Ok(())
    }),
    spec!("ramp_time", [], Value::Time, "0", "run this long before measuring", |s, v| {
        s.ramp_us = parse_time_us(v, 1_000_000)?;
        Ok(())
    }),
    spec!("startdelay", [], Value::Time, "0", "wait this long before starting", |s, v| {
        s.startdelay_us = parse_time_us(v, 1_000_000)?;
        Ok(())
    }),
    spec!("direct", [], Value::Bool, "0", "O_DIRECT, past the page cache", |s, v| {
        s.direct = boolean(v)?;
        Ok(())
    }),
    spec!("buffered", [], Value::Bool, "1", "the opposite of direct", |s, v| {
        s.direct = !boolean(v)?;
        Ok(())
    }),
    spec!(
        "filename",
        [],
        Value::Text,
        "from the name",
        "file, device or region; several with ':'",
        |s, v| {
            s.filenames = split_filenames(v);
            Ok(())
        }
    ),
    spec!("directory", [], Value::Text, ".", "where files named after the job go", |s, v| {
        s.directory = Some(PathBuf::from(v));
        Ok(())
    }),
    spec!("ioengine", [], Value::Choice(ENGINES), "pread", "what moves the bytes", set_engine),
    spec!("rate", [], Value::Bytes, "", "bytes per second; READ,WRITE for two", |s, v| {
        s.rate = pair(v, |part| parse_bytes(part, s.kb_base))?;
        Ok(())
    }),
    spec!("rate_iops", [], Value::Int, "", "operations per second; READ,WRITE for two", |s, v| {
        s.rate_iops = pair(v, parse_int)?;
        Ok(())
    }),
    spec!("rwmixread", [], Value::Int, "50", "percent of a mix that are reads", |s, v| {
        s.rwmixread = ranged(v, 0, 100)? as u32;
        Ok(())
    }),
    spec!("rwmixwrite", [], Value::Int, "50", "percent of a mix that are writes", |s, v| {
        s.rwmixread = 100 - ranged(v, 0, 100)? as u32;
        Ok(())
    }),
    spec!(
        "verify",
        [],
        Value::Choice(VERIFIES),
        "0",
        "checksum written into, and expected in, every block",
        |s, v| {
            s.verify = match v {
                "0" => None,
                "crc32" => Some(Verify::Crc32),
                "crc32c" | "crc32c-intel" => Some(Verify::Crc32c),
                "xxhash" => Some(Verify::XxHash),
                _ => return Err(not_one_of(v, VERIFIES)),
            };
            Ok(())
        }
    ),
    spec!("do_verify", [], Value::Bool, "1", "read everything back after writing it", |s, v| {
        s.do_verify = boolean(v)?;
        Ok(())
    }),
    spec!("verify_fatal", [], Value::Bool, "0", "stop at the first bad block", |s, v| {
        s.verify_fatal = boolean(v)?;
        Ok(())
    }),
    spec!("group_reporting", [], Value::Bool, "0", "one report for all workers of a group", |s, v| {
        s.group_reporting = boolean(v)?;
        Ok(())
    }),
    spec!(
        "thread",
        [],
        Value::Bool,
        "1",
        "accepted: workers are always threads (fio: processes by default)",
        |_, v| { boolean(v).map(drop) }
    ),
    spec!(
        "fsync",
        [],
        Value::Int,
        "0",
        "fsync after this many writes (in-flight ones are waited for)",
        |s, v| {
            s.fsync = parse_int(v)?;
            Ok(())
        }
    ),
    spec!("fdatasync", [], Value::Int, "0", "fdatasync after this many writes", |s, v| {
        s.fdatasync = parse_int(v)?;
        Ok(())
    }),
    spec!(
        "end_fsync",
        [],
        Value::Bool,
        "0",
        "fsync when all is written, inside the measured time",
        |s, v| {
            s.end_fsync = boolean(v)?;
            Ok(())
        }
    ),
    spec!("randseed", [], Value::Int, "0", "seed of offsets and data", |s, v| {
        s.randseed = parse_int(v)?;
        Ok(())
    }),
    spec!("randrepeat", [], Value::Bool, "1", "the same offsets in every run", |s, v| {
        s.randrepeat = boolean(v)?;
        Ok(())
    }),
    spec!("norandommap", [], Value::Bool, "0", "offsets may repeat before all were used", |s, v| {
        s.norandommap = boolean(v)?;
        Ok(())
    }),
    spec!("invalidate", [], Value::Bool, "1", "drop the file from the page cache before the run", |s, v| {
        s.invalidate = boolean(v)?;
        Ok(())
    }),
    spec!("loops", [], Value::Int, "1", "runs of the whole job", |s, v| {
        s.loops = ranged(v, 1, u64::from(u32::MAX))?;
        Ok(())
    }),
    spec!(
        "percentile_list",
        [],
        Value::Text,
        "fio's 17",
        "percentiles to report, ':' between them",
        set_percentiles
    ),
    spec!("clat_percentiles", [], Value::Bool, "1", "percentiles of completion latency", |s, v| {
        s.clat_percentiles = boolean(v)?;
        Ok(())
    }),
    spec!("lat_percentiles", [], Value::Bool, "0", "percentiles of total latency", |s, v| {
        s.lat_percentiles = boolean(v)?;
        Ok(())
    }),
    spec!("slat_percentiles", [], Value::Bool, "0", "percentiles of submission latency", |s, v| {
        s.slat_percentiles = boolean(v)?;
        Ok(())
    }),
    spec!(
        "disable_slat",
        [],
        Value::Bool,
        "0",
        "no submission latency: submit and wait in one call",
        |s, v| {
            s.disable_slat = boolean(v)?;
            Ok(())
        }
    ),
    spec!("exitall", [], Value::Bool, "0", "when one worker ends, all end", |s, v| {
        s.exitall = boolean(v)?;
        Ok(())
    }),
    spec!(
        "stonewall",
        ["wait_for_previous"],
        Value::Bool,
        "0",
        "wait for the jobs before this one",
        |s, v| {
            s.stonewall = boolean(v)?;
            Ok(())
        }
    ),
    spec!("new_group", [], Value::Bool, "0", "start a new reporting group", |s, v| {
        s.new_group = boolean(v)?;
        Ok(())
    }),
    spec!("refill_buffers", [], Value::Bool, "0", "new random content for every write", |s, v| {
        s.refill_buffers = boolean(v)?;
        Ok(())
    }),
    spec!("zero_buffers", [], Value::Bool, "0", "zeroes instead of random content", |s, v| {
        s.zero_buffers = boolean(v)?;
        Ok(())
    }),
    spec!("scramble_buffers", [], Value::Bool, "1", "a fresh stamp in every 4 KiB of every write", |s, v| {
        s.scramble_buffers = boolean(v)?;
        Ok(())
    }),
    spec!(
        "fixedbufs",
        [],
        Value::Bool,
        "1",
        "buffers registered with the ring (fio's default is 0)",
        |s, v| {
            s.fixedbufs = boolean(v)?;
            Ok(())
        }
    ),
    spec!(
        "registerfiles",
        [],
        Value::Bool,
        "1",
        "accepted when 1: files are always registered with the ring",
        |_, v| {
            if boolean(v)? { Ok(()) } else { Err("only 1: files are always registered with the ring".into()) }
        }
    ),
    spec!(
        "hipri",
        [],
        Value::Bool,
        "0",
        "busy-poll the drive for completions (needs poll queues)",
        |s, v| {
            s.hipri = boolean(v)?;
            Ok(())
        }
    ),
    spec!("pool", [], Value::Text, "NVTIER_POOL", "pool of ioengine=pool (not in fio)", |s, v| {
        s.pool = Some(PathBuf::from(v));
        Ok(())
    }),
    spec!("pool_ram", [], Value::Bytes, "256m", "RAM tier given to the pool (not in fio)", |s, v| {
        s.pool_ram_bytes = parse_bytes(v, s.kb_base)?;
        Ok(())
    }),
    spec!("unlink", [], Value::Bool, "0", "remove the files afterwards", |s, v| {
        s.unlink = boolean(v)?;
        Ok(())
    }),
    spec!(
        "fallocate",
        [],
        Value::Choice(&[
            ("native", "preallocate"),
            ("posix", "the same"),
            ("1", "the same"),
            ("none", "do not"),
            ("0", "do not")
        ]),
        "native",
        "preallocate files that are laid out",
        |s, v| {
            s.fallocate = match v {
                "native" | "posix" | "1" => true,
                "none" | "0" => false,
                _ => return Err(format!("'{v}' is not one of native, posix, none")),
            };
            Ok(())
        }
    ),
    spec!("create_only", [], Value::Bool, "0", "only lay the files out", |s, v| {
        s.create_only = boolean(v)?;
        Ok(())
    }),
    spec!(
        "nrfiles",
        [],
        Value::Int,
        "1",
        "accepted when 1: name several files in filename instead",
        |_, v| {
            if parse_int(v)? == 1 {
                Ok(())
            } else {
                Err("only 1: name several files in filename, ':' between them".into())
            }
        }
    ),
    spec!("cpus_allowed", [], Value::Text, "all", "CPUs the workers may use, as 0,2-3", |s, v| {
        s.cpus_allowed = cpu_list(v)?;
        Ok(())
    }),
    spec!(
        "thinktime",
        [],
        Value::Time,
        "0",
        "pause between operations (bare number: microseconds)",
        |s, v| {
            s.thinktime_us = parse_time_us(v, 1)?;
            Ok(())
        }
    ),
    spec!("kb_base", [], Value::Int, "1024", "what k means in the options after it: 1024 or 1000", |s, v| {
        s.kb_base = match parse_int(v)? {
            base @ (1000 | 1024) => base,
            other => return Err(format!("{other} is not 1024 or 1000")),
        };
        Ok(())
    }),
    spec!(
        "profile",
        [],
        Value::Choice(PROFILES),
        "",
        "an LLM-shaped pattern (replaces rw, bs, offsets)",
        |s, v| {
            s.profile = Some(match v {
                "model-load" => Profile::ModelLoad,
                "kv-restore" => Profile::KvRestore,
                _ => return Err(not_one_of(v, PROFILES)),
            });
            Ok(())
        }
    ),
];

/// fio options (3.33) that nvtier bench does not have. Refused by name.
pub static UNSUPPORTED: &[&str] = &[
    "wait_for",
    "lockfile",
    "filename_format",
    "unique_filename",
    "opendir",
    "ba",
    "blockalign",
    "bsrange",
    "blocksize_range",
    "bssplit",
    "bs_unaligned",
    "bs_is_seq_rand",
    "ignore_error",
    "rw_sequencer",
    "iodepth_batch_complete_max",
    "iodepth_low",
    "serialize_overlap",
    "io_submit_mode",
    "fill_device",
    "filesize",
    "file_append",
    "offset_align",
    "random_generator",
    "random_distribution",
    "percentage_random",
    "allrandrepeat",
    "file_service_type",
    "openfiles",
    "fadvise_hint",
    "write_barrier",
    "sync_file_range",
    "atomic",
    "overwrite",
    "verify_only",
    "clocksource",
    "mem",
    "iomem",
    "iomem_align",
    "mem_align",
    "verify_interval",
    "verify_offset",
    "verify_pattern",
    "verify_pattern_interval",
    "verify_dump",
    "verify_async",
    "verify_backlog",
    "verify_backlog_batch",
    "verify_async_cpus",
    "experimental_verify",
    "verify_state_load",
    "verify_state_save",
    "trim_percentage",
    "trim_verify_zero",
    "trim_backlog",
    "trim_backlog_batch",
    "write_iolog",
    "read_iolog",
    "read_iolog_chunked",
    "replay_no_stall",
    "replay_redirect",
    "replay_scale",
    "replay_align",
    "replay_time_scale",
    "replay_skip",
    "merge_blktrace_file",
    "merge_blktrace_scalars",
    "merge_blktrace_iters",
    "exec_prerun",
    "exec_postrun",
    "ioscheduler",
    "zonemode",
    "zonesize",
    "zonecapacity",
    "zonerange",
    "zoneskip",
    "read_beyond_wp",
    "max_open_zones",
    "job_max_open_zones",
    "ignore_zone_limits",
    "zone_reset_threshold",
    "zone_reset_frequency",
    "lockmem",
    "nice",
    "prio",
    "prioclass",
    "priolevel",
    "cmdprio_percentage",
    "cmdprio",
    "thinktime_spin",
    "thinktime_blocks",
    "thinktime_blocks_type",
    "thinktime_iotime",
    "rate_min",
    "rate_process",
    "rate_cycle",
    "rate_ignore_thinktime",
    "rate_iops_min",
    "max_latency",
    "latency_target",
    "latency_window",
    "latency_percentile",
    "latency_run",
    "sync",
    "write_hint",
    "create_serialize",
    "create_fsync",
    "create_on_open",
    "allow_file_create",
    "allow_mounted_write",
    "pre_read",
    "cpumask",
    "cpus_allowed_policy",
    "numa_cpu_nodes",
    "numa_mem_policy",
    "fsync_on_close",
    "unlink_each_loop",
    "exit_what",
    "exitall_on_error",
    "per_job_logs",
    "write_bw_log",
    "bwavgtime",
    "write_lat_log",
    "write_iops_log",
    "iopsavgtime",
    "log_entries",
    "log_avg_msec",
    "log_hist_msec",
    "log_hist_coarseness",
    "write_hist_log",
    "log_max_value",
    "log_offset",
    "log_prio",
    "log_compression",
    "log_compression_cpus",
    "log_store_compressed",
    "log_unix_epoch",
    "log_alternate_epoch",
    "log_alternate_epoch_clock_id",
    "block_error_percentiles",
    "stats",
    "buffer_pattern",
    "buffer_compress_percentage",
    "buffer_compress_chunk",
    "dedupe_percentage",
    "dedupe_mode",
    "dedupe_working_set_percentage",
    "dedupe_global",
    "significant_figures",
    "disk_util",
    "gtod_reduce",
    "disable_lat",
    "disable_clat",
    "disable_bw_measurement",
    "gtod_cpu",
    "unified_rw_reporting",
    "continue_on_error",
    "error_dump",
    "cgroup",
    "cgroup_nodelete",
    "cgroup_weight",
    "uid",
    "gid",
    "unit_base",
    "hugepage-size",
    "flow_id",
    "flow",
    "flow_sleep",
    "steadystate",
    "steadystate_duration",
    "steadystate_ramp_time",
    "sqthread_poll",
    "sqthread_poll_cpu",
    "nonvectored",
    "uncached",
    "nowait",
    "force_async",
    "userspace_reap",
    "fdp",
    "cuda_io",
    "gpu_dev_ids",
    "include",
];

/// The option of this name or alias.
pub fn find(name: &str) -> Option<&'static Spec> {
    OPTIONS.iter().find(|spec| spec.name == name || spec.alias.contains(&name))
}

/// What to say about a name that is no option of ours.
pub fn refusal(name: &str) -> String {
    if UNSUPPORTED.contains(&name) {
        return format!("fio option '{name}' is not supported by nvtier bench (see --cmdhelp for what is)");
    }
    let nearest = OPTIONS
        .iter()
        .flat_map(|spec| std::iter::once(&spec.name).chain(spec.alias))
        .map(|known| (distance(name, known), *known))
        .min();
    match nearest {
        Some((steps, known)) if steps <= 2 => format!("unknown option '{name}'; did you mean '{known}'?"),
        _ => format!("unknown option '{name}' (see --cmdhelp for what there is)"),
    }
}

/// Sets one option and remembers it as given.
pub fn apply(settings: &mut Settings, name: &str, value: Option<&str>) -> Result<(), String> {
    let spec = find(name).ok_or_else(|| refusal(name))?;
    let value = match (value, spec.value) {
        (Some(value), _) => value.trim(),
        (None, Value::Bool) => "1",
        (None, _) => return Err(format!("option '{name}' needs a value: {}", spec.help)),
    };
    (spec.set)(settings, value).map_err(|why| format!("{name}={value}: {why}"))?;
    settings.given.retain(|(given, _)| given != spec.name);
    settings.given.push((spec.name.to_owned(), value.to_owned()));
    Ok(())
}

fn set_rw(s: &mut Settings, v: &str) -> Result<(), String> {
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

fn set_bs(s: &mut Settings, v: &str) -> Result<(), String> {
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

fn set_engine(s: &mut Settings, v: &str) -> Result<(), String> {
    s.engine = match v {
        "io_uring" => EngineKind::IoUring,
        "pread" | "psync" | "sync" | "pvsync" | "vsync" => EngineKind::Pread,
        "mmap" => EngineKind::Mmap,
        "pool" => EngineKind::Pool,
        "mount" => EngineKind::Mount,
        "null" => EngineKind::Null,
        _ => return Err(not_one_of(v, ENGINES)),
    };
    Ok(())
}

fn set_percentiles(s: &mut Settings, v: &str) -> Result<(), String> {
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

fn amount(s: &Settings, v: &str) -> Result<Amount, String> {
    match v.strip_suffix('%') {
        Some(percent) => Ok(Amount::Percent(ranged(percent, 0, 100)?)),
        None => parse_bytes(v, s.kb_base).map(Amount::Bytes),
    }
}

fn boolean(v: &str) -> Result<bool, String> {
    match v {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(format!("'{v}' is not 0 or 1")),
    }
}

fn ranged(v: &str, low: u64, high: u64) -> Result<u64, String> {
    let value = parse_int(v)?;
    if (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{value} is not between {low} and {high}"))
    }
}

/// fio's `READ,WRITE`: one value counts for both, an empty one leaves its direction alone.
fn pair(v: &str, parse: impl Fn(&str) -> Result<u64, String>) -> Result<[Option<u64>; 2], String> {
    let parts: Vec<&str> = v.split(',').collect();
    let one = |part: &str| if part.trim().is_empty() { Ok(None) } else { parse(part).map(Some) };
    match parts[..] {
        [both] => Ok([one(both)?; 2]),
        [read, write] => Ok([one(read)?, one(write)?]),
        _ => Err("expected one value, or READ,WRITE".into()),
    }
}

/// fio separates file names by ':' and lets '\:' stand for a colon.
fn split_filenames(v: &str) -> Vec<PathBuf> {
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

fn cpu_list(v: &str) -> Result<Vec<usize>, String> {
    let mut cpus = Vec::new();
    for part in v.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (ranged(first, 0, 1023)?, ranged(last, 0, 1023)?);
        cpus.extend((first..=last).map(|cpu| cpu as usize));
    }
    Ok(cpus)
}

fn not_one_of(v: &str, words: &[(&str, &str)]) -> String {
    let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    format!("'{v}' is not one of {}", words.join(", "))
}

/// Levenshtein distance, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str, value: &str) -> Result<Settings, String> {
        let mut settings = Settings::default();
        apply(&mut settings, name, Some(value)).map(|()| settings)
    }

    #[test]
    fn no_name_is_defined_twice() {
        let mut names: Vec<&str> =
            OPTIONS.iter().flat_map(|spec| std::iter::once(&spec.name).chain(spec.alias)).copied().collect();
        names.extend(UNSUPPORTED);
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn values_reach_their_fields() {
        assert_eq!(set("bs", "4k,1m").unwrap().block_bytes, [4096, 1 << 20]);
        assert_eq!(set("blocksize", ",8k").unwrap().block_bytes, [4096, 8192]);
        assert_eq!(set("size", "25%").unwrap().size, Some(Amount::Percent(25)));
        assert_eq!(set("rwmixwrite", "30").unwrap().rwmixread, 70);
        assert_eq!(set("rate", "10m,").unwrap().rate, [Some(10 << 20), None]);
        assert_eq!(set("ioengine", "psync").unwrap().engine, EngineKind::Pread);
        assert_eq!(set("cpus_allowed", "0,2-3").unwrap().cpus_allowed, [0, 2, 3]);
        assert_eq!(set("percentile_list", "99:50:99").unwrap().percentiles, [50.0, 99.0]);
        let files = set("filename", r"/a:/b\:c").unwrap().filenames;
        assert_eq!(files, [PathBuf::from("/a"), PathBuf::from("/b:c")]);
        assert_eq!(set("rw", "randrw").unwrap().pattern.name(), "randrw");
    }

    #[test]
    fn bad_values_say_what_is_accepted() {
        for (name, value, part) in [
            ("rw", "sideways", "randread"),
            ("rw", "randtrim", "trims are not supported"),
            ("bs", "4k-64k", "bsrange"),
            ("bs", "100", "512"),
            ("iodepth", "0", "between 1 and"),
            ("direct", "maybe", "0 or 1"),
            ("ioengine", "libaio", "io_uring"),
            ("verify", "md5", "crc32c"),
            ("size", "101%", "between 0 and 100"),
            ("registerfiles", "0", "always registered"),
            ("profile", "tpcc", "model-load"),
        ] {
            let error = set(name, value).unwrap_err();
            assert!(error.contains(part) && error.contains(name), "{name}={value}: {error}");
        }
    }

    #[test]
    fn refusals_tell_unsupported_from_unknown() {
        assert!(refusal("zonemode").contains("fio option 'zonemode' is not supported"));
        assert!(refusal("iodeph").contains("did you mean 'iodepth'"));
        assert!(refusal("bogus_thing").contains("unknown option 'bogus_thing'"));
    }
}
