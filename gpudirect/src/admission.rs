//! Which loads of this process go first.
//!
//! A background load (a prefetch) starts no reads while a foreground load runs: what it has under way ends, and it waits. Its own
//! deadline and cancelling hold meanwhile. Loads of equal priority share the drive as it likes.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How a load stands to others of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// Somebody waits for it.
    #[default]
    Foreground,
    /// Nobody does yet: it lets others go first.
    Background,
}

/// How long one wait takes at most, so that whoever waits can be cancelled.
const POLL: Duration = Duration::from_millis(20);

/// Foreground loads that run.
static RUNNING: AtomicU32 = AtomicU32::new(0);
static ENDED: Condvar = Condvar::new();
static LOCK: Mutex<()> = Mutex::new(());

/// A load's place, from its first read to its last copy.
#[derive(Debug)]
pub(crate) struct Admission(Priority);

impl Admission {
    pub fn enter(priority: Priority) -> Admission {
        if priority == Priority::Foreground {
            RUNNING.fetch_add(1, Ordering::SeqCst);
        }
        Admission(priority)
    }

    /// Whether nothing new is to be started now.
    pub fn paused(&self) -> bool {
        self.0 == Priority::Background && RUNNING.load(Ordering::SeqCst) > 0
    }

    /// Waits a moment, or until a foreground load ended.
    pub fn wait(&self) {
        let held = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        if self.paused() {
            drop(ENDED.wait_timeout(held, POLL));
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if self.0 == Priority::Foreground && RUNNING.fetch_sub(1, Ordering::SeqCst) == 1 {
            // Under the lock, so that nobody misses it between looking and waiting; but it is not waited for: who does miss it looks
            // again soon, and in a child that was forked while another thread held it nobody would ever let it go.
            let _held = LOCK.try_lock();
            ENDED.notify_all();
        }
    }
}
