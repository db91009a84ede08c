//! The job options, as data: one row each, from which parsing, `--cmdhelp`, completions and man pages come.
//!
//! Names, meanings and defaults are fio's (HOWTO, "Job parameters"); a row says so where ours differ. What fio has
//! and we do not is in [`UNSUPPORTED`], so that a refusal can tell "not supported here" from "no such option".

mod table;
mod unsupported;
mod values;

pub use table::OPTIONS;
pub use unsupported::UNSUPPORTED;

use crate::settings::Settings;

/// Shape of an option's value, for help texts and for `--opt` without a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// Any text.
    Text,
    /// Whole number.
    Int,
    /// Amount of data with an optional suffix.
    Bytes,
    /// Time with an optional suffix.
    Time,
    /// 0 or 1; the bare name means 1.
    Bool,
    /// One of the words.
    Choice(&'static [(&'static str, &'static str)]),
}

/// One option.
#[derive(Debug)]
pub struct Spec {
    /// fio's name.
    pub name: &'static str,
    /// Other names of the same option.
    pub alias: &'static [&'static str],
    /// Shape of the value.
    pub value: Value,
    /// Default, as one would write it.
    pub default: &'static str,
    /// One line of help; names any difference from fio.
    pub help: &'static str,
    /// Parses and stores a value.
    pub set: fn(&mut Settings, &str) -> Result<(), String>,
}

/// The option of this name or alias.
pub fn find(name: &str) -> Option<&'static Spec> {
    OPTIONS.iter().find(|spec| spec.name == name || spec.alias.contains(&name))
}

/// What to say about a name that is no option of ours.
pub fn refusal(name: &str) -> String {
    if UNSUPPORTED.contains(&name) {
        return format!("fio option '{name}' is not supported by nvtier bench (see --cmdhelp for what is)");
    }
    let nearest = OPTIONS
        .iter()
        .flat_map(|spec| std::iter::once(&spec.name).chain(spec.alias))
        .map(|known| (distance(name, known), *known))
        .min();
    match nearest {
        Some((steps, known)) if steps <= 2 => format!("unknown option '{name}'; did you mean '{known}'?"),
        _ => format!("unknown option '{name}' (see --cmdhelp for what there is)"),
    }
}

/// Sets one option and remembers it as given.
pub fn apply(settings: &mut Settings, name: &str, value: Option<&str>) -> Result<(), String> {
    let spec = find(name).ok_or_else(|| refusal(name))?;
    let value = match (value, spec.value) {
        (Some(value), _) => value.trim(),
        (None, Value::Bool) => "1",
        (None, _) => return Err(format!("option '{name}' needs a value: {}", spec.help)),
    };
    (spec.set)(settings, value).map_err(|why| format!("{name}={value}: {why}"))?;
    settings.given.retain(|(given, _)| given != spec.name);
    settings.given.push((spec.name.to_owned(), value.to_owned()));
    Ok(())
}

/// Levenshtein distance, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::settings::{Amount, EngineKind};

    fn set(name: &str, value: &str) -> Result<Settings, String> {
        let mut settings = Settings::default();
        apply(&mut settings, name, Some(value)).map(|()| settings)
    }

    #[test]
    fn no_name_is_defined_twice() {
        let mut names: Vec<&str> =
            OPTIONS.iter().flat_map(|spec| std::iter::once(&spec.name).chain(spec.alias)).copied().collect();
        names.extend(UNSUPPORTED);
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn values_reach_their_fields() {
        assert_eq!(set("bs", "4k,1m").unwrap().block_bytes, [4096, 1 << 20]);
        assert_eq!(set("blocksize", ",8k").unwrap().block_bytes, [4096, 8192]);
        assert_eq!(set("size", "25%").unwrap().size, Some(Amount::Percent(25)));
        assert_eq!(set("rwmixwrite", "30").unwrap().rwmixread, 70);
        assert_eq!(set("rate", "10m,").unwrap().rate, [Some(10 << 20), None]);
        assert_eq!(set("ioengine", "psync").unwrap().engine, EngineKind::Pread);
        assert_eq!(set("cpus_allowed", "0,2-3").unwrap().cpus_allowed, [0, 2, 3]);
        assert_eq!(set("percentile_list", "99:50:99").unwrap().percentiles, [50.0, 99.0]);
        let files = set("filename", r"/a:/b\:c").unwrap().filenames;
        assert_eq!(files, [PathBuf::from("/a"), PathBuf::from("/b:c")]);
        assert_eq!(set("rw", "randrw").unwrap().pattern.name(), "randrw");
    }

    #[test]
    fn bad_values_say_what_is_accepted() {
        for (name, value, part) in [
            ("rw", "sideways", "randread"),
            ("rw", "randtrim", "trims are not supported"),
            ("bs", "4k-64k", "bsrange"),
            ("bs", "100", "512"),
            ("iodepth", "0", "between 1 and"),
            ("direct", "maybe", "0 or 1"),
            ("ioengine", "libaio", "io_uring"),
            ("verify", "md5", "crc32c"),
            ("size", "101%", "between 0 and 100"),
            ("registerfiles", "0", "always registered"),
            ("profile", "tpcc", "model-load"),
        ] {
            let error = set(name, value).unwrap_err();
            assert!(error.contains(part) && error.contains(name), "{name}={value}: {error}");
        }
    }

    #[test]
    fn refusals_tell_unsupported_from_unknown() {
        assert!(refusal("zonemode").contains("fio option 'zonemode' is not supported"));
        assert!(refusal("iodeph").contains("did you mean 'iodepth'"));
        assert!(refusal("bogus_thing").contains("unknown option 'bogus_thing'"));
    }
}
