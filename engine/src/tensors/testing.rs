//! What the tests of the parsers share.

use super::{Malformed, MalformedKind, TensorIndex, parse};
use crate::error::{Error, ErrorKind, Result};

/// A `read_at` over bytes that fails loudly when a parser asks beyond them.
pub fn over(bytes: &[u8]) -> impl FnMut(u64, &mut [u8]) -> Result<()> + '_ {
    |offset, out| {
        let at = usize::try_from(offset).expect("an offset inside the file");
        out.copy_from_slice(&bytes[at..at + out.len()]);
        Ok(())
    }
}

pub fn read(name: &str, bytes: &[u8]) -> Result<Option<TensorIndex>> {
    parse(name, bytes.len() as u64, &mut over(bytes))
}

/// The reason behind a refusal.
pub fn reason(error: &Error) -> &Malformed {
    assert_eq!(error.kind(), ErrorKind::Malformed, "{error:?}");
    std::error::Error::source(error).and_then(|s| s.downcast_ref()).expect("a Malformed source")
}

#[track_caller]
pub fn refused(name: &str, bytes: &[u8], kind: MalformedKind, says: &str) {
    let error = read(name, bytes).expect_err("the file should be refused");
    let reason = reason(&error);
    assert_eq!(reason.kind, kind, "{reason}");
    assert!(reason.message.contains(says), "{:?} does not say {says:?}", reason.message);
}

pub fn safetensors(json: &[u8], data: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes()[..], json, data].concat()
}

/// Writes GGUF files, honest or not.
pub struct Gguf {
    version: u32,
    claim: Option<(u64, u64)>,
    values: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    alignment: usize,
}

fn gguf_string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

impl Gguf {
    pub fn new(version: u32) -> Gguf {
        Gguf { version, claim: None, values: Vec::new(), tensors: Vec::new(), alignment: 32 }
    }

    pub fn claim(mut self, tensors: u64, values: u64) -> Gguf {
        self.claim = Some((tensors, values));
        self
    }

    pub fn align(mut self, alignment: usize) -> Gguf {
        self.alignment = alignment;
        self
    }

    pub fn value(mut self, key: &str, kind: u32, raw: &[u8]) -> Gguf {
        self.values.push([&gguf_string(key.as_bytes())[..], &kind.to_le_bytes(), raw].concat());
        self
    }

    pub fn raw_key(mut self, key: &[u8]) -> Gguf {
        self.values.push([&gguf_string(key)[..], &0u32.to_le_bytes(), &[1]].concat());
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Gguf {
        self.value(key, 4, &value.to_le_bytes())
    }

    pub fn text(self, key: &str, value: &str) -> Gguf {
        self.value(key, 8, &gguf_string(value.as_bytes()))
    }

    pub fn texts(self, key: &str, values: &[&str]) -> Gguf {
        let mut raw = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        values.iter().for_each(|v| raw.extend(gguf_string(v.as_bytes())));
        self.value(key, 9, &raw)
    }

    /// `dimensions` as in the file: the contiguous one first.
    pub fn tensor(mut self, name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Gguf {
        let mut raw = gguf_string(name.as_bytes());
        raw.extend((dimensions.len() as u32).to_le_bytes());
        dimensions.iter().for_each(|d| raw.extend(d.to_le_bytes()));
        raw.extend(kind.to_le_bytes());
        raw.extend(offset.to_le_bytes());
        self.tensors.push(raw);
        self
    }

    /// The file, with that many bytes of data.
    pub fn data(self, len: usize) -> Vec<u8> {
        let (tensors, values) = self.claim.unwrap_or((self.tensors.len() as u64, self.values.len() as u64));
        let mut out =
            [&b"GGUF"[..], &self.version.to_le_bytes(), &tensors.to_le_bytes(), &values.to_le_bytes()]
                .concat();
        self.values.iter().chain(&self.tensors).for_each(|raw| out.extend(raw));
        if len > 0 {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
        }
        out.extend((0..len).map(|i| i as u8));
        out
    }
}
