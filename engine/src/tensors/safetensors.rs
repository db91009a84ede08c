//! safetensors: an 8-byte little-endian length, a JSON header, the data.
//!
//! ```text
//! 0        8                8 + n            size
//! | n: u64 | JSON, n bytes  | data           |
//! {"__metadata__": {"k": "v"}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
//! ```
//!
//! Rules as the safetensors crate has them (README of huggingface/safetensors, "Format" and "Notes"): a header of at most
//! 100 MB that starts with `{`, offsets relative to the end of the header, tensors that cover the whole data without overlap or
//! hole, `dtype` times `shape` equal to the bytes. Its README also forbids duplicate keys, which JSON maps drop without a
//! word; here they are found. Unknown keys of a tensor are passed over, as there.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::cursor::Cursor;
use super::{
    Dtype, Format, MalformedKind as Kind, Parse, ReadAt, TensorIndex, TensorInfo, malformed, quoted,
};

/// Longest header, as in the safetensors crate (`MAX_HEADER_SIZE`).
pub const HEADER_MAX: u64 = 100_000_000;

/// What the visitor keeps of one tensor, before its offsets are known to be honest.
struct Entry {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// serde's errors carry text only; a duplicate is told by this mark, which no JSON error of serde_json starts with.
const DUPLICATE: &str = "\u{1}duplicate: ";

pub(super) fn parse(size: u64, read_at: &mut ReadAt<'_>) -> Parse<TensorIndex> {
    let mut cursor = Cursor::new(size, read_at);
    let len = cursor.u64("the header's length")?;
    if len > HEADER_MAX {
        return malformed(
            Kind::HeaderTooLarge,
            format!("its header claims {len} bytes; at most {HEADER_MAX} are allowed"),
        );
    }
    let json = cursor.bytes(len, "the header")?;
    let data_start = cursor.position();
    let data_len = cursor.remaining();
    if json.first() != Some(&b'{') {
        return malformed(Kind::BadMagic, "its header does not start with '{'");
    }
    let json = match std::str::from_utf8(&json) {
        Ok(json) => json,
        Err(e) => {
            return malformed(Kind::NotUtf8, format!("its header is not UTF-8 at byte {}", e.valid_up_to()));
        }
    };
    let (mut entries, metadata) = match header(json) {
        Ok(parsed) => parsed,
        Err(e) => {
            // serde quotes the value that it did not want, at any length.
            let text: String = e.to_string().chars().take(300).collect();
            return match text.strip_prefix(DUPLICATE) {
                Some(what) => malformed(Kind::DuplicateName, format!("its header names {what}")),
                None => {
                    malformed(Kind::BadHeader, format!("its header is not what safetensors asks for: {text}"))
                }
            };
        }
    };
    entries.sort_by(|a, b| (a.data_offsets, &a.name).cmp(&(b.data_offsets, &b.name)));
    let mut covered = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for entry in entries {
        let Entry { name, dtype, shape, data_offsets: (begin, end) } = entry;
        let who = quoted(&name);
        let Some(dtype) = Dtype::from_safetensors(&dtype) else {
            return malformed(
                Kind::UnknownDtype,
                format!("tensor {who} has the unknown dtype {}", quoted(&dtype)),
            );
        };
        if end < begin {
            return malformed(
                Kind::BadOffsets,
                format!("tensor {who} ends at {end}, before it begins at {begin}"),
            );
        }
        if end > data_len {
            return malformed(
                Kind::BeyondEnd,
                format!("tensor {who} ends at byte {end} of the data, which has only {data_len}"),
            );
        }
        match dtype.tensor_bytes(&shape) {
            None => {
                return malformed(
                    Kind::Overflow,
                    format!("tensor {who}: {dtype} x {shape:?} is no whole number of bytes"),
                );
            }
            Some(bytes) if bytes != end - begin => {
                return malformed(
                    Kind::WrongSize,
                    format!(
                        "tensor {who}: {dtype} x {shape:?} is {bytes} bytes, but its offsets span {}",
                        end - begin
                    ),
                );
            }
            Some(_) => {}
        }
        if begin < covered {
            return malformed(
                Kind::Overlap,
                format!(
                    "tensor {who} begins at {begin}, inside the tensor before it, which ends at {covered}"
                ),
            );
        }
        if begin > covered {
            return malformed(
                Kind::Hole,
                format!("bytes {covered}..{begin} of the data, before tensor {who}, belong to no tensor"),
            );
        }
        covered = end;
        tensors.push(TensorInfo { name, dtype, shape, data_offsets: (data_start + begin, data_start + end) });
    }
    if covered != data_len {
        return malformed(
            Kind::Hole,
            format!("bytes {covered}..{data_len}, the end of the data, belong to no tensor"),
        );
    }
    Ok(TensorIndex::new(Format::Safetensors, tensors, metadata))
}

type Header = (Vec<Entry>, BTreeMap<String, String>);

fn header(json: &str) -> serde_json::Result<Header> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let header = deserializer.deserialize_map(HeaderVisitor)?;
    deserializer.end()?; // spaces may follow: writers pad the header to 8 bytes
    Ok(header)
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut names = HashSet::new();
        let (mut entries, mut metadata) = (Vec::new(), BTreeMap::new());
        while let Some(name) = map.next_key::<String>()? {
            if names.contains(&name) {
                return Err(de::Error::custom(format!("{DUPLICATE}tensor {} twice", quoted(&name))));
            }
            if name == "__metadata__" {
                metadata = map.next_value_seed(MetadataSeed)?;
            } else {
                entries.push(map.next_value_seed(EntrySeed(name.clone()))?);
            }
            names.insert(name);
        }
        Ok((entries, metadata))
    }
}

struct MetadataSeed;

impl<'de> DeserializeSeed<'de> for MetadataSeed {
    type Value = BTreeMap<String, String>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`__metadata__`: an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut metadata = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if metadata.contains_key(&key) {
                return Err(de::Error::custom(format!("{DUPLICATE}metadata key {} twice", quoted(&key))));
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }
}

struct EntrySeed(String);

impl<'de> DeserializeSeed<'de> for EntrySeed {
    type Value = Entry;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entry, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor {}: an object with dtype, shape and data_offsets", quoted(&self.0))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
        let twice =
            |key: &str| de::Error::custom(format!("{DUPLICATE}{key} of tensor {} twice", quoted(&self.0)));
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "dtype" if dtype.is_some() => return Err(twice("dtype")),
                "shape" if shape.is_some() => return Err(twice("shape")),
                "data_offsets" if data_offsets.is_some() => return Err(twice("data_offsets")),
                "dtype" => dtype = Some(map.next_value::<String>()?),
                "shape" => shape = Some(map.next_value::<Vec<u64>>()?),
                "data_offsets" => data_offsets = Some(map.next_value::<(u64, u64)>()?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        match (dtype, shape, data_offsets) {
            (Some(dtype), Some(shape), Some(data_offsets)) => {
                Ok(Entry { name: self.0, dtype, shape, data_offsets })
            }
            _ => Err(de::Error::custom(format!(
                "tensor {} lacks dtype, shape or data_offsets",
                quoted(&self.0)
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, refused};
    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        testing::safetensors(json.as_bytes(), &vec![7; data])
    }

    fn refuse(json: &str, data: usize, kind: Kind, says: &str) {
        refused("m.safetensors", &file(json, data), kind, says);
    }

    #[test]
    fn reads_an_honest_file() {
        let json = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28],"more":[{}]},
            "a/..":{"shape":[2],"dtype":"BF16","data_offsets":[0,4]},"none":{"dtype":"U8","shape":[0,9],"data_offsets":[28,28]}}   "#;
        let bytes = file(json, 28);
        let index = testing::read("dir/M.SafeTensors", &bytes).unwrap().unwrap();
        let start = 8 + json.len() as u64;
        assert_eq!(index.format, Format::Safetensors);
        assert_eq!(index.metadata["format"], "pt");
        let names: Vec<_> = index.tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["a/..", "b", "none"]);
        assert_eq!(index.tensors[1].data_offsets, (start + 4, start + 28));
        assert_eq!(index.tensors[1].shape, [2, 3]);
        assert_eq!(index.find_view("a%2F..").unwrap().dtype, Dtype::BF16);
        assert_eq!(index.tensor("b").unwrap().len(), 24);
        assert!(index.tensor("none").unwrap().is_empty());
        assert!(index.tensor("c").is_none());
    }

    #[test]
    fn an_empty_set_of_tensors_is_valid() {
        assert!(testing::read("m.safetensors", &file("{}", 0)).unwrap().unwrap().tensors.is_empty());
    }

    #[test]
    fn overlaps_and_holes() {
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
            )
        };
        refuse(
            &two("[0,4]", "[2,6]"),
            6,
            Kind::Overlap,
            r#"tensor "b" begins at 2, inside the tensor before it, which ends at 4"#,
        );
        refuse(&two("[0,4]", "[0,4]"), 4, Kind::Overlap, r#"tensor "b" begins at 0"#);
        refuse(&two("[0,4]", "[5,9]"), 9, Kind::Hole, "bytes 4..5 of the data");
        refuse(&two("[1,5]", "[5,9]"), 9, Kind::Hole, "bytes 0..1 of the data");
        refuse(&two("[0,4]", "[4,8]"), 9, Kind::Hole, "bytes 8..9, the end of the data");
    }

    #[test]
    fn numbers_that_lie() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        refuse(
            &one("F32", "[4]", "[0,16]"),
            8,
            Kind::BeyondEnd,
            "ends at byte 16 of the data, which has only 8",
        );
        refuse(&one("F32", "[4]", "[0,9223372036854775808]"), 16, Kind::BeyondEnd, "9223372036854775808");
        refuse(&one("F32", "[4]", "[0,18446744073709551615]"), 16, Kind::BeyondEnd, "18446744073709551615");
        refuse(&one("F32", "[4]", "[0,18446744073709551616]"), 16, Kind::BadHeader, "floating point");
        refuse(&one("F32", "[4]", "[16,0]"), 16, Kind::BadOffsets, "ends at 0, before it begins at 16");
        refuse(&one("F32", "[4]", "[-1,15]"), 16, Kind::BadHeader, "`-1`");
        refuse(&one("F32", "[-4]", "[0,16]"), 16, Kind::BadHeader, "`-4`");
        refuse(&one("F32", "[4.0]", "[0,16]"), 16, Kind::BadHeader, "floating point");
        refuse(
            &one("F32", "[5]", "[0,16]"),
            16,
            Kind::WrongSize,
            "F32 x [5] is 20 bytes, but its offsets span 16",
        );
        refuse(
            &one("F32", "[9223372036854775808,2]", "[0,16]"),
            16,
            Kind::Overflow,
            "no whole number of bytes",
        );
        refuse(&one("F64", "[2305843009213693952]", "[0,0]"), 0, Kind::Overflow, "no whole number of bytes");
        refuse(&one("F4", "[3]", "[0,1]"), 1, Kind::Overflow, "no whole number of bytes");
        refuse(
            &one("F31", "[4]", "[0,16]"),
            16,
            Kind::UnknownDtype,
            r#"tensor "w" has the unknown dtype "F31""#,
        );
        refuse(&one("F32", "[4]", "[0,16,32]"), 16, Kind::BadHeader, "trailing characters");
    }

    #[test]
    fn duplicates() {
        let t = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
        refuse(&format!(r#"{{"w":{t},"w":{t}}}"#), 1, Kind::DuplicateName, r#"names tensor "w" twice"#);
        // The same name in another spelling.
        refuse(&format!(r#"{{"w":{t},"\u0077":{t}}}"#), 1, Kind::DuplicateName, r#"names tensor "w" twice"#);
        refuse(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, Kind::DuplicateName, "__metadata__");
        refuse(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0, Kind::DuplicateName, r#"metadata key "k" twice"#);
        let twice = r#"{"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        refuse(twice, 1, Kind::DuplicateName, r#"dtype of tensor "w" twice"#);
    }

    #[test]
    fn headers_that_are_none() {
        for n in 1..8 {
            refused("m.safetensors", &vec![0; n], Kind::Truncated, "the header's length needs 8 bytes");
        }
        refused("m.safetensors", &[0; 8], Kind::BadMagic, "does not start with '{'");
        refused(
            "m.safetensors",
            b"\x20\0\0\0\0\0\0\0{}",
            Kind::Truncated,
            "the header needs 32 bytes at offset 8, but only 2",
        );
        for claim in [HEADER_MAX + 1, 1 << 63, u64::MAX] {
            let bytes = [&claim.to_le_bytes()[..], b"{}"].concat();
            refused("m.safetensors", &bytes, Kind::HeaderTooLarge, &format!("claims {claim} bytes"));
        }
        refuse(" {}", 0, Kind::BadMagic, "does not start with '{'");
        refuse("{", 0, Kind::BadHeader, "EOF");
        refuse("{}x", 0, Kind::BadHeader, "trailing characters");
        refuse("{\"w\":null}", 0, Kind::BadHeader, r#"tensor "w": an object"#);
        refuse("{\"w\":{}}", 0, Kind::BadHeader, r#"tensor "w" lacks dtype"#);
        refuse("{\"__metadata__\":{\"k\":1}}", 0, Kind::BadHeader, "expected a string");
        let deep = format!("{{\"w\":{{\"x\":{}", "[".repeat(100_000));
        refuse(&deep, 0, Kind::BadHeader, "EOF while parsing a list");
        let bytes = testing::safetensors(b"{\"\xff\":1}", &[]);
        refused("m.safetensors", &bytes, Kind::NotUtf8, "not UTF-8 at byte 2");
    }

    #[test]
    fn a_100_mb_header_costs_nothing_when_the_file_is_short() {
        let asked = std::cell::Cell::new(0);
        let mut read_at = |_: u64, out: &mut [u8]| {
            asked.set(asked.get() + out.len());
            out.fill(0);
            out[..8].copy_from_slice(&HEADER_MAX.to_le_bytes());
            Ok(())
        };
        let error = super::super::parse("m.safetensors", 4096, &mut read_at).unwrap_err();
        assert!(testing::reason(&error).message.contains("the header needs 100000000 bytes"), "{error:?}");
        assert!(asked.get() <= 4096);
    }

    #[test]
    fn a_header_of_almost_100_mb_is_read() {
        let mut json = r#"{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#.to_owned();
        json.extend(std::iter::repeat_n(' ', HEADER_MAX as usize - json.len()));
        assert_eq!(testing::read("m.safetensors", &file(&json, 3)).unwrap().unwrap().tensors.len(), 1);
        json.push(' ');
        refuse(&json, 3, Kind::HeaderTooLarge, "claims 100000001 bytes");
    }
}
