//! `nvtier demo`: the whole path once, on a pool and a checkpoint of its own, and how near each part of it runs to the
//! drive's limit. Needs no privileges: what they would add (the mount) is left out, and said.

mod check;
mod checkpoint;
mod measure;
mod report;
mod workspace;

use std::path::Path;
use std::time::{Duration, Instant};

use engine::{FormatOptions, Pool};

use crate::cli::{Demo, Global, ProgressMode};
use crate::failure::{Failure, Outcome, code};
use crate::source::{ObjectOptions, Source};
use crate::store::Store;
use crate::transfer::{self, ImportOptions};
use crate::{ceiling, interrupt, output, size};

pub use measure::drop_below;
use measure::{Row, Runs};
use report::Report;
pub use workspace::Workspace;

/// Name of the checkpoint in the pool.
const NAME: &str = "models/demo";
/// Runs of each measurement; the median is shown.
const ROUNDS: usize = 3;
/// No further round is started after this time: on a slow or busy drive one run has to do.
const ROUNDS_BUDGET: Duration = Duration::from_secs(15);

/// Runs the demo. Whatever happens, what it made is unmounted and removed, unless `--keep` says otherwise.
pub fn run(global: &Global, args: &Demo) -> Outcome {
    let start = Instant::now();
    let mut workspace = Workspace::create(args.dir.as_deref(), args.keep, args.size)?;
    let outcome = show(global, args, &mut workspace);
    let cleaned = workspace.close();
    if let (Err(_), Err(failure)) = (&outcome, &cleaned) {
        output::note(&format!("nvtier: the clean-up failed, too: {failure}"));
    }
    let mut report = outcome?;
    cleaned?;
    report.seconds = start.elapsed().as_secs_f64();
    report.print(global)
}

fn say(global: &Global, text: &str) {
    if !global.json && global.progress != ProgressMode::None {
        output::note(text);
    }
}

fn show(global: &Global, args: &Demo, workspace: &mut Workspace) -> Outcome<Report> {
    say(global, &format!("working in {}", workspace.path().display()));
    if workspace.is_memory() {
        say(
            global,
            "  this is memory, not a drive: the figures show what the code costs, not what a drive gives",
        );
    }
    let source = workspace.path().join("checkpoint");
    let pool = workspace.path().join("pool");
    let made = checkpoint::write(&source, args.size, args.seed)?;
    say(
        global,
        &format!(
            "made a Llama checkpoint: {} layers, {} bf16 tensors in {} shards, {} (seed {})",
            made.layers,
            made.tensors,
            made.shards.len(),
            size::human(made.tensor_bytes),
            args.seed
        ),
    );
    Pool::format(&pool, &FormatOptions::default())
        .map_err(|error| Failure::from(error).while_doing(format!("format {}", pool.display())))?;
    let imported = import(global, &source, &pool)?;
    say(global, &format!("formatted a pool and imported it as {NAME} at {}", size::rate(imported)));

    let mut runs = Runs::new(&made.shards, &pool);
    rounds(|| {
        runs.drive()?;
        runs.pool(NAME)
    })?;
    let mounted = mount(args, workspace, &pool)?;
    let mut checked = None;
    match &mounted {
        Ok(mountpoint) => {
            say(global, &format!("mounted it on {}", mountpoint.display()));
            let compared = check::compare(mountpoint, NAME, &made.shards)?;
            say(
                global,
                &format!(
                    "opened {} tensors through the mount, as safetensors slices and as .npy files: {}, all equal",
                    compared.tensors,
                    size::human(compared.bytes)
                ),
            );
            checked = Some(compared);
            rounds(|| runs.mount(mountpoint, NAME))?;
            workspace.unmount()?;
        }
        Err(reason) => say(global, &format!("not mounted: {reason}")),
    }
    interrupt::check()?;
    let rows = runs.rows();
    let drive = runs.median(Row::Drive).unwrap_or(0.0);
    ceiling::remember(workspace.path(), drive);
    Ok(Report {
        directory: workspace.path().to_owned(),
        kept: args.keep,
        memory: workspace.is_memory(),
        checkpoint_bytes: made.tensor_bytes,
        tensors: made.tensors,
        seed: args.seed,
        import_bytes_per_second: imported,
        ceiling_bytes_per_second: drive,
        mount_refused: mounted.err(),
        checked,
        rows,
        seconds: 0.0,
    })
}

/// Runs a set of measurements [`ROUNDS`] times, or fewer where they take long.
fn rounds(mut measure: impl FnMut() -> Outcome) -> Outcome {
    let start = Instant::now();
    for round in 0..ROUNDS {
        if round > 0 && start.elapsed() > ROUNDS_BUDGET {
            break;
        }
        measure()?;
    }
    Ok(())
}

/// Imports the checkpoint and returns the rate.
fn import(global: &Global, source: &Path, pool: &Path) -> Outcome<f64> {
    let options = ObjectOptions { connections: 1, part_size: 1 << 20 };
    let source = Source::parse(&format!("file://{}", source.display()), &options)?;
    let listing = source.list(false)?;
    transfer::check(&source, &listing)?;
    let store = Store::open(pool, false)?;
    let options = ImportOptions { replace: false, check: true, resume: false };
    let quiet = crate::cli::Global { progress: ProgressMode::None, ..global.clone() };
    let imported = transfer::import(&quiet, &store, &source, &listing, NAME, &options)?;
    store.close()?;
    Ok(imported.rate())
}

/// Mounts, or says why this machine or user cannot: that is no failure of the demo.
fn mount(args: &Demo, workspace: &mut Workspace, pool: &Path) -> Outcome<Result<std::path::PathBuf, String>> {
    if args.no_mount {
        return Ok(Err("--no-mount was given".to_owned()));
    }
    match workspace.mount(pool) {
        Ok(mountpoint) => Ok(Ok(mountpoint)),
        Err(failure) if failure.code == code::UNSUPPORTED || failure.kind == "PermissionDenied" => {
            Ok(Err(failure.message))
        }
        Err(failure) => Err(failure),
    }
}
