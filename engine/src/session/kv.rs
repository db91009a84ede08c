//! Orders to KV stores, whether this process owns the pool or another one does.

use std::fs::File;

use super::{Inner, Session};
use crate::error::Result;
use crate::kv::Key;
use crate::kv::admin::{self, Order, Report};

impl Session {
    /// Does something to a KV store of the pool. `keys` and `file`: see [`Order`]; a file that goes to another process has to be a regular one.
    /// `progress`: how many blocks were looked at; 0 where another process does it, about every two seconds.
    ///
    /// `NotFound`: there is no such store. `InvalidArgument`: the selection fits several namespaces and tenants.
    pub fn kv(
        &self,
        store: &str,
        order: &Order,
        keys: &[Key],
        file: Option<&File>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Report> {
        if !matches!(order, Order::Names | Order::Watch) {
            self.writable("open a KV store")?;
        }
        match &self.inner {
            Inner::Embedded { pool, .. } => admin::carry_out(pool, store, order, keys, file, progress),
            Inner::Remote(client) => client.kv(store, order, keys, file, progress),
        }
    }
}
