//! How a store is opened, and what it tells of itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Which blocks are written at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admission {
    /// All of them.
    #[default]
    Always,
    /// Those that were offered before, lately: a block that nobody comes back for costs no write. `remember` says how many offers are
    /// kept in mind (about 10 bytes each).
    SecondOffer {
        /// Offers kept in mind.
        remember: usize,
    },
}

/// What time it is, for expiry and for the write budget.
#[derive(Clone, Debug, Default)]
pub enum Clock {
    /// The system's.
    #[default]
    System,
    /// A number of seconds that somebody sets: for tests and simulations.
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// Seconds since the epoch.
    pub fn now(&self) -> u64 {
        match self {
            Clock::System => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            Clock::Manual(secs) => secs.load(Relaxed),
        }
    }
}

/// How a [`Store`](super::Store) is opened.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Its name within the pool: several stores may lie side by side. Default: `default`.
    pub name: String,
    /// Bytes that it may occupy, blocks and index together. Default: what it occupies already and half of what is free in the pool.
    pub budget_bytes: Option<u64>,
    /// Most time between a put that is acknowledged and its being durable, where the drive flushes within half of it; while a commit is late,
    /// no put is acknowledged. 0: nothing is made durable but by [`Store::flush`](super::Store::flush) and where room is needed.
    /// Default: 50 ms.
    pub window: Duration,
    /// Of every operation of a drive. Default: 5 s.
    pub deadline: Duration,
    /// Operations in flight of a [`Lane`](super::Lane). Default: 32.
    pub depth: u32,
    /// Which blocks are written. Default: all.
    pub admission: Admission,
    /// How long blocks live. Default: until they are evicted.
    pub ttl: Option<Duration>,
    /// Bytes of blocks that may be written in a day (UTC); beyond, puts are refused until the next. Default: no limit.
    pub write_bytes_per_day: Option<u64>,
    /// Quotas of tenants by name, set as it is opened, see [`Store::set_quota`](super::Store::set_quota); of others they stay as they are. Default: none.
    pub quotas: Vec<(String, u64)>,
    /// The quota of a tenant with a name who is new to the store; 0: no limit. Default: 0.
    pub tenant_quota: u64,
    /// Bytes of a slab. Default: a 64th of the budget, from 8 MiB to 1 GiB.
    pub slab_bytes: Option<u64>,
    /// Pages of 4 KiB that the log has at least for changes after a checkpoint. Default: 1024.
    pub log_pages: u64,
    /// Entries of the index that a checkpoint writes before commits have their turn. Default: 16,384, a MiB.
    pub checkpoint_step: u32,
    /// What time it is. Default: the system's.
    pub clock: Clock,
    /// The blocks are state that somebody relies on, not a cache: every block is pinned as it is put, none goes to make room, none is dropped
    /// because a drive did not answer, and a slab that cannot be opened is an error of the whole. Default: a cache.
    pub lasting: bool,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            name: "default".into(),
            budget_bytes: None,
            window: Duration::from_millis(50),
            deadline: Duration::from_secs(5),
            depth: 32,
            admission: Admission::default(),
            ttl: None,
            write_bytes_per_day: None,
            quotas: Vec::new(),
            tenant_quota: 0,
            slab_bytes: None,
            log_pages: 1024,
            checkpoint_step: 16 << 10,
            clock: Clock::default(),
            lasting: false,
        }
    }
}

/// How a store is opened by a process that may not own its pool: what goes over the control socket. Where the store is open already, its
/// options stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// See [`StoreOptions::name`].
    pub name: String,
    /// See [`StoreOptions::budget_bytes`].
    pub budget_bytes: Option<u64>,
    /// See [`StoreOptions::ttl`]; seconds, at least 1.
    pub ttl_secs: Option<u64>,
    /// See [`StoreOptions::write_bytes_per_day`].
    pub write_bytes_per_day: Option<u64>,
    /// See [`Admission::SecondOffer`]: offers kept in mind. `None`: all blocks are written.
    pub second_offer: Option<usize>,
    /// See [`StoreOptions::quotas`].
    #[serde(default)]
    pub quotas: Vec<(String, u64)>,
    /// See [`StoreOptions::tenant_quota`].
    #[serde(default)]
    pub tenant_quota: u64,
    /// See [`StoreOptions::deadline`]; milliseconds, at least 1.
    pub deadline_ms: u64,
    /// See [`StoreOptions::lasting`]. Such a store is made durable by [`Store::flush`](super::Store::flush) alone.
    pub lasting: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        let options = StoreOptions::default();
        Settings {
            name: options.name,
            budget_bytes: None,
            ttl_secs: None,
            write_bytes_per_day: None,
            second_offer: None,
            quotas: Vec::new(),
            tenant_quota: 0,
            deadline_ms: options.deadline.as_millis() as u64,
            lasting: false,
        }
    }
}

impl From<&Settings> for StoreOptions {
    fn from(settings: &Settings) -> StoreOptions {
        // Limits on what comes from a socket: a year of waiting, and 10 MB of offers.
        let deadline = Duration::from_millis(settings.deadline_ms.clamp(1, 365 * 86_400_000));
        StoreOptions {
            name: settings.name.clone(),
            budget_bytes: settings.budget_bytes,
            ttl: settings.ttl_secs.map(|secs| Duration::from_secs(secs.max(1))),
            write_bytes_per_day: settings.write_bytes_per_day,
            admission: match settings.second_offer {
                Some(remember) => Admission::SecondOffer { remember: remember.min(1 << 20) },
                None => Admission::Always,
            },
            quotas: settings.quotas.clone(),
            tenant_quota: settings.tenant_quota,
            deadline,
            window: if settings.lasting { Duration::ZERO } else { StoreOptions::default().window },
            lasting: settings.lasting,
            ..StoreOptions::default()
        }
    }
}

/// What a store holds, and what happened since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStat {
    /// Its name.
    pub name: String,
    /// Blocks.
    pub blocks: u64,
    /// Bytes of their slots.
    pub used_bytes: u64,
    /// Bytes of slabs and index together.
    pub allocated_bytes: u64,
    /// Bytes that it may occupy.
    pub budget_bytes: u64,
    /// Namespaces.
    pub namespaces: u64,
    /// Blocks that are pinned.
    pub pinned: u64,
    /// Blocks asked for and delivered.
    pub hits: u64,
    /// Blocks asked for and not delivered, for whatever reason.
    pub misses: u64,
    /// Blocks stored.
    pub puts: u64,
    /// Puts of what was there already.
    pub present: u64,
    /// Puts refused: not offered before.
    pub refused_admission: u64,
    /// Puts refused: the write budget of the day is spent.
    pub refused_budget: u64,
    /// Puts refused: over the tenant's quota, and nothing of his can go.
    pub refused_quota: u64,
    /// Puts refused: no room, and nothing can go.
    pub refused_space: u64,
    /// Blocks that made room.
    pub evictions: u64,
    /// Blocks whose time was over.
    pub expired: u64,
    /// Blocks that were not as they were put: dropped, and a miss.
    pub corrupt: u64,
    /// Reads that were made again.
    pub retried: u64,
    /// Operations that failed: a miss, or a put that did not happen.
    pub io_errors: u64,
    /// Of those, by the deadline.
    pub timeouts: u64,
    /// Slots out of use until the store is opened again.
    pub bad_slots: u64,
    /// Times that the index was made durable.
    pub commits: u64,
    /// Times that the index was written whole.
    pub checkpoints: u64,
    /// Pages of the index that could not be read at open.
    pub bad_index_pages: u64,
    /// Bytes of blocks written today (UTC).
    pub written_today_bytes: u64,
    /// Bytes of blocks written ever.
    pub written_bytes: u64,
    /// Bytes of blocks that may be written in a day (UTC), see [`StoreOptions::write_bytes_per_day`].
    #[serde(default)]
    pub write_bytes_per_day: Option<u64>,
    /// Why nothing can be stored any more; empty: it can.
    pub failed: String,
}

/// A namespace of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceInfo {
    /// Its number.
    pub id: u16,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// What its blocks belong to.
    pub fingerprint: Vec<u8>,
    /// Blocks.
    pub blocks: u64,
}

/// A tenant of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantInfo {
    /// His name; empty for who gave none.
    pub name: String,
    /// Bytes of slots that his blocks may have; 0: no limit.
    pub quota_bytes: u64,
    /// Bytes of slots that his blocks have.
    pub used_bytes: u64,
}
