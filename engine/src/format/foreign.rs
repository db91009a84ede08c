//! What a path holds that is not ours: so that no format overwrites it unasked.

use std::path::Path;

use crate::error::{Error, Result};
use crate::format::place::Place;

/// Bytes at the start that are looked at: up to btrfs' superblock.
const HEAD: usize = 68 << 10;

/// Magic numbers, with where they stand. Sources: magic(5) of file(1), `libblkid/src/superblocks` of util-linux, and the formats' own
/// documents. Earlier rows win.
const MAGICS: &[(usize, &[u8], &str)] = &[
    (0, b"NVTIERSB", "an nvtier pool"),
    (0x438, &[0x53, 0xef], "an ext2/ext3/ext4 file system"),
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], "an F2FS file system"),
    (0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x66, 0xce, 0x90, 0xa9], "a bcachefs file system"),
    (0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca], "a bcache device"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (0x36, b"FAT12   ", "a FAT file system"),
    (0x36, b"FAT16   ", "a FAT file system"),
    (0x52, b"FAT32   ", "a FAT file system"),
    (0x8001, b"CD001", "an ISO 9660 image"),
    (0, b"hsqs", "a squashfs image"),
    (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "an EROFS image"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4086, b"SWAP-SPACE", "swap space"),
    (65526, b"SWAPSPACE2", "swap space"),
    (0x218, b"LVM2 001", "an LVM physical volume"),
    (0x18, b"LVM2 001", "an LVM physical volume"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0x4000, b"SKUL\xba\xbe", "a LUKS volume (second header)"),
    (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "an md RAID member"),
    (0, &[0xfc, 0x4e, 0x2b, 0xa9], "an md RAID member"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"PK\x03\x04", "a zip archive (or a PyTorch checkpoint)"),
    (0, &[0x1f, 0x8b], "gzip data"),
    (0, &[0x28, 0xb5, 0x2f, 0xfd], "zstd data"),
    (0, &[0xfd, b'7', b'z', b'X', b'Z', 0], "xz data"),
    (257, b"ustar", "a tar archive"),
    (0, b"GGUF", "a GGUF model"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"\x7fELF", "an ELF program"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"redb\x1a\x0a\xa9\x0d\x0a", "a redb database"),
    (0, b"%PDF-", "a PDF document"),
    (510, &[0x55, 0xaa], "an MBR partition table or boot sector"),
];

/// Says what the first bytes of a device or image are, `None` for zeros. `head` holds up to [`HEAD`] bytes, `len` is how long it all is.
pub(crate) fn name_head(head: &[u8], len: u64) -> Option<&'static str> {
    for (at, magic, name) in MAGICS {
        if head.get(*at..at + magic.len()) == Some(magic) {
            return Some(name);
        }
    }
    if is_safetensors(head, len) {
        return Some("a safetensors file");
    }
    head.iter().any(|byte| *byte != 0).then_some("data of an unknown kind")
}

/// 8 bytes of header length, then JSON that starts with an object.
fn is_safetensors(head: &[u8], len: u64) -> bool {
    match head.split_first_chunk::<8>() {
        Some((header, rest)) => {
            let header = u64::from_le_bytes(*header);
            header > 1 && header < len.min(1 << 30) && rest.first() == Some(&b'{')
        }
        None => false,
    }
}

/// What a block device, NVMe namespace or file holds; `None`: nothing but zeros where something would be.
pub fn in_device(path: &Path) -> Result<Option<String>> {
    let what = || format!("look at what {} holds", path.display());
    let mut place = Place::open(path, false).map_err(|error| Error::io(what(), error))?;
    let len = place.len().map_err(|error| Error::io(what(), error))?;
    let head = place.read_up_to(0, HEAD).map_err(|error| Error::io(what(), error))?;
    if let Some(name) = name_head(&head, len) {
        return Ok(Some(name.into()));
    }
    // Some keep their only or second superblock at the end: md 0.90 and 1.0, GPT, our own second copy.
    let tail_at = len.saturating_sub(128 << 10) / 4096 * 4096;
    let tail =
        place.read_up_to(tail_at, (len - tail_at) as usize).map_err(|error| Error::io(what(), error))?;
    let found = tail.chunks(512).find_map(|block| {
        let known: [(&[u8], &str); 3] = [
            (b"NVTIERSB", "an nvtier pool (second superblock)"),
            (&[0xfc, 0x4e, 0x2b, 0xa9], "an md RAID member"),
            (b"EFI PART", "a GPT partition table (backup)"),
        ];
        known.iter().find(|(magic, _)| block.starts_with(magic)).map(|(_, name)| name.to_string())
    });
    Ok(found)
}

/// What a directory holds; `None`: nothing. `lost+found`, which mkfs makes, does not count.
pub fn in_directory(path: &Path) -> Result<Option<String>> {
    if path.join(super::SUPERBLOCK_FILE).exists() {
        return Ok(Some(match super::read(path, crate::pool::MemberKind::Directory) {
            Ok(found) => format!("an nvtier pool ({})", super::uuid_text(&found.superblock.pool)),
            Err(_) => "an nvtier pool (damaged)".into(),
        }));
    }
    let mut names = Vec::new();
    let mut more = 0usize;
    let what = || format!("look at what {} holds", path.display());
    for entry in std::fs::read_dir(path).map_err(|error| Error::io(what(), error))? {
        let name = entry.map_err(|error| Error::io(what(), error))?.file_name();
        if name == "lost+found" {
            continue;
        }
        if names.len() < 3 { names.push(format!("{name:?}")) } else { more += 1 }
    }
    if names.is_empty() {
        return Ok(None);
    }
    names.sort();
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    Ok(Some(format!("files: {}{rest}", names.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_magic_is_named() {
        for (at, magic, name) in MAGICS {
            let mut head = vec![0u8; HEAD];
            head[*at..at + magic.len()].copy_from_slice(magic);
            let found = name_head(&head, 1 << 30);
            assert_eq!(found, Some(*name), "at {at}");
        }
    }

    #[test]
    fn safetensors_and_zeros() {
        let mut file = 64u64.to_le_bytes().to_vec();
        file.extend_from_slice(b"{\"a\":{}}");
        assert_eq!(name_head(&file, 1000), Some("a safetensors file"));
        assert_eq!(name_head(&file, 20), Some("data of an unknown kind"));
        assert_eq!(name_head(&[0; 5000], 5000), None);
        assert_eq!(name_head(&[], 0), None);
        assert_eq!(name_head(b"hello", 5), Some("data of an unknown kind"));
    }

    #[test]
    fn directories() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(in_directory(dir.path()).unwrap(), None);
        std::fs::create_dir(dir.path().join("lost+found")).unwrap();
        assert_eq!(in_directory(dir.path()).unwrap(), None);
        for name in ["a", "b", "c", "d"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let found = in_directory(dir.path()).unwrap().unwrap();
        assert!(found.ends_with("and 1 more"), "{found}");
    }
}
