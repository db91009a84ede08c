//! The simulated device by itself.

use super::pages::PAGE;
use super::*;

#[test]
fn a_big_device_costs_what_was_written() {
    let device = SimDevice::new(1 << 40, SimOptions::default()).unwrap();
    device.write_at((1 << 40) - 3, b"end").unwrap();
    device.write_at(PAGE - 1, b"ab").unwrap();
    assert_eq!(device.resident_bytes(), 3 * PAGE);
    let mut back = [9; 4];
    device.read_at(PAGE - 2, &mut back).unwrap();
    assert_eq!(&back, b"\0ab\0");
    device.discard(0, 1 << 40).unwrap();
    assert_eq!(device.resident_bytes(), 0);
    device.read_at(PAGE - 2, &mut back).unwrap();
    assert_eq!(back, [0; 4]);
}

#[test]
fn a_partial_discard_zeroes_exactly_its_range() {
    let device = SimDevice::new(1 << 20, SimOptions::default()).unwrap();
    device.write_at(0, &[1; 3 * PAGE as usize]).unwrap();
    device.discard(100, 2 * PAGE).unwrap();
    let mut back = vec![0; 3 * PAGE as usize];
    device.read_at(0, &mut back).unwrap();
    for (i, &b) in back.iter().enumerate() {
        let gone = (100..100 + 2 * PAGE).contains(&(i as u64));
        assert_eq!(b, u8::from(!gone), "byte {i}");
    }
}

#[derive(Debug)]
struct FailSecond;
impl SimHook for FailSecond {
    fn decide(&self, io: &SimIo, _: &mut SimRng) -> SimDecision {
        match io.sequence {
            1 => SimDecision::Fail(libc::EIO),
            2 => SimDecision::Short(1),
            3 => SimDecision::Hang,
            _ => SimDecision::Proceed,
        }
    }
}

#[test]
fn a_hook_decides_how_operations_end() {
    let options = SimOptions { hook: Some(Arc::new(FailSecond)), ..Default::default() };
    let device = SimDevice::new(4096, options).unwrap();
    device.write_at(0, b"abc").unwrap();
    let mut back = [0; 3];
    assert_eq!(device.read_at(0, &mut back).unwrap_err().errno(), Some(libc::EIO));
    // One byte arrives, the rest hangs: a deadline, never a success.
    assert_eq!(device.read_at(0, &mut back).unwrap_err().kind(), ErrorKind::Timeout);
    device.read_at(0, &mut back).unwrap();
    assert_eq!(&back, b"abc");
    assert_eq!(device.operations(), 5);
}

#[test]
fn bad_lengths_and_ranges_are_refused() {
    let kind = |len, lba_size| {
        SimDevice::new(len, SimOptions { lba_size, ..Default::default() }).unwrap_err().kind()
    };
    assert_eq!(kind(0, 512), ErrorKind::Misaligned);
    assert_eq!(kind(513, 512), ErrorKind::Misaligned);
    assert_eq!(kind(4096, 520), ErrorKind::Invalid);
    let device = SimDevice::new(4096, SimOptions { read_only: true, ..Default::default() }).unwrap();
    assert_eq!(device.read_at(4096, &mut [0]).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(device.read_at(u64::MAX, &mut [0]).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(device.write_at(0, &[0]).unwrap_err().kind(), ErrorKind::PermissionDenied);
}

fn volatile(len: u64, lba_size: u32, power: &Arc<SimPower>) -> SimDevice {
    let options =
        SimOptions { lba_size, volatile_cache: true, power: Some(power.clone()), ..Default::default() };
    SimDevice::new(len, options).unwrap()
}

fn bytes(image: &SimImage, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    image.read(offset, &mut bytes);
    bytes
}

#[test]
fn a_flush_makes_durable_and_nothing_else_does() {
    let power = Arc::new(SimPower::new());
    let device = volatile(64 << 10, 512, &power);
    device.write_at(0, &[1; 1024]).unwrap();
    device.flush().unwrap();
    device.write_at(512, &[2; 1024]).unwrap();
    device.discard(0, 512).unwrap();
    assert_eq!(device.unflushed(), 2);
    let mut seen = [9; 3];
    device.read_at(511, &mut seen).unwrap();
    assert_eq!(seen, [0, 2, 2], "reads see the cache");
    let none = device.survivors(Survivors::None);
    assert_eq!(bytes(&none, 0, 2048), [vec![1; 1024], vec![0; 1024]].concat());
    let all = device.survivors(Survivors::All);
    assert_eq!(bytes(&all, 0, 2048), [vec![0; 512], vec![2; 1024], vec![0; 512]].concat());
    let write = device.survivors(Survivors::Only(0));
    assert_eq!(bytes(&write, 0, 2048), [vec![1; 512], vec![2; 1024], vec![0; 512]].concat());
    let discard = device.survivors(Survivors::AllBut(0));
    assert_eq!(bytes(&discard, 0, 2048), [vec![0; 512], vec![1; 512], vec![0; 1024]].concat());
}

#[test]
fn a_cut_leaves_any_mixture_of_whole_blocks() {
    for lba in [512usize, 4096] {
        let power = Arc::new(SimPower::new());
        let device = volatile(64 << 10, lba as u32, &power);
        device.write_at(0, &vec![1; 4 * lba]).unwrap();
        device.flush().unwrap();
        // Two that overlap, and one that brings a part of a block only.
        device.write_at(0, &vec![2; 3 * lba]).unwrap();
        device.write_at(lba as u64, &vec![3; 3 * lba]).unwrap();
        device.write_at(7 * lba as u64 + 5, &[4; 10]).unwrap();
        let mut seen = [[false; 4]; 8];
        for seed in 0..4000 {
            let image = device.survivors(Survivors::Random(seed));
            assert_eq!(
                bytes(&image, 0, 64 << 10),
                bytes(&device.survivors(Survivors::Random(seed)), 0, 64 << 10),
                "the same seed gives the same"
            );
            for (block, seen) in seen.iter_mut().enumerate() {
                let bytes = bytes(&image, (block * lba) as u64, lba);
                let kind = bytes[5] as usize;
                if block == 7 {
                    assert!(kind == 0 || bytes[5..15] == [4; 10] && bytes[15..].iter().all(|b| *b == 0));
                    seen[usize::from(kind != 0)] = true;
                } else {
                    assert!(bytes.iter().all(|byte| *byte as usize == kind), "a block is never torn");
                    seen[kind] = true;
                }
            }
        }
        let wanted = [
            [false, true, true, false],
            [false, true, true, true],
            [false, true, true, true],
            [false, true, false, true],
        ];
        assert_eq!(seen[..4], wanted, "{lba}: every write may win, and none");
        assert_eq!(seen[7], [true, true, false, false]);
    }
}

#[test]
fn power_goes_for_all_devices_at_the_given_change() {
    let power = Arc::new(SimPower::new());
    let (one, other) = (volatile(8192, 512, &power), volatile(8192, 512, &power));
    one.write_at(0, &[1; 512]).unwrap();
    power.cut_after(2);
    power.record();
    other.write_at(0, &[2; 512]).unwrap();
    one.flush().unwrap();
    assert!(!power.is_off());
    // It is under way when the power goes: an error to the caller, and yet perhaps on the medium.
    assert_eq!(one.write_at(512, &[3; 512]).unwrap_err().kind(), ErrorKind::Gone);
    assert!(power.is_off());
    assert_eq!(other.read_at(0, &mut [0; 4]).unwrap_err().kind(), ErrorKind::Gone);
    assert_eq!(other.flush().unwrap_err().kind(), ErrorKind::Gone);
    assert_eq!(other.write_at(512, &[3; 512]).unwrap_err().kind(), ErrorKind::Gone);
    assert_eq!((power.changes(), power.recorded().len()), (4, 3));
    assert_eq!(bytes(&one.survivors(Survivors::None), 0, 1024), [[1; 512], [0; 512]].concat());
    assert_eq!(bytes(&one.survivors(Survivors::All), 0, 1024), [[1; 512], [3; 512]].concat());
    assert_eq!(bytes(&other.survivors(Survivors::None), 0, 512), [0; 512], "its flush never came");
    let after = SimDevice::from_image(&other.survivors(Survivors::All), SimOptions::default()).unwrap();
    let mut back = [0; 1024];
    after.read_at(0, &mut back).unwrap();
    assert_eq!(back[..], [[2; 512], [0; 512]].concat());
}

#[derive(Debug)]
struct LoseFlushes;
impl SimHook for LoseFlushes {
    fn decide(&self, io: &SimIo, _: &mut SimRng) -> SimDecision {
        if io.verb == Verb::Flush { SimDecision::Lose } else { SimDecision::Proceed }
    }
}

#[test]
fn a_device_can_lie() {
    let options = SimOptions {
        volatile_cache: true,
        hook: Some(Arc::new(LoseFlushes)),
        name: Some("liar".into()),
        ..Default::default()
    };
    let device = SimDevice::new(8192, options).unwrap();
    device.write_at(0, b"abc").unwrap();
    device.flush().unwrap();
    assert_eq!((device.name(), device.unflushed()), ("liar", 1));
    assert_eq!(bytes(&device.survivors(Survivors::None), 0, 3), [0; 3]);
    let mut image = device.image();
    image.flip(1, 0);
    assert_eq!((bytes(&image, 0, 3), bytes(&device.image(), 0, 3)), (b"acc".to_vec(), b"abc".to_vec()));
}
