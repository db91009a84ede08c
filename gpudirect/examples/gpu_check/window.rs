//! Windows: bytes after eviction and reload, the budget as the driver sees it, and what mapping costs.

use std::time::{Duration, Instant};

use gpudirect::{CachePolicy, Control, LaneOptions, Source, Window};
use nvme::SimRng;
use nvtier_tests::pattern;
use serde_json::{Value, json};

use crate::{Bench, Check, rate};

pub fn check(bench: &Bench) -> Check<Value> {
    let folder = tempfile::Builder::new().prefix("nvtier-check-").tempdir_in(&bench.shm)?;
    let len = bench.bytes / 4;
    let path = folder.path().join("region");
    // Each 8 MiB differs from every other.
    let mut bytes = Vec::with_capacity(len as usize);
    for i in 0..len.div_ceil(8 << 20) {
        bytes.extend_from_slice(&pattern(i + 1, 8 << 20));
    }
    bytes.truncate(len as usize);
    std::fs::write(&path, &bytes)?;
    let source = Source::file(&path, CachePolicy::Auto)?;
    let mut lane = bench.lane(LaneOptions::default())?;
    let free_before = bench.driver.info()?.free_bytes;
    let mut found = serde_json::Map::new();
    for page in [1, (len / 16).min(16 << 20)] {
        let window = Window::with_page(&bench.driver, len, len / 4, page)?;
        let address = window.address();
        // In an order that is not that of the file, twice: everything is evicted and comes again.
        let step = (len / 32).max(window.page_bytes());
        let mut order: Vec<u64> = (0..len / step).collect();
        let mut rng = SimRng::new(page);
        let mut seen = vec![0; step as usize];
        let (mut ensuring, mut moved) = (Duration::ZERO, 0);
        for _ in 0..2 {
            for i in (1..order.len()).rev() {
                order.swap(i, rng.in_range(0..i as u64 + 1) as usize);
            }
            for place in &order {
                let range = place * step..(place + 1) * step;
                let fills = window.stats().fills;
                let started = Instant::now();
                let pin = window.ensure(&mut lane, &source, 0, range.clone(), &mut Control::default())?;
                if window.stats().fills > fills {
                    ensuring += started.elapsed();
                    moved += step;
                }
                lane.read_device(window.address() + range.start, &mut seen)?;
                if seen != bytes[range.start as usize..range.end as usize] {
                    return Err(format!("other bytes at {range:?}, pages of {}", window.page_bytes()).into());
                }
                drop(pin);
                let stats = window.stats();
                if window.address() != address || stats.physical_bytes > window.budget_bytes() {
                    return Err(format!("{stats:?} with a budget of {}", window.budget_bytes()).into());
                }
            }
        }
        // What others use on the device may change meanwhile: by less than this, one hopes.
        let taken = free_before.saturating_sub(bench.driver.info()?.free_bytes);
        if bench.cuda.is_some() && taken > window.budget_bytes() + (256 << 20) {
            return Err(format!(
                "{taken} bytes are gone from the device, the budget is {}",
                window.budget_bytes()
            )
            .into());
        }
        // Mapping alone.
        window.release(0..len)?;
        let budget = window.budget_bytes().min(len);
        let started = Instant::now();
        drop(window.ensure_with(0..budget, &mut |_| Ok(()))?);
        let map = started.elapsed();
        let started = Instant::now();
        window.release(0..len)?;
        let unmap = started.elapsed();
        let pages = budget.div_ceil(window.page_bytes()) as f64;
        let stats = window.stats();
        found.insert(
            format!("page_{}", window.page_bytes()),
            json!({
                "fill_gb_per_second": rate(moved, ensuring),
                "evictions": stats.evictions,
                "map_us_per_page": map.as_secs_f64() * 1e6 / pages,
                "unmap_us_per_page": unmap.as_secs_f64() * 1e6 / pages,
                "taken_bytes": taken,
                "budget_bytes": window.budget_bytes(),
            }),
        );
        drop(window);
    }
    let taken = free_before.saturating_sub(bench.driver.info()?.free_bytes);
    if bench.cuda.is_some() && taken > 64 << 20 {
        return Err(format!("{taken} bytes did not come back to the device").into());
    }
    Ok(Value::Object(found))
}
