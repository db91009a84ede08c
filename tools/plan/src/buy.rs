//! What would help: the same plan on the same machine with one thing in it better, ranked by effect.

use serde::Serialize;

use crate::machine::{CLASSES, Drive, Gpu, Machine};
use crate::make::{Outcome, Request, outcome};
use crate::model::Model;

/// Something to put into the machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Offer {
    /// What to buy.
    pub what: String,
    /// What it changes, in words.
    pub effect: String,
    /// How many times as fast a token or a step gets.
    pub speed_factor: Option<f64>,
    /// How many times as fast the first token comes.
    pub first_token_factor: Option<f64>,
    /// Whether only this makes it fit.
    pub makes_it_fit: bool,
}

/// The most that are listed.
const OFFERS: usize = 6;
/// The most GPUs among them.
const GPUS: usize = 3;
/// What is less is not worth a line.
const WORTH: f64 = 1.02;

/// What would help, the most first.
pub(crate) fn offers(model: &Model, request: &Request, machine: &Machine, now: &Outcome) -> Vec<Offer> {
    let judge = |what: String, better: &Machine| judge(what, now, &outcome(model, request, better));
    let mut gpus: Vec<(f64, Offer)> = Vec::new();
    for row in doctor::gpus() {
        let gpu = Gpu::of_row(&row);
        // A larger or faster one, of those whose rates are known.
        if machine.gpu.as_ref().is_some_and(|own| own.name == gpu.name) || gpu.flops.is_none() {
            continue;
        }
        let what = format!("{} ({} GB)", gpu.name, gpu.memory_bytes / 1_000_000_000);
        gpus.extend(judge(what, &Machine { gpu: Some(gpu), ..machine.clone() }));
    }
    // Of the GPUs with equal memory the one with the most effect; then the best of these.
    gpus.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut seen = Vec::new();
    gpus.retain(|(_, offer)| {
        let memory = offer.what.rsplit('(').next().unwrap_or("").to_owned();
        let new = !seen.contains(&memory);
        seen.push(memory);
        new
    });
    gpus.truncate(GPUS);

    let mut all = gpus;
    if machine.ram_bytes > 0 {
        let ram_bytes = machine.ram_bytes * 2;
        let what = format!(
            "{} GB of RAM instead of {}",
            ram_bytes / 1_000_000_000,
            machine.ram_bytes / 1_000_000_000
        );
        all.extend(judge(what, &Machine { ram_bytes, ..machine.clone() }));
    }
    match machine.drives.first() {
        Some(first) => {
            let mut drives = machine.drives.clone();
            drives.push(first.clone());
            let what = format!("one more drive like the first, striped ({})", first.name);
            all.extend(judge(what, &Machine { drives, ..machine.clone() }));
            let (class, ..) = CLASSES[CLASSES.len() - 1];
            let faster =
                |drive: &Drive| Drive::of_class(class, drive.capacity_bytes).expect("a class of the list");
            let drives: Vec<Drive> = machine.drives.iter().map(faster).collect();
            let what = format!("{class} drives instead of those that are there");
            all.extend(judge(what, &Machine { drives, ..machine.clone() }));
            let larger = |drive: &Drive| Drive {
                capacity_bytes: drive.capacity_bytes.saturating_mul(2),
                ..drive.clone()
            };
            let drives: Vec<Drive> = machine.drives.iter().map(larger).collect();
            all.extend(judge("drives of twice the capacity".into(), &Machine { drives, ..machine.clone() }));
        }
        None => {
            let tera = now.needs.nvme_bytes.div_ceil(1_000_000_000_000).max(1);
            let drives =
                Drive::of_class("gen4", tera.saturating_mul(1_000_000_000_000)).into_iter().collect();
            let what = format!("a gen4 drive of {tera} TB");
            all.extend(judge(what, &Machine { drives, ..machine.clone() }));
        }
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.truncate(OFFERS);
    all.into_iter().map(|(_, offer)| offer).collect()
}

/// Weighs an offer; `None` where it is not worth a line.
fn judge(what: String, now: &Outcome, then: &Outcome) -> Option<(f64, Offer)> {
    let makes_it_fit = !now.placed.fits() && then.placed.fits();
    let factor =
        |now: f64, then: f64| (now.is_finite() && then.is_finite() && then > 0.0).then(|| now / then);
    let speed_factor = factor(now.seconds(), then.seconds());
    let first_token_factor = factor(now.first_token(), then.first_token());
    if !now.placed.fits() && !makes_it_fit {
        return None;
    }
    let best = speed_factor.unwrap_or(0.0).max(first_token_factor.unwrap_or(0.0));
    if !makes_it_fit && best < WORTH {
        return None;
    }
    let unit = if then.step.is_some() { "a step" } else { "a token" };
    let mut effects = Vec::new();
    if makes_it_fit {
        let seconds = then.seconds();
        effects.push(match seconds.is_finite() {
            true => format!("it fits; {unit} takes {}", duration(seconds)),
            false => "it fits".to_owned(),
        });
    } else {
        if let Some(factor) = speed_factor.filter(|factor| *factor >= WORTH) {
            effects.push(format!(
                "{unit} in {} instead of {} ({factor:.1}x)",
                duration(then.seconds()),
                duration(now.seconds())
            ));
        }
        if let Some(factor) = first_token_factor.filter(|factor| *factor >= WORTH) {
            effects.push(format!("the first token {factor:.1}x as fast"));
        }
    }
    // What makes it fit comes first, the faster the better.
    let weight = if makes_it_fit { 1e9 + 1.0 / then.seconds().max(1e-9) } else { best };
    Some((weight, Offer { what, effect: effects.join(", "), speed_factor, first_token_factor, makes_it_fit }))
}

/// Seconds for people.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => "-".into(),
        s if s < 0.001 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
