//! The measurements: `nvtier bench` as its own process, so that each row is what a user would get by typing it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::Value;

use crate::failure::{Failure, Outcome};
use crate::interrupt;

/// What is measured, in the order of the table.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Row {
    /// The checkpoint's own files, O_DIRECT: what the drive gives.
    Drive,
    /// The checkpoint's own files, not cached, read(2): what the file system gives.
    FileCold,
    /// The checkpoint's own files, not cached, mmap(2).
    FileMmap,
    /// Regions through the engine, every checksum verified.
    Pool,
    /// Files of the mount, not cached, read(2).
    MountCold,
    /// Files of the mount, O_DIRECT.
    MountDirect,
    /// Files of the mount, not cached, mmap(2).
    MountMmap,
    /// Files of the mount, cached, read(2).
    MountWarm,
    /// Files of the mount, cached, mmap(2).
    MountWarmMmap,
}

impl Row {
    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Drive => "drive: O_DIRECT, io_uring, 32 deep",
            Self::FileCold => "plain files: read, cold",
            Self::FileMmap => "plain files: mmap, cold",
            Self::Pool => "pool: engine, checksums verified",
            Self::MountCold => "mount: read, cold",
            Self::MountDirect => "mount: O_DIRECT, 8 deep, cold",
            Self::MountMmap => "mount: mmap, cold",
            Self::MountWarm => "mount: read, warm",
            Self::MountWarmMmap => "mount: mmap, warm",
        }
    }

    /// The same act on plain files, to compare with.
    pub fn plain(self) -> Option<Self> {
        match self {
            Self::MountCold => Some(Self::FileCold),
            Self::MountMmap => Some(Self::FileMmap),
            _ => None,
        }
    }

    /// True where the drive is not asked.
    pub fn is_warm(self) -> bool {
        matches!(self, Self::MountWarm | Self::MountWarmMmap)
    }
}

/// A row of the table.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// What.
    pub row: Row,
    /// Median of the runs.
    pub bytes_per_second: f64,
    /// What bound the last run: `drive`, `cpu`, `queue depth`, ...
    pub bound: String,
}

/// All runs so far.
pub struct Runs {
    shards: Vec<PathBuf>,
    pool: PathBuf,
    rates: BTreeMap<Row, Vec<f64>>,
    bounds: BTreeMap<Row, String>,
}

impl Runs {
    /// None yet.
    pub fn new(shards: &[PathBuf], pool: &Path) -> Self {
        Self {
            shards: shards.to_vec(),
            pool: pool.to_owned(),
            rates: BTreeMap::new(),
            bounds: BTreeMap::new(),
        }
    }

    /// The drive's ceiling, on the files that were imported.
    pub fn drive(&mut self) -> Outcome {
        let files = self.shards.clone();
        self.bench(Row::Drive, &files, &["--ioengine=io_uring", "--direct=1", "--iodepth=32"])
    }

    /// The pool, by this process as its owner.
    pub fn pool(&mut self, name: &str) -> Outcome {
        self.drop_caches()?;
        let mut pool = OsString::from("--pool=");
        pool.push(&self.pool);
        let files = self.names(Path::new(name));
        self.bench_with(Row::Pool, &files, &["--ioengine=pool", "--iodepth=16"], &[pool])
    }

    /// Everything on the mount, each cold row after the same act on plain files: a drive's speed drifts.
    pub fn mount(&mut self, mountpoint: &Path, name: &str) -> Outcome {
        let files = self.names(&mountpoint.join(name));
        let plain = self.shards.clone();
        self.bench(Row::FileCold, &plain, &["--ioengine=pread"])?;
        self.drop_caches()?;
        self.bench(Row::MountCold, &files, &["--ioengine=pread"])?;
        self.drive()?;
        self.drop_caches()?;
        self.bench(Row::MountDirect, &files, &["--ioengine=io_uring", "--direct=1", "--iodepth=8"])?;
        self.bench(Row::FileMmap, &plain, &["--ioengine=mmap"])?;
        self.drop_caches()?;
        self.bench(Row::MountMmap, &files, &["--ioengine=mmap"])?;
        // The mapping has brought everything into the page cache.
        self.bench(Row::MountWarm, &files, &["--ioengine=pread", "--invalidate=0"])?;
        self.bench(Row::MountWarmMmap, &files, &["--ioengine=mmap", "--invalidate=0"])
    }

    /// Median rate of a row.
    pub fn median(&self, row: Row) -> Option<f64> {
        let mut rates = self.rates.get(&row)?.clone();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied()
    }

    /// The table.
    pub fn rows(&self) -> Vec<Measured> {
        let measured = |row: &Row| Measured {
            row: *row,
            bytes_per_second: self.median(*row).unwrap_or(0.0),
            bound: self.bounds.get(row).cloned().unwrap_or_default(),
        };
        self.rates.keys().map(measured).collect()
    }

    fn names(&self, directory: &Path) -> Vec<PathBuf> {
        self.shards.iter().filter_map(|shard| shard.file_name()).map(|name| directory.join(name)).collect()
    }

    /// Drops the pool's own files from the page cache. On a mount that passes reads through, they are what is cached.
    fn drop_caches(&self) -> Outcome {
        drop_below(&self.pool)
            .map_err(|error| Failure::io("drop the demo's files from the page cache", &error))
    }

    fn bench(&mut self, row: Row, files: &[PathBuf], options: &[&str]) -> Outcome {
        self.bench_with(row, files, options, &[])
    }

    fn bench_with(&mut self, row: Row, files: &[PathBuf], options: &[&str], more: &[OsString]) -> Outcome {
        interrupt::check()?;
        let tried = || format!("measure `{}`", row.title());
        let program = std::env::current_exe().map_err(|error| Failure::io("find this program", &error))?;
        let mut filename = OsString::from("--filename=");
        for (index, file) in files.iter().enumerate() {
            if index > 0 {
                filename.push(":");
            }
            filename.push(file.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:"));
        }
        // The drive's ceiling is the first row; where it is not known yet it is not looked for.
        let ceiling = match self.median(Row::Drive) {
            Some(rate) if !row.is_warm() => format!("--ceiling={}", rate as u64),
            _ => "--ceiling=off".to_owned(),
        };
        let mut command = Command::new(program);
        command
            .arg("bench")
            .args(["--name=demo", "--rw=read", "--bs=1m", "--output-format=json"])
            .arg(ceiling);
        command.arg(filename).args(options).args(more).stdin(Stdio::null());
        let output = command.output().map_err(|error| Failure::io(tried(), &error))?;
        interrupt::check()?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            return Err(Failure::failed(format!("{}: nvtier bench failed: {}", tried(), message.trim())));
        }
        let report: Value = serde_json::from_slice(&output.stdout)
            .map_err(|error| Failure::failed(format!("{}: nvtier bench wrote no JSON: {error}", tried())))?;
        let rate = report["jobs"][0]["read"]["bw_bytes"].as_f64().filter(|rate| *rate > 0.0);
        let rate = rate.ok_or_else(|| Failure::failed(format!("{}: nvtier bench read nothing", tried())))?;
        self.rates.entry(row).or_default().push(rate);
        let bound = report["nvtier"]["groups"][0]["bound"].as_str().unwrap_or("unknown");
        self.bounds.insert(row, bound.to_owned());
        Ok(())
    }
}

/// Drops every file below a directory from the page cache.
pub fn drop_below(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            drop_below(&entry.path())?;
        } else if kind.is_file() {
            let file = File::open(entry.path())?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}
