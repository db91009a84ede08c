//! `nvtier disk apply`: formats, writes the unit, starts it. Each step is recorded before it is taken and may be taken twice.

use engine::{FormatOptions, OpenOptions, Pool, ROOT, SetAttr};
use serde_json::json;

use super::record::{Record, State, lock, write_whole};
use super::{Request, confirm, layout, unit, unit_names};
use crate::cli::{DiskApply, Global};
use crate::failure::{Failure, Outcome};
use crate::output;

/// Does it.
pub fn run(global: &Global, args: &DiskApply) -> Outcome {
    if args.target.drives.is_empty() {
        return Err(
            Failure::usage("no drive was named").hint("`nvtier disk plan` lists drives that are free")
        );
    }
    let request = Request::resolve(&args.target, &args.place)?;
    request.check()?;
    confirm(global, args.yes, &request.text(), "format")?;
    let _lock = lock(&request.state_dir)?;
    // What was looked at may have changed while the question stood there.
    let request = Request::resolve(&args.target, &args.place)?;
    request.check()?;
    let steps = request.steps();
    let mut record = request.earlier.clone().unwrap_or_else(|| request.record.clone());
    let folder = &request.state_dir;
    if record.state == State::Formatting {
        record.save(folder)?;
        layout::make(&record)?;
        format(&request, &record)?;
        record.state = State::Formatted;
        record.save(folder)?;
    }
    // After a boot without systemd nobody has mounted them.
    layout::mount(&record)?;
    for volume in &record.volumes {
        write_whole(&volume.unit, &volume.unit_text, 0o644)?;
    }
    std::fs::create_dir_all(&record.mountpoint).map_err(|error| {
        Failure::io(format!("make the mount point {}", record.mountpoint.display()), &error)
    })?;
    // The text of this run: the program may lie elsewhere by now. An edited unit stays, and `undo` says so.
    let unchanged = std::fs::read_to_string(&record.unit).map_or(true, |text| text == record.unit_text);
    if unchanged {
        record.unit_text.clone_from(&request.record.unit_text);
        record.save(folder)?;
        write_whole(&record.unit, &record.unit_text, 0o644)?;
    } else {
        output::note(&format!("{} was edited since and stays as it is", record.unit.display()));
    }
    let reachable = unit::reachable(&record.unit);
    let started = request.start && reachable.is_ok();
    if started {
        unit::systemctl(&["daemon-reload"])?;
        let names = unit_names(&record);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        unit::systemctl(&[&["enable"], &names[..]].concat())?;
        unit::systemctl(&[&["start"], &names[..]].concat())?;
    }
    record.state = State::Done;
    record.save(folder)?;
    if global.json {
        return output::json(
            &json!({ "record": record, "steps": steps, "started": started, "not_started": reachable.err() }),
        );
    }
    output::line(&said(&record, started, reachable.err()))
}

/// Formats the drives, unless they all carry this pool already, and gives its root to its owner.
fn format(request: &Request, record: &Record) -> Outcome {
    let whole = Pool::probe(&record.pool).is_ok_and(|info| info.id == record.pool_id);
    if !whole {
        let options = FormatOptions {
            members: record.members(),
            id: Some(record.pool_bytes()?),
            // What may be lost was judged above, drive by drive.
            force: true,
            ..FormatOptions::default()
        };
        Pool::format(&record.pool, &options).map_err(|error| {
            Failure::from(error).while_doing(format!("format {}", super::nodes(record).join(" ")))
        })?;
    }
    let Some(owner) = &record.owner else { return Ok(()) };
    let give = || -> engine::Result<()> {
        let pool = Pool::open(&record.pool, &OpenOptions::default())?;
        pool.setattr(ROOT, &SetAttr { uid: Some(owner.uid), gid: Some(owner.gid), ..SetAttr::default() })?;
        pool.close()
    };
    give().map_err(|error| {
        Failure::from(error).while_doing(format!(
            "give the pool on {} to {}",
            request.record.drives.first().map_or_else(String::new, |drive| drive.node.display().to_string()),
            owner.name
        ))
    })
}

fn said(record: &Record, started: bool, why_not: Option<String>) -> String {
    let Record { name, pool, mountpoint, unit, pool_id, .. } = record;
    let mut lines = vec![
        format!("pool {pool_id} on {}", super::nodes(record).join(" ")),
        format!("  named by  {}", pool.display()),
        format!("  unit      {}", unit.display()),
    ];
    for volume in &record.volumes {
        let (node, place) = (volume.node.display(), volume.mountpoint.display());
        lines.push(format!("  XFS       {node} on {place}"));
    }
    lines.push(match (started, why_not) {
        (true, _) => format!("  mounted   {}", mountpoint.display()),
        (false, why) => format!(
            "  not mounted{}: `nvtier mount {} {}` mounts it",
            why.map_or(String::new(), |why| format!(" ({why})")),
            pool.display(),
            mountpoint.display()
        ),
    });
    lines.push(format!("`nvtier disk undo {name}` takes it back, with everything in the pool"));
    lines.join("\n")
}
