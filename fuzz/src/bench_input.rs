//! What `nvtier bench` is told: job files and command lines, in fio's grammar.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use bench::fuzzing;

use crate::digest;

pub fn job_file(input: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(input);
    // What the environment holds is not part of the input.
    if text.contains("${") {
        return digest(&fuzzing::job_file(&text.replace("${", "$ {")).is_ok());
    }
    let parsed = fuzzing::job_file(&text);
    if let Err(why) = &parsed {
        assert!(!why.is_empty());
    }
    for word in text.split(|c: char| c.is_whitespace() || c == '=').take(16) {
        let [binary, _, time, whole] = fuzzing::numbers(word);
        if let Some(whole) = whole {
            assert!(
                binary.is_none_or(|bytes| bytes == whole) && time.is_none_or(|time| time == whole),
                "{word}"
            );
        }
    }
    digest(&parsed)
}

/// Arguments are separated by NUL bytes. Job files are not read here.
pub fn arguments(input: &[u8]) -> u64 {
    let args: Vec<OsString> = input
        .split(|byte| *byte == 0)
        .map(|arg| if arg.starts_with(b"-") && arg.len() > 1 { arg.to_vec() } else { [b"--", arg].concat() })
        .map(OsString::from_vec)
        .collect();
    digest(&fuzzing::arguments(&args))
}
