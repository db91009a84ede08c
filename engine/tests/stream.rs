//! Regions that are written from start to end past the page cache.

use std::path::{Path, PathBuf};

use engine::{FormatOptions, Pool, RegionWriter, Session, SessionOptions, WriterOptions};

fn pool(directory: &Path, quota: Option<u64>) -> PathBuf {
    let path = directory.join("pool");
    Pool::format(&path, &FormatOptions { size: quota, ..FormatOptions::default() }).unwrap();
    path
}

fn open(pool: &Path) -> Session {
    Session::open(pool, SessionOptions::default()).unwrap()
}

/// Every byte depends on its place.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn write(writer: &mut RegionWriter, data: &[u8], piece: usize) {
    for part in data.chunks(piece) {
        writer.write_all(part).unwrap();
    }
}

#[track_caller]
fn check(session: &Session, name: &str, wanted: &[u8]) {
    let reader = session.reader(name).unwrap();
    assert_eq!(reader.len(), wanted.len() as u64, "{name}");
    let mut found = vec![0; wanted.len()];
    reader.read_exact_at(0, &mut found).unwrap();
    assert!(found == wanted, "{name}: other bytes");
    let report = session.verify(name, &mut |_| {}).unwrap();
    assert_eq!((report.bad_chunks, report.skipped), (0, 0), "{name}: {report:?}");
    assert_eq!(report.resealed, 0, "{name}: was sealed at its commit");
}

#[test]
fn all_lengths_and_pieces_arrive_with_right_sums() {
    let scratch = tempfile::tempdir().unwrap();
    let pool = pool(scratch.path(), None);
    let lens = [0, 1, 511, 512, 4096, 16 << 10, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 12345];
    {
        let session = open(&pool);
        for len in lens {
            for (hint, piece) in [(Some(len as u64), 1 << 20), (None, 100_000), (Some(len as u64 / 2), 4097)]
            {
                let name = format!("r/{len}-{piece}");
                let data = bytes(len);
                let mut writer = session.writer(&name, hint, WriterOptions::default()).unwrap();
                write(&mut writer, &data, piece);
                assert_eq!(writer.len(), len as u64);
                let entry = writer.commit().unwrap();
                assert_eq!(entry.size, len as u64);
                check(&session, &name, &data);
            }
        }
        session.close().unwrap();
    }
    let session = open(&pool);
    for len in lens {
        check(&session, &format!("r/{len}-4097"), &bytes(len));
    }
}

#[test]
fn what_does_not_come_in_order_is_written_all_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let session = open(&pool(scratch.path(), None));
    let mut wanted = bytes(3 << 20);
    let mut writer = session.writer("back", Some(3 << 20), WriterOptions::default()).unwrap();
    write(&mut writer, &wanted, 300_000);
    writer.write_at(1 << 20, b"once more").unwrap();
    wanted[1 << 20..][..9].copy_from_slice(b"once more");
    writer.commit().unwrap();
    check(&session, "back", &wanted);

    let writer = session.writer("gap", None, WriterOptions::default()).unwrap();
    writer.write_at(0, &bytes(70_000)).unwrap();
    writer.write_at(2 << 20, b"far").unwrap();
    writer.write_at((2 << 20) + 3, b"ther").unwrap();
    writer.commit().unwrap();
    let mut wanted = bytes(70_000);
    wanted.resize(2 << 20, 0);
    wanted.extend(b"farther");
    check(&session, "gap", &wanted);
}

#[test]
fn an_interrupted_stream_goes_on_where_it_was_parked() {
    let scratch = tempfile::tempdir().unwrap();
    let session = open(&pool(scratch.path(), None));
    let data = bytes((4 << 20) + 77);
    let options = WriterOptions { resume: true, resume_key: "a".into(), ..WriterOptions::default() };
    let mut writer = session.writer("r", Some(data.len() as u64), options.clone()).unwrap();
    write(&mut writer, &data[..2_500_000], 1 << 20);
    drop(writer);
    let mut writer = session.writer("r", Some(data.len() as u64), options.clone()).unwrap();
    assert_eq!(writer.resume_offset(), 2_500_000);
    write(&mut writer, &data[2_500_000..3_000_000], 1 << 20);
    writer.checkpoint().unwrap();
    write(&mut writer, &data[3_000_000..], 1 << 20);
    writer.commit().unwrap();
    check(&session, "r", &data);
    // A checkpoint in the middle of a first stream, too.
    let mut writer = session.writer("s", None, options).unwrap();
    write(&mut writer, &data[..1_234_567], 1 << 20);
    writer.checkpoint().unwrap();
    write(&mut writer, &data[1_234_567..], 1 << 20);
    writer.commit().unwrap();
    check(&session, "s", &data);
}

#[test]
fn a_quota_holds_and_nothing_is_left_of_what_was_given_up() {
    let scratch = tempfile::tempdir().unwrap();
    let session = open(&pool(scratch.path(), Some(64 << 20)));
    let before = session.stat().unwrap().free_bytes;
    let mut writer = session.writer("big", None, WriterOptions::default()).unwrap();
    let piece = bytes(1 << 20);
    let failed = (0..128).find_map(|_| writer.write_all(&piece).err()).expect("128 MiB do not fit 64");
    assert_eq!(failed.kind(), engine::ErrorKind::NoSpace, "{failed}");
    drop(writer);
    let mut writer = session.writer("small", None, WriterOptions::default()).unwrap();
    writer.write_all(&piece).unwrap();
    writer.abort().unwrap();
    session.sync().unwrap();
    assert_eq!(session.stat().unwrap().free_bytes, before);
    assert!(session.list("", true).unwrap().is_empty());
}
