//! Small operations per second in a directory: stat, open and close, create and unlink.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Result;
use crate::process::Measurement;

/// Files in the directory.
const FILES: usize = 1000;
/// How long one measurement takes.
const LENGTH: Duration = Duration::from_secs(1);

/// An operation, made over and over on the `index`th file.
pub type Operation = fn(&Path, usize) -> std::io::Result<()>;

/// The operations, with their names.
pub const OPERATIONS: [(&str, Operation); 3] = [
    ("stat", |directory, index| fs::metadata(name(directory, index)).map(drop)),
    ("open and close", |directory, index| File::open(name(directory, index)).map(drop)),
    ("create and unlink", |directory, index| {
        let path = directory.join(format!("new-{index}"));
        File::create(&path)?;
        fs::remove_file(&path)
    }),
];

fn name(directory: &Path, index: usize) -> std::path::PathBuf {
    directory.join(format!("file-{index:04}"))
}

/// Makes the files.
pub fn prepare(directory: &Path) -> Result<()> {
    let fail = |error: std::io::Error| format!("cannot fill {}: {error}", directory.display());
    fs::create_dir_all(directory).map_err(fail)?;
    for index in 0..FILES {
        fs::write(name(directory, index), b"x").map_err(fail)?;
    }
    Ok(())
}

/// Operations per second.
pub fn measure(directory: &Path, operation: Operation) -> Result<Measurement> {
    let begun = Instant::now();
    let mut count = 0usize;
    while begun.elapsed() < LENGTH {
        for _ in 0..50 {
            operation(directory, count % FILES)
                .map_err(|error| format!("in {}: {error}", directory.display()))?;
            count += 1;
        }
    }
    Ok(Measurement { value: count as f64 / begun.elapsed().as_secs_f64(), bytes: 0.0, cpu_s: 0.0 })
}
