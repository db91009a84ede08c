//! Random and mutated bytes through every parser: no panic, no read beyond the file, memory in proportion to the input.

use proptest::prelude::*;

use super::testing::{Gguf, over, safetensors};
use super::{TensorIndex, parse};

/// What must hold for any answer, whatever the bytes.
fn check(name: &str, bytes: &[u8]) {
    let mut read = over(bytes); // panics on a read beyond the end
    let Ok(Some(index)) = parse(name, bytes.len() as u64, &mut read) else { return };
    let TensorIndex { tensors, metadata, .. } = &index;
    let text: usize = tensors.iter().map(|t| t.name.len() + 8 * t.shape.len()).sum::<usize>()
        + metadata.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
    // Escapes shrink, numbers as text grow (a byte of an array becomes up to 5).
    assert!(text <= 8 * bytes.len() + 64, "{text} bytes kept of {}", bytes.len());
    assert!(tensors.len() * 8 <= bytes.len());
    let mut covered = 0;
    for t in tensors {
        let (begin, end) = t.data_offsets;
        assert!(covered <= begin && begin <= end && end <= bytes.len() as u64, "{t:?}");
        assert_eq!(t.dtype.tensor_bytes(&t.shape), Some(end - begin), "{t:?}");
        covered = end;
        super::npy_header(t);
    }
}

fn valid() -> Vec<(&'static str, Vec<u8>)> {
    let json = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}}"#;
    let gguf = Gguf::new(3)
        .text("general.architecture", "llama")
        .u32("general.alignment", 32)
        .texts("tokens", &["a", "b"])
        .tensor("w", &[64, 2], 2, 0)
        .tensor("n", &[4], 0, 96)
        .data(112);
    let npy =
        b"\x93NUMPY\x01\0\x3e\0{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }  \n".to_vec();
    let npy = [&npy[..], &[0; 24]].concat();
    vec![("a.safetensors", safetensors(json, &[1; 24])), ("a.gguf", gguf), ("a.npy", npy)]
}

#[test]
fn the_seeds_are_valid() {
    for (name, bytes) in valid() {
        parse(name, bytes.len() as u64, &mut over(&bytes)).unwrap().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        for name in ["a.safetensors", "a.gguf", "a.npy"] {
            check(name, &bytes);
        }
    }

    #[test]
    fn random_headers(body in prop::collection::vec(any::<u8>(), 0..300), text in "[\\[\\]{}():,'\"a-z0-9 -]{0,200}") {
        check("a.safetensors", &safetensors(text.as_bytes(), &body));
        check("a.safetensors", &safetensors(&[b"{\"w\":", text.as_bytes(), b"}"].concat(), &body));
        check("a.gguf", &[b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0", &body[..]].concat());
        check("a.npy", &[b"\x93NUMPY\x01\0\x40\0{'descr': '<f4', ", text.as_bytes(), &body].concat());
    }

    #[test]
    fn mutated_headers(
        which in 0usize..3,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..8),
    ) {
        let (name, mut bytes) = valid().swap_remove(which);
        for (at, value, how) in edits {
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = value,
                1 => bytes[at] ^= 1 << (value % 8),
                2 => bytes.insert(at, value),
                _ if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => {}
            }
        }
        check(name, &bytes);
    }
}
