//! The rows: what runs on each side.

use std::cell::{OnceCell, RefCell};
use std::fs;
use std::path::{Path, PathBuf};

use crate::pools::{self, Mount};
use crate::process::{CommandLine, Figure, Measurement};
use crate::table::Row;
use crate::{Options, Result, machine, metadata};

/// A group of rows.
pub type Group = fn(&Context) -> Result<Vec<Row>>;

/// All groups, in the order they run.
pub const GROUPS: &[(&str, Group)] = &[
    ("bench", bench),
    ("pool", pool),
    ("mount-dir", mount_dir),
    ("mount-raw", mount_raw),
    ("mount-shm", mount_shm),
    ("checksums", checksums),
    ("metadata", metadata_rows),
    ("import", import),
    ("rss", rss),
];

/// Places and tools that rows share. Removes what it made when dropped.
pub struct Context<'a> {
    options: &'a Options,
    nvtier: PathBuf,
    dir: PathBuf,
    shm: PathBuf,
    data: OnceCell<PathBuf>,
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        for directory in [&self.dir, &self.shm] {
            if let Err(error) = fs::remove_dir_all(directory)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                eprintln!("compare: cannot remove {}: {error}", directory.display());
            }
        }
    }
}

type Run<'a> = Box<dyn Fn() -> Result<Measurement> + 'a>;
type Prepare<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// What the page cache holds when a run begins.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cache {
    /// What is there.
    Kept,
    /// Nothing.
    Emptied,
    /// Nothing, and the memory that the run will take is present.
    ///
    /// A virtual machine may give free pages back to its host (free page reporting): two seconds after memory was freed the kernel begins, a part
    /// every two seconds. A run that gets such pages waits until the host has found others, and one that a part falls into is slowed by it:
    /// the same cold read took from a quarter of its best rate to all of it. So the run is done twice, and the second one counts. Between
    /// the two what was freed before is handed back, while the first one's pages are in use; they are freed at the last moment.
    Rehearsed,
}

struct Side<'a> {
    name: &'a str,
    command: String,
    /// What has to be there before it is run, and is not measured.
    prepare: Option<Prepare<'a>>,
    run: Run<'a>,
}

impl Side<'_> {
    fn run(&self, cache: Cache) -> Result<Measurement> {
        if let Some(prepare) = &self.prepare {
            prepare()?;
        }
        if cache != Cache::Kept {
            machine::drop_caches();
        }
        (self.run)()
    }
}

impl<'a> Context<'a> {
    /// Makes the directories.
    pub fn new(options: &'a Options) -> Result<Context<'a>> {
        let make = |path: &Path| -> Result<PathBuf> {
            let own = path.join("nvtier-compare");
            fs::create_dir_all(&own)
                .and_then(|()| own.canonicalize())
                .map_err(|error| format!("cannot make {}: {error}", own.display()))
        };
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("nvtier")));
        let nvtier = options.nvtier.clone().or(beside).ok_or("give --nvtier")?;
        if !nvtier.exists() {
            return Err(format!("{} is not there: build it, or give --nvtier", nvtier.display()));
        }
        let (dir, shm) = (make(&options.dir)?, make(&options.shm)?);
        Ok(Context { options, nvtier, dir, shm, data: OnceCell::new() })
    }

    fn bytes(&self) -> u64 {
        self.options.size_mib << 20
    }

    /// The file that the disk rows read; written once, incompressible.
    fn data(&self) -> Result<&Path> {
        if self.data.get().is_none() {
            let path = self.dir.join("data");
            self.fill(&path, self.bytes())?;
            let _ = self.data.set(path);
        }
        Ok(self.data.get().expect("just set"))
    }

    fn fill(&self, path: &Path, bytes: u64) -> Result<()> {
        let mut words = vec![self.nvtier.display().to_string(), "bench".into(), "--ceiling=off".into()];
        words.extend(job(
            path,
            bytes,
            &["--rw=write", "--bs=1m", "--ioengine=io_uring", "--iodepth=16", "--end_fsync=1"],
        ));
        CommandLine(words).run(&self.dir).map(drop)
    }

    fn fio(&self, path: &Path, bytes: u64, job_options: &[impl AsRef<str>]) -> CommandLine {
        let mut words = vec!["fio".to_owned(), "--output-format=json".into()];
        words.extend(job(path, bytes, job_options));
        CommandLine(words)
    }

    fn bench(&self, path: &Path, bytes: u64, job_options: &[impl AsRef<str>]) -> CommandLine {
        let mut words =
            vec![self.nvtier.display().to_string(), "bench".into(), "--output-format=json".into()];
        words.push("--ceiling=off".into());
        words.extend(job(path, bytes, job_options));
        CommandLine(words)
    }

    /// Runs a row: A B B A ..., so that neither side always comes after the other.
    fn row(
        &self,
        what: &str,
        unit: &'static str,
        target: Option<f64>,
        cache: Cache,
        sides: [Side<'_>; 2],
    ) -> Result<Row> {
        let mut figures = [Vec::new(), Vec::new()];
        let wanted = self.options.only.as_ref().is_none_or(|only| what.contains(only));
        for round in 0..if wanted { self.options.rounds } else { 0 } {
            for index in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                if cache == Cache::Rehearsed && !self.options.no_rehearsal {
                    sides[index].run(cache)?;
                    machine::settle();
                }
                figures[index].push(sides[index].run(cache)?);
            }
        }
        let row = Row {
            what: what.into(),
            unit,
            target,
            names: sides.each_ref().map(|side| side.name.to_owned()),
            commands: sides.each_ref().map(|side| side.command.clone()),
            sides: figures,
        };
        if wanted {
            eprintln!("{what}: {:.3}, by rounds {}", row.ratio(), row.paired());
        }
        Ok(row)
    }

    fn side<'s>(&'s self, name: &'s str, line: CommandLine, figure: Figure, daemon: Option<u32>) -> Side<'s> {
        let command = line.text();
        Side { name, command, prepare: None, run: Box::new(move || line.measure(&self.dir, figure, daemon)) }
    }
}

fn job(path: &Path, bytes: u64, options: &[impl AsRef<str>]) -> Vec<String> {
    let mut words =
        vec!["--name=row".into(), format!("--filename={}", path.display()), format!("--size={bytes}")];
    words.extend(options.iter().map(|option| option.as_ref().to_owned()));
    words
}

/// Our harness against fio, same file, same options.
fn bench(context: &Context<'_>) -> Result<Vec<Row>> {
    let data = context.data()?.to_path_buf();
    let written = context.dir.join("written");
    context.fill(&written, context.bytes())?;
    let seconds = format!("--runtime={}", context.options.seconds);
    let mut rows = Vec::new();
    let sequential = ["--bs=1m", "--iodepth=32", "--direct=1", "--ioengine=io_uring"];
    let random = ["--bs=4k", "--iodepth=64", "--direct=1", "--ioengine=io_uring", "--time_based", &seconds];
    let cases: [(&str, &str, &[&str], &Path, Figure); 3] = [
        ("1 MiB QD32 read", "--rw=read", &sequential, &data, Figure::Bandwidth),
        ("1 MiB QD32 write", "--rw=write", &sequential, &written, Figure::Bandwidth),
        ("4 KiB QD64 random read", "--rw=randread", &random, &data, Figure::Iops),
    ];
    for (what, rw, options, path, figure) in cases {
        let unit = if figure == Figure::Iops { "IOPS" } else { "MB/s" };
        let ours: Vec<&str> = std::iter::once(rw).chain(options.iter().copied()).collect();
        let mut tuned = ours.clone();
        tuned.extend(["--fixedbufs=1", "--registerfiles=1"]);
        for (name, theirs) in [("fio", &ours), ("fio fixedbufs registerfiles", &tuned)] {
            let a = context.side("nvtier bench", context.bench(path, context.bytes(), &ours), figure, None);
            let b = context.side(name, context.fio(path, context.bytes(), theirs), figure, None);
            rows.push(context.row(&format!("{what}, vs {name}"), unit, Some(1.0), Cache::Emptied, [a, b])?);
        }
    }
    fs::remove_file(&written).map_err(|error| format!("cannot remove {}: {error}", written.display()))?;
    Ok(rows)
}

/// The engine over two directory members, checksums on, against fio's ceiling on the same drive.
fn pool(context: &Context<'_>) -> Result<Vec<Row>> {
    let data = context.data()?.to_path_buf();
    let pool = context.dir.join("striped");
    let member = context.dir.join("striped-2");
    pools::format(
        &context.nvtier,
        &context.dir,
        &pool,
        &["--member".into(), pool.display().to_string(), "--member".into(), member.display().to_string()],
    )?;
    pools::import(&context.nvtier, &context.dir, &data, "data", &pool)?;
    let ceiling = [
        "--rw=read",
        "--bs=1m",
        "--iodepth=32",
        "--direct=1",
        "--ioengine=io_uring",
        "--fixedbufs=1",
        "--registerfiles=1",
    ];
    let mut rows = Vec::new();
    let pool_option = format!("--pool={}", pool.display());
    // The time in which the pool's memory is made is not reading: a second goes by before what counts.
    let time = [
        "--ramp_time=1".to_owned(),
        format!("--runtime={}", context.options.seconds),
        "--time_based".to_owned(),
    ];
    let timed = |options: &[&str]| -> Vec<String> {
        options.iter().map(ToString::to_string).chain(time.clone()).collect()
    };
    let ours = timed(&["--rw=read", "--bs=4m", "--iodepth=16", "--ioengine=pool", &pool_option]);
    let plain: Vec<&str> =
        ceiling.iter().copied().filter(|option| !option.starts_with("--registerfiles")).collect();
    let (ceiling, plain) = (timed(&ceiling), timed(&plain));
    let rivals = [
        ("fio, plain file, 1 MiB QD32", context.fio(&data, context.bytes(), &ceiling)),
        ("nvtier bench, plain file, 1 MiB QD32", context.bench(&data, context.bytes(), &plain)),
    ];
    for (name, line) in rivals {
        let a = context.side(
            "pool over 2 directories, checksums verified",
            context.bench(Path::new("data"), context.bytes(), &ours),
            Figure::Bandwidth,
            None,
        );
        let b = context.side(name, line, Figure::Bandwidth, None);
        rows.push(context.row(
            &format!("pool read, 4 MiB QD16, vs {name}"),
            "MB/s",
            Some(0.95),
            Cache::Emptied,
            [a, b],
        )?);
    }
    for path in [pool, member] {
        fs::remove_dir_all(&path).map_err(|error| format!("cannot remove {}: {error}", path.display()))?;
    }
    Ok(rows)
}

/// Reads through a mount against the same reads of a plain file, by the same fio.
fn read_rows(
    context: &Context<'_>,
    mount: Mount,
    native: &Path,
    bytes: u64,
    targets: [Option<f64>; 7],
) -> Result<Vec<Row>> {
    let through = mount.point.join("data");
    let mount = RefCell::new(mount);
    let seconds = format!("--runtime={}", context.options.seconds);
    let cases: [(&str, Cache, Figure, Vec<&str>); 7] = [
        (
            "cold buffered sequential read 1 MiB",
            Cache::Rehearsed,
            Figure::Bandwidth,
            vec!["--rw=read", "--bs=1m", "--ioengine=psync"],
        ),
        (
            "cold O_DIRECT read 1 MiB QD8",
            Cache::Rehearsed,
            Figure::Bandwidth,
            vec!["--rw=read", "--bs=1m", "--ioengine=io_uring", "--iodepth=8", "--direct=1"],
        ),
        (
            "cold mmap scan",
            Cache::Rehearsed,
            Figure::Bandwidth,
            vec!["--rw=read", "--bs=1m", "--ioengine=mmap"],
        ),
        // fio tells the kernel that reads are sequential, which doubles the readahead of a native file and does not reach the
        // file behind a passed-through one. Loaders that map do not tell.
        (
            "cold mmap scan without fadvise",
            Cache::Rehearsed,
            Figure::Bandwidth,
            vec!["--rw=read", "--bs=1m", "--ioengine=mmap", "--fadvise_hint=0"],
        ),
        (
            "4 KiB random O_DIRECT read QD32",
            Cache::Emptied,
            Figure::Iops,
            vec![
                "--rw=randread",
                "--bs=4k",
                "--ioengine=io_uring",
                "--iodepth=32",
                "--direct=1",
                "--time_based",
                &seconds,
            ],
        ),
        (
            "warm buffered read 1 MiB",
            Cache::Kept,
            Figure::Bandwidth,
            vec!["--rw=read", "--bs=1m", "--ioengine=psync", "--invalidate=0", "--loops=2"],
        ),
        (
            "warm mmap scan",
            Cache::Kept,
            Figure::Bandwidth,
            vec!["--rw=read", "--bs=1m", "--ioengine=mmap", "--invalidate=0", "--loops=2"],
        ),
    ];
    let mut rows = Vec::new();
    for ((what, cache, figure, options), target) in cases.into_iter().zip(targets) {
        if cache == Cache::Kept {
            for path in [&through, native] {
                warm(path)?;
            }
        }
        let unit = if figure == Figure::Iops { "IOPS" } else { "MB/s" };
        let mut options = options;
        options.push("--readonly");
        let line = context.fio(&through, bytes, &options);
        let a = Side {
            name: "mount",
            command: line.text(),
            prepare: (cache != Cache::Kept).then(|| Box::new(|| mount.borrow_mut().remount()) as Prepare<'_>),
            run: Box::new(|| line.measure(&context.dir, figure, Some(mount.borrow().pid()))),
        };
        let b = context.side("native", context.fio(native, bytes, &options), figure, None);
        rows.push(context.row(what, unit, target, cache, [a, b])?);
    }
    Ok(rows)
}

/// Reads a file twice, so that the page cache holds it.
fn warm(path: &Path) -> Result<()> {
    for _ in 0..2 {
        let fail = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
        let mut file = fs::File::open(path).map_err(fail)?;
        std::io::copy(&mut file, &mut std::io::sink()).map_err(fail)?;
    }
    Ok(())
}

fn mount_dir(context: &Context<'_>) -> Result<Vec<Row>> {
    let data = context.data()?.to_path_buf();
    let pool = context.dir.join("pool-dir");
    pools::format(&context.nvtier, &context.dir, &pool, &[])?;
    pools::import(&context.nvtier, &context.dir, &data, "data", &pool)?;
    let mount = Mount::new(&context.nvtier, &pool, &context.dir.join("mnt"), context.options.ram_mib)?;
    let rows = read_rows(context, mount, &data, context.bytes(), [Some(0.95); 7]);
    fs::remove_dir_all(&pool).map_err(|error| format!("cannot remove {}: {error}", pool.display()))?;
    rows
}

fn raw(
    context: &Context<'_>,
    directory: &Path,
    data: &Path,
    bytes: u64,
    targets: [Option<f64>; 7],
) -> Result<Vec<Row>> {
    let image = directory.join("pool.img");
    let size = format!("{}MiB", (bytes >> 20) + (bytes >> 24) + 512);
    pools::format(&context.nvtier, &context.dir, &image, &["--raw".into(), "--size".into(), size])?;
    pools::import(&context.nvtier, &context.dir, data, "data", &image)?;
    let mount = Mount::new(&context.nvtier, &image, &context.dir.join("mnt"), context.options.ram_mib)?;
    let rows = read_rows(context, mount, data, bytes, targets);
    fs::remove_file(&image).map_err(|error| format!("cannot remove {}: {error}", image.display()))?;
    rows
}

fn mount_raw(context: &Context<'_>) -> Result<Vec<Row>> {
    let data = context.data()?.to_path_buf();
    let wanted = Some(0.95);
    raw(context, &context.dir, &data, context.bytes(), [wanted, wanted, wanted, wanted, None, None, None])
}

fn mount_shm(context: &Context<'_>) -> Result<Vec<Row>> {
    let data = context.shm.join("data");
    let bytes = context.options.shm_size_mib << 20;
    context.fill(&data, bytes)?;
    let wanted = Some(0.5);
    let rows = raw(context, &context.shm, &data, bytes, [wanted, wanted, wanted, wanted, None, None, None]);
    fs::remove_file(&data).map_err(|error| format!("cannot remove {}: {error}", data.display()))?;
    rows
}

/// The same reads of an image pool in memory, its checksums compared or not: no drive hides what they cost.
fn checksums(context: &Context<'_>) -> Result<Vec<Row>> {
    let data = context.shm.join("data");
    let bytes = context.options.shm_size_mib << 20;
    context.fill(&data, bytes)?;
    let image = context.shm.join("sums.img");
    let size = format!("{}MiB", (bytes >> 20) + (bytes >> 24) + 512);
    pools::format(&context.nvtier, &context.dir, &image, &["--raw".into(), "--size".into(), size])?;
    pools::import(&context.nvtier, &context.dir, &data, "data", &image)?;
    let pool_option = format!("--pool={}", image.display());
    let mut rows = Vec::new();
    for (what, options) in [
        ("read 4 MiB, 1 thread", ["--bs=4m", "--iodepth=1"]),
        ("read 4 MiB, 2 threads", ["--bs=4m", "--iodepth=2"]),
        ("read 1 MiB, 8 threads", ["--bs=1m", "--iodepth=8"]),
    ] {
        let line = |verify: &str| {
            let mut job = vec!["--rw=read", "--ioengine=pool", &pool_option, verify];
            job.extend(options);
            context.bench(Path::new("data"), bytes, &job)
        };
        let a = context.side("checksums compared", line("--pool_verify=1"), Figure::Bandwidth, None);
        let b = context.side("not compared", line("--pool_verify=0"), Figure::Bandwidth, None);
        rows.push(context.row(what, "MB/s", Some(0.9), Cache::Kept, [a, b])?);
    }
    for path in [image, data] {
        fs::remove_file(&path).map_err(|error| format!("cannot remove {}: {error}", path.display()))?;
    }
    Ok(rows)
}

fn metadata_rows(context: &Context<'_>) -> Result<Vec<Row>> {
    let pool = context.dir.join("pool-meta");
    pools::format(&context.nvtier, &context.dir, &pool, &[])?;
    let mount = Mount::new(&context.nvtier, &pool, &context.dir.join("mnt"), context.options.ram_mib)?;
    let (through, native) = (mount.point.join("many"), context.dir.join("many"));
    let mut rows = Vec::new();
    for directory in [&through, &native] {
        metadata::prepare(directory)?;
    }
    for (what, operation) in metadata::OPERATIONS {
        let side = |name, directory: &PathBuf| {
            let (directory, command) = (directory.clone(), format!("benches/compare/metadata.rs: {what}"));
            Side {
                name,
                command,
                prepare: None,
                run: Box::new(move || metadata::measure(&directory, operation)) as Run<'_>,
            }
        };
        let sides = [side("mount", &through), side("native", &native)];
        rows.push(context.row(what, "per second", None, Cache::Kept, sides)?);
    }
    drop(mount);
    fs::remove_dir_all(&pool).map_err(|error| format!("cannot remove {}: {error}", pool.display()))?;
    Ok(rows)
}

/// Removes what the last round wrote. Before the run, because a file system may go on discarding blocks after that until the next sync.
fn without(path: &Path) -> Prepare<'_> {
    Box::new(move || match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot remove {}: {error}", path.display()))
        }
        _ => Ok(()),
    })
}

/// Bytes into a pool against bytes into ext4, all durable at the end.
fn import(context: &Context<'_>) -> Result<Vec<Row>> {
    let data = context.data()?.to_path_buf();
    let bytes = context.bytes() as f64;
    let target = context.dir.join("copy");
    let dd = CommandLine(vec![
        "dd".into(),
        format!("if={}", data.display()),
        format!("of={}", target.display()),
        "bs=4M".into(),
        "iflag=direct".into(),
        "oflag=direct".into(),
        "conv=fsync".into(),
        "status=none".into(),
    ]);
    let timed = |line: &CommandLine| -> Result<Measurement> {
        let (wall, cpu_s, _) = line.run(&context.dir)?;
        Ok(Measurement { value: bytes / wall / 1e6, bytes, cpu_s })
    };
    let native = || Side {
        name: "dd to ext4, O_DIRECT",
        command: dd.text(),
        prepare: Some(without(&target)),
        run: Box::new(|| timed(&dd)),
    };
    // What `cp` can reach at best wherever it writes to: it reads its source through the page cache.
    let source = CommandLine::new(&[
        "dd",
        &format!("if={}", data.display()),
        "of=/dev/null",
        "bs=128k",
        "status=none",
    ]);
    let a = Side {
        name: "dd to /dev/null, as cp reads",
        command: source.text(),
        prepare: None,
        run: Box::new(|| timed(&source)),
    };
    let mut rows =
        vec![context.row("cp's source alone, buffered", "MB/s", None, Cache::Rehearsed, [a, native()])?];
    for (kind, more) in [
        ("directory", vec![]),
        (
            "raw",
            vec!["--raw".to_owned(), "--size".into(), format!("{}MiB", 2 * context.options.size_mib + 1024)],
        ),
    ] {
        let pool = context.dir.join(format!("pool-{kind}"));
        pools::format(&context.nvtier, &context.dir, &pool, &more)?;
        let a = Side {
            name: "nvtier import",
            command: format!("nvtier import {} data --pool {}", data.display(), pool.display()),
            prepare: None,
            run: Box::new(|| {
                let (_, wall, cpu_s) = pools::import(&context.nvtier, &context.dir, &data, "data", &pool)?;
                Ok(Measurement { value: bytes / wall / 1e6, bytes, cpu_s })
            }),
        };
        rows.push(context.row(
            &format!("import into a {kind} pool"),
            "MB/s",
            Some(0.9),
            Cache::Rehearsed,
            [a, native()],
        )?);
        let mount = Mount::new(&context.nvtier, &pool, &context.dir.join("mnt"), context.options.ram_mib)?;
        let into = mount.point.join("copied");
        let copy = format!("cp {0} {1} && sync {1}", data.display(), into.display());
        let line = CommandLine::new(&["sh", "-c", &copy]);
        let a = Side {
            name: "cp into the mount, sync",
            command: copy.clone(),
            prepare: Some(without(&into)),
            run: Box::new(|| {
                let before = machine::cpu_seconds(mount.pid());
                let mut measured = timed(&line)?;
                measured.cpu_s += machine::cpu_seconds(mount.pid()) - before;
                Ok(measured)
            }),
        };
        rows.push(context.row(
            &format!("cp into a mounted {kind} pool"),
            "MB/s",
            Some(0.9),
            Cache::Rehearsed,
            [a, native()],
        )?);
        let plain = format!("cp {0} {1} && sync {1}", data.display(), target.display());
        let plain_line = CommandLine::new(&["sh", "-c", &plain]);
        let a = Side {
            name: "cp into the mount, sync",
            command: copy.clone(),
            prepare: Some(without(&into)),
            run: Box::new(|| timed(&line)),
        };
        let b = Side {
            name: "cp to ext4, sync",
            command: plain,
            prepare: Some(without(&target)),
            run: Box::new(|| timed(&plain_line)),
        };
        rows.push(context.row(
            &format!("cp into a mounted {kind} pool, vs cp"),
            "MB/s",
            None,
            Cache::Rehearsed,
            [a, b],
        )?);
        drop(mount);
        let _ = fs::remove_file(&target);
        let removed = if kind == "raw" { fs::remove_file(&pool) } else { fs::remove_dir_all(&pool) };
        removed.map_err(|error| format!("cannot remove {}: {error}", pool.display()))?;
    }
    Ok(rows)
}

/// Most memory of the daemon while 10 GiB stream through a served mount. Not a race: A is what it used, B what it may use.
fn rss(context: &Context<'_>) -> Result<Vec<Row>> {
    let data = context.data()?.to_path_buf();
    let image = context.dir.join("pool-rss.img");
    let size = format!("{}MiB", context.options.size_mib * 17 / 16 + 512);
    pools::format(&context.nvtier, &context.dir, &image, &["--raw".into(), "--size".into(), size])?;
    pools::import(&context.nvtier, &context.dir, &data, "data", &image)?;
    let mount = Mount::new(&context.nvtier, &image, &context.dir.join("mnt"), context.options.ram_mib)?;
    let mut left: u64 = 10 << 30;
    while left > 0 {
        machine::drop_caches();
        let part = left.min(context.bytes());
        let options = ["--rw=read", "--bs=1m", "--ioengine=psync", "--readonly"];
        context.fio(&mount.point.join("data"), part, &options).run(&context.dir)?;
        left -= part;
    }
    let used = machine::status_kib(mount.pid(), "VmHWM") as f64 / 1024.0;
    drop(mount);
    fs::remove_file(&image).map_err(|error| format!("cannot remove {}: {error}", image.display()))?;
    let allowed = (context.options.ram_mib + 64) as f64;
    let one = |value| vec![Measurement { value, bytes: 0.0, cpu_s: 0.0 }];
    let verdict = if used <= allowed { "within the budget" } else { "over the budget" };
    Ok(vec![Row {
        what: format!("peak RSS of the daemon while 10 GiB stream ({verdict}; lower is better)"),
        unit: "MiB",
        target: None,
        names: ["daemon, VmHWM".into(), "--ram + 64 MiB".into()],
        commands: ["fio --rw=read --bs=1m through the mount, three passes".into(), "-".into()],
        sides: [one(used), one(allowed)],
    }])
}
