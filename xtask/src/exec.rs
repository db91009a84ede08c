//! Running children so that they can neither hang the run nor outlive it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

/// Process groups of running children, killed when we are interrupted.
static LIVE: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// How a child ended.
pub struct Ended {
    pub status: ExitStatus,
    pub timed_out: bool,
}

impl Ended {
    /// Exit status zero, within its time.
    pub fn success(&self) -> bool {
        self.status.success() && !self.timed_out
    }

    /// In words, for a failure message.
    pub fn describe(&self, limit: Duration) -> String {
        if self.timed_out {
            format!("ran past its limit of {} s and was killed", limit.as_secs())
        } else {
            self.status.to_string()
        }
    }
}

/// Runs a command with no standard input in a process group of its own; output (both streams) goes line by line to
/// `log` and to `on_line`. The group is killed at `limit`.
pub fn run(
    mut command: Command,
    log: &Path,
    limit: Duration,
    mut on_line: impl FnMut(&str),
) -> Result<Ended> {
    let mut log_file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write the log {}", log.display()))?;
    writeln!(log_file, "$ {command:?}")?;
    let (reader, writer) = std::io::pipe().context("pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    drop(command); // our copies of the pipe's writing end, so that it can end
    let group = Pid::from_child(&child);
    LIVE.lock().expect("no panic holds this lock").push(group);

    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            if sender.send(line).is_err() {
                return;
            }
            bytes.clear();
        }
    });

    let start = Instant::now();
    let mut status = None;
    let mut timed_out = false;
    loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                writeln!(log_file, "{line}")?;
                on_line(&line);
            }
            // The child has ended and nothing more came: a daemon that it left may still hold the pipe, so don't
            // wait for its end.
            Err(RecvTimeoutError::Timeout) if status.is_some() => break,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                // The pipe closed; wait for the child itself below, still within the limit.
                if status.is_some() {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
        if status.is_none() {
            status = child.try_wait().context("wait for a child")?;
        }
        if status.is_none() && start.elapsed() > limit {
            timed_out = true;
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
    let _ = kill_process_group(group, Signal::KILL); // grandchildren that stayed in the group
    LIVE.lock().expect("no panic holds this lock").retain(|pid| *pid != group);
    Ok(Ended { status: status.expect("loop ends only after the child did"), timed_out })
}

/// Runs a preparation step: fails with the last lines of its output.
pub fn step(command: Command, log: &Path, limit: Duration) -> Result<()> {
    let mut tail: Vec<String> = Vec::new();
    let words = format!("{command:?}");
    let ended = run(command, log, limit, |line| {
        if tail.len() == 12 {
            tail.remove(0);
        }
        tail.push(line.to_owned());
    })?;
    if !ended.success() {
        bail!("{words}: {}\n{}", ended.describe(limit), tail.join("\n"));
    }
    Ok(())
}

/// Standard output of a short command, or `None` where it cannot run or fails.
pub fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether a program of that name is on `PATH`.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// From now on SIGINT and SIGTERM kill our children, sweep `scratch` and end this process.
pub fn on_interrupt(scratch: &Path) -> Result<()> {
    let scratch = scratch.to_path_buf();
    let mut signals = signal_hook::iterator::Signals::new([2, 15]).context("signal handler")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            eprintln!("\ninterrupted: ending the tests and cleaning up");
            for group in LIVE.lock().expect("no panic holds this lock").iter() {
                let _ = kill_process_group(*group, Signal::KILL);
            }
            crate::sweep::directory(&scratch);
            if crate::sweep::mounts_under(&scratch).is_empty() {
                let _ = std::fs::remove_dir_all(&scratch);
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
