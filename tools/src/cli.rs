//! The command line as data: parsing, `--help`, completions and man pages come from these types.
//!
//! Parsing only validates; `cmd` does the work.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::size;

const EXIT_CODES: &str = "\
Exit codes:
  0    success
  1    failed
  2    wrong usage, configuration or name
  3    the pool, region or source was not found
  4    busy: owned by another process, or in use
  5    corrupt data was found
  6    no space
  7    not supported by this kernel, machine or user
  8    degraded: `nvtier doctor` found something that is slower or missing
  130  interrupted by SIGINT or SIGTERM

Sizes are whole numbers with a unit: 8GiB, 512M (powers of 1024), 10GB (powers of 1000).

Environment and files:
  NVTIER_POOL        the pool, where --pool is not given
  NVTIER_LOG         what is logged: a level, or directives as in fuse_fs=trace,info (RUST_LOG is heeded, too)
  $XDG_CONFIG_HOME/nvtier/config.toml
                     defaults (NVTIER_CONFIG names another file)
  AWS_*, GOOGLE_*    credentials and endpoints of s3:// and gs:// sources";

/// `PORT` means loopback; any other address is given in full.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    text.parse().map_err(|_| {
        "it is neither a port (9299: loopback only) nor an address and a port (127.0.0.1:9299, [::]:9299)"
            .to_owned()
    })
}

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "nvtier",
    version,
    about = "NVMe as the next memory tier under VRAM: pools of tensors, mounted and measured",
    after_help = EXIT_CODES,
    propagate_version = true,
    max_term_width = 110
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Print one JSON document instead of text (errors too, on standard error)
    #[arg(long, global = true, display_order = 100)]
    pub json: bool,
    /// How progress is shown on standard error
    #[arg(long, global = true, value_enum, default_value_t = ProgressMode::Auto, value_name = "HOW", display_order = 101)]
    pub progress: ProgressMode,
    /// Log more to standard error (-v: info, -vv: debug)
    #[arg(short, long, global = true, action = clap::ArgAction::Count, display_order = 102)]
    pub verbose: u8,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum ProgressMode {
    /// A bar on a terminal, lines otherwise
    Auto,
    /// A bar
    Bar,
    /// A line now and then
    Plain,
    /// Nothing
    None,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the whole path once: make, fill, mount, read and measure a small pool
    Demo(Demo),
    /// Make a pool
    Format(Format),
    /// Find free drives, make a pool of them with a mount unit for systemd, or take that back
    Disk(Disk),
    /// Say what a pool is and how full, or what an NVMe drive is and how healthy
    Info(Info),
    /// Bring a file, a directory or objects from a store into a pool
    Import(Import),
    /// Write a region or directory of a pool to local files
    Export(Export),
    /// Load tensors into a GPU's memory (or the host's) and say how fast and by which way
    Load(Load),
    /// List a directory of a pool
    Ls(Ls),
    /// Say everything about one region: size, generation, tensors
    Stat(Stat),
    /// Read regions and compare them with their checksums
    Verify(Verify),
    /// Look after the KV caches in a pool
    Kv(Kv),
    /// Remove a region, or a directory with -r
    Rm(Rm),
    /// Mount a pool as a file system
    Mount(Mount),
    /// Unmount a mounted pool
    Umount(Umount),
    /// Measure drives, files, pools and mounts in fio's language
    #[command(disable_help_flag = true)]
    Bench(Bench),
    /// Look at this machine: what is there, what is needed, what is lost, and what to do about it
    Doctor(Doctor),
    /// Say what a model needs of a machine, where each part will live, how fast it can be, and what would help
    Plan(Plan),
    /// Fine-tune a model as aiDAPTIV's YAML files say, on VRAM, RAM and NVMe (by the Python package)
    Train(Train),
    /// Show what the owner of a pool does: throughput, queues, times, hit rates, what it holds
    Top(Top),
    /// Bundle what somebody who is to help has to know: doctor, pools, configuration, logs; no secrets
    Report(Report),
    /// Print version and what this build and kernel can do
    Version,
    /// Print a completion script for a shell
    Completions(Completions),
    /// Write man pages into a directory
    Man(Man),
}

/// The pool a command works on.
#[derive(Clone, Debug, Args)]
pub struct PoolArg {
    /// The pool: its directory, image file or block device
    #[arg(long, env = "NVTIER_POOL", value_name = "POOL", value_hint = ValueHint::AnyPath)]
    pub pool: Option<PathBuf>,
}

/// `nvtier doctor`
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code: 0 when all is well, 8 when something is slower or missing, 7 when nvtier cannot run here."
)]
pub struct Doctor {
    /// Where a pool lies, or is to lie
    #[arg(default_value = ".", value_hint = ValueHint::AnyPath)]
    pub path: PathBuf,
    /// Print the commands that mend what can be mended
    #[arg(long)]
    pub fix_hints: bool,
    /// Measure the drive below PATH, a mount, copies in memory and to a GPU, and save the figures for `nvtier plan` and `nvtier load`;
    /// twice --measure-bytes are written, and removed again
    #[arg(long, conflicts_with = "fix_hints")]
    pub measure: bool,
    /// Length of the file that is measured with
    #[arg(long, requires = "measure", value_name = "SIZE", default_value = "1GiB", value_parser = size::parse_nonzero)]
    pub measure_bytes: u64,
}

/// `nvtier plan`
#[derive(Debug, Args)]
#[command(after_help = "\
MODEL is a config.json, a snapshot directory, a safetensors or GGUF file, or a name of the built-in table (--list). Nothing
but headers is read. Without --gpu, --ram and --drive it plans for this machine, with the ceilings that `nvtier doctor
--measure` saved where there are any. Times are floors: what the slowest part needs if nothing else costs anything.

  nvtier plan Llama-3.1-8B --gpu 'RTX 4090' --context 32768 --batch 4
  nvtier plan ~/models/m --kv-precision fp8 --sessions 100
  nvtier plan Llama-3.1-70B --task finetune --gpu 'RTX 4090' --ram 128GB --drive gen4:4TB --micro-batches 8

Exit code: 0 where it fits, 6 where it does not.")]
pub struct Plan {
    /// The model
    #[arg(value_name = "MODEL", required_unless_present = "list", value_hint = ValueHint::AnyPath)]
    pub model: Option<String>,
    /// List the names of models and GPUs that are known, and of precisions
    #[arg(long, conflicts_with = "model")]
    pub list: bool,
    /// What is to be done
    #[arg(long, value_enum, default_value_t = PlanTask::Infer)]
    pub task: PlanTask,
    /// How weights are stored: bf16, fp8, nf4, q4_k, ... [default: as in the files or the configuration]
    #[arg(long, value_name = "NAME")]
    pub precision: Option<String>,
    /// How keys and values are stored: f16, fp8, q8_0, ...
    #[arg(long, value_name = "NAME", default_value = "f16")]
    pub kv_precision: String,
    /// Keep the keys and values of latent attention (DeepSeek) expanded, as older engines do, not as one short vector
    #[arg(long)]
    pub expanded_kv: bool,
    /// Tokens of a sequence
    #[arg(long, value_name = "TOKENS", default_value_t = 8192, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pub context: u64,
    /// Sequences at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1 << 16))]
    pub batch: u64,
    /// Sequences whose KV cache is kept [default: the batch]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pub sessions: Option<u64>,
    /// A GPU of the table, or none [default: this machine's]
    #[arg(long, value_name = "NAME")]
    pub gpu: Option<String>,
    /// Memory of the GPU [default: what it has]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub vram: Option<u64>,
    /// 10^12 operations a second that the GPU reaches in 16-bit matrix products [default: 60 % of its peak]
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    pub tflops: Option<f64>,
    /// Host memory [default: this machine's]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub ram: Option<u64>,
    /// A drive: gen3, gen4 or gen5, or READ/WRITE in bytes a second, and its size: gen4:2TB, 6500MB/4GB:1TB (may be given several times)
    /// [default: the drive below --path]
    #[arg(long = "drive", value_name = "CLASS:SIZE")]
    pub drives: Vec<String>,
    /// Bytes that each drive is rated to be written in its life [default: 600 times its size]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub tbw: Option<u64>,
    /// Where the pool lies or is to lie
    #[arg(long, value_name = "PATH", default_value = ".", value_hint = ValueHint::AnyPath)]
    pub path: PathBuf,
    /// Tokens a day whose keys and values are written to the drives [default: each session once]
    #[arg(long, value_name = "TOKENS")]
    pub tokens_per_day: Option<u64>,
    /// Hours a day that it trains
    #[arg(long, value_name = "HOURS", default_value_t = 24.0, value_parser = parse_hours)]
    pub hours_per_day: f64,
    /// Micro-batches of a training step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1 << 16))]
    pub micro_batches: u64,
    /// Rank of adapters
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub lora_rank: u64,
    /// Training states that the drives keep; 2 can be rolled back
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=16))]
    pub generations: u64,
}

/// What is to be done with a model.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum PlanTask {
    /// Make tokens
    Infer,
    /// Train all parameters
    Finetune,
    /// Train adapters
    Lora,
}

/// `nvtier demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// Where to work (a new directory is made in it); default: the first of ., $TMPDIR, /var/tmp that is on a real drive
    #[arg(long, value_hint = ValueHint::DirPath)]
    pub dir: Option<PathBuf>,
    /// Keep the pool, the checkpoint and the mount point
    #[arg(long)]
    pub keep: bool,
    /// About how large the checkpoint is
    #[arg(long, value_name = "SIZE", default_value = "300MiB", value_parser = size::parse_nonzero)]
    pub size: u64,
    /// Seed of the weights
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Leave the mount out
    #[arg(long)]
    pub no_mount: bool,
}

/// `nvtier format`
#[derive(Debug, Args)]
#[command(after_help = "\
POOL is a directory on ext4 or XFS (made if it is not there), a block device, or with --raw an image file (made with
--size). With --member the data is striped over the members given, and POOL becomes a small directory that points to
them (name POOL itself as a --member to make it one). A place that holds anything else is refused, and said what it
holds, unless --force is given.

  nvtier format /mnt/nvme0/pool
  nvtier format /srv/pool --member /mnt/nvme0/pool --member /mnt/nvme1/pool --size 500GiB
  nvtier format pool.img --raw --size 64GiB")]
pub struct Format {
    /// Where the pool is to be
    #[arg(value_hint = ValueHint::AnyPath)]
    pub pool: PathBuf,
    /// Quota of a directory member, length of an image file; default: what the file system or device has
    #[arg(long, value_parser = size::parse_nonzero)]
    pub size: Option<u64>,
    /// A member to stripe over (may be given several times)
    #[arg(long = "member", value_name = "MEMBER", value_hint = ValueHint::AnyPath)]
    pub members: Vec<PathBuf>,
    /// Make an image file where POOL does not exist, instead of a directory
    #[arg(long)]
    pub raw: bool,
    /// Unit of checksums: a power of two from 4KiB to 4MiB [default: 16KiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub chunk_size: Option<u64>,
    /// Unit of striping over members: a multiple of the chunk size [default: 1MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub stripe_unit: Option<u64>,
    /// Destroy what is there
    #[arg(long)]
    pub force: bool,
}

/// `nvtier disk`
#[derive(Debug, Args)]
#[command(after_help = "\
`plan` changes nothing: alone it lists the drives of this machine, with drives it shows what `apply` would do with them. `apply`
formats them as one pool, striped, and writes a systemd unit that mounts it; what it does is recorded first, so that a second
run goes on where one was killed, and `undo` takes back what was done, and only that. Drives that are mounted, swapped to,
partitioned, in /etc/fstab, or part of md or LVM are never taken; one that holds something else is, with --force.

  nvtier disk plan
  nvtier disk plan /dev/nvme1n1 /dev/nvme2n1 --owner alice
  nvtier disk apply /dev/nvme1n1 /dev/nvme2n1 --owner alice
  nvtier disk undo")]
pub struct Disk {
    #[command(subcommand)]
    pub command: DiskCommand,
}

/// What to do with drives.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// List drives and whether they are free; with drives, show what `apply` would do
    Plan(DiskPlan),
    /// Format drives as a pool and write its mount unit
    Apply(DiskApply),
    /// Take back what `apply` did: stop and remove the unit, wipe the pool from the drives
    Undo(DiskUndo),
}

/// `nvtier disk plan`
#[derive(Debug, Args)]
pub struct DiskPlan {
    #[command(flatten)]
    pub target: DiskTarget,
    #[command(flatten)]
    pub place: DiskPlace,
}

/// `nvtier disk apply`
#[derive(Debug, Args)]
pub struct DiskApply {
    #[command(flatten)]
    pub target: DiskTarget,
    #[command(flatten)]
    pub place: DiskPlace,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// `nvtier disk undo`
#[derive(Debug, Args)]
pub struct DiskUndo {
    /// The name that was given to `apply`
    #[arg(default_value = "nvtier", value_parser = parse_disk_name)]
    pub name: String,
    #[command(flatten)]
    pub place: DiskPlace,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// What lies between drives and pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Nothing: the pool stripes over the drives itself
    #[default]
    Raw,
    /// An XFS on each drive; the pool stripes over a directory on each
    Xfs,
    /// One XFS on a logical volume that is striped over the drives
    Lvm,
}

impl Layout {
    /// As it is written on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Layout::Raw => "raw",
            Layout::Xfs => "xfs",
            Layout::Lvm => "lvm",
        }
    }
}

/// What `apply` is to do.
#[derive(Debug, Args)]
pub struct DiskTarget {
    /// Block devices: whole drives or partitions, by any of their names
    #[arg(value_name = "DRIVE", value_hint = ValueHint::AnyPath)]
    pub drives: Vec<PathBuf>,
    /// A name for the pool's unit and record, of letters, digits, `-` and `_`
    #[arg(long, value_name = "NAME", default_value = "nvtier", value_parser = parse_disk_name)]
    pub name: String,
    /// What lies between the drives and the pool; with a file system reads may bypass the daemon, and its space can be used otherwise, too
    #[arg(long, value_enum, value_name = "LAYOUT", default_value_t = Layout::Raw)]
    pub layout: Layout,
    /// Where it is mounted [default: /mnt/NAME]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub mountpoint: Option<PathBuf>,
    /// Whom the pool's root belongs to, and so who may write; other users are let in as modes and owners say [default: root alone]
    #[arg(long, value_name = "USER", value_hint = ValueHint::Username)]
    pub owner: Option<String>,
    /// Where the unit is written; in other places than systemd's own nothing is started
    #[arg(long, value_name = "DIR", default_value = "/etc/systemd/system", value_hint = ValueHint::DirPath)]
    pub unit_dir: PathBuf,
    /// Destroy what the drives hold
    #[arg(long)]
    pub force: bool,
    /// Write the unit, but neither enable nor start it
    #[arg(long)]
    pub no_start: bool,
}

/// Where records are.
#[derive(Debug, Args)]
pub struct DiskPlace {
    /// Where the record, and the directory that names the pool, are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nvtier", value_hint = ValueHint::DirPath)]
    pub state_dir: PathBuf,
}

fn parse_disk_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match (1..=64).contains(&text.len()) && text.chars().all(fits) && !text.starts_with('-') {
        true => Ok(text.to_owned()),
        false => Err("a name is 1 to 64 letters, digits, `-` and `_`".to_owned()),
    }
}

/// `nvtier info`
#[derive(Debug, Args)]
pub struct Info {
    #[command(flatten)]
    pub pool: PoolArg,
    /// The pool, as an argument; or an NVMe drive, by any of its nodes (/dev/nvme0, /dev/nvme0n1, /dev/ng0n1)
    #[arg(value_name = "POOL", id = "pool_path", conflicts_with = "pool", value_hint = ValueHint::AnyPath)]
    pub path: Option<PathBuf>,
    /// What the NVMe drive says about itself and its health, also where its namespace holds a pool
    #[arg(long, requires = "pool_path")]
    pub drive: bool,
}

/// `nvtier import`
#[derive(Debug, Args)]
#[command(after_help = "\
SRC is a file, a directory (a Hugging Face snapshot: links into blobs are followed, the tree is kept), file://, s3://,
gs://, https:// or http://. Objects are streamed with several range requests at a time. An import that was interrupted
goes on where it stopped when it is run again and the source is still the same (size and ETag, or size and time); until
it is complete nothing is visible under NAME.

  nvtier import ~/.cache/huggingface/hub/models--org--m/snapshots/REV models/m --pool /mnt/nvme0/pool
  nvtier import s3://bucket/models/m/ models/m --recursive
  nvtier import https://host/path/model.gguf models/model.gguf

S3-compatible servers: AWS_ENDPOINT_URL, AWS_ALLOW_HTTP=true for plain http, AWS_SKIP_SIGNATURE=true for public buckets.")]
pub struct Import {
    /// Where the bytes come from
    #[arg(value_hint = ValueHint::AnyPath)]
    pub src: String,
    /// Region or directory to make in the pool
    pub name: String,
    #[command(flatten)]
    pub pool: PoolArg,
    /// Serve metrics to Prometheus while it runs: a port (loopback only) or an address and a port
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    pub metrics: Option<SocketAddr>,
    /// Import everything under an object-store prefix
    #[arg(short, long)]
    pub recursive: bool,
    /// Replace regions that exist (each as a whole, once its import is complete)
    #[arg(short, long)]
    pub force: bool,
    /// Do not parse tensor headers
    #[arg(long)]
    pub no_check: bool,
    /// Start from the beginning even where an interrupted import could go on
    #[arg(long)]
    pub no_resume: bool,
    /// Range requests at a time [default: 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub connections: Option<u32>,
    /// Bytes of one range request
    #[arg(long, value_name = "SIZE", default_value = "8MiB", value_parser = parse_part_size)]
    pub part_size: u64,
}

/// `nvtier export`
#[derive(Debug, Args)]
pub struct Export {
    /// Region or directory in the pool
    pub name: String,
    /// Local file or directory to make
    #[arg(value_hint = ValueHint::AnyPath)]
    pub dest: PathBuf,
    #[command(flatten)]
    pub pool: PoolArg,
    /// Replace files that exist
    #[arg(short, long)]
    pub force: bool,
}

/// `nvtier load`
#[derive(Debug, Args)]
#[command(after_help = "\
PATH is a safetensors or GGUF file on any file system, or a directory, which stands for all of its safetensors files (or
else its GGUF files); with --pool it is a region or directory of that pool. All of them are loaded as one: past the page
cache, through a ring of pinned memory, into one allocation on the device. The memory is given back when the command ends:
this is for measuring, and for seeing that a checkpoint loads.

  nvtier load ~/models/m --check
  nvtier load models/m --pool /mnt/nvme0/pool --device cuda:1 --filter '*.layers.0.*'
  nvtier load m.safetensors --device cpu --json")]
pub struct Load {
    /// Files, directories, or with --pool regions
    #[arg(required = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub paths: Vec<PathBuf>,
    /// Where to: cuda:N, or cpu for host memory
    #[arg(long, default_value = "cuda:0")]
    pub device: String,
    /// The pool that PATH is in (NVTIER_POOL is not heeded here: PATH is a file otherwise)
    #[arg(long, value_name = "POOL", value_hint = ValueHint::AnyPath)]
    pub pool: Option<PathBuf>,
    /// Only tensors whose names fit this pattern with * and ? (may be given several times)
    #[arg(long, value_name = "GLOB")]
    pub filter: Vec<String>,
    /// Compare every byte on the device with a plain read of the source
    #[arg(long)]
    pub check: bool,
    /// Measure how fast pinned memory is copied to the device, and how fast the drive of a file reads, to compare with
    #[arg(long)]
    pub ceilings: bool,
    /// Write what was loaded from the device to a safetensors file, flushed, in place of what is there
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub save: Option<PathBuf>,
    /// Whether files are read past the page cache
    #[arg(long, value_enum, default_value_t = CacheMode::Auto, value_name = "HOW")]
    pub cache: CacheMode,
    /// How files are read that are in memory already (page cache, tmpfs)
    #[arg(long, value_enum, default_value_t = CachedHow::Auto, value_name = "HOW")]
    pub cached: CachedHow,
    /// Bring what is loaded into a RAM tier of SIZE first, and load from there: the next load of a program that keeps its pool open
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero, requires = "pool")]
    pub warm: Option<u64>,
    /// Do not compare a pool's checksums, to see what they cost
    #[arg(long, requires = "pool")]
    pub no_verify: bool,
    /// Which way the bytes go: cufile is NVIDIA's GPUDirect Storage, bounce goes by pinned host memory
    #[arg(long, value_enum, default_value_t = PathMode::Auto, value_name = "WAY")]
    pub path: PathMode,
    /// Make cuFile's self-test again, whatever an earlier one found
    #[arg(long)]
    pub retest: bool,
    /// Load nothing: say which ways there are from PATH to the device, what each needs, and what is missing
    #[arg(long, conflicts_with_all = ["check", "save", "tune"])]
    pub explain: bool,
    /// Measure chunk, depth and threads now and remember them (otherwise at the first load of 1 GiB or more)
    #[arg(long, conflicts_with = "no_tune")]
    pub tune: bool,
    /// Measure nothing, and use no settings that were measured
    #[arg(long)]
    pub no_tune: bool,
    /// Bytes of one read [default: 2MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub chunk: Option<u64>,
    /// Reads in flight [default: 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub depth: Option<u32>,
    /// Pinned memory [default: 128MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub ring: Option<u64>,
    /// Threads that read what is in memory already [default: the cores, at most 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Option<u32>,
}

/// How files are read that are in memory already.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum CachedHow {
    /// The faster one, as far as was measured
    Auto,
    /// The device reads the page cache: pages are pinned where they lie; copied where that is refused
    Map,
    /// Threads copy into pinned memory
    Copy,
}

/// Whether files are read past the page cache.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum CacheMode {
    /// Past it, unless they are in it already
    Auto,
    /// Past it, or not at all
    Direct,
    /// Through it
    Buffered,
}

/// Which way a load takes.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum PathMode {
    /// The best that a self-test found right
    Auto,
    /// Drive, pinned memory, device
    Bounce,
    /// Straight to the device, or an error that says why not
    Cufile,
}

/// `nvtier ls`
#[derive(Debug, Args)]
pub struct Ls {
    /// Directory or region in the pool
    #[arg(default_value = "")]
    pub name: String,
    #[command(flatten)]
    pub pool: PoolArg,
    /// Everything below, too
    #[arg(short, long)]
    pub recursive: bool,
}

/// `nvtier stat`
#[derive(Debug, Args)]
pub struct Stat {
    /// Region or directory in the pool
    pub name: String,
    #[command(flatten)]
    pub pool: PoolArg,
}

/// `nvtier verify`
#[derive(Debug, Args)]
#[command(after_help = "\
With --repair: damaged superblocks and copies of the catalog are written again from the good ones, files and space that
nothing owns are freed, and damaged chunks get their bytes back: from memory, from another region that is a copy, or from
--from, the file, directory or URL that NAME was imported from. Bytes are accepted only where they fit the checksum that
was committed. What is left is listed, and the exit code is 5. It works while the pool is mounted.

  nvtier verify --pool /mnt/nvme0/pool
  nvtier verify --repair models/m --from ~/models/m")]
pub struct Verify {
    /// Region or directory in the pool; default: everything
    pub name: Option<String>,
    #[command(flatten)]
    pub pool: PoolArg,
    /// Serve metrics to Prometheus while it runs: a port (loopback only) or an address and a port
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    pub metrics: Option<SocketAddr>,
    /// Mend what can be mended
    #[arg(long)]
    pub repair: bool,
    /// Where NAME was imported from, to take the bytes of damaged chunks from
    #[arg(long, value_name = "SOURCE", requires = "repair", value_hint = ValueHint::AnyPath)]
    pub from: Option<String>,
}

/// `nvtier kv`
#[derive(Debug, Args)]
#[command(after_help = "\
Also while another process owns the pool (a mount, an inference server): that process does it then.

  nvtier kv stat --pool /mnt/nvme0/pool
  nvtier kv export prompt.kv 5a00..01 5a00..02 --namespace 0
  nvtier kv import prompt.kv --pool /mnt/nvme1/pool")]
pub struct Kv {
    #[command(subcommand)]
    pub command: KvCommand,
    #[command(flatten)]
    pub pool: KvPool,
    /// Name of the store [default: default; of `top`: all]
    #[arg(long, global = true, value_name = "NAME")]
    pub store: Option<String>,
}

/// The pool, before or after what to do.
#[derive(Clone, Debug, Args)]
pub struct KvPool {
    /// The pool: its directory, image file or block device
    #[arg(long, global = true, env = "NVTIER_POOL", value_name = "POOL", value_hint = ValueHint::AnyPath)]
    pub pool: Option<PathBuf>,
}

/// What to do with a KV store.
#[derive(Debug, Subcommand)]
pub enum KvCommand {
    /// Say what it holds: blocks, namespaces, tenants, bytes written
    Stat,
    /// Show what stores do, while a mount or another program has them open: hits, misses, evictions, tenants, write budget
    Top(KvTop),
    /// List its blocks, in the order in which they came
    Ls(KvSelect),
    /// Read every block and compare it with its checksum; what is bad is dropped
    Verify,
    /// Remove blocks, pinned ones too
    Evict(KvBlocks),
    /// Keep blocks whatever else has to go
    Pin(KvBlocks),
    /// Keep them no longer
    Unpin(KvBlocks),
    /// Show what tenants use and may use, or limit one
    Quota(KvQuota),
    /// Write blocks into one file, in the order of their keys on the command line
    Export(KvExport),
    /// Store the blocks of such a file
    Import(KvImport),
    /// Remove the store with all of its blocks, while nobody has it open
    Drop,
}

/// `nvtier kv top`
#[derive(Debug, Args)]
pub struct KvTop {
    #[command(flatten)]
    pub look: Look,
}

/// Which blocks.
#[derive(Debug, Args)]
pub struct KvSelect {
    /// Of this namespace, by its number in `nvtier kv stat`
    #[arg(long, value_name = "NUMBER")]
    pub namespace: Option<u16>,
    /// Of this tenant
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
}

/// `nvtier kv evict`, `pin` and `unpin`
#[derive(Debug, Args)]
pub struct KvBlocks {
    /// Keys, in hexadecimal digits; default: all that --namespace and --tenant choose
    #[arg(value_name = "KEY")]
    pub keys: Vec<String>,
    #[command(flatten)]
    pub select: KvSelect,
    /// All blocks of the store
    #[arg(long, conflicts_with = "keys")]
    pub all: bool,
}

/// `nvtier kv quota`
#[derive(Debug, Args)]
#[command(after_help = "\
A tenant's own oldest blocks make room for his new ones, at once where the limit is below what he has. Pinned blocks stay. The limit is kept in the
store, for whoever opens it.

  nvtier kv quota                      all tenants
  nvtier kv quota alice 10GiB
  nvtier kv quota alice --clear
  nvtier kv quota '' 1GiB              blocks of who gave no name")]
pub struct KvQuota {
    /// The tenant; '' is who gave no name
    pub tenant: Option<String>,
    /// Bytes that the tenant's blocks may have, in all namespaces of the store together
    #[arg(value_parser = size::parse_nonzero)]
    pub size: Option<u64>,
    /// Take the limit away
    #[arg(long, conflicts_with = "size", requires = "tenant")]
    pub clear: bool,
}

/// `nvtier kv export`
#[derive(Debug, Args)]
pub struct KvExport {
    /// The file to make
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Keys, in hexadecimal digits; default: all that --namespace and --tenant choose
    #[arg(value_name = "KEY")]
    pub keys: Vec<String>,
    #[command(flatten)]
    pub select: KvSelect,
}

/// `nvtier kv import`
#[derive(Debug, Args)]
pub struct KvImport {
    /// A file that `nvtier kv export` made
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Store them for this tenant
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
}

/// `nvtier rm`
#[derive(Debug, Args)]
pub struct Rm {
    /// Regions or directories in the pool
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    #[command(flatten)]
    pub pool: PoolArg,
    /// Remove directories and what is in them
    #[arg(short, long)]
    pub recursive: bool,
    /// It is no error if a NAME does not exist
    #[arg(short, long)]
    pub force: bool,
}

/// `nvtier mount`
#[derive(Debug, Args)]
#[command(after_help = "\
Returns once the file system answers; the daemon then runs until `nvtier umount MNT` (or umount(8), SIGTERM, SIGINT). Its
log is in $XDG_RUNTIME_DIR/nvtier, else /run/nvtier or a directory of the user's in the temporary directory, and is removed
when the mount ends well. While a pool is mounted, other commands on it go through the daemon.")]
pub struct Mount {
    /// The pool: its directory, image file or block device
    #[arg(value_hint = ValueHint::AnyPath)]
    pub pool: PathBuf,
    /// An empty directory
    #[arg(value_hint = ValueHint::DirPath)]
    pub mountpoint: PathBuf,
    /// Stay in the foreground and log to standard error
    #[arg(long)]
    pub foreground: bool,
    /// Memory for cached data [default: an eighth of what is free, at most 8GiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub ram: Option<u64>,
    /// Change nothing
    #[arg(long)]
    pub read_only: bool,
    /// Let other users in (the kernel checks modes and owners)
    #[arg(long)]
    pub allow_other: bool,
    /// When checksums are compared: on every read, or by `nvtier verify` (reads may then bypass the daemon)
    #[arg(long, value_enum, value_name = "WHEN")]
    pub verify: Option<VerifyMode>,
    /// Read everything and compare checksums in the background, at most so fast, while nobody else reads or writes
    #[arg(long, value_name = "RATE", value_parser = size::parse_rate)]
    pub scrub: Option<u64>,
    /// Threads that answer the kernel [default: as many as help on this machine]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
    /// Serve metrics to Prometheus at http://ADDRESS/metrics: a port (loopback only) or an address and a port
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    pub metrics: Option<SocketAddr>,
    /// For the parent process: say on standard output when the mount is ready
    #[arg(long, hide = true, requires = "foreground")]
    pub ready_on_stdout: bool,
    /// For the parent process: where standard error goes
    #[arg(long, hide = true, requires = "foreground")]
    pub log: Option<PathBuf>,
}

/// When a mount compares checksums.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyMode {
    /// On every read
    Always,
    /// When `nvtier verify` runs
    Scrub,
}

/// `nvtier top`
#[derive(Debug, Args)]
pub struct Top {
    #[command(flatten)]
    pub pool: PoolArg,
    #[command(flatten)]
    pub look: Look,
    /// Bytes that each drive is rated to be written in its life [default: a table of drives, or what the drive says of its wear]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub tbw: Option<u64>,
}

/// How a live view is shown.
#[derive(Clone, Copy, Debug, Args)]
pub struct Look {
    /// Look twice, print, and end
    #[arg(long)]
    pub once: bool,
    /// Milliseconds between two looks
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(50..=3_600_000))]
    pub interval: u64,
}

/// `nvtier train`
#[derive(Debug, Args)]
#[command(after_help = "\
The files are aiDAPTIV's env_config.yaml and exp_config.yaml, unchanged; docs/guides/train.md has every key. A run that was
stopped or killed goes on from its last update when the same command is given again.

  nvtier train --env_config env_config.yaml --exp_config exp_config.yaml --check
  nvtier train --env_config env_config.yaml --exp_config exp_config.yaml --vram 20GiB --ram 64GiB

It runs `python -m nvtier.train.cli`: the Python needs the nvtier package with its extra `train`, torch and transformers. Exit
code 1 also where the loss is no number any more; 130 and 143 after SIGINT and SIGTERM.")]
pub struct Train {
    /// Paths: model, data, pool, output
    #[arg(long = "env_config", alias = "env-config", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub env_config: PathBuf,
    /// Batch, epochs, learning rate, precision, what to save
    #[arg(long = "exp_config", alias = "exp-config", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub exp_config: PathBuf,
    /// The pool, or where it is mounted [default: nvme_path of the file]
    #[arg(long, value_name = "POOL", value_hint = ValueHint::AnyPath)]
    pub pool: Option<PathBuf>,
    /// Name of the run in the pool [default: the model's]
    #[arg(long, value_name = "NAME")]
    pub run: Option<String>,
    /// Memory of the GPU for weights, gradients and states [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub vram: Option<u64>,
    /// Memory of the host that may be used [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_nonzero)]
    pub ram: Option<u64>,
    /// Without tiers, by torch's own AdamW: for models that fit
    #[arg(long, conflicts_with_all = ["vram", "ram"])]
    pub plain: bool,
    /// Do not load the model into memory [default: only where that has no room for it]
    #[arg(long, conflicts_with = "plain")]
    pub lazy: bool,
    /// Fail where there is no run to go on with [default: go on where there is one]
    #[arg(long, conflicts_with = "fresh")]
    pub resume: bool,
    /// Forget a run of that name and begin anew
    #[arg(long)]
    pub fresh: bool,
    /// Seed of the order of examples, of dropout and of new weights [default: 42]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,
    /// Scale gradients to this global norm at most
    #[arg(long, value_name = "NORM", value_parser = parse_positive)]
    pub clip_grad_norm: Option<f64>,
    /// Make every Nth update durable [default: 1; with --plain: one in ten minutes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub commit_every: Option<u64>,
    /// Read the files, say what is wrong with them, and do nothing
    #[arg(long)]
    pub check: bool,
    /// The Python to run [default: python3]
    #[arg(long, env = "NVTIER_PYTHON", value_name = "PROGRAM", value_hint = ValueHint::ExecutablePath)]
    pub python: Option<PathBuf>,
}

/// `nvtier report`
#[derive(Debug, Args)]
#[command(after_help = "\
One JSON document: text that can be read before it is sent. Secrets (values of variables whose names speak of them, keys, tokens,
passwords in URLs), the home directory and the names of user and machine are taken out, and names of files in pools unless
--names is given. What cannot be had is said in its place. Nothing is sent anywhere.

  nvtier report
  nvtier report -o report.json --pool /mnt/nvme0/pool")]
pub struct Report {
    /// The file to make, or - for standard output [default: nvtier-report-TIME.json]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub pool: PoolArg,
    /// With the names of files in the pools
    #[arg(long)]
    pub names: bool,
}

/// `nvtier umount`
#[derive(Debug, Args)]
pub struct Umount {
    /// Where the pool is mounted
    #[arg(value_hint = ValueHint::DirPath)]
    pub mountpoint: PathBuf,
}

/// `nvtier bench`
#[derive(Debug, Args)]
pub struct Bench {
    /// fio options and job files; see `nvtier bench --help`
    #[arg(allow_hyphen_values = true, trailing_var_arg = true, num_args = 0..)]
    pub args: Vec<std::ffi::OsString>,
}

/// `nvtier completions`
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// `nvtier man`
#[derive(Debug, Args)]
pub struct Man {
    /// Directory to write nvtier.1, nvtier-import.1, ... into (made if it is not there)
    #[arg(value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
}

fn parse_positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err(format!("`{text}` is not a number above 0")),
    }
}

fn parse_hours(text: &str) -> Result<f64, String> {
    parse_positive(text).and_then(|hours| match hours {
        ..=24.0 => Ok(hours),
        _ => Err("a day has 24 hours".to_owned()),
    })
}

fn parse_part_size(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        size @ 65_536..=1_073_741_824 => Ok(size),
        _ => Err("a range request is from 64KiB to 1GiB".to_owned()),
    }
}

/// The command with `bench`'s own options in it, for completions and man pages.
pub fn full_command() -> clap::Command {
    use clap::CommandFactory;
    Cli::command().mut_subcommand("bench", |_| bench::clap_command().name("bench"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
        full_command().debug_assert();
    }

    #[test]
    fn the_shape_that_scripts_rely_on() {
        for line in [
            "format P",
            "format P --size 8GiB --member A --member B --force",
            "disk plan",
            "disk plan /dev/a /dev/b --owner u --json",
            "disk apply /dev/a --layout xfs --mountpoint /m --name n --unit-dir /u --state-dir /s --force --no-start --yes",
            "disk undo n --yes --state-dir /s",
            "mount P M --foreground --ram 8GiB --read-only --allow-other --verify always --threads 4",
            "umount M",
            "report",
            "report -o F --pool P --names --json",
            "import s n --pool P",
            "export n d --pool P",
            "ls --pool P",
            "load F G --device cuda:1 --filter a.* --filter b --check --json",
            "load n --pool P --device cpu --no-verify --save F --ceilings",
            "load F --path cufile --retest --tune",
            "load F --explain --json",
            "ls a/b --pool P --json",
            "stat n --pool P",
            "rm n --pool P",
            "verify --pool P",
            "verify n --pool P",
            "verify n --repair --from S --pool P",
            "mount P M --scrub 50MiB/s",
            "info --pool P",
            "info P",
            "demo",
            "plan Llama-3.1-8B --gpu none --ram 64GB --drive gen4:2TB --drive gen4:2TB --json",
            "plan m --task finetune --micro-batches 8 --hours-per-day 8 --generations 1 --tbw 1200TB",
            "plan --list",
            "train --env_config E --exp_config X",
            "train --env-config E --exp-config X --pool P --run r --vram 20GiB --ram 64GiB --lazy --fresh --python python3",
            "train --env_config E --exp_config X --plain --resume --seed 1 --clip-grad-norm 1.0 --commit-every 5 --check --json",
            "top --once --json --interval 50 --tbw 600TB --pool P",
            "kv top --once --json --interval 50 --store s --pool P",
            "kv quota --json --pool P",
            "kv quota alice 10GiB --store s",
            "kv quota alice --clear",
            "version",
            "bench --rw=read --bs=1m job.fio",
            "completions bash",
            "man dir",
        ] {
            let args = std::iter::once("nvtier").chain(line.split(' '));
            assert!(Cli::try_parse_from(args).is_ok(), "{line}");
        }
    }
}
