//! Signals, progress and deadlines of a transfer that runs without the interpreter.

use std::time::{Duration, Instant};

use gpudirect::{Control, Priority};
use pyo3::prelude::*;

use crate::error::{IntoPy, invalid};

/// How often signals are looked for and progress is told.
const POLL: Duration = Duration::from_millis(40);

/// Seconds from now as a point in time.
pub fn deadline(seconds: Option<f64>) -> PyResult<Option<Instant>> {
    let Some(seconds) = seconds else { return Ok(None) };
    Duration::try_from_secs_f64(seconds)
        .ok()
        .and_then(|time| Instant::now().checked_add(time))
        .map(Some)
        .ok_or_else(|| invalid(format!("deadline={seconds}: seconds from now, 0 or more")))
}

/// Runs a transfer without the interpreter. Ctrl-C and an exception of `progress` end it and are raised.
pub fn watched<T: Send>(
    py: Python<'_>,
    progress: Option<&Py<PyAny>>,
    deadline: Option<Instant>,
    priority: Priority,
    run: impl FnOnce(&mut Control<'_>) -> gpudirect::Result<T> + Send,
) -> PyResult<T> {
    // Made once, with the interpreter held: a fork by Python then never meets it half made by another thread, which a child would
    // wait for for ever.
    gpudirect::Paths::here();
    let mut raised: Option<PyErr> = None;
    let mut told = None;
    let result = py.detach(|| {
        let mut next = Instant::now();
        let mut look = |done: u64, total: u64| {
            if raised.is_some() {
                return false;
            }
            if Instant::now() < next {
                return true;
            }
            let looked = Python::attach(|py| {
                py.check_signals()?;
                if let Some(progress) = progress {
                    progress.call1(py, (done, total))?;
                }
                PyResult::Ok(())
            });
            next = Instant::now() + POLL;
            told = Some((done, total));
            raised = looked.err();
            raised.is_none()
        };
        run(&mut Control { progress: Some(&mut look), deadline, priority, ..Control::default() })
    });
    if let Some(error) = raised {
        return Err(error);
    }
    let value = result.py()?;
    if let (Some(progress), Some((done, total))) = (progress, told)
        && done < total
    {
        progress.call1(py, (total, total))?;
    }
    Ok(value)
}
