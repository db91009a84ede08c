//! Mount points, looked at without touching what is mounted there: it may hang, or its daemon may be dead.

use std::path::{Component, Path, PathBuf};

use fuse_fs::MountEntry;

use crate::failure::{Failure, Outcome};

/// The uppermost mount at exactly this place, if any.
pub fn mounted_at(path: &Path) -> Outcome<Option<MountEntry>> {
    fuse_fs::find_mount(path).map_err(|error| Failure::io("read /proc/self/mountinfo", &error))
}

/// The absolute path of a mount point without links in its parents.
pub fn resolve(mountpoint: &Path) -> Outcome<PathBuf> {
    let tried = || format!("find the mount point {}", mountpoint.display());
    if mountpoint.as_os_str().is_empty() {
        return Err(Failure::usage("the mount point is empty"));
    }
    let absolute = std::path::absolute(mountpoint).map_err(|error| Failure::io(tried(), &error))?;
    match absolute.components().next_back() {
        Some(Component::Normal(name)) => {
            let parent = absolute.parent().unwrap_or(Path::new("/"));
            let parent = parent.canonicalize().map_err(|error| Failure::io(tried(), &error))?;
            let path = parent.join(name);
            // Only where nothing is mounted may the last component be looked at: it can be a link, too.
            if mounted_at(&path)?.is_none() && path.is_symlink() {
                return path.canonicalize().map_err(|error| Failure::io(tried(), &error));
            }
            Ok(path)
        }
        _ => absolute.canonicalize().map_err(|error| Failure::io(tried(), &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_and_what_is_missing_keeps_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::create_dir(base.join("m")).unwrap();
        std::os::unix::fs::symlink("m", base.join("l")).unwrap();
        assert_eq!(resolve(&dir.path().join("l")).unwrap(), base.join("m"));
        assert_eq!(resolve(&dir.path().join("gone")).unwrap(), base.join("gone"));
        assert_eq!(resolve(&dir.path().join("m/..")).unwrap(), base);
        assert_eq!(resolve(&base.join("no/such")).unwrap_err().code, crate::failure::code::NOT_FOUND);
        assert_eq!(resolve(Path::new("")).unwrap_err().code, crate::failure::code::USAGE);
    }
}
