//! Counting results of all suites in one shape.

use std::fmt;
use std::ops::AddAssign;

/// Numbers of test cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// What one suite gave.
#[derive(Debug, Default)]
pub struct Outcome {
    pub tally: Tally,
    /// Name of each failed case, with a line of explanation where there is one.
    pub failures: Vec<String>,
    /// `name: reason` of each skipped case.
    pub skips: Vec<String>,
}

impl Outcome {
    /// A whole suite that cannot run here counts as one skipped case.
    pub fn skipped(reason: impl Into<String>) -> Self {
        let mut outcome = Self::default();
        outcome.skip(reason);
        outcome
    }

    /// A suite that broke before or outside its cases counts as one failed case.
    pub fn broken(reason: impl Into<String>) -> Self {
        let mut outcome = Self::default();
        outcome.fail(reason);
        outcome
    }

    /// Adds one failed case.
    pub fn fail(&mut self, what: impl Into<String>) {
        self.tally.failed += 1;
        self.failures.push(what.into());
    }

    /// Adds one skipped case.
    pub fn skip(&mut self, why: impl Into<String>) {
        self.tally.skipped += 1;
        self.skips.push(why.into());
    }

    /// Adds the cases of another suite.
    pub fn absorb(&mut self, other: Self) {
        self.tally += other.tally;
        self.failures.extend(other.failures);
        self.skips.extend(other.skips);
    }
}
