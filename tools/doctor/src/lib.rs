//! `nvtier doctor`: what this machine has, what nvtier needs of it, what is lost where the two differ, and what to do.
//!
//! ```text
//! System   where facts come from: /proc, /sys and /etc below a root, and, on the real one, what only trying tells
//! checks   one file an area: facts -> findings
//! Report   all findings, and the worst of them
//! ```
//!
//! A finding is never a refusal: it warns. Files are read below [`System::root`], so that tests show the checks machines that they do not run on.
#![forbid(unsafe_code)]

pub mod ceilings;
mod checks;
pub mod disks;
pub mod page;
mod system;
mod tables;
pub mod wear;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use system::System;
pub use tables::{CpuRow, GpuRow, cpus, gpu, gpus};

/// How bad a finding is; the later, the worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Nothing is wrong; good to know.
    Info,
    /// It could not be seen. `found` says why.
    Unknown,
    /// Works, but something is slower or missing.
    Degraded,
    /// The main job cannot be done.
    CannotRun,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `kernel`, `memory`, `drive`, ...
    pub area: &'static str,
    /// What was looked at.
    pub item: String,
    /// How bad it is.
    pub status: Status,
    /// What is there.
    pub found: String,
    /// What should be there; empty where nothing is asked for.
    pub needed: String,
    /// What it changes for the user; empty where it changes nothing.
    pub effect: String,
    /// What to do; empty where nothing is to be done.
    pub remedy: String,
    /// A command that does it, for `--fix-hints`.
    pub command: String,
    /// What the same check would say in addition to root; empty where it would say no more.
    pub root_adds: String,
}

impl Finding {
    /// As it should be.
    pub(crate) fn ok(area: &'static str, item: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding {
            area,
            item: item.into(),
            status: Status::Ok,
            found: found.into(),
            needed: String::new(),
            effect: String::new(),
            remedy: String::new(),
            command: String::new(),
            root_adds: String::new(),
        }
    }

    /// Good to know.
    pub(crate) fn info(area: &'static str, item: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding { status: Status::Info, ..Finding::ok(area, item, found) }
    }

    /// It could not be seen.
    pub(crate) fn unknown(area: &'static str, item: impl Into<String>, why: impl Into<String>) -> Finding {
        Finding { status: Status::Unknown, ..Finding::ok(area, item, why) }
    }

    pub(crate) fn needs(mut self, needed: impl Into<String>) -> Finding {
        self.needed = needed.into();
        self
    }

    /// It is not so: what that changes, and what to do.
    pub(crate) fn degraded(mut self, effect: impl Into<String>, remedy: impl Into<String>) -> Finding {
        (self.status, self.effect, self.remedy) = (Status::Degraded, effect.into(), remedy.into());
        self
    }

    pub(crate) fn cannot_run(mut self, effect: impl Into<String>, remedy: impl Into<String>) -> Finding {
        (self.status, self.effect, self.remedy) = (Status::CannotRun, effect.into(), remedy.into());
        self
    }

    pub(crate) fn command(mut self, command: impl Into<String>) -> Finding {
        self.command = command.into();
        self
    }

    pub(crate) fn root_adds(mut self, what: impl Into<String>) -> Finding {
        self.root_adds = what.into();
        self
    }
}

/// What a machine was found to be.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The worst status, [`Status::Unknown`] and [`Status::Info`] counting as [`Status::Ok`].
    pub verdict: Status,
    /// The path that pools are to lie on.
    pub path: PathBuf,
    /// Whether it was root who looked.
    pub root: bool,
    /// All findings, by area.
    pub findings: Vec<Finding>,
}

/// Looks at everything. `path`: where a pool lies or is to lie. Writes nothing but one unnamed temporary file there.
pub fn examine(system: &System, path: &Path) -> Report {
    let mut findings = Vec::new();
    for check in checks::ALL {
        check(system, path, &mut findings);
    }
    let worst = findings.iter().map(|finding| finding.status).max().unwrap_or(Status::Ok);
    Report {
        verdict: if worst < Status::Degraded { Status::Ok } else { worst },
        path: path.to_path_buf(),
        root: system.is_root(),
        findings,
    }
}
