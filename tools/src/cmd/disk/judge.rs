//! Whether a drive may be formatted: what uses it, and what it holds.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use doctor::System;
use doctor::disks::{Disk, disks};
use engine::format::foreign;
use engine::member::raw::RawGeometry;
use engine::{MemberKind, Pool};
use serde::Serialize;

use crate::failure::{Failure, Outcome, code};
use crate::size;

/// May it be formatted?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing uses it, and nothing is on it.
    Safe,
    /// With --force only: something would be lost.
    NeedsForce,
    /// It could not be looked at.
    Unknown,
    /// Never.
    Refused,
}

/// A drive, and what was found out about it.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    #[serde(flatten)]
    pub disk: Disk,
    /// May it be formatted?
    pub verdict: Verdict,
    /// Why it may not, or only by force.
    pub reasons: Vec<String>,
    /// Good to know.
    pub notes: Vec<String>,
    /// What is on it: `None` where that is nothing, or where nobody looked.
    pub holds: Option<String>,
    /// The pool whose member it is.
    pub pool_id: Option<String>,
}

/// All drives and partitions of this machine. None is claimed to see whether somebody else has it: whoever wanted it at that moment would fail.
pub fn all() -> Vec<Judged> {
    disks(&System::here()).into_iter().map(|disk| judge(disk, false)).collect()
}

/// The drives that are named, in that order.
pub fn named(paths: &[PathBuf]) -> Outcome<Vec<Judged>> {
    let known = disks(&System::here());
    let mut found: Vec<Disk> = Vec::new();
    for path in paths {
        let disk = find(path, &known)?;
        if let Some(other) = found.iter().find(|other| {
            other.name == disk.name
                || other.part_of.as_ref() == Some(&disk.name)
                || disk.part_of.as_ref() == Some(&other.name)
        }) {
            return Err(Failure::usage(format!("{} and {} are the same drive", other.node, path.display())));
        }
        found.push(disk);
    }
    Ok(found.into_iter().map(|disk| judge(disk, true)).collect())
}

fn find(path: &Path, known: &[Disk]) -> Outcome<Disk> {
    let tried = || format!("look at the drive {}", path.display());
    let metadata = std::fs::metadata(path).map_err(|error| Failure::io(tried(), &error))?;
    if !metadata.file_type().is_block_device() {
        return Err(Failure::usage(format!("{}: it is not a block device", tried())).hint(
            "`nvtier disk plan` lists drives; for a directory or an image file there is `nvtier format`",
        ));
    }
    let device = metadata.rdev();
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    known.iter().find(|disk| disk.device == device).cloned().ok_or_else(|| {
        Failure::unsupported(format!("{}: /sys/block does not list it, or it has no size", tried()))
    })
}

fn judge(disk: Disk, claim: bool) -> Judged {
    let path = PathBuf::from(&disk.node);
    let mut judged = Judged {
        verdict: Verdict::Safe,
        reasons: disk.uses(),
        notes: Vec::new(),
        holds: None,
        pool_id: None,
        disk,
    };
    if let Err(error) = RawGeometry::plan(judged.disk.bytes, engine::pool::DEFAULT_CHUNK_SIZE, true) {
        judged.reasons.push(format!("too small: {}", error.chain()));
    }
    if let Some(file) = &judged.disk.backing {
        judged.notes.push(format!("a loop device over {file}: gone with the next boot"));
    }
    match foreign::in_device(&path) {
        Ok(found) => judged.holds = found,
        Err(error) => {
            // Whatever is on it, a reason that is known already is enough.
            judged.verdict = if judged.reasons.is_empty() { Verdict::Unknown } else { Verdict::Refused };
            let what = format!("what it holds cannot be seen: {}", error.chain());
            judged.reasons.push(what);
        }
    }
    if judged.holds.as_ref().is_some_and(|holds| holds.starts_with("an nvtier pool")) {
        judged.pool_id = pool_id(&path);
        if let Some(pid) = Pool::probe(&path).ok().and_then(|info| info.owner_pid) {
            judged.reasons.push(format!("process {pid} owns the pool on it"));
        }
    }
    if judged.verdict == Verdict::Unknown {
        return judged;
    }
    if claim && judged.reasons.is_empty() && is_claimed(&path) {
        // Mounts of other mount namespaces, and programs that hold it exclusively, are seen no other way.
        judged.reasons.push("the kernel or a program has it open for itself".into());
    }
    if !judged.reasons.is_empty() {
        judged.verdict = Verdict::Refused;
        return judged;
    }
    if let Some(holds) = &judged.holds {
        judged.verdict = Verdict::NeedsForce;
        let which = judged.pool_id.as_ref().map_or(String::new(), |id| format!(" ({id})"));
        judged.reasons.push(format!("holds {holds}{which}"));
    }
    if judged.disk.removable {
        judged.verdict = Verdict::NeedsForce;
        judged.reasons.push("removable".into());
    }
    judged
}

/// The pool that a drive's superblock names.
pub fn pool_id(path: &Path) -> Option<String> {
    let found = engine::format::read(path, MemberKind::Block).ok()?;
    Some(engine::format::uuid_text(&found.superblock.pool))
}

/// Whether somebody else has claimed it (open(2), O_EXCL on block devices).
fn is_claimed(path: &Path) -> bool {
    let flags = rustix::fs::OFlags::EXCL.bits() as i32;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    opened.is_err_and(|error| error.kind() == ErrorKind::ResourceBusy)
}

impl Judged {
    /// Fails where it must not be formatted.
    pub fn check(&self, force: bool) -> Outcome {
        let what = format!("use {}: {}", self.disk.node, self.reasons.join("; "));
        match self.verdict {
            Verdict::Safe => Ok(()),
            Verdict::NeedsForce if force => Ok(()),
            Verdict::NeedsForce => Err(Failure::new(code::FAILED, "ForeignData", what)
                .hint("choose another drive, or add --force to destroy what is there")),
            Verdict::Unknown => {
                Err(Failure::new(code::FAILED, "PermissionDenied", what)
                    .hint("run it as root, or see why not"))
            }
            Verdict::Refused => Err(Failure::new(code::BUSY, "Busy", what).hint(
                "--force does not help: unmount it, remove the line from /etc/fstab, or choose another drive",
            )),
        }
    }

    /// `/dev/nvme0n1  1.8 TiB  A drive`.
    pub fn title(&self) -> String {
        let model = if self.disk.model.is_empty() { "" } else { " " };
        format!("{} ({}{model}{})", self.disk.node, size::human(self.disk.bytes), self.disk.model)
    }
}
