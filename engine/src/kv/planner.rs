//! Compute or load: a prefix that is stored comes back fastest when its head is computed while its tail is loaded.
//!
//! ```text
//! block     0                 computed        loading           end
//!           |--- computed --->|=== next ===>| |<=== next ===|<--- loaded ---|        where the two meet, all of the prefix is there
//! ```
//!
//! A [`Planner`] keeps what computing and loading cost, as measured lately, by one model each: computing tokens `a..b` takes
//! `c0 + c1 * (b - a) + c2 * (b² - a²) / 2` (a launch, the layers, the attention to what is before), loading `n` bytes takes `l0 + l1 * n`, apart for memory and the drive.
//! A [`Restore`] is one prefix on its way: whoever computes and whoever loads ask it what to do next, and tell what it took. It gives each no more
//! than what the other would not have had done sooner, so that neither waits long for the other at the end. Several may load at once, so that a drive has
//! the next piece before the last one is over; of the time in which several load, each is taken to have had an equal part.
//!
//! No clock here: seconds come from the caller.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much an older measurement counts against the next one.
const FADE: f64 = 0.85;
/// Of what computing would still have to do, as much is given out at once; the rest is planned again with what was learned. Large, since attention in one
/// piece is faster than in two: kernels for tokens behind others, which need a mask, take up to twice as long.
const SHARE: f64 = 0.9;
/// Nothing is computed where all of it would be loaded in little more time than both together take, and the other way round: kernels that compute and
/// kernels that put blocks into their places share a device, and each is slower then than it is alone.
const WORTH: f64 = 0.85;
/// Work that takes less than so many launches is given out at once.
const LAUNCHES: f64 = 8.0;
/// Seconds that a load may take in any case,
const LOAD_LEAST: f64 = 0.004;
/// and that it may take where that is at most this part of all that is left. Where launching costs nothing, since the next load is under way
/// meanwhile, a drive still is fast only with much to do.
const LOAD_DEEP: f64 = 0.016;
const LOAD_PART: f64 = 1.0 / 16.0;
/// One load of so many is of another size.
const LOAD_OTHER: usize = 8;
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

    /// The best of all subsets of terms whose coefficients are not negative: there are at most seven. Where several explain as much, as
    /// after a first measurement, those with the second term, which is in proportion to the work, go first: were all of the time thought
    /// to be launching, more work would look free, and be given out without end.
    fn solve(&self) -> Option<[f64; N]> {
        let mut best: Option<(f64, [f64; N])> = None;
        for set in [2u32, 1, 3, 6, 4, 5, 7].into_iter().filter(|set| *set < 1 << N) {
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
                let above = rows[column].clone();
                for (value, above) in rows[row].iter_mut().zip(&above).skip(column) {
                    *value -= factor * above;
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

    /// Seconds that a piece of computing takes whatever its size; 0 while that is not known.
    fn compute_launch(&self) -> f64 {
        self.compute.coefficients.map_or(0.0, |[launch, ..]| launch)
    }

    /// What is known of one place stands in for the other: a guess, until that is measured.
    fn load_terms(&self, from: From) -> Option<[f64; 2]> {
        let (memory, drive) = (self.memory.coefficients, self.drive.coefficients);
        match from {
            From::Memory => memory.or(drive),
            From::Drive => drive.or(memory),
        }
    }

    fn load(&self, from: From, bytes: u64) -> Option<f64> {
        if bytes == 0 {
            return Some(0.0);
        }
        let [launch, byte] = self.load_terms(from)?;
        Some(launch + byte * bytes as f64)
    }

    /// Seconds that a load takes whatever its size; 0 while that is not known.
    fn load_launch(&self, from: From) -> f64 {
        self.load_terms(from).map_or(0.0, |[launch, _]| launch)
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
    /// Loads that were begun.
    loads: usize,
    /// Those that are not over, the first one first.
    under_way: Vec<Load>,
    /// When a load began or was over last.
    shared_until: f64,
    /// When what is being computed began.
    compute_began: f64,
    /// Whether loads are of use.
    worth: bool,
    /// Those that were over before one that was begun sooner.
    over: Vec<Range<usize>>,
    /// Blocks that were loaded.
    by_load: usize,
}

#[derive(Clone, Debug)]
struct Load {
    blocks: Range<usize>,
    /// Seconds that it had of the drive, or of the bus.
    had: f64,
}

impl Progress {
    /// What was under way until now had equal parts of the time: several that share a drive get on together, and one that is over right after another
    /// was not as fast as that looks.
    fn share(&mut self, now: f64) {
        let part = (now - self.shared_until).max(0.0) / self.under_way.len().max(1) as f64;
        self.under_way.iter_mut().for_each(|load| load.had += part);
        self.shared_until = self.shared_until.max(now);
    }
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
            loads: 0,
            under_way: Vec::new(),
            shared_until: 0.0,
            compute_began: 0.0,
            worth: true,
            over: Vec::new(),
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

    fn from(&self, block: usize) -> From {
        if self.memory.get(block) == Some(&true) { From::Memory } else { From::Drive }
    }

    /// Seconds to load blocks, as one would with nothing else to do.
    fn load_seconds(&self, costs: &Costs, blocks: Range<usize>) -> Option<f64> {
        let memory = self.memory.get(blocks.clone())?.iter().filter(|memory| **memory).count();
        let bytes = |blocks: usize| blocks as u64 * self.options.block_bytes;
        let drive = blocks.len() - memory;
        Some(costs.load(From::Memory, bytes(memory))? + costs.load(From::Drive, bytes(drive))?)
    }

    /// Seconds to compute blocks, in as many pieces as it takes.
    fn compute_seconds(&self, costs: &Costs, blocks: Range<usize>) -> Option<f64> {
        let tokens = self.tokens(blocks.start)..self.tokens(blocks.end);
        let more = (tokens.end - tokens.start)
            .div_ceil(u64::from(self.options.chunk_tokens.max(1)))
            .saturating_sub(1);
        Some(costs.compute(tokens.start, tokens.end)? + more as f64 * costs.compute_launch())
    }

    /// Seconds until all of `blocks` is there, where computing comes up to the block `meeting` and the rest is loaded meanwhile. `busy`: as in
    /// [`meeting`](Self::meeting).
    fn both_seconds(&self, costs: &Costs, blocks: Range<usize>, meeting: usize, busy: f64) -> Option<f64> {
        let compute = self.compute_seconds(costs, blocks.start..meeting)?;
        Some(compute.max(busy + self.load_seconds(costs, meeting..blocks.end)?))
    }

    /// The block up to which computing should come: there, loading what is behind it takes as long. `busy`: seconds that the loader needs for
    /// what it has begun.
    fn meeting(&self, costs: &Costs, from: usize, to: usize, busy: f64) -> Option<usize> {
        let (mut low, mut high) = (from, to);
        while low < high {
            // Whether computing one block more would still be over before loading the rest.
            let middle = low + (high - low).div_ceil(2);
            let compute = self.compute_seconds(costs, from..middle)?;
            let load = busy + self.load_seconds(costs, middle..to)?;
            if compute <= load {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Some(low)
    }

    /// Whether loading all of a prefix, of which nothing was computed yet, takes hardly longer than where computing comes up to the block `meeting`.
    /// `busy`: as in [`meeting`](Self::meeting).
    fn hardly_shorter(&self, costs: &Costs, to: usize, meeting: usize, busy: f64) -> bool {
        let both = self.both_seconds(costs, 0..to, meeting, busy);
        let load = self.both_seconds(costs, 0..to, 0, busy);
        both.zip(load).is_some_and(|(both, load)| both > WORTH * load)
    }

    /// What to compute next, from the head on. `now`: seconds on the caller's clock.
    pub fn next_compute(&self, now: f64) -> Step {
        let costs = self.planner.costs();
        let mut progress = self.progress();
        let (from, to) = (progress.computing, progress.loading.min(progress.end));
        let under_way = progress.under_way.iter().any(|load| load.blocks.start < progress.end);
        let loads_on = self.options.load && progress.worth;
        if from >= to || !self.options.compute {
            let waiting = under_way || (from < to && loads_on);
            return if waiting { Step::Wait } else { Step::Done };
        }
        let most = (self.options.chunk_tokens / self.options.block_tokens).max(1) as usize;
        let busy = self.load_busy(&costs, &progress, now);
        let blocks = match (loads_on, busy) {
            (false, _) => to - from,
            (true, Some(busy)) => match self.meeting(&costs, from, to, busy) {
                Some(meeting) => {
                    let wanted = meeting - from;
                    let seconds = self.compute_seconds(&costs, from..meeting).unwrap_or(0.0);
                    if wanted == 0 || (from == 0 && self.hardly_shorter(&costs, to, meeting, busy)) {
                        return Step::Wait;
                    }
                    match seconds <= LAUNCHES * costs.compute_launch() {
                        true => wanted,
                        false => ((wanted as f64 * SHARE).ceil() as usize).max(1),
                    }
                }
                // Nothing was computed yet: a probe.
                None => most.min(256u32.div_ceil(self.options.block_tokens) as usize),
            },
            // Nothing was loaded yet: as much as was computed before, and a probe at first.
            (true, None) => progress.computed.max(256u32.div_ceil(self.options.block_tokens) as usize),
        };
        let blocks = blocks.clamp(1, most).min(to - from);
        progress.computing = from + blocks;
        progress.compute_began = now;
        Step::Blocks(from..from + blocks)
    }

    /// Seconds that the loads under way still take, together.
    fn load_busy(&self, costs: &Costs, progress: &Progress, now: f64) -> Option<f64> {
        let all = progress.under_way.iter().map(|load| self.load_seconds(costs, load.blocks.clone()));
        let had: f64 = progress.under_way.iter().map(|load| load.had).sum();
        let since = if progress.under_way.is_empty() { 0.0 } else { (now - progress.shared_until).max(0.0) };
        all.sum::<Option<f64>>().map(|all| (all - had - since).max(0.0))
    }

    /// Blocks that are left for loading by the time computing comes there; `None`: not known yet.
    fn left_to_load(&self, costs: &Costs, progress: &Progress, now: f64) -> Option<usize> {
        let (from, to) = (progress.computing, progress.loading);
        let computing = self.compute_seconds(costs, progress.computed..from)?;
        let computing =
            if from > progress.computed { computing - (now - progress.compute_began) } else { 0.0 };
        // As if the loader had so much less to do.
        let ahead = self.load_busy(costs, progress, now)? - computing.max(0.0);
        Some(to - self.meeting(costs, from, to, ahead)?)
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
        if !self.options.load || from >= to || !progress.worth {
            return Step::Done;
        }
        let rest = to - from;
        let left = if self.options.compute { self.left_to_load(&costs, &progress, now) } else { None };
        // As `next_compute` sees it.
        let alone = from == 0
            && left
                .zip(self.load_busy(&costs, &progress, now))
                .is_some_and(|(left, busy)| self.hardly_shorter(&costs, to, to - left, busy));
        let blocks = if !self.options.compute || alone {
            rest
        } else {
            match self.load_seconds(&costs, from..to) {
                None => LOAD_FIRST,
                Some(all) => {
                    let launch = costs.load_launch(self.from(to - 1));
                    let one = (all - launch).max(0.0) / rest as f64;
                    // In pieces of `t` seconds, launching costs `all * launch / t` more, and computing waits about `t` at the end, in which
                    // it would have come as far as loading in `t * all / compute`. The sum is least here.
                    let least =
                        self.compute_seconds(&costs, from..to).map_or(0.0, |all| (launch * all).sqrt());
                    let least = least.max(LOAD_LEAST).max(LOAD_DEEP.min(all * LOAD_PART));
                    let of = |seconds: f64| (seconds / one.max(1e-12)) as usize;
                    // Of what computing leaves, half: the rest is planned again with what was learned.
                    let most = left.map_or(rest, |left| left.div_ceil(2).max(of(LOAD_LEAST)));
                    let blocks = of(least).min(self.options.load_blocks).min(most);
                    // Loads of one size do not tell what of their time is launching.
                    match blocks {
                        blocks if progress.loads % LOAD_OTHER != 1 => blocks,
                        0..=2 => blocks + 2,
                        _ => blocks / 2,
                    }
                }
            }
        };
        let mut blocks = blocks.min(self.options.load_blocks).min(rest).max(1);
        if let Some(left) = left
            && progress.loads == 0
        {
            let both = self.both_seconds(&costs, 0..to, to - left, 0.0);
            let compute = self.compute_seconds(&costs, 0..to);
            if both.zip(compute).is_some_and(|(both, compute)| both > WORTH * compute) {
                // One small piece: what is not measured is never found to have become faster.
                progress.worth = false;
                let one = self.load_seconds(&costs, to - blocks..to).unwrap_or(0.0) / blocks as f64;
                blocks = blocks.min((LOAD_DEEP / one.max(1e-12)) as usize).max(1);
            }
        }
        progress.share(now);
        progress.loading = to - blocks;
        progress.loads += 1;
        progress.under_way.push(Load { blocks: to - blocks..to, had: 0.0 });
        Step::Blocks(to - blocks..to)
    }

    /// The load that was given out with `first` as its first block is over; `good` says of each of its blocks whether it is there. Nothing
    /// happens where no such load is under way.
    pub fn loaded(&self, first: usize, good: &[bool], now: f64) {
        let mut progress = self.progress();
        let Some(at) = progress.under_way.iter().position(|load| load.blocks.start == first) else {
            return;
        };
        progress.share(now);
        let Load { blocks, had } = progress.under_way.remove(at);
        let bad = blocks.clone().find(|block| good.get(block - first) != Some(&true));
        if let Some(bad) = bad {
            // What is behind it would be right, but has to be reached by computing now: the simple way.
            let end = progress.end.min(bad);
            progress.end = end;
            progress.loaded = progress.loaded.min(end);
            progress.by_load = 0;
            progress.over.retain(|blocks| blocks.start < end);
        }
        progress.over.push(blocks.clone());
        // Together with those that came before their turn.
        while let Some(next) = progress.over.iter().position(|blocks| blocks.end >= progress.loaded) {
            let next = progress.over.remove(next);
            progress.by_load += progress.loaded.min(next.end).saturating_sub(next.start);
            progress.loaded = progress.loaded.min(next.start);
        }
        drop(progress);
        let from = self.from(blocks.start);
        // A mix tells neither.
        if blocks.clone().all(|block| self.from(block) == from) {
            self.planner.loaded(from, blocks.len() as u64 * self.options.block_bytes, had);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a machine really needs: seconds.
    #[derive(Clone, Copy, Debug)]
    struct Machine {
        launch: f64,
        token: f64,
        /// For each token before a token.
        attention: f64,
        load: f64,
        byte: f64,
    }

    const TOKENS: u32 = 16;
    const BYTES: u64 = 2 << 20;

    impl Machine {
        fn compute(&self, from: usize, to: usize) -> f64 {
            let (a, b) = ((from * TOKENS as usize) as f64, (to * TOKENS as usize) as f64);
            self.launch + self.token * (b - a) + self.attention * (b * b - a * a) / 2.0
        }

        fn load(&self, blocks: usize) -> f64 {
            self.load + self.byte * (blocks as u64 * BYTES) as f64
        }

        /// In pieces as large as a restore would take, each alone.
        fn alone(&self, blocks: usize, chunk: usize) -> (f64, f64) {
            let starts = (0..blocks).step_by(chunk);
            let compute = starts.map(|start| self.compute(start, (start + chunk).min(blocks))).sum();
            let loads = (0..blocks).step_by(32);
            (compute, loads.map(|start| self.load((blocks - start).min(32))).sum())
        }
    }

    fn options(compute: bool, load: bool) -> RestoreOptions {
        RestoreOptions {
            block_tokens: TOKENS,
            block_bytes: BYTES,
            compute,
            load,
            chunk_tokens: 2048,
            load_blocks: 32,
        }
    }

    /// Runs a restore on a simulated clock: one that computes and two that load beside it, from a drive that gives each an equal part of its time. `bad`: a
    /// block that cannot be loaded. Every block must be given out to one of them exactly once.
    fn run(
        machine: &Machine,
        planner: &Arc<Planner>,
        options: RestoreOptions,
        blocks: usize,
        bad: Option<usize>,
    ) -> (f64, Restored) {
        let restore = Restore::new(planner.clone(), options, vec![false; blocks]);
        let mut given = vec![0; blocks];
        let mut now = 0.0f64;
        // When each is through with what it does, and what that is.
        let mut computing: Option<(f64, f64)> = None;
        let mut loading: Vec<(f64, Range<usize>)> = Vec::new();
        for _ in 0..100_000 {
            while loading.len() < 2
                && let Step::Blocks(range) = restore.next_load(now)
            {
                range.clone().for_each(|block| given[block] += 1);
                loading.push((machine.load(range.len()), range));
            }
            let mut done = false;
            if computing.is_none() {
                match restore.next_compute(now) {
                    Step::Blocks(range) => {
                        range.clone().for_each(|block| given[block] += 1);
                        let seconds = machine.compute(range.start, range.end);
                        computing = Some((now + seconds, seconds));
                    }
                    Step::Done => done = true,
                    Step::Wait => assert!(!loading.is_empty(), "waits for nobody: {restore:?}"),
                }
            }
            if done && computing.is_none() {
                // A load under way, if any, is of blocks behind one that is lost.
                assert!(given.iter().all(|times| *times <= 1));
                return (now, restore.restored());
            }
            let least = loading.iter().map(|load| load.0).fold(f64::INFINITY, f64::min);
            let next_load = now + least * loading.len() as f64;
            let next_compute = computing.map_or(f64::INFINITY, |compute| compute.0);
            let part = if next_load <= next_compute {
                least
            } else {
                (next_compute - now) / loading.len().max(1) as f64
            };
            loading.iter_mut().for_each(|load| load.0 -= part);
            now = next_load.min(next_compute);
            if let Some((end, seconds)) = computing
                && end <= now
            {
                restore.computed(seconds);
                computing = None;
            }
            while let Some(over) = loading.iter().position(|load| load.0 <= 1e-12) {
                let (_, range) = loading.remove(over);
                let good: Vec<bool> = range.clone().map(|block| Some(block) != bad).collect();
                restore.loaded(range.start, &good, now);
            }
        }
        panic!("a restore has no end: {restore:?}");
    }

    #[test]
    fn a_fit_finds_what_is_there() {
        let planner = Planner::new();
        let machine = Machine { launch: 0.02, token: 3e-5, attention: 1e-9, load: 2e-4, byte: 1.0 / 2e9 };
        assert_eq!(planner.compute_seconds(0..100), None);
        for (from, to) in [(0, 16), (16, 80), (80, 96), (96, 300), (300, 316), (0, 128), (128, 600)] {
            planner.computed(from as u64 * 16..to as u64 * 16, machine.compute(from, to));
        }
        for (from, to) in [(0, 1), (0, 2000), (1000, 1100)] {
            let found = planner.compute_seconds(from as u64 * 16..to as u64 * 16).unwrap();
            let real = machine.compute(from, to);
            assert!((found / real - 1.0).abs() < 0.02, "{from}..{to}: {found} for {real}");
        }
        for blocks in [1, 8, 2, 32, 5] {
            planner.loaded(From::Drive, blocks as u64 * BYTES, machine.load(blocks));
        }
        let found = planner.load_seconds(From::Drive, 100 * BYTES).unwrap();
        assert!((found / machine.load(100) - 1.0).abs() < 0.02);
        // Nothing of memory was measured: the drive stands in.
        assert_eq!(planner.load_seconds(From::Memory, 100 * BYTES), Some(found));
        planner.loaded(From::Memory, 64 * BYTES, 0.001);
        assert!(planner.load_seconds(From::Memory, 64 * BYTES).unwrap() < 0.0011);
    }

    #[test]
    fn measurements_that_cannot_be_are_passed_over() {
        let planner = Planner::new();
        for seconds in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            planner.computed(0..100, seconds);
            planner.loaded(From::Drive, 100, seconds);
        }
        planner.computed(100..100, 1.0);
        planner.loaded(From::Drive, 0, 1.0);
        assert_eq!((planner.compute_seconds(0..1), planner.load_seconds(From::Drive, 1)), (None, None));
    }

    #[test]
    fn two_that_are_as_fast_take_little_more_than_half() {
        // 32k tokens of a model of 8 billion weights, computed in 1.4 s, and a drive that takes as long.
        let machine =
            Machine { launch: 0.02, token: 2.7e-5, attention: 7e-10, load: 2e-4, byte: 1.0 / 3.0e9 };
        let planner = Arc::new(Planner::new());
        let blocks = 2048;
        let (compute, load) = machine.alone(blocks, 128);
        run(&machine, &planner, options(true, true), blocks, None);
        let (both, restored) = run(&machine, &planner, options(true, true), blocks, None);
        assert_eq!(restored.blocks, blocks);
        assert!(restored.loaded > 500 && restored.computed > 500, "{restored:?}");
        assert!(both <= 0.75 * compute.min(load), "{both} for {compute} and {load}");
    }

    #[test]
    fn a_drive_of_a_third_of_the_speed_helps() {
        // 32k tokens of a model of 3 billion weights, computed in 0.73 s, and loaded in 2.15 s; both at once, without any loss: 0.54 s.
        let machine =
            Machine { launch: 0.03, token: 1.3e-5, attention: 5.2e-10, load: 2e-3, byte: 1.0 / 2e9 };
        let planner = Arc::new(Planner::new());
        let options = RestoreOptions { chunk_tokens: 32768, load_blocks: 128, ..options(true, true) };
        run(&machine, &planner, options, 2048, None);
        for round in 0..4 {
            let (both, restored) = run(&machine, &planner, options, 2048, None);
            assert!(restored.loaded > 300 && restored.computed > 1000, "{restored:?}");
            assert!(both <= 0.82 * machine.compute(0, 2048), "{both} in round {round}");
        }
    }

    /// Once costs are known, both together are never worse than the better one alone but for a twentieth and for what one step takes.
    fn never_worse(machine: &Machine, blocks: usize) {
        let planner = Arc::new(Planner::new());
        for _ in 0..3 {
            run(machine, &planner, options(true, true), blocks, None);
        }
        let (both, restored) = run(machine, &planner, options(true, true), blocks, None);
        assert_eq!(restored.blocks, blocks);
        assert_eq!(restored.loaded + restored.computed, blocks);
        let (compute, loads) = machine.alone(blocks, 128);
        let step = machine.load(4) + machine.launch;
        assert!(both <= 1.05 * compute.min(loads) + step, "{both} for {compute} and {loads}: {machine:?}");
    }

    #[test]
    fn what_was_worse_once_is_not_again() {
        // All that was known came from loads of one size, or one piece of computing: what of it was launching could not be told.
        let machine = Machine { launch: 5e-4, token: 8.86e-4, attention: 0.0, load: 1.51e-3, byte: 1.36e-10 };
        never_worse(&machine, 43);
        let machine =
            Machine { launch: 2e-3, token: 7.63e-4, attention: 8.78e-9, load: 1.88e-3, byte: 1.04e-10 };
        never_worse(&machine, 1683);
        let machine = Machine { launch: 0.04, token: 9.2e-4, attention: 0.0, load: 1.33e-3, byte: 9.68e-10 };
        never_worse(&machine, 101);
        let machine = Machine { launch: 0.0376, token: 4.66e-4, attention: 0.0, load: 5.4e-4, byte: 4e-11 };
        never_worse(&machine, 1856);
        // Launching is half of a load: each piece that is smaller than it could be is felt.
        let machine =
            Machine { launch: 5e-4, token: 3.07e-4, attention: 0.0, load: 1.676e-3, byte: 3.64e-11 };
        never_worse(&machine, 1906);
        let machine =
            Machine { launch: 8.2e-4, token: 5.76e-4, attention: 2.2e-9, load: 1.79e-3, byte: 5.364e-10 };
        never_worse(&machine, 27);
    }

    #[test]
    fn what_computing_would_hardly_shorten_is_loaded() {
        let mut machine =
            Machine { launch: 0.01, token: 3e-5, attention: 7e-10, load: 5e-4, byte: 1.0 / 5e10 };
        let planner = Arc::new(Planner::new());
        run(&machine, &planner, options(true, true), 2048, None);
        let (_, restored) = run(&machine, &planner, options(true, true), 2048, None);
        assert_eq!(restored, Restored { blocks: 2048, loaded: 2048, computed: 0 });
        // What becomes slower is seen, and both work again.
        machine.byte = 1.0 / 3e9;
        for _ in 0..2 {
            run(&machine, &planner, options(true, true), 2048, None);
        }
        let (_, restored) = run(&machine, &planner, options(true, true), 2048, None);
        assert!(restored.computed > 500, "{restored:?}");
    }

    #[test]
    fn one_alone_does_all_where_that_is_wanted() {
        let machine = Machine { launch: 0.02, token: 3e-5, attention: 1e-9, load: 2e-4, byte: 1.0 / 2e9 };
        let planner = Arc::new(Planner::new());
        let (_, restored) = run(&machine, &planner, options(true, false), 100, None);
        assert_eq!(restored, Restored { blocks: 100, loaded: 0, computed: 100 });
        let (_, restored) = run(&machine, &planner, options(false, true), 100, None);
        assert_eq!(restored, Restored { blocks: 100, loaded: 100, computed: 0 });
        let (_, restored) = run(&machine, &planner, options(false, true), 100, Some(40));
        assert_eq!(restored, Restored { blocks: 40, loaded: 40, computed: 0 });
        let (_, restored) = run(&machine, &planner, options(true, true), 0, None);
        assert_eq!(restored.blocks, 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        #[test]
        fn both_are_never_worse_than_the_better(
            launch in 0.0005f64..0.05,
            token in 1e-6f64..1e-3,
            attention in 0f64..1e-8,
            load in 1e-5f64..2e-3,
            rate in 1e8f64..3e10,
            blocks in 1usize..3000,
        ) {
            never_worse(&Machine { launch, token, attention, load, byte: 1.0 / rate }, blocks);
        }

        /// A block that cannot be loaded costs no other block before it, and nothing is given out twice, also before anything is known.
        #[test]
        fn a_lost_block_ends_the_prefix_or_is_computed(
            token in 1e-6f64..1e-3,
            rate in 1e8f64..3e10,
            blocks in 1usize..500,
            bad in 0usize..500,
        ) {
            let machine = Machine { launch: 0.01, token, attention: 1e-9, load: 1e-4, byte: 1.0 / rate };
            let planner = Arc::new(Planner::new());
            let (_, restored) = run(&machine, &planner, options(true, true), blocks, Some(bad));
            prop_assert_eq!(restored.loaded + restored.computed, restored.blocks);
            prop_assert!(restored.blocks == blocks || restored.blocks >= bad.min(blocks), "{:?}", restored);
        }
    }
}
