//! Named checks, one after the other, in the words of libtest.

use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a check gives.
pub type Checked<T = ()> = Result<T, Box<dyn Error>>;

/// Says that a check cannot run, and why.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for Skip {}

/// Counts.
#[derive(Debug, Default)]
pub struct Report {
    filter: Option<String>,
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Report {
    /// Only checks whose name contains `filter` will run.
    pub fn new(program: &str, filter: Option<&str>) -> Report {
        println!("     Running {program} ({})", std::env::consts::ARCH);
        Report { filter: filter.map(str::to_owned), ..Report::default() }
    }

    /// Whether a check of that name is wanted.
    pub fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// Runs one; a panic in it is a failure as well.
    pub fn check(&mut self, name: &str, run: impl FnOnce() -> Checked) {
        if !self.wants(name) {
            return;
        }
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(())) => {
                self.passed += 1;
                println!("test {name} ... ok");
            }
            Ok(Err(error)) if error.is::<Skip>() => {
                self.skipped += 1;
                println!("test {name} ... ignored, {error}");
            }
            Ok(Err(error)) => {
                self.failed += 1;
                println!("  {}", chain(&*error));
                println!("test {name} ... FAILED");
            }
            Err(_) => {
                self.failed += 1;
                println!("test {name} ... FAILED");
            }
        }
    }

    /// Says that checks cannot run, whatever their names.
    pub fn skip(&mut self, name: &str, why: &str) {
        self.skipped += 1;
        println!("test {name} ... ignored, {why}");
    }

    /// The sums; false when a check failed.
    pub fn finish(self) -> bool {
        let word = if self.failed == 0 { "ok" } else { "FAILED" };
        println!(
            "test result: {word}. {} passed; {} failed; {} ignored",
            self.passed, self.failed, self.skipped
        );
        self.failed == 0
    }
}

/// An error with everything under it.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(&format!(": {error}"));
        next = error.source();
    }
    text
}

/// Fails with a message unless `fact` holds.
pub fn ensure(fact: bool, message: impl FnOnce() -> String) -> Checked {
    if fact { Ok(()) } else { Err(message().into()) }
}

/// Fails unless both are equal.
pub fn equal<T: PartialEq + fmt::Debug>(what: &str, got: T, want: T) -> Checked {
    ensure(got == want, || format!("{what}: {got:?}, expected {want:?}"))
}
