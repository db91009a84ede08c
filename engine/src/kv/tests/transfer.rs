//! Exports and imports.

use super::*;

#[test]
fn a_prefix_goes_out_and_into_another_store() {
    let (rig, other) = (Rig::new(1, 4 << 20), Rig::new(2, 4 << 20));
    let store = rig.store();
    let view = store.view(PRINT, 6000, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 0..20);
    let chain: Vec<Key> = (5..25).map(key).collect();
    let mut file = Vec::new();
    let moved = store.export(&view, PRINT, &chain, &mut file).unwrap();
    assert_eq!((moved.blocks, moved.skipped, moved.bad), (15, 5, 0));
    let into = other.store();
    let moved = into.import(&mut &file[..], "alice").unwrap();
    assert_eq!((moved.blocks, moved.skipped), (15, 0));
    assert_eq!(into.import(&mut &file[..], "alice").unwrap().skipped, 15);
    let there = into.view(PRINT, 6000, "alice").unwrap();
    assert_eq!(
        hits(&mut into.lane(None).unwrap(), &there, 0..20),
        [[false; 5].as_slice(), &[true; 15]].concat()
    );
    assert_eq!(into.verify(&mut |_| {}).unwrap(), Moved { blocks: 15, ..Moved::default() });
    assert_eq!(into.views().unwrap().len(), 1);
}

#[test]
fn an_export_that_is_damaged_or_cut_is_refused_wherever_that_is() {
    let rig = Rig::new(1, 4 << 20);
    let store = rig.store();
    let view = store.view(PRINT, 4096, "").unwrap();
    put(&mut store.lane(None).unwrap(), &view, 0..3);
    let mut file = Vec::new();
    store.export(&view, PRINT, &(0..3).map(key).collect::<Vec<_>>(), &mut file).unwrap();
    let refused = |bytes: &[u8], what: &str| {
        let rig = Rig::new(1, 1 << 20);
        let store = rig.store();
        let error = store.import(&mut &bytes[..], "").unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Malformed | ErrorKind::NewerFormat), "{what}: {error}");
        // And what came before it is right.
        let view = store.view(PRINT, 4096, "").unwrap();
        hits(&mut store.lane(None).unwrap(), &view, 0..3);
    };
    for len in [0, 7, 8, 30, 43, 44, 60, 4000, 5000, file.len() - 1] {
        refused(&file[..len], &format!("{len} bytes"));
    }
    // Of an end the three bytes of filling mean nothing.
    let end = file.len() - 16;
    for at in (0..file.len()).step_by(211).chain(end + 4..file.len()) {
        let mut bytes = file.clone();
        bytes[at] ^= 0x10;
        let filling = at > end && at < end + 4 || (at >= 44 && at < end && matches!((at - 44) % 4136, 2 | 3));
        if !filling {
            refused(&bytes, &format!("byte {at}"));
        }
    }
}

#[test]
fn a_look_finds_what_is_bad_and_drops_it() {
    let rig = Rig::new(1, 4 << 20);
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    put(&mut store.lane(None).unwrap(), &view, 0..10);
    let device = rig.devices[0].clone();
    let piece = {
        let mut state = store.shared().state();
        let (_, block) = state.find(&view.name(&key(4))).unwrap();
        let slab = &state.slabs[&block.slab];
        slab.slab.range(u64::from(block.slot) * slab.slot_bytes, 4096).next().unwrap()
    };
    device.write_at(piece.offset + 100, &[0xff; 8]).unwrap();
    let moved = store.verify(&mut |_| {}).unwrap();
    assert_eq!((moved.blocks, moved.bad), (9, 1));
    let moved = store.verify(&mut |_| {}).unwrap();
    assert_eq!((moved.blocks, moved.bad), (9, 0));
}
