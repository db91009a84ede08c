//! Generations that are kept when a region is replaced, on pools of all kinds.

use super::*;
use crate::session::{Session, SessionOptions, WriterOptions};

/// A directory, and an image.
fn pools() -> Vec<(TempDir, Pool)> {
    let one = |image: bool| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool");
        if image {
            std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        }
        Pool::format(&path, &FormatOptions::default()).unwrap();
        let pool = open(&path);
        (dir, pool)
    };
    vec![one(false), one(true)]
}

fn import(session: &Session, at: &str, fill: u8, len: usize) {
    let mut writer = session.writer(at, None, WriterOptions::default()).unwrap();
    writer.write_all(&vec![fill; len]).unwrap();
    writer.commit().unwrap();
}

fn read_node(pool: &Pool, node: NodeId) -> Vec<u8> {
    let handle = pool.open_region(node, Access::Read, false).unwrap();
    let mut bytes = vec![0; handle.size() as usize];
    handle.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn what_is_replaced_is_kept_and_comes_back() {
    for (_dir, pool) in pools() {
        let session = Session::over(pool.clone(), &SessionOptions::default());
        import(&session, "m", 1, 100_000);
        let empty = pool.stat().used_bytes;
        pool.keep_generations(pool.resolve("m").unwrap().node, 2).unwrap();
        for fill in 2..=5 {
            import(&session, "m", fill, 100_000);
        }
        pool.sync().unwrap();
        let node = pool.resolve("m").unwrap().node;
        let kept = pool.generations(node).unwrap();
        assert_eq!(kept.iter().map(|kept| read_node(&pool, kept.node)[0]).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(pool.kept_generations(node).unwrap(), 2);
        assert_eq!(pool.stat().used_bytes, 3 * empty);
        // Back to 3: then 5 is the newest one that is kept, and 4 the oldest.
        let parent = ROOT;
        pool.roll_back(parent, name("m"), kept[0].generation).unwrap();
        let node = pool.resolve("m").unwrap().node;
        assert_eq!(read_node(&pool, node)[0], 3);
        let kept = pool.generations(node).unwrap();
        assert_eq!(kept.iter().map(|kept| read_node(&pool, kept.node)[0]).collect::<Vec<_>>(), [4, 5]);
        assert_eq!(pool.roll_back(parent, name("m"), 77).unwrap_err().kind(), ErrorKind::NotFound);
        // What is rolled back goes on as any other.
        import(&session, "m", 6, 100_000);
        let node = pool.resolve("m").unwrap().node;
        let kept = pool.generations(node).unwrap();
        assert_eq!(kept.iter().map(|kept| read_node(&pool, kept.node)[0]).collect::<Vec<_>>(), [5, 3]);
        assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
        // Fewer, then none, give their space back.
        pool.keep_generations(node, 1).unwrap();
        pool.sync().unwrap();
        assert_eq!(pool.stat().used_bytes, 2 * empty);
        pool.keep_generations(node, 0).unwrap();
        pool.sync().unwrap();
        assert_eq!(pool.stat().used_bytes, empty);
        assert_eq!(pool.lookup(ROOT, name(".nvtier-generations")).unwrap_err().kind(), ErrorKind::NotFound);
        import(&session, "m", 7, 100_000);
        assert_eq!(pool.generations(pool.resolve("m").unwrap().node).unwrap(), []);
    }
}

#[test]
fn they_go_with_their_region_and_follow_its_name() {
    for (_dir, pool) in pools() {
        let session = Session::over(pool.clone(), &SessionOptions::default());
        import(&session, "m", 1, 50_000);
        pool.keep_generations(pool.resolve("m").unwrap().node, 3).unwrap();
        import(&session, "m", 2, 50_000);
        import(&session, "m", 3, 50_000);
        pool.rename(ROOT, name("m"), ROOT, name("n"), RenameFlags::default()).unwrap();
        let node = pool.resolve("n").unwrap().node;
        assert_eq!(pool.generations(node).unwrap().len(), 2);
        // The region that replaced it has no say: it gets them.
        put(&pool, "other", &[9; 1000]);
        pool.rename(ROOT, name("other"), ROOT, name("n"), RenameFlags::default()).unwrap();
        let node = pool.resolve("n").unwrap().node;
        assert_eq!(pool.generations(node).unwrap().len(), 3);
        pool.unlink(ROOT, name("n")).unwrap();
        pool.sync().unwrap();
        assert_eq!(pool.stat().regions, 0);
        assert_eq!(pool.stat().used_bytes, 0);
    }
}

#[test]
fn a_rename_that_fails_leaves_the_old_region_where_it_was() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let node = put(&pool, "m", &[1; 1000]).node;
    pool.keep_generations(node, 2).unwrap();
    put(&pool, "x", &[2; 1000]);
    let missing = pool.rename(ROOT, name("nothing"), ROOT, name("m"), RenameFlags::default());
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    let no_replace = RenameFlags { no_replace: true, exchange: false };
    assert_eq!(
        pool.rename(ROOT, name("x"), ROOT, name("m"), no_replace).unwrap_err().kind(),
        ErrorKind::Exists
    );
    assert_eq!(pool.resolve("m").unwrap().node, node);
    assert_eq!(pool.generations(node).unwrap(), []);
    assert_eq!(pool.keep_generations(node, 1001).unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(pool.keep_generations(ROOT, 1).unwrap_err().kind(), ErrorKind::IsDirectory);
}
