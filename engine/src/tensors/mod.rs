//! Tensor files: what tensors a safetensors, GGUF or npy file holds, and where.
//!
//! The parsers are pure. They see a file through a `read_at` closure, trust no length they read, use checked arithmetic,
//! and hold memory in proportion to the header they were given (never to a number in it). They know no pool and no kernel.
//!
//! A file that lies is refused whole with [`ErrorKind::Malformed`]; the error's source is a [`Malformed`] that says which
//! rule it broke. The file itself stays readable as bytes: only its tensor views are absent.

mod cache;
mod cursor;
pub mod dtype;
pub mod gguf;
pub mod npy;
pub mod safetensors;
mod view;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::error::{Error, ErrorKind, Result};

pub use dtype::{Dtype, GgmlType};
pub use npy::npy_header;
pub(crate) use view::fnv1a;
pub use view::{tensor_name, view_name};

/// A named slice of a file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TensorInfo {
    /// The name in the file, any UTF-8 string.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Lengths in C order: the last dimension is contiguous. (GGUF writes them the other way round; here they are turned.)
    pub shape: Vec<u64>,
    /// First byte and the byte after the last, counted from the start of the file.
    pub data_offsets: (u64, u64),
}

impl TensorInfo {
    /// Bytes of the tensor's data.
    pub fn len(&self) -> u64 {
        self.data_offsets.1 - self.data_offsets.0
    }

    /// True for a tensor without elements.
    pub fn is_empty(&self) -> bool {
        self.data_offsets.0 == self.data_offsets.1
    }
}

/// Which format a file was read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Format {
    Safetensors,
    Gguf,
    Npy,
}

impl Format {
    /// Its name as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Safetensors => "safetensors",
            Format::Gguf => "GGUF",
            Format::Npy => "npy",
        }
    }

    /// By the extension of a file's name, in any case. The extension decides, as it does for the frameworks that open such files.
    pub fn of_name(name: &str) -> Option<Format> {
        let (stem, extension) = name.rsplit('/').next().unwrap_or(name).rsplit_once('.')?;
        if stem.is_empty() {
            return None; // ".npy" is a hidden file without an extension
        }
        [("safetensors", Format::Safetensors), ("gguf", Format::Gguf), ("npy", Format::Npy)]
            .into_iter()
            .find_map(|(e, f)| extension.eq_ignore_ascii_case(e).then_some(f))
    }
}

/// The tensors of one file, in the order of their data.
#[derive(Clone, Debug, serde::Serialize)]
pub struct TensorIndex {
    /// The format it was read as.
    pub format: Format,
    /// Sorted by where their data lies, then by name.
    pub tensors: Vec<TensorInfo>,
    /// `__metadata__` of safetensors, the key-values of GGUF (long arrays as a summary), nothing for npy.
    pub metadata: BTreeMap<String, String>,
    #[serde(skip)]
    views: HashMap<String, usize>,
}

impl TensorIndex {
    /// Builds the index; sorts the tensors by data offset.
    fn new(format: Format, mut tensors: Vec<TensorInfo>, metadata: BTreeMap<String, String>) -> TensorIndex {
        tensors.sort_by(|a, b| (a.data_offsets, &a.name).cmp(&(b.data_offsets, &b.name)));
        let views = tensors.iter().enumerate().map(|(i, t)| (view_name(&t.name), i)).collect();
        TensorIndex { format, tensors, metadata, views }
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let found = self.find_view(&view_name(name))?;
        (found.name == name).then_some(found)
    }

    /// The tensor whose [`view_name`] this is (without `.npy`).
    pub fn find_view(&self, view: &str) -> Option<&TensorInfo> {
        self.views.get(view).map(|&i| &self.tensors[i])
    }
}

/// Which rule of its format a file breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MalformedKind {
    /// The file ends inside its header.
    Truncated,
    /// It does not start as the format starts.
    BadMagic,
    /// A version or layout this program does not read.
    UnsupportedVersion,
    /// A header longer than any honest file's.
    HeaderTooLarge,
    /// Bytes that should be UTF-8 are not.
    NotUtf8,
    /// The header is not what the grammar says (JSON, Python literal, key-value records).
    BadHeader,
    /// Two tensors, or two keys, of one name.
    DuplicateName,
    /// An unknown element type, or one that has no view.
    UnknownDtype,
    /// The shape and the element type do not give the number of bytes that the offsets span.
    WrongSize,
    /// A number or product that does not fit.
    Overflow,
    /// Data offsets that run backwards or are not aligned as the format asks.
    BadOffsets,
    /// Two tensors share bytes.
    Overlap,
    /// Bytes between tensors, or after the last, that belong to none.
    Hole,
    /// A tensor beyond the end of the file.
    BeyondEnd,
}

/// What is wrong with a tensor file: the source of an [`ErrorKind::Malformed`] error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The rule that is broken.
    pub kind: MalformedKind,
    /// Which tensor or field breaks it, with the numbers.
    pub message: String,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Malformed {}

/// Why a parse ended: the file lies, or it could not be read.
#[derive(Debug)]
enum Failure {
    Malformed(Malformed),
    Read(Error),
}

type Parse<T> = std::result::Result<T, Failure>;

fn malformed<T>(kind: MalformedKind, message: impl Into<String>) -> Parse<T> {
    Err(Failure::Malformed(Malformed { kind, message: message.into() }))
}

/// A name from a file as it goes into a message: escaped, and cut when long.
fn quoted(name: &str) -> String {
    const SHOWN: usize = 80;
    match name.char_indices().nth(SHOWN) {
        Some((cut, _)) => format!("{:?}... ({} bytes)", &name[..cut], name.len()),
        None => format!("{name:?}"),
    }
}

/// Reads exactly the bytes at an offset, or fails.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> Result<()> + 'a;

/// Reads the header of the tensor file `name` of `size` bytes. `None`: not a tensor file (by its extension), or an empty file.
///
/// An empty file is no error because a writer that was just opened looks so.
/// Errors: [`ErrorKind::Malformed`] with a [`Malformed`] source, or what `read_at` gave.
pub fn parse(name: &str, size: u64, read_at: &mut ReadAt<'_>) -> Result<Option<TensorIndex>> {
    let Some(format) = Format::of_name(name) else { return Ok(None) };
    if size == 0 {
        return Ok(None);
    }
    let parsed = match format {
        Format::Safetensors => safetensors::parse(size, read_at),
        Format::Gguf => gguf::parse(size, read_at),
        Format::Npy => npy::parse(size, read_at),
    };
    match parsed {
        Ok(index) => Ok(Some(index)),
        Err(Failure::Read(error)) => Err(error),
        Err(Failure::Malformed(reason)) => Err(Error::with_source(
            ErrorKind::Malformed,
            format!("{name} is not a valid {} file", format.name()),
            reason,
        )),
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod testing;
