//! This machine's part: boots guests, kills them, and judges what is left on their drives.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::report::{Checked, Report, ensure, equal};
use crate::write_log::WriteLog;
use crate::{system, workload};

/// The drives of the guest in which [`crate::device`] runs.
const DRIVES: [&str; 6] = [
    "serial=a,size=192M",
    "serial=b,size=192M,lba=4096",
    // A block that cannot be read, one that cannot be written.
    "serial=m,size=64M,error=read:2048,error=write:4096",
    // One bad block in the middle of a pool, at 32 MiB.
    "serial=e,size=96M,error=read:65536",
    "serial=f,size=64M",
    "serial=r,size=96M",
];
/// Seed of the workloads; `NVTIER_SEED` replaces it.
const SEED: u64 = 20_261_125;
/// Times that a machine is killed.
const KILLS: u64 = 3;
/// Versions that are committed before the cuts of the power.
const STEPS: u64 = 48;
/// At most so many flushes are cut at.
const CUTS: usize = 40;

struct Host<'a> {
    run: &'a Path,
    scratch: &'a Path,
    /// The program of tests/tests/disk_layouts.rs.
    tests: &'a str,
    programs: &'a [&'a str],
    seed: u64,
}

/// Runs everything, or what `NVTIER_FILTER` names. False when a check failed.
pub fn run(run: &Path, scratch: &Path, tests: &str, programs: &[&str]) -> Checked<bool> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seed = number("NVTIER_SEED").unwrap_or(SEED);
    let filter = std::env::var("NVTIER_FILTER").ok();
    println!("seed {seed}");
    let host = Host { run, scratch, tests, programs, seed };
    let fine = host.device(filter.as_deref())? & host.system(filter.as_deref())?;
    let mut report = Report::new("guest: crashes", filter.as_deref());
    let kills = number("NVTIER_GUEST_KILLS").unwrap_or(KILLS);
    report.check("a_machine_killed_during_writes_keeps_every_acknowledged_commit", || host.kills(kills));
    report.check("power_cuts_between_flushes_keep_every_acknowledged_commit", || host.power_cuts());
    Ok(report.finish() && fine)
}

/// A machine that runs.
struct Guest {
    child: Child,
    lines: BufReader<ChildStdout>,
    pid_file: PathBuf,
}

impl Host<'_> {
    fn boot(&self, drives: &[&str], words: &[&str]) -> Checked<Guest> {
        self.boot_with(&[], drives, words)
    }

    /// With more options of the script.
    fn boot_with(&self, options: &[&str], drives: &[&str], words: &[&str]) -> Checked<Guest> {
        let pid_file = self.scratch.join("qemu.pid");
        let _ = std::fs::remove_file(&pid_file);
        let mut command = Command::new(self.run);
        command.env("TMPDIR", self.scratch).args(["--timeout", "600", "--pidfile"]).arg(&pid_file);
        command.arg("--bin").arg(std::env::current_exe()?);
        for program in self.programs {
            command.args(["--bin", program]);
        }
        command.args(options);
        for drive in drives {
            command.args(["--drive", drive]);
        }
        command.arg("--").args(words);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("no pipe")?);
        Ok(Guest { child, lines, pid_file })
    }

    /// The checks that run in a guest; their lines become ours.
    fn device(&self, filter: Option<&str>) -> Checked<bool> {
        let mut words = vec!["nvtier-guest-check", "device"];
        words.extend(filter);
        self.boot(&DRIVES, &words)?.checks()
    }

    /// Two boots of one system with systemd. Where its packages cannot be had, one skipped check says why.
    fn system(&self, filter: Option<&str>) -> Checked<bool> {
        if !system::wants(filter) {
            return Ok(true);
        }
        let setup = Command::new(self.run).arg("--setup-system").output()?;
        if !setup.status.success() {
            let said = String::from_utf8_lossy(&setup.stderr).into_owned();
            let why = said.lines().last().unwrap_or_default().trim_start_matches("guest: ").to_owned();
            let mut report = Report::new("guest: units", filter);
            report.skip("layouts_and_units_in_a_guest_with_systemd", &why);
            return Ok(report.finish());
        }
        let text = |path: std::path::PathBuf| path.to_string_lossy().into_owned();
        let image = text(self.scratch.join("system.img"));
        let tests = Path::new(self.tests).file_name().ok_or("no name")?.to_string_lossy().into_owned();
        let mut drives: Vec<String> = system::DRIVES
            .iter()
            .enumerate()
            .map(|(n, drive)| format!("{drive},file={}", text(self.scratch.join(format!("system-{n}.raw")))))
            .collect();
        let mut fine = true;
        for words in [&["first", &tests][..], &["second"]] {
            let options = ["--system", image.as_str(), "--bin", self.tests];
            let drives_now: Vec<&str> = drives.iter().map(String::as_str).collect();
            let words = [&["nvtier-guest-check"], words, filter.as_slice()].concat();
            fine &= self.boot_with(&options, &drives_now, &words)?.checks()?;
            // The next boot finds them under other numbers.
            drives.reverse();
        }
        Ok(fine)
    }

    fn kills(&self, rounds: u64) -> Checked {
        let image = self.scratch.join("killed.raw");
        let drive = format!("serial=k,size=128M,file={}", image.display());
        let seed = self.seed.to_string();
        let mut acked: Option<u64> = None;
        for round in 0..rounds {
            let wanted = 3 + (self.seed ^ round.wrapping_mul(0x9e37_79b9_7f4a_7c15)) % 29;
            let forever = u64::MAX.to_string();
            let mut guest =
                self.boot(&[&drive], &["nvtier-guest-check", "write", "/dev/drives/k", &forever, &seed])?;
            let (mut seen, mut killed) = (0, false);
            while let Some(line) = guest.line()? {
                match said(&line) {
                    Some(Said::From(first, _)) => {
                        equal("first version", first > acked.unwrap_or(0) || round == 0, true)?
                    }
                    // What it had said by the time that it died counts, too.
                    Some(Said::Acked(version, _)) => {
                        acked = Some(version);
                        seen += 1;
                    }
                    None => println!("  {line}"),
                }
                if seen == wanted && !killed {
                    killed = true;
                    guest.kill()?;
                }
            }
            let code = guest.child.wait()?.code();
            ensure(killed, || format!("the guest ended by itself with {code:?} after {seen} commits"))?;
            // A copy: the next guest has to recover the drive by itself.
            let copy = self.scratch.join("killed-copy.raw");
            std::fs::copy(&image, &copy)?;
            let newest = workload::check(&copy, acked, self.seed)?;
            println!(
                "  round {round}: killed after version {acked:?} was acknowledged, found up to {newest:?}"
            );
        }
        let last = acked.unwrap_or(0) + 6;
        let words = ["nvtier-guest-check", "write", "/dev/drives/k", &last.to_string(), &seed];
        let mut guest = self.boot(&[&drive], &words)?;
        while let Some(line) = guest.line()? {
            match said(&line) {
                Some(Said::From(first, _)) => {
                    ensure(Some(first) > acked, || format!("it went on at {first}"))?
                }
                Some(Said::Acked(..)) => {}
                None => println!("  {line}"),
            }
        }
        equal("exit code of the last guest", guest.child.wait()?.code(), Some(0))?;
        equal("newest version", workload::check(&image, Some(last - 1), self.seed)?, Some(last - 1))
    }

    fn power_cuts(&self) -> Checked {
        let (image, log) = (self.scratch.join("cut.raw"), self.scratch.join("cut.log"));
        let drive = format!("serial=p,size=96M,file={},log={}", image.display(), log.display());
        let (steps, seed) = (STEPS.to_string(), self.seed.to_string());
        let mut guest =
            self.boot(&[&drive], &["nvtier-guest-check", "write", "/dev/drives/p", &steps, &seed])?;
        let (mut formatted, mut acks) = (None, Vec::new());
        while let Some(line) = guest.line()? {
            match said(&line) {
                Some(Said::From(_, flushes)) => formatted = Some(flushes),
                Some(Said::Acked(version, flushes)) => acks.push((version, flushes)),
                None => println!("  {line}"),
            }
        }
        equal("exit code of the guest", guest.child.wait()?.code(), Some(0))?;
        equal("commits", acks.len() as u64, STEPS)?;
        let log = WriteLog::read(&log)?;
        let first = formatted.ok_or("the guest did not say when the pool was there")?;
        let flushes = log.flushes() as u64;
        ensure(first < flushes, || format!("{flushes} flushes in the log, {first} before the first commit"))?;
        let cuts: Vec<u64> = (first..=flushes).collect();
        let step = cuts.len().div_ceil(CUTS);
        let size = std::fs::metadata(&image)?.len();
        let (mut states, mut count, mut lost, mut torn) = (std::collections::BTreeSet::new(), 0, 0, 0);
        for flush in cuts.into_iter().step_by(step) {
            // Conservative: the guest counts also flushes that had nothing to do, which are not in the log.
            let acked = acks.iter().rev().find(|(_, at)| *at <= flush).map(|(version, _)| *version);
            for seed in [None, Some(self.seed ^ flush), Some(self.seed ^ flush ^ 1 << 32)] {
                let cut = self.scratch.join("cut-copy.raw");
                let file = File::create(&cut)?;
                file.set_len(size)?;
                let replayed = log.replay(&file, flush as usize, seed)?;
                drop(file);
                let newest = workload::check(&cut, acked, self.seed).map_err(|error| {
                    format!("cut at flush {flush} of {flushes}, seed {seed:?}, {replayed:?}, {acked:?} acknowledged: {}",
                        crate::report::chain(&*error))
                })?;
                states.insert(newest);
                (count, lost, torn) = (count + 1, lost + replayed.lost, torn + replayed.torn);
            }
        }
        // The other way round: the state before the flush that made a commit durable must not pass for one that has it.
        let mut missed = 0;
        for (version, flushes) in &acks {
            let cut = self.scratch.join("cut-copy.raw");
            let file = File::create(&cut)?;
            file.set_len(size)?;
            log.replay(&file, (*flushes as usize).saturating_sub(4).max(first as usize), None)?;
            drop(file);
            missed += u64::from(workload::check(&cut, Some(*version), self.seed).is_err());
        }
        ensure(missed > STEPS / 2, || format!("of {STEPS} early cuts only {missed} were noticed"))?;
        println!(
            "  {missed} of {STEPS} cuts shortly before a commit was durable were noticed; {count} cuts at flushes {first} to {flushes}: {lost} writes lost, {torn} torn, {} different states",
            states.len()
        );
        // Cuts that all look alike would prove nothing.
        ensure(lost > 0 && torn > 0 && states.len() as u64 > STEPS / 4, || {
            format!("too few states: {states:?}")
        })
    }
}

impl Guest {
    /// Passes its lines on to its end; false when a check failed.
    fn checks(&mut self) -> Checked<bool> {
        while let Some(line) = self.line()? {
            println!("{line}");
        }
        let code = self.child.wait()?.code();
        ensure(matches!(code, Some(0 | 1)), || format!("the guest's checks ended with {code:?}"))?;
        Ok(code == Some(0))
    }

    /// The next whole line; None at the end.
    fn line(&mut self) -> Checked<Option<String>> {
        let mut bytes = Vec::new();
        self.lines.read_until(b'\n', &mut bytes)?;
        Ok(bytes.strip_suffix(b"\n").map(|line| String::from_utf8_lossy(line).trim_end().to_owned()))
    }

    /// SIGKILL to the emulator: all that the guest had in memory is gone.
    fn kill(&self) -> Checked {
        let pid: i32 = std::fs::read_to_string(&self.pid_file)?.trim().parse()?;
        Ok(kill_process(Pid::from_raw(pid).ok_or("no pid")?, Signal::KILL)?)
    }
}

/// A guest whose check failed half-way does not stay.
impl Drop for Guest {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.kill();
            let _ = self.child.wait();
        }
    }
}

enum Said {
    From(u64, u64),
    Acked(u64, u64),
}

/// A line of [`workload::write`].
fn said(line: &str) -> Option<Said> {
    let words: Vec<&str> = line.split(' ').collect();
    let [what, version, "flushes", flushes] = words[..] else { return None };
    let (version, flushes) = (version.parse().ok()?, flushes.parse().ok()?);
    match what {
        "from" => Some(Said::From(version, flushes)),
        "acked" => Some(Said::Acked(version, flushes)),
        _ => None,
    }
}
