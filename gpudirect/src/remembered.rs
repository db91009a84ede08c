//! What was measured on this machine, kept in the cache folder. A cache only: what cannot be read is measured again, what cannot
//! be written is no failure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most entries that are kept; the file stays small whatever happens.
const ENTRIES_MAX: usize = 500;

/// A file of entries by key.
#[derive(Clone, Debug)]
pub struct Remembered {
    file: Option<PathBuf>,
}

impl Remembered {
    /// A file of this name in the user's cache folder: `$XDG_CACHE_HOME/nvtier`, or `~/.cache/nvtier`.
    pub fn in_cache(name: &str) -> Remembered {
        let absolute =
            |name| std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        Remembered { file: base.map(|base| base.join("nvtier").join(name)) }
    }

    /// This file.
    pub fn at(file: impl Into<PathBuf>) -> Remembered {
        Remembered { file: Some(file.into()) }
    }

    /// Nothing is kept.
    pub fn nowhere() -> Remembered {
        Remembered { file: None }
    }

    /// The entry of a key. What does not have the type any more counts as not there.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        serde_json::from_value(self.load().remove(key)?).ok()
    }

    /// Keeps an entry.
    pub fn put<T: Serialize>(&self, key: &str, value: &T) {
        if let Ok(value) = serde_json::to_value(value) {
            self.change(|all| {
                if all.len() >= ENTRIES_MAX {
                    all.clear();
                }
                all.insert(key.to_owned(), value);
            });
        }
    }

    /// Drops an entry.
    pub fn forget(&self, key: &str) {
        self.change(|all| drop(all.remove(key)));
    }

    fn load(&self) -> BTreeMap<String, serde_json::Value> {
        let text = self.file.as_ref().and_then(|file| std::fs::read(file).ok());
        text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, serde_json::Value>)) {
        let Some(file) = &self.file else { return };
        let mut all = self.load();
        change(&mut all);
        let written = (|| {
            std::fs::create_dir_all(file.parent().unwrap_or(std::path::Path::new("/")))?;
            // Whole or not at all: other processes read it meanwhile.
            let draft = file.with_extension(format!("{}.part", std::process::id()));
            std::fs::write(&draft, serde_json::to_vec_pretty(&all).unwrap_or_default())?;
            std::fs::rename(&draft, file)
        })();
        if let Err(error) = written {
            tracing::debug!("{}: {error}", file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_kept_and_damage_counts_as_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/b.json");
        let kept = Remembered::at(&file);
        assert_eq!(kept.get::<u32>("k"), None);
        kept.put("k", &7u32);
        kept.put("other", &"text");
        assert_eq!(Remembered::at(&file).get::<u32>("k"), Some(7));
        assert_eq!(kept.get::<u32>("other"), None, "of another type");
        kept.forget("k");
        assert_eq!(kept.get::<u32>("k"), None);
        for damage in ["", "{", "[1]", "null"] {
            std::fs::write(&file, damage).unwrap();
            assert_eq!(kept.get::<String>("other"), None);
        }
        kept.put("k", &8u32);
        assert_eq!(kept.get::<u32>("k"), Some(8));
        assert_eq!(std::fs::read_dir(folder.path().join("a")).unwrap().count(), 1);
        Remembered::nowhere().put("k", &1);
    }
}
