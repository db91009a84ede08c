//! Fuzz targets: one function for each parser of bytes from outside, which panics when a rule is broken.
//!
//! The same functions run under libFuzzer (`cargo xtask fuzz`, crate `fuzz/libfuzzer`) and, over the committed corpus, the kept crashes and
//! a few thousand mutations, as a plain test (`tests/corpus.rs`). Rules that hold for all of them are in [`execute`]: no panic in any
//! thread, memory in proportion to the input, the same answer twice. Each target adds its own: what was decoded encodes to
//! the same, tensors lie inside their file, trees end.
#![forbid(unsafe_code)]

mod bench_input;
mod catalog;
mod command;
mod control;
mod kernel;
mod kv;
pub mod mutate;
mod names;
pub mod seeds;
mod source;
mod superblock;
mod tensor_files;

// The command is a program and no library; the parsers of what people write are compiled in from its own files.
#[allow(dead_code)]
#[path = "../../tools/src/cli.rs"]
mod cli;
#[allow(dead_code)]
#[path = "../../tools/src/config.rs"]
mod config;
#[allow(dead_code)]
#[path = "../../tools/src/failure.rs"]
mod failure;
#[allow(dead_code)]
#[path = "../../tools/src/output.rs"]
mod output;
#[allow(dead_code)]
#[path = "../../tools/src/names.rs"]
mod pool_names;
#[allow(dead_code)]
#[path = "../../tools/src/size.rs"]
mod size;

use std::fmt::{self, Debug, Write};
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: that of its corpus, its kept crashes, its dictionary and its libFuzzer program.
    pub name: &'static str,
    /// Runs one input; what comes back is the same for the same input.
    run: fn(&[u8]) -> u64,
    /// Longest input that is tried.
    pub max_len: usize,
    /// Bytes of memory that an input of `n` bytes may take: `base + per_byte * n`.
    memory: (usize, usize),
    /// Mutations that the plain test tries: fewer where one takes milliseconds.
    pub mutations: usize,
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "superblock",
        run: superblock::run,
        max_len: 8600,
        memory: (256 * KIB, 16),
        mutations: 4000,
    },
    Target {
        name: "catalog_records",
        run: catalog::records,
        max_len: 4096,
        memory: (256 * KIB, 256),
        mutations: 4000,
    },
    Target { name: "layout", run: catalog::layout, max_len: 4096, memory: (256 * KIB, 128), mutations: 4000 },
    Target {
        name: "catalog_image",
        run: catalog::image,
        max_len: 4096,
        memory: (96 * MIB, 16),
        mutations: 100,
    },
    Target { name: "pool", run: catalog::pool, max_len: 4096, memory: (96 * MIB, 256), mutations: 60 },
    Target {
        name: "safetensors",
        run: tensor_files::safetensors,
        max_len: 4096,
        memory: (600 * KIB, 64),
        mutations: 4000,
    },
    Target { name: "gguf", run: tensor_files::gguf, max_len: 4096, memory: (600 * KIB, 64), mutations: 4000 },
    Target { name: "npy", run: tensor_files::npy, max_len: 4096, memory: (600 * KIB, 64), mutations: 4000 },
    Target { name: "names", run: names::run, max_len: 2048, memory: (128 * KIB, 64), mutations: 4000 },
    Target {
        name: "control_frames",
        run: control::frames,
        max_len: 8192,
        memory: (6 * MIB, 64),
        mutations: 1500,
    },
    Target {
        name: "control_server",
        run: control::server,
        max_len: 1024,
        memory: (96 * MIB, 4096),
        mutations: 60,
    },
    Target {
        name: "control_client",
        run: control::client,
        max_len: 2048,
        memory: (32 * MIB, 4096),
        mutations: 150,
    },
    Target {
        name: "job_file",
        run: bench_input::job_file,
        max_len: 2048,
        memory: (4 * MIB, 1024),
        mutations: 3000,
    },
    Target {
        name: "bench_arguments",
        run: bench_input::arguments,
        max_len: 2048,
        memory: (8 * MIB, 1024),
        mutations: 3000,
    },
    Target {
        name: "command_line",
        run: command::arguments,
        max_len: 1024,
        memory: (16 * MIB, 1024),
        mutations: 300,
    },
    Target { name: "config", run: command::config, max_len: 2048, memory: (512 * KIB, 256), mutations: 3000 },
    Target {
        name: "kernel_tables",
        run: kernel::run,
        max_len: 4096,
        memory: (128 * KIB, 64),
        mutations: 4000,
    },
    Target { name: "kv_records", run: kv::records, max_len: 4096, memory: (256 * KIB, 128), mutations: 4000 },
    Target { name: "kv_store", run: kv::store, max_len: 4096, memory: (96 * MIB, 256), mutations: 1500 },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// Committed inputs that reach every branch known so far.
    pub fn corpus(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name)
    }

    /// Inputs that once broke a rule.
    pub fn regressions(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions").join(self.name)
    }
}

/// One input at a time: memory and panics are counted for the whole process.
static ALONE: Mutex<()> = Mutex::new(());
/// Panics that no target allowed, in any thread.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Panics are counted here instead of ending the process at once, so that one in a thread of the code under test is seen.
///
/// redb panics on some damaged databases; the catalog turns that into an error, so it does not count.
pub fn count_panics() {
    panic::set_hook(Box::new(|info| {
        if info.location().is_some_and(|place| place.file().contains("/redb-")) {
            return;
        }
        PANICS.fetch_add(1, Ordering::SeqCst);
        eprintln!("{info}");
    }));
}

/// Runs a target on an input and checks what holds for all of them.
///
/// # Panics
/// When a rule is broken; that is what fuzzing looks for.
pub fn execute(target: &Target, input: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(count_panics);
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let input = &input[..input.len().min(target.max_len)];
    let panics = PANICS.load(Ordering::SeqCst);
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let first = (target.run)(input);
    let taken = MEMORY.peak_usage().saturating_sub(before);
    let allowed = target.memory.0 + target.memory.1 * input.len();
    assert!(
        taken <= allowed,
        "{}: {taken} bytes of memory for an input of {} bytes",
        target.name,
        input.len()
    );
    // Every few inputs, chosen by their bytes so that a crash is found again.
    if crc32fast::hash(input).is_multiple_of(4) {
        assert_eq!((target.run)(input), first, "{}: two runs of the same input differ", target.name);
    }
    assert_eq!(PANICS.load(Ordering::SeqCst), panics, "{}: a thread panicked", target.name);
}

/// For the programs under libFuzzer.
///
/// # Panics
/// As [`execute`], and where there is no target of that name.
pub fn fuzz(name: &str, input: &[u8]) {
    let target = target(name).unwrap_or_else(|| panic!("no fuzz target is called {name}"));
    execute(target, input);
}

/// FNV-1a of what a value shows, without the text in memory.
fn digest(value: &impl Debug) -> u64 {
    struct Sum(u64);
    impl Write for Sum {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            for byte in text.bytes() {
                self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
            Ok(())
        }
    }
    let mut sum = Sum(0xcbf2_9ce4_8422_2325);
    let _ = write!(sum, "{value:?}");
    sum.0
}

/// Where targets that need files keep them: memory where there is some, so that no drive is worn.
fn scratch() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    builder.prefix("nvtier-fuzz-");
    let shm = Path::new("/dev/shm");
    let made = if shm.is_dir() { builder.tempdir_in(shm) } else { builder.tempdir() };
    made.expect("a scratch folder")
}
