//! LLM-shaped patterns: `--profile=model-load` and `--profile=kv-restore`.
//!
//! Both are prepared lists of reads, made before the run from the file itself and a seed, so that the loop that is
//! measured does nothing but I/O.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::offsets::{Request, Rng, mix};
use crate::settings::{Amount, EngineKind, Pattern, Profile, Settings};

/// Reads of tensors start and end on this boundary, as O_DIRECT needs it: an aligned superset of the tensor.
const ALIGN: u64 = 4096;
/// Sizes of KV-cache blocks: of 16 to 256 tokens, by model.
const KV_BLOCKS: [u32; 5] = [128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20];

/// Gives a profile's job what the command line left open, and refuses what contradicts it.
pub fn adjust(settings: &mut Settings, profile: Profile) -> std::result::Result<(), String> {
    for name in ["rw", "rwmixread", "rwmixwrite", "offset", "offset_increment", "norandommap"] {
        if settings.was_given(name) {
            return Err(format!("profile= makes its own pattern: leave {name} out"));
        }
    }
    if profile == Profile::KvRestore && settings.was_given("bs") {
        return Err("profile=kv-restore mixes blocks of 128k to 2m: leave bs out".into());
    }
    if settings.filenames.len() != 1 {
        return Err("profile= needs one filename".into());
    }
    settings.pattern = Pattern { read: true, write: false, random: profile == Profile::KvRestore };
    if !settings.was_given("ioengine") {
        settings.engine = EngineKind::IoUring;
    }
    let buffered = matches!(settings.engine, EngineKind::Mmap | EngineKind::Pool | EngineKind::Null);
    if !settings.was_given("direct") && !settings.was_given("buffered") && !buffered {
        settings.direct = true;
    }
    let (block, depth, jobs) = match profile {
        Profile::ModelLoad => (1 << 20, 32, 1),
        Profile::KvRestore => (2 << 20, 8, 4),
    };
    if !settings.was_given("bs") {
        settings.block_bytes = [block; 2];
    }
    if !settings.was_given("iodepth") {
        settings.iodepth = depth;
    }
    if !settings.was_given("numjobs") {
        settings.numjobs = jobs;
    }
    if !settings.was_given("group_reporting") {
        settings.group_reporting = true;
    }
    Ok(())
}

/// Reads bytes of the file or region: all of the buffer, or an error.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> engine::Result<()> + 'a;

/// The reads of worker `index`, and a line on what they are.
pub fn trace(
    settings: &Settings,
    profile: Profile,
    index: u32,
    name: &str,
    len: u64,
    read_at: &mut ReadAt<'_>,
) -> Result<(Arc<[Request]>, String)> {
    match profile {
        Profile::ModelLoad => model_load(settings, name, len, read_at),
        Profile::KvRestore => kv_restore(settings, index, name, len),
    }
}

fn model_load(
    settings: &Settings,
    name: &str,
    len: u64,
    read_at: &mut ReadAt<'_>,
) -> Result<(Arc<[Request]>, String)> {
    let index = engine::tensors::parse(name, len, read_at)
        .map_err(|error| Error::engine(format!("cannot read the tensors of {name}"), error))?;
    let (ranges, note) = match index {
        Some(index) => {
            let note = format!("{} tensors of {name}, in order", index.tensors.len());
            (index.tensors.iter().map(|tensor| tensor.data_offsets).collect(), note)
        }
        None => (vec![(0, len)], format!("{name} holds no tensors known here: read whole, in order")),
    };
    let block = settings.block_bytes[0].max(ALIGN) / ALIGN * ALIGN;
    Ok((split(&ranges, len, block).into(), note))
}

/// Ranges as aligned requests of at most `block` bytes: neighbours are joined, no page is read twice in a row.
fn split(ranges: &[(u64, u64)], len: u64, block: u64) -> Vec<Request> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for &(start, end) in ranges.iter().filter(|(start, end)| start < end) {
        let (start, end) = (start / ALIGN * ALIGN, end.min(len));
        match joined.last_mut() {
            Some(last) if (last.0..=last.1.next_multiple_of(ALIGN)).contains(&start) => {
                last.1 = last.1.max(end)
            }
            _ => joined.push((start, end)),
        }
    }
    let mut requests = Vec::new();
    for (start, end) in joined {
        let mut at = start;
        while at < end {
            let next = (at + block).min(end);
            // The tail is asked for in whole pages; the file may end inside the last.
            let bytes = (next - at).next_multiple_of(ALIGN);
            requests.push(Request { offset: at, len: bytes as u32 });
            at = next;
        }
    }
    requests
}

fn kv_restore(settings: &Settings, index: u32, name: &str, len: u64) -> Result<(Arc<[Request]>, String)> {
    let largest = u64::from(KV_BLOCKS[KV_BLOCKS.len() - 1]);
    if len < largest {
        let text = format!("{name} has {len} bytes; profile=kv-restore needs at least {largest}");
        return Err(Error::new(crate::error::ErrorKind::Usage, text));
    }
    let mut rng = Rng::new(mix(settings.randseed ^ mix(u64::from(index) + 1)));
    let wanted = match settings.size {
        Some(Amount::Bytes(bytes)) => bytes,
        Some(share) => share.of(len, ALIGN),
        None => len / u64::from(settings.numjobs),
    };
    let mut requests = Vec::new();
    let mut bytes = 0;
    while bytes < wanted.max(largest) {
        let block = KV_BLOCKS[rng.below(KV_BLOCKS.len() as u64) as usize];
        // A block lies at a multiple of its own size, as in a slab store.
        let places = len / u64::from(block);
        requests.push(Request { offset: rng.below(places) * u64::from(block), len: block });
        bytes += u64::from(block);
    }
    let note = format!("{} sessions, blocks of 128 KiB to 2 MiB at random in {name}", settings.numjobs);
    Ok((requests.into(), note))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join_and_tails_round_up() {
        let requests = split(&[(100, 5000), (5000, 9000), (1 << 20, (1 << 20) + 10)], 2 << 20, 8192);
        let list: Vec<(u64, u32)> = requests.iter().map(|request| (request.offset, request.len)).collect();
        assert_eq!(list, [(0, 8192), (8192, 4096), (1 << 20, 4096)]);
        assert!(split(&[(5, 5)], 100, 4096).is_empty());
        let tail = split(&[(0, 5000)], 5000, 1 << 20);
        assert_eq!(tail, [Request { offset: 0, len: 8192 }]);
    }

    #[test]
    fn tensors_of_a_safetensors_file_are_read_in_order() {
        let header = br#"{"b":{"dtype":"F32","shape":[2048],"data_offsets":[0,8192]},"a":{"dtype":"U8","shape":[8000],"data_offsets":[8192,16192]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.resize(file.len() + 16192, 1);
        let mut settings = Settings { filenames: vec!["m.safetensors".into()], ..Settings::default() };
        adjust(&mut settings, Profile::ModelLoad).unwrap();
        assert!(settings.direct && settings.engine == EngineKind::IoUring && settings.iodepth == 32);
        let mut read_at = |offset: u64, buffer: &mut [u8]| {
            buffer.copy_from_slice(&file[offset as usize..offset as usize + buffer.len()]);
            Ok(())
        };
        let name = "m.safetensors";
        let (requests, note) =
            trace(&settings, Profile::ModelLoad, 0, name, file.len() as u64, &mut read_at).unwrap();
        assert!(note.contains("2 tensors"), "{note}");
        let bytes: u64 = requests.iter().map(|request| u64::from(request.len)).sum();
        assert_eq!(requests[0].offset, 0);
        assert!((16192..16192 + 3 * 4096).contains(&bytes), "{bytes}");
    }

    #[test]
    fn kv_blocks_stay_inside_and_repeat_with_the_seed() {
        let mut settings = Settings { filenames: vec!["kv".into()], ..Settings::default() };
        adjust(&mut settings, Profile::KvRestore).unwrap();
        let make = |index| kv_restore(&settings, index, "kv", 100 << 20).unwrap().0;
        assert_eq!(make(0), make(0));
        assert_ne!(make(0), make(1));
        for request in make(0).iter() {
            assert!(request.offset + u64::from(request.len) <= 100 << 20);
            assert_eq!(request.offset % u64::from(request.len), 0);
        }
        assert!(kv_restore(&settings, 0, "kv", 1 << 20).unwrap_err().to_string().contains("at least"));
    }

    #[test]
    fn contradictions_are_refused() {
        let mut settings = Settings { filenames: vec!["f".into()], ..Settings::default() };
        crate::options::apply(&mut settings, "rw", Some("write")).unwrap();
        assert!(adjust(&mut settings, Profile::ModelLoad).unwrap_err().contains("leave rw out"));
        let mut settings = Settings::default();
        assert!(adjust(&mut settings, Profile::ModelLoad).unwrap_err().contains("filename"));
    }
}
