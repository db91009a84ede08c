//! `nvtier man DIR`: one page for the command, one for each subcommand.

use std::fs;

use crate::cli::{Man, full_command};
use crate::failure::{Failure, Outcome};
use crate::output;

/// Writes the pages and prints their paths.
pub fn run(args: &Man) -> Outcome {
    fs::create_dir_all(&args.dir)
        .map_err(|error| Failure::io(format!("make the directory {}", args.dir.display()), &error))?;
    let command = full_command();
    let mut pages = vec![(String::from("nvtier"), command.clone())];
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        let name = format!("nvtier-{}", sub.get_name());
        pages.push((name.clone(), sub.clone().name(name)));
    }
    for (name, command) in pages {
        let path = args.dir.join(format!("{name}.1"));
        let tried = || format!("write {}", path.display());
        let mut page = Vec::new();
        let man = clap_mangen::Man::new(command).date(env!("CARGO_PKG_VERSION"));
        man.render(&mut page).map_err(|error| Failure::io(tried(), &error))?;
        fs::write(&path, page).map_err(|error| Failure::io(tried(), &error))?;
        output::line(&path.display().to_string())?;
    }
    Ok(())
}
