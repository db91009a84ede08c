//! Runs one measured command: its answer, its time, its CPU time.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use wait4::Wait4;

use crate::{Result, machine};

/// One measured run.
#[derive(Clone, Copy, Debug)]
pub struct Measurement {
    /// What the row compares: MB/s, IOPS or operations per second.
    pub value: f64,
    /// Bytes moved, for CPU time per GB; 0 where it means nothing.
    pub bytes: f64,
    /// CPU seconds of the command, and of the daemon where there is one.
    pub cpu_s: f64,
}

/// What a row reads out of a fio-shaped report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Figure {
    /// 10^6 bytes per second.
    Bandwidth,
    /// Operations per second.
    Iops,
}

/// A command and its words, for running and for the record.
#[derive(Clone, Debug)]
pub struct CommandLine(pub Vec<String>);

impl CommandLine {
    /// From words.
    pub fn new<S: AsRef<str>>(words: &[S]) -> CommandLine {
        CommandLine(words.iter().map(|word| word.as_ref().to_owned()).collect())
    }

    /// As one would type it.
    pub fn text(&self) -> String {
        self.0.join(" ")
    }

    /// Runs it to its end: wall seconds, CPU seconds, standard output. A failure carries its standard error.
    pub fn run(&self, scratch: &Path) -> Result<(f64, f64, String)> {
        let fail = |what: &str, error: std::io::Error| format!("{}: {what}: {error}", self.text());
        let file = |name: &str| -> Result<File> {
            File::options()
                .create(true)
                .truncate(true)
                .read(true)
                .write(true)
                .open(scratch.join(name))
                .map_err(|error| fail("cannot open a scratch file", error))
        };
        let (mut out, mut err) = (file("stdout")?, file("stderr")?);
        let handle = |file: &File| {
            file.try_clone().map(Stdio::from).map_err(|error| fail("cannot share a file", error))
        };
        let begun = Instant::now();
        let mut child = Command::new(&self.0[0])
            .args(&self.0[1..])
            .stdin(Stdio::null())
            .stdout(handle(&out)?)
            .stderr(handle(&err)?)
            .spawn()
            .map_err(|error| fail("cannot start", error))?;
        let used = child.wait4().map_err(|error| fail("cannot wait", error))?;
        let wall = begun.elapsed().as_secs_f64();
        let mut text = String::new();
        let read = |file: &mut File, text: &mut String| -> Result<()> {
            file.seek(SeekFrom::Start(0))
                .and_then(|_| file.read_to_string(text))
                .map(drop)
                .map_err(|error| fail("cannot read its output", error))
        };
        if !used.status.success() {
            read(&mut err, &mut text)?;
            return Err(format!("{}: {}: {}", self.text(), used.status, text.trim()));
        }
        read(&mut out, &mut text)?;
        Ok((wall, (used.rusage.utime + used.rusage.stime).as_secs_f64(), text))
    }

    /// Runs a tool that reports in fio's JSON.
    pub fn measure(&self, scratch: &Path, figure: Figure, daemon: Option<u32>) -> Result<Measurement> {
        let before = daemon.map_or(0.0, machine::cpu_seconds);
        let (_, cpu_s, text) = self.run(scratch)?;
        let daemon_s = daemon.map_or(0.0, machine::cpu_seconds) - before;
        // fio prints notes before its JSON at times.
        let start = text.find('{').ok_or_else(|| format!("{}: no report: {}", self.text(), text.trim()))?;
        let report: Value = serde_json::from_str(&text[start..])
            .map_err(|error| format!("{}: bad report: {error}", self.text()))?;
        let sum = |key: &str| -> f64 {
            let jobs = report["jobs"].as_array().map(Vec::as_slice).unwrap_or_default();
            jobs.iter()
                .flat_map(|job| [&job["read"], &job["write"]])
                .map(|direction| direction[key].as_f64().unwrap_or(0.0))
                .sum()
        };
        let value = match figure {
            Figure::Bandwidth => sum("bw_bytes") / 1e6,
            Figure::Iops => sum("iops"),
        };
        if value <= 0.0 {
            return Err(format!("{}: it moved nothing", self.text()));
        }
        Ok(Measurement { value, bytes: sum("io_bytes"), cpu_s: cpu_s + daemon_s })
    }
}
