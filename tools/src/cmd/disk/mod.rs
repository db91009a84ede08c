//! `nvtier disk`: which drives are free, and a pool of them with its mount unit, made and unmade.

mod apply;
mod judge;
mod layout;
mod lvm;
mod record;
mod tool;
mod undo;
mod unit;

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::cli::{Disk, DiskCommand, DiskPlace, DiskTarget, Global, Layout};
use crate::failure::{Failure, Outcome};
use crate::output::{self, Align, Table};
use crate::size;
use judge::{Judged, Verdict};
use record::{Owner, Record};

/// Does it.
pub fn run(global: &Global, args: &Disk) -> Outcome {
    match &args.command {
        DiskCommand::Plan(plan) if plan.target.drives.is_empty() => list(global, &plan.place),
        DiskCommand::Plan(plan) => {
            let request = Request::resolve(&plan.target, &plan.place)?;
            if global.json {
                output::json(&request.json())?;
            } else {
                output::line(&request.text())?;
            }
            request.check()
        }
        DiskCommand::Apply(args) => apply::run(global, args),
        DiskCommand::Undo(args) => undo::run(global, args),
    }
}

/// The drives of this machine.
fn list(global: &Global, place: &DiskPlace) -> Outcome {
    let drives = judge::all();
    let records = Record::names(&place.state_dir);
    if global.json {
        return output::json(&json!({ "drives": drives, "applied": records }));
    }
    let columns = ["drive", "size", "model", "verdict", "why"];
    let mut table =
        Table::new(&columns.map(|name| (name, if name == "size" { Align::Right } else { Align::Left })));
    for drive in &drives {
        let why: Vec<&str> = drive.reasons.iter().chain(&drive.notes).map(String::as_str).collect();
        table.row(vec![
            drive.disk.node.clone(),
            size::human(drive.disk.bytes),
            output::printable(&drive.disk.model),
            word(drive.verdict).to_owned(),
            output::printable(&if why.is_empty() {
                "nothing uses it, nothing is on it".to_owned()
            } else {
                why.join("; ")
            }),
        ]);
    }
    output::line(&table.render())?;
    for name in &records {
        output::line(&format!("applied: {name} (`nvtier disk undo {name}` takes it back)"))?;
    }
    match drives.iter().any(|drive| drive.verdict == Verdict::Safe) {
        true => output::line("`nvtier disk plan DRIVE...` shows what `nvtier disk apply DRIVE...` would do."),
        false => output::line(
            "No drive is free. A directory of a file system does, too: `nvtier format /path/on/it`.",
        ),
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Safe => "safe",
        Verdict::NeedsForce => "--force",
        Verdict::Unknown => "unknown",
        Verdict::Refused => "NO",
    }
}

/// What is asked for, with every default filled in.
pub struct Request {
    pub drives: Vec<Judged>,
    /// What to do, not done yet. Where an earlier run left a record of that name, `earlier` is it.
    pub record: Record,
    pub earlier: Option<Record>,
    pub state_dir: PathBuf,
    pub force: bool,
    pub start: bool,
}

impl Request {
    /// Changes nothing.
    pub fn resolve(target: &DiskTarget, place: &DiskPlace) -> Outcome<Self> {
        let drives = judge::named(&target.drives)?;
        let state_dir = absolute(&place.state_dir)?;
        let name = &target.name;
        let mountpoint = absolute(target.mountpoint.as_deref().unwrap_or(&Path::new("/mnt").join(name)))?;
        let unit_name = format!("nvtier-{name}.service");
        let unit = absolute(&target.unit_dir)?.join(&unit_name);
        let mut record = Record::new(name, state_dir.join(name), mountpoint, unit);
        record.owner = target.owner.as_deref().map(owner).transpose()?;
        record.made_mountpoint = !record.mountpoint.exists();
        let program = std::env::current_exe().map_err(|error| Failure::io("find this program", &error))?;
        // Others than the daemon's user are let in where the pool is to belong to one of them; the kernel checks modes and owners then.
        let options: &[&str] = if record.owner.is_some() { &["--allow-other"] } else { &[] };
        record.layout = target.layout;
        record.drives = drives
            .iter()
            .map(|drive| record::Drive {
                node: PathBuf::from(&drive.disk.node),
                bytes: drive.disk.bytes,
                model: drive.disk.model.clone(),
                serial: drive.disk.serial.clone(),
                held: drive.holds.clone(),
                physical: (target.layout == Layout::Lvm).then(lvm::new_id),
            })
            .collect();
        let earlier = Record::load(&state_dir, name)?;
        let unit_dir = record.unit.parent().unwrap_or(Path::new("/"));
        record.volumes = match &earlier {
            // Identifiers are chosen once.
            Some(earlier) if earlier.layout == record.layout && nodes(earlier) == nodes(&record) => {
                earlier.volumes.clone()
            }
            _ => layout::volumes(&record, unit_dir)?,
        };
        let below: Vec<&Path> = record.volumes.iter().map(|volume| volume.mountpoint.as_path()).collect();
        record.unit_text =
            unit::text(&program, &unit_name, &record.pool, &record.mountpoint, options, &below)?;
        Ok(Self { drives, record, earlier, state_dir, force: target.force, start: !target.no_start })
    }

    /// Why `apply` would refuse, if it would.
    pub fn check(&self) -> Outcome {
        if let Some(earlier) = &self.earlier {
            return self.check_earlier(earlier);
        }
        for drive in &self.drives {
            drive.check(self.force)?;
        }
        layout::check(&self.record)?;
        self.check_places()
    }

    /// Places that are to be made are not there yet, or empty.
    fn check_places(&self) -> Outcome {
        let Record { mountpoint, unit, pool, .. } = &self.record;
        if let Some(mount) = crate::mountpoint::mounted_at(mountpoint)? {
            let message = format!(
                "use the mount point {}: a file system of type {} is mounted there",
                mountpoint.display(),
                mount.fs_type
            );
            return Err(Failure::new(crate::failure::code::BUSY, "Busy", message)
                .hint("choose another with --mountpoint"));
        }
        if mountpoint.exists() {
            let entries = std::fs::read_dir(mountpoint);
            let mut entries = entries.map_err(|error| {
                Failure::io(format!("look into the mount point {}", mountpoint.display()), &error)
            })?;
            if entries.next().is_some() {
                let message = format!("use the mount point {}: it is not empty", mountpoint.display());
                return Err(Failure::new(crate::failure::code::FAILED, "NotEmpty", message)
                    .hint("choose another with --mountpoint"));
            }
        }
        let folder = unit.parent().unwrap_or(Path::new("/"));
        if !folder.is_dir() {
            return Err(Failure::not_found(format!(
                "write the unit: there is no folder {}",
                folder.display()
            ))
            .hint("name the folder of units with --unit-dir; where there is no systemd, any folder does"));
        }
        let places = [("unit", unit), ("pool's directory", pool)].into_iter();
        let below = self
            .record
            .volumes
            .iter()
            .flat_map(|volume| [("unit", &volume.unit), ("mount point", &volume.mountpoint)]);
        for (what, path) in places.chain(below) {
            if path.exists() {
                let message =
                    format!("make the {what} {}: it is there already, and not of an `apply`", path.display());
                return Err(Failure::new(crate::failure::code::FAILED, "Exists", message)
                    .hint("choose another name with --name, or move it away"));
            }
        }
        Ok(())
    }

    /// The rest of what an earlier run began, if that is what is asked for.
    fn check_earlier(&self, earlier: &Record) -> Outcome {
        let name = &earlier.name;
        let undo = format!("`nvtier disk undo {name}` takes it back; another pool needs another --name");
        if earlier.state == record::State::Undoing {
            let message = format!("apply `{name}`: an `undo` of it was begun and did not end");
            return Err(Failure::new(crate::failure::code::BUSY, "Busy", message)
                .hint(format!("finish it: `nvtier disk undo {name}`")));
        }
        let now = &self.record;
        let differs = [
            ("drives", nodes(earlier) != nodes(now)),
            ("layout", earlier.layout != now.layout),
            ("mount point", earlier.mountpoint != now.mountpoint),
            ("owner", earlier.owner != now.owner),
            ("folder of units", earlier.unit != now.unit),
        ];
        if let Some((what, _)) = differs.iter().find(|(_, differs)| *differs) {
            let message =
                format!("apply `{name}`: that name was applied with another {what} ({})", shown(earlier));
            return Err(Failure::new(crate::failure::code::FAILED, "Exists", message).hint(undo));
        }
        for (index, drive) in self.drives.iter().enumerate() {
            let ours = layout::is_ours(earlier, index);
            match earlier.state {
                // Half-way: it may be as it was, or wiped, or ours.
                record::State::Formatting if !ours => drive.check(self.force)?,
                record::State::Formatting => {}
                _ if !ours => {
                    let holds = drive.holds.as_deref().unwrap_or("nothing");
                    let message = format!(
                        "apply `{name}`: {} is no longer what an earlier `apply` left: it holds {holds}",
                        drive.disk.node
                    );
                    return Err(Failure::new(crate::failure::code::FAILED, "Changed", message).hint(
                        format!(
                            "if that is right, remove the record {}",
                            record::path(&self.state_dir, name).display()
                        ),
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What `apply` would do, step by step.
    pub fn steps(&self) -> Vec<String> {
        let Record { name, mountpoint, unit, pool, made_mountpoint, owner, .. } = &self.record;
        let record_path = record::path(&self.state_dir, name);
        let state = self.earlier.as_ref().map(|earlier| earlier.state);
        let mut steps = Vec::new();
        if state.is_none() {
            steps.push(format!("write what is done to the record {}", record_path.display()));
        }
        if state.is_none_or(|state| state == record::State::Formatting) {
            let lost = |drive: &Judged| {
                let holds = drive.holds.as_ref()?;
                Some(format!("{holds} on {}", drive.disk.node))
            };
            let lost: Vec<String> = self.drives.iter().filter_map(lost).collect();
            let lost = if lost.is_empty() { String::new() } else { format!("; LOST: {}", lost.join(", ")) };
            let striped = match self.drives.len() {
                1 => String::new(),
                count => format!(
                    ", striped over {count} in units of {}",
                    size::human(engine::pool::DEFAULT_STRIPE_UNIT)
                ),
            };
            let members: Vec<String> =
                self.record.members().iter().map(|member| member.display().to_string()).collect();
            let striped = if members.len() == 1 { String::new() } else { striped };
            match self.record.layout {
                Layout::Raw => steps.push(format!("format {} as a pool{striped}{lost}", members.join(" "))),
                Layout::Xfs | Layout::Lvm => {
                    let mut below = layout::steps(&self.record);
                    if let Some(first) = below.first_mut() {
                        first.push_str(&lost);
                    }
                    steps.extend(below);
                    steps.push(format!("format {} as a pool{striped}", members.join(" ")));
                }
            }
            steps.push(format!("make the directory {} that names the pool", pool.display()));
            if let Some(owner) = owner {
                steps.push(format!(
                    "give the root of the pool to {} ({}:{})",
                    owner.name, owner.uid, owner.gid
                ));
            }
        }
        if *made_mountpoint {
            steps.push(format!("make the mount point {}", mountpoint.display()));
        }
        steps.push(format!("write the unit {} (nvtier mount --foreground)", unit.display()));
        steps.push(match (self.start, unit::reachable(unit)) {
            (true, Ok(())) => format!(
                "systemctl daemon-reload, enable and start {}: it is mounted on {} now and after each boot",
                unit_name(&self.record),
                mountpoint.display()
            ),
            (true, Err(why)) => format!(
                "start nothing: {why}. `nvtier mount {} {}` mounts it",
                pool.display(),
                mountpoint.display()
            ),
            (false, _) => "start nothing, as --no-start says".to_owned(),
        });
        steps
    }

    fn json(&self) -> serde_json::Value {
        let refused = self.check().err();
        json!({
            "drives": self.drives,
            "steps": self.steps(),
            "record": self.record,
            "earlier": self.earlier,
            "would_apply": refused.is_none(),
            "refused": refused.map(|failure| failure.message),
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut lines = Vec::new();
        for drive in &self.drives {
            lines.push(format!("{}: {}", drive.title(), word(drive.verdict)));
            lines.extend(
                drive.reasons.iter().chain(&drive.notes).map(|why| format!("  {}", output::printable(why))),
            );
        }
        if let Some(earlier) = &self.earlier {
            lines.push(format!("`{}` was applied before: {}", earlier.name, shown(earlier)));
        }
        lines.push("`nvtier disk apply` would".to_owned());
        lines.extend(self.steps().iter().enumerate().map(|(index, step)| format!("  {}. {step}", index + 1)));
        if self.earlier.is_none() {
            lines.push("the unit:".to_owned());
            let texts = self.record.volumes.iter().map(|volume| &volume.unit_text);
            for text in texts.chain([&self.record.unit_text]) {
                lines.extend(text.lines().map(|line| format!("  {line}").trim_end().to_owned()));
            }
        }
        lines.join("\n")
    }
}

fn nodes(record: &Record) -> Vec<String> {
    record.drives.iter().map(|drive| drive.node.display().to_string()).collect()
}

/// Names of all units of a record, those of file systems first.
fn unit_names(record: &Record) -> Vec<String> {
    record.volumes.iter().map(layout::Volume::unit_name).chain([unit_name(record)]).collect()
}

fn unit_name(record: &Record) -> String {
    record.unit.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn shown(record: &Record) -> String {
    format!("{} on {}, unit {}", nodes(record).join(" "), record.mountpoint.display(), record.unit.display())
}

fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::path::absolute(path)
        .map_err(|error| Failure::usage(format!("`{}` is no path: {error}", path.display())))
}

/// A user of this machine, by whichever source of names it has: id(1) asks them all.
fn owner(name: &str) -> Outcome<Owner> {
    let ask = |what: &str| -> Outcome<u32> {
        let tried = || format!("look up the user `{name}`");
        let output = std::process::Command::new("id").args([what, "--", name]).output();
        let output = output.map_err(|error| Failure::io(tried(), &error))?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.trim().parse().ok().filter(|_| output.status.success()).ok_or_else(|| {
            Failure::usage(format!("{}: {}", tried(), String::from_utf8_lossy(&output.stderr).trim()))
        })
    };
    Ok(Owner { name: name.to_owned(), uid: ask("-u")?, gid: ask("-g")? })
}

/// Asks on the terminal; without one, or with --json, --yes has to be there.
fn confirm(global: &Global, yes: bool, text: &str, word: &str) -> Outcome {
    if yes {
        return Ok(());
    }
    if global.json || !std::io::stdin().is_terminal() {
        return Err(
            Failure::usage("nobody can be asked here").hint("look at what it would do first, then add --yes")
        );
    }
    output::note(text);
    let mut error = std::io::stderr().lock();
    let _ = write!(error, "Type `{word}` to go on: ").and_then(|()| error.flush());
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(|error| Failure::io("read the answer", &error))?;
    match answer.trim() == word {
        true => Ok(()),
        false => Err(Failure::failed("nothing was done: the answer was another one")),
    }
}
