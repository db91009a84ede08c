//! Rates of the calls on names and of small regions, beside the same acts on the file system under the pool.
//!
//! `cargo run --release -p nvtier-engine --example metadata -- DIRECTORY [COUNT]`

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use engine::{Access, FormatOptions, NewNode, NodeKind, OpenOptions, Pool, ROOT, Result};

fn rate(what: &str, count: u32, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    run()?;
    let took = start.elapsed();
    println!(
        "{what:<42} {:>8.2} us each  {:>10.0} /s",
        took.as_secs_f64() * 1e6 / f64::from(count),
        f64::from(count) / took.as_secs_f64()
    );
    Ok(())
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let place = PathBuf::from(args.next().unwrap_or_else(|| "/dev/shm/nvtier-metadata".into()));
    let count: u32 = args.next().and_then(|count| count.parse().ok()).unwrap_or(10_000);
    let path = place.join("pool");
    Pool::format(&path, &FormatOptions::default())?;
    let result = pool_rates(&path, count).and_then(|()| native_rates(&place.join("native"), count));
    let _ = std::fs::remove_dir_all(&path);
    let _ = std::fs::remove_dir_all(place.join("native"));
    result
}

fn pool_rates(path: &Path, count: u32) -> Result<()> {
    let pool = Pool::open(path, &OpenOptions::default())?;
    let new = NewNode { kind: NodeKind::Region, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: None };
    let names: Vec<String> = (0..count).map(|index| format!("file {index}")).collect();
    let nodes = |each: &mut dyn FnMut(u64) -> Result<()>| {
        names.iter().try_for_each(|name| each(pool.lookup(ROOT, OsStr::new(name))?.node))
    };
    rate("pool: create", count, || {
        names.iter().try_for_each(|name| pool.create(ROOT, OsStr::new(name), &new).map(drop))
    })?;
    rate("pool: lookup", count, || nodes(&mut |_| Ok(())))?;
    rate("pool: open to write, close", count, || {
        nodes(&mut |node| pool.open_region(node, Access::Write, false).map(drop))
    })?;
    rate("pool: open, write 4 KiB, close (sealed)", count, || {
        nodes(&mut |node| pool.open_region(node, Access::Write, false)?.write_at(0, &[7; 4096]).map(drop))
    })?;
    rate("pool: open to read, close", count, || {
        nodes(&mut |node| pool.open_region(node, Access::Read, false).map(drop))
    })?;
    rate("pool: snapshot of all of it", count, || pool.sync())?;
    rate("pool: snapshot of one change, 20 times", 20, || {
        for index in 0..20 {
            pool.create(ROOT, OsStr::new(&format!("one {index}")), &new)?;
            pool.sync()?;
        }
        Ok(())
    })?;
    rate("pool: unlink", count, || names.iter().try_for_each(|name| pool.unlink(ROOT, OsStr::new(name))))?;
    rate("pool: snapshot and freeing", count, || pool.sync())?;
    pool.close()
}

fn native_rates(path: &Path, count: u32) -> Result<()> {
    let io = |error| engine::Error::io("native", error);
    std::fs::create_dir_all(path).map_err(io)?;
    let files: Vec<PathBuf> = (0..count).map(|index| path.join(format!("file {index}"))).collect();
    rate("native: create, close", count, || {
        files.iter().try_for_each(|file| std::fs::File::create(file).map(drop)).map_err(io)
    })?;
    rate("native: open, write 4 KiB, close", count, || {
        files.iter().try_for_each(|file| std::fs::write(file, [7; 4096])).map_err(io)
    })?;
    rate("native: stat", count, || {
        files.iter().try_for_each(|file| std::fs::metadata(file).map(drop)).map_err(io)
    })?;
    rate("native: unlink", count, || files.iter().try_for_each(std::fs::remove_file).map_err(io))
}
