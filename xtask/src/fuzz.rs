//! `cargo xtask fuzz`: libFuzzer over the targets of `fuzz/`, with a stable toolchain and a C++ compiler.
//!
//! What cargo-fuzz does (`-C passes=sancov-module` and a link with libFuzzer) needs no nightly features as long as no sanitizer is
//! asked for, so cargo alone builds the programs. Memory and panics are watched by the targets themselves (`fuzz/src/lib.rs`).

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use crate::exec::{on_path, output, step};
use crate::paths;

/// Options of `cargo xtask fuzz`.
#[derive(Args)]
pub struct FuzzArgs {
    /// Targets to run, one after the other. Default: all.
    targets: Vec<String>,
    /// CPU time for each target, in seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Build with AddressSanitizer: slower, and finds what unsafe code of dependencies does. Needs the compiler's nightly features,
    /// which are unlocked for this build.
    #[arg(long)]
    asan: bool,
    /// Afterwards put into fuzz/corpus the smallest set of all inputs found that covers as much.
    #[arg(long)]
    minimize: bool,
    /// Print the names of the targets and stop.
    #[arg(long)]
    list: bool,
}

/// As cargo-fuzz has them.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];
/// An input that takes longer has found a hang.
const INPUT_LIMIT_S: u32 = 30;
const BUILD_LIMIT: Duration = Duration::from_secs(60 * 60);

/// Builds and runs targets; `Ok(false)` when any input broke a rule.
pub fn run(args: &FuzzArgs) -> Result<bool> {
    let known = targets()?;
    if args.list {
        known.iter().for_each(|name| println!("{name}"));
        return Ok(true);
    }
    if let Some(unknown) = args.targets.iter().find(|name| !known.contains(name)) {
        bail!("there is no fuzz target {unknown}; there are: {}", known.join(", "));
    }
    if !on_path("c++") {
        bail!("libFuzzer is built from C++: install a C++ compiler (g++ or clang++)");
    }
    let wanted = if args.targets.is_empty() { &known } else { &args.targets };
    let work = paths::target().join(if args.asan { "fuzz-asan" } else { "fuzz" });
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let programs = build(wanted, &work, args.asan)?;
    let mut fine = true;
    for (name, program) in wanted.iter().zip(&programs) {
        let fuzzed = Fuzzed::new(name, program, &work)?;
        fine &= fuzzed.run(args.seconds)?;
        if args.minimize {
            fuzzed.minimize()?;
        }
    }
    Ok(fine)
}

fn targets() -> Result<Vec<String>> {
    let folder = paths::workspace().join("fuzz/libfuzzer/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if let Some(name) = path.file_stem().and_then(|stem| stem.to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Builds the programs and copies them, so that they run on while the next ones are built.
fn build(names: &[String], work: &Path, asan: bool) -> Result<Vec<PathBuf>> {
    let host = host()?;
    let mut flags = COVERAGE.join(" ");
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "--locked", "--target", &host]);
    command.arg("--manifest-path").arg(paths::workspace().join("fuzz/libfuzzer/Cargo.toml"));
    for name in names {
        command.args(["--bin", name]);
    }
    if asan {
        flags.push_str(" -Zsanitizer=address");
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    command.env("RUSTFLAGS", flags).env("CARGO_TARGET_DIR", work).env("CARGO_INCREMENTAL", "0");
    println!("building {} fuzz targets with coverage ...", names.len());
    step(command, &work.join("build.log"), BUILD_LIMIT)?;
    let folder = work.join("programs");
    fs::create_dir_all(&folder)?;
    let copy = |name: &String| {
        let built = work.join(&host).join("release").join(name);
        let program = folder.join(name);
        let _ = fs::remove_file(&program); // it may be running
        fs::copy(&built, &program).with_context(|| format!("cannot copy {}", built.display()))?;
        Ok(program)
    };
    names.iter().map(copy).collect()
}

/// The compiler's own target, so that build scripts and proc macros are built without coverage.
pub fn host() -> Result<String> {
    let version = output("rustc", &["-vV"]).context("rustc -vV does not run")?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}

/// A target being fuzzed.
struct Fuzzed<'a> {
    name: &'a str,
    program: &'a Path,
    /// Inputs found on this machine, kept between runs.
    found: PathBuf,
    committed: PathBuf,
    regressions: PathBuf,
    artifacts: PathBuf,
    log: PathBuf,
}

impl Fuzzed<'_> {
    fn new<'a>(name: &'a str, program: &'a Path, work: &Path) -> Result<Fuzzed<'a>> {
        let fuzz = paths::workspace().join("fuzz");
        let fuzzed = Fuzzed {
            name,
            program,
            found: work.join("corpus").join(name),
            committed: fuzz.join("corpus").join(name),
            regressions: fuzz.join("regressions").join(name),
            artifacts: work.join("artifacts").join(name),
            log: work.join(format!("{name}.log")),
        };
        for folder in [&fuzzed.found, &fuzzed.artifacts] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        Ok(fuzzed)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        command.arg(format!("-timeout={INPUT_LIMIT_S}")).args(["-rss_limit_mb=2048", "-print_final_stats=1"]);
        command.arg(format!("-artifact_prefix={}/", self.artifacts.display()));
        let dictionary = paths::workspace().join(format!("fuzz/dict/{}.dict", self.name));
        if dictionary.exists() {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// Runs until the program has used its CPU time; prints the closing line.
    fn run(&self, seconds: u64) -> Result<bool> {
        let before = self.crashes()?;
        let mut command = self.command();
        command.arg(&self.found);
        command.args([&self.committed, &self.regressions].into_iter().filter(|folder| folder.is_dir()));
        let mut log =
            File::create(&self.log).with_context(|| format!("cannot write {}", self.log.display()))?;
        writeln!(log, "$ {command:?}")?;
        command.stderr(log);
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let (status, cpu) = wait(&mut child, seconds)?;
        let text = String::from_utf8_lossy(&fs::read(&self.log)?).into_owned();
        let summary = Summary::read(&text);
        let crashes: Vec<PathBuf> =
            self.crashes()?.into_iter().filter(|path| !before.contains(path)).collect();
        let bad = crashes.len().max(usize::from(!status.success()));
        println!("{}: {} in {cpu} CPU s, {bad} crashes", self.name, summary.describe());
        if bad > 0 {
            println!("  {status}; the whole output is in {}", self.log.display());
        }
        for path in &crashes {
            println!("  {}: keep it in fuzz/regressions/{}/ with the fix", path.display(), self.name);
        }
        Ok(bad == 0)
    }

    fn crashes(&self) -> Result<Vec<PathBuf>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.artifacts)? {
            let path = entry?.path();
            // A slow unit is a note, not a crash.
            if !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("slow-unit")) {
                all.push(path);
            }
        }
        Ok(all)
    }

    /// Replaces the committed corpus by the smallest set of committed and found inputs with the same coverage.
    fn minimize(&self) -> Result<()> {
        let next = self.committed.with_extension("next");
        let _ = fs::remove_dir_all(&next);
        fs::create_dir_all(&next)?;
        let mut command = self.command();
        command.arg("-merge=1").arg(&next);
        command.args([&self.committed, &self.found].into_iter().filter(|folder| folder.is_dir()));
        command.stderr(Stdio::null());
        let status = command.status().context("cannot run the merge")?;
        if !status.success() {
            bail!("{}: the corpus could not be minimized: {status}", self.name);
        }
        let _ = fs::remove_dir_all(&self.committed);
        fs::rename(&next, &self.committed)?;
        let bytes: u64 =
            fs::read_dir(&self.committed)?.flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum();
        println!(
            "  {}: {} inputs, {bytes} bytes",
            self.committed.display(),
            fs::read_dir(&self.committed)?.count()
        );
        Ok(())
    }
}

/// Waits for the program; asks it to end when it has used `seconds` of CPU time. Returns how much that was.
fn wait(child: &mut Child, seconds: u64) -> Result<(ExitStatus, u64)> {
    let started = Instant::now();
    let mut cpu = 0;
    let mut asked = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((status, cpu));
        }
        cpu = cpu_seconds(child.id()).unwrap_or(cpu);
        // A program that only waits uses no CPU time: it gets ten times as much time by the clock.
        if !asked && (cpu >= seconds || started.elapsed().as_secs() > 10 * seconds) {
            asked = true;
            // libFuzzer ends gracefully on it, with its statistics.
            let _ = kill_process(Pid::from_child(child), Signal::USR1);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// User and system time of a process (proc_pid_stat(5), fields 14 and 15), in whole seconds.
fn cpu_seconds(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks / rustix::param::clock_ticks_per_second())
}

/// What libFuzzer said at its end.
#[derive(Debug, Default, PartialEq)]
struct Summary {
    runs: u64,
    edges: u64,
    features: u64,
    inputs: u64,
}

impl Summary {
    fn read(text: &str) -> Summary {
        let mut summary = Summary::default();
        for line in text.lines() {
            // #2097152  pulse  cov: 812 ft: 2345 corp: 190/12Kb lim: 4096 exec/s: 12345 rss: 60Mb
            let words: Vec<&str> = line.split_whitespace().collect();
            for pair in words.windows(2) {
                let number = || pair[1].split('/').next().and_then(|word| word.parse().ok());
                match pair[0] {
                    "cov:" => summary.edges = number().unwrap_or(summary.edges),
                    "ft:" => summary.features = number().unwrap_or(summary.features),
                    "corp:" => summary.inputs = number().unwrap_or(summary.inputs),
                    "stat::number_of_executed_units:" => summary.runs = number().unwrap_or(summary.runs),
                    _ => {}
                }
            }
            if summary.runs == 0
                && let Some(run) = words.first().and_then(|word| word.strip_prefix('#'))
            {
                summary.runs = run.parse().unwrap_or(0);
            }
        }
        summary
    }

    fn describe(&self) -> String {
        let Summary { runs, edges, features, inputs } = self;
        format!("{runs} runs, {edges} edges ({features} features) reached by {inputs} inputs")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_libfuzzers_output_is_read() {
        let text = "INFO: seed corpus: files: 5\n#6\tINITED cov: 700 ft: 800 corp: 5/1Kb exec/s: 0 rss: 40Mb\n\
            #100\tNEW    cov: 812 ft: 2345 corp: 190/12Kb lim: 4096 exec/s: 12345 rss: 60Mb L: 5/9 MS: 1 -\n\
            stat::number_of_executed_units: 123456\nstat::average_exec_per_sec: 99\n";
        assert_eq!(Summary::read(text), Summary { runs: 123_456, edges: 812, features: 2345, inputs: 190 });
        assert_eq!(Summary::read("nothing"), Summary::default());
    }
}
