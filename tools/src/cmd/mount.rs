//! `nvtier mount POOL MNT`: starts the daemon and returns once the file system answers.
//!
//! The daemon is this program again with `--foreground --ready-on-stdout`: it writes one line of JSON to its standard
//! output when it is ready or has failed. Starting a new program, rather than forking this one, needs no unsafe code
//! and cannot inherit a half-used thread or ring.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::cli::{Global, Mount, VerifyMode};
use crate::config::Config;
use crate::failure::{Failure, Outcome, code};
use crate::runtime::{self, MountRecord};
use crate::{interrupt, mountpoint, output, size};

/// How long a pool may take to open: recovery after a crash reads what was not sealed.
const READY_DEADLINE: Duration = Duration::from_secs(300);

/// How long another owner of the pool is waited for: long enough for a command, not for a mount.
const BUSY_DEADLINE: Duration = Duration::from_secs(1);

/// What the daemon says on its standard output, once.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Readiness {
    Ready { pid: u32, metrics: Option<SocketAddr> },
    Failed { code: u8, kind: String, message: String, hint: Option<String> },
}

/// Everything that decides how the mount behaves, after configuration and defaults.
#[derive(Debug)]
struct Settings {
    pool: PathBuf,
    mountpoint: PathBuf,
    ram_bytes: u64,
    read_only: bool,
    allow_other: bool,
    verify: VerifyMode,
    threads: Option<u16>,
    /// Bytes a second.
    scrub: Option<u64>,
    /// Where metrics are served.
    metrics: Option<SocketAddr>,
    log: Option<PathBuf>,
}

/// Mounts.
pub fn run(global: &Global, config: &Config, args: &Mount) -> Outcome {
    if args.foreground && args.ready_on_stdout {
        // Not the terminal's: Ctrl-C there is meant for what runs there.
        let _ = rustix::process::setsid();
        let outcome = Settings::resolve(config, args).and_then(|settings| serve(&settings, say_ready));
        if let Err(failure) = &outcome {
            let Failure { code, kind, message, hint } = failure;
            let answer = Readiness::Failed {
                code: *code,
                kind: kind.clone(),
                message: message.clone(),
                hint: hint.clone(),
            };
            // After readiness standard output is closed, and the log has the failure.
            let _ = say(&answer);
        }
        return outcome;
    }
    let settings = Settings::resolve(config, args)?;
    if args.foreground {
        let mounted = |metrics: Option<SocketAddr>| {
            if let Some(address) = metrics {
                output::note(&format!("metrics are at http://{address}/metrics"));
            }
            output::note(&format!(
                "{} is mounted on {}",
                settings.pool.display(),
                settings.mountpoint.display()
            ));
            crate::notify::ready();
            Ok(())
        };
        return serve(&settings, mounted);
    }
    let (pid, metrics, log) = start_daemon(global.verbose, &settings)?;
    if global.json {
        return output::json(&serde_json::json!({
            "pool": settings.pool,
            "mountpoint": settings.mountpoint,
            "pid": pid,
            "log": log,
            "ram_bytes": settings.ram_bytes,
            "metrics": metrics,
        }));
    }
    // A port of 0 is one that the kernel chose.
    if let Some(address) = metrics {
        output::note(&format!("metrics are at http://{address}/metrics"));
    }
    Ok(())
}

/// Mounts with the defaults; for the demo.
pub fn mount_in_background(pool: &Path, mountpoint: &Path) -> Outcome {
    let args = Mount {
        pool: pool.to_owned(),
        mountpoint: mountpoint.to_owned(),
        foreground: false,
        ram: None,
        read_only: false,
        allow_other: false,
        verify: None,
        threads: None,
        scrub: None,
        metrics: None,
        ready_on_stdout: false,
        log: None,
    };
    start_daemon(0, &Settings::resolve(&Config::default(), &args)?).map(drop)
}

impl Settings {
    fn resolve(config: &Config, args: &Mount) -> Outcome<Self> {
        let pool = args
            .pool
            .canonicalize()
            .map_err(|error| Failure::io(format!("open the pool {}", args.pool.display()), &error))?;
        let ram_bytes = args.ram.or(config.mount.ram).unwrap_or_else(default_ram_bytes);
        if let Some(total) = memory("MemTotal:").filter(|total| ram_bytes > *total) {
            let message =
                format!("--ram {}: this machine has {}", size::human(ram_bytes), size::human(total));
            return Err(Failure::usage(message).hint("leave --ram out for an eighth of what is available"));
        }
        Ok(Self {
            pool,
            mountpoint: check_mountpoint(&args.mountpoint)?,
            ram_bytes,
            read_only: args.read_only,
            allow_other: args.allow_other || config.mount.allow_other,
            verify: args.verify.or(config.mount.verify).unwrap_or(VerifyMode::Scrub),
            threads: args.threads.or(config.mount.threads),
            scrub: args.scrub.or(config.mount.scrub),
            metrics: args.metrics,
            log: args.log.clone(),
        })
    }
}

/// The mount point must be an empty directory where nothing is mounted; what a killed daemon left is cleared away.
fn check_mountpoint(path: &Path) -> Outcome<PathBuf> {
    let mountpoint = mountpoint::resolve(path)?;
    let shown = mountpoint.display();
    if let Some(mount) = mountpoint::mounted_at(&mountpoint)? {
        let repaired = mount.is_nvtier()
            && fuse_fs::repair_stale(&mountpoint).map_err(|error| {
                Failure::from(error).while_doing(format!("clear the dead mount at {shown}"))
            })?;
        if !repaired {
            let message =
                format!("mount on {shown}: a file system of type {} is mounted there", mount.fs_type);
            return Err(
                Failure::new(code::BUSY, "Busy", message).hint("unmount it, or choose another directory")
            );
        }
        output::note(&format!("cleared a dead mount at {shown}: its daemon was killed"));
    }
    let tried = || format!("mount on {shown}");
    let metadata = fs::metadata(&mountpoint).map_err(|error| {
        Failure::io(tried(), &error).hint("make the directory first: the mount point must exist and be empty")
    })?;
    if !metadata.is_dir() {
        return Err(Failure::new(
            code::FAILED,
            "NotDirectory",
            format!("{}: it is not a directory", tried()),
        ));
    }
    let mut entries = fs::read_dir(&mountpoint).map_err(|error| Failure::io(tried(), &error))?;
    if entries.next().is_some() {
        return Err(Failure::new(
            code::FAILED,
            "NotEmpty",
            format!("{}: the directory is not empty", tried()),
        )
        .hint("choose an empty directory: a mount would hide what is in it"));
    }
    Ok(mountpoint)
}

/// An eighth of what is available, so that models and the page cache keep the rest; 256 MiB where that is unknown.
fn default_ram_bytes() -> u64 {
    memory("MemAvailable:").map_or(256 << 20, |bytes| (bytes / 8).clamp(64 << 20, 8 << 30) & !((1 << 20) - 1))
}

/// A line of /proc/meminfo (proc_meminfo(5)) in bytes.
fn memory(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Opens the pool as its owner. A command that owns it for a moment is waited for.
fn open_pool(settings: &Settings) -> Outcome<engine::Pool> {
    let options = engine::OpenOptions {
        read_only: settings.read_only,
        ram_bytes: settings.ram_bytes,
        verify: match settings.verify {
            VerifyMode::Always => engine::Verify::Always,
            VerifyMode::Scrub => engine::Verify::Scrub,
        },
        ..engine::OpenOptions::default()
    };
    let start = Instant::now();
    loop {
        match engine::Pool::open(&settings.pool, &options) {
            Err(error) if error.kind() == engine::ErrorKind::Busy && start.elapsed() < BUSY_DEADLINE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            opened => {
                return opened.map_err(|error| {
                    Failure::from(error).while_doing(format!("open the pool {}", settings.pool.display()))
                });
            }
        }
    }
}

/// Opens the pool, mounts it, and stays until it is unmounted.
fn serve(settings: &Settings, ready: impl FnOnce(Option<SocketAddr>) -> Outcome) -> Outcome {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])
        .map_err(|error| Failure::io("install signal handlers", &error))?;
    // First of all: a port that cannot be had is told before anything is opened.
    let metrics = crate::store::bind_metrics(settings.metrics)?;
    let pool = open_pool(settings)?;
    if let Some(rate) = settings.scrub {
        pool.start_scrub(&engine::ScrubOptions::new(rate))?;
    }
    // Before the mount, so that whoever sees it finds the pool's owner answering.
    let server = engine::control::serve(pool.clone())
        .inspect_err(|error| {
            tracing::warn!(
                "other commands cannot use the pool meanwhile: {}",
                crate::failure::describe(error)
            )
        })
        .ok();
    let mounted = fuse_fs::mount(pool.clone(), &settings.fuse_options()).map_err(|error| {
        let failure = Failure::from(error).while_doing(format!("mount on {}", settings.mountpoint.display()));
        if Path::new("/dev/fuse").exists() {
            failure
        } else {
            Failure { code: code::UNSUPPORTED, ..failure }
                .hint("there is no /dev/fuse: load the fuse module, or give the container that device")
        }
    })?;
    let metrics_at = metrics.as_ref().map(engine::metrics::Bound::address);
    let scraped = metrics.map(|bound| bound.serve(Arc::new(mounted.metrics()))).transpose()?;
    let record = MountRecord::of_this_process(&settings.pool, &settings.mountpoint, settings.log.clone());
    let record_path = record.save().inspect_err(|failure| tracing::warn!("{failure}")).ok();
    tracing::info!("{} is mounted on {}", settings.pool.display(), settings.mountpoint.display());

    let unmounter = mounted.unmounter();
    let handle = signals.handle();
    let waiter = std::thread::spawn(move || {
        for signal in signals.forever() {
            tracing::info!("signal {signal}: unmounting");
            if let Err(error) = unmounter.unmount() {
                tracing::error!("unmount: {}", crate::failure::describe(&error));
            }
        }
    });
    let outcome = ready(metrics_at).and_then(|()| mounted.wait().map_err(Failure::from));
    handle.close();
    let _ = waiter.join();
    // Clients first: the last to go closes the pool, and its errors are to be seen here.
    drop(server);
    drop(scraped);
    let outcome = outcome.and(pool.close().map_err(Failure::from));
    if let Some(path) = record_path {
        let _ = fs::remove_file(path);
    }
    match &outcome {
        // A log without a failure would only be litter.
        Ok(()) => drop(settings.log.as_ref().map(fs::remove_file)),
        Err(failure) => tracing::error!("{failure}"),
    }
    outcome
}

fn say(answer: &Readiness) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, answer)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Tells the parent, then lets go of the pipe.
fn say_ready(metrics: Option<SocketAddr>) -> Outcome {
    let tried = "tell the parent process that the mount is ready";
    say(&Readiness::Ready { pid: std::process::id(), metrics })
        .map_err(|error| Failure::io(tried, &error))?;
    let null =
        fs::OpenOptions::new().write(true).open("/dev/null").map_err(|error| Failure::io(tried, &error))?;
    rustix::stdio::dup2_stdout(null.as_fd()).map_err(|error| Failure::io(tried, &error.into()))
}

/// Starts the daemon and waits until it is ready. Returns its process id, where its metrics are, and its log.
fn start_daemon(verbose: u8, settings: &Settings) -> Outcome<(u32, Option<SocketAddr>, PathBuf)> {
    let (log_path, log) = runtime::create_log(&settings.mountpoint)?;
    let program = std::env::current_exe().map_err(|error| Failure::io("find this program", &error))?;
    let mut command = Command::new(program);
    command.arg("mount").args(["--foreground", "--ready-on-stdout"]).arg("--log").arg(&log_path);
    command.arg("--ram").arg(settings.ram_bytes.to_string());
    command.arg("--verify").arg(if settings.verify == VerifyMode::Always { "always" } else { "scrub" });
    for (flag, set) in [("--read-only", settings.read_only), ("--allow-other", settings.allow_other)] {
        if set {
            command.arg(flag);
        }
    }
    if let Some(threads) = settings.threads {
        command.arg("--threads").arg(threads.to_string());
    }
    if let Some(rate) = settings.scrub {
        command.arg("--scrub").arg(rate.to_string());
    }
    if let Some(address) = settings.metrics {
        command.arg("--metrics").arg(address.to_string());
    }
    for _ in 0..verbose {
        command.arg("-v");
    }
    command.arg("--").arg(&settings.pool).arg(&settings.mountpoint);
    // Its working directory must not keep another file system busy.
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut daemon = command.spawn().map_err(|error| Failure::io("start the mount daemon", &error))?;
    match wait_until_ready(&mut daemon) {
        Ok((pid, metrics)) => Ok((pid, metrics, log_path)),
        Err(failure) => {
            stop(&mut daemon);
            let log = format!("the daemon's log is {}", log_path.display());
            let hint = failure.hint.clone().map_or(log.clone(), |hint| format!("{hint}\n  {log}"));
            Err(Failure { hint: Some(hint), ..failure })
        }
    }
}

/// Reads the daemon's one line; looks for SIGINT and the deadline meanwhile.
fn wait_until_ready(daemon: &mut Child) -> Outcome<(u32, Option<SocketAddr>)> {
    let Some(stdout) = daemon.stdout.take() else {
        return Err(Failure::failed("the mount daemon has no standard output"));
    };
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = BufReader::new(stdout).read_line(&mut line);
        let _ = sender.send(line);
    });
    let start = Instant::now();
    let line = loop {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => break line,
            Err(_) if start.elapsed() > READY_DEADLINE => {
                return Err(Failure::failed(format!(
                    "the mount daemon was not ready after {READY_DEADLINE:?}"
                )));
            }
            Err(_) => interrupt::check()?,
        }
    };
    match serde_json::from_str(&line) {
        Ok(Readiness::Ready { pid, metrics }) => Ok((pid, metrics)),
        Ok(Readiness::Failed { code, kind, message, hint }) => Err(Failure { code, kind, message, hint }),
        Err(_) => {
            let status = daemon.try_wait().ok().flatten();
            let status =
                status.map_or_else(|| "without a word".to_owned(), |status| format!("with {status}"));
            Err(Failure::failed(format!("the mount daemon ended {status}")))
        }
    }
}

/// Ends a daemon that did not become ready: first by asking, so that it unmounts.
fn stop(daemon: &mut Child) {
    let asked = rustix::process::Pid::from_child(daemon);
    let _ = rustix::process::kill_process(asked, rustix::process::Signal::TERM);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        if !matches!(daemon.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = daemon.kill();
    let _ = daemon.wait();
}

impl Settings {
    fn fuse_options(&self) -> fuse_fs::MountOptions {
        let mut options = fuse_fs::MountOptions::new(&self.mountpoint);
        options.read_only = self.read_only;
        options.allow_other = self.allow_other;
        options.threads = self.threads.map(usize::from);
        options.verify_always = self.verify == VerifyMode::Always;
        options
    }
}
