//! `nvtier report`: one JSON document with what somebody who is to help has to know, and nothing that is nobody's business.

mod redact;

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use doctor::{System, examine};
use serde_json::{Map, Value, json};

use crate::cli::{Global, Report};
use crate::config::Config;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::runtime::{self, MountRecord};
use crate::store::Store;
use redact::Redactor;

/// Environment variables that are reported; no other is.
const VARIABLES: &[&str] = &[
    "NVTIER_POOL",
    "NVTIER_CONFIG",
    "NVTIER_LOG",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "XDG_CONFIG_HOME",
    "XDG_RUNTIME_DIR",
    "XDG_STATE_HOME",
    "TMPDIR",
    "LANG",
    "CUDA_VISIBLE_DEVICES",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "HTTPS_PROXY",
    "container",
];

/// Bytes of each log, from its end.
const LOG_BYTES: u64 = 64 << 10;
/// Lines of the kernel's messages, the last ones.
const KERNEL_LINES: usize = 400;
/// What the kernel's messages are searched for.
const KERNEL_WORDS: &[&str] =
    &["nvme", "fuse", "io_uring", "blk_update", "i/o error", "nvidia", "dmar", "iommu", "out of memory"];

/// Gathers and writes it. What cannot be had is said in its place; only the file itself can fail.
pub fn run(global: &Global, args: &Report) -> Outcome {
    let made =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let config = Config::load();
    let pools = pools(args, config.as_ref().ok());
    let mut redactor = Redactor::here();
    let mut seen = Vec::new();
    let mut names = Vec::new();
    for path in &pools {
        let (value, listed) = pool(path, args.names);
        seen.push(value);
        names.extend(listed);
    }
    if !args.names {
        redactor.hide_names(names);
    }
    let path = pools.first().cloned().unwrap_or_else(|| PathBuf::from("."));
    let mut report = json!({
        "report": 1,
        "made": format!("{} UTC", crate::time::utc(made.cast_signed())),
        "names_included": args.names,
        "version": super::version::facts(),
        "doctor": examine(&System::here(), &path),
        "ceilings": ceilings(&path),
        "pools": seen,
        "mounts": MountRecord::all().iter().map(mount).collect::<Vec<_>>(),
        "configuration": configuration(config.err()),
        "environment": environment(),
        "limits": fs::read_to_string("/proc/self/limits").map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).unwrap_or_default(),
    });
    redactor.value(&mut report);
    report["logs"] = logs(&redactor);
    report["kernel"] = match kernel() {
        Ok(lines) => lines.iter().map(|line| Value::from(redactor.log(line))).collect(),
        Err(error) => unavailable(format!("/dev/kmsg: {error}; root may read it")),
    };
    let text =
        serde_json::to_string_pretty(&report).map_err(|error| Failure::failed(error.to_string()))? + "\n";
    if args.output.as_deref() == Some(Path::new("-")) {
        return output::line(text.trim_end());
    }
    let file = args.output.clone().unwrap_or_else(|| PathBuf::from(format!("nvtier-report-{made}.json")));
    write(&file, &text)?;
    if global.json {
        return output::json(&json!({ "file": file, "bytes": text.len(), "names_included": args.names }));
    }
    output::line(&format!(
        "{} ({}): text that you can read before you send it; secrets, user names{} were taken out",
        file.display(),
        crate::size::human(text.len() as u64),
        if args.names { "" } else { " and names of files" }
    ))
}

/// A new file that only its user can read.
fn write(path: &Path, text: &str) -> Outcome {
    let tried = || format!("write the report {}", path.display());
    let opened = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path);
    let mut file = opened.map_err(|error| {
        let failure = Failure::io(tried(), &error);
        if error.kind() == ErrorKind::AlreadyExists {
            failure.hint("remove it, or name another file with -o")
        } else {
            failure
        }
    })?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|error| {
        let _ = fs::remove_file(path);
        Failure::io(tried(), &error)
    })
}

fn unavailable(why: impl Into<String>) -> Value {
    json!({ "unavailable": why.into() })
}

/// The pool that was named, and those that are mounted.
fn pools(args: &Report, config: Option<&Config>) -> Vec<PathBuf> {
    let given = args.pool.pool.clone().or_else(|| config.and_then(|config| config.pool.clone()));
    let mut pools: Vec<PathBuf> = given.into_iter().collect();
    for record in MountRecord::all().into_iter().filter(MountRecord::is_running) {
        if !pools.contains(&record.pool) {
            pools.push(record.pool);
        }
    }
    pools
}

/// What a pool is, and the names in it, to be shown or to be looked for in logs.
fn pool(path: &Path, show_names: bool) -> (Value, Vec<String>) {
    let store = match Store::open(path, true) {
        Ok(store) => store,
        Err(failure) => {
            let info = engine::Pool::probe(path).ok();
            return (json!({ "path": path, "info": info, "unavailable": failure.message }), Vec::new());
        }
    };
    let mut value = json!({
        "path": path,
        "info": store.info().map_or_else(|failure| unavailable(failure.message), |info| json!(info)),
        "stat": store.stat().map_or_else(|failure| unavailable(failure.message), |stat| json!(stat)),
        "owner_pid": store.other_owner(),
    });
    let mut names = Vec::new();
    match store.list("", true) {
        Ok(entries) => {
            if show_names {
                value["entries"] = json!(entries);
            }
            for entry in entries {
                names.push(entry.name().to_owned());
                names.push(entry.path);
            }
        }
        Err(failure) => value["names"] = unavailable(failure.message),
    }
    (value, names)
}

fn mount(record: &MountRecord) -> Value {
    let mut value = json!(record);
    value["running"] = record.is_running().into();
    value
}

fn ceilings(path: &Path) -> Value {
    let found = doctor::ceilings::Store::of_user().get(path);
    found
        .map_or_else(|| unavailable("`nvtier doctor --measure` was not run here"), |ceilings| json!(ceilings))
}

/// The file's text: its comments may say why something is as it is.
fn configuration(failure: Option<Failure>) -> Value {
    let Some(path) = crate::config::path() else { return unavailable("there is no home directory") };
    let text = match fs::read_to_string(&path) {
        Ok(text) => json!(text.lines().collect::<Vec<_>>()),
        Err(error) => unavailable(error.to_string()),
    };
    json!({ "file": path, "text": text, "error": failure.map(|failure| failure.message) })
}

fn environment() -> Value {
    let set = VARIABLES.iter().filter_map(|name| {
        let value = std::env::var_os(name)?;
        Some(((*name).to_owned(), Value::from(value.to_string_lossy().into_owned())))
    });
    Value::Object(set.collect::<Map<_, _>>())
}

/// The last part of each log of this user's daemons.
fn logs(redactor: &Redactor) -> Value {
    let directory = match runtime::directory() {
        Ok(directory) => directory,
        Err(failure) => return unavailable(redactor.text(&failure.message)),
    };
    let mut found = Map::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let name = redactor.text(&entry.file_name().to_string_lossy());
            let lines = match tail(&path) {
                Ok(text) => text.lines().map(|line| Value::from(redactor.log(line))).collect(),
                Err(error) => unavailable(error.to_string()),
            };
            found.insert(name, lines);
        }
    }
    Value::Object(found)
}

/// The end of a file, from the start of a line.
fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let start = len.saturating_sub(LOG_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(match start {
        0 => text.into_owned(),
        _ => text.split_once('\n').map_or(String::new(), |(_, rest)| rest.to_owned()),
    })
}

/// The kernel's messages that are about us (Documentation/ABI/testing/dev-kmsg): one record a read.
fn kernel() -> std::io::Result<Vec<String>> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open("/dev/kmsg")?;
    let mut lines = Vec::new();
    let mut record = [0; 8192];
    loop {
        match file.read(&mut record) {
            Ok(0) => break,
            Ok(len) => lines.extend(of_interest(&String::from_utf8_lossy(&record[..len]))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // The oldest were overwritten meanwhile: the next read goes on behind them.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(lines.split_off(lines.len().saturating_sub(KERNEL_LINES)))
}

/// `prio,seq,microseconds,flags;message`, and lines of key=value that start with a blank.
fn of_interest(record: &str) -> Option<String> {
    let (head, rest) = record.split_once(';')?;
    let message = rest.lines().next()?;
    let lower = message.to_lowercase();
    KERNEL_WORDS.iter().any(|word| lower.contains(word)).then(|| {
        let micros: u64 = head.split(',').nth(2).and_then(|text| text.parse().ok()).unwrap_or(0);
        format!("[{:>5}.{:06}] {message}", micros / 1_000_000, micros % 1_000_000)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_records_are_read() {
        let record = "6,339,5140900,-;nvme nvme0: pci function 0000:01:00.0\n SUBSYSTEM=pci\n";
        assert_eq!(
            of_interest(record).as_deref(),
            Some("[    5.140900] nvme nvme0: pci function 0000:01:00.0")
        );
        assert_eq!(of_interest("6,340,1,-;audit: something else\n"), None);
        assert_eq!(of_interest("nonsense"), None);
    }

    #[test]
    fn a_long_log_starts_with_a_whole_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "0123456789\n".repeat(10_000)).unwrap();
        let text = tail(file.path()).unwrap();
        assert!(text.len() < LOG_BYTES as usize && text.len() > LOG_BYTES as usize - 12, "{}", text.len());
        assert!(text.lines().all(|line| line == "0123456789"));
        fs::write(file.path(), "short").unwrap();
        assert_eq!(tail(file.path()).unwrap(), "short");
    }
}
