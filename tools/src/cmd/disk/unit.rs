//! The systemd unit that mounts the pool, and systemd itself.

use std::path::Path;
use std::process::Command;

use crate::failure::{Failure, Outcome};

const TEMPLATE: &str = include_str!("../../../../dist/systemd/nvtier-pool.service.in");

/// Where units of the administrator lie (systemd.unit(5)).
pub const FOLDER: &str = "/etc/systemd/system";

/// The unit's text. `options`: of `nvtier mount`.
pub fn text(program: &Path, unit: &str, pool: &Path, mountpoint: &Path, options: &[&str]) -> Outcome<String> {
    let parent = mountpoint.parent().unwrap_or(Path::new("/"));
    let options: String = options.iter().map(|option| format!("{option} ")).collect();
    let values = [
        ("@NVTIER@", quoted(program)?),
        ("@OPTIONS@", options),
        ("@POOL@", quoted(pool)?),
        ("@PARENT@", quoted(parent)?),
        ("@MOUNTPOINT@", quoted(mountpoint)?),
        ("@MOUNTPOINT_TEXT@", mountpoint.to_string_lossy().replace('%', "%%")),
        ("@UNIT@", unit.to_owned()),
    ];
    let mut out = String::with_capacity(TEMPLATE.len() + 512);
    // One pass: a path that holds `@POOL@` stays what it is.
    let mut rest = TEMPLATE;
    while let Some(at) = rest.find('@') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        match values.iter().find(|(name, _)| from.starts_with(name)) {
            Some((name, value)) => {
                out.push_str(value);
                rest = &from[name.len()..];
            }
            None => {
                out.push('@');
                rest = &from[1..];
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// One word of a unit (systemd.service(5), "command lines"; systemd.syntax(7), "quoting"): `%` and `$` mean something there.
fn quoted(path: &Path) -> Outcome<String> {
    let text = path.to_str().filter(|text| !text.chars().any(char::is_control)).ok_or_else(|| {
        Failure::usage(format!("a systemd unit cannot name {}: it is not plain UTF-8 text", path.display()))
    })?;
    let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    let plain = text.chars().all(|c| c.is_alphanumeric() || "/-_.,:+%$@".contains(c));
    Ok(if plain { text } else { format!("\"{text}\"") })
}

/// Whether systemd runs this machine (sd_booted(3)) and looks into that folder; if not, why not.
pub fn reachable(unit: &Path) -> Result<(), String> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Err("systemd does not run here".into());
    }
    let folder = unit.parent().unwrap_or(Path::new("/"));
    let known = [FOLDER, "/run/systemd/system", "/usr/local/lib/systemd/system"];
    match known.iter().any(|known| folder == Path::new(known)) {
        true => Ok(()),
        false => Err(format!("systemd does not look into {}", folder.display())),
    }
}

/// Runs systemctl.
pub fn systemctl(args: &[&str]) -> Outcome {
    let tried = format!("systemctl {}", args.join(" "));
    let output =
        Command::new("systemctl").args(args).output().map_err(|error| Failure::io(&tried, &error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let unit = args.last().copied().unwrap_or_default();
    Err(Failure::failed(format!("{tried}: {} ({})", said.trim(), output.status))
        .hint(format!("`journalctl -u {unit}` may say more; then run the same command again")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_filled_in_and_quoted() {
        let mountpoint = Path::new("/mnt/a b/100%");
        let text = text(
            Path::new("/usr/bin/nvtier"),
            "u.service",
            Path::new("/p/@UNIT@"),
            mountpoint,
            &["--allow-other"],
        );
        let text = text.unwrap();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap().to_owned();
        assert_eq!(
            line("ExecStart="),
            "ExecStart=/usr/bin/nvtier mount --foreground --allow-other -- /p/@UNIT@ \"/mnt/a b/100%%\""
        );
        assert_eq!(line("ExecStop="), "ExecStop=/usr/bin/nvtier umount \"/mnt/a b/100%%\"");
        assert_eq!(line("RequiresMountsFor="), "RequiresMountsFor=/p/@UNIT@ \"/mnt/a b\"");
        assert_eq!(line("Description="), "Description=nvtier pool on /mnt/a b/100%%");
        assert_eq!(text.matches('@').count(), 4, "{text}"); // those of the pool, twice
        assert_eq!(quoted(Path::new("/a\"$\\")).unwrap(), "\"/a\\\"$$\\\\\"");
        assert!(quoted(Path::new("/a\nExecStart=/bin/sh")).is_err());
    }
}
