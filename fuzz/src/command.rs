//! What the `nvtier` command is told: its command line, its configuration file, sizes.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use clap::Parser;

use crate::cli::Cli;
use crate::config::Config;
use crate::{digest, size};

/// Arguments are separated by NUL bytes.
pub fn arguments(input: &[u8]) -> u64 {
    let args = input.split(|byte| *byte == 0).map(|arg| OsString::from_vec(arg.to_vec()));
    let args = [OsString::from("nvtier")].into_iter().chain(args);
    match Cli::try_parse_from(args) {
        Ok(cli) => digest(&cli),
        Err(error) => digest(&(error.kind(), error.exit_code())),
    }
}

pub fn config(input: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(input);
    let parsed = Config::parse(&text, Path::new("config.toml"));
    if let Ok(config) = &parsed {
        assert!(config.import.connections.is_none_or(|n| (1..=64).contains(&n)));
        assert!(config.mount.threads.is_none_or(|n| (1..=256).contains(&n)));
    }
    let shown = match &parsed {
        Ok(config) => digest(config),
        Err(failure) => digest(failure),
    };
    for word in text.split_whitespace().take(8) {
        if let Ok(bytes) = size::parse(word) {
            assert_eq!(size::parse(&bytes.to_string()), Ok(bytes));
            assert_eq!(size::parse_nonzero(word).is_ok(), bytes != 0);
            assert!(!size::human(bytes).is_empty());
        }
    }
    shown
}
