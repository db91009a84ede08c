//! Compute or load: a prefix that is stored comes back fastest when its head is computed while its tail is loaded.
//!
//! ```text
//! block     0                 computed        loading           end
//!           |--- computed --->|=== next ===>| |<=== next ===|<--- loaded ---|        where the two meet, all of the prefix is there
//! ```
//!
//! A [`Planner`] keeps what computing and loading cost, as measured lately, by one model each: computing tokens `a..b` takes `c0 + c1 * (b - a)
//! + c2 * (b² - a²) / 2` (a launch, the layers, the attention to what is before), loading `n` bytes takes `l0 + l1 * n`, apart for memory and the drive.
//! A [`Restore`] is one prefix on its way: whoever computes and whoever loads ask it what to do next, and tell what it took. It gives each no more
//! than what the other would not have had done sooner, so that neither waits long for the other at the end.
//!
//! No clock here: seconds come from the caller.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much an older measurement counts against the next one.
const FADE: f64 = 0.85;
/// Of what computing would still have to do, as much is given out at once; the rest is planned again with what was learned.
const SHARE: f64 = 0.75;
/// Work that takes less than so many launches is given out at once.
const LAUNCHES: f64 = 8.0;
/// Of the time that is left, a load takes at most so much: what is being loaded cannot be computed meanwhile.
const LOAD_SHARE: f64 = 0.1;
/// Seconds that a load may take in any case.
const LOAD_LEAST: f64 = 0.004;
/// Blocks of the first load, before anything is known.
const LOAD_FIRST: usize = 8;

/// Least squares with coefficients of at least 0 for `N` terms, older measurements fading. Errors count relative to the time.
#[derive(Clone, Debug)]
struct Fit<const N: usize> {
    /// Of the normal equations.
    a: [[f64; N]; N],
    b: [f64; N],
    coefficients: Option<[f64; N]>,
}

impl<const N: usize> Fit<N> {
    fn new() -> Fit<N> {
        Fit { a: [[0.0; N]; N], b: [0.0; N], coefficients: None }
    }

    fn add(&mut self, terms: [f64; N], seconds: f64) {
        if !(seconds > 0.0
            && seconds.is_finite()
            && terms.iter().all(|term| term.is_finite() && *term >= 0.0))
        {
            return;
        }
        let terms = terms.map(|term| term / seconds);
        for i in 0..N {
            for j in 0..N {
                self.a[i][j] = self.a[i][j] * FADE + terms[i] * terms[j];
            }
            self.b[i] = self.b[i] * FADE + terms[i];
        }
        self.coefficients = self.solve();
    }

    /// The best of all subsets of terms whose coefficients are not negative: there are at most seven.
    fn solve(&self) -> Option<[f64; N]> {
        let mut best: Option<(f64, [f64; N])> = None;
        for set in 1u32..(1 << N) {
            let Some(x) = self.solve_for(set) else { continue };
            if x.iter().any(|value| !value.is_finite() || *value < 0.0) {
                continue;
            }
            // What of the squared error depends on x: x'Ax - 2b'x.
            let mut cost = 0.0;
            for i in 0..N {
                cost -= 2.0 * self.b[i] * x[i];
                for j in 0..N {
                    cost += x[i] * self.a[i][j] * x[j];
                }
            }
            if best.as_ref().is_none_or(|(least, _)| cost < *least - 1e-9) {
                best = Some((cost, x));
            }
        }
        best.map(|(_, x)| x)
    }

    /// Gauss, with the terms of `set` alone, scaled so that the sizes of the terms do not matter.
    fn solve_for(&self, set: u32) -> Option<[f64; N]> {
        let terms: Vec<usize> = (0..N).filter(|i| set & (1 << i) != 0).collect();
        let scale: Vec<f64> = terms.iter().map(|i| self.a[*i][*i].sqrt()).collect();
        if scale.iter().any(|scale| *scale <= 0.0) {
            return None;
        }
        let n = terms.len();
        let mut rows: Vec<Vec<f64>> = (0..n)
            .map(|i| {
                let mut row: Vec<f64> =
                    (0..n).map(|j| self.a[terms[i]][terms[j]] / (scale[i] * scale[j])).collect();
                row.push(self.b[terms[i]] / scale[i]);
                row
            })
            .collect();
        for column in 0..n {
            let pivot =
                (column..n).max_by(|x, y| rows[*x][column].abs().total_cmp(&rows[*y][column].abs()))?;
            rows.swap(column, pivot);
            // Terms that always came in the same proportion cannot be told apart; fewer of them explain as much.
            if rows[column][column].abs() < 1e-6 {
                return None;
            }
            for row in 0..n {
                if row == column {
                    continue;
                }
                let factor = rows[row][column] / rows[column][column];
                for k in column..=n {
                    let above = rows[column][k];
                    rows[row][k] -= factor * above;
                }
            }
        }
        let mut x = [0.0; N];
        for (i, term) in terms.iter().enumerate() {
            x[*term] = rows[i][n] / rows[i][i] / scale[i];
        }
        Some(x)
    }

    fn predict(&self, terms: [f64; N]) -> Option<f64> {
        let coefficients = self.coefficients?;
        Some(coefficients.iter().zip(terms).map(|(c, term)| c * term).sum())
    }
}

/// Where blocks come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Memory of the host.
    Memory,
    /// The drive.
    Drive,
}

#[derive(Debug)]
struct Costs {
    compute: Fit<3>,
    memory: Fit<2>,
    drive: Fit<2>,
}

fn compute_terms(from: u64, to: u64) -> [f64; 3] {
    let (a, b) = (from as f64, to as f64);
    [1.0, b - a, (b * b - a * a) / 2.0]
}

impl Costs {
    fn compute(&self, from: u64, to: u64) -> Option<f64> {
        if to <= from {
            return Some(0.0);
        }
        self.compute.predict(compute_terms(from, to))
    }

    /// What is known of one place stands in for the other: a guess, until that is measured.
    fn load(&self, from: From, bytes: u64) -> Option<f64> {
        if bytes == 0 {
            return Some(0.0);
        }
        let terms = [1.0, bytes as f64];
        match from {
            From::Memory => self.memory.predict(terms).or_else(|| self.drive.predict(terms)),
            From::Drive => self.drive.predict(terms).or_else(|| self.memory.predict(terms)),
        }
    }
}

/// What computing and loading cost, as measured lately. May be shared by threads, and is for one model on one device.
#[derive(Debug)]
pub struct Planner {
    costs: Mutex<Costs>,
}

impl Default for Planner {
    fn default() -> Planner {
        Planner::new()
    }
}

impl Planner {
    /// Knows nothing yet.
    pub fn new() -> Planner {
        Planner { costs: Mutex::new(Costs { compute: Fit::new(), memory: Fit::new(), drive: Fit::new() }) }
    }

    fn costs(&self) -> MutexGuard<'_, Costs> {
        self.costs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tokens `tokens` of a sequence were computed in so many seconds, those before being there.
    pub fn computed(&self, tokens: Range<u64>, seconds: f64) {
        if tokens.start < tokens.end {
            self.costs().compute.add(compute_terms(tokens.start, tokens.end), seconds);
        }
    }

    /// So many bytes were loaded in so many seconds, by one call.
    pub fn loaded(&self, from: From, bytes: u64, seconds: f64) {
        if bytes > 0 {
            let mut costs = self.costs();
            let fit = match from {
                From::Memory => &mut costs.memory,
                From::Drive => &mut costs.drive,
            };
            fit.add([1.0, bytes as f64], seconds);
        }
    }

    /// Seconds that computing these tokens is expected to take; `None`: nothing was measured yet.
    pub fn compute_seconds(&self, tokens: Range<u64>) -> Option<f64> {
        self.costs().compute(tokens.start, tokens.end)
    }

    /// Seconds that loading so many bytes is expected to take.
    pub fn load_seconds(&self, from: From, bytes: u64) -> Option<f64> {
        self.costs().load(from, bytes)
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// These blocks, by number.
    Blocks(Range<usize>),
    /// Nothing now: the other one is at the rest, and is sooner done. Ask again when it tells.
    Wait,
    /// Nothing more: all that this one had to do is done.
    Done,
}

/// Settings of a [`Restore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoreOptions {
    /// Tokens of a block, not 0.
    pub block_tokens: u32,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Whether to compute at all.
    pub compute: bool,
    /// Whether to load at all.
    pub load: bool,
    /// Tokens that are computed at once at most.
    pub chunk_tokens: u32,
    /// Blocks that are loaded at once at most.
    pub load_blocks: usize,
}

#[derive(Debug)]
struct Progress {
    /// Blocks that are computed, from the first on.
    computed: usize,
    /// Blocks that are computed or being computed.
    computing: usize,
    /// The first block that is loaded or being loaded.
    loading: usize,
    /// The first block that is loaded.
    loaded: usize,
    /// Blocks that can be had: behind a block that could not be loaded, none.
    end: usize,
    /// When the present load began.
    load_since: f64,
    /// Blocks that were loaded.
    by_load: usize,
}

/// A prefix on its way.
#[derive(Debug)]
pub struct Restore {
    planner: Arc<Planner>,
    options: RestoreOptions,
    /// Of each block, whether it is in memory.
    memory: Vec<bool>,
    progress: Mutex<Progress>,
}

/// How a restore went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Restored {
    /// Blocks that are there now, from the first on.
    pub blocks: usize,
    /// Of those, loaded.
    pub loaded: usize,
    /// Of those, computed.
    pub computed: usize,
}

impl Restore {
    /// Blocks that are stored, from the first of a sequence on; of each, whether it is in memory.
    pub fn new(planner: Arc<Planner>, options: RestoreOptions, memory: Vec<bool>) -> Restore {
        let end = memory.len();
        let progress = Progress {
            computed: 0,
            computing: 0,
            loading: end,
            loaded: end,
            end,
            load_since: 0.0,
            by_load: 0,
        };
        let block_tokens = options.block_tokens.max(1);
        let options = RestoreOptions { block_tokens, load_blocks: options.load_blocks.max(1), ..options };
        Restore { planner, options, memory, progress: Mutex::new(progress) }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tokens(&self, block: usize) -> u64 {
        block as u64 * u64::from(self.options.block_tokens)
    }

    /// Seconds to load blocks, as one would with nothing else to do.
    fn load_seconds(&self, costs: &Costs, blocks: Range<usize>) -> Option<f64> {
        let memory = self.memory.get(blocks.clone())?.iter().filter(|memory| **memory).count();
        let bytes = |blocks: usize| blocks as u64 * self.options.block_bytes;
        let drive = blocks.len() - memory;
        Some(costs.load(From::Memory, bytes(memory))? + costs.load(From::Drive, bytes(drive))?)
    }

    /// The block up to which computing should come: there, loading what is behind it takes as long. `busy`: seconds that the loader needs for
    /// what it has begun.
    fn meeting(&self, costs: &Costs, from: usize, to: usize, busy: f64) -> Option<usize> {
        let (mut low, mut high) = (from, to);
        while low < high {
            // Whether computing one block more would still be over before loading the rest.
            let middle = low + (high - low).div_ceil(2);
            let compute = costs.compute(self.tokens(from), self.tokens(middle))?;
            let load = busy + self.load_seconds(costs, middle..to)?;
            if compute <= load {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Some(low)
    }

    /// What to compute next, from the head on. `now`: seconds on the caller's clock.
    pub fn next_compute(&self, now: f64) -> Step {
        let costs = self.planner.costs();
        let mut progress = self.progress();
        let (from, to) = (progress.computing, progress.loading.min(progress.end));
        let under_way = progress.loading < progress.loaded.min(progress.end);
        if from >= to || !self.options.compute {
            let waiting = under_way || (from < to && self.options.load);
            return if waiting { Step::Wait } else { Step::Done };
        }
        let most = (self.options.chunk_tokens / self.options.block_tokens).max(1) as usize;
        let busy = match under_way {
            true => {
                let all = self.load_seconds(&costs, progress.loading..progress.loaded);
                all.map(|all| (all - (now - progress.load_since)).max(0.0))
            }
            false => Some(0.0),
        };
        let alone = costs.compute(self.tokens(from), self.tokens(to));
        let blocks = match (self.options.load, busy) {
            (false, _) => to - from,
            (true, Some(busy)) => match (alone, self.meeting(&costs, from, to, busy)) {
                (Some(_), Some(meeting)) => {
                    let wanted = meeting - from;
                    let seconds = costs.compute(self.tokens(from), self.tokens(meeting)).unwrap_or(0.0);
                    let launch = costs.compute.coefficients.map_or(0.0, |c| c[0]);
                    if wanted == 0 {
                        return Step::Wait;
                    }
                    match seconds <= LAUNCHES * launch {
                        true => wanted,
                        false => ((wanted as f64 * SHARE).ceil() as usize).max(1),
                    }
                }
                // Nothing was computed yet: a probe.
                _ => most.min(256u32.div_ceil(self.options.block_tokens) as usize),
            },
            // Nothing was loaded yet: as much as was computed before, and a probe at first.
            (true, None) => progress.computed.max(256u32.div_ceil(self.options.block_tokens) as usize),
        };
        let blocks = blocks.clamp(1, most).min(to - from);
        progress.computing = from + blocks;
        Step::Blocks(from..from + blocks)
    }

    /// What was given out last was computed, in so many seconds.
    pub fn computed(&self, seconds: f64) {
        let tokens = {
            let mut progress = self.progress();
            let tokens = self.tokens(progress.computed)..self.tokens(progress.computing);
            progress.computed = progress.computing;
            tokens
        };
        self.planner.computed(tokens, seconds);
    }

    /// What to load next, from the tail on.
    pub fn next_load(&self, now: f64) -> Step {
        let costs = self.planner.costs();
        let mut progress = self.progress();
        let (from, to) = (progress.computing, progress.loading);
        if !self.options.load || from >= to {
            return Step::Done;
        }
        let rest = to - from;
        let blocks = if !self.options.compute {
            rest
        } else {
            match self.load_seconds(&costs, from..to) {
                None => LOAD_FIRST,
                Some(all) => {
                    let one = all / rest as f64;
                    // The launch of a load is in each of them.
                    let least = self.load_seconds(&costs, to - 1..to).unwrap_or(one);
                    let share = match costs.compute(self.tokens(from), self.tokens(to)) {
                        // Together they are as fast as this.
                        Some(compute) => (all * compute / (all + compute)).min(all) * LOAD_SHARE,
                        None => all * LOAD_SHARE,
                    };
                    ((share.max(LOAD_LEAST).max(least) / one.max(1e-12)) as usize).max(1)
                }
            }
        };
        let blocks = blocks.min(self.options.load_blocks).min(rest).max(1);
        progress.loading = to - blocks;
        progress.load_since = now;
        Step::Blocks(to - blocks..to)
    }

    /// What was given out last was loaded, in so many seconds; `good` says of each block whether it is there.
    pub fn loaded(&self, good: &[bool], seconds: f64) {
        let (blocks, memory) = {
            let mut progress = self.progress();
            let blocks = progress.loading..progress.loaded.min(progress.end);
            let bad = blocks.clone().find(|block| good.get(block - progress.loading) != Some(&true));
            if let Some(bad) = bad {
                // What is behind it would be right, but has to be reached by computing now: the simple way.
                progress.end = bad;
                progress.by_load = 0;
            }
            let came = progress.loading..progress.end.min(blocks.end);
            progress.by_load += came.len();
            progress.loaded = progress.loading;
            let memory = self.memory.get(blocks.clone()).unwrap_or_default();
            (blocks.len(), memory.iter().filter(|memory| **memory).count())
        };
        // A mix tells neither.
        let bytes = blocks as u64 * self.options.block_bytes;
        if memory == blocks {
            self.planner.loaded(From::Memory, bytes, seconds);
        } else if memory == 0 {
            self.planner.loaded(From::Drive, bytes, seconds);
        }
    }

    /// How far it is; of a restore that is over, how it went.
    pub fn restored(&self) -> Restored {
        let progress = self.progress();
        let met = progress.computed >= progress.loaded.min(progress.end);
        let blocks = if met { progress.end.max(progress.computed) } else { progress.computed };
        Restored {
            blocks,
            loaded: if met { progress.by_load } else { 0 },
            computed: progress.computed.min(blocks),
        }
    }
}
