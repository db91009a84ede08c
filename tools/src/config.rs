//! Defaults from `$XDG_CONFIG_HOME/nvtier/config.toml`. The command line wins, then the environment, then this file.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::cli::VerifyMode;
use crate::failure::{Failure, Outcome};
use crate::size;

/// The configuration file. Unknown keys are refused, since a misspelt one would silently do nothing.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The pool, where neither `--pool` nor `NVTIER_POOL` is given.
    pub pool: Option<PathBuf>,
    /// Defaults of `nvtier mount`.
    #[serde(default)]
    pub mount: MountConfig,
    /// Defaults of `nvtier import`.
    #[serde(default)]
    pub import: ImportConfig,
}

/// Defaults of `nvtier mount`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountConfig {
    /// `--ram`, as text: `8GiB`.
    #[serde(default, deserialize_with = "optional_size")]
    pub ram: Option<u64>,
    /// `--verify`.
    pub verify: Option<VerifyMode>,
    /// `--threads`.
    pub threads: Option<u16>,
    /// `--scrub`, as text: `50MiB/s`.
    #[serde(default, deserialize_with = "optional_rate")]
    pub scrub: Option<u64>,
    /// `--allow-other`.
    #[serde(default)]
    pub allow_other: bool,
}

/// Defaults of `nvtier import`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportConfig {
    /// `--connections`.
    pub connections: Option<u32>,
}

fn optional_size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    size::parse(&text).map(Some).map_err(serde::de::Error::custom)
}

fn optional_rate<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    size::parse_rate(&text).map(Some).map_err(serde::de::Error::custom)
}

impl Config {
    /// Reads the file; one that is not there is an empty one, unless `NVTIER_CONFIG` named it.
    pub fn load() -> Outcome<Self> {
        let named = named();
        let Some(path) = path() else { return Ok(Self::default()) };
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
                Ok(Self::default())
            }
            Err(error) => Err(Failure::io(format!("read the configuration {}", path.display()), &error)),
        }
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Outcome<Self> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let message = error.to_string();
            Failure::usage(format!("the configuration {} is wrong: {}", path.display(), message.trim_end()))
        })?;
        if config.import.connections.is_some_and(|n| !(1..=64).contains(&n)) {
            let message =
                format!("the configuration {} is wrong: import.connections is from 1 to 64", path.display());
            return Err(Failure::usage(message));
        }
        if config.mount.threads.is_some_and(|n| !(1..=256).contains(&n)) {
            let message =
                format!("the configuration {} is wrong: mount.threads is from 1 to 256", path.display());
            return Err(Failure::usage(message));
        }
        Ok(config)
    }

    /// The pool to work on: `--pool` or `NVTIER_POOL` (both in `given`), else this file's.
    pub fn pool(&self, given: Option<&PathBuf>) -> Outcome<PathBuf> {
        given.filter(|path| !path.as_os_str().is_empty()).or(self.pool.as_ref()).cloned().ok_or_else(|| {
            Failure::usage("no pool was given").hint(
                "add --pool POOL, set NVTIER_POOL, or write `pool = \"...\"` into the configuration file",
            )
        })
    }
}

fn named() -> Option<PathBuf> {
    std::env::var_os("NVTIER_CONFIG").filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Where the file is, if there is one: `NVTIER_CONFIG`, or in the user's folder of configurations.
pub fn path() -> Option<PathBuf> {
    named().or_else(default_path)
}

fn default_path() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")))?;
    Some(base.join("nvtier/config.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Outcome<Config> {
        Config::parse(text, Path::new("config.toml"))
    }

    #[test]
    fn every_key_is_read() {
        let config = parse(
            "pool = '/p'\n[mount]\nram = '8GiB'\nverify = 'always'\nthreads = 3\nallow_other = true\nscrub = '50MiB/s'\n[import]\nconnections = 4",
        )
        .unwrap();
        assert_eq!(config.pool(None).unwrap(), Path::new("/p"));
        assert_eq!(config.pool(Some(&"/q".into())).unwrap(), Path::new("/q"));
        assert_eq!(config.mount.ram, Some(8 << 30));
        assert_eq!(config.mount.verify, Some(VerifyMode::Always));
        assert_eq!((config.mount.threads, config.mount.allow_other), (Some(3), true));
        assert_eq!(config.mount.scrub, Some(50 << 20));
        assert_eq!(config.import.connections, Some(4));
    }

    #[test]
    fn mistakes_are_usage_errors_that_name_them() {
        for (text, word) in [
            ("poool = '/p'", "poool"),
            ("[mount]\nram = '8 gigs'", "8 gigs"),
            ("[mount]\nverify = 'never'", "never"),
            ("[import]\nconnections = 0", "connections"),
            ("[mount]\nthreads = 0", "threads"),
            ("[mount]\nscrub = '0/s'", "scrub"),
            ("pool = ", "pool"),
        ] {
            let failure = parse(text).unwrap_err();
            assert_eq!(failure.code, crate::failure::code::USAGE, "{text}");
            assert!(failure.message.contains(word), "{failure}");
        }
        assert_eq!(parse("").unwrap().pool(None).unwrap_err().code, crate::failure::code::USAGE);
    }
}
