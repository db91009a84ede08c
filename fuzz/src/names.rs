//! Names: of nodes, of tensors, of what is imported, and the notes of interrupted imports.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use engine::fuzzing;
use engine::tensors::{Format, tensor_name, view_name};

use crate::source::Source;
use crate::{digest, output, pool_names};

pub fn run(input: &[u8]) -> u64 {
    let node = fuzzing::check_name(OsStr::from_bytes(input));
    if node.is_ok() {
        assert!((1..=255).contains(&input.len()) && !input.contains(&b'/') && !input.contains(&0));
        assert!(input != b"." && input != b"..");
    }
    let text = String::from_utf8_lossy(input);
    let sums = [text_names(&text), note(input), progress(input)];
    digest(&(node.is_ok(), sums))
}

fn text_names(text: &str) -> u64 {
    // Tensors to files and back.
    let view = view_name(text);
    fuzzing::check_name(OsStr::new(&view)).expect("a view's name is a file name");
    assert!(view.len() + ".npy".len() <= 255 && !view.contains(|c: char| c.is_ascii_control()));
    if !view.contains("%~") {
        assert_eq!(tensor_name(&view).as_deref(), Some(text));
    }
    let tensor = tensor_name(text);
    if let Some(tensor) = &tensor {
        assert_eq!(view_name(tensor), text, "two names of one view");
    }
    // Names in a pool as people write them.
    let pool = pool_names::normalize(text);
    if let Ok(name) = &pool {
        assert_eq!(pool_names::normalize(name).as_ref().ok(), Some(name));
        for part in name.split('/').filter(|part| !part.is_empty()) {
            fuzzing::check_name(OsStr::new(part)).expect("a part of a normal path is a name");
        }
        assert!(fuzzing::path_parts(name).is_ok());
        assert_eq!(pool_names::join("", name), *name);
    }
    if let Ok(name) = pool_names::normalize_new(text) {
        let first = name.split('/').next().unwrap_or_default();
        assert!(!matches!(first, "" | ".nvtier" | ".tensors" | ".nvtier-partial"), "{name}");
    }
    if let Ok(parts) = fuzzing::path_parts(text) {
        assert!(parts.iter().all(|part| !part.is_empty() && *part != "." && *part != ".."));
    }
    let shown = output::printable(text).to_string();
    assert!(!shown.contains(|c: char| c.is_control()), "{shown:?} would reach a terminal");
    digest(&(view, tensor, pool.ok(), Format::of_name(text).map(Format::name)))
}

/// `<bytes> <key>`, as it stands beside an interrupted import.
fn note(input: &[u8]) -> u64 {
    let mut source = Source::new(input);
    let size = source.u64();
    let key_len = source.u8() as usize;
    let key = String::from_utf8_lossy(source.take(key_len)).into_owned();
    let kept = fuzzing::kept(source.rest(), &key, size);
    assert!(kept <= size, "more is kept than there is");
    let honest = format!("{size} {key}");
    assert_eq!(fuzzing::kept(honest.as_bytes(), &key, u64::MAX), size);
    assert_eq!(
        fuzzing::kept(honest.as_bytes(), &format!("{key}x"), u64::MAX),
        0,
        "another source's note counts"
    );
    kept
}

/// What is written without gaps, against a flat map.
fn progress(input: &[u8]) -> u64 {
    let mut source = Source::new(input);
    let mut writes = Vec::new();
    let mut flat = [false; 512];
    while !source.is_empty() && writes.len() < 64 {
        let (offset, len) = (u64::from(source.u8()), u64::from(source.u8()));
        flat[offset as usize..(offset + len) as usize].fill(true);
        writes.push((offset, len));
    }
    let (contiguous, end) = fuzzing::progress(&writes);
    let gap = flat.iter().position(|written| !written).unwrap_or(flat.len()) as u64;
    assert_eq!(contiguous, gap, "{writes:?}");
    assert_eq!(end, writes.iter().map(|(offset, len)| offset + len).max().unwrap_or(0));
    digest(&(contiguous, end))
}
