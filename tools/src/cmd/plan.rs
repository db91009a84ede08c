//! `nvtier plan MODEL`: what a model needs of a machine, where each part will live, how fast it can be, and what would help.

use std::path::Path;
use std::process::ExitCode;

use doctor::ceilings::{Ceilings, Store};
use plan::buy::duration;
use plan::machine::{CLASSES, EFFICIENCY};
use plan::model::{from_path, known, known_names};
use plan::precision::{CACHES, PRECISIONS, cache, precision};
use plan::{Drive, Figure, Gpu, Machine, Model, Origin, Plan, Request, Task, make};

use crate::cli::{self, Global, PlanTask};
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Align, Table};
use crate::size;

/// Copies in host memory where nothing was measured, bytes a second.
const MEMORY_COPY: f64 = 20e9;

/// Makes a plan and prints it. The exit code says whether it fits.
pub fn run(global: &Global, args: &cli::Plan) -> Outcome<ExitCode> {
    if args.list {
        list(global)?;
        return Ok(ExitCode::SUCCESS);
    }
    let model = model(args.model.as_deref().unwrap_or_default())?;
    let request = request(args, &model)?;
    let measured = Store::of_user().get(&args.path);
    let (machine, notes) = machine(args, measured.as_ref())?;
    let mut plan = make(&model, &request, &machine).map_err(Failure::usage)?;
    plan.notes.extend(notes);
    if global.json {
        output::json(&plan)?;
    } else {
        output::line(&text(&plan))?;
    }
    Ok(if plan.fits { ExitCode::SUCCESS } else { ExitCode::from(code::NO_SPACE) })
}

/// A path wins over a name of the table.
fn model(name: &str) -> Outcome<Model> {
    let tried = || format!("plan for `{}`", output::printable(name));
    match from_path(Path::new(name)) {
        Ok(Some(model)) => Ok(model),
        Err(why) => Err(Failure::usage(format!("{}: {}", tried(), output::printable(&why)))),
        Ok(None) => known(name).ok_or_else(|| {
            Failure::not_found(format!("{}: there is no such path, and no such model in the table", tried()))
                .hint("`nvtier plan --list` lists the models that are known by name; any other needs its config.json")
        }),
    }
}

fn request(args: &cli::Plan, model: &Model) -> Outcome<Request> {
    let unknown = |what: &str, name: &str, known: Vec<&str>| {
        Failure::usage(format!("`{name}` is no {what} that is known"))
            .hint(format!("known are {}", known.join(", ")))
    };
    let names = || PRECISIONS.iter().map(|precision| precision.name).collect::<Vec<_>>();
    let precision = match &args.precision {
        Some(name) => Some(precision(name).ok_or_else(|| unknown("precision", name, names()))?),
        // Files say how they are stored; a configuration names it; bfloat16 where nothing does.
        None if model.stored.is_some() => None,
        None => precision(model.precision.as_deref().unwrap_or("bf16")),
    };
    let cache = cache(&args.kv_precision).ok_or_else(|| {
        unknown(
            "precision of keys and values",
            &args.kv_precision,
            CACHES.iter().map(|(name, _)| *name).collect(),
        )
    })?;
    Ok(Request {
        task: match args.task {
            PlanTask::Infer => Task::Infer,
            PlanTask::Finetune => Task::Finetune,
            PlanTask::Lora => Task::Lora,
        },
        precision,
        cache,
        latent: !args.expanded_kv,
        context: args.context,
        batch: args.batch,
        sessions: args.sessions.unwrap_or(args.batch),
        micro_batches: args.micro_batches,
        lora_rank: args.lora_rank,
        generations: args.generations,
        hours_per_day: args.hours_per_day,
        tokens_per_day: args.tokens_per_day,
    })
}

/// The machine that is asked about, and what is to be said about how it is known.
fn machine(args: &cli::Plan, measured: Option<&Ceilings>) -> Outcome<(Machine, Vec<String>)> {
    let mut notes = Vec::new();
    let mut gpu = match args.gpu.as_deref() {
        Some("none") => None,
        Some(name) => {
            let row = doctor::gpu(name).ok_or_else(|| {
                Failure::usage(format!("`{}` is no GPU of the table", output::printable(name))).hint(
                    "`nvtier plan --list` lists them; --vram and --tflops with the nearest one describe any other",
                )
            })?;
            Some(Gpu::of_row(&row))
        }
        None => here(measured),
    };
    if let Some(gpu) = &mut gpu {
        gpu.memory_bytes = args.vram.unwrap_or(gpu.memory_bytes);
        if let Some(rate) = args.tflops {
            gpu.flops = Some(Figure::new(rate * 1e12, Origin::Given));
        }
    } else if args.vram.is_some() || args.tflops.is_some() {
        return Err(Failure::usage("--vram and --tflops are about a GPU, and there is none")
            .hint("name one with --gpu"));
    }
    let ram_bytes = match args.ram {
        Some(bytes) => bytes,
        None => memory().ok_or_else(|| {
            Failure::failed("read /proc/meminfo").hint("say how much memory there is with --ram")
        })?,
    };
    // Without a GPU the end of a load is memory that was not used before.
    let copies = |found: &Ceilings| match (found.memory_copy, found.memory_fresh) {
        (Some(copy), Some(fresh)) if gpu.is_none() => Some(copy.min(fresh)),
        (copy, _) => copy,
    };
    let ram_copy = match measured.and_then(copies) {
        Some(rate) if args.ram.is_none() => Figure::new(rate, Origin::Measured),
        _ => Figure::new(MEMORY_COPY, Origin::Nominal),
    };
    let mut drives = args.drives.iter().map(|text| drive(text)).collect::<Outcome<Vec<_>>>()?;
    if drives.is_empty() {
        let (own, note) = own_drive(&args.path, measured)?;
        drives.push(own);
        notes.extend(note);
    }
    if let Some(bytes) = args.tbw {
        for drive in &mut drives {
            drive.rated_bytes = Figure::new(bytes as f64, Origin::Given);
        }
    }
    Ok((Machine { gpu, ram_bytes, ram_copy, drives }, notes))
}

/// This machine's first GPU.
fn here(measured: Option<&Ceilings>) -> Option<Gpu> {
    let info = gpudirect::driver::open("cuda:0").and_then(|driver| driver.info()).ok()?;
    let row = doctor::gpu(&info.name);
    let link = Figure::new(25e9, Origin::Nominal);
    let mut gpu = match &row {
        Some(row) => Gpu::of_row(row),
        None => {
            Gpu { name: String::new(), memory_bytes: 0, bandwidth: None, flops: None, htod: link, dtoh: link }
        }
    };
    gpu.name.clone_from(&info.name);
    gpu.memory_bytes = info.memory_bytes;
    if let Some(device) =
        measured.and_then(|measured| measured.device.as_ref()).filter(|device| device.name == info.name)
    {
        gpu.htod = Figure::new(device.htod, Origin::Measured);
        gpu.dtoh = Figure::new(device.dtoh, Origin::Measured);
    }
    Some(gpu)
}

fn memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The drive below a path: what is free on it, and its rates.
fn own_drive(path: &Path, measured: Option<&Ceilings>) -> Outcome<(Drive, Option<String>)> {
    let mut existing = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    while !existing.exists() && existing.pop() {}
    let stat = rustix::fs::statvfs(&existing).map_err(|error| {
        Failure::io(format!("look at the file system of {}", path.display()), &error.into())
    })?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let whole = stat.f_blocks.saturating_mul(stat.f_frsize);
    let (_, read, write) = CLASSES[1];
    let rate = |found: Option<f64>, nominal: f64| match found {
        Some(rate) => Figure::new(rate, Origin::Measured),
        None => Figure::new(nominal, Origin::Nominal),
    };
    // What is loaded comes through the engine, which compares every checksum: that binds before the drive does on machines with few cores.
    let slower = |found: &Ceilings| match (found.drive_read, found.pool_read) {
        (Some(drive), Some(pool)) => Some(drive.min(pool)),
        (drive, _) => drive,
    };
    let (found_read, found_write) = measured.map_or((None, None), |found| (slower(found), found.drive_write));
    let note = (found_read.is_none() || found_write.is_none()).then(|| {
        format!("the drive below {} was not measured: `nvtier doctor --measure` does that", path.display())
    });
    let drive = Drive {
        name: format!("what is free below {}", path.display()),
        capacity_bytes: free,
        read: rate(found_read, read),
        write: rate(found_write, write),
        rated_bytes: Drive::usual_rating(whole),
    };
    Ok((drive, note))
}

/// `gen4:2TB`, `7GB/5GB:2TB`.
fn drive(text: &str) -> Outcome<Drive> {
    let wrong = |why: String| {
        Failure::usage(format!("--drive `{}`: {why}", output::printable(text)))
            .hint("write a class and a size, gen4:2TB, or rates and a size, 6500MB/4GB:1TB")
    };
    let (class, capacity) = text.rsplit_once(':').ok_or_else(|| wrong("there is no size".into()))?;
    let capacity_bytes = size::parse_nonzero(capacity).map_err(wrong)?;
    if let Some(drive) = Drive::of_class(class, capacity_bytes) {
        return Ok(drive);
    }
    let Some((read, write)) = class.split_once('/') else {
        return Err(wrong(format!("`{class}` is neither gen3, gen4 or gen5 nor two rates")));
    };
    let rate = |text: &str| size::parse_rate(text).map(|rate| Figure::new(rate as f64, Origin::Given));
    Ok(Drive {
        name: "given drive".into(),
        capacity_bytes,
        read: rate(read).map_err(wrong)?,
        write: rate(write).map_err(wrong)?,
        rated_bytes: Drive::usual_rating(capacity_bytes),
    })
}

fn list(global: &Global) -> Outcome {
    let models: Vec<Model> = known_names().iter().filter_map(|name| known(name)).collect();
    if global.json {
        let models: Vec<_> = models
            .iter()
            .map(|model| serde_json::json!({ "name": model.name, "parameters": model.parameters() }))
            .collect();
        let gpus: Vec<_> = doctor::gpus().iter().map(|row| row.name).collect();
        let precisions: Vec<_> = PRECISIONS.iter().map(|one| one.name).collect();
        return output::json(
            &serde_json::json!({ "models": models, "gpus": gpus, "precisions": precisions }),
        );
    }
    let mut table = Table::new(&[("model", Align::Left), ("parameters", Align::Right)]);
    for model in &models {
        table.row(vec![model.name.clone(), model.parameters().to_string()]);
    }
    let mut gpus = Table::new(&[("gpu", Align::Left), ("memory", Align::Right), ("bandwidth", Align::Right)]);
    for row in doctor::gpus() {
        gpus.row(vec![row.name.into(), giga(row.memory_bytes as f64), size::rate(row.bandwidth as f64)]);
    }
    let mut precisions = Table::new(&[("precision", Align::Left), ("what it is", Align::Left)]);
    for one in PRECISIONS {
        precisions.row(vec![one.name.into(), one.what.into()]);
    }
    output::line(&format!("{}\n\n{}\n\n{}", table.render(), gpus.render(), precisions.render()))
}

/// Powers of 1000, as memory and drives are sold.
fn giga(bytes: f64) -> String {
    match bytes {
        b if b >= 1e12 => format!("{:.2} TB", b / 1e12),
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b:.0} B"),
    }
}

fn origin(figure: Figure) -> &'static str {
    match figure.origin {
        Origin::Measured => "measured",
        Origin::Given => "given",
        Origin::Table => "table",
        Origin::Nominal => "nominal",
    }
}

fn text(plan: &Plan) -> String {
    let mut lines = vec![about_model(plan)];
    lines.extend(about_machine(plan));
    lines.push(String::new());
    let needs = &plan.needs;
    lines.push(format!(
        "needs       VRAM {} ({} at least), RAM {}, NVMe {}",
        giga(needs.vram_bytes as f64),
        giga(needs.vram_least_bytes as f64),
        giga(needs.ram_bytes as f64),
        giga(needs.nvme_bytes as f64)
    ));
    lines.push(match (plan.fits, plan.short_vram_bytes, plan.short_nvme_bytes) {
        (true, ..) => "fits        yes".into(),
        (false, 0, short) => format!("fits        NO: {} too little on the drives", giga(short as f64)),
        (false, short, 0) => format!("fits        NO: {} too little in the GPU's memory", giga(short as f64)),
        (false, vram, nvme) => format!(
            "fits        NO: {} too little in the GPU's memory, {} on the drives",
            giga(vram as f64),
            giga(nvme as f64)
        ),
    });
    lines.push(String::new());
    lines.push(parts(plan));
    lines.push(String::new());
    lines.extend(times(plan));
    lines.extend(limits(plan));
    if !plan.buy.is_empty() {
        lines.push("\nwhat would help, the most first".into());
        for (index, offer) in plan.buy.iter().enumerate() {
            lines.push(format!("  {}. {}: {}", index + 1, offer.what, offer.effect));
        }
    }
    if !plan.notes.is_empty() {
        lines.push(String::new());
        lines.extend(plan.notes.iter().map(|note| format!("note        {}", output::printable(note))));
    }
    lines.join("\n")
}

fn about_model(plan: &Plan) -> String {
    let model = &plan.model;
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
    let kv = &model["kv"];
    let exactness = match model["exactness"].as_str() {
        Some("exact") => "",
        Some("files") => ", counted from the files' headers",
        _ => ", ESTIMATED as if built like Llama",
    };
    let active = if number(&model["experts_parameters"]) > 0 {
        format!(", {:.2} x 10^9 for a token", number(&model["active_parameters"]) as f64 / 1e9)
    } else {
        String::new()
    };
    let window = match kv["window"].as_u64() {
        Some(window) => {
            format!("; {} of {} layers keep {window} tokens", kv["layers_with_window"], model["layers"])
        }
        None => String::new(),
    };
    let latent = if kv["latent"].as_bool() == Some(true) {
        format!(" as latent vectors ({} expanded)", giga(number(&kv["bytes_per_token_expanded"]) as f64))
    } else {
        String::new()
    };
    format!(
        "model       {} ({}): {} parameters{active}{exactness}\n\
         weights     {} in {}\n\
         KV cache    {} a token{latent}, {} for {} tokens in {}{window}",
        output::printable(model["name"].as_str().unwrap_or("")),
        output::printable(model["architecture"].as_str().unwrap_or("")),
        number(&model["parameters"]),
        giga(number(&model["weights_bytes"]) as f64),
        match plan.request["precision"].as_str() {
            Some("stored") | None => model["stored"]["dtypes"].as_array().map_or("files".into(), |types| {
                types.iter().filter_map(|kind| kind.as_str()).collect::<Vec<_>>().join(", ")
            }),
            Some(name) => name.to_owned(),
        },
        giga(number(&kv["bytes_per_token"]) as f64),
        giga(number(&kv["bytes_per_session"]) as f64),
        plan.request["context"],
        plan.request["kv_precision"].as_str().unwrap_or("")
    )
}

fn about_machine(plan: &Plan) -> Vec<String> {
    let machine = &plan.machine;
    let mut lines = Vec::new();
    match &machine.gpu {
        Some(gpu) => {
            let known = |figure: Option<Figure>, text: &dyn Fn(f64) -> String| match figure {
                Some(figure) => format!("{} ({})", text(figure.value), origin(figure)),
                None => "not known".into(),
            };
            let peak = match gpu.flops.map(|figure| figure.origin) {
                Some(Origin::Table) => format!(", {:.0} % of its peak", 100.0 * EFFICIENCY),
                _ => String::new(),
            };
            lines.push(format!(
                "GPU         {}: {}, {}, {} for products{peak}; PCIe {} ({})",
                output::printable(&gpu.name),
                giga(gpu.memory_bytes as f64),
                known(gpu.bandwidth, &size::rate),
                known(gpu.flops, &|rate| format!("{:.0} TFLOPS", rate / 1e12)),
                size::rate(gpu.htod.value),
                origin(gpu.htod)
            ));
        }
        None => lines.push("GPU         none".into()),
    }
    lines.push(format!("RAM         {}", giga(machine.ram_bytes as f64)));
    for drive in &machine.drives {
        lines.push(format!(
            "drive       {}: {}, reads {} ({}), writes {} ({})",
            output::printable(&drive.name),
            giga(drive.capacity_bytes as f64),
            size::rate(drive.read.value),
            origin(drive.read),
            size::rate(drive.write.value),
            origin(drive.write)
        ));
    }
    lines
}

fn parts(plan: &Plan) -> String {
    let mut table = Table::new(&[
        ("part", Align::Left),
        ("bytes", Align::Right),
        ("VRAM", Align::Right),
        ("RAM", Align::Right),
        ("NVMe", Align::Right),
    ]);
    let cell = |bytes: u64| if bytes == 0 { "-".into() } else { giga(bytes as f64) };
    for part in &plan.parts {
        let row = [part.bytes, part.vram, part.ram, part.nvme].map(cell);
        table.row(std::iter::once(part.name.clone()).chain(row).collect());
    }
    table.render()
}

fn times(plan: &Plan) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(speed) = &plan.infer {
        if let Some(load) = &speed.load {
            lines.push(format!("load        {} at best, bound by {}", duration(load.seconds), load.bound));
        }
        let first = &speed.first_token;
        if let (Some(compute), Some(load), Some(both)) = (&first.compute, &first.load, first.both_seconds) {
            lines.push(format!(
                "first token of {} tokens: computed {} ({}), loaded {} ({}), both {} ({} tokens computed)",
                plan.request["context"],
                duration(compute.seconds),
                compute.bound,
                duration(load.seconds),
                load.bound,
                duration(both),
                first.both_computed_tokens
            ));
        } else if let Some(load) = &first.load {
            lines.push(format!(
                "restore     the keys and values of {} tokens in {} at best, bound by {}",
                plan.request["context"],
                duration(load.seconds),
                load.bound
            ));
        }
        if let (Some(step), Some(rate)) = (&speed.step, speed.tokens_per_second) {
            lines.push(format!(
                "tokens      {rate:.1} a second at most ({} a step), bound by {}",
                duration(step.seconds),
                step.bound
            ));
        }
    }
    if let Some(step) = &plan.train {
        if let (Some(time), Some(rate)) = (&step.time, step.tokens_per_second) {
            let terms: Vec<String> =
                time.terms.iter().map(|term| format!("{} {}", term.what, duration(term.seconds))).collect();
            lines.push(format!(
                "step        {} at best for {} tokens ({rate:.0} a second), bound by {}",
                duration(time.seconds),
                step.tokens,
                time.bound
            ));
            lines.push(format!("            {}", terms.join(", ")));
        }
        if let Some(tokens) = step.compute_bound_from_tokens.filter(|tokens| *tokens > step.tokens) {
            lines.push(format!("            computing binds from about {tokens} tokens a step on"));
        }
        lines.push(format!(
            "drives      {} read and {} written a step",
            giga(step.read_bytes as f64),
            giga(step.write_bytes as f64)
        ));
    }
    let wear = &plan.wear;
    if wear.bytes_per_day > 0.0 {
        let years = wear.years.map_or("-".into(), |years| match years {
            y if y >= 1000.0 => "more than 1000 years".to_owned(),
            y if y >= 1.0 => format!("{y:.1} years"),
            y => format!("{:.0} days", y * 365.25),
        });
        let steps = wear.steps.map_or(String::new(), |steps| format!(", {steps:.0} steps"));
        lines.push(format!(
            "wear        {} a day; the drives' {} ({}) last {years}{steps}",
            giga(wear.bytes_per_day),
            giga(wear.rated_bytes),
            plan.machine.drives.first().map_or("", |drive| origin(drive.rated_bytes))
        ));
    }
    lines
}

fn limits(plan: &Plan) -> Vec<String> {
    let limits = &plan.limits;
    let mut lines = Vec::new();
    if let (Some(resident), Some(anywhere)) = (limits.context_resident, limits.context_anywhere) {
        lines.push(format!(
            "context     up to {resident} tokens in the GPU's memory, {anywhere} with RAM and drives"
        ));
    }
    lines.push(format!(
        "largest     {:.1} x 10^9 parameters as stored here; of the table: {}",
        limits.parameters as f64 / 1e9,
        limits.largest_known.as_deref().unwrap_or("none")
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_as_they_are_written() {
        let found = drive("gen4:2TB").unwrap();
        assert_eq!((found.capacity_bytes, found.read.value), (2_000_000_000_000, 7e9));
        let found = drive("6500MB/4GB/s:1TiB").unwrap();
        assert_eq!((found.capacity_bytes, found.read.value, found.write.value), (1 << 40, 6.5e9, 4e9));
        for (text, word) in [
            ("gen4", "no size"),
            ("gen9:2TB", "gen9"),
            ("gen4:2XB", "XB"),
            ("0/1GB:1TB", "0"),
            (":1TB", "neither"),
        ] {
            let failure = drive(text).unwrap_err();
            assert_eq!(failure.code, code::USAGE);
            assert!(failure.message.contains(word), "{failure}");
        }
    }
}
