//! Importers: the real command, one after the other, each of which may be the victim.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::content::{Rng, Version};
use super::journal::{Line, Op, now_ns};
use crate::{nvtier_path, wait_for};

/// Exit code for a pool that another process owns.
const BUSY: i32 = 4;
/// Sources that a chain imports in turn.
const SOURCES: u64 = 3;

/// What a chain is told.
#[derive(Clone, Debug)]
pub struct Plan {
    pub pool: PathBuf,
    /// Folder for its sources.
    pub folder: PathBuf,
    /// Directory of the pool that it imports to.
    pub directory: String,
    pub round: u64,
    pub client: u64,
    pub seed: u64,
}

/// What became of a chain.
#[derive(Debug, Default)]
pub struct Imported {
    pub lines: Vec<(u64, Line)>,
    /// The import that did not end by itself.
    pub killed: Option<(String, Version, PathBuf)>,
    /// When, and how, one failed otherwise.
    pub failed: Option<(u64, String)>,
}

/// Imports that run one after the other.
pub struct Chain {
    current: Arc<Mutex<Option<Child>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Imported>,
    done: Arc<AtomicBool>,
    killed: Arc<AtomicBool>,
}

impl Chain {
    /// Makes the sources and starts.
    pub fn start(plan: Plan) -> Chain {
        let mut rng = Rng::new(plan.seed);
        let sources: Vec<_> = (0..SOURCES)
            .map(|index| {
                let version = Version {
                    id: Version::id(plan.round, plan.client, index + 1),
                    len: (4 << 20) + rng.below(20 << 20),
                };
                let path = plan.folder.join(format!("{}-source-{index}", plan.directory));
                fs::write(&path, version.bytes()).expect("write a source");
                (path, version)
            })
            .collect();
        let current: Arc<Mutex<Option<Child>>> = Arc::default();
        let flag = || Arc::new(AtomicBool::new(false));
        let (stop, done, killed) = (flag(), flag(), flag());
        let thread = {
            let (current, stop, done, killed) = (current.clone(), stop.clone(), done.clone(), killed.clone());
            std::thread::spawn(move || {
                let imported = imports(&plan, &sources, &mut rng, &current, &stop, &done);
                killed.store(imported.killed.is_some(), Relaxed);
                imported
            })
        };
        Chain { current, stop, thread, done, killed }
    }

    /// Whether one import has ended well.
    pub fn is_under_way(&self) -> bool {
        self.done.load(Relaxed)
    }

    /// Kills an importer: the one that runs now, or where that was about to end by itself, the next. False when none comes.
    pub fn kill(&self) -> bool {
        let killed = || {
            if let Some(child) = self.current.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                let _ = kill_process(Pid::from_child(child), Signal::KILL);
            }
            self.killed.load(Relaxed).then_some(())
        };
        wait_for(killed).is_some()
    }

    /// Lets the running import end, and no other begin.
    pub fn finish(self) -> Imported {
        self.stop.store(true, Relaxed);
        self.thread.join().expect("the thread of a chain of imports")
    }
}

fn imports(
    plan: &Plan,
    sources: &[(PathBuf, Version)],
    rng: &mut Rng,
    current: &Mutex<Option<Child>>,
    stop: &AtomicBool,
    done: &AtomicBool,
) -> Imported {
    let mut imported = Imported::default();
    let mut seq = 0;
    while !stop.load(Relaxed) {
        let (source, version) = &sources[rng.below(SOURCES) as usize];
        let name = format!("s{}", rng.below(3));
        seq += 1;
        imported.lines.push((now_ns(), Line::Begin(seq, Op::Put(name.clone(), *version))));
        let errors = plan.folder.join(format!("{}.stderr", plan.directory));
        let stderr = fs::File::create(&errors).expect("a file for errors");
        let mut command = import(&plan.pool, source, &format!("{}/{name}", plan.directory));
        if rng.chance(50) {
            command.arg("--no-resume");
        }
        let child = command.stderr(stderr).spawn().expect("start an import");
        let slot = || current.lock().unwrap_or_else(PoisonError::into_inner);
        *slot() = Some(child);
        let status = wait_for(|| {
            let mut slot = slot();
            let status = slot.as_mut().and_then(|child| child.try_wait().expect("wait"))?;
            *slot = None;
            Some(status)
        });
        use std::os::unix::process::ExitStatusExt;
        match status {
            None => {
                imported.failed = Some((now_ns(), "an import did not end within 60 s".into()));
                if let Some(child) = slot().as_mut() {
                    let _ = child.kill();
                }
                return imported;
            }
            Some(status) if status.success() => {
                imported.lines.push((now_ns(), Line::End(seq)));
                imported.lines.push((now_ns(), Line::Synced(seq)));
                done.store(true, Relaxed);
            }
            Some(status) if status.signal() == Some(9) => {
                imported.killed = Some((name, *version, source.clone()));
                return imported;
            }
            // Never began: somebody else owned the pool all the time.
            Some(status) if status.code() == Some(BUSY) => {
                imported.lines.pop();
                seq -= 1;
                std::thread::sleep(Duration::from_millis(1)); // others are to have their turn
            }
            Some(status) => {
                let said = fs::read_to_string(&errors).unwrap_or_default();
                imported.failed = Some((now_ns(), format!("an import ended with {status}: {said}")));
                return imported;
            }
        }
    }
    imported
}

/// `nvtier import` in place of whatever has the name.
pub fn import(pool: &Path, source: &Path, name: &str) -> Command {
    let mut command = Command::new(nvtier_path());
    command.arg("import").arg(source).args([name, "--force", "--pool"]).arg(pool);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}
