//! One job's settings: what the options mean once parsed. Plain data; `options.rs` fills it, `runner.rs` obeys it.

use std::path::PathBuf;

/// Direction of one transfer, and index of everything kept per direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file.
    Read = 0,
    /// Into the file.
    Write = 1,
}

/// fio's `rw`: which directions, and whether offsets are sequential or random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Reads happen.
    pub read: bool,
    /// Writes happen.
    pub write: bool,
    /// Offsets are random.
    pub random: bool,
}

impl Pattern {
    /// fio's word for the pattern.
    pub fn name(self) -> &'static str {
        match (self.read, self.write, self.random) {
            (true, true, false) => "rw",
            (true, true, true) => "randrw",
            (false, true, false) => "write",
            (false, true, true) => "randwrite",
            (_, false, false) => "read",
            (_, false, true) => "randread",
        }
    }
}

/// An amount given in bytes or as a share of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// Bytes.
    Bytes(u64),
    /// Percent of the file's length, 0..=100.
    Percent(u64),
}

impl Amount {
    /// The amount in bytes for a file of `len` bytes, rounded down to `align` when it is a share.
    pub fn of(self, len: u64, align: u64) -> u64 {
        match self {
            Amount::Bytes(bytes) => bytes,
            Amount::Percent(percent) => {
                let bytes = (u128::from(len) * u128::from(percent) / 100) as u64;
                bytes / align * align
            }
        }
    }
}

/// What moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// `nvme::Queue` over io_uring (thread pool where io_uring is refused, said aloud).
    IoUring,
    /// NVMe commands to a namespace's character device, by the same queue.
    IoUringCmd,
    /// `pread` and `pwrite`, one at a time.
    Pread,
    /// Loads and stores through a mapping.
    Mmap,
    /// A region of an nvtier pool through the engine, checksums verified.
    Pool,
    /// A file on an nvtier mount; refuses any other file.
    Mount,
    /// Drive, pinned memory, device: as `nvtier load` goes.
    Bounce,
    /// NVIDIA's cuFile, past the host.
    CuFile,
    /// Device, pinned memory, drive: as `nvtier load --save` goes.
    VramWrite,
    /// Nothing: what the harness itself costs.
    Null,
}

impl EngineKind {
    /// The name `ioengine=` takes.
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::IoUring => "io_uring",
            EngineKind::IoUringCmd => "io_uring_cmd",
            EngineKind::Pread => "pread",
            EngineKind::Mmap => "mmap",
            EngineKind::Pool => "pool",
            EngineKind::Mount => "mount",
            EngineKind::Bounce => "bounce",
            EngineKind::CuFile => "cufile",
            EngineKind::VramWrite => "vram-write",
            EngineKind::Null => "null",
        }
    }

    /// Whether one end of it is a device's memory.
    pub fn has_device(self) -> bool {
        matches!(self, EngineKind::Bounce | EngineKind::CuFile | EngineKind::VramWrite)
    }
}

/// Checksum that `verify=` writes into, and expects in, every block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// CRC-32 (IEEE).
    Crc32,
    /// CRC-32C, in hardware where there is any.
    Crc32c,
    /// xxHash, 32 bits.
    XxHash,
}

/// LLM-shaped access patterns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Tensors of a checkpoint, in order, in large reads.
    ModelLoad,
    /// KV-cache blocks of 128 KiB to 2 MiB at random offsets, by several sessions.
    KvRestore,
}

/// Everything one job section asks for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the job.
    pub name: String,
    /// Free text, shown in reports.
    pub description: Option<String>,
    /// Directions and order.
    pub pattern: Pattern,
    /// Block size in bytes of reads and of writes.
    pub block_bytes: [u64; 2],
    /// Operations in flight.
    pub iodepth: u32,
    /// Most operations given to the kernel by one submit; 0 = as many as are free.
    pub batch_submit: u32,
    /// Fewest completions waited for at a time.
    pub batch_complete_min: u32,
    /// Workers of this job.
    pub numjobs: u32,
    /// Extent of the file that is used.
    pub size: Option<Amount>,
    /// Bytes to move in all; default: `size`.
    pub io_bytes: Option<Amount>,
    /// Operations to make in all.
    pub number_ios: Option<u64>,
    /// Where in the file the job starts.
    pub offset: Amount,
    /// Added to `offset` for each further worker.
    pub offset_increment: Amount,
    /// Limit on time, microseconds; 0 = none.
    pub runtime_us: u64,
    /// Repeat until `runtime_us` is over.
    pub time_based: bool,
    /// Time before measuring starts, microseconds.
    pub ramp_us: u64,
    /// Time before the job starts, microseconds.
    pub startdelay_us: u64,
    /// O_DIRECT.
    pub direct: bool,
    /// Files (or regions, for `ioengine=pool`); empty: named after the job.
    pub filenames: Vec<PathBuf>,
    /// Directory of files named after the job.
    pub directory: Option<PathBuf>,
    /// What moves the bytes.
    pub engine: EngineKind,
    /// Bytes per second, read and write; `None` = as fast as it goes.
    pub rate: [Option<u64>; 2],
    /// Operations per second, read and write.
    pub rate_iops: [Option<u64>; 2],
    /// Share of reads in a mix, percent.
    pub rwmixread: u32,
    /// Checksum in every block.
    pub verify: Option<Verify>,
    /// Read back after writing.
    pub do_verify: bool,
    /// Stop at the first bad block.
    pub verify_fatal: bool,
    /// One report for all workers of a group.
    pub group_reporting: bool,
    /// fsync after this many writes; 0 = never.
    pub fsync: u64,
    /// As `fsync`, with fdatasync.
    pub fdatasync: u64,
    /// fsync when the job has written everything.
    pub end_fsync: bool,
    /// Seed of offsets and data.
    pub randseed: u64,
    /// The same offsets every run.
    pub randrepeat: bool,
    /// Offsets may repeat before all were used.
    pub norandommap: bool,
    /// Drop the file's pages from the page cache before the run.
    pub invalidate: bool,
    /// Runs of the whole job.
    pub loops: u64,
    /// Percentiles to report.
    pub percentiles: Vec<f64>,
    /// Percentiles of completion latency.
    pub clat_percentiles: bool,
    /// Percentiles of total latency.
    pub lat_percentiles: bool,
    /// Percentiles of submission latency.
    pub slat_percentiles: bool,
    /// No submission latency; lets one system call both submit and wait.
    pub disable_slat: bool,
    /// When one job ends, all end.
    pub exitall: bool,
    /// Wait for earlier jobs before starting.
    pub stonewall: bool,
    /// Start a new reporting group.
    pub new_group: bool,
    /// New random content for every write.
    pub refill_buffers: bool,
    /// Zeroes instead of random content.
    pub zero_buffers: bool,
    /// A fresh stamp in every 4 KiB of every write, so that no drive can deduplicate.
    pub scramble_buffers: bool,
    /// Register buffers with the ring.
    pub fixedbufs: bool,
    /// Busy-poll the drive for completions.
    pub hipri: bool,
    /// Pool of `ioengine=pool`.
    pub pool: Option<PathBuf>,
    /// Device of `ioengine=bounce`, `cufile` and `vram-write`.
    pub device: String,
    /// RAM tier given to the pool, bytes.
    pub pool_ram_bytes: u64,
    /// Compare the pool's checksums on read.
    pub pool_verify: bool,
    /// Remove the file afterwards.
    pub unlink: bool,
    /// Preallocate files that are laid out.
    pub fallocate: bool,
    /// Only lay the files out.
    pub create_only: bool,
    /// CPUs the workers may use; empty = all.
    pub cpus_allowed: Vec<usize>,
    /// Pause between operations, microseconds.
    pub thinktime_us: u64,
    /// Meaning of the suffix k: 1024 or 1000.
    pub kb_base: u64,
    /// LLM-shaped pattern instead of `pattern`.
    pub profile: Option<Profile>,
    /// `(name, value)` as given, for the report's `job options`.
    pub given: Vec<(String, String)>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            name: String::new(),
            description: None,
            pattern: Pattern { read: true, write: false, random: false },
            block_bytes: [4096; 2],
            iodepth: 1,
            // Measured (docs/bench.md): the drive starts on the first few while the rest are being filled.
            batch_submit: 4,
            batch_complete_min: 1,
            numjobs: 1,
            size: None,
            io_bytes: None,
            number_ios: None,
            offset: Amount::Bytes(0),
            offset_increment: Amount::Bytes(0),
            runtime_us: 0,
            time_based: false,
            ramp_us: 0,
            startdelay_us: 0,
            direct: false,
            filenames: Vec::new(),
            directory: None,
            engine: EngineKind::Pread,
            rate: [None; 2],
            rate_iops: [None; 2],
            rwmixread: 50,
            verify: None,
            do_verify: true,
            verify_fatal: false,
            group_reporting: false,
            fsync: 0,
            fdatasync: 0,
            end_fsync: false,
            randseed: 0,
            randrepeat: true,
            norandommap: false,
            invalidate: true,
            loops: 1,
            percentiles: DEFAULT_PERCENTILES.to_vec(),
            clat_percentiles: true,
            lat_percentiles: false,
            slat_percentiles: false,
            disable_slat: false,
            exitall: false,
            stonewall: false,
            new_group: false,
            refill_buffers: false,
            zero_buffers: false,
            scramble_buffers: true,
            fixedbufs: true,
            hipri: false,
            pool: None,
            device: "cuda:0".into(),
            pool_ram_bytes: 256 << 20,
            pool_verify: true,
            unlink: false,
            fallocate: true,
            create_only: false,
            cpus_allowed: Vec::new(),
            thinktime_us: 0,
            kb_base: 1024,
            profile: None,
            given: Vec::new(),
        }
    }
}

impl Settings {
    /// Bytes of the largest block either direction uses.
    pub fn max_block_bytes(&self) -> u64 {
        let used = [self.pattern.read, self.pattern.write];
        (0..2).filter(|&d| used[d]).map(|d| self.block_bytes[d]).max().unwrap_or(self.block_bytes[0])
    }

    /// Whether some option was given by this name.
    pub fn was_given(&self, name: &str) -> bool {
        self.given.iter().any(|(given, _)| given == name)
    }
}

/// fio's `percentile_list` when none is given.
pub const DEFAULT_PERCENTILES: [f64; 17] =
    [1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];
