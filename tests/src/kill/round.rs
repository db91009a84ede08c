//! One round: a victim and its clients, the kill, and what is there afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::clients::{self, Args, ENDED, STOPPED};
use super::content::Rng;
use super::import::{self, Chain, Imported, Plan};
use super::journal::{self, Line, Op, State, now_ns, save_state};
use super::{Options, Place, Totals, check};
use crate::{Kind, ended, mounted_at, nvtier_path, try_run, wait_for};

/// A client that takes longer to end hangs.
const HUNG: Duration = Duration::from_secs(30);

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Daemon,
    Importer,
    Owner,
}

/// In this order, over and over.
const VICTIMS: [Victim; 10] = {
    use Victim::{Daemon as D, Importer as I, Owner as O};
    [D, O, D, I, D, O, D, I, D, O]
};

impl Victim {
    fn word(self) -> &'static str {
        match self {
            Victim::Daemon => "mount daemons",
            Victim::Importer => "importers",
            Victim::Owner => "embedded owners",
        }
    }
}

/// A client that runs.
struct Running {
    args: Args,
    child: Child,
    errors: PathBuf,
}

impl Running {
    /// Whether it only reads, and goes on doing so after its daemon's end.
    fn lingers(&self) -> bool {
        matches!(self.args.role.as_str(), "mapper" | "direct" | "leaser")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
        }
    }
}

/// A round under way.
struct Round<'a> {
    place: &'a mut Place,
    options: &'a Options,
    number: u64,
    rng: Rng,
    folder: PathBuf,
    clients: Vec<Running>,
    totals: &'a mut Totals,
    /// When the victim was killed.
    killed: u64,
    /// Whether the victim owned the pool: only then may others meet errors.
    owner_dies: bool,
}

/// Runs a round; gives what it was, in words.
pub fn run(place: &mut Place, options: &Options, number: u64, seed: u64, totals: &mut Totals) -> String {
    let victim = VICTIMS[((seed / 2) % VICTIMS.len() as u64) as usize];
    let started = Instant::now();
    let folder = place.path().join(format!("round-{number}"));
    let (kind, rng) = (place.kind, Rng::new(seed));
    let steps = totals.steps;
    let mut round = Round {
        place,
        options,
        number,
        rng,
        folder,
        clients: Vec::new(),
        totals,
        killed: 0,
        owner_dies: victim != Victim::Importer,
    };
    if let Err(finding) = round.go(victim) {
        round.totals.findings.push(finding);
    }
    round.clients.clear();
    let (keep, folder) = (round.options.keep, round.folder.clone());
    if !keep {
        let _ = fs::remove_dir_all(folder);
    }
    *totals.victims.entry(victim.word()).or_default() += 1;
    let (steps, seconds) = (totals.steps - steps, started.elapsed().as_secs_f32());
    format!("{kind:?} pool, {victim:?} killed after {steps} steps, {seconds:.1} s")
}

impl Round<'_> {
    fn go(&mut self, victim: Victim) -> Result<(), String> {
        fs::create_dir(&self.folder).map_err(|error| format!("make a folder: {error}"))?;
        let daemon = match victim {
            Victim::Owner => {
                self.start("owner", "o", 40)?;
                None
            }
            _ => Some(self.mount()?),
        };
        self.wait_until_up(victim)?;
        self.start_clients(victim)?;
        let chain = Chain::start(Plan {
            pool: self.place.pool.clone(),
            folder: self.folder.clone(),
            directory: "i".into(),
            round: self.number,
            client: 60,
            seed: self.rng.next_u64(),
        });
        self.wait_for_load(victim, &chain);

        self.killed = now_ns();
        let missed = match (victim, daemon) {
            (Victim::Daemon, Some(pid)) => !kill(pid),
            (Victim::Owner, _) => !kill(Pid::from_child(&self.clients[0].child)),
            _ => !chain.kill(),
        };
        if missed {
            return Err(format!("the {victim:?} was gone before it was killed"));
        }
        self.totals.steps += self.steps();
        // Others live on with it, or meet its end.
        std::thread::sleep(Duration::from_millis(self.rng.below(200)));
        self.stop(|client| !client.lingers());
        let imported = chain.finish();
        if self.rng.chance(50) {
            self.stop(|_| true);
        }
        if victim != Victim::Importer {
            self.mount()?;
        }
        self.stop(|_| true);
        self.judge_imports(victim, &imported);
        self.check(victim, &imported)
    }

    fn unclean(&mut self, what: String) -> String {
        self.totals.unclean += 1;
        what
    }

    /// Mounts, which clears away a dead mount first. Gives the daemon.
    fn mount(&mut self) -> Result<Pid, String> {
        let mut command = Command::new(nvtier_path());
        command.args(["mount", "--json", "--ram", "32MiB"]).args([&self.place.pool, &self.place.point]);
        let ran = try_run(&mut command).map_err(|what| self.unclean(what))?;
        let answer: Option<serde_json::Value> = serde_json::from_str(&ran.stdout).ok();
        let pid = answer.and_then(|answer| Pid::from_raw(answer["pid"].as_i64()?.try_into().ok()?));
        match pid {
            Some(pid) if ran.code == 0 && fs::read_dir(&self.place.point).is_ok() => Ok(pid),
            _ => Err(self.unclean(format!("the mount failed: {ran:#?}"))),
        }
    }

    fn start(&mut self, role: &str, directory: &str, client: u64) -> Result<(), String> {
        let place =
            if matches!(role, "owner" | "control" | "leaser") { &self.place.pool } else { &self.place.point };
        let args = Args {
            role: role.into(),
            round: self.number,
            client,
            seed: self.rng.next_u64(),
            place: place.clone(),
            directory: directory.into(),
            journal: self.folder.join(format!("{directory}.journal")),
        };
        let mut directories = vec![directory.to_owned()];
        if role == "owner" {
            directories = vec!["o1".into(), "o2".into()];
        }
        let empty = State::new();
        for directory in directories {
            let state = self.place.states.get(&directory).unwrap_or(&empty);
            save_state(&self.folder.join(format!("{directory}.state")), state)
                .map_err(|error| format!("write a state: {error}"))?;
        }
        let errors = self.folder.join(format!("{directory}.stderr"));
        let stderr = fs::File::create(&errors).map_err(|error| format!("a file for errors: {error}"))?;
        let child = Command::new(&self.options.clients)
            .arg("client")
            .args(args.words())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|error| format!("start a client: {error}"))?;
        self.clients.push(Running { args, child, errors });
        Ok(())
    }

    /// An owner that is a client itself has to own the pool before others come.
    fn wait_until_up(&mut self, victim: Victim) -> Result<(), String> {
        if victim != Victim::Owner {
            return Ok(());
        }
        let journal = self.folder.join("o.journal");
        let up = || journal::load(&journal).iter().any(|(_, line)| matches!(line, Line::Synced(_)));
        match wait_for(|| (up() || self.clients[0].child.try_wait().ok()?.is_some()).then(up)) {
            Some(true) => Ok(()),
            _ => Err(format!("the owner did not come up: {:?}", journal::load(&journal))),
        }
    }

    fn start_clients(&mut self, victim: Victim) -> Result<(), String> {
        self.start("control", "c", 50)?;
        if victim != Victim::Owner {
            self.start("writer", "w1", 1)?;
            self.start("writer", "w2", 2)?;
            self.start("mapper", "m1", 10)?;
            for (role, directory, client) in [("mapper", "m2", 11), ("rewriter", "r", 3), ("direct", "d", 12)]
            {
                if self.rng.chance(60) {
                    self.start(role, directory, client)?;
                }
            }
        }
        if self.rng.chance(60) {
            self.start("leaser", "l", 51)?;
        }
        Ok(())
    }

    /// Waits until everybody who writes has done something, then until a random number of steps more is done.
    fn wait_for_load(&mut self, victim: Victim, chain: &Chain) {
        let journals: Vec<_> = self.journals().into_iter().filter(|(name, _)| name != "i").collect();
        let ready = || {
            let loaded: Vec<_> = journals.iter().map(|(_, path)| journal::load(path)).collect();
            let writers = journals.iter().zip(&loaded).all(|(_, lines)| {
                lines.iter().any(|(_, line)| matches!(line, Line::End(_) | Line::Failed(_)))
            });
            (writers && (victim != Victim::Importer || chain.is_under_way())).then_some(())
        };
        let _ = wait_for(ready);
        let (goal, start) = (self.steps() + self.rng.below(60), Instant::now());
        while self.steps() < goal && start.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Directories that clients of this round write to, and their journals.
    fn journals(&self) -> Vec<(String, PathBuf)> {
        let mut journals = Vec::new();
        for Running { args, .. } in &self.clients {
            match args.role.as_str() {
                "owner" => {
                    for thread in 1..3 {
                        let name = format!("{}{thread}", args.directory);
                        journals.push((name, clients::owner_journal(&args.journal, &args.directory, thread)));
                    }
                }
                "writer" | "rewriter" | "control" => {
                    journals.push((args.directory.clone(), args.journal.clone()));
                }
                _ => {}
            }
        }
        journals
    }

    fn steps(&self) -> u64 {
        let begun = |path: &Path| {
            journal::load(path).iter().filter(|(_, line)| matches!(line, Line::Begin(..))).count() as u64
        };
        self.journals().iter().map(|(_, path)| begun(path)).sum()
    }

    /// Asks clients to end, waits for that, and looks how they did.
    fn stop(&mut self, which: impl Fn(&Running) -> bool) {
        let (mut stopping, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.clients).into_iter().partition(|client| which(client));
        // Journals are looked for by the clients; those that ended are still needed for that.
        for client in &mut stopping {
            drop(client.child.stdin.take());
        }
        let start = Instant::now();
        for client in &mut stopping {
            let status = loop {
                match client.child.try_wait() {
                    Ok(Some(status)) => break Some(status),
                    _ if start.elapsed() > HUNG => break None,
                    _ => std::thread::sleep(Duration::from_millis(2)),
                }
            };
            match status {
                Some(status) => self.judge_end(client, status),
                None => {
                    self.totals.hung += 1;
                    let wchan = fs::read_to_string(format!("/proc/{}/wchan", client.child.id()));
                    self.totals.findings.push(format!(
                        "{} ({}) did not end within 30 s, waiting in {wchan:?}: {:?}",
                        client.args.role,
                        client.args.directory,
                        journal::load(&client.args.journal).last()
                    ));
                    abort_connection(&self.place.point);
                    let _ = client.child.kill();
                    let _ = client.child.wait();
                }
            }
        }
        self.clients = rest;
        self.clients.extend(stopping);
    }

    fn judge_end(&mut self, client: &Running, status: ExitStatus) {
        let lines = journal::load(&client.args.journal);
        let failed = lines.iter().find_map(|(time, line)| match line {
            Line::Failed(what) => Some((*time, what.clone())),
            _ => None,
        });
        let survived = lines.iter().rev().find_map(|(_, line)| match line {
            Line::Survived(count) => Some(*count),
            _ => None,
        });
        self.totals.survived += survived.unwrap_or(0);
        let who = format!("{} ({})", client.args.role, client.args.directory);
        let victim_gone = |time: u64| time >= self.killed && self.owner_dies;
        match (status.code(), status.signal()) {
            (Some(code), _) if code == i32::from(STOPPED) => {}
            (Some(code), _) if code == i32::from(ENDED) => match failed {
                Some((time, _)) if victim_gone(time) => {}
                other => self.totals.findings.push(format!("{who} failed without cause: {other:?}")),
            },
            // The victim itself.
            (None, Some(9)) if client.args.role == "owner" => {}
            // Pages of a served file that were not in memory (docs/semantics.md, section 4).
            (None, Some(7))
                if client.args.role == "mapper" && self.owner_dies && self.place.kind == Kind::Raw => {}
            _ => {
                let said = fs::read_to_string(&client.errors).unwrap_or_default();
                let what = format!("{who} ended with {status}: {said} {:?}", lines.last());
                self.totals.findings.push(what);
            }
        }
    }

    fn judge_imports(&mut self, victim: Victim, imported: &Imported) {
        if let Some((time, what)) = &imported.failed
            && (victim == Victim::Importer || *time < self.killed)
        {
            self.totals.findings.push(format!("an import failed without cause: {what}"));
        }
        if victim == Victim::Importer && imported.killed.is_none() {
            self.totals.findings.push("the importer that was killed ended otherwise".into());
        }
    }

    /// Everything that was promised is there: through the mount, and after an unmount through a session.
    fn check(&mut self, victim: Victim, imported: &Imported) -> Result<(), String> {
        let mut steps: BTreeMap<String, Vec<(u64, Line)>> =
            self.journals().into_iter().map(|(name, path)| (name, journal::load(&path))).collect();
        let mut imports = imported.lines.clone();
        if victim == Victim::Importer {
            // The owner lives: what was answered is there, durable or not.
            for lines in steps.values_mut() {
                let ended = |line: &(u64, Line)| match line.1 {
                    Line::End(seq) => Some((line.0, Line::Synced(seq))),
                    _ => None,
                };
                let ended: Vec<_> = lines.iter().filter_map(ended).collect();
                lines.extend(ended);
            }
        }
        if let Some((name, version, source)) = &imported.killed {
            // It can be gone on with, or begun anew, and is whole then.
            let mut command = import::import(&self.place.pool, source, &format!("i/{name}"));
            let ran = try_run(&mut command)?;
            if ran.code != 0 {
                return Err(format!("the killed import could not be done again: {ran:#?}"));
            }
            let seq = imports.iter().filter(|(_, line)| matches!(line, Line::Begin(..))).count() as u64 + 1;
            imports.push((now_ns(), Line::Begin(seq, Op::Put(name.clone(), *version))));
            imports.push((now_ns(), Line::Synced(seq)));
        }
        steps.insert("i".into(), imports);

        let seen = check::through_mount(&self.place.point)?;
        let none = BTreeMap::new();
        let (mut states, mut lost) = (self.place.states.clone(), Vec::new());
        for name in seen.keys().chain(self.place.states.keys()) {
            steps.entry(name.clone()).or_default();
        }
        for (name, lines) in &steps {
            let base = self.place.states.get(name).cloned().unwrap_or_default();
            match check::judge(name, &base, lines, seen.get(name).unwrap_or(&none)) {
                Ok((state, mixed)) => {
                    for file in mixed {
                        let path = self.place.point.join(name).join(&file);
                        fs::remove_file(&path).map_err(|error| format!("remove {name}/{file}: {error}"))?;
                    }
                    states.insert(name.clone(), state);
                }
                Err(loss) => {
                    self.totals.lost_bytes += loss.bytes;
                    self.totals.findings.push(loss.what);
                    lost.push(name.clone());
                }
            }
        }
        let mut command = Command::new(nvtier_path());
        let ran = try_run(command.arg("umount").arg(&self.place.point)).map_err(|what| self.unclean(what))?;
        if ran.code != 0 || mounted_at(&self.place.point) {
            return Err(self.unclean(format!("the unmount failed: {ran:#?}")));
        }
        let mut seen = check::through_session(&self.place.pool, self.place.kind)?;
        for name in lost {
            seen.remove(&name);
            states.remove(&name);
        }
        if let Some(what) = check::differs(&states, &seen) {
            self.totals.findings.push(format!("after the unmount: {what}"));
        }
        let mut command = Command::new(nvtier_path());
        let ran = try_run(command.args(["verify", "--pool"]).arg(&self.place.pool))?;
        if ran.code != 0 {
            return Err(format!("nvtier verify: {ran:#?}"));
        }
        self.place.states = states;
        Ok(())
    }
}

fn kill(pid: Pid) -> bool {
    kill_process(pid, Signal::KILL).is_ok() && ended(pid)
}

/// Lets go of everybody who waits for the file system at `point` (the kernel's documentation: filesystems/fuse, "Control filesystem").
fn abort_connection(point: &Path) {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in text.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        if fields.get(4).map(Path::new) == Some(point)
            && let Some(minor) = fields.get(2).and_then(|device| device.strip_prefix("0:"))
        {
            let _ = fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
        }
    }
}
