//! The processes around a victim: writers and readers of a mount, users of the control socket, an owner of its own.
//!
//! Each runs until its standard input ends. It ends with [`STOPPED`] then, with [`ENDED`] when a call failed (its journal says which),
//! with [`WRONG_BYTES`] when it read what nobody wrote.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use engine::{RegionReader, Session, SessionOptions, WriterOptions};
use nvme::MappedFile;

use super::content::{BLOCK, Rng, Version, identify, read_direct};
use super::journal::{Journal, Op, State, load_state};

/// It was asked to end, and nothing had failed.
pub const STOPPED: u8 = 0;
/// A call failed.
pub const ENDED: u8 = 3;
/// Wrong bytes were read.
pub const WRONG_BYTES: u8 = 4;

/// Mappings that a reader keeps.
const MAPPINGS: usize = 6;
/// Files that are replaced by renames, per writer.
const REPLACED: u64 = 6;
/// Other files, per writer.
const PLAIN_MAX: usize = 10;
/// Files that are rewritten in place.
const REWRITTEN: u64 = 3;

/// What a client is told on its command line.
#[derive(Clone, Debug)]
pub struct Args {
    /// Which of the roles.
    pub role: String,
    /// Number of the round, and of the client in it: part of what it writes.
    pub round: u64,
    /// See `round`.
    pub client: u64,
    /// For its choices.
    pub seed: u64,
    /// Mount point, or pool for those who use sessions.
    pub place: PathBuf,
    /// Its directory in the pool.
    pub directory: String,
    /// Where it writes down what it does; beside it lies `*.state`, what the directory holds when it begins.
    pub journal: PathBuf,
}

impl Args {
    /// As words of a command line.
    pub fn words(&self) -> Vec<std::ffi::OsString> {
        let numbers = [self.round, self.client, self.seed].map(|number| number.to_string().into());
        let [round, client, seed] = numbers;
        let (place, journal) = (self.place.clone().into(), self.journal.clone().into());
        vec![self.role.clone().into(), round, client, seed, place, self.directory.clone().into(), journal]
    }

    /// Back from these.
    pub fn parse(words: &[String]) -> Option<Args> {
        let [role, round, client, seed, place, directory, journal] = words else { return None };
        Some(Args {
            role: role.clone(),
            round: round.parse().ok()?,
            client: client.parse().ok()?,
            seed: seed.parse().ok()?,
            place: place.into(),
            directory: directory.clone(),
            journal: journal.into(),
        })
    }
}

/// Why a client ends before it is asked to.
enum Stop {
    Failed(String),
    Wrong(String),
}

impl Stop {
    fn io(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Stop {
        Stop::Failed(format!("{what}: {error}"))
    }
}

type Step = Result<(), Stop>;

/// Runs a client in this process.
pub fn run(args: &Args) -> ExitCode {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    std::thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        asked.store(true, Relaxed);
    });
    let client = Client { args: args.clone(), stop, rng: Rng::new(args.seed), made: 0 };
    let journal = Journal::create(&args.journal).expect("make a journal");
    match client.run(journal) {
        Ok(()) => ExitCode::from(STOPPED),
        Err(Stop::Failed(_)) => ExitCode::from(ENDED),
        Err(Stop::Wrong(what)) => {
            eprintln!("{}: {what}", args.role);
            ExitCode::from(WRONG_BYTES)
        }
    }
}

struct Client {
    args: Args,
    stop: Arc<AtomicBool>,
    rng: Rng,
    made: u64,
}

impl Client {
    fn run(mut self, mut journal: Journal) -> Step {
        let result = match self.args.role.as_str() {
            "writer" => self.writer(&mut journal),
            "rewriter" => self.rewriter(&mut journal),
            "mapper" => self.mapper(&mut journal),
            "direct" => self.direct(&mut journal),
            "control" => self.control(&mut journal),
            "leaser" => self.leaser(&mut journal),
            "owner" => self.owner(&mut journal),
            other => panic!("no role {other:?}"),
        };
        if let Err(Stop::Failed(what) | Stop::Wrong(what)) = &result {
            journal.failed(what);
        }
        result
    }

    fn stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    fn version(&mut self, bits: u64) -> Version {
        self.made += 1;
        Version { id: Version::id(self.args.round, self.args.client, self.made), len: self.rng.len(bits) }
    }

    fn here(&self) -> PathBuf {
        self.args.place.join(&self.args.directory)
    }

    // ---- through a mount ------------------------------------------------------------------------------------------------------

    fn writer(&mut self, journal: &mut Journal) -> Step {
        let mut files = load_state(&self.args.journal.with_extension("state"));
        self.make_directory()?;
        while !self.stopped() {
            match self.rng.below(100) {
                // A new content that takes the place of the old one by a rename.
                0..45 => {
                    let (name, to) = (
                        format!("t{:x}-{}", self.args.round, self.made),
                        format!("s{}", self.rng.below(REPLACED)),
                    );
                    let synced = self.rng.chance(50);
                    self.put(journal, &mut files, &name, synced)?;
                    self.rename(journal, &mut files, &name, &to)?;
                    if self.rng.chance(30) {
                        self.sync_directory(journal)?;
                    }
                }
                45..70 => {
                    let plain: Vec<_> = files.keys().filter(|name| !name.starts_with('s')).cloned().collect();
                    if plain.len() > PLAIN_MAX {
                        let name = &plain[self.rng.below(plain.len() as u64) as usize];
                        self.remove(journal, &mut files, name)?;
                    } else {
                        let name = format!("n{:x}-{}", self.args.round, self.made);
                        let synced = self.rng.chance(50);
                        self.put(journal, &mut files, &name, synced)?;
                    }
                }
                70..85 if !files.is_empty() => {
                    let name = files.keys().nth(self.rng.below(files.len() as u64) as usize).cloned();
                    let name = name.expect("below the count");
                    if self.rng.chance(50) {
                        self.remove(journal, &mut files, &name)?;
                    } else {
                        let to = format!("m{:x}-{}-{}", self.args.round, self.made, self.rng.below(1 << 30));
                        self.rename(journal, &mut files, &name, &to)?;
                    }
                }
                _ => self.sync_directory(journal)?,
            }
        }
        Ok(())
    }

    fn make_directory(&self) -> Step {
        match fs::create_dir(self.here()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Stop::io("mkdir", error)),
            _ => Ok(()),
        }
    }

    fn put(&mut self, journal: &mut Journal, files: &mut State, name: &str, synced: bool) -> Step {
        let version = self.version(21);
        let op = Op::Put(name.to_owned(), version);
        journal.begin(&op);
        let path = self.here().join(name);
        let failed = |error: io::Error| Stop::io(format!("write {name}"), error);
        let mut file = File::options().write(true).create_new(true).open(path).map_err(failed)?;
        self.write_parts(&mut file, version).map_err(failed)?;
        if synced {
            file.sync_all().map_err(failed)?;
            journal.synced();
        }
        drop(file);
        journal.end();
        files.insert(name.to_owned(), version);
        Ok(())
    }

    fn write_parts(&mut self, file: &mut File, version: Version) -> io::Result<()> {
        let bytes = version.bytes();
        let part = BLOCK << self.rng.below(12);
        bytes.chunks(part).try_for_each(|part| file.write_all(part))
    }

    fn rename(&self, journal: &mut Journal, files: &mut State, from: &str, to: &str) -> Step {
        journal.begin(&Op::Rename(from.to_owned(), to.to_owned()));
        fs::rename(self.here().join(from), self.here().join(to))
            .map_err(|error| Stop::io(format!("rename {from} to {to}"), error))?;
        journal.end();
        if let Some(version) = files.remove(from) {
            files.insert(to.to_owned(), version);
        }
        Ok(())
    }

    fn remove(&self, journal: &mut Journal, files: &mut State, name: &str) -> Step {
        journal.begin(&Op::Remove(name.to_owned()));
        fs::remove_file(self.here().join(name)).map_err(|error| Stop::io(format!("remove {name}"), error))?;
        journal.end();
        files.remove(name);
        Ok(())
    }

    fn sync_directory(&self, journal: &mut Journal) -> Step {
        let synced = File::open(self.here()).and_then(|directory| directory.sync_all());
        synced.map_err(|error| Stop::io("fsync the directory", error))?;
        journal.synced();
        Ok(())
    }

    /// Writes a few files again and again in place, while readers have them open.
    fn rewriter(&mut self, journal: &mut Journal) -> Step {
        self.make_directory()?;
        while !self.stopped() {
            let name = format!("s{}", self.rng.below(REWRITTEN));
            let version = self.version(20);
            journal.begin(&Op::Rewrite(name.clone(), version));
            let failed = |error: io::Error| Stop::io(format!("rewrite {name}"), error);
            let mut options = File::options();
            options.write(true).create(true).truncate(self.rng.chance(50));
            let mut file = options.open(self.here().join(&name)).map_err(failed)?;
            self.write_parts(&mut file, version).map_err(failed)?;
            file.set_len(version.len).map_err(failed)?;
            if self.rng.chance(60) {
                file.sync_all().map_err(failed)?;
                journal.synced();
            }
            drop(file);
            journal.end();
        }
        Ok(())
    }

    /// Some file that was put in its place by a rename, and so is whole from its first moment.
    fn settled(&mut self) -> Result<Option<PathBuf>, Stop> {
        let failed = |error: io::Error| Stop::io("list the mount", error);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.args.place).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if !entry.file_name().to_string_lossy().starts_with('w') {
                continue;
            }
            for file in fs::read_dir(entry.path()).map_err(failed)? {
                let file = file.map_err(failed)?;
                if file.file_name().to_string_lossy().starts_with('s') {
                    found.push(file.path());
                }
            }
        }
        found.sort();
        if found.is_empty() {
            std::thread::sleep(Duration::from_millis(2)); // nothing is there yet
            return Ok(None);
        }
        Ok(Some(found.swap_remove(self.rng.below(found.len() as u64) as usize)))
    }

    fn open_settled(&mut self, flags: rustix::fs::OFlags) -> Result<Option<File>, Stop> {
        let Some(path) = self.settled()? else { return Ok(None) };
        match File::options().read(true).custom_flags(flags.bits() as i32).open(&path) {
            Ok(file) => Ok(Some(file)),
            // Replaced or renamed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Stop::io("open a file", error)),
        }
    }

    /// Opens a file of the mount and keeps a mapping of it.
    fn map(&mut self) -> Result<Option<Mapped>, Stop> {
        let Some(file) = self.open_settled(rustix::fs::OFlags::empty())? else { return Ok(None) };
        let map = MappedFile::new(file, false).map_err(|error| Stop::io("map a file", error))?;
        Mapped::check_all(map).map(Some)
    }

    fn mapper(&mut self, journal: &mut Journal) -> Step {
        let mut maps: Vec<Mapped> = Vec::new();
        let met = loop {
            if self.stopped() {
                return Ok(());
            }
            match self.map() {
                Ok(Some(map)) => {
                    if maps.len() == MAPPINGS {
                        let oldest = self.rng.below(MAPPINGS as u64) as usize;
                        maps.swap_remove(oldest);
                    }
                    maps.push(map);
                }
                Ok(None) => {}
                Err(Stop::Failed(what)) => break what,
                Err(wrong) => return Err(wrong),
            }
            self.look(&maps)?;
        };
        // The owner is gone. What is mapped stays: passed-through mappings must, others may end this process by SIGBUS.
        journal.failed(&met);
        let mut looks = 0;
        while !self.stopped() {
            self.look(&maps)?;
            looks += maps.len() as u64;
            journal.survived(looks);
            std::thread::sleep(Duration::from_millis(1)); // others need the processor more
        }
        for map in maps {
            Mapped::check_all(map.map)?;
            looks += 1;
        }
        journal.survived(looks);
        Err(Stop::Failed(met))
    }

    /// Compares some blocks of every mapping.
    fn look(&mut self, maps: &[Mapped]) -> Step {
        for map in maps {
            for _ in 0..8 {
                map.check_block(self.rng.next_u64())?;
            }
        }
        Ok(())
    }

    fn direct(&mut self, journal: &mut Journal) -> Step {
        let mut last: Option<(File, u64)> = None;
        let met = loop {
            if self.stopped() {
                return Ok(());
            }
            match self.open_settled(rustix::fs::OFlags::DIRECT) {
                Ok(None) => continue,
                Ok(Some(file)) => {
                    let len = match file.metadata() {
                        Ok(metadata) => metadata.len(),
                        Err(error) => break format!("stat: {error}"),
                    };
                    match read_direct(&file, len) {
                        Ok(bytes) => drop(identify(&bytes).map_err(Stop::Wrong)?),
                        Err(error) => break format!("read: {error}"),
                    }
                    last = Some((file, len));
                }
                Err(Stop::Failed(what)) => break what,
                Err(wrong) => return Err(wrong),
            }
        };
        journal.failed(&met);
        let mut looks = 0;
        while let (false, Some((file, len))) = (self.stopped(), &last) {
            match read_direct(file, *len) {
                Ok(bytes) => drop(identify(&bytes).map_err(Stop::Wrong)?),
                Err(error) => return Err(Stop::io("read on", error)),
            }
            looks += 1;
            journal.survived(looks);
            std::thread::sleep(Duration::from_millis(5)); // others need the processor more
        }
        Err(Stop::Failed(met))
    }

    // ---- through a session ----------------------------------------------------------------------------------------------------

    fn session(&self, serve: bool) -> Result<Session, Stop> {
        let wait = Duration::from_secs(2);
        let options = SessionOptions { serve, ram_bytes: 16 << 20, wait, ..SessionOptions::default() };
        let session = Session::open(&self.args.place, options)
            .map_err(|error| Stop::io("open the pool", error.chain()))?;
        match (session.is_remote(), serve) {
            (true, false) | (false, true) => Ok(session),
            (false, false) => Err(Stop::Failed("nobody owned the pool".into())),
            (true, true) => Err(Stop::Failed("another process owned the pool".into())),
        }
    }

    fn control(&mut self, journal: &mut Journal) -> Step {
        let session = self.session(false)?;
        let files = load_state(&self.args.journal.with_extension("state"));
        self.work(journal, &session, files)
    }

    /// Writes, replaces, moves, removes and reads through a session.
    fn work(&mut self, journal: &mut Journal, session: &Session, mut files: State) -> Step {
        let directory = self.args.directory.clone();
        let at = |name: &str| format!("{directory}/{name}");
        let failed = |what: &str, error: engine::Error| Stop::io(what, error.chain());
        while !self.stopped() {
            match self.rng.below(100) {
                0..50 => {
                    let name = format!("s{}", self.rng.below(REPLACED));
                    let version = self.version(21);
                    let resume = self.rng.chance(30);
                    journal.begin(&Op::Put(name.clone(), version));
                    let options = WriterOptions {
                        resume,
                        resume_key: format!("{:x}", version.id),
                        ..WriterOptions::default()
                    };
                    let hint = self.rng.chance(50).then_some(version.len);
                    let mut writer =
                        session.writer(&at(&name), hint, options).map_err(|e| failed("open to write", e))?;
                    for part in version.bytes().chunks(BLOCK << self.rng.below(12)) {
                        writer.write_all(part).map_err(|e| failed("write", e))?;
                    }
                    writer.commit().map_err(|e| failed("commit", e))?;
                    journal.end();
                    journal.synced();
                    files.insert(name, version);
                }
                50..60 if !files.is_empty() => {
                    let name = files.keys().nth(self.rng.below(files.len() as u64) as usize).cloned();
                    let name = name.expect("below the count");
                    if self.rng.chance(50) {
                        journal.begin(&Op::Remove(name.clone()));
                        session.remove(&at(&name), false).map_err(|e| failed("remove", e))?;
                        files.remove(&name);
                    } else {
                        let to = format!("m{}", self.rng.below(REPLACED));
                        if to == name {
                            continue;
                        }
                        journal.begin(&Op::Rename(name.clone(), to.clone()));
                        session.rename(&at(&name), &at(&to)).map_err(|e| failed("rename", e))?;
                        if let Some(version) = files.remove(&name) {
                            files.insert(to, version);
                        }
                    }
                    journal.end();
                    if self.rng.chance(50) {
                        session.sync().map_err(|e| failed("sync", e))?;
                        journal.synced();
                    }
                }
                60..70 => drop(session.list("", true).map_err(|e| failed("list", e))?),
                _ if !files.is_empty() => {
                    let (name, version) = files
                        .iter()
                        .nth(self.rng.below(files.len() as u64) as usize)
                        .expect("below the count");
                    let reader = session.reader(&at(name)).map_err(|e| failed("open to read", e))?;
                    let mut bytes = vec![0; version.len as usize];
                    reader.read_exact_at(0, &mut bytes).map_err(|e| failed("read", e))?;
                    version.compare(0, &bytes).map_err(Stop::Wrong)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Holds leases: opens what others have written, and goes on reading when the owner has gone.
    fn leaser(&mut self, journal: &mut Journal) -> Step {
        let session = self.session(false)?;
        let mut open: Vec<RegionReader> = Vec::new();
        let met = loop {
            if self.stopped() {
                return Ok(());
            }
            let entries = match session.list("", true) {
                Ok(entries) => entries,
                Err(error) => break format!("list: {}", error.chain()),
            };
            let settled: Vec<_> = entries
                .into_iter()
                .filter(|entry| entry.path.rsplit('/').next().is_some_and(|name| name.starts_with('s')))
                .filter(|entry| entry.kind == engine::NodeKind::Region && !entry.path.starts_with('r'))
                .collect();
            if settled.is_empty() {
                continue;
            }
            let entry = &settled[self.rng.below(settled.len() as u64) as usize];
            match session.reader(&entry.path) {
                Ok(reader) => {
                    if open.len() == MAPPINGS {
                        open.swap_remove(self.rng.below(MAPPINGS as u64) as usize);
                    }
                    open.push(reader);
                }
                Err(error) if error.kind() == engine::ErrorKind::NotFound => continue,
                Err(error) => break format!("open {}: {}", entry.path, error.chain()),
            }
            let reader = &open[open.len() - 1];
            let mut bytes = vec![0; reader.len() as usize];
            match reader.read_exact_at(0, &mut bytes) {
                Ok(()) => drop(identify(&bytes).map_err(Stop::Wrong)?),
                Err(error) => break format!("read {}: {}", entry.path, error.chain()),
            }
        };
        journal.failed(&met);
        // Bytes come from the file where its sums are known already; where not, an error is right and wrong bytes are not.
        let mut looks = 0;
        while !self.stopped() {
            for reader in &open {
                let mut bytes = vec![0; reader.len() as usize];
                if reader.read_exact_at(0, &mut bytes).is_ok() {
                    identify(&bytes).map_err(Stop::Wrong)?;
                    looks += 1;
                }
            }
            journal.survived(looks);
            std::thread::sleep(Duration::from_millis(5)); // others need the processor more
        }
        Err(Stop::Failed(met))
    }

    /// Owns the pool itself, serves it to others, and writes with several threads.
    fn owner(&mut self, journal: &mut Journal) -> Step {
        let session = self.session(true)?;
        let base = self.args.journal.clone();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (1..3_u64)
                .map(|thread| {
                    let mut client = Client {
                        args: Args {
                            client: self.args.client + thread,
                            directory: format!("{}{thread}", self.args.directory),
                            journal: base.with_file_name(format!("{}{thread}.journal", self.args.directory)),
                            ..self.args.clone()
                        },
                        stop: self.stop.clone(),
                        rng: Rng::new(self.args.seed ^ thread << 40),
                        made: 0,
                    };
                    let session = &session;
                    scope.spawn(move || {
                        let files = load_state(&client.args.journal.with_extension("state"));
                        let mut journal = Journal::create(&client.args.journal).expect("make a journal");
                        let result = client.work(&mut journal, session, files);
                        if let Err(Stop::Failed(what) | Stop::Wrong(what)) = &result {
                            journal.failed(what);
                        }
                        result
                    })
                })
                .collect();
            journal.synced(); // it is up
            threads.into_iter().try_for_each(|thread| thread.join().expect("a thread of the owner"))
        })?;
        session.close().map_err(|error| Stop::io("close the pool", error.chain()))
    }
}

/// A mapping, and what it holds.
struct Mapped {
    map: MappedFile,
    version: Version,
}

impl Mapped {
    fn check_all(map: MappedFile) -> Result<Mapped, Stop> {
        let mut bytes = vec![0; map.len() as usize];
        map.read_at(0, &mut bytes).map_err(|error| Stop::io("read a mapping", error))?;
        let version = identify(&bytes).map_err(|what| Stop::Wrong(format!("a mapping: {what}")))?;
        Ok(Mapped { map, version })
    }

    fn check_block(&self, random: u64) -> Step {
        let blocks = self.version.len.div_ceil(BLOCK as u64);
        let offset = random % blocks * BLOCK as u64;
        let mut block = vec![0; (self.version.len - offset).min(BLOCK as u64) as usize];
        self.map.read_at(offset, &mut block).map_err(|error| Stop::io("read a mapping", error))?;
        self.version.compare(offset, &block).map_err(|what| Stop::Wrong(format!("a mapping: {what}")))
    }
}

/// What the journal of a thread of the role `owner` is called.
pub fn owner_journal(base: &Path, directory: &str, thread: u64) -> PathBuf {
    base.with_file_name(format!("{directory}{thread}.journal"))
}
