//! The table itself.

use std::path::PathBuf;

use super::values::*;
use super::{Spec, Value};
use crate::settings::{Profile, Verify};
use crate::units::{parse_bytes, parse_int, parse_time_us};

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
        "4",
        "most operations in one submit; 0 = all that are free (fio: 1)",
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
    spec!(
        "device",
        [],
        Value::Text,
        "cuda:0",
        "device of bounce, cufile and vram-write: cuda:N, or cpu for host memory (not in fio)",
        |s, v| {
            s.device = v.to_owned();
            Ok(())
        }
    ),
    spec!("pool_ram", [], Value::Bytes, "256m", "RAM tier given to the pool (not in fio)", |s, v| {
        s.pool_ram_bytes = parse_bytes(v, s.kb_base)?;
        Ok(())
    }),
    spec!(
        "pool_verify",
        [],
        Value::Bool,
        "1",
        "checksums of the pool are compared on read; 0 only to see what that costs (not in fio)",
        |s, v| {
            s.pool_verify = boolean(v)?;
            Ok(())
        }
    ),
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
