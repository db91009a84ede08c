//! The systemd unit that mounts the pool, and systemd itself.

use std::path::Path;
use std::process::Command;

use crate::failure::{Failure, Outcome};

const TEMPLATE: &str = include_str!("../../../../dist/systemd/nvtier-pool.service.in");

/// Where units of the administrator lie (systemd.unit(5)).
pub const FOLDER: &str = "/etc/systemd/system";

const MOUNT_TEMPLATE: &str = include_str!("../../../../dist/systemd/nvtier-file-system.mount.in");

/// The text of the pool's unit. `options`: of `nvtier mount`. `below`: mount points of file systems that the pool lies on.
pub fn text(
    program: &Path,
    unit: &str,
    pool: &Path,
    mountpoint: &Path,
    options: &[&str],
    below: &[&Path],
) -> Outcome<String> {
    let parent = mountpoint.parent().unwrap_or(Path::new("/"));
    let below = below.iter().map(|path| Ok(format!(" {}", quoted(path)?))).collect::<Outcome<String>>()?;
    let options: String = options.iter().map(|option| format!("{option} ")).collect();
    let values = [
        ("@NVTIER@", quoted(program)?),
        ("@OPTIONS@", options),
        ("@POOL@", quoted(pool)?),
        ("@PARENT@", quoted(parent)?),
        ("@BELOW@", below),
        ("@MOUNTPOINT@", quoted(mountpoint)?),
        ("@MOUNTPOINT_TEXT@", mountpoint.to_string_lossy().replace('%', "%%")),
        ("@UNIT@", unit.to_owned()),
    ];
    Ok(filled(TEMPLATE, &values))
}

/// The text of the unit that mounts a file system.
pub fn mount_text(name: &str, uuid: &str, mountpoint: &Path) -> Outcome<String> {
    let path = mountpoint.to_str().filter(|text| !text.chars().any(char::is_control)).ok_or_else(|| {
        Failure::usage(format!(
            "a systemd unit cannot name {}: it is not plain UTF-8 text",
            mountpoint.display()
        ))
    })?;
    // `Where=` is one path to the end of the line, not words (systemd.mount(5)).
    let values =
        [("@NAME@", name.to_owned()), ("@UUID@", uuid.to_owned()), ("@MOUNTPOINT@", path.replace('%', "%%"))];
    Ok(filled(MOUNT_TEMPLATE, &values))
}

/// A path as the name of its mount unit has it (systemd.unit(5), "string escaping for inclusion in unit names").
pub fn escaped(path: &Path) -> Outcome<String> {
    let text = path.to_str().ok_or_else(|| {
        Failure::usage(format!("a systemd unit cannot be named after {}: it is not UTF-8", path.display()))
    })?;
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty()).collect();
    let mut out = String::new();
    for (index, byte) in parts.join("/").bytes().enumerate() {
        match byte {
            b'/' => out.push('-'),
            b'.' if index == 0 => out.push_str("\\x2e"),
            b if b.is_ascii_alphanumeric() || b":_.".contains(&b) => out.push(char::from(b)),
            b => out.push_str(&format!("\\x{b:02x}")),
        }
    }
    Ok(if out.is_empty() { "-".to_owned() } else { out })
}

/// A template with its words filled in. One pass: a path that holds `@POOL@` stays what it is.
fn filled(template: &str, values: &[(&str, String)]) -> String {
    let mut out = String::with_capacity(template.len() + 512);
    let mut rest = template;
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
    out
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
            &[Path::new("/f/0"), Path::new("/f/1 2")],
        );
        let text = text.unwrap();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap().to_owned();
        assert_eq!(
            line("ExecStart="),
            "ExecStart=/usr/bin/nvtier mount --foreground --allow-other -- /p/@UNIT@ \"/mnt/a b/100%%\""
        );
        assert_eq!(line("ExecStop="), "ExecStop=-/usr/bin/nvtier umount \"/mnt/a b/100%%\"");
        assert_eq!(line("RequiresMountsFor="), "RequiresMountsFor=/p/@UNIT@ \"/mnt/a b\" /f/0 \"/f/1 2\"");
        assert_eq!(line("Description="), "Description=nvtier pool on /mnt/a b/100%%");
        assert_eq!(text.matches('@').count(), 4, "{text}"); // those of the pool, twice
        assert_eq!(quoted(Path::new("/a\"$\\")).unwrap(), "\"/a\\\"$$\\\\\"");
        assert!(quoted(Path::new("/a\nExecStart=/bin/sh")).is_err());
    }

    #[test]
    fn mount_units_are_named_after_their_paths() {
        // As `systemd-escape --path` has them.
        for (path, name) in [
            ("/var/lib/nvtier/a-b.fs/0", "var-lib-nvtier-a\\x2db.fs-0"),
            ("/mnt/a b/", "mnt-a\\x20b"),
            ("/.hidden/x", "\\x2ehidden-x"),
            ("//a//b", "a-b"),
            ("/", "-"),
        ] {
            assert_eq!(escaped(Path::new(path)).unwrap(), name, "{path}");
        }
        let text = mount_text("n", "some-uuid", Path::new("/m/1 %")).unwrap();
        assert!(text.contains("\nWhat=/dev/disk/by-uuid/some-uuid\nWhere=/m/1 %%\nType=xfs\n"), "{text}");
        assert!(!text.contains('@'), "{text}");
    }
}
