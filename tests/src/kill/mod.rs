//! `kill -9` under load, round after round on the same two pools.
//!
//! A round starts a victim (the mount daemon, an importer, a process that owns the pool itself) and clients around it, kills the victim
//! at a seeded moment, and looks: does every client end with an error or go on, is the pool mounted again without help, is
//! everything there that was promised, is everything else whole or absent, is the free space right, is nothing left behind.
//!
//! - `content.rs`: bytes that say which version of which file they are.
//! - `journal.rs`: what clients write down, and what a pool may hold because of it (docs/semantics.md, section 4).
//! - `clients.rs`: the processes. `round.rs`: one round. `import.rs`: importers one after the other. `check.rs`: what the pool holds.
//! - `window.rs`: rounds of their own, for what a KV store may lose.

mod check;
pub mod clients;
pub mod content;
mod import;
pub mod journal;
mod round;
pub mod window;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Signal, kill_process};

use crate::{Kind, ended, format, processes_naming, scratch};
use journal::State;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many rounds.
    pub rounds: u64,
    /// Seed of the first; each has the next one.
    pub first_seed: u64,
    /// The program of which [`clients::run`] is a part.
    pub clients: PathBuf,
    /// Stop at the first round that finds something, and leave its pools.
    pub keep: bool,
}

/// What all rounds together came to.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Rounds that were run.
    pub rounds: u64,
    /// Bytes that had been promised to be durable and were not there, or not right.
    pub lost_bytes: u64,
    /// Clients that did not end within 30 s.
    pub hung: u64,
    /// Mounts that needed help, or failed.
    pub unclean: u64,
    /// Everything that was not as it should be, the above included, in words.
    pub findings: Vec<String>,
    /// Victims by kind.
    pub victims: BTreeMap<&'static str, u64>,
    /// Steps that clients had begun when their round's victim was killed.
    pub steps: u64,
    /// Checks of passed-through mappings and descriptors after their daemon's end.
    pub survived: u64,
}

impl Totals {
    /// Whether all was well.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty() && self.lost_bytes == 0 && self.hung == 0 && self.unclean == 0
    }

    /// The closing line.
    pub fn line(&self) -> String {
        let line = format!(
            "kill: {} rounds, {} lost committed bytes, {} hung clients, {} unclean mounts",
            self.rounds, self.lost_bytes, self.hung, self.unclean
        );
        if self.is_clean() { line } else { format!("{line}; FAILED, {} findings", self.findings.len()) }
    }
}

/// A pool over all rounds.
struct Place {
    kind: Kind,
    folder: tempfile::TempDir,
    pool: PathBuf,
    point: PathBuf,
    /// Directories of the pool and what they hold.
    states: BTreeMap<String, State>,
}

impl Place {
    fn new(kind: Kind) -> Place {
        let folder = scratch();
        let pool = format(kind, folder.path());
        let point = folder.path().join("mnt");
        fs::create_dir(&point).expect("mount point");
        Place { kind, folder, pool, point, states: BTreeMap::new() }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Place {
    /// Whatever happened: no process and no mount stays.
    fn drop(&mut self) {
        for pid in processes_naming(self.folder.path()) {
            if pid != rustix::process::getpid() {
                let _ = kill_process(pid, Signal::KILL);
                ended(pid);
            }
        }
        while unmount(&self.point, UnmountFlags::DETACH).is_ok() {}
        if crate::mounted_at(&self.point) {
            let _ = Command::new("fusermount3")
                .args(["-u", "-z"])
                .arg(&self.point)
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// Runs the rounds; says one line about each.
///
/// # Panics
/// When the harness itself cannot go on: no scratch folder, no pool.
pub fn run(options: &Options) -> Totals {
    let mut totals = Totals::default();
    let mut places = [Place::new(Kind::Directory), Place::new(Kind::Raw)];
    for number in 0..options.rounds {
        let seed = options.first_seed + number;
        // All that is chosen comes from the seed, so that a round can be had alone.
        let place = &mut places[(seed % 2) as usize];
        let before = totals.findings.len();
        let said = round::run(place, options, number, seed, &mut totals);
        totals.rounds += 1;
        println!("round {number}, seed {seed}: {said}");
        if totals.findings.len() == before {
            continue;
        }
        for finding in &mut totals.findings[before..] {
            *finding = format!("round {number}, seed {seed}: {finding}");
            println!("  FAILED: {finding}");
        }
        println!("  once more: cargo xtask kill --rounds 1 --first-seed {seed}");
        if options.keep {
            for place in &mut places {
                place.folder.disable_cleanup(true);
                println!("  kept: {}", place.path().display());
            }
            break;
        }
        // What a pool lost it would lose in every round from here on.
        places[(seed % 2) as usize] =
            Place::new(if seed.is_multiple_of(2) { Kind::Directory } else { Kind::Raw });
    }
    let victims: Vec<_> = totals.victims.iter().map(|(what, count)| format!("{count} {what}")).collect();
    println!(
        "killed: {}; {} steps were begun by then; {} looks through open files after their daemon's end",
        victims.join(", "),
        totals.steps,
        totals.survived
    );
    totals
}
