//! Harness of the system tests: the `nvtier` command on real pools and real mounts.
//!
//! `cargo xtask test` sets the environment (`NVTIER_BIN`, `NVTIER_SCRATCH`, `NVTIER_PYTHON`, `NVTIER_MODEL`); with
//! plain `cargo test` the command is looked for beside the test program and scratch folders lie in the system's
//! temporary folder. A test that cannot run on this machine calls [`skip`] and returns.
#![forbid(unsafe_code)]

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

pub mod drives;
pub mod kill;

/// How long anything may take before a test calls it a hang.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Says that the running test cannot run here. `cargo xtask test` counts it as skipped by this line.
pub fn skip(reason: &str) {
    println!("skipped: {reason}");
}

/// Path of the `nvtier` command under test.
///
/// # Panics
/// When it has not been built.
pub fn nvtier_path() -> PathBuf {
    if let Some(path) = env::var_os("NVTIER_BIN") {
        return path.into();
    }
    // target/debug/deps/<test program> -> target/debug/nvtier
    let program = env::current_exe().expect("path of the test program");
    let path = program.ancestors().nth(2).expect("target folder").join("nvtier");
    assert!(path.exists(), "{} is not built: run `cargo build --package nvtier` first", path.display());
    path
}

/// The command where any user can run it: a link or a copy in `folder`, a [`scratch`] folder. What is built may lie in a home that is closed to others.
pub fn nvtier_for_anybody(folder: &Path) -> PathBuf {
    let path = folder.join("nvtier-for-anybody");
    if fs::hard_link(nvtier_path(), &path).is_err() {
        fs::copy(nvtier_path(), &path).expect("a copy of the command");
    }
    path
}

/// A new, empty scratch folder, removed on drop.
///
/// # Panics
/// When it cannot be made.
pub fn scratch() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    builder
        .prefix("t-")
        .permissions(<fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755));
    match env::var_os("NVTIER_SCRATCH") {
        Some(base) => builder.tempdir_in(base),
        None => builder.tempdir(),
    }
    .expect("scratch folder")
}

/// What a run of the command gave.
#[derive(Debug)]
pub struct Ran {
    /// Exit code; 128 + signal where a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let status = output.status;
        Self {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Asserts exit code 0.
    ///
    /// # Panics
    /// With everything the command said, otherwise.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "the command failed\n{self:#?}");
        self
    }

    /// Asserts that the command refused in an orderly way (an exit code of its own, a message) and that the message
    /// names all of `words`.
    ///
    /// # Panics
    /// With everything the command said, otherwise.
    #[track_caller]
    pub fn refused(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "another exit code was expected\n{self:#?}");
        assert!(!self.stderr.contains("panicked"), "the command panicked\n{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "the message does not name {word:?}\n{self:#?}");
        }
        self
    }

    /// Asserts an orderly refusal with any of the documented exit codes (1 to 7) whose message names all of `words`.
    ///
    /// # Panics
    /// With everything the command said, otherwise.
    #[track_caller]
    pub fn refused_somehow(self, words: &[&str]) -> Self {
        assert!((1..=7).contains(&self.code), "an orderly refusal was expected\n{self:#?}");
        let code = self.code;
        self.refused(code, words)
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

/// Runs a command to its end; kills it and panics when that takes longer than [`LIMIT`].
///
/// # Panics
/// When it cannot start or does not end.
#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    try_run(command).unwrap_or_else(|what| panic!("{what}"))
}

/// As [`run`], for those who go on when it cannot start or does not end.
///
/// # Errors
/// Which of the two, in words.
pub fn try_run(command: &mut Command) -> Result<Ran, String> {
    let words = format!("{command:?}");
    // Files, not pipes: a daemon that a command leaves behind would hold a pipe open.
    let file = || tempfile::tempfile().map_err(|error| format!("a temporary file: {error}"));
    let (out, err) = (file()?, file()?);
    let copy = |file: &fs::File| file.try_clone().map_err(|error| format!("a temporary file: {error}"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(copy(&out)?)
        .stderr(copy(&err)?)
        .spawn()
        .map_err(|error| format!("cannot start {words}: {error}"))?;
    let pid = Pid::from_child(&child);
    let status = wait_for(|| child.try_wait().expect("wait")).ok_or_else(|| {
        let _ = kill_process(pid, Signal::KILL);
        format!("{words} did not end within {} s", LIMIT.as_secs())
    })?;
    let read = |mut file: fs::File| {
        use std::io::{Read, Seek};
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("output of the command");
        bytes
    };
    Ok(Ran::from(Output { status, stdout: read(out), stderr: read(err) }))
}

/// Runs `nvtier` with these arguments.
///
/// # Panics
/// When it cannot start or does not end.
#[track_caller]
pub fn nvtier<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    run(Command::new(nvtier_path()).args(args))
}

/// Asks again and again until there is an answer; `None` after [`LIMIT`]. The interval only paces the asking.
pub fn wait_for<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if start.elapsed() > LIMIT {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Kinds of pool that behave differently under a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One directory member: reads pass through the kernel where it can.
    Directory,
    /// One image file: every byte is served by the daemon.
    Raw,
    /// Two directory members, striped.
    Striped,
}

/// Every kind.
pub const KINDS: [Kind; 3] = [Kind::Directory, Kind::Raw, Kind::Striped];

/// Formats a pool of a kind at `folder/pool` and returns that path.
///
/// # Panics
/// When the command refuses.
#[track_caller]
pub fn format(kind: Kind, folder: &Path) -> PathBuf {
    let pool = folder.join("pool");
    let mut command = Command::new(nvtier_path());
    command.arg("format").arg(&pool);
    match kind {
        Kind::Directory => {}
        Kind::Raw => {
            command.args(["--raw", "--size", "1GiB"]);
        }
        Kind::Striped => {
            for member in ["member-a", "member-b"] {
                command.arg("--member").arg(folder.join(member));
            }
        }
    }
    run(&mut command).ok();
    pool
}

/// A mounted pool in a scratch folder of its own. Drop unmounts it, kills what is left, removes the folder.
#[derive(Debug)]
pub struct Mounted {
    /// The pool.
    pub pool: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    folder: tempfile::TempDir,
}

impl Mounted {
    /// Formats a pool and mounts it.
    ///
    /// # Panics
    /// When the command refuses.
    #[track_caller]
    pub fn new(kind: Kind, options: &[&str]) -> Self {
        let folder = scratch();
        let pool = format(kind, folder.path());
        let point = folder.path().join("mnt");
        fs::create_dir(&point).expect("mount point");
        let mounted = Self { pool, point, folder };
        mounted.mount(options).ok();
        assert!(mounted.is_mounted(), "`nvtier mount` returned before the mount was there");
        mounted
    }

    /// Takes over a pool and a mount point inside `folder`; nothing is mounted yet.
    pub fn over(pool: PathBuf, point: PathBuf, folder: tempfile::TempDir) -> Self {
        Self { pool, point, folder }
    }

    /// Runs `nvtier mount` for this pool (again).
    #[track_caller]
    pub fn mount(&self, options: &[&str]) -> Ran {
        let mut command = Command::new(nvtier_path());
        command.arg("mount").arg(&self.pool).arg(&self.point);
        if !options.contains(&"--ram") {
            command.args(["--ram", "128MiB"]);
        }
        run(command.args(options))
    }

    /// Runs `nvtier umount`.
    #[track_caller]
    pub fn umount(&self) -> Ran {
        nvtier([OsStr::new("umount"), self.point.as_os_str()])
    }

    /// The scratch folder around pool and mount point.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Whether the kernel has a mount there, dead or alive.
    pub fn is_mounted(&self) -> bool {
        mounted_at(&self.point)
    }

    /// Process id of the daemon, as the pool's owner record gives it.
    ///
    /// # Panics
    /// When nothing owns the pool.
    #[track_caller]
    pub fn daemon(&self) -> Pid {
        let info =
            nvtier([OsStr::new("info"), "--json".as_ref(), "--pool".as_ref(), self.pool.as_os_str()]).ok();
        let pid = info.json()["owner_pid"].as_i64().unwrap_or_else(|| panic!("no owner in {info:#?}"));
        Pid::from_raw(i32::try_from(pid).expect("pid")).expect("pid")
    }

    /// Sends a signal to the daemon and waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let daemon = self.daemon();
        kill_process(daemon, signal).expect("signal the daemon");
        assert!(ended(daemon), "the daemon {daemon:?} did not end after {signal:?}");
    }

    /// Unmounts through the command and asserts that the pool's bytes still fit their sums.
    ///
    /// # Panics
    /// When either fails.
    #[track_caller]
    pub fn finish(self) {
        self.umount().ok();
        assert!(!self.is_mounted(), "`nvtier umount` returned with the mount still there");
        nvtier([OsStr::new("verify"), "--pool".as_ref(), self.pool.as_os_str()]).ok();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.is_mounted() {
            return;
        }
        // A failing test gets here: be rough, but leave nothing.
        for pid in processes_naming(self.folder.path()) {
            let _ = kill_process(pid, Signal::KILL);
            ended(pid);
        }
        let _ = unmount(&self.point, UnmountFlags::DETACH);
        let _ =
            Command::new("fusermount3").args(["-u", "-z"]).arg(&self.point).stderr(Stdio::null()).status();
    }
}

/// Whether the kernel has a mount at `point`, dead or alive.
///
/// # Panics
/// Without /proc.
pub fn mounted_at(point: &Path) -> bool {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    text.lines().any(|line| line.split(' ').nth(4).map(Path::new) == Some(point))
}

/// Waits for the end of a process that is not our child; false after [`LIMIT`].
pub fn ended(pid: Pid) -> bool {
    let gone = || {
        test_kill_process(pid).is_err()
            || fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))
                .is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
    };
    wait_for(|| gone().then_some(())).is_some()
}

/// Processes with an argument that is a path under `folder`.
pub(crate) fn processes_naming(folder: &Path) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let named = line
            .split(|byte| *byte == 0)
            .skip(1)
            .any(|word| Path::new(String::from_utf8_lossy(word).as_ref()).starts_with(folder));
        if named {
            found.extend(Pid::from_raw(pid));
        }
    }
    found
}

/// Bytes that differ everywhere and are the same in every run: `len` of them for `seed`.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
