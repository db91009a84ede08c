//! `cargo xtask docs`: pages that are made from data.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::paths;

/// Page, and the example that prints it.
const PAGES: [(&str, &str); 2] = [("docs/sizing.md", "sizing"), ("docs/tables.md", "tables")];

/// Arguments of `cargo xtask docs`.
#[derive(clap::Args)]
pub struct Args {
    /// Change nothing; fail if a committed page differs from what would be made.
    #[arg(long)]
    pub check: bool,
}

/// `Ok(false)`: a committed page has drifted.
pub fn run(args: &Args) -> Result<bool> {
    let mut fine = true;
    for (page, example) in PAGES {
        // Of the whole workspace, with the features that the tests have too: nothing is built twice.
        let built = Command::new("cargo")
            .args(["build", "--quiet", "--workspace", "--example", example])
            .current_dir(paths::workspace())
            .status()
            .with_context(|| format!("run cargo for {page}"))?;
        if !built.success() {
            bail!("{page}: the program that makes it cannot be built");
        }
        let program = paths::target().join("debug/examples").join(example);
        let made = Command::new(&program)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("run {}", program.display()))?;
        if !made.status.success() {
            bail!("{page}: the program that makes it ended with {}", made.status);
        }
        let text = String::from_utf8(made.stdout).with_context(|| format!("{page}: it is not UTF-8"))?;
        let path = paths::workspace().join(page);
        if fs::read_to_string(&path).is_ok_and(|committed| committed == text) {
            println!("{page}: ok");
        } else if args.check {
            println!("{page}: FAILED, it is not what its data gives: run `cargo xtask docs`");
            fine = false;
        } else {
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            println!("{page}: written");
        }
    }
    Ok(fine)
}
