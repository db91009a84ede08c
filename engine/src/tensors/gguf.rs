//! GGUF, versions 2 and 3 (ggml's docs/gguf.md).
//!
//! ```text
//! | "GGUF" | version u32 | tensors u64 | key-values u64 |
//! | key-value: key string, type u32, value |  ...
//! | tensor: name string, dimensions u32, lengths u64 x n (contiguous first), ggml type u32, offset u64 | ...
//! | zeros up to a multiple of general.alignment (32) | data; offsets count from here, each a multiple of the alignment |
//! string: length u64, UTF-8.   array: type u32, length u64, elements.
//! ```
//!
//! Shapes are turned: GGUF names the contiguous dimension first, [`TensorInfo::shape`] names it last.
//! Unlike safetensors, holes are allowed (padding makes them); overlaps and tensors beyond the end are not.

use std::collections::{BTreeMap, HashSet};

use super::cursor::Cursor;
use super::{
    Dtype, Format, MalformedKind as Kind, Parse, ReadAt, TensorIndex, TensorInfo, malformed, quoted,
};

/// Longest header (key-values and tensor records). The largest vocabularies take some 20 MB.
pub const HEADER_MAX: u64 = 1 << 30;
/// Longest key and tensor name; the specification says 2^16 - 1 for keys, ggml 63 for names.
const NAME_MAX: u64 = 65_535;
/// Longest text kept in the index's metadata; chat templates fit. Longer ones are cut.
const TEXT_KEPT: u64 = 64 << 10;
/// Elements of a numeric array that are kept; of longer ones only type and length are.
const ELEMENTS_KEPT: u64 = 16;
/// ggml has 4 (`GGML_MAX_DIMS`) and says that more may come.
const DIMENSIONS_MAX: u32 = 8;
/// Arrays of arrays are in the specification; nobody writes them, and nobody needs more.
const DEPTH_MAX: u32 = 4;
const ALIGNMENT: &str = "general.alignment";

/// Types of values: `enum gguf_metadata_value_type`. Bytes of a scalar, or `None` for strings and arrays.
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const BOOL: u32 = 7;
fn scalar_bytes(kind: u32) -> Option<u64> {
    Some(match kind {
        0 | 1 | BOOL => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}
fn kind_name(kind: u32) -> &'static str {
    const NAMES: [&str; 13] = [
        "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
        "uint64", "int64", "float64",
    ];
    NAMES.get(kind as usize).copied().unwrap_or("unknown")
}

pub(super) fn parse(size: u64, read_at: &mut ReadAt<'_>) -> Parse<TensorIndex> {
    let mut cursor = Cursor::new(size, read_at);
    if &cursor.array::<4>("the magic")? != b"GGUF" {
        return malformed(Kind::BadMagic, "it does not start with GGUF");
    }
    match cursor.u32("the version")? {
        2 | 3 => {}
        version if version.swap_bytes() < 0x1_0000 => {
            return malformed(
                Kind::UnsupportedVersion,
                "it is a big-endian GGUF file; only little-endian ones are read",
            );
        }
        version => {
            return malformed(
                Kind::UnsupportedVersion,
                format!("GGUF version {version}; versions 2 and 3 are read"),
            );
        }
    }
    let tensor_count = cursor.u64("the number of tensors")?;
    let value_count = cursor.u64("the number of key-values")?;
    // The smallest records: an empty key with a byte; an empty name, no dimensions.
    let least = u128::from(value_count) * 13 + u128::from(tensor_count) * 24;
    if least > u128::from(cursor.remaining()) {
        return malformed(
            Kind::Truncated,
            format!(
                "{tensor_count} tensors and {value_count} key-values need {least} bytes, but only {} are left",
                cursor.remaining()
            ),
        );
    }

    let mut metadata = BTreeMap::new();
    let mut alignment = 32;
    for _ in 0..value_count {
        let key = string(&mut cursor, "a key")?;
        if metadata.contains_key(&key) {
            return malformed(Kind::DuplicateName, format!("key {} comes twice", quoted(&key)));
        }
        let kind = cursor.u32("a value's type")?;
        if key == ALIGNMENT {
            if kind != 4 {
                return malformed(Kind::BadHeader, format!("{ALIGNMENT} is {}, not uint32", kind_name(kind)));
            }
            alignment = cursor.u32(ALIGNMENT)?;
            if alignment < 8 || !alignment.is_power_of_two() {
                return malformed(
                    Kind::BadHeader,
                    format!("{ALIGNMENT} is {alignment}, no power of two of at least 8"),
                );
            }
            metadata.insert(key, alignment.to_string());
            continue;
        }
        let value = value(&mut cursor, kind, &key, 0)?;
        metadata.insert(key, value);
        within_limit(&cursor)?;
    }
    let records = tensor_records(&mut cursor, tensor_count)?;
    let alignment = u64::from(alignment);
    let data_start = cursor.position().next_multiple_of(alignment); // positions are below the file's size, no overflow
    let tensors = place(records, data_start, alignment, size)?;
    Ok(TensorIndex::new(Format::Gguf, tensors, metadata))
}

/// Name, type, shape in C order, offset in the data.
type Record = (String, Dtype, Vec<u64>, u64);

/// The records as they stand, with offsets relative to the data.
fn tensor_records(cursor: &mut Cursor<'_, '_>, count: u64) -> Parse<Vec<Record>> {
    let mut names = HashSet::new();
    let mut records = Vec::new();
    for _ in 0..count {
        let name = string(cursor, "a tensor's name")?;
        let who = quoted(&name);
        if !names.insert(name.clone()) {
            return malformed(Kind::DuplicateName, format!("tensor {who} comes twice"));
        }
        let dimensions = cursor.u32("a number of dimensions")?;
        if dimensions > DIMENSIONS_MAX {
            return malformed(
                Kind::BadHeader,
                format!("tensor {who} has {dimensions} dimensions; at most {DIMENSIONS_MAX} are read"),
            );
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            shape.push(cursor.u64("a dimension")?);
        }
        shape.reverse();
        let id = cursor.u32("a tensor's type")?;
        let Some(dtype) = Dtype::from_ggml(id) else {
            return malformed(Kind::UnknownDtype, format!("tensor {who} has the unknown ggml type {id}"));
        };
        let offset = cursor.u64("a tensor's offset")?;
        records.push((name, dtype, shape, offset));
        within_limit(cursor)?;
    }
    Ok(records)
}

fn place(records: Vec<Record>, data_start: u64, alignment: u64, size: u64) -> Parse<Vec<TensorInfo>> {
    let mut tensors = Vec::with_capacity(records.len());
    for (name, dtype, shape, offset) in records {
        let who = quoted(&name);
        let Some(bytes) = dtype.tensor_bytes(&shape) else {
            return malformed(
                Kind::Overflow,
                format!(
                    "tensor {who}: {dtype} x {shape:?} does not fit 64 bits or is no whole number of blocks"
                ),
            );
        };
        if offset % alignment != 0 {
            return malformed(
                Kind::BadOffsets,
                format!("tensor {who} lies at {offset}, no multiple of the alignment {alignment}"),
            );
        }
        let begin = data_start.checked_add(offset);
        let Some((begin, end)) =
            begin.and_then(|b| Some((b, b.checked_add(bytes)?))).filter(|&(_, end)| end <= size)
        else {
            return malformed(
                Kind::BeyondEnd,
                format!(
                    "tensor {who} is {bytes} bytes at {data_start} + {offset}, but the file ends at {size}"
                ),
            );
        };
        tensors.push(TensorInfo { name, dtype, shape, data_offsets: (begin, end) });
    }
    tensors.sort_by_key(|t| t.data_offsets);
    for pair in tensors.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        if b.data_offsets.0 < a.data_offsets.1 {
            return malformed(
                Kind::Overlap,
                format!(
                    "tensor {} begins at {}, inside tensor {}, which ends at {}",
                    quoted(&b.name),
                    b.data_offsets.0,
                    quoted(&a.name),
                    a.data_offsets.1
                ),
            );
        }
    }
    Ok(tensors)
}

fn within_limit(cursor: &Cursor<'_, '_>) -> Parse<()> {
    if cursor.position() > HEADER_MAX {
        return malformed(Kind::HeaderTooLarge, format!("its header is over {HEADER_MAX} bytes"));
    }
    Ok(())
}

fn string(cursor: &mut Cursor<'_, '_>, what: &str) -> Parse<String> {
    let len = cursor.u64(what)?;
    if len > NAME_MAX && len <= cursor.remaining() {
        return malformed(
            Kind::BadHeader,
            format!("{what} is {len} bytes long; at most {NAME_MAX} are allowed"),
        );
    }
    match String::from_utf8(cursor.bytes(len, what)?) {
        Ok(text) => Ok(text),
        Err(e) => {
            let at = e.utf8_error().valid_up_to();
            malformed(
                Kind::NotUtf8,
                format!("{what} at offset {} is not UTF-8 at byte {at}", cursor.position() - len),
            )
        }
    }
}

/// Reads or passes over a value; what comes back is its text for the index.
fn value(cursor: &mut Cursor<'_, '_>, kind: u32, key: &str, depth: u32) -> Parse<String> {
    if let Some(bytes) = scalar_bytes(kind) {
        let raw = cursor.bytes(bytes, key)?;
        return Ok(scalar_text(kind, &raw));
    }
    match kind {
        STRING => {
            let len = cursor.u64(key)?;
            let kept = len.min(TEXT_KEPT);
            let mut raw = cursor.bytes(kept, key)?;
            cursor.skip(len - kept, key)?;
            if let Err(e) = std::str::from_utf8(&raw) {
                // A character cut by the limit is no error (`error_len` is None there), anything else is.
                if e.error_len().is_some() || len == kept {
                    return malformed(Kind::NotUtf8, format!("the value of {} is not UTF-8", quoted(key)));
                }
                raw.truncate(e.valid_up_to());
            }
            Ok(String::from_utf8(raw).unwrap_or_default())
        }
        ARRAY => array(cursor, key, depth),
        _ => malformed(Kind::BadHeader, format!("the value of {} has the unknown type {kind}", quoted(key))),
    }
}

fn array(cursor: &mut Cursor<'_, '_>, key: &str, depth: u32) -> Parse<String> {
    if depth >= DEPTH_MAX {
        return malformed(
            Kind::BadHeader,
            format!("the value of {} nests arrays {DEPTH_MAX} deep", quoted(key)),
        );
    }
    let kind = cursor.u32(key)?;
    let len = cursor.u64(key)?;
    let summary = format!("{}[{len}]", kind_name(kind));
    if let Some(bytes) = scalar_bytes(kind) {
        let Some(total) = len.checked_mul(bytes) else {
            return malformed(Kind::Overflow, format!("the value of {} claims {summary}", quoted(key)));
        };
        if len > ELEMENTS_KEPT {
            cursor.skip(total, key)?;
            return Ok(summary);
        }
        let raw = cursor.bytes(total, key)?;
        let texts: Vec<_> = raw.chunks_exact(bytes as usize).map(|r| scalar_text(kind, r)).collect();
        return Ok(format!("[{}]", texts.join(", ")));
    }
    // A string takes at least 8 bytes, an inner array 12, so a claim beyond the file ends here and not in a long loop.
    if u128::from(len) * 8 > u128::from(cursor.remaining()) {
        return malformed(
            Kind::Truncated,
            format!(
                "the value of {} claims {summary}, but only {} bytes are left",
                quoted(key),
                cursor.remaining()
            ),
        );
    }
    for _ in 0..len {
        match kind {
            STRING => {
                let bytes = cursor.u64(key)?;
                cursor.skip(bytes, key)?;
            }
            ARRAY => drop(array(cursor, key, depth + 1)?),
            _ => {
                return malformed(
                    Kind::BadHeader,
                    format!("the value of {} is an array of the unknown type {kind}", quoted(key)),
                );
            }
        }
        within_limit(cursor)?;
    }
    Ok(summary)
}

fn scalar_text(kind: u32, raw: &[u8]) -> String {
    // `raw` has the length that `scalar_bytes` gives for `kind`; a wider little-endian copy serves all integers.
    let mut wide = [0; 8];
    wide[..raw.len()].copy_from_slice(raw);
    let unsigned = u64::from_le_bytes(wide);
    match kind {
        1 => (unsigned as u8 as i8).to_string(),
        3 => (unsigned as u16 as i16).to_string(),
        5 => (unsigned as u32 as i32).to_string(),
        6 => f32::from_bits(unsigned as u32).to_string(),
        BOOL => (unsigned != 0).to_string(),
        11 => (unsigned as i64).to_string(),
        12 => f64::from_bits(unsigned).to_string(),
        _ => unsigned.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, Gguf, refused};
    use super::*;

    const F32: u32 = 0;
    const Q4_0: u32 = 2;

    fn refuse(bytes: &[u8], kind: Kind, says: &str) {
        refused("m.gguf", bytes, kind, says);
    }

    #[test]
    fn reads_an_honest_file() {
        for version in [2, 3] {
            let bytes = Gguf::new(version)
                .text("general.architecture", "llama")
                .u32("llama.block_count", 30)
                .value("llama.rope.freq_base", 6, &10_000f32.to_le_bytes())
                .value("tokenizer.ggml.add_bos_token", BOOL, &[1])
                .texts("tokenizer.ggml.tokens", &["a", "bc", ""])
                .value(
                    "small",
                    ARRAY,
                    &[&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &(-1i32).to_le_bytes(), &[7, 0, 0, 0]]
                        .concat(),
                )
                .tensor("token_embd.weight", &[64, 3], Q4_0, 0)
                .tensor("norm", &[5], F32, 128)
                .data(148);
            let index = testing::read("m.GGUF", &bytes).unwrap().unwrap();
            assert_eq!(index.metadata["general.architecture"], "llama");
            assert_eq!(index.metadata["llama.block_count"], "30");
            assert_eq!(index.metadata["llama.rope.freq_base"], "10000");
            assert_eq!(index.metadata["tokenizer.ggml.add_bos_token"], "true");
            assert_eq!(index.metadata["tokenizer.ggml.tokens"], "string[3]");
            assert_eq!(index.metadata["small"], "[-1, 7]");
            let start = bytes.len() as u64 - 148;
            assert_eq!(start % 32, 0);
            let embedding = index.tensor("token_embd.weight").unwrap();
            assert_eq!((embedding.shape.as_slice(), embedding.dtype.name()), (&[3, 64][..], "Q4_0"));
            assert_eq!(embedding.data_offsets, (start, start + 3 * 2 * 18));
            assert_eq!(index.tensor("norm").unwrap().data_offsets, (start + 128, start + 148));
        }
    }

    #[test]
    fn the_alignment_key_moves_the_data() {
        let bytes = Gguf::new(3).u32(ALIGNMENT, 4096).tensor("w", &[2], F32, 4096).align(4096).data(4104);
        let index = testing::read("m.gguf", &bytes).unwrap().unwrap();
        assert_eq!(index.tensors[0].data_offsets, (8192, 8200));
        for bad in [0, 1, 4, 48] {
            refuse(
                &Gguf::new(3).u32(ALIGNMENT, bad).data(0),
                Kind::BadHeader,
                &format!("general.alignment is {bad}, no power of two"),
            );
        }
        refuse(
            &Gguf::new(3).text(ALIGNMENT, "x").data(0),
            Kind::BadHeader,
            "general.alignment is string, not uint32",
        );
        let off = Gguf::new(3).u32(ALIGNMENT, 64).tensor("w", &[2], F32, 32).align(64).data(128);
        refuse(&off, Kind::BadOffsets, "lies at 32, no multiple of the alignment 64");
    }

    #[test]
    fn overlaps_and_ends() {
        let two = Gguf::new(3).tensor("a", &[16], F32, 0).tensor("b", &[16], F32, 32).data(96);
        refuse(&two, Kind::Overlap, r#"tensor "b" begins at "#);
        let same = Gguf::new(3).tensor("a", &[1], F32, 0).tensor("b", &[1], F32, 0).data(32);
        refuse(&same, Kind::Overlap, r#"inside tensor"#);
        refuse(
            &Gguf::new(3).tensor("a", &[16], F32, 0).data(63),
            Kind::BeyondEnd,
            "is 64 bytes at 64 + 0, but the file ends at 127",
        );
        refuse(
            &Gguf::new(3).tensor("a", &[16], F32, 1 << 63).data(64),
            Kind::BeyondEnd,
            "9223372036854775808",
        );
        refuse(
            &Gguf::new(3).tensor("a", &[16], F32, u64::MAX - 31).data(64),
            Kind::BeyondEnd,
            "the file ends at",
        );
        refuse(
            &Gguf::new(3).tensor("a", &[1 << 62], F32, 0).data(64),
            Kind::Overflow,
            "does not fit 64 bits",
        );
        refuse(
            &Gguf::new(3).tensor("a", &[1 << 32, 1 << 32], F32, 0).data(64),
            Kind::Overflow,
            "does not fit 64 bits",
        );
        refuse(&Gguf::new(3).tensor("a", &[33], Q4_0, 0).data(64), Kind::Overflow, "whole number of blocks");
        // A hole is no lie: alignment makes them.
        let hole = Gguf::new(3).tensor("a", &[1], F32, 64).data(68);
        assert!(testing::read("m.gguf", &hole).is_ok());
    }

    #[test]
    fn types_and_names() {
        refuse(
            &Gguf::new(3).tensor("a", &[1], 4, 0).data(32),
            Kind::UnknownDtype,
            r#"tensor "a" has the unknown ggml type 4"#,
        );
        refuse(&Gguf::new(3).tensor("a", &[1], u32::MAX, 0).data(32), Kind::UnknownDtype, "4294967295");
        let twice = Gguf::new(3).tensor("a", &[1], F32, 0).tensor("a", &[1], F32, 32).data(64);
        refuse(&twice, Kind::DuplicateName, r#"tensor "a" comes twice"#);
        refuse(&Gguf::new(3).u32("k", 1).u32("k", 1).data(0), Kind::DuplicateName, r#"key "k" comes twice"#);
        refuse(&Gguf::new(3).value("k", 13, &[0]).data(0), Kind::BadHeader, "the unknown type 13");
        refuse(&Gguf::new(3).tensor("a", &[1; 9], F32, 0).data(32), Kind::BadHeader, "has 9 dimensions");
        refuse(
            &Gguf::new(3).raw_key(b"k\xff").data(64),
            Kind::NotUtf8,
            "a key at offset 32 is not UTF-8 at byte 1",
        );
        refuse(
            &Gguf::new(3).value("k", STRING, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]).data(0),
            Kind::NotUtf8,
            r#"value of "k""#,
        );
    }

    #[test]
    fn magic_and_version() {
        refuse(b"GGML\x03\0\0\0", Kind::BadMagic, "does not start with GGUF");
        refuse(b"GG", Kind::Truncated, "the magic needs 4 bytes");
        refuse(&Gguf::new(1).data(0), Kind::UnsupportedVersion, "GGUF version 1; versions 2 and 3 are read");
        refuse(&Gguf::new(4).data(0), Kind::UnsupportedVersion, "GGUF version 4");
        refuse(&Gguf::new(3u32.swap_bytes()).data(0), Kind::UnsupportedVersion, "big-endian");
    }

    #[test]
    fn claims_beyond_the_file() {
        for count in [1 << 20, 1 << 63, u64::MAX] {
            refuse(
                &Gguf::new(3).claim(count, 0).data(64),
                Kind::Truncated,
                &format!("{count} tensors and 0 key-values need"),
            );
            refuse(
                &Gguf::new(3).claim(0, count).data(64),
                Kind::Truncated,
                &format!("0 tensors and {count} key-values need"),
            );
        }
        let long = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
        refuse(
            &Gguf::new(3).value("k", ARRAY, &long(10, 1 << 63)).data(0),
            Kind::Overflow,
            "uint64[9223372036854775808]",
        );
        refuse(
            &Gguf::new(3).value("k", ARRAY, &long(0, 1 << 63)).data(0),
            Kind::Truncated,
            "9223372036854775808 bytes",
        );
        refuse(
            &Gguf::new(3).value("k", ARRAY, &long(STRING, u64::MAX)).data(0),
            Kind::Truncated,
            "claims string[18446744073709551615]",
        );
        refuse(
            &Gguf::new(3).value("k", STRING, &(1u64 << 63).to_le_bytes()).data(70_000),
            Kind::Truncated,
            "bytes",
        );
        refuse(
            &Gguf::new(3).value("k", ARRAY, &long(77, 1)).data(64),
            Kind::BadHeader,
            "array of the unknown type 77",
        );
        let mut nested = Vec::new();
        for _ in 0..1000 {
            nested.extend(long(ARRAY, 1));
        }
        refuse(&Gguf::new(3).value("k", ARRAY, &nested).data(0), Kind::BadHeader, "nests arrays 4 deep");
    }

    #[test]
    fn every_truncation_is_refused() {
        let whole = Gguf::new(3).text("k", "v").texts("t", &["x", "yz"]).tensor("w", &[8], F32, 0).data(32);
        assert!(testing::read("m.gguf", &whole).is_ok());
        for n in 1..whole.len() {
            let error = testing::read("m.gguf", &whole[..n]).expect_err("truncated");
            let kind = testing::reason(&error).kind;
            assert!(matches!(kind, Kind::Truncated | Kind::BeyondEnd), "{n}: {kind:?}");
        }
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let text = "x".to_owned() + &"ü".repeat(TEXT_KEPT as usize);
        let index = testing::read("m.gguf", &Gguf::new(3).text("k", &text).data(0)).unwrap().unwrap();
        assert_eq!(index.metadata["k"].len() as u64, TEXT_KEPT - 1);
    }
}
