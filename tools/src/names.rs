//! Names in a pool as they come from the command line, and names of local files as they go into a pool.

use std::path::Path;

use crate::failure::{Failure, Outcome};

/// Longest component, as in ext4 (`NAME_MAX`).
const COMPONENT_MAX: usize = 255;
/// Longest path, as in Linux (`PATH_MAX` with its NUL).
const PATH_MAX: usize = 4095;
/// What the mount shows at its root besides the tree (a region of that name could not be seen there), and where the engine
/// keeps regions that are not complete.
const RESERVED: [&str; 3] = [".nvtier", ".tensors", PARTIAL];
/// Where the engine keeps regions that are being imported.
pub const PARTIAL: &str = ".nvtier-partial";

/// Checks a path in a pool and brings it into the form `a/b/c`; the root is the empty path.
///
/// Any byte but `/` and NUL may be in a name, newlines too; `.` and `..` are refused, not resolved, since a pool has no
/// current directory.
pub fn normalize(path: &str) -> Outcome<String> {
    let refuse = |why: String| {
        let shown: String = path.chars().take(80).collect();
        Err(Failure::usage(format!("`{}` is not a name in a pool: {why}", crate::output::printable(&shown))))
    };
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" => continue,
            "." | ".." => return refuse("`.` and `..` are not resolved".to_owned()),
            _ if part.contains('\0') => return refuse("it has a NUL byte".to_owned()),
            _ if part.len() > COMPONENT_MAX => {
                return refuse(format!("a component has {} bytes, {COMPONENT_MAX} are allowed", part.len()));
            }
            _ => parts.push(part),
        }
    }
    let path = parts.join("/");
    if path.len() > PATH_MAX {
        return Err(Failure::usage(format!("a name of {} bytes: {PATH_MAX} are allowed", path.len())));
    }
    Ok(path)
}

/// [`normalize`] for commands that need a region or directory other than the root.
pub fn normalize_entry(path: &str) -> Outcome<String> {
    let name = normalize(path)?;
    if name.is_empty() {
        return Err(Failure::usage("the name is empty: name a region or directory of the pool"));
    }
    Ok(name)
}

/// [`normalize_entry`] for a name that is to be made.
pub fn normalize_new(path: &str) -> Outcome<String> {
    let name = normalize_entry(path)?;
    let first = name.split('/').next().unwrap_or("");
    if RESERVED.contains(&first) {
        return Err(Failure::usage(format!(
            "`{first}` is reserved at the root of a pool: choose another name"
        )));
    }
    Ok(name)
}

/// `a` and `b` to `a/b`, where either may be empty.
pub fn join(base: &str, name: &str) -> String {
    match (base, name) {
        ("", name) => name.to_owned(),
        (base, "") => base.to_owned(),
        (base, name) => format!("{base}/{name}"),
    }
}

/// The last component of a local file's path as a name in a pool.
pub fn of_local(path: &Path) -> Outcome<String> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
        Failure::usage(format!("{} has a name that is not UTF-8", path.display()))
            .hint("rename it before the import")
    })?;
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_brought_into_one_form() {
        for (path, normal) in [
            ("", ""),
            ("/", ""),
            ("a", "a"),
            ("/a//b/", "a/b"),
            ("a\nb", "a\nb"),
            ("...", "..."),
            ("a/.tensors", "a/.tensors"),
        ] {
            assert_eq!(normalize(path).unwrap(), normal);
        }
        assert_eq!(normalize(&"x".repeat(255)).unwrap().len(), 255);
    }

    #[test]
    fn what_cannot_be_a_name_is_refused() {
        let long = "x".repeat(256);
        let deep = vec!["y".repeat(200); 21].join("/");
        for path in ["..", "a/../b", ".", "a/.", "a\0b", &long, &deep] {
            assert_eq!(normalize(path).unwrap_err().code, crate::failure::code::USAGE, "{path:?}");
        }
        assert!(normalize_entry("//").is_err());
        for path in [".nvtier", "/.tensors/x", ".nvtier-partial/x", ""] {
            assert!(normalize_new(path).is_err(), "{path}");
        }
        assert_eq!(normalize_new("a/.nvtier").unwrap(), "a/.nvtier");
    }

    #[test]
    fn joining_keeps_the_form() {
        assert_eq!((join("", "a"), join("a", ""), join("a", "b")), ("a".into(), "a".into(), "a/b".into()));
    }
}
