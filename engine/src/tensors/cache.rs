//! `Pool::tensors`: the index of a region's current content, parsed when first asked for and kept.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Format, TensorIndex, parse};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Pool;
use crate::types::{Access, Attr, NodeId, NodeKind, Timestamp};

/// What an index was made from. Size and time tell content apart that is still being written, the name decides the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    generation: u64,
    size: u64,
    mtime: Timestamp,
    format: Format,
}

/// Indexes that are kept, in bytes as [`weight`] guesses them. An index of 100,000 tensors is some 20 MB.
const BUDGET: usize = 64 << 20;

type Outcome = std::result::Result<Arc<TensorIndex>, (ErrorKind, String)>;

#[derive(Debug)]
struct Kept {
    content: Content,
    outcome: Outcome,
    used: u64,
}

#[derive(Debug, Default)]
struct Cache {
    kept: HashMap<(String, NodeId), Kept>,
    bytes: usize,
    clock: u64,
}

/// One for the process: pools are few, and it is bounded.
static CACHE: Mutex<Option<Cache>> = Mutex::new(None);

fn with<R>(run: impl FnOnce(&mut Cache) -> R) -> R {
    run(CACHE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

fn weight(outcome: &Outcome) -> usize {
    match outcome {
        Ok(index) => {
            index.tensors.iter().map(|t| 2 * t.name.len() + 8 * t.shape.len() + 160).sum::<usize>()
                + index.metadata.iter().map(|(k, v)| k.len() + v.len() + 64).sum::<usize>()
                + 256
        }
        Err((_, text)) => text.len() + 256,
    }
}

impl Cache {
    fn get(&mut self, key: &(String, NodeId), content: Content) -> Option<Outcome> {
        self.clock += 1;
        let kept = self.kept.get_mut(key).filter(|k| k.content == content)?;
        kept.used = self.clock;
        Some(kept.outcome.clone())
    }

    fn put(&mut self, key: (String, NodeId), content: Content, outcome: Outcome) {
        self.clock += 1;
        self.bytes += weight(&outcome);
        if let Some(old) = self.kept.insert(key, Kept { content, outcome, used: self.clock }) {
            self.bytes -= weight(&old.outcome);
        }
        while self.bytes > BUDGET && self.kept.len() > 1 {
            let Some(oldest) = self.kept.iter().min_by_key(|(_, k)| k.used).map(|(key, _)| key.clone())
            else {
                break;
            };
            if let Some(old) = self.kept.remove(&oldest) {
                self.bytes -= weight(&old.outcome);
            }
        }
    }
}

fn outcome(kept: Outcome) -> Result<Arc<TensorIndex>> {
    kept.map_err(|(kind, text)| Error::new(kind, text))
}

impl Pool {
    /// The tensors of a region's current content. `NotSupported`: its name is no tensor file's, or it is empty; `Malformed`: its
    /// header lies. Both, and the index, are kept until the content changes.
    pub fn tensors(&self, node: NodeId) -> Result<Arc<TensorIndex>> {
        let attr = self.getattr(node)?;
        let path = self.path_of(node)?;
        let none = || {
            Error::new(
                ErrorKind::NotSupported,
                format!("{path:?} is no tensor file (.safetensors, .gguf, .npy)"),
            )
        };
        let format = Format::of_name(&path)
            .filter(|_| attr.kind == NodeKind::Region && attr.size > 0)
            .ok_or_else(none)?;
        let content =
            |attr: &Attr| Content { generation: attr.generation, size: attr.size, mtime: attr.mtime, format };
        let key = (self.info().id, node);
        if let Some(kept) = with(|cache| cache.get(&key, content(&attr))) {
            return outcome(kept);
        }
        let handle = self.open_region(node, Access::Read, false)?;
        let size = handle.size();
        let mut read_at = |offset: u64, out: &mut [u8]| {
            let mut done = 0;
            while done < out.len() {
                match handle.read_at(offset + done as u64, &mut out[done..])? {
                    0 => {
                        return Err(Error::new(
                            ErrorKind::Stale,
                            format!("{path:?} became shorter while it was read"),
                        ));
                    }
                    n => done += n,
                }
            }
            Ok(())
        };
        let parsed = match parse(&path, size, &mut read_at) {
            Ok(index) => Ok(Arc::new(index.ok_or_else(none)?)),
            Err(error) if error.kind() == ErrorKind::Malformed => Err((error.kind(), error.chain())),
            Err(error) => return Err(error), // of the drive: may be another one next time
        };
        // Kept only if nobody changed the content meanwhile.
        let after = self.getattr(node)?;
        if content(&after) == content(&attr) && size == attr.size {
            with(|cache| cache.put(key, content(&attr), parsed.clone()));
        }
        outcome(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_cache_is_bounded_and_follows_the_content() {
        let mut cache = Cache::default();
        let content =
            |generation| Content { generation, size: 1, mtime: Timestamp::default(), format: Format::Npy };
        let big = |len: usize| {
            let metadata = BTreeMap::from([("k".to_owned(), "v".repeat(len))]);
            Ok(Arc::new(TensorIndex::new(Format::Npy, Vec::new(), metadata)))
        };
        let key = |node| ("pool".to_owned(), node);
        cache.put(key(1), content(1), big(BUDGET / 4));
        cache.put(key(2), content(1), Err((ErrorKind::Malformed, "no".into())));
        assert!(cache.get(&key(1), content(1)).is_some());
        assert!(cache.get(&key(1), content(2)).is_none());
        assert!(cache.get(&key(2), content(1)).unwrap().is_err());
        for node in 10..20 {
            cache.put(key(node), content(1), big(BUDGET / 4));
        }
        assert!(cache.bytes <= BUDGET && cache.kept.len() == 3);
        cache.put(key(19), content(2), big(10));
        assert_eq!(cache.bytes, cache.kept.values().map(|k| weight(&k.outcome)).sum::<usize>());
        cache.put(key(30), content(1), big(2 * BUDGET));
        assert_eq!(cache.kept.len(), 1);
    }
}
