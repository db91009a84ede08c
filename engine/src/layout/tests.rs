use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const CHUNK: u64 = 4096;

fn extent(logical: u64, member: u16, offset: u64, len: u64) -> Extent {
    Extent { logical: logical * CHUNK, member, file: 0, offset: offset * CHUNK, len: len * CHUNK }
}

fn reread(layout: &Layout) -> Layout {
    let map: BTreeMap<_, _> = layout.records().into_iter().collect();
    Layout::from_records(|key| Ok(map.get(&key).cloned())).unwrap()
}

#[test]
fn neighbours_merge_and_replacements_split() {
    let mut layout = Layout::new(CHUNK as u32);
    layout.replace(extent(0, 0, 10, 2));
    layout.replace(extent(4, 0, 14, 2));
    layout.replace(extent(2, 0, 12, 2));
    assert_eq!(layout.extents().collect::<Vec<_>>(), [&extent(0, 0, 10, 6)]);
    let displaced = layout.replace(extent(1, 1, 0, 2));
    assert_eq!(displaced, [extent(1, 0, 11, 2)]);
    assert_eq!(
        layout.extents().collect::<Vec<_>>(),
        [&extent(0, 0, 10, 1), &extent(1, 1, 0, 2), &extent(3, 0, 13, 3)]
    );
    assert_eq!(layout.allocated(), 6 * CHUNK);
    assert_eq!(layout.lookup(CHUNK / 2, CHUNK).len(), 2);
}

#[test]
fn lookup_names_holes() {
    let mut layout = Layout::new(CHUNK as u32);
    layout.replace(extent(2, 0, 0, 1));
    let pieces = layout.lookup(0, 5 * CHUNK);
    assert_eq!(
        pieces,
        [
            Piece::Hole { logical: 0, len: 2 * CHUNK },
            Piece::Data(extent(2, 0, 0, 1)),
            Piece::Hole { logical: 3 * CHUNK, len: 2 * CHUNK }
        ]
    );
    assert_eq!(layout.next_data(0), Some(2 * CHUNK));
    assert_eq!(layout.next_data(3 * CHUNK), None);
    assert_eq!(layout.next_hole(2 * CHUNK + 5), 3 * CHUNK);
    assert!(Layout::new(4096).lookup(7, 0).is_empty());
}

#[test]
fn truncation_keeps_the_chunk_it_cuts() {
    let mut layout = Layout::new(CHUNK as u32);
    layout.replace(extent(0, 0, 0, 4));
    layout.set_size(4 * CHUNK);
    layout.set_sums(0, &[1, 2, 3, 4]);
    assert_eq!(layout.truncate(CHUNK + 1), [extent(2, 0, 2, 2)]);
    assert_eq!(layout.size(), CHUNK + 1);
    assert_eq!((layout.sum(1), layout.sum(2)), (2, 0));
    assert_eq!(layout.truncate(0), [extent(0, 0, 0, 2)]);
    assert_eq!(layout.extent_count(), 0);
}

#[test]
fn a_whole_file_is_recognised() {
    let mut layout = Layout::new(CHUNK as u32);
    assert_eq!(layout.single_file(), None);
    layout.replace(Extent { logical: 0, member: 3, file: 77, offset: 0, len: 2 * CHUNK });
    layout.set_size(CHUNK + 5);
    assert_eq!(layout.single_file(), Some((3, 77)));
    layout.set_size(2 * CHUNK + 1);
    assert_eq!(layout.single_file(), None, "the end is a hole");
}

#[test]
fn large_layouts_write_only_changed_records() {
    let mut old = Layout::new(CHUNK as u32);
    for index in 0..10_000 {
        old.replace(extent(index * 2, (index % 3) as u16, index * 7, 1));
        old.set_sum(index * 2, index as u32);
    }
    old.set_size(20_000 * CHUNK);
    assert_eq!(old.records().len(), 1 + 3 + 2);
    assert_eq!(reread(&old), old);
    let mut new = old.clone();
    new.set_generation(2);
    new.set_sum(19_998, 5);
    let changes = new.changes(Some(&old));
    assert_eq!(changes.put.iter().map(|(key, _)| *key).collect::<Vec<_>>(), [0, 0x2000_0001]);
    new.truncate(0);
    let changes = new.changes(Some(&old));
    assert_eq!(changes.put.len(), 1);
    assert_eq!(changes.delete, [0x1000_0000, 0x1000_0001, 0x1000_0002, 0x2000_0000, 0x2000_0001]);
}

#[test]
fn damaged_records_are_refused() {
    let mut layout = Layout::new(CHUNK as u32);
    layout.replace(extent(0, 1, 5, 3));
    layout.set_size(3 * CHUNK);
    layout.set_sums(0, &[1, 2, 3]);
    let records = layout.records();
    for (index, (key, value)) in records.iter().enumerate() {
        for byte in 0..value.len() {
            for bit in 0..8 {
                let mut map: BTreeMap<_, _> = records.iter().cloned().collect();
                map.get_mut(key).unwrap()[byte] ^= 1 << bit;
                let error = Layout::from_records(|key| Ok(map.get(&key).cloned())).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "record {index} byte {byte} bit {bit}");
            }
        }
        for len in 0..value.len() {
            let mut map: BTreeMap<_, _> = records.iter().cloned().collect();
            map.get_mut(key).unwrap().truncate(len);
            assert!(
                Layout::from_records(|key| Ok(map.get(&key).cloned())).is_err(),
                "record {index} cut to {len}"
            );
        }
        let mut map: BTreeMap<_, _> = records.iter().cloned().collect();
        map.remove(key);
        assert!(Layout::from_records(|key| Ok(map.get(&key).cloned())).is_err());
    }
    assert_eq!(layout.validate(1).unwrap_err().kind(), ErrorKind::Corrupt);
    layout.validate(2).unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Replace(u64, u64),
    Remove(u64, u64),
    Truncate(u64),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Against a flat array: chunk -> where it lies.
    #[test]
    fn agrees_with_a_flat_map(steps in prop::collection::vec(prop_oneof![
        3 => (0u64..60, 1u64..20).prop_map(|(a, n)| Step::Replace(a, n)),
        2 => (0u64..60, 1u64..20).prop_map(|(a, n)| Step::Remove(a, n)),
        1 => (0u64..80 * CHUNK).prop_map(Step::Truncate),
    ], 1..60)) {
        let mut layout = Layout::new(CHUNK as u32);
        let mut model: Vec<Option<(u16, u64)>> = vec![None; 100];
        let mut next = 0u64;
        for step in steps {
            let (displaced, expected): (Vec<Extent>, Vec<_>) = match step {
                Step::Replace(at, n) => {
                    let member = (next % 2) as u16;
                    let displaced = layout.replace(extent(at, member, next, n));
                    let old: Vec<_> = (at..at + n).map(|c| model[c as usize]).collect();
                    for c in at..at + n {
                        model[c as usize] = Some((member, next + c - at));
                    }
                    next += n + (n % 2); // sometimes adjacent to the one before
                    (displaced, old)
                }
                Step::Remove(at, n) => {
                    let displaced = layout.remove(at * CHUNK, n * CHUNK);
                    let old = model[at as usize..(at + n) as usize].to_vec();
                    model[at as usize..(at + n) as usize].fill(None);
                    (displaced, old)
                }
                Step::Truncate(size) => {
                    let displaced = layout.truncate(size);
                    let keep = size.div_ceil(CHUNK) as usize;
                    let old = model[keep..].to_vec();
                    model[keep..].fill(None);
                    prop_assert_eq!(layout.size(), size);
                    (displaced, old)
                }
            };
            let gone: Vec<_> = displaced.iter().flat_map(|e| (0..e.len / CHUNK).map(|i| (e.member, e.offset / CHUNK + i))).collect();
            prop_assert_eq!(gone, expected.into_iter().flatten().collect::<Vec<_>>());
            let mut at = 0;
            for piece in layout.lookup(0, 100 * CHUNK) {
                prop_assert_eq!(piece.logical(), at * CHUNK);
                for i in 0..piece.len() / CHUNK {
                    let here = match piece {
                        Piece::Data(e) => Some((e.member, e.offset / CHUNK + i)),
                        Piece::Hole { .. } => None,
                    };
                    prop_assert_eq!(here, model[at as usize]);
                    at += 1;
                }
            }
            prop_assert_eq!(at, 100);
            layout.validate(2).unwrap();
            // Merged as far as possible.
            let extents: Vec<_> = layout.extents().copied().collect();
            prop_assert!(extents.windows(2).all(|w| !w[0].continues(&w[1])) || extents.len() < 2);
            prop_assert_eq!(reread(&layout), layout.clone());
        }
    }

    #[test]
    fn any_bytes_are_refused_or_read_but_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Layout::from_records(|_| Ok(Some(bytes.clone())));
    }
}
