//! What drives were measured to read at, remembered so that progress can say how near it runs to the limit.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Bytes per second that the drive under `path` was measured to read at, if it ever was: by `nvtier doctor --measure`, else by the demo.
pub fn of_path(path: &Path) -> Option<f64> {
    if let Some(rate) = doctor::ceilings::Store::of_user().get(path).and_then(|found| found.drive_read) {
        return Some(rate);
    }
    load(&file()?).get(&key(path)?).copied().filter(|rate| rate.is_finite() && *rate > 0.0)
}

/// Remembers a measurement. A cache only: failure to write it is no failure.
pub fn remember(path: &Path, bytes_per_second: f64) {
    if let (Some(file), Some(key)) = (file(), key(path)) {
        let mut ceilings = load(&file);
        ceilings.insert(key, bytes_per_second);
        let written = fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))
            .and_then(|()| fs::write(&file, serde_json::to_vec(&ceilings).unwrap_or_default()));
        if let Err(error) = written {
            tracing::debug!("{}: {error}", file.display());
        }
    }
}

fn load(file: &Path) -> BTreeMap<String, f64> {
    fs::read(file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// The device number: of the block device itself, or of the file system that holds the path.
fn key(path: &Path) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    let device = if metadata.rdev() != 0 { metadata.rdev() } else { metadata.dev() };
    Some(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)))
}

fn file() -> Option<PathBuf> {
    let absolute =
        |name| std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("nvtier/ceilings.json"))
}
