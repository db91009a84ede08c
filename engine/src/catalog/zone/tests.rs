use nvme::{SimDevice, SimOptions};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::*;

const START: u64 = 1 << 20;
const LEN: u64 = 8 << 20;
const TABLE: TableDefinition<u64, &[u8]> = TableDefinition::new("t");

fn sim() -> Arc<dyn Device> {
    Arc::new(SimDevice::new(16 << 20, SimOptions::default()).unwrap())
}

fn open(device: &Arc<dyn Device>) -> ZoneBackend {
    ZoneBackend::open(device.clone(), START, LEN).unwrap()
}

#[test]
fn redb_lives_in_a_zone_and_touches_nothing_else() {
    let device = sim();
    let guard = vec![0xa5u8; START as usize];
    device.write_at(0, &guard).unwrap();
    device.write_at(START + LEN, &guard).unwrap();
    let zone = ZoneBackend::create(device.clone(), START, LEN).unwrap();
    let db = Database::builder().create_with_backend(zone).unwrap();
    for round in 0..20u64 {
        let txn = db.begin_write().unwrap();
        for key in 0..50 {
            let value = vec![round as u8; 300];
            txn.open_table(TABLE).unwrap().insert(round * 50 + key, value.as_slice()).unwrap();
        }
        txn.commit().unwrap();
    }
    drop(db);
    let db = Database::builder().create_with_backend(open(&device)).unwrap();
    let txn = db.begin_read().unwrap();
    let table = txn.open_table(TABLE).unwrap();
    assert_eq!(table.iter().unwrap().count(), 1000);
    for record in table.iter().unwrap() {
        let (key, value) = record.unwrap();
        assert_eq!(value.value(), vec![(key.value() / 50) as u8; 300]);
    }
    for at in [0, START + LEN] {
        let mut back = vec![0; START as usize];
        device.read_at(at, &mut back).unwrap();
        assert!(back == guard, "bytes outside of the zone at {at}");
    }
}

#[test]
fn a_full_zone_is_no_space_and_keeps_what_is_committed() {
    let device = sim();
    let zone = ZoneBackend::create(device.clone(), START, 3 << 20).unwrap();
    let db = Database::builder().create_with_backend(zone).unwrap();
    let mut committed = 0;
    let full = loop {
        let result = (|| -> std::result::Result<(), redb::Error> {
            let txn = db.begin_write()?;
            txn.open_table(TABLE)?.insert(committed, vec![committed as u8; 200_000].as_slice())?;
            txn.commit()?;
            Ok(())
        })();
        match result {
            Ok(()) => committed += 1,
            Err(error) => break error,
        }
        assert!(committed < 100, "200 KB each do not fit 100 times into 3 MiB");
    };
    assert!(
        matches!(&full, redb::Error::Io(error) if error.kind() == io::ErrorKind::StorageFull),
        "{full:?}"
    );
    assert!(committed > 3);
    drop(db);
    let zone = ZoneBackend::open(device, START, 3 << 20).unwrap();
    let db = Database::builder().create_with_backend(zone).unwrap();
    let txn = db.begin_read().unwrap();
    assert_eq!(txn.open_table(TABLE).unwrap().iter().unwrap().count() as u64, committed);
}

#[test]
fn lengths_survive_and_growth_is_zeros() {
    let device = sim();
    device.write_at(START, &vec![0xff; LEN as usize]).unwrap();
    let zone = ZoneBackend::create(device.clone(), START, LEN).unwrap();
    assert_eq!(zone.capacity, LEN - ZONE_HEAD_BYTES);
    zone.set_len(10_000).unwrap();
    zone.write(3000, b"hello").unwrap();
    zone.set_len(3002).unwrap();
    zone.set_len(1_500_000).unwrap();
    zone.sync_data().unwrap();
    drop(zone);
    let zone = open(&device);
    assert_eq!(zone.len().unwrap(), 1_500_000);
    let mut bytes = vec![1; 1_500_000];
    zone.read(0, &mut bytes).unwrap();
    let mut want = vec![0; 1_500_000];
    want[3000..3002].copy_from_slice(b"he");
    assert!(bytes == want);
    assert_eq!(zone.read(1_499_999, &mut [0; 2]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(zone.write(u64::MAX, &[0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(zone.set_len(LEN).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(zone.len().unwrap(), 1_500_000);
}

#[test]
fn one_damaged_header_is_survived_two_are_not() {
    for slot in 0..2 {
        let device = sim();
        let zone = ZoneBackend::create(device.clone(), START, LEN).unwrap();
        zone.set_len(4096).unwrap();
        zone.set_len(8192).unwrap();
        zone.sync_data().unwrap();
        drop(zone);
        device.write_at(START + slot * SLOT_BYTES + 20, &[0xff]).unwrap();
        let len = open(&device).len().unwrap();
        assert!(len == 8192 || len == 4096, "the other slot counts: {len}");
        device.write_at(START + (1 - slot) * SLOT_BYTES + 20, &[0xff]).unwrap();
        let error = ZoneBackend::open(device, START, LEN).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn newer_zones_and_impossible_places_are_refused() {
    let device = sim();
    drop(ZoneBackend::create(device.clone(), START, LEN).unwrap());
    let mut header = encode(9, 0);
    header[8] = 2;
    let crc = crc32fast::hash(&header[..32]);
    header[32..].copy_from_slice(&crc.to_le_bytes());
    device.write_at(START, &header).unwrap();
    assert_eq!(ZoneBackend::open(device.clone(), START, LEN).unwrap_err().kind(), ErrorKind::NewerFormat);
    for (start, len) in [(START, 20 << 20), (u64::MAX - 100, 200), (START, 4096), (START + 1, LEN)] {
        assert_eq!(
            ZoneBackend::open(device.clone(), start, len).unwrap_err().kind(),
            ErrorKind::Corrupt,
            "{start} {len}"
        );
    }
}
