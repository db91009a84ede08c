//! Local files and directories. Links are followed, as a Hugging Face snapshot needs it: its files are links to blobs.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{Item, Listing, Origin};
use crate::failure::{Failure, Outcome};
use crate::names;

/// Deeper trees are loops or mistakes.
const DEPTH_MAX: usize = 128;

/// Lists a file or a directory with everything below.
pub fn list(path: &Path) -> Outcome<Listing> {
    let metadata =
        fs::metadata(path).map_err(|error| Failure::io(format!("open {}", path.display()), &error))?;
    let mut listing = Listing { is_directory: metadata.is_dir(), directories: Vec::new(), items: Vec::new() };
    if metadata.is_dir() {
        let mut above = HashSet::from([(metadata.dev(), metadata.ino())]);
        walk(path, "", &mut above, &mut listing)?;
    } else {
        listing.items.push(item(path, String::new(), &metadata)?);
    }
    Ok(listing)
}

/// `above`: the directories from the root down to here, since a link into one of them would never end.
fn walk(directory: &Path, prefix: &str, above: &mut HashSet<(u64, u64)>, listing: &mut Listing) -> Outcome {
    if above.len() > DEPTH_MAX {
        return Err(Failure::failed(format!(
            "{} is more than {DEPTH_MAX} directories deep",
            directory.display()
        )));
    }
    crate::interrupt::check()?;
    let list_error = |error: &std::io::Error| Failure::io(format!("list {}", directory.display()), error);
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(|error| list_error(&error))? {
        paths.push(entry.map_err(|error| list_error(&error))?.path());
    }
    paths.sort();
    for path in paths {
        let name = names::join(prefix, &names::of_local(&path)?);
        let metadata = fs::metadata(&path).map_err(|error| {
            let dangling = error.kind() == std::io::ErrorKind::NotFound && path.is_symlink();
            let failure = Failure::io(format!("open {}", path.display()), &error);
            if dangling {
                failure.hint(
                    "the link leads nowhere: was the download interrupted? Repeat it, or remove the link",
                )
            } else {
                failure
            }
        })?;
        if metadata.is_dir() {
            if !above.insert((metadata.dev(), metadata.ino())) {
                let message = format!("{} leads back into a directory above it", path.display());
                return Err(Failure::failed(message).hint("remove the link, or import the parts one by one"));
            }
            listing.directories.push(name.clone());
            walk(&path, &name, above, listing)?;
            above.remove(&(metadata.dev(), metadata.ino()));
        } else {
            listing.items.push(item(&path, name, &metadata)?);
        }
    }
    Ok(())
}

fn item(path: &Path, name: String, metadata: &Metadata) -> Outcome<Item> {
    if !metadata.is_file() {
        let message = format!("{} is neither a file nor a directory", path.display());
        return Err(Failure::failed(message).hint("remove it from the tree, or import the files one by one"));
    }
    Ok(Item {
        name,
        len: metadata.len(),
        identity: identity_of(metadata),
        mode: metadata.mode() & 0o777,
        origin: Origin::File(path.to_owned()),
    })
}

/// See [`Item::identity`].
pub fn identity(path: &Path) -> Outcome<String> {
    let metadata =
        fs::metadata(path).map_err(|error| Failure::io(format!("open {}", path.display()), &error))?;
    Ok(identity_of(&metadata))
}

fn identity_of(metadata: &Metadata) -> String {
    let (time, nanos) = (metadata.mtime(), metadata.mtime_nsec());
    format!("file:{}:{}:{}:{time}.{nanos:09}", metadata.dev(), metadata.ino(), metadata.len())
}

/// Reads all of `buffer` at `offset`.
pub fn read_at(path: &Path, offset: u64, buffer: &mut [u8]) -> Outcome {
    let tried = || format!("read {} bytes at {offset} of {}", buffer.len(), path.display());
    let tried = tried();
    let file = File::open(path).map_err(|error| Failure::io(&tried, &error))?;
    file.read_exact_at(buffer, offset).map_err(|error| Failure::io(&tried, &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_snapshot_is_followed_into_its_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshots/rev"));
        fs::create_dir_all(&blobs).unwrap();
        fs::create_dir_all(snapshot.join("onnx")).unwrap();
        fs::create_dir_all(snapshot.join("empty")).unwrap();
        fs::write(blobs.join("aa"), b"{}").unwrap();
        fs::write(blobs.join("bb"), b"weights").unwrap();
        symlink("../../blobs/aa", snapshot.join("config.json")).unwrap();
        symlink("../../../blobs/bb", snapshot.join("onnx/model.bin")).unwrap();
        let listing = list(&snapshot).unwrap();
        assert!(listing.is_directory);
        assert_eq!(listing.directories, ["empty", "onnx"]);
        let items: Vec<_> = listing.items.iter().map(|item| (item.name.as_str(), item.len)).collect();
        assert_eq!(items, [("config.json", 2), ("onnx/model.bin", 7)]);
        assert_eq!(listing.len(), 9);
    }

    #[test]
    fn loops_and_dangling_links_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        symlink("..", dir.path().join("a/up")).unwrap();
        assert!(list(dir.path()).unwrap_err().message.contains("leads back"));
        fs::remove_file(dir.path().join("a/up")).unwrap();
        symlink("nowhere", dir.path().join("a/gone")).unwrap();
        let failure = list(dir.path()).unwrap_err();
        assert!(failure.hint.unwrap().contains("leads nowhere"));
    }

    #[test]
    fn the_same_directory_twice_is_no_loop() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/f"), b"x").unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        let names: Vec<_> = list(dir.path()).unwrap().items.into_iter().map(|item| item.name).collect();
        assert_eq!(names, ["a/f", "b/f"]);
    }
}
