//! What `nvtier disk apply` did, written before it does it: whatever it is killed in, the next run and `undo` know.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::layout::Volume;
use crate::cli::Layout;
use crate::failure::{Failure, Outcome, code};

/// Version of the file.
const VERSION: u32 = 1;

/// How far it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The drives may hold what they held before, nothing, or the pool.
    Formatting,
    /// The drives hold the pool; the unit may be missing.
    Formatted,
    /// All is done.
    Done,
    /// `undo` began.
    Undoing,
}

/// A drive as it was.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Drive {
    /// Its node at that time.
    pub node: PathBuf,
    pub bytes: u64,
    pub model: String,
    pub serial: String,
    /// What was on it before.
    pub held: Option<String>,
    /// Of the layout `lvm`: the identifier of its physical volume, chosen before that is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical: Option<String>,
}

/// Whom the pool's root belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Owner {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
}

/// One run of `apply`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Record {
    pub version: u32,
    /// Of nvtier.
    pub written_by: String,
    pub name: String,
    pub state: State,
    /// Chosen before the drives are touched: whoever carries it is ours.
    pub pool_id: String,
    /// The directory that points to the drives.
    pub pool: PathBuf,
    pub mountpoint: PathBuf,
    /// The mount point was not there before.
    pub made_mountpoint: bool,
    pub owner: Option<Owner>,
    pub unit: PathBuf,
    pub unit_text: String,
    pub drives: Vec<Drive>,
    /// What lies between the drives and the pool.
    #[serde(default)]
    pub layout: Layout,
    /// File systems of the layout.
    #[serde(default)]
    pub volumes: Vec<Volume>,
}

impl Record {
    /// The newest version, state `Formatting`, no drives.
    pub fn new(name: &str, pool: PathBuf, mountpoint: PathBuf, unit: PathBuf) -> Self {
        Self {
            version: VERSION,
            written_by: env!("CARGO_PKG_VERSION").to_owned(),
            name: name.to_owned(),
            state: State::Formatting,
            pool_id: uuid::Uuid::new_v4().hyphenated().to_string(),
            pool,
            mountpoint,
            made_mountpoint: false,
            owner: None,
            unit,
            unit_text: String::new(),
            drives: Vec::new(),
            layout: Layout::Raw,
            volumes: Vec::new(),
        }
    }

    /// The record of a name, if there is one.
    pub fn load(folder: &Path, name: &str) -> Outcome<Option<Self>> {
        let path = path(folder, name);
        let tried = || format!("read the record {}", path.display());
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::io(tried(), &error)),
        };
        let wrong = |why: String| {
            Failure::corrupt(format!("{}: {why}", tried()))
                .hint("move it away; drives are then judged by what they hold")
        };
        let value: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        if value["version"].as_u64().is_some_and(|version| version > VERSION.into()) {
            return Err(Failure::unsupported(format!("{}: it is of a newer nvtier", tried())));
        }
        let record: Self = serde_json::from_value(value).map_err(|error| wrong(error.to_string()))?;
        if record.name != name {
            return Err(wrong(format!("it is of `{}`", record.name)));
        }
        Ok(Some(record))
    }

    /// Names of all records.
    pub fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json").map(str::to_owned))
            .collect();
        names.sort();
        names
    }

    /// Writes it: durable, and whole or not at all.
    pub fn save(&self, folder: &Path) -> Outcome {
        let path = path(folder, &self.name);
        let text =
            serde_json::to_string_pretty(self).map_err(|error| Failure::failed(error.to_string()))? + "\n";
        write_whole(&path, &text, 0o600)
    }

    /// The end of it.
    pub fn remove(&self, folder: &Path) -> Outcome {
        let path = path(folder, &self.name);
        fs::remove_file(&path).map_err(|error| Failure::io(format!("remove {}", path.display()), &error))
    }

    /// Where the pool's bytes lie.
    pub fn members(&self) -> Vec<PathBuf> {
        match self.layout {
            Layout::Raw => self.drives.iter().map(|drive| drive.node.clone()).collect(),
            Layout::Xfs | Layout::Lvm => self.volumes.iter().map(Volume::member).collect(),
        }
    }

    /// The pool's id, as the engine takes it.
    pub fn pool_bytes(&self) -> Outcome<[u8; 16]> {
        let id = uuid::Uuid::parse_str(&self.pool_id);
        id.map(uuid::Uuid::into_bytes).map_err(|_| {
            Failure::corrupt(format!("the record of `{}` has no pool's id: {}", self.name, self.pool_id))
        })
    }
}

/// Where the record of a name is.
pub fn path(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.json"))
}

/// Writes a file beside itself, flushes it, and puts it in its place.
pub fn write_whole(path: &Path, text: &str, mode: u32) -> Outcome {
    let write = || -> std::io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(mode).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|error| Failure::io(format!("write {}", path.display()), &error))
}

/// Makes the folder of records and keeps other runs out of it as long as what it returns lives.
pub fn lock(folder: &Path) -> Outcome<File> {
    let tried = || format!("use the folder of records {}", folder.display());
    DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(|error| {
        Failure::io(tried(), &error).hint("run it as root, or name a folder with --state-dir")
    })?;
    let file = File::open(folder).map_err(|error| Failure::io(tried(), &error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Failure::new(
            code::BUSY,
            "Busy",
            format!("{}: another `nvtier disk` is at work there", tried()),
        )),
        Err(error) => Err(Failure::io(tried(), &error.into())),
    }
}
