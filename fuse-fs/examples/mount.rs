//! Mounts a pool in the foreground; for development. The product's command is `nvtier mount`.
//!
//! `cargo run -p nvtier-fuse-fs --example mount -- POOL MOUNTPOINT [--format] [--verify-always] [--read-only] [--allow-other]
//! [--threads=N] [--ram=MIB]`

use std::path::PathBuf;

use engine::{FormatOptions, OpenOptions, Pool, Verify};
use fuse_fs::MountOptions;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (flags, paths): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let [pool, mountpoint] = paths.as_slice() else {
        return Err("usage: mount POOL MOUNTPOINT [flags]".into());
    };
    let has = |flag: &str| flags.iter().any(|given| given == flag);
    let number = |name: &str| {
        flags.iter().find_map(|given| given.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok())
    };
    let pool = PathBuf::from(pool);
    if has("--format") {
        let size = number("--size").map(|mib| mib << 20);
        Pool::format(&pool, &FormatOptions { size, raw: has("--raw"), ..FormatOptions::default() })?;
    }
    let verify = if has("--verify-always") { Verify::Always } else { Verify::Scrub };
    let read_only = has("--read-only");
    let ram_bytes = number("--ram").unwrap_or(256) << 20;
    let pool = Pool::open(&pool, &OpenOptions { read_only, ram_bytes, verify, ..OpenOptions::default() })?;
    let mounted = fuse_fs::mount(
        pool,
        &MountOptions {
            read_only,
            allow_other: has("--allow-other"),
            verify_always: has("--verify-always"),
            threads: number("--threads").map(|threads| threads as usize),
            ..MountOptions::new(mountpoint)
        },
    )?;
    println!("mounted at {} ({:?})", mounted.mountpoint().display(), mounted.passthrough());
    Ok(mounted.wait()?)
}
