//! Chunk, depth and threads of a lane: measured once for a machine, drive and device, and remembered.
//!
//! The files that are to be loaded are read for it, never written: parts of them go to the device with one setting after the other,
//! twice, the second time in the opposite order and on other parts. A setting replaces the default one only where it is
//! clearly faster. What the caller gave is never changed.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nvme::Target;
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::driver::{DeviceInfo, DeviceMemory};
use crate::error::Result;
use crate::lane::{Lane, Run};
use crate::paths::System;
use crate::remembered::Remembered;
use crate::source::Source;

/// A load of fewer bytes is over before measuring pays off.
pub const WORTH_IT: u64 = 1 << 30;
/// A file of fewer bytes is no measure.
const FILE_MIN: u64 = 64 << 20;
/// The least and the most bytes that are read with one setting at a time.
const PART_MIN: u64 = 16 << 20;
const PART_MAX: u64 = 256 << 20;
/// How long that is to take, about.
const PART_TIME: f64 = 0.15;
/// Device memory that is taken meanwhile.
const SCRATCH: u64 = 64 << 20;
/// No measurement starts after this time.
const TIME_MAX: Duration = Duration::from_millis(2500);
/// What a setting must gain to replace the default one.
const GAIN: f64 = 1.05;
/// Settings for what comes from a drive, the default one first: bytes of a read, reads in flight.
const DIRECT: [(usize, u32); 7] = [
    (2 << 20, 32),
    (1 << 20, 32),
    (1 << 20, 64),
    (512 << 10, 64),
    (2 << 20, 64),
    (4 << 20, 16),
    (4 << 20, 32),
];
/// Bytes of a read of what is in memory.
const CACHED: [usize; 3] = [2 << 20, 1 << 20, 4 << 20];

/// Where settings come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Nobody chose.
    #[default]
    Default,
    /// The caller did.
    Given,
    /// Measured now.
    Measured,
    /// Measured once, on this machine, drive and device.
    Remembered,
}

/// When to measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tune {
    /// Take what is remembered; measure where nothing is and the load is large enough for it ([`WORTH_IT`]).
    #[default]
    FirstUse,
    /// Measure now.
    Now,
    /// Take what is remembered, measure nothing.
    Never,
}

/// What the caller chose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Bytes of a read.
    pub chunk: Option<usize>,
    /// Reads in flight.
    pub depth: Option<u32>,
    /// Threads for what is in memory.
    pub threads: Option<u32>,
}

/// A setting, and what it reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuning {
    /// Bytes of a read.
    pub chunk: usize,
    /// Reads in flight.
    pub depth: u32,
    /// Threads for what is in memory.
    pub threads: u32,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// What the default setting reached beside it.
    pub default_bytes_per_second: f64,
}

/// Settings of machines, drives and devices.
#[derive(Clone, Debug)]
pub struct Tuner {
    system: System,
    remembered: Remembered,
}

impl Tuner {
    /// Of this machine, in the user's cache folder.
    pub fn here() -> Tuner {
        Tuner::of(System::here(), Remembered::in_cache("tuning.json"))
    }

    /// Of a machine that a test made up.
    pub fn of(system: System, remembered: Remembered) -> Tuner {
        Tuner { system, remembered }
    }

    /// Gives a lane the best settings that are known, or found now, for loads from these sources. Returns a line for people where
    /// something was measured, or could not be. An error is the caller's own: cancelled, or too late.
    pub fn settle(
        &self,
        lane: &mut Lane,
        sources: &[Source],
        given: Given,
        tune: Tune,
        control: &mut Control<'_>,
    ) -> Result<Option<String>> {
        use crate::ErrorKind as K;
        let device = lane.driver().info()?;
        let Some(longest) = sources.iter().max_by_key(|source| source.len()) else { return Ok(None) };
        let cached = sources.iter().all(Source::is_cached);
        let all_given = match cached {
            true => given.chunk.is_some() && given.threads.is_some(),
            false => given.chunk.is_some() && given.depth.is_some(),
        };
        let any_given = given != Given::default();
        let bytes: u64 = sources.iter().map(Source::len).sum();
        let key = self.key(&device, longest, cached);
        let known = if any_given { None } else { self.remembered.get::<Tuning>(&key).filter(is_sane) };
        let (tuning, origin) = match (tune, known) {
            (Tune::FirstUse | Tune::Never, Some(tuning)) => (tuning, Origin::Remembered),
            (Tune::Never, None) => return Ok(None),
            (Tune::FirstUse, None) if bytes < WORTH_IT || any_given => return Ok(None),
            _ if all_given => return Ok(Some("the settings were given: nothing was measured".into())),
            _ if longest.len() < FILE_MIN => {
                return Ok(
                    (tune == Tune::Now).then(|| "the files are too small to measure settings with".into())
                );
            }
            _ => match self.measure(lane, longest, given, cached, control) {
                Ok(tuning) => {
                    if !any_given {
                        self.remembered.put(&key, &tuning);
                    }
                    (tuning, Origin::Measured)
                }
                Err(error) if matches!(error.kind(), K::Cancelled | K::Timeout) => return Err(error),
                Err(error) => return Ok(Some(format!("settings could not be measured: {error}"))),
            },
        };
        let mut options = lane.options().clone();
        (options.chunk, options.depth, options.threads) = (tuning.chunk, tuning.depth, tuning.threads);
        options.origin = origin;
        if let Err(error) = lane.adjust(options) {
            return Ok(Some(format!("settings that were measured do not fit: {error}")));
        }
        Ok((origin == Origin::Measured).then(|| {
            format!(
                "settings were measured: {:.2} GB/s, the default ones {:.2} GB/s",
                tuning.bytes_per_second / 1e9,
                tuning.default_bytes_per_second / 1e9
            )
        }))
    }

    fn key(&self, device: &DeviceInfo, source: &Source, cached: bool) -> String {
        let place = source.stored.first().map(|extent| match extent.device.target() {
            Target::Fd(fd) => {
                self.system.place(Path::new(&format!("/proc/self/fd/{}", fd.as_raw_fd()))).identity()
            }
            _ => extent.device.name().to_owned(),
        });
        format!(
            "{}|{} {}|{}|{}|{}|{} cores",
            self.system.identity(),
            device.name,
            device.pci,
            place.unwrap_or_default(),
            if cached { "cached" } else { "direct" },
            if source.is_verified() { "verified" } else { "plain" },
            crate::lane::cores()
        )
    }

    /// Measures. The lane has its old settings afterwards.
    fn measure(
        &self,
        lane: &mut Lane,
        source: &Source,
        given: Given,
        cached: bool,
        control: &mut Control<'_>,
    ) -> Result<Tuning> {
        let before = lane.options().clone();
        let settings = candidates(&before, given, cached, lane.pinned_bytes() as usize);
        let rates = rates(lane, source, &settings, control);
        lane.adjust(before)?;
        let rates = rates?;
        let best = choose(&rates);
        Ok(Tuning { bytes_per_second: rates[best], default_bytes_per_second: rates[0], ..settings[best] })
    }
}

/// Whether what was remembered can be settings at all.
fn is_sane(tuning: &Tuning) -> bool {
    tuning.chunk.is_power_of_two()
        && ((64 << 10)..=(64 << 20)).contains(&tuning.chunk)
        && (1..=4096).contains(&tuning.depth)
        && (1..=64).contains(&tuning.threads)
}

/// What is tried, the present settings first.
fn candidates(before: &crate::LaneOptions, given: Given, cached: bool, ring: usize) -> Vec<Tuning> {
    let one = |chunk: usize, depth: u32, threads: u32| Tuning {
        chunk: given.chunk.unwrap_or(chunk),
        depth: given.depth.unwrap_or(depth),
        threads: given.threads.unwrap_or(threads),
        bytes_per_second: 0.0,
        default_bytes_per_second: 0.0,
    };
    let mut all = vec![one(before.chunk, before.depth, before.threads)];
    let cores = crate::lane::cores();
    match cached {
        true => {
            for threads in [cores, cores.div_ceil(2), 2 * cores] {
                for chunk in CACHED.into_iter().take(if threads == cores { 3 } else { 1 }) {
                    all.push(one(chunk, before.depth, threads.clamp(1, 64)));
                }
            }
        }
        false => all.extend(DIRECT.map(|(chunk, depth)| one(chunk, depth, before.threads))),
    }
    let mut distinct: Vec<Tuning> = Vec::new();
    for setting in all.into_iter().filter(|setting| 4 * setting.chunk <= ring) {
        if !distinct.contains(&setting) {
            distinct.push(setting);
        }
    }
    distinct
}

/// Bytes per second of each setting; 0 where the time was over before.
fn rates(
    lane: &mut Lane,
    source: &Source,
    settings: &[Tuning],
    control: &mut Control<'_>,
) -> Result<Vec<f64>> {
    let count = settings.len() as u64;
    let mut part = (source.len() / count.max(1)).min(PART_MAX) / 4096 * 4096;
    let scratch = DeviceMemory::new(lane.driver(), part.clamp(4096, SCRATCH))?;
    let name = |_| "a measurement".to_owned();
    // How fast it is at all: slow drives get smaller parts, so that every setting has its turn.
    let first = Run { source: 0, offset: 0, len: scratch.len(), device: scratch.address(), tensor: 0 };
    let begun = Instant::now();
    lane.read(std::slice::from_ref(source), &[first], &name, &mut quiet(control))?;
    let rate = scratch.len() as f64 / begun.elapsed().as_secs_f64().max(1e-9);
    let wanted = (rate * PART_TIME) as u64;
    part = wanted.clamp(PART_MIN.min(part), part) / 4096 * 4096;
    let (started, mut sums) = (Instant::now(), vec![(0u64, Duration::ZERO); settings.len()]);
    for round in 0..2u64 {
        let order: Vec<usize> =
            if round == 0 { (0..settings.len()).collect() } else { (0..settings.len()).rev().collect() };
        for (turn, index) in order.into_iter().enumerate() {
            if started.elapsed() > TIME_MAX {
                break;
            }
            let setting = settings[index];
            let mut options = lane.options().clone();
            (options.chunk, options.depth, options.threads) = (setting.chunk, setting.depth, setting.threads);
            lane.adjust(options)?;
            let first = turn as u64 * part;
            let runs: Vec<Run> = (0..part.div_ceil(scratch.len()))
                .map(|i| Run {
                    source: 0,
                    offset: first + i * scratch.len(),
                    len: scratch.len().min(part - i * scratch.len()),
                    device: scratch.address(),
                    tensor: 0,
                })
                .collect();
            let begun = Instant::now();
            lane.read(std::slice::from_ref(source), &runs, &name, &mut quiet(control))?;
            sums[index].0 += part;
            sums[index].1 += begun.elapsed();
            control.check(0, source.len())?;
        }
    }
    Ok(sums.into_iter().map(|(bytes, time)| bytes as f64 / time.as_secs_f64().max(1e-9)).collect())
}

/// The same wishes of the caller, without its progress.
fn quiet(control: &Control<'_>) -> Control<'static> {
    let Control { cancel, deadline, priority, .. } = control;
    Control { cancel: cancel.clone(), deadline: *deadline, priority: *priority, progress: None }
}

/// Which setting to take: the fastest, where it is clearly faster than the first.
fn choose(rates: &[f64]) -> usize {
    let mut best = 0;
    for (index, rate) in rates.iter().enumerate() {
        if *rate > rates[best] {
            best = index;
        }
    }
    if rates[best] >= GAIN * rates[0] { best } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LaneOptions;

    #[test]
    fn a_setting_must_be_clearly_faster_than_the_default() {
        assert_eq!(choose(&[10.0]), 0);
        assert_eq!(choose(&[10.0, 10.4, 9.0]), 0);
        assert_eq!(choose(&[10.0, 12.0, 11.0]), 1);
        assert_eq!(choose(&[10.0, 0.0, 0.0]), 0, "what was not measured is not taken");
    }

    #[test]
    fn what_was_given_is_in_every_setting() {
        let before = LaneOptions::default();
        let ring = 128 << 20;
        let all = candidates(&before, Given::default(), false, ring);
        assert_eq!((all[0].chunk, all[0].depth), (2 << 20, 32));
        assert!(all.len() == 7 && all.iter().all(|one| is_sane(one) && 4 * one.chunk <= ring));
        let given = Given { chunk: Some(1 << 20), ..Given::default() };
        let some = candidates(&before, given, false, ring);
        assert!(some.len() > 1 && some.iter().all(|one| one.chunk == 1 << 20));
        let cached = candidates(&before, Given { threads: Some(3), ..Given::default() }, true, ring);
        assert!(cached.len() > 1 && cached.iter().all(|one| one.threads == 3));
        assert!(candidates(&before, Given::default(), false, 8 << 20).iter().all(|one| one.chunk <= 2 << 20));
        assert!(!is_sane(&Tuning { chunk: 3 << 20, ..all[0] }) && !is_sane(&Tuning { depth: 0, ..all[0] }));
    }
}
