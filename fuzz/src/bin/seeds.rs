//! Writes the hand-made seeds of all targets into a folder, one folder a target: `seeds FOLDER`.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: seeds FOLDER");
        std::process::exit(2);
    };
    for target in nvtier_fuzz::TARGETS {
        let own = folder.join(target.name);
        fs::create_dir_all(&own)?;
        for (index, seed) in nvtier_fuzz::seeds::seeds(target.name).into_iter().enumerate() {
            fs::write(own.join(format!("seed-{index:02}")), seed)?;
        }
    }
    Ok(())
}
