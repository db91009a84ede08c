//! Help texts, all from the option table.

use std::fmt::Write;

use crate::options::{self, OPTIONS, Spec, Value};
use crate::parse::COMMAND_OPTIONS;

/// `--help`.
pub fn usage() -> String {
    let mut text = String::from(
        "nvtier bench: measure drives, files, pools and mounts in fio's language\n\n\
         Usage: nvtier bench [options] [--name=JOB job-options]... [job file]...\n\n\
         Examples:\n\
         \x20 nvtier bench --name=seq --filename=/data/file --size=4g --rw=read --bs=1m --iodepth=32 --direct=1 --ioengine=io_uring\n\
         \x20 nvtier bench --name=load --profile=model-load --filename=model.safetensors\n\
         \x20 nvtier bench --name=pool --ioengine=pool --pool=/data/pool --filename=model.safetensors --bs=1m --iodepth=16\n\
         \x20 nvtier bench --output-format=json job.fio\n\nOptions of the command:\n",
    );
    for (name, help) in COMMAND_OPTIONS {
        let _ = writeln!(text, "  --{name:<26} {}", help.trim_start_matches('*'));
    }
    text.push_str("\nJob options (fio's names and meanings; --cmdhelp=NAME explains one):\n");
    for spec in OPTIONS {
        let _ = writeln!(text, "  --{:<26} {}{}", spec.name, spec.help, default_note(spec));
    }
    text.push_str("\nExit codes: 0 ok, 1 failed, 2 usage, 3 not found, 5 verification found bad data, 7 not supported here\n");
    text
}

/// `--cmdhelp` and `--cmdhelp=NAME`.
pub fn option_help(name: Option<&str>) -> Result<String, String> {
    let Some(name) = name.filter(|name| *name != "all") else {
        let line = |spec: &Spec| format!("{:<28}: {}\n", spec.name, spec.help);
        return Ok(OPTIONS.iter().map(line).collect());
    };
    let spec = options::find(name).ok_or_else(|| options::refusal(name))?;
    let mut text = format!("{:>20}: {}\n", spec.name, spec.help);
    for alias in spec.alias {
        let _ = writeln!(text, "{:>20}: {alias}", "alias");
    }
    let _ = writeln!(text, "{:>20}: {}", "type", kind(spec.value));
    let _ =
        writeln!(text, "{:>20}: {}", "default", if spec.default.is_empty() { "none" } else { spec.default });
    if let Value::Choice(words) = spec.value {
        for (index, (word, help)) in words.iter().enumerate() {
            let _ = writeln!(text, "{:>20}: {word:<12} {help}", if index == 0 { "valid values" } else { "" });
        }
    }
    Ok(text)
}

/// The options as a clap command: completions and man pages are made from it. Parsing follows fio and is in `parse.rs`.
pub fn clap_command() -> clap::Command {
    let mut command = clap::Command::new("bench")
        .about("Measure drives, files, pools and mounts in fio's language")
        .disable_help_flag(true)
        .disable_version_flag(true)
        .arg(clap::Arg::new("job-file").num_args(0..).help("fio job files").value_name("JOBFILE"));
    for (name, help) in COMMAND_OPTIONS {
        let flag = help.starts_with('*');
        let action = if flag { clap::ArgAction::SetTrue } else { clap::ArgAction::Append };
        command =
            command.arg(clap::Arg::new(*name).long(*name).help(help.trim_start_matches('*')).action(action));
    }
    for spec in OPTIONS {
        let mut arg =
            clap::Arg::new(spec.name).long(spec.name).help(spec.help).action(clap::ArgAction::Append);
        arg = match spec.value {
            Value::Bool => arg.num_args(0..=1).require_equals(true).default_missing_value("1"),
            Value::Choice(words) => arg.value_parser(words.iter().map(|(word, _)| *word).collect::<Vec<_>>()),
            _ => arg,
        };
        command = command.arg(arg.visible_aliases(spec.alias.iter().copied()));
    }
    command
}

fn default_note(spec: &Spec) -> String {
    if spec.default.is_empty() { String::new() } else { format!(" [{}]", spec.default) }
}

fn kind(value: Value) -> &'static str {
    match value {
        Value::Text => "text",
        Value::Int => "whole number",
        Value::Bytes => "amount of data, with optional k, m, g, t, p",
        Value::Time => "time, with optional d, h, m, s, ms, us",
        Value::Bool => "0 or 1 (the bare name means 1)",
        Value::Choice(_) => "one of the words below",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_names_every_option() {
        let text = usage();
        for spec in OPTIONS {
            assert!(text.contains(&format!("--{} ", spec.name)), "{}", spec.name);
            assert!(option_help(Some(spec.name)).unwrap().contains(spec.help));
        }
        assert!(option_help(Some("zonemode")).unwrap_err().contains("not supported"));
    }

    #[test]
    fn the_clap_command_is_sound() {
        clap_command().debug_assert();
    }
}
