//! `cargo xtask bindgen`: makes `bindings/nvme-sys/src/generated.rs` anew, or checks that it is what the generator makes.
//!
//! Everything it needs comes at run time: the headers out of Debian packages (unpacked, not installed), libclang from
//! the registry of Python packages or from this machine. Nothing of it is needed to build nvtier.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec::{on_path, step};
use crate::{paths, pyenv};

const LIMIT: Duration = Duration::from_secs(15 * 60);
const LIBCLANG: &str = "libclang==18.1.1";
const LIBCLANG_FOLDER: &str = "libclang-18.1.1";
/// Hold `nvme/types.h`, and `linux/nvme_ioctl.h` with what it includes.
const HEADER_PACKAGES: [&str; 2] = ["libnvme-dev", "linux-libc-dev"];
/// The second line of the generated file starts so; the versions of the headers follow.
const VERSIONS: &str = "// Headers: ";

/// Arguments of `cargo xtask bindgen`.
#[derive(clap::Args)]
pub struct Args {
    /// Change nothing; fail if the committed file differs from what would be generated.
    #[arg(long)]
    pub check: bool,
}

/// `Ok(false)`: the committed file has drifted.
pub fn run(args: &Args) -> Result<bool> {
    let target = paths::target();
    fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    let log = target.join("bindgen.log");
    let inputs = Headers::fetch(&log).and_then(|headers| Ok((headers, libclang(&log)?)));
    let (headers, libclang) = match inputs {
        Ok(inputs) => inputs,
        Err(error) if args.check => {
            println!("bindgen: skipped: {error:#}");
            return Ok(true);
        }
        Err(error) => return Err(error),
    };
    let committed = paths::workspace().join("bindings/nvme-sys/src/generated.rs");
    let old = fs::read_to_string(&committed).unwrap_or_default();
    let versions = format!("{VERSIONS}{}", headers.versions);
    if args.check {
        let made_from = old.lines().find(|line| line.starts_with(VERSIONS)).unwrap_or_default();
        if !made_from.is_empty() && made_from != versions {
            // Another release of the headers may well differ, and that is no drift of ours.
            println!(
                "bindgen: skipped: this machine has {}, the committed file was made from {}",
                headers.versions,
                made_from.trim_start_matches(VERSIONS)
            );
            return Ok(true);
        }
    }
    let fresh = target.join("nvme-sys-generated.rs");
    generate(&headers, libclang.as_deref(), &fresh, &log)?;
    let text = fs::read_to_string(&fresh).with_context(|| format!("cannot read {}", fresh.display()))?;
    let (first, rest) = text.split_once('\n').context("the generator wrote nothing")?;
    let text = format!("{first}\n{versions}\n{rest}");
    if text == old {
        println!("bindgen: ok, {} is what {} give", committed.display(), headers.versions);
        return Ok(true);
    }
    if args.check {
        println!(
            "bindgen: FAILED, {} differs from what {} give, first at line {}: run `cargo xtask bindgen` and commit",
            committed.display(),
            headers.versions,
            first_difference(&old, &text)
        );
        return Ok(false);
    }
    fs::write(&committed, text).with_context(|| format!("cannot write {}", committed.display()))?;
    println!("bindgen: wrote {} from {}", committed.display(), headers.versions);
    Ok(true)
}

fn first_difference(old: &str, new: &str) -> usize {
    1 + old.lines().zip(new.lines()).take_while(|(a, b)| a == b).count()
}

/// Unpacked header packages.
struct Headers {
    root: PathBuf,
    /// "libnvme-dev 1.3, linux-libc-dev 6.1".
    versions: String,
}

impl Headers {
    fn fetch(log: &Path) -> Result<Headers> {
        if !on_path("apt-get") || !on_path("dpkg") {
            bail!("the headers come from Debian packages, and there is no apt-get and dpkg here");
        }
        let cache = paths::cache()?;
        let _lock = pyenv::lock(&cache.join("nvme-headers.lock"))?;
        let folder = cache.join("nvme-headers");
        let root = folder.join("root");
        if !folder.join(".ready").exists() {
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
            let mut download = Command::new("apt-get");
            download.args(["download", "-q"]).args(HEADER_PACKAGES).current_dir(&folder);
            step(download, log, LIMIT).context("apt-get download of the headers")?;
            for package in packages(&folder)? {
                let mut unpack = Command::new("dpkg");
                unpack.arg("-x").args([&package, &root]);
                step(unpack, log, LIMIT).context("dpkg -x of the headers")?;
            }
            fs::write(folder.join(".ready"), "")?;
        }
        let mut versions = Vec::new();
        for wanted in HEADER_PACKAGES {
            let found = packages(&folder)?.into_iter().find_map(|path| version_of(&path, wanted));
            versions
                .push(format!("{wanted} {}", found.with_context(|| format!("{wanted} was not downloaded"))?));
        }
        Ok(Headers { root, versions: versions.join(", ") })
    }

    fn include(&self) -> PathBuf {
        self.root.join("usr/include")
    }
}

fn packages(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("deb")) {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

/// Major and minor version in `name_1.3-1+deb12u1_amd64.deb`: later parts are repairs, which change no layout.
fn version_of(package: &Path, name: &str) -> Option<String> {
    let file = package.file_name()?.to_str()?;
    let version = file.strip_prefix(name)?.strip_prefix('_')?.split('_').next()?;
    let upstream = version.split('-').next()?;
    Some(upstream.split('.').take(2).collect::<Vec<_>>().join("."))
}

/// The folder libclang lies in; None: the generator finds it where distributions put it.
fn libclang(log: &Path) -> Result<Option<PathBuf>> {
    if std::env::var_os("LIBCLANG_PATH").is_some() {
        return Ok(None);
    }
    let cache = paths::cache()?;
    let folder = cache.join(LIBCLANG_FOLDER);
    let native = folder.join("clang/native");
    let _lock = pyenv::lock(&cache.join("libclang.lock"))?;
    if !native.join("libclang.so").exists() {
        let _ = fs::remove_dir_all(&folder);
        let mut install = Command::new("python3");
        install
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target"])
            .args([folder.as_os_str(), OsStr::new(LIBCLANG)]);
        if let Err(error) = step(install, log, LIMIT) {
            if has_system_libclang() {
                return Ok(None);
            }
            return Err(
                error.context(format!("libclang is not on this machine, and {LIBCLANG} cannot be had"))
            );
        }
    }
    Ok(Some(native))
}

fn has_system_libclang() -> bool {
    let llvm = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path().join("lib"));
    let places =
        llvm.chain(["/usr/lib64".into(), "/usr/lib/x86_64-linux-gnu".into(), "/usr/local/lib".into()]);
    places.filter_map(|place| fs::read_dir(place).ok()).flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        (name.starts_with("libclang.so") || name.starts_with("libclang-")) && !name.contains("cpp")
    })
}

fn generate(headers: &Headers, libclang: Option<&Path>, output: &Path, log: &Path) -> Result<()> {
    let generator = paths::workspace().join("bindings/nvme-sys/generate");
    let include = headers.include();
    // asm/types.h lies in the folder of the package's architecture; the structures are the same on all 64-bit ones.
    let arch =
        fs::read_dir(&include)?.flatten().map(|entry| entry.path()).find(|path| path.join("asm").is_dir());
    let mut command = Command::new("cargo");
    command
        .args(["run", "--quiet", "--locked", "--manifest-path"])
        .arg(generator.join("Cargo.toml"))
        .arg("--")
        .arg(output)
        .args(["--target=x86_64-unknown-linux-gnu", "-nostdinc"]);
    for folder in [Some(generator.join("include")), Some(include), arch].into_iter().flatten() {
        command.arg(format!("-I{}", folder.display()));
    }
    if let Some(libclang) = libclang {
        command.env("LIBCLANG_PATH", libclang);
    }
    step(command, log, LIMIT).context("generate the bindings")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_a_package_is_its_upstream_release() {
        let version = |file: &str, name: &str| version_of(Path::new(file), name);
        assert_eq!(version("/x/libnvme-dev_1.3-1+deb12u1_amd64.deb", "libnvme-dev").as_deref(), Some("1.3"));
        assert_eq!(version("linux-libc-dev_6.1.192-2_amd64.deb", "linux-libc-dev").as_deref(), Some("6.1"));
        assert_eq!(version("libnvme-dev_1.3-1_amd64.deb", "linux-libc-dev"), None);
    }

    #[test]
    fn a_difference_is_named_by_its_line() {
        assert_eq!(first_difference("a\nb\nc", "a\nx\nc"), 2);
        assert_eq!(first_difference("a", "a\nb"), 2);
    }
}
