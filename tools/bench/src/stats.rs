//! Latency histograms and counters of one worker, mergeable into a group's.

use hdrhistogram::Histogram;

/// Longest latency told apart: one hour. Longer ones count as one hour in the histogram (min, max and mean stay exact).
const MAX_LATENCY_NS: u64 = 3_600_000_000_000;

/// Latencies in nanoseconds: exact min, max, mean and deviation; percentiles to three digits.
#[derive(Clone, Debug)]
pub struct Latency {
    histogram: Option<Histogram<u64>>,
    /// Samples.
    pub count: u64,
    min: u64,
    max: u64,
    sum: f64,
    sum_squares: f64,
}

impl Latency {
    /// With a histogram (for percentiles) or only the four figures.
    pub fn new(percentiles: bool) -> Latency {
        // Allocated whole here, so that recording never allocates.
        let histogram = percentiles
            .then(|| Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).expect("constant bounds are valid"));
        Latency { histogram, count: 0, min: u64::MAX, max: 0, sum: 0.0, sum_squares: 0.0 }
    }

    /// Adds one sample.
    #[inline]
    pub fn record(&mut self, nanos: u64) {
        self.count += 1;
        self.min = self.min.min(nanos);
        self.max = self.max.max(nanos);
        let value = nanos as f64;
        self.sum += value;
        self.sum_squares += value * value;
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(nanos);
        }
    }

    /// Adds another's samples.
    pub fn merge(&mut self, other: &Latency) {
        self.count += other.count;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.sum += other.sum;
        self.sum_squares += other.sum_squares;
        if let (Some(mine), Some(theirs)) = (&mut self.histogram, &other.histogram) {
            mine.add(theirs).expect("equal bounds");
        }
    }

    /// Forgets everything (end of the ramp time) without giving memory back.
    pub fn clear(&mut self) {
        if let Some(histogram) = &mut self.histogram {
            histogram.reset();
        }
        (self.count, self.min, self.max, self.sum, self.sum_squares) = (0, u64::MAX, 0, 0.0, 0.0);
    }

    /// Smallest sample, 0 when there is none.
    pub fn min(&self) -> u64 {
        if self.count == 0 { 0 } else { self.min }
    }

    /// Largest sample.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// Mean, 0 when there is no sample.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }

    /// Sum of all samples, nanoseconds.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// Sample standard deviation.
    pub fn stddev(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let n = self.count as f64;
        ((self.sum_squares - self.sum * self.sum / n) / (n - 1.0)).max(0.0).sqrt()
    }

    /// Whether percentiles are kept.
    pub fn has_percentiles(&self) -> bool {
        self.histogram.is_some()
    }

    /// The latency that `percent` of the samples do not exceed; 0 without samples or histogram.
    pub fn percentile(&self, percent: f64) -> u64 {
        match &self.histogram {
            Some(histogram) if self.count > 0 => histogram.value_at_percentile(percent).min(self.max),
            _ => 0,
        }
    }

    /// Share of samples in `low..high` nanoseconds, percent.
    pub fn share_between(&self, low: u64, high: u64) -> f64 {
        match &self.histogram {
            Some(histogram) if self.count > 0 && high > low => {
                let within = histogram.count_between(low, high - 1);
                // count_between widens to whole buckets; a bucket cut by `low` was counted by the range below.
                let cut = if low == 0 || histogram.lowest_equivalent(low) == low {
                    0
                } else {
                    histogram.count_at(low)
                };
                100.0 * within.saturating_sub(cut) as f64 / self.count as f64
            }
            _ => 0.0,
        }
    }

    /// `(latency, count)` for every bin that has samples, in fio's bins.
    pub fn bins(&self) -> Vec<(u64, u64)> {
        let mut bins: Vec<(u64, u64)> = Vec::new();
        for value in self.histogram.iter().flat_map(|histogram| histogram.iter_recorded()) {
            let bin = fio_bin(value.value_iterated_to());
            match bins.last_mut() {
                Some((last, count)) if *last == bin => *count += value.count_at_value(),
                _ => bins.push((bin, value.count_at_value())),
            }
        }
        bins
    }
}

/// The value fio prints for the bin a latency falls in: 64 bins per power of two, named by their middle
/// (stat.c, `plat_val_to_idx` and `plat_idx_to_val`).
pub fn fio_bin(nanos: u64) -> u64 {
    let msb = 63 - nanos.max(1).leading_zeros();
    if msb <= 6 {
        return nanos;
    }
    let error_bits = msb - 6;
    let low = nanos >> error_bits << error_bits;
    low + (1 << error_bits) / 2
}

/// Counters and latencies of one direction.
#[derive(Clone, Debug)]
pub struct DirectionStats {
    /// Completed operations.
    pub ios: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Operations that moved less than asked (end of file).
    pub short_ios: u64,
    /// From taking an operation in hand to having submitted it.
    pub slat: Latency,
    /// From submission to completion.
    pub clat: Latency,
    /// Both together.
    pub lat: Latency,
    /// Time over which `bytes` were moved, nanoseconds.
    pub runtime_ns: u64,
    /// Samples of bytes per second, about two a second.
    pub bw_samples: Vec<f64>,
    /// Samples of operations per second.
    pub iops_samples: Vec<f64>,
}

impl DirectionStats {
    /// Empty.
    pub fn new(slat_percentiles: bool, lat_percentiles: bool) -> DirectionStats {
        DirectionStats {
            ios: 0,
            bytes: 0,
            short_ios: 0,
            slat: Latency::new(slat_percentiles),
            clat: Latency::new(true),
            lat: Latency::new(lat_percentiles),
            runtime_ns: 0,
            bw_samples: Vec::new(),
            iops_samples: Vec::new(),
        }
    }

    /// Adds a worker that ran beside this one.
    pub fn merge(&mut self, other: &DirectionStats) {
        self.ios += other.ios;
        self.bytes += other.bytes;
        self.short_ios += other.short_ios;
        self.slat.merge(&other.slat);
        self.clat.merge(&other.clat);
        self.lat.merge(&other.lat);
        self.runtime_ns = self.runtime_ns.max(other.runtime_ns);
        add_samples(&mut self.bw_samples, &other.bw_samples);
        add_samples(&mut self.iops_samples, &other.iops_samples);
    }

    /// Forgets everything measured so far.
    pub fn clear(&mut self) {
        (self.ios, self.bytes, self.short_ios, self.runtime_ns) = (0, 0, 0, 0);
        self.slat.clear();
        self.clat.clear();
        self.lat.clear();
    }

    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        per_second(self.bytes, self.runtime_ns)
    }

    /// Operations per second.
    pub fn iops(&self) -> f64 {
        per_second(self.ios, self.runtime_ns)
    }
}

fn per_second(count: u64, nanos: u64) -> f64 {
    if nanos == 0 { 0.0 } else { count as f64 * 1e9 / nanos as f64 }
}

fn add_samples(mine: &mut Vec<f64>, theirs: &[f64]) {
    mine.resize(mine.len().max(theirs.len()), 0.0);
    for (sum, value) in mine.iter_mut().zip(theirs) {
        *sum += value;
    }
}

/// Min, max, mean and deviation of samples.
pub fn summary(samples: &[f64]) -> (f64, f64, f64, f64) {
    if samples.is_empty() {
        return (0.0, 0.0, 0.0, 0.0);
    }
    let n = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / n;
    let squares = samples.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    let deviation = if samples.len() < 2 { 0.0 } else { (squares / (n - 1.0)).sqrt() };
    let min = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let max = samples.iter().copied().fold(0.0, f64::max);
    (min, max, mean, deviation)
}

/// Counts by power of two: fio's `iodepth_level` (1, 2, 4, ... >= 64), `iodepth_submit` and `iodepth_complete` (0, 4, 8, ...).
#[derive(Clone, Copy, Debug, Default)]
pub struct DepthMap {
    /// Counts; the meaning of the index is the map's own.
    pub counts: [u64; 7],
}

impl DepthMap {
    /// Counts one operation that started with `depth` in flight, itself included.
    #[inline]
    pub fn record_level(&mut self, depth: usize) {
        let index = (usize::BITS - 1 - depth.max(1).leading_zeros()).min(6);
        self.counts[index as usize] += 1;
    }

    /// Counts one batch of `size` submitted or completed operations.
    #[inline]
    pub fn record_batch(&mut self, size: usize) {
        let index = match size {
            0 => 0,
            1..=4 => 1,
            5..=8 => 2,
            9..=16 => 3,
            17..=32 => 4,
            33..=64 => 5,
            _ => 6,
        };
        self.counts[index] += 1;
    }

    /// Adds another's counts.
    pub fn merge(&mut self, other: &DepthMap) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts) {
            *mine += theirs;
        }
    }

    /// The counts as percent of all.
    pub fn percents(&self) -> [f64; 7] {
        let total = self.counts.iter().sum::<u64>().max(1) as f64;
        self.counts.map(|count| 100.0 * count as f64 / total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_thousandth() {
        let mut latency = Latency::new(true);
        for nanos in (1..=100_000).map(|n| n * 100) {
            latency.record(nanos);
        }
        for (percent, exact) in
            [(1.0, 100_000.0), (50.0, 5_000_000.0), (99.0, 9_900_000.0), (99.99, 9_999_000.0)]
        {
            let found = latency.percentile(percent) as f64;
            assert!((found / exact - 1.0).abs() < 0.001, "{percent}: {found} instead of {exact}");
        }
        assert_eq!((latency.min(), latency.max(), latency.count), (100, 10_000_000, 100_000));
        assert!((latency.mean() - 5_000_050.0).abs() < 1.0);
        assert!((latency.stddev() / 2_886_765.8 - 1.0).abs() < 1e-6, "{}", latency.stddev());
    }

    #[test]
    fn merging_equals_recording_together() {
        let (mut a, mut b, mut both) = (Latency::new(true), Latency::new(true), Latency::new(true));
        for n in 1..1000u64 {
            if n % 3 == 0 { &mut a } else { &mut b }.record(n * n);
            both.record(n * n);
        }
        a.merge(&b);
        assert_eq!(a.bins(), both.bins());
        assert_eq!((a.min(), a.max(), a.count), (both.min(), both.max(), both.count));
        assert_eq!(a.percentile(90.0), both.percentile(90.0));
        a.clear();
        assert_eq!((a.count, a.min(), a.max(), a.percentile(50.0)), (0, 0, 0, 0));
    }

    #[test]
    fn bins_have_fios_names() {
        // Taken from a run of fio 3.33 (json+).
        for (inside, name) in [(311_457, 313_344), (1_184_889, 1_187_840), (354_304, 354_304), (100, 100)] {
            assert_eq!(fio_bin(inside), name, "{inside}");
        }
    }

    #[test]
    fn shares_add_up() {
        let mut latency = Latency::new(true);
        for nanos in [500, 1500, 3000, 3_999, 4_001, 9_000, 2_000_000] {
            latency.record(nanos);
        }
        let edges = [0, 1000, 2000, 4000, 10_000, MAX_LATENCY_NS];
        let shares: Vec<f64> = edges.windows(2).map(|edge| latency.share_between(edge[0], edge[1])).collect();
        assert!((shares.iter().sum::<f64>() - 100.0).abs() < 0.001, "{shares:?}");
        assert!((shares[0] - 100.0 / 7.0).abs() < 0.001);
    }

    #[test]
    fn depth_maps_use_fios_buckets() {
        let mut level = DepthMap::default();
        [1, 2, 3, 4, 63, 64, 200].iter().for_each(|&depth| level.record_level(depth));
        assert_eq!(level.counts, [1, 2, 1, 0, 0, 1, 2]);
        let mut batch = DepthMap::default();
        [0, 1, 4, 5, 32, 64, 65].iter().for_each(|&size| batch.record_batch(size));
        assert_eq!(batch.counts, [1, 2, 1, 0, 1, 1, 1]);
    }

    #[test]
    fn samples_of_workers_add_up() {
        assert_eq!(summary(&[1.0, 3.0]), (1.0, 3.0, 2.0, 2f64.sqrt()));
        let mut sum = vec![1.0];
        add_samples(&mut sum, &[2.0, 5.0]);
        assert_eq!(sum, [3.0, 5.0]);
    }
}
