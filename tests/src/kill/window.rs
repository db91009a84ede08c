//! The loss window of a KV store: `kill -9` of a process that puts blocks, with the window that stores have by default.
//!
//! The victim opens the store and puts blocks of its own numbers in order. After each answer it writes a line with the time
//! (CLOCK_MONOTONIC, which all processes share); the line comes after the acknowledgement, so a block is never held to be older than it is.
//! What was acknowledged a window before the kill must be there afterwards, and all that was acknowledged before a flush that returned.
//!
//! The window holds where the drive flushes within half of it. Beside the puts the victim therefore flushes a file of its own on the same file
//! system, every 10 ms, and the slowest of these says how late a commit could be. They measure how late the machine lets a thread run, too.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use engine::kv::{Get, Key, Lane, Miss, Put, Store, StoreOptions, Stored, View};
use engine::{FormatOptions, OpenOptions, Pool};
use nvme::Buffer;

use super::content::{Rng, Version, identify};
use crate::LIMIT;

/// Bytes of a block: small, so that there are many.
const BLOCK: u32 = 4096;
/// What a store promises by default.
const WINDOW: Duration = Duration::from_millis(50);
/// The drive and the scheduler on top of it: a committer that should run is behind other threads of a busy machine for some time slices.
const MARGIN: Duration = Duration::from_millis(100);
/// A commit is a flush of the data, a write and a flush of the log. A put that just missed one waits for it, and for the next.
const FLUSHES: u32 = 6;
/// Where the drive is slower than that, blocks of a round are never old enough for a verdict.
const SLOWEST: Duration = Duration::from_millis(40);
/// Between two flushes of the probe.
const BETWEEN: Duration = Duration::from_millis(10);

/// How a victim puts blocks.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two puts.
    pub pause: Duration,
    /// Threads that put.
    pub threads: u64,
    /// The first thread flushes after so many puts; 0: nobody does.
    pub flush_every: u64,
    /// The victim lives so long after its first put, at least and at most.
    pub lives: (Duration, Duration),
}

/// What rounds of one pace came to.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Blocks that were acknowledged.
    pub acknowledged: u64,
    /// Of these, blocks that had to be there because of the window, and were.
    pub in_time: u64,
    /// Blocks that had to be there because of a flush alone, and were.
    pub flushed: u64,
    /// Blocks that were lost, as they may be.
    pub lost: u64,
    /// Rounds in which the drive was too slow for a verdict on the window.
    pub slow: u64,
}

fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn version(number: u64) -> Version {
    Version { id: number, len: u64::from(BLOCK) }
}

fn key(number: u64) -> Key {
    let mut bytes = [0x77; 16];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    Key::new(&bytes).expect("a key of 16 bytes")
}

/// The number of a thread's `index`-th block in a round.
fn number(round: u64, thread: u64, index: u64) -> u64 {
    (round + 1) << 40 | thread << 32 | index
}

fn open(pool: &Path) -> (Pool, Store, View) {
    let pool = Pool::open(pool, &OpenOptions::default()).expect("open the pool");
    // The default window: this is what it is about. Room for all blocks of all rounds, so that none has to go.
    let options =
        StoreOptions { budget_bytes: Some(1 << 30), slab_bytes: Some(64 << 20), ..StoreOptions::default() };
    assert_eq!(options.window, WINDOW, "the window that the documentation names");
    let store = Store::open(&pool, options).expect("open the store");
    let view = store.view(b"the loss window", BLOCK, "").expect("a namespace");
    (pool, store, view)
}

// ---- the victim -----------------------------------------------------------------------------------------------------------------

/// One line at a time, from any thread, to the process that judges.
fn say(line: &str) {
    let _ = std::io::stdout().lock().write_all(format!("{line}\n").as_bytes()).and_then(|()| {
        // The pipe has it before anything else happens.
        std::io::stdout().lock().flush()
    });
}

/// The process that is killed: `POOL ROUND PAUSE_US THREADS FLUSH_EVERY`. It ends by itself only when something fails.
pub fn victim(words: &[String]) -> ExitCode {
    let numbers: Option<Vec<u64>> = words.iter().skip(1).map(|word| word.parse().ok()).collect();
    let (Some(pool), Some(&[round, pause, threads, flush_every])) = (words.first(), numbers.as_deref())
    else {
        return ExitCode::from(2);
    };
    let (_pool, store, view) = open(Path::new(pool));
    let mut lane = store.lane(None).expect("a lane");
    // Slabs and logs are made by the first put and are no part of the round.
    put(&mut lane, &view, number(round, 255, 0));
    store.flush().expect("flush");
    drop(lane);
    let stop = AtomicBool::new(false);
    let probe = PathBuf::from(pool).with_extension("probe");
    thread::scope(|scope| {
        scope.spawn(|| flush_probe(&probe, &stop));
        let putters: Vec<_> = (0..threads)
            .map(|thread| {
                let (store, view) = (&store, &view);
                scope.spawn(move || {
                    let mut lane = store.lane(None).expect("a lane");
                    for index in 0.. {
                        let number = number(round, thread, index);
                        put(&mut lane, view, number);
                        say(&format!("put {number} {}", now().as_nanos()));
                        if thread == 0 && flush_every > 0 && index % flush_every == flush_every - 1 {
                            say("flushing");
                            store.flush().expect("flush");
                            say("flushed");
                        }
                        thread::sleep(Duration::from_micros(pause));
                    }
                })
            })
            .collect();
        // They end only by a panic, which says why.
        for putter in putters {
            let _ = putter.join();
        }
        stop.store(true, Relaxed);
    });
    ExitCode::FAILURE
}

fn put(lane: &mut Lane, view: &View, number: u64) {
    let mut buffer = Buffer::heap(view.slot_bytes()).expect("memory");
    version(number).fill(0, &mut buffer[..BLOCK as usize]);
    let done = lane.put(view, vec![Put { key: key(number), buffer, start: 0 }]).expect("put");
    let result = &done[0].result;
    assert!(matches!(result, Stored::New), "block {number:x}: {result:?}");
}

/// Says when it begins to wait and to flush, and when that is over.
fn flush_probe(path: &Path, stop: &AtomicBool) {
    let mut file = std::fs::File::create(path).expect("a file for the probe");
    while !stop.load(Relaxed) {
        say(&format!("probe {}", now().as_nanos()));
        thread::sleep(BETWEEN);
        file.write_all(&[7; 512]).and_then(|()| file.sync_data()).expect("flush a file");
        say(&format!("probed {}", now().as_nanos()));
    }
}

// ---- the judge ------------------------------------------------------------------------------------------------------------------

/// What a victim told until it was killed.
#[derive(Debug, Default)]
struct Told {
    /// Blocks and when their acknowledgement was there, in the order of the lines.
    puts: Vec<(u64, Duration)>,
    /// So many of them were acknowledged when a flush began that returned.
    flushed: usize,
    flushing: usize,
    probe: Option<Duration>,
    /// How much longer than its pause the slowest turn of the probe took.
    slowest: Duration,
}

impl Told {
    fn line(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split(' ').collect();
        let time = |word: &str| word.parse().map(Duration::from_nanos).map_err(|e| format!("{line:?}: {e}"));
        match words[..] {
            ["put", number, at] => {
                let number = number.parse().map_err(|e| format!("{line:?}: {e}"))?;
                self.puts.push((number, time(at)?));
            }
            ["flushing"] => self.flushing = self.puts.len(),
            ["flushed"] => self.flushed = self.flushing,
            ["probe", at] => self.probe = Some(time(at)?),
            ["probed", at] => self.probed(time(at)?),
            _ => return Err(format!("a victim says {line:?}")),
        }
        Ok(())
    }

    fn probed(&mut self, at: Duration) {
        if let Some(from) = self.probe.take() {
            self.slowest = self.slowest.max(at.saturating_sub(from + BETWEEN));
        }
    }
}

/// Kills its child however it ends.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a victim and kills it; when, and what it had told. What it said after that moment is of no meaning for times, but for promises.
fn kill_one(
    program: &Path,
    pool: &Path,
    round: u64,
    pace: &Pace,
    rng: &mut Rng,
) -> Result<(Told, Duration), String> {
    let words = [round, pace.pause.as_micros() as u64, pace.threads, pace.flush_every];
    let child = Command::new(program)
        .arg("kv-window")
        .arg(pool)
        .args(words.map(|word| word.to_string()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("start {}: {error}", program.display()))?;
    let mut victim = Victim(child);
    let pipe = victim.0.stdout.take().ok_or("no pipe")?;
    let (sender, lines) = mpsc::channel();
    let reader = thread::spawn(move || {
        // A last line that the kill cut off is none.
        let mut pipe = BufReader::new(pipe);
        let mut line = String::new();
        while pipe.read_line(&mut line).is_ok_and(|len| len > 0) && line.ends_with('\n') {
            let _ = sender.send(line.trim_end().to_owned());
            line.clear();
        }
    });
    let mut told = Told::default();
    while told.puts.is_empty() {
        let line = lines.recv_timeout(LIMIT).map_err(|_| "the victim put nothing".to_owned())?;
        told.line(&line)?;
    }
    let (least, most) = pace.lives;
    let span = (most - least).as_micros() as u64;
    thread::sleep(least + Duration::from_micros(rng.below(span.max(1))));
    if let Some(status) = victim.0.try_wait().map_err(|error| error.to_string())? {
        return Err(format!("the victim ended by itself: {status}"));
    }
    let killed = now();
    drop(victim);
    let _ = reader.join();
    for line in lines {
        told.line(&line)?;
    }
    told.probed(killed);
    Ok((told, killed))
}

/// Looks at one round's blocks.
fn judge(
    pool: &Path,
    round: u64,
    pace: &Pace,
    told: &Told,
    killed: Duration,
    seen: &mut Seen,
) -> Result<(), String> {
    let (pool, store, view) = open(pool);
    let mut lane = store.lane(None).expect("a lane");
    let allowed = WINDOW + MARGIN + told.slowest * FLUSHES;
    let verdict = told.slowest <= SLOWEST;
    seen.slow += u64::from(!verdict);
    seen.acknowledged += told.puts.len() as u64;
    for (index, (number, at)) in told.puts.iter().enumerate() {
        let age = killed.saturating_sub(*at);
        let (flushed, due) = (index < told.flushed, verdict && age >= allowed);
        match (load(&mut lane, &view, *number)?, flushed, due) {
            (true, _, true) => seen.in_time += 1,
            (true, true, false) => seen.flushed += 1,
            (true, false, false) => {}
            (false, true, _) => return Err(format!("block {index}, flushed, is lost; {age:?} old")),
            (false, false, true) => {
                return Err(format!(
                    "block {index} is lost that was acknowledged {age:?} before the kill; {allowed:?} were allowed, \
                     the drive took {:?} at most",
                    told.slowest
                ));
            }
            (false, false, false) => seen.lost += 1,
        }
    }
    // Those under way are there whole, or not at all.
    for thread in 0..pace.threads {
        let told = told.puts.iter().filter(|(number, _)| number >> 32 & 0xff == thread).count() as u64;
        load(&mut lane, &view, self::number(round, thread, told))?;
    }
    drop((lane, view));
    store.close().and_then(|()| pool.close()).map_err(|error| error.chain())
}

/// Whether a block is there; wrong bytes are an error, also those that the store itself finds.
fn load(lane: &mut Lane, view: &View, number: u64) -> Result<bool, String> {
    let buffer = Buffer::heap(view.slot_bytes()).expect("memory");
    let mut done = lane.get(view, vec![Get { key: key(number), buffer, start: 0 }]).map_err(|e| e.chain())?;
    let done = done.pop().ok_or("no answer")?;
    match (done.result, done.buffer) {
        (Ok(()), Some(buffer)) => match identify(&buffer[..BLOCK as usize]) {
            Ok(found) if found == version(number) => Ok(true),
            Ok(found) => Err(format!("block {number:x} is {found}")),
            Err(why) => Err(format!("block {number:x} is {why}")),
        },
        (Err(Miss::Absent), _) => Ok(false),
        (other, _) => Err(format!("block {number:x}: {other:?}")),
    }
}

/// Rounds of one pace, on a new pool in `folder`. `program`: of which [`victim`] is a part.
///
/// # Panics
/// When the pool cannot be made or opened.
pub fn rounds(program: &Path, folder: &Path, pace: &Pace, rounds: u64, seed: u64) -> Result<Seen, String> {
    let pool = folder.join("pool");
    Pool::format(&pool, &FormatOptions::default()).expect("format a pool");
    let (mut seen, mut rng) = (Seen::default(), Rng::new(seed));
    for round in 0..rounds {
        let (told, killed) = kill_one(program, &pool, round, pace, &mut rng)?;
        judge(&pool, round, pace, &told, killed, &mut seen)
            .map_err(|why| format!("{pace:?}, seed {seed}, round {round}: {why}"))?;
    }
    Ok(seen)
}
