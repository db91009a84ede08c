//! From command line and job files to jobs, in fio's grammar.
//!
//! Options after `--name=x` belong to job `x`; `--name=global` and `[global]` sections set defaults for what follows.
//! Arguments that are not options are job files.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::options::{self, Value};
use crate::settings::{EngineKind, Pattern, Profile, Settings};

/// When the `eta` line is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eta {
    /// On a terminal, with `normal` output.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Where the drive's ceiling comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CeilingSource {
    /// Measured on the job's file after the run.
    Measure,
    /// Not looked for.
    Off,
    /// Given in bytes per second.
    Given(u64),
}

/// One kind of report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// fio's text.
    Normal,
    /// fio's JSON; with bins when `plus`.
    Json {
        /// `json+`.
        plus: bool,
    },
    /// fio's semicolon-separated line, version 3.
    Terse,
}

/// Everything the command line asked for.
#[derive(Debug)]
pub struct Request {
    /// The jobs, in order.
    pub jobs: Vec<Settings>,
    /// `(name, value)` of the global section.
    pub global: Vec<(String, String)>,
    /// Reports wanted, in order.
    pub formats: Vec<Format>,
    /// File for the report; `None` = standard output.
    pub output: Option<PathBuf>,
    /// Progress line.
    pub eta: Eta,
    /// Drive's ceiling.
    pub ceiling: CeilingSource,
    /// Refuse jobs that write.
    pub read_only: bool,
    /// Stop after parsing.
    pub parse_only: bool,
}

/// What to do.
#[derive(Debug)]
pub enum Command {
    /// Run these jobs.
    Run(Box<Request>),
    /// Print this and end well.
    Print(String),
}

/// Options of the command itself, not of a job: `(name, help)`. All take a value unless the help starts with `*`.
pub const COMMAND_OPTIONS: &[(&str, &str)] = &[
    ("output", "write the report to this file"),
    ("output-format", "normal, json, json+, terse; several with ','"),
    ("minimal", "*the same as --output-format=terse"),
    ("terse-version", "accepted when 3"),
    ("eta", "progress line: auto, always or never"),
    ("ceiling", "drive's ceiling: auto (measured after the run), off, or bytes per second such as 3g"),
    ("section", "run only this section of the job files (may be repeated)"),
    ("readonly", "*refuse jobs that write"),
    ("parse-only", "*stop after parsing"),
    ("cmdhelp", "*list the options, or explain one: --cmdhelp=bs"),
    ("enghelp", "*list the engines"),
    ("version", "*print the version"),
    ("help", "*print this help"),
];

/// Parses everything after `nvtier bench`. The error is a message for the user (exit code 2).
pub fn parse(args: &[OsString]) -> Result<Command, String> {
    let mut parser = Parser::default();
    let mut at = 0;
    while at < args.len() {
        let text = args[at].to_str().ok_or_else(|| format!("argument {:?} is not UTF-8", args[at]))?;
        at += 1;
        let Some(option) = text.strip_prefix("--").or_else(|| (text == "-h").then_some("help")) else {
            if text.starts_with('-') && text.len() > 1 {
                return Err(format!("unknown option '{text}': options are written --name=value"));
            }
            parser.files.push(PathBuf::from(text));
            continue;
        };
        let (name, mut value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        if value.is_none() && takes_separate_value(name) {
            value = args.get(at).and_then(|next| next.to_str()).filter(|next| !next.starts_with("--"));
            at += usize::from(value.is_some());
        }
        if let Some(done) = parser.option(name, value)? {
            return Ok(done);
        }
    }
    parser.finish()
}

/// Parses the text of a job file alone, as `nvtier bench FILE` does after reading it.
pub(crate) fn job_file_text(text: &str) -> Result<Command, String> {
    let mut parser = Parser::default();
    parser.job_text(text, Path::new("job"))?;
    parser.finish()
}

/// As with getopt in fio: a bare `--direct` means 1 and takes nothing from the next argument.
fn takes_separate_value(name: &str) -> bool {
    match options::find(name) {
        Some(spec) => spec.value != Value::Bool,
        None => COMMAND_OPTIONS.iter().any(|(known, help)| *known == name && !help.starts_with('*')),
    }
}

struct Parser {
    request: Request,
    defaults: Settings,
    current: Option<Settings>,
    sections: Vec<String>,
    files: Vec<PathBuf>,
    in_global: bool,
}

impl Default for Parser {
    fn default() -> Parser {
        Parser {
            request: Request {
                jobs: Vec::new(),
                global: Vec::new(),
                formats: vec![Format::Normal],
                output: None,
                eta: Eta::Auto,
                ceiling: CeilingSource::Measure,
                read_only: false,
                parse_only: false,
            },
            defaults: Settings::default(),
            current: None,
            sections: Vec::new(),
            files: Vec::new(),
            in_global: false,
        }
    }
}

impl Parser {
    fn option(&mut self, name: &str, value: Option<&str>) -> Result<Option<Command>, String> {
        let need = |what: &str| value.ok_or_else(|| format!("--{name} needs a value: {what}"));
        match name {
            "help" => return Ok(Some(Command::Print(crate::help::usage()))),
            "version" => return Ok(Some(Command::Print(format!("nvtier bench {}\n", crate::VERSION)))),
            "cmdhelp" => return crate::help::option_help(value).map(|text| Some(Command::Print(text))),
            "enghelp" => {
                return crate::help::option_help(Some("ioengine")).map(|text| Some(Command::Print(text)));
            }
            "output" => self.request.output = Some(PathBuf::from(need("a file")?)),
            "output-format" => self.request.formats = formats(need("normal, json, json+ or terse")?)?,
            "minimal" => self.request.formats = vec![Format::Terse],
            "terse-version" if need("3")? == "3" => {}
            "terse-version" => return Err("--terse-version: only 3 is supported".into()),
            "eta" => {
                self.request.eta = match need("auto, always or never")? {
                    "auto" => Eta::Auto,
                    "always" => Eta::Always,
                    "never" => Eta::Never,
                    other => return Err(format!("--eta={other}: not one of auto, always, never")),
                }
            }
            "ceiling" => {
                self.request.ceiling = match need("auto, off, or bytes per second")? {
                    "auto" => CeilingSource::Measure,
                    "off" => CeilingSource::Off,
                    given => CeilingSource::Given(
                        crate::units::parse_bytes(given.strip_suffix("/s").unwrap_or(given), 1024)
                            .map_err(|why| format!("--ceiling={given}: {why}, or auto, or off"))?,
                    ),
                }
            }
            "section" => self.sections.push(need("a section's name")?.to_owned()),
            "readonly" => self.request.read_only = true,
            "parse-only" => self.request.parse_only = true,
            "name" => {
                let value = need("a name for the job")?;
                self.end_section();
                self.begin_section(value);
            }
            _ => {
                if self.current.is_none() {
                    // As in fio: options before any --name make a job of their own.
                    self.begin_section("nvtier");
                }
                let settings = self.current.as_mut().expect("just begun");
                options::apply(settings, name, value)?;
            }
        }
        Ok(None)
    }

    fn begin_section(&mut self, name: &str) {
        self.in_global = name == "global";
        let mut settings = self.defaults.clone();
        if !self.in_global {
            settings.name = name.to_owned();
            settings.given.clear();
            settings.given.push(("name".into(), name.to_owned()));
        }
        self.current = Some(settings);
    }

    fn end_section(&mut self) {
        let Some(settings) = self.current.take() else { return };
        if self.in_global {
            self.request.global = settings.given.clone();
            self.defaults = settings;
        } else {
            self.request.jobs.push(settings);
        }
    }

    fn job_file(&mut self, path: &Path) -> Result<(), String> {
        let text = if path.as_os_str() == "-" {
            std::io::read_to_string(std::io::stdin())
        } else {
            std::fs::read_to_string(path)
        }
        .map_err(|error| format!("cannot read job file {}: {error}", path.display()))?;
        self.job_text(&text, path)
    }

    /// Parses the text of a job file; `path` is for messages.
    fn job_text(&mut self, text: &str, path: &Path) -> Result<(), String> {
        let mut skipped = false;
        let before = self.request.jobs.len();
        for (index, line) in text.lines().enumerate() {
            let fail = |why: String| format!("{}:{}: {why}", path.display(), index + 1);
            let line = strip_comment(line);
            if line.is_empty() {
                continue;
            }
            if let Some(rest) = line.strip_prefix('[') {
                let name = rest.strip_suffix(']').ok_or_else(|| fail("section without ']'".into()))?;
                if name.is_empty() {
                    return Err(fail("section without a name".into()));
                }
                self.end_section();
                skipped =
                    name != "global" && !self.sections.is_empty() && !self.sections.iter().any(|s| s == name);
                if !skipped {
                    self.begin_section(name);
                }
                continue;
            }
            if skipped {
                continue;
            }
            let Some(settings) = self.current.as_mut() else {
                return Err(fail(format!("'{line}' stands before any [section]")));
            };
            let (name, value) = match line.split_once('=') {
                Some((name, value)) => (name.trim(), Some(expand(value.trim()).map_err(fail)?)),
                None => (line, None),
            };
            if name == "name" {
                return Err(fail("a job's name is its [section]".into()));
            }
            options::apply(settings, name, value.as_deref()).map_err(fail)?;
        }
        self.end_section();
        if self.request.jobs.len() == before {
            return Err(format!("{}: no job to run in it", path.display()));
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Command, String> {
        self.end_section();
        for file in std::mem::take(&mut self.files) {
            self.job_file(&file)?;
        }
        if self.request.jobs.is_empty() {
            return Err(
                "no job: give --name=NAME --rw=read --filename=FILE ..., or a job file (see --help)".into()
            );
        }
        for job in &mut self.request.jobs {
            check(job, self.request.read_only).map_err(|why| format!("job '{}': {why}", job.name))?;
        }
        Ok(Command::Run(Box::new(self.request)))
    }
}

/// Rules that need more than one option to be seen.
fn check(job: &mut Settings, read_only: bool) -> Result<(), String> {
    if let Some(profile) = job.profile {
        crate::profile::adjust(job, profile)?;
    }
    if job.engine.has_device() {
        check_device(job)?;
    } else if job.was_given("device") {
        let name = job.engine.name();
        return Err(format!("device= means nothing to ioengine={name}: use bounce, cufile or vram-write"));
    }
    if read_only && job.pattern.write {
        return Err("it writes, and --readonly was given".into());
    }
    if job.time_based && job.runtime_us == 0 {
        return Err("time_based needs a runtime".into());
    }
    if job.direct && job.engine == EngineKind::Mmap {
        return Err("direct=1 means nothing to ioengine=mmap: leave it out".into());
    }
    if job.engine == EngineKind::Pool && job.pool.is_none() {
        job.pool = std::env::var_os("NVTIER_POOL").map(PathBuf::from);
        if job.pool.is_none() {
            return Err("ioengine=pool needs --pool=POOL (or NVTIER_POOL)".into());
        }
    }
    if job.engine != EngineKind::Pool && job.was_given("pool") {
        return Err(format!("pool= means nothing to ioengine={}: use ioengine=pool", job.engine.name()));
    }
    let block = job.max_block_bytes();
    if job.direct && [0, 1].iter().any(|&d| !job.block_bytes[d].is_multiple_of(512)) {
        return Err("direct=1 needs a block size that is a multiple of 512".into());
    }
    if job.verify.is_some() && job.profile.is_some() {
        return Err("verify does not go with a profile".into());
    }
    if job.verify.is_some()
        && job.pattern.read
        && job.pattern.write
        && job.block_bytes[0] != job.block_bytes[1]
    {
        return Err("verify needs the same block size for reads and writes".into());
    }
    if let Some(crate::settings::Amount::Bytes(size)) = job.size
        && size < block
        && job.profile != Some(Profile::ModelLoad)
    {
        return Err(format!("size={size} is smaller than one block of {block} bytes"));
    }
    if job.batch_complete_min > job.iodepth {
        return Err("iodepth_batch_complete_min is larger than iodepth: it would wait for ever".into());
    }
    Ok(())
}

/// Engines whose other end is a device.
fn check_device(job: &mut Settings) -> Result<(), String> {
    let name = job.engine.name();
    if job.engine == EngineKind::VramWrite && !job.was_given("rw") {
        job.pattern = Pattern { read: false, write: true, random: false };
    }
    match job.engine {
        EngineKind::Bounce if job.pattern.write => {
            return Err("ioengine=bounce only reads: for the way back use ioengine=vram-write".into());
        }
        EngineKind::VramWrite if job.pattern.read => {
            return Err("ioengine=vram-write only writes: for the way there use ioengine=bounce".into());
        }
        EngineKind::CuFile if !job.direct && (job.was_given("direct") || job.was_given("buffered")) => {
            return Err("ioengine=cufile is past the page cache always: leave direct and buffered out".into());
        }
        _ => {}
    }
    if job.verify.is_some() {
        return Err(format!(
            "verify looks at host memory, ioengine={name} moves a device's: `nvtier load --check` compares what is there"
        ));
    }
    if !job.was_given("direct") && !job.was_given("buffered") {
        job.direct = true;
    }
    // What is written is on the device.
    job.scramble_buffers = false;
    Ok(())
}

fn formats(list: &str) -> Result<Vec<Format>, String> {
    list.split(',')
        .map(|word| match word.trim() {
            "normal" => Ok(Format::Normal),
            "json" => Ok(Format::Json { plus: false }),
            "json+" => Ok(Format::Json { plus: true }),
            "terse" | "minimal" => Ok(Format::Terse),
            other => Err(format!("--output-format={other}: not one of normal, json, json+, terse")),
        })
        .collect()
}

fn strip_comment(line: &str) -> &str {
    let line = line.trim();
    if line.starts_with(['#', ';']) {
        return "";
    }
    // Inline comments need a space before them, so that values may contain the characters.
    [" #", " ;", "\t#", "\t;"]
        .iter()
        .filter_map(|mark| line.find(mark))
        .min()
        .map_or(line, |end| line[..end].trim_end())
}

/// Replaces `${NAME}` by the environment's value, as fio does.
fn expand(value: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = value;
    while let Some(start) = rest.find("${") {
        let end = rest[start..].find('}').ok_or_else(|| format!("'{value}': '${{' without '}}'"))? + start;
        let name = &rest[start + 2..end];
        out.push_str(&rest[..start]);
        out.push_str(&std::env::var(name).map_err(|_| format!("environment variable {name} is not set"))?);
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Request, String> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        match parse(&args)? {
            Command::Run(request) => Ok(*request),
            Command::Print(text) => Err(format!("printed: {text}")),
        }
    }

    fn file(text: &str) -> Result<Request, String> {
        let mut parser = Parser::default();
        parser.job_text(text, Path::new("t.fio"))?;
        match parser.finish()? {
            Command::Run(request) => Ok(*request),
            Command::Print(_) => unreachable!(),
        }
    }

    #[test]
    fn options_belong_to_the_job_before_them() {
        let request =
            run(&["--name=a", "--bs=8k", "--direct", "--name", "b", "--iodepth", "4", "--rw=write"]).unwrap();
        let [a, b] = &request.jobs[..] else { panic!("{:?}", request.jobs) };
        assert_eq!((a.name.as_str(), a.block_bytes[0], a.direct), ("a", 8192, true));
        assert_eq!((b.name.as_str(), b.iodepth, b.pattern.write, b.direct), ("b", 4, true, false));
    }

    #[test]
    fn global_sets_defaults_for_what_follows() {
        let text = "; two jobs\n[global]\nbs=1m # big\ndirect=1\n\n[one]\nrw=read\n[two]\nstonewall\nbs=4k\n";
        let request = file(text).unwrap();
        assert_eq!(request.global, [("bs".to_owned(), "1m".to_owned()), ("direct".into(), "1".into())]);
        assert_eq!(request.jobs[0].block_bytes, [1 << 20; 2]);
        assert_eq!(request.jobs[1].block_bytes, [4096; 2]);
        assert!(request.jobs[1].direct && request.jobs[1].stonewall && !request.jobs[0].stonewall);
        assert_eq!(
            request.jobs[0].given,
            [("name".to_owned(), "one".to_owned()), ("rw".into(), "read".into())]
        );
    }

    #[test]
    fn job_file_errors_carry_the_line() {
        for (text, part) in [
            ("[a]\nrw=read\nbogus=3\n", "t.fio:3: unknown option 'bogus'"),
            ("[a]\nzonemode=zbd\n", "t.fio:2: fio option 'zonemode' is not supported"),
            ("[a]\nrw=blah\n", "t.fio:2: rw=blah: 'blah' is not one of read"),
            ("[a\n", "t.fio:1: section without ']'"),
            ("rw=read\n", "t.fio:1: 'rw=read' stands before any [section]"),
            ("[global]\nbs=4k\n", "no job to run"),
            ("[a]\nfilename=${NVTIER_NO_SUCH_VARIABLE}\n", "NVTIER_NO_SUCH_VARIABLE is not set"),
            ("[a]\nbs\n", "t.fio:2: option 'bs' needs a value"),
        ] {
            let error = file(text).unwrap_err();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }

    #[test]
    fn command_line_refusals() {
        for (args, part) in [
            (&["--name=a", "--bogus=1"][..], "unknown option 'bogus'"),
            (&["--name=a", "--sqthread_poll"], "fio option 'sqthread_poll' is not supported"),
            (&["--name=a", "--output-format=xml"], "normal, json, json+, terse"),
            (&["--name=a", "--time_based"], "needs a runtime"),
            (&["--name=a", "--rw=write", "--readonly"], "--readonly"),
            (&["--name=a", "--ioengine=mmap", "--direct=1"], "mmap"),
            (&["--name=a", "--size=1k"], "smaller than one block"),
            (&["--name=a", "--device=cpu"], "device= means nothing to ioengine=pread"),
            (&["--name=a", "--ioengine=bounce", "--rw=write"], "use ioengine=vram-write"),
            (&["--name=a", "--ioengine=vram-write", "--rw=randrw"], "use ioengine=bounce"),
            (&["--name=a", "--ioengine=vram-write", "--readonly"], "--readonly"),
            (&["--name=a", "--ioengine=cufile", "--direct=0"], "leave direct"),
            (&["--name=a", "--ioengine=bounce", "--verify=crc32c"], "nvtier load --check"),
            (&["-x"], "--name=value"),
            (&[], "no job"),
        ] {
            let error = run(args).unwrap_err();
            assert!(error.contains(part), "{args:?}: {error}");
        }
    }

    #[test]
    fn a_job_without_name_is_one_job() {
        let request = run(&["--ioengine=null", "--size=1m", "--output-format=json,normal"]).unwrap();
        assert_eq!(request.jobs.len(), 1);
        assert_eq!(request.jobs[0].engine, EngineKind::Null);
        assert_eq!(request.formats, [Format::Json { plus: false }, Format::Normal]);
    }
}
