//! `nvtier disk undo`: takes back what `apply` did, and nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use doctor::System;
use doctor::disks::disks;
use engine::format::{erase_device, foreign, read_device, uuid_text};
use engine::{ErrorKind, Pool};
use nvme::{Device, DeviceOptions};
use serde_json::json;

use super::record::{self, Record, State, lock};
use super::{confirm, layout, lvm, shown, unit, unit_name};
use crate::cli::{DiskUndo, Global, Layout};
use crate::failure::{Failure, Outcome, code};
use crate::output;

/// What a drive is now.
enum Now {
    /// It carries the pool: claimed, to be wiped.
    Ours(Arc<dyn Device>),
    /// It carries a file system of ours, or a physical volume: where it is now.
    Below(PathBuf),
    /// Nothing is on it.
    Blank,
    /// `apply` was killed before its pool was there; this is.
    Untouched(String),
}

/// Does it.
pub fn run(global: &Global, args: &DiskUndo) -> Outcome {
    let folder = super::absolute(&args.place.state_dir)?;
    let load = || -> Outcome<Record> {
        Record::load(&folder, &args.name)?.ok_or_else(|| {
            let names = Record::names(&folder);
            let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            Failure::not_found(format!(
                "undo `{}`: there is no record of it in {}",
                args.name,
                folder.display()
            ))
            .hint(format!("records there: {known}"))
        })
    };
    let record = load()?;
    // Once before the question, so that nobody is asked in vain.
    check(&record)?;
    confirm(global, args.yes, &describe(&record), "wipe")?;
    let _lock = lock(&folder)?;
    let mut record = load()?;
    check_unit(&record)?;
    stop(&record)?;
    let drives = look(&record)?;
    let half_made = record.state == State::Formatting;
    // A half-made pool stays one that may be half made: what `apply` did not touch is not ours.
    if !half_made {
        record.state = State::Undoing;
        record.save(&folder)?;
    }
    let mut done = Vec::new();
    for (unit, _) in units(&record).filter(|(unit, _)| unit.exists()) {
        std::fs::remove_file(unit)
            .map_err(|error| Failure::io(format!("remove the unit {}", unit.display()), &error))?;
        done.push(format!("removed the unit {}", unit.display()));
    }
    if unit::reachable(&record.unit).is_ok() {
        unit::systemctl(&["daemon-reload"])?;
    }
    record.volumes.iter().try_for_each(layout::Volume::umount)?;
    if record.layout == Layout::Lvm && lvm::remove_group(&record)? {
        done.push(format!("removed the volume group {}", lvm::group(&record)));
    }
    for (drive, now) in record.drives.iter().zip(&drives) {
        let node = drive.node.display();
        match now {
            Now::Ours(device) => {
                erase_device(&**device)
                    .map_err(|error| Failure::from(error).while_doing(format!("wipe {node}")))?;
                done.push(format!("wiped {node}"));
            }
            Now::Below(node) => {
                layout::wipe(node)
                    .map_err(|error| Failure::from(error).while_doing(format!("wipe {}", node.display())))?;
                done.push(format!("wiped {}", node.display()));
            }
            Now::Blank => done.push(format!("left {node}: nothing is on it")),
            Now::Untouched(holds) => done.push(format!("left {node}: it holds {holds}, and no pool yet")),
        }
    }
    drop(drives);
    let mut places: Vec<PathBuf> = record.volumes.iter().map(|volume| volume.mountpoint.clone()).collect();
    places.extend(layout::folder(&record));
    for place in places.iter().filter(|place| place.exists()) {
        match std::fs::remove_dir(place) {
            Ok(()) => done.push(format!("removed {}", place.display())),
            Err(why) => done.push(format!("left {}: {why}", place.display())),
        }
    }
    for path in [&record.pool, &record.mountpoint] {
        let ours = path == &record.pool || record.made_mountpoint;
        if ours && path.exists() {
            match remove(path, &record) {
                Ok(()) => done.push(format!("removed {}", path.display())),
                Err(why) => done.push(format!("left {}: {why}", path.display())),
            }
        }
    }
    record.remove(&folder)?;
    done.push(format!("removed the record {}", record::path(&folder, &record.name).display()));
    if global.json {
        return output::json(&json!({ "record": record, "done": done }));
    }
    output::line(&done.join("\n"))
}

/// Everything that would refuse, without a change.
fn check(record: &Record) -> Outcome {
    check_unit(record)?;
    if is_active(record) {
        // It holds the drives; they are looked at once it is stopped.
        return Ok(());
    }
    look(record).map(drop)
}

/// The unit is the one that was written, or gone.
fn check_unit(record: &Record) -> Outcome {
    for (unit, written) in units(record) {
        match std::fs::read_to_string(unit) {
            Ok(text) if text == written => {}
            Ok(_) => {
                return Err(Failure::new(
                    code::FAILED,
                    "Changed",
                    format!("undo `{}`: the unit {} was changed since", record.name, unit.display()),
                )
                .hint("move it away if you want to keep it, then run this again"));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::io(format!("read the unit {}", unit.display()), &error)),
        }
    }
    Ok(())
}

fn is_active(record: &Record) -> bool {
    unit::reachable(&record.unit).is_ok()
        && unit::systemctl(&["is-active", "--quiet", &unit_name(record)]).is_ok()
}

/// Unmounts by stopping the unit, where systemd knows it.
fn stop(record: &Record) -> Outcome {
    if unit::reachable(&record.unit).is_err() {
        return Ok(());
    }
    if record.unit.exists() {
        // Only the pool's is stopped: its files are looked at before they go. A file system that is unmounted later ends its unit.
        unit::systemctl(&["stop", &unit_name(record)])?;
    }
    // An `undo` that was killed may have removed some of them; what it removed it had disabled.
    let there = units(record).filter(|(unit, _)| unit.exists());
    let names: Vec<_> = there.filter_map(|(unit, _)| unit.file_name()?.to_str()).collect();
    if names.is_empty() { Ok(()) } else { unit::systemctl(&[&["disable"], &names[..]].concat()) }
}

/// Units of a record with their text, those of file systems first.
fn units(record: &Record) -> impl Iterator<Item = (&Path, &str)> {
    let volumes = record.volumes.iter().map(|volume| (volume.unit.as_path(), volume.unit_text.as_str()));
    volumes.chain([(record.unit.as_path(), record.unit_text.as_str())])
}

/// Looks at every drive and claims what is ours: nobody can mount or change it until it is wiped.
fn look(record: &Record) -> Outcome<Vec<Now>> {
    let pool = Pool::probe(&record.pool).ok().filter(|info| info.id == record.pool_id);
    if let Some(pid) = pool.as_ref().and_then(|info| info.owner_pid) {
        let message = format!("undo `{}`: the pool is in use by process {pid}", record.name);
        return Err(Failure::new(code::BUSY, "Busy", message)
            .hint(format!("unmount it first: `nvtier umount {}`", record.mountpoint.display())));
    }
    if record.layout != Layout::Raw {
        layout::check_undo(record)?;
        let drives = record.drives.iter().enumerate();
        return drives.map(|(index, drive)| look_below(record, index, drive)).collect();
    }
    // The kernel numbers NVMe drives anew at each boot: a pool that is whole says where its members are now.
    let found: Vec<PathBuf> =
        pool.into_iter().flat_map(|info| info.members).map(|member| member.path).collect();
    let nodes =
        record.drives.iter().enumerate().map(|(index, drive)| found.get(index).unwrap_or(&drive.node));
    record.drives.iter().zip(nodes).map(|(drive, node)| look_at(record, drive, node)).collect()
}

/// Of a drive with a file system on it.
fn look_below(record: &Record, index: usize, drive: &record::Drive) -> Outcome<Now> {
    let node = &drive.node;
    if let Some(node) = layout::node_of(record, index) {
        return Ok(Now::Below(node));
    }
    let tried = || format!("undo `{}`: look at {}", record.name, node.display());
    let holds = foreign::in_device(node).map_err(|error| Failure::from(error).while_doing(tried()))?;
    match holds {
        None => Ok(Now::Blank),
        Some(holds) if record.state == State::Formatting => Ok(Now::Untouched(holds)),
        Some(holds) => Err(Failure::new(
            code::FAILED,
            "Changed",
            format!("{}: it is no longer what `apply` left: it holds {holds}", tried()),
        )
        .hint("nothing was wiped; if that is right, wipe it yourself and remove the record")),
    }
}

fn look_at(record: &Record, drive: &record::Drive, node: &Path) -> Outcome<Now> {
    let tried = || format!("undo `{}`: look at {}", record.name, node.display());
    let changed = |what: String| {
        Failure::new(code::FAILED, "Changed", format!("undo `{}`: {} is no longer what `apply` left: {what}", record.name, node.display()))
            .hint("nothing was wiped; if that is right, put the drive back under its name, or wipe it yourself and remove the record")
    };
    let known = disks(&System::here());
    if let Some(now) = known.iter().find(|now| Path::new(&now.node) == node)
        && now.serial != drive.serial
    {
        return Err(changed(format!(
            "it is another drive: serial number `{}`, not `{}`",
            now.serial, drive.serial
        )));
    }
    let device = nvme::open(node, &DeviceOptions::default())
        .map_err(|error| Failure::from(error).while_doing(tried()))?;
    if device.len() != drive.bytes {
        return Err(changed(format!("it has {} bytes, not {}", device.len(), drive.bytes)));
    }
    match read_device(&*device) {
        Ok(found) if uuid_text(&found.superblock.pool) == record.pool_id => return Ok(Now::Ours(device)),
        Ok(found) => {
            return Err(changed(format!("it is a member of the pool {}", uuid_text(&found.superblock.pool))));
        }
        Err(error) if error.kind() == ErrorKind::NotAPool => {}
        Err(error) => return Err(changed(error.chain())),
    }
    let holds = foreign::in_device(node).map_err(|error| Failure::from(error).while_doing(tried()))?;
    match holds {
        None => Ok(Now::Blank),
        // Killed before the pool was there: whatever it holds is not of `apply`.
        Some(holds) if record.state == State::Formatting => Ok(Now::Untouched(holds)),
        Some(holds) => Err(changed(format!("it holds {holds}"))),
    }
}

/// Removes the directory that names the pool, if it is that, or the mount point, if it is empty.
fn remove(path: &Path, record: &Record) -> Result<(), String> {
    let said = |error: std::io::Error| error.to_string();
    if path == record.mountpoint {
        return std::fs::remove_dir(path).map_err(said);
    }
    match engine::format::read(path, engine::MemberKind::Directory) {
        Ok(found) if uuid_text(&found.superblock.pool) == record.pool_id => {
            std::fs::remove_file(path.join(engine::format::SUPERBLOCK_FILE)).map_err(said)?;
        }
        Ok(_) => return Err("it is of another pool".into()),
        // Killed before it was written, or in an earlier `undo`: only an empty directory goes.
        Err(_) => {}
    }
    std::fs::remove_dir(path).map_err(said)
}

fn describe(record: &Record) -> String {
    format!(
        "`{}` is {}.\nThe pool {} and everything in it will be LOST.",
        record.name,
        shown(record),
        record.pool_id
    )
}
