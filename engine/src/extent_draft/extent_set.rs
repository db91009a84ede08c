//! A set of bytes on members, as sorted ranges.

use std::collections::BTreeMap;

use crate::layout::Extent;

/// Ranges of members: (member, file, offset) -> length. Neighbours are merged.
#[derive(Debug, Default)]
pub struct ExtentSet {
    ranges: BTreeMap<(u16, u64, u64), u64>,
}

impl ExtentSet {
    /// Adds a range that is not in it.
    pub fn insert(&mut self, extent: &Extent) {
        let (member, file) = (extent.member, extent.file);
        let (mut offset, mut len) = (extent.offset, extent.len);
        if let Some((&(m, f, before), &before_len)) = self.ranges.range(..(member, file, offset)).next_back()
            && (m, f, before + before_len) == (member, file, offset)
        {
            offset = before;
            len += before_len;
        }
        if let Some(after_len) = self.ranges.remove(&(member, file, extent.offset + extent.len)) {
            len += after_len;
        }
        self.ranges.insert((member, file, offset), len);
    }

    /// Takes out what of `extent` is in it, and returns that.
    pub fn remove(&mut self, extent: &Extent) -> Vec<Extent> {
        let mut removed = Vec::new();
        let mut at = extent.offset;
        let end = extent.offset + extent.len;
        while at < end {
            let Some((start, len)) =
                self.covering_or_next(extent.member, extent.file, at).filter(|(start, _)| *start < end)
            else {
                break;
            };
            let from = start.max(at);
            let to = (start + len).min(end);
            self.ranges.remove(&(extent.member, extent.file, start));
            if start < from {
                self.ranges.insert((extent.member, extent.file, start), from - start);
            }
            if to < start + len {
                self.ranges.insert((extent.member, extent.file, to), start + len - to);
            }
            removed.push(Extent {
                logical: extent.logical + (from - extent.offset),
                offset: from,
                len: to - from,
                ..*extent
            });
            at = to;
        }
        removed
    }

    /// The beginning of `extent` as far as it is in the set.
    pub fn starts(&self, extent: &Extent) -> Option<Extent> {
        let (start, len) = self.covering_or_next(extent.member, extent.file, extent.offset)?;
        (start <= extent.offset)
            .then(|| Extent { len: extent.len.min(start + len - extent.offset), ..*extent })
    }

    /// All of it; logical offsets mean nothing.
    pub fn extents(&self) -> Vec<Extent> {
        self.ranges
            .iter()
            .map(|(&(member, file, offset), &len)| Extent { logical: 0, member, file, offset, len })
            .collect()
    }

    /// The range that holds `at`, else the next one in the same file.
    fn covering_or_next(&self, member: u16, file: u64, at: u64) -> Option<(u64, u64)> {
        let before = self.ranges.range(..=(member, file, at)).next_back();
        if let Some((&(m, f, start), &len)) = before
            && (m, f) == (member, file)
            && start + len > at
        {
            return Some((start, len));
        }
        let (&(m, f, start), &len) = self.ranges.range((member, file, at)..).next()?;
        ((m, f) == (member, file)).then_some((start, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(member: u16, offset: u64, len: u64) -> Extent {
        Extent { logical: 1000 + offset, member, file: 1, offset, len }
    }

    proptest! {
        #[test]
        fn agrees_with_flags(steps in prop::collection::vec((any::<bool>(), 0u16..2, 0u64..60, 1u64..10), 1..80)) {
            let mut set = ExtentSet::default();
            let mut model = [[false; 80]; 2];
            for (insert, member, offset, len) in steps {
                let flags = &mut model[member as usize][offset as usize..(offset + len) as usize];
                let e = extent(member, offset, len);
                if insert && flags.iter().all(|f| !f) {
                    flags.fill(true);
                    set.insert(&e);
                } else {
                    let removed = set.remove(&e);
                    let mut found = vec![false; len as usize];
                    for r in &removed {
                        prop_assert_eq!(r.logical, 1000 + r.offset);
                        found[(r.offset - offset) as usize..(r.offset - offset + r.len) as usize].fill(true);
                    }
                    prop_assert_eq!(&found[..], &flags[..]);
                    flags.fill(false);
                }
                for m in 0..2u16 {
                    for at in 0..79u64 {
                        let want = model[m as usize][at as usize..].iter().take_while(|f| **f).count() as u64;
                        let got = set.starts(&extent(m, at, 80 - at)).map_or(0, |e| e.len);
                        prop_assert_eq!(got, want);
                    }
                }
                let total: u64 = set.extents().iter().map(|e| e.len).sum();
                prop_assert_eq!(total, model.iter().flatten().filter(|f| **f).count() as u64);
            }
        }
    }
}
