use super::*;

const CHUNK: u32 = 16 << 10;

fn options(quota: Option<u64>) -> ExtentDirectoryOptions {
    ExtentDirectoryOptions { index: 3, chunk_size: CHUNK, quota, read_only: false }
}

fn hint(after: Option<Extent>) -> Hint {
    Hint { node: 1, logical: 0, after }
}

fn blocks(member: &ExtentDirectory, file: u64) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(member.file_path(file)).unwrap().blocks() * 512
}

#[test]
fn a_draft_goes_on_in_its_file_and_others_get_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let member = ExtentDirectory::new(folder.path(), &options(None)).unwrap();
    let a = member.allocate(CHUNK as u64, &hint(None)).unwrap()[0];
    let b = member.allocate(2 * CHUNK as u64, &hint(None)).unwrap()[0];
    let c = member.allocate(3 * CHUNK as u64, &hint(Some(a))).unwrap()[0];
    assert_ne!(a.file, b.file);
    assert_eq!((c.file, c.offset, c.member), (a.file, CHUNK as u64, 3));
    let stale = member.allocate(CHUNK as u64, &hint(Some(a))).unwrap()[0];
    assert_ne!(stale.file, a.file, "an extent that does not end its file is not continued");
    assert_eq!(member.used_bytes(), 7 * CHUNK as u64);
    assert!(blocks(&member, a.file) >= 4 * CHUNK as u64, "space is really there");
    // A part is punched out, the rest removes the file.
    member.free(&[a]).unwrap();
    assert!(blocks(&member, a.file) <= 3 * CHUNK as u64 + 4096);
    member.free(&[c]).unwrap();
    assert!(!member.file_path(a.file).exists());
    assert_eq!(member.free(&[c]).unwrap_err().kind(), ErrorKind::Corrupt, "freed twice");
    let again = member.allocate(CHUNK as u64, &hint(Some(c))).unwrap()[0];
    assert!(again.file > stale.file, "numbers are not used again");
    let (device, offset) = member.open(&b).unwrap();
    device.write_at(offset, &[1, 2, 3]).unwrap();
    member.sync(&[b, again]).unwrap();
    assert_eq!(fs::read(member.file_path(b.file)).unwrap()[..3], [1, 2, 3]);
}

#[test]
fn the_quota_holds_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    let member = ExtentDirectory::new(folder.path(), &options(Some(4 * CHUNK as u64))).unwrap();
    assert_eq!((member.capacity(), member.free_bytes()), (4 * CHUNK as u64, 4 * CHUNK as u64));
    let all = member.allocate(4 * CHUNK as u64, &hint(None)).unwrap();
    assert_eq!(member.allocate(1, &hint(None)).unwrap_err().kind(), ErrorKind::NoSpace);
    member.free(&all).unwrap();
    assert_eq!(member.free_bytes(), 4 * CHUNK as u64);
}

#[test]
fn opening_takes_what_layouts_name_and_removes_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let member = ExtentDirectory::new(folder.path(), &options(None)).unwrap();
    let kept = member.allocate(CHUNK as u64, &hint(None)).unwrap()[0];
    let lost = member.allocate(CHUNK as u64, &hint(None)).unwrap()[0];
    let stranger = folder.path().join(DIRECTORY).join("README");
    fs::write(&stranger, "not ours").unwrap();
    drop(member);
    let member = ExtentDirectory::new(folder.path(), &options(None)).unwrap();
    member.take(&[kept]).unwrap();
    member.taken_all().unwrap();
    assert!(
        member.file_path(kept.file).exists() && !member.file_path(lost.file).exists() && stranger.exists()
    );
    assert_eq!(member.used_bytes(), CHUNK as u64);
    assert!(member.allocate(1, &hint(None)).unwrap()[0].file > lost.file);
    drop(member);
    fs::remove_file(folder.path().join(DIRECTORY).join(format!("{:016x}", kept.file))).unwrap();
    let member = ExtentDirectory::new(folder.path(), &options(None)).unwrap();
    member.take(&[kept]).unwrap();
    assert_eq!(member.taken_all().unwrap_err().kind(), ErrorKind::Corrupt, "a missing file is said at open");
    assert_eq!(member.take(&[Extent { file: 0, ..kept }]).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn read_only_members_stay_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let read_only = ExtentDirectoryOptions { read_only: true, ..options(None) };
    let member = ExtentDirectory::new(folder.path(), &read_only).unwrap();
    member.taken_all().unwrap();
    assert_eq!(member.allocate(1, &hint(None)).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
