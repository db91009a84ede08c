//! Every engine end to end on small files: reports, verification, refusals.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::Value;

struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Scratch {
        Scratch { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs the benchmark and returns its exit code and its report.
    fn run(&self, args: &[&str]) -> (u8, String) {
        let report = self.path("report");
        let _ = std::fs::remove_file(&report);
        let mut all: Vec<OsString> =
            vec![format!("--output={}", report.display()).into(), "--ceiling=off".into()];
        all.push(format!("--directory={}", self.directory.path().display()).into());
        // --directory belongs to a job: it goes behind the first --name.
        let directory = all.pop().unwrap();
        for arg in args {
            all.push(arg.into());
            if arg.starts_with("--name=") {
                all.push(directory.clone());
            }
        }
        let code = bench::run_code(&all);
        (code, std::fs::read_to_string(report).unwrap_or_default())
    }

    fn json(&self, args: &[&str]) -> (u8, Value) {
        let mut all = vec!["--output-format=json"];
        all.extend(args);
        let (code, text) = self.run(&all);
        (code, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn each_engine_reads_and_writes_what_it_was_told_to() {
    for engine in ["io_uring", "pread", "mmap", "null"] {
        for rw in ["read", "write", "randread", "randwrite", "rw", "randrw"] {
            let scratch = Scratch::new();
            let (engine_arg, rw_arg) = (format!("--ioengine={engine}"), format!("--rw={rw}"));
            let args = ["--name=a", &engine_arg, &rw_arg, "--bs=16k", "--size=1m", "--iodepth=4"];
            let (code, report) = scratch.json(&args);
            assert_eq!(code, 0, "{engine} {rw}: {report}");
            let job = &report["jobs"][0];
            let moved =
                job["read"]["io_bytes"].as_u64().unwrap() + job["write"]["io_bytes"].as_u64().unwrap();
            let ios =
                job["read"]["total_ios"].as_u64().unwrap() + job["write"]["total_ios"].as_u64().unwrap();
            assert_eq!((moved, ios), (1 << 20, 64), "{engine} {rw}");
            assert_eq!(
                job["read"]["total_ios"].as_u64().unwrap() > 0,
                rw.contains("read") || rw.contains("rw")
            );
            for direction in ["read", "write"] {
                let direction = &job[direction];
                assert_eq!(direction["clat_ns"]["N"], direction["total_ios"]);
                assert_eq!(direction["short_ios"], 0);
            }
        }
    }
}

#[test]
fn written_bytes_are_in_the_file_and_do_not_compress() {
    let scratch = Scratch::new();
    for engine in ["--ioengine=io_uring", "--ioengine=pread", "--ioengine=mmap"] {
        let (code, report) = scratch.json(&[
            "--name=w",
            "--rw=write",
            engine,
            "--bs=64k",
            "--size=1m",
            "--iodepth=4",
            "--end_fsync=1",
        ]);
        assert_eq!(code, 0, "{report}");
        assert_eq!(report["jobs"][0]["sync"]["total_ios"], 1);
        let bytes = std::fs::read(scratch.path("w.0.0")).unwrap();
        assert_eq!(bytes.len(), 1 << 20);
        let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
        assert!(zeros < bytes.len() / 128, "{engine}: {zeros} zero bytes");
        std::fs::remove_file(scratch.path("w.0.0")).unwrap();
    }
}

#[test]
fn verification_passes_on_good_data_and_finds_a_flipped_byte() {
    for (engine, sum) in [("io_uring", "crc32c"), ("pread", "xxhash"), ("mmap", "crc32")] {
        let scratch = Scratch::new();
        let (engine, sum) = (format!("--ioengine={engine}"), format!("--verify={sum}"));
        let file = format!("--filename={}", scratch.path("v").display());
        let base = ["--name=v", &engine, &sum, &file, "--bs=8k", "--size=512k", "--iodepth=8"];
        let with = |more: &str| {
            let mut args = base.to_vec();
            args.push(more);
            scratch.json(&args)
        };
        let (code, report) = with("--rw=randwrite");
        assert_eq!(code, 0, "{report}");
        assert_eq!(report["jobs"][0]["read"]["total_ios"], 64, "every block is read back");
        assert_eq!(with("--rw=read").0, 0);
        flip(&scratch.path("v"), 100_000);
        let (code, report) = with("--rw=read");
        assert_eq!(code, 5, "{report}");
        assert_eq!(report["jobs"][0]["error"], 84);
        assert_eq!(report["jobs"][0]["read"]["total_ios"], 64, "without verify_fatal it goes on");
        let mut args = base.to_vec();
        args.extend(["--rw=read", "--verify_fatal=1", "--iodepth=1"]);
        let (code, report) = scratch.json(&args);
        assert_eq!(code, 5);
        assert_eq!(report["jobs"][0]["read"]["total_ios"], 100_000 / 8192 + 1, "with it, it stops there");
    }
}

#[test]
fn direct_transfers_work_where_the_file_system_takes_them() {
    let scratch = Scratch::new();
    let args = [
        "--name=d",
        "--ioengine=io_uring",
        "--direct=1",
        "--rw=randrw",
        "--bs=4k",
        "--size=1m",
        "--iodepth=16",
    ];
    let (code, report) = scratch.json(&args);
    if code == 7 {
        eprintln!("SKIPPED: {} does not take O_DIRECT", scratch.directory.path().display());
        return;
    }
    assert_eq!(code, 0, "{report}");
    let level = |depth: &str| report["jobs"][0]["iodepth_level"][depth].as_f64().unwrap();
    assert!(level("16") > 0.0 && level("32") == 0.0, "{report}");
}

#[test]
fn several_files_share_the_work_and_several_workers_share_a_report() {
    let scratch = Scratch::new();
    let files = format!("--filename={}:{}", scratch.path("x").display(), scratch.path("y").display());
    let args =
        ["--name=m", &files, "--rw=write", "--bs=4k", "--size=256k", "--numjobs=3", "--group_reporting"];
    let (code, report) = scratch.json(&args);
    assert_eq!(code, 0, "{report}");
    assert_eq!(report["jobs"].as_array().unwrap().len(), 1);
    assert_eq!(report["jobs"][0]["write"]["io_bytes"], 3 * 256 * 1024);
    for file in ["x", "y"] {
        assert_eq!(std::fs::metadata(scratch.path(file)).unwrap().len(), 128 << 10);
    }
    let (_, report) = scratch.json(&args[..args.len() - 1]);
    assert_eq!(report["jobs"].as_array().unwrap().len(), 3);
}

#[test]
fn job_files_run_their_sections_in_order() {
    let scratch = Scratch::new();
    let job = scratch.path("job.fio");
    let text = format!(
        "[global]\nbs=4k\nsize=64k\ndirectory={}\n\n[fill]\nrw=write\nfilename=data\n\n[check]\nstonewall\nrw=read\nfilename=data\n",
        scratch.directory.path().display()
    );
    std::fs::write(&job, text).unwrap();
    let (code, report) = scratch.json(&[job.to_str().unwrap()]);
    assert_eq!(code, 0, "{report}");
    assert_eq!(report["global options"]["bs"], "4k");
    let jobs = report["jobs"].as_array().unwrap();
    assert_eq!(
        jobs.iter().map(|job| job["jobname"].as_str().unwrap()).collect::<Vec<_>>(),
        ["fill", "check"]
    );
    assert_eq!(jobs.iter().map(|job| job["groupid"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(jobs[1]["read"]["io_bytes"], 65536);
}

#[test]
fn limits_by_count_and_time_and_rate_hold() {
    let scratch = Scratch::new();
    let (code, report) = scratch.json(&["--name=n", "--rw=randread", "--size=1m", "--number_ios=10"]);
    assert_eq!((code, &report["jobs"][0]["read"]["total_ios"]), (0, &Value::from(10)));
    let (code, report) = scratch.json(&[
        "--name=n",
        "--rw=read",
        "--size=64k",
        "--time_based",
        "--runtime=100ms",
        "--ioengine=null",
    ]);
    assert_eq!(code, 0);
    assert!(report["jobs"][0]["read"]["runtime"].as_u64().unwrap() >= 90, "{report}");
    // Twenty operations at two hundred a second cannot take less than 95 ms; how much more is not asserted.
    let (code, report) = scratch.json(&["--name=n", "--rw=read", "--size=80k", "--rate_iops=200"]);
    assert_eq!(code, 0);
    assert!(report["jobs"][0]["read"]["runtime"].as_u64().unwrap() >= 90, "{report}");
}

#[test]
fn fsyncs_come_as_often_as_asked() {
    let scratch = Scratch::new();
    let args = [
        "--name=f",
        "--rw=write",
        "--size=64k",
        "--bs=4k",
        "--fsync=4",
        "--ioengine=io_uring",
        "--iodepth=8",
    ];
    let (code, report) = scratch.json(&args);
    assert_eq!(code, 0, "{report}");
    assert_eq!(report["jobs"][0]["sync"]["total_ios"], 4);
    assert!(report["jobs"][0]["sync"]["lat_ns"]["mean"].as_f64().unwrap() > 0.0);
}

#[test]
fn loops_ramps_and_delays_run() {
    let scratch = Scratch::new();
    let (code, report) = scratch.json(&["--name=l", "--rw=read", "--size=64k", "--bs=4k", "--loops=3"]);
    assert_eq!((code, &report["jobs"][0]["read"]["total_ios"]), (0, &Value::from(48)));
    let ramp =
        ["--name=r", "--ioengine=null", "--size=64k", "--time_based", "--ramp_time=20ms", "--runtime=50ms"];
    let (code, report) = scratch.json(&ramp);
    assert_eq!(code, 0);
    let runtime = report["jobs"][0]["read"]["runtime"].as_u64().unwrap();
    assert!(runtime >= 45, "the ramp is not counted: {runtime}");
}

#[test]
fn failures_have_codes_and_words() {
    let scratch = Scratch::new();
    let missing = scratch.path("no/such/dir/f");
    let missing = format!("--filename={}", missing.display());
    assert_eq!(scratch.run(&["--name=e", &missing, "--size=64k"]).0, 3);
    assert_eq!(scratch.run(&["--name=e", "--bogus=1"]).0, 2);
    assert_eq!(scratch.run(&["--name=e", "--rw=read"]).0, 2, "no size and no file");
    assert_eq!(scratch.run(&["--name=e", "--ioengine=mount", "--size=64k"]).0, 2);
    let pool = ["--name=e", "--ioengine=pool", "--pool=/nonexistent/pool", "--size=64k"];
    assert_eq!(scratch.run(&pool).0, 3);
}

#[test]
fn the_pool_engine_writes_reads_and_verifies_regions_of_every_kind_of_pool() {
    let scratch = Scratch::new();
    let kinds = [
        ("one-directory", engine::FormatOptions::default()),
        (
            "two-directories",
            engine::FormatOptions {
                members: vec![scratch.path("member-0"), scratch.path("member-1")],
                stripe_unit: 64 << 10,
                ..engine::FormatOptions::default()
            },
        ),
        (
            "image",
            engine::FormatOptions { raw: true, size: Some(256 << 20), ..engine::FormatOptions::default() },
        ),
    ];
    for (kind, options) in kinds {
        let pool = scratch.path(kind);
        engine::Pool::format(&pool, &options).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let pool = format!("--pool={}", pool.display());
        let report = scratch.path("pool-report");
        let run = |more: &[&str]| {
            let mut args: Vec<OsString> =
                vec![format!("--output={}", report.display()).into(), "--output-format=json".into()];
            args.push("--ceiling=off".into());
            args.extend(
                ["--name=p", "--ioengine=pool", "--filename=a/b/region", "--size=2m"].map(OsString::from),
            );
            args.push(pool.clone().into());
            args.extend(more.iter().map(OsString::from));
            let code = bench::run_code(&args);
            let text = std::fs::read_to_string(&report).unwrap();
            (code, serde_json::from_str::<Value>(&text).unwrap())
        };
        for depth in ["--iodepth=1", "--iodepth=4"] {
            let (code, report) = run(&["--rw=write", "--bs=64k", "--verify=crc32c", depth, "--end_fsync=1"]);
            assert_eq!(code, 0, "{kind} {depth}: {report}");
            assert_eq!(report["jobs"][0]["read"]["io_bytes"], 2 << 20, "{kind} {depth}: read back");
            // Another run opens the pool anew: what it reads was committed.
            let (code, report) = run(&["--rw=read", "--bs=64k", "--verify=crc32c", depth]);
            assert_eq!(code, 0, "{kind} {depth}: {report}");
            assert_eq!(report["jobs"][0]["read"]["total_ios"], 32, "{kind} {depth}");
            let (code, report) = run(&["--rw=randread", "--bs=4k", "--number_ios=100", depth]);
            assert_eq!(
                (code, &report["jobs"][0]["read"]["total_ios"]),
                (0, &Value::from(100)),
                "{kind} {depth}"
            );
        }
    }
}

#[test]
fn the_text_report_has_fios_lines_and_ends_with_the_ceiling() {
    let scratch = Scratch::new();
    let args =
        ["--name=t", "--rw=randread", "--size=1m", "--ioengine=io_uring", "--iodepth=4", "--description=why"];
    let (code, text) = scratch.run(&args);
    assert_eq!(code, 0);
    for line in [
        "t: (g=0): rw=randread, bs=(R) 4KiB-4KiB",
        "t: (groupid=0, jobs=1): err= 0: pid=",
        "  Description  : [why]",
        "  read: IOPS=",
        "    clat percentiles (",
        "  cpu          : usr=",
        "  IO depths    : 1=",
        "     issued rwts: total=256,0,0,0 short=0,0,0,0 dropped=0,0,0,0",
        "Run status group 0 (all jobs):",
        "   READ: bw=",
    ] {
        assert!(text.contains(line), "{line:?} is not in:\n{text}");
    }
    assert!(text.trim_end().lines().last().unwrap().starts_with("Ceiling: bound by "), "{text}");
}

#[test]
fn profiles_read_a_checkpoint_and_kv_blocks() {
    let scratch = Scratch::new();
    let header = br#"{"a":{"dtype":"U8","shape":[3000000],"data_offsets":[0,3000000]},"b":{"dtype":"U8","shape":[5000],"data_offsets":[3000000,3005000]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.resize(bytes.len() + 3_005_000, 7);
    std::fs::write(scratch.path("m.safetensors"), &bytes).unwrap();
    let file = format!("--filename={}", scratch.path("m.safetensors").display());
    for engine in ["--ioengine=io_uring", "--ioengine=pread"] {
        for direct in ["--direct=1", "--direct=0"] {
            let (code, report) =
                scratch.json(&["--name=load", "--profile=model-load", &file, engine, direct]);
            if code == 7 {
                eprintln!("SKIPPED {engine} {direct}: no O_DIRECT here");
                continue;
            }
            assert_eq!(code, 0, "{engine} {direct}: {report}");
            let read = report["jobs"][0]["read"]["io_bytes"].as_u64().unwrap();
            assert!((3_005_000..=3_005_000 + 3 * 4096).contains(&read), "{engine} {direct}: {read}");
        }
    }
    std::fs::write(scratch.path("kv"), vec![1; 8 << 20]).unwrap();
    let file = format!("--filename={}", scratch.path("kv").display());
    let (code, report) =
        scratch.json(&["--name=kv", "--profile=kv-restore", &file, "--direct=0", "--size=4m"]);
    assert_eq!(code, 0, "{report}");
    assert!(report["jobs"][0]["read"]["io_bytes"].as_u64().unwrap() >= 4 * (4 << 20));
}

/// To and from the memory of a device; host memory is one like any other.
#[test]
fn bounce_and_vram_write_move_what_they_were_told_to() {
    for (engine, rw, depth) in [
        ("bounce", "read", "1"),
        ("bounce", "randread", "7"),
        ("vram-write", "write", "1"),
        ("vram-write", "randwrite", "7"),
    ] {
        let scratch = Scratch::new();
        let engine_arg = format!("--ioengine={engine}");
        let (rw_arg, depth_arg) = (format!("--rw={rw}"), format!("--iodepth={depth}"));
        let options = ["--device=cpu", "--bs=64k", "--size=4m", "--end_fsync=1"];
        let mut args = vec!["--name=a", &engine_arg, &rw_arg, &depth_arg];
        args.extend(options);
        let (code, report) = scratch.json(&args);
        assert_eq!(code, 0, "{engine} {rw}: {report}");
        let (this, other) = if engine == "bounce" { ("read", "write") } else { ("write", "read") };
        let job = &report["jobs"][0];
        assert_eq!((&job[this]["io_bytes"], &job[this]["total_ios"]), (&(4 << 20).into(), &64.into()));
        assert_eq!((&job[this]["clat_ns"]["N"], &job[other]["total_ios"]), (&64.into(), &0.into()));
        if engine == "vram-write" {
            // What is on the device is random, and differs from slot to slot.
            let bytes = std::fs::read(scratch.path("a.0.0")).unwrap();
            assert_eq!(bytes.len(), 4 << 20);
            let blocks: std::collections::HashSet<&[u8]> = bytes.chunks(64 << 10).collect();
            assert_eq!(blocks.len(), depth.parse::<usize>().unwrap());
            let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
            assert!(zeros < bytes.len() / 64, "{zeros} of {} bytes are zero", bytes.len());
        }
    }
}

#[test]
fn the_last_line_of_a_run_with_a_device_names_what_bound() {
    let scratch = Scratch::new();
    for engine in ["bounce", "vram-write"] {
        let engine = format!("--ioengine={engine}");
        let mut args: Vec<OsString> = vec![format!("--output={}", scratch.path("report").display()).into()];
        args.extend(
            ["--name=a", &engine, "--device=cpu", "--bs=1m", "--size=16m", "--iodepth=8"].map(Into::into),
        );
        args.push(format!("--directory={}", scratch.directory.path().display()).into());
        assert_eq!(bench::run_code(&args), 0);
        let report = std::fs::read_to_string(scratch.path("report")).unwrap();
        let last = report.lines().last().unwrap();
        assert!(last.starts_with("Ceiling: bound by "), "{report}");
    }
}

#[test]
fn a_profile_reads_a_checkpoint_into_a_device() {
    let scratch = Scratch::new();
    let header = br#"{"a":{"dtype":"U8","shape":[3000000],"data_offsets":[0,3000000]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(file.len() + 3_000_000, 7);
    std::fs::write(scratch.path("m.safetensors"), file).unwrap();
    let args =
        ["--name=a", "--profile=model-load", "--ioengine=bounce", "--device=cpu", "--filename=m.safetensors"];
    let (code, report) = scratch.json(&args);
    assert_eq!(code, 0, "{report}");
    assert!(report["jobs"][0]["read"]["io_bytes"].as_u64().unwrap() >= 3_000_000);
}

#[test]
fn devices_that_are_not_there_are_refused() {
    let scratch = Scratch::new();
    let run = |engine: &str, device: &str| {
        let (engine, device) = (format!("--ioengine={engine}"), format!("--device={device}"));
        scratch.run(&["--name=a", &engine, &device, "--bs=64k", "--size=2m"])
    };
    assert_eq!(run("bounce", "tpu").0, 2);
    let (code, report) = run("cufile", "cpu");
    assert_eq!(code, 7, "{report}");
    assert!(report.contains("no CUDA device"), "{report}");
    match gpudirect::driver::open("cuda:0") {
        Ok(_) => println!("skipped: this machine has CUDA"),
        Err(_) => {
            for engine in ["bounce", "cufile", "vram-write"] {
                let (code, report) = run(engine, "cuda:0");
                assert_eq!(code, 7, "{report}");
                assert!(report.contains("CUDA"), "{report}");
            }
        }
    }
}
