//! SIGINT and SIGTERM as a flag that every loop looks at, so that a command ends by its own clean-up.
//!
//! The first signal asks; the second one ends the process at once with code 130, for people in a hurry.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::failure::{Failure, Outcome, code};

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Installs the handlers. Called once, before any work.
pub fn install() -> std::io::Result<()> {
    let flag = FLAG.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        // Order matters: the shutdown looks at the flag before this same signal sets it.
        signal_hook::flag::register_conditional_shutdown(signal, code::INTERRUPTED.into(), Arc::clone(flag))?;
        signal_hook::flag::register(signal, Arc::clone(flag))?;
    }
    Ok(())
}

/// True once a signal came.
pub fn requested() -> bool {
    FLAG.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// Fails with exit code 130 once a signal came.
pub fn check() -> Outcome {
    if requested() { Err(Failure::interrupted()) } else { Ok(()) }
}
