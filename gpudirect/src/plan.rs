//! Which tensors of which sources go where: names to one allocation on the device.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use engine::tensors::{self, Dtype, TensorInfo};

use crate::error::{Error, ErrorKind, Result};
use crate::lane::Run;
use crate::source::Source;

/// Alignment of tensors on the device, as `cudaMalloc` gives it.
const ALIGN: u64 = 256;
/// The most bytes that alignment may cost; with very many tensors it is less strict then.
const PADDING_MAX: u64 = 64 << 20;
/// Bytes in a RAM tier that are worth pinning it,
const TIER_LEAST: u64 = 1 << 20;
/// where they are one in so many of what is loaded.
const TIER_SHARE: u64 = 16;

/// A rank's part of each tensor that is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which part, from 0.
    pub rank: u32,
    /// How many parts.
    pub world: u32,
    /// Patterns of names, and the dimension that tensors of such names are cut along; the first that fits counts. A tensor
    /// that no pattern fits is loaded whole.
    pub rules: Vec<(String, usize)>,
}

/// What to take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Patterns of names with `*` and `?`; a tensor that fits any is taken. None at all: every tensor is.
    pub filters: Vec<String>,
    /// A rank's part.
    pub shard: Option<Shard>,
}

/// A tensor that is to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Lengths in C order, of the part that is loaded.
    pub shape: Vec<u64>,
    /// Which source it is in.
    pub source: u32,
    /// Offset in the allocation on the device.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Ranges of the source, in order of the tensor's bytes; all of one length, `stride` apart.
    rows: Rows,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rows {
    start: u64,
    len: u64,
    stride: u64,
    count: u64,
}

/// A tensor of a plan, or a range of one of its dimensions, for [`Plan::part`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which of the plan's tensors.
    pub index: usize,
    /// A dimension, and which of its elements; `None`: the whole tensor.
    pub cut: Option<(usize, Range<u64>)>,
}

/// What a load does.
#[derive(Debug)]
pub struct Plan {
    /// Shared with the plans that are parts of this one.
    sources: Arc<Vec<Source>>,
    /// Of each source.
    metadata: Arc<Vec<BTreeMap<String, String>>>,
    tensors: Vec<PlannedTensor>,
    device_bytes: u64,
    padding_bytes: u64,
}

impl Plan {
    /// Reads the headers of the sources and chooses.
    pub fn new(sources: Vec<Source>, options: &PlanOptions) -> Result<Plan> {
        let mut tensors: Vec<PlannedTensor> = Vec::new();
        let mut names: HashMap<String, u32> = HashMap::new();
        let mut metadata = Vec::with_capacity(sources.len());
        for (index, source) in sources.iter().enumerate() {
            let parsed = tensors::parse(source.name(), source.len(), &mut |offset, out| {
                source.read_at(offset, out).map_err(|error| {
                    let kind = match error.kind() {
                        ErrorKind::Changed => engine::ErrorKind::OutOfRange,
                        ErrorKind::Corrupt => engine::ErrorKind::Corrupt,
                        _ => engine::ErrorKind::Io,
                    };
                    engine::Error::with_source(kind, format!("read the header of {}", source.name()), error)
                })
            })?;
            let Some(parsed) = parsed else {
                let why = if source.is_empty() {
                    "it is empty"
                } else {
                    "its name ends in none of .safetensors, .gguf, .npy"
                };
                let context = format!("load {}: it is no tensor file: {why}", source.name());
                return Err(Error::new(ErrorKind::Malformed, context));
            };
            for tensor in &parsed.tensors {
                if let Some(other) = names.insert(tensor.name.clone(), index as u32) {
                    let context = format!(
                        "tensor {:?} is both in {} and in {}",
                        tensor.name,
                        sources[other as usize].name(),
                        source.name()
                    );
                    return Err(Error::new(ErrorKind::Invalid, context));
                }
                if options.filters.is_empty()
                    || options.filters.iter().any(|filter| fits(filter, &tensor.name))
                {
                    tensors.push(planned(tensor, index as u32, options.shard.as_ref())?);
                }
            }
            metadata.push(parsed.metadata);
        }
        if tensors.is_empty() && !options.filters.is_empty() && !names.is_empty() {
            let context = format!("no tensor of {} fits {:?}", names.len(), options.filters);
            return Err(Error::new(ErrorKind::NotFound, context));
        }
        Plan::placed(Arc::new(sources), Arc::new(metadata), tensors)
    }

    fn placed(
        sources: Arc<Vec<Source>>,
        metadata: Arc<Vec<BTreeMap<String, String>>>,
        tensors: Vec<PlannedTensor>,
    ) -> Result<Plan> {
        let mut plan = Plan { sources, metadata, tensors, device_bytes: 0, padding_bytes: 0 };
        plan.place()?;
        Ok(plan)
    }

    /// A plan of some of the tensors of this one, in the order given, from the same open sources. What this plan cut by a
    /// [`Shard`] cannot be cut again.
    pub fn part(&self, parts: &[Part]) -> Result<Plan> {
        let mut tensors = Vec::with_capacity(parts.len());
        for Part { index, cut } in parts {
            let Some(tensor) = self.tensors.get(*index) else {
                let context = format!("tensor {index} of a plan of {}", self.tensors.len());
                return Err(Error::new(ErrorKind::Invalid, context));
            };
            tensors.push(match cut {
                Some((dim, range)) if tensor.rows.count == 1 => tensor.cut(*dim, range.clone())?,
                Some(_) => {
                    let context = format!("cut tensor {:?}, which is cut already", tensor.name);
                    return Err(Error::new(ErrorKind::Invalid, context));
                }
                None => tensor.clone(),
            });
        }
        Plan::placed(self.sources.clone(), self.metadata.clone(), tensors)
    }

    /// What each source's header says beside its tensors: `__metadata__` of safetensors, key-values of GGUF.
    pub fn metadata(&self) -> &[BTreeMap<String, String>] {
        &self.metadata
    }

    /// Gives each tensor its place, in the order of the sources, so that neighbours there are neighbours here.
    fn place(&mut self) -> Result<()> {
        let bytes: u64 = self.tensor_bytes()?;
        let mut align = ALIGN;
        loop {
            let mut end = 0u64;
            for tensor in &mut self.tensors {
                tensor.offset = end.next_multiple_of(align);
                end = tensor.offset + tensor.len;
            }
            (self.device_bytes, self.padding_bytes) = (end, end - bytes);
            if self.padding_bytes <= PADDING_MAX || align == 16 {
                return Ok(());
            }
            align /= 2;
        }
    }

    fn tensor_bytes(&self) -> Result<u64> {
        let sum = self.tensors.iter().try_fold(0u64, |sum, tensor| sum.checked_add(tensor.len));
        sum.filter(|&sum| sum < 1 << 60)
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "more than 2^60 bytes of tensors"))
    }

    /// Where the bytes come from.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// What is loaded, in the order of the sources.
    pub fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    /// Bytes of the one allocation.
    pub fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// Of these, bytes between tensors.
    pub fn padding_bytes(&self) -> u64 {
        self.padding_bytes
    }

    /// What the lane has to move into an allocation at `address`.
    pub fn runs(&self, address: u64) -> Vec<Run> {
        self.runs_to(|_, tensor| address + tensor.offset)
    }

    /// What the lane has to move to places that are told for each tensor, by its number.
    pub(crate) fn runs_to(&self, place: impl Fn(usize, &PlannedTensor) -> u64) -> Vec<Run> {
        let mut runs = Vec::with_capacity(self.tensors.len());
        for (number, tensor) in self.tensors.iter().enumerate() {
            let Rows { start, len, stride, count } = tensor.rows;
            let first = place(number, tensor);
            for row in (0..count).filter(|_| len > 0) {
                let device = first + row * len;
                runs.push(Run {
                    source: tensor.source,
                    offset: start + row * stride,
                    len,
                    device,
                    tensor: number as u32,
                });
            }
        }
        runs
    }

    /// Bytes that the RAM tier of the sources' pool has now, from the first to the last byte that is wanted of each.
    pub fn resident_bytes(&self) -> u64 {
        let mut spans: BTreeMap<u32, Range<u64>> = BTreeMap::new();
        for tensor in self.tensors.iter().filter(|tensor| tensor.len > 0) {
            let Rows { start, len, stride, count } = tensor.rows;
            let end = start + (count - 1) * stride + len;
            let span = spans.entry(tensor.source).or_insert(start..end);
            *span = span.start.min(start)..span.end.max(end);
        }
        spans.into_iter().map(|(source, span)| self.sources[source as usize].resident_bytes(span)).sum()
    }

    /// Whether the RAM tier has so much of it that the tier is worth being made known to the device
    /// ([`Lane::use_tier`](crate::Lane::use_tier)), which takes time and pins all of it: headers are there always.
    pub fn wants_tier(&self) -> bool {
        let resident = self.resident_bytes();
        resident >= TIER_LEAST && resident >= self.device_bytes / TIER_SHARE
    }

    /// A tensor for messages.
    pub(crate) fn describe(&self, number: u32) -> String {
        self.tensors
            .get(number as usize)
            .map_or_else(|| "a tensor".into(), |tensor| format!("tensor {:?}", tensor.name))
    }
}

impl PlannedTensor {
    /// The ranges of its source that make it up: first byte and length.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let Rows { start, len, stride, count } = self.rows;
        (0..count).map(move |row| (start + row * stride, len))
    }

    fn uncut(&self, dim: usize, why: &str) -> Error {
        let context =
            format!("cut tensor {:?} of shape {:?} along dimension {dim}: {why}", self.name, self.shape);
        Error::new(ErrorKind::Invalid, context)
    }

    /// A range of one dimension of a tensor that is whole.
    fn cut(&self, dim: usize, range: Range<u64>) -> Result<PlannedTensor> {
        let Some(&n) = self.shape.get(dim) else { return Err(self.uncut(dim, "it has no such dimension")) };
        if range.start > range.end || range.end > n {
            return Err(self.uncut(dim, &format!("{range:?} is no part of its {n} elements")));
        }
        let bytes = |elements: u64| {
            let mut inner = self.shape[dim..].to_vec();
            inner[0] = elements;
            self.dtype.tensor_bytes(&inner)
        };
        let part = range.end - range.start;
        // A row is what lies between two steps of the dimensions before this one.
        let (Some(skip), Some(len), Some(stride)) = (bytes(range.start), bytes(part), bytes(n)) else {
            return Err(self.uncut(dim, "a part is no whole number of bytes or blocks"));
        };
        let mut shape = self.shape.clone();
        shape[dim] = part;
        let count: u64 = self.shape[..dim].iter().product();
        let start = self.rows.start;
        let rows = if len == 0 || count == 0 {
            Rows { start, len: 0, stride: 0, count: 0 }
        } else if len == stride {
            Rows { start, len: self.len, stride: 0, count: 1 }
        } else {
            Rows { start: start + skip, len, stride, count }
        };
        Ok(PlannedTensor { shape, len: rows.len * rows.count, rows, ..self.clone() })
    }
}

fn planned(tensor: &TensorInfo, source: u32, shard: Option<&Shard>) -> Result<PlannedTensor> {
    let whole = |rows| PlannedTensor {
        name: tensor.name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
        source,
        offset: 0,
        len: tensor.len(),
        rows,
    };
    let start = tensor.data_offsets.0;
    let all = whole(Rows { start, len: tensor.len(), stride: 0, count: 1 });
    let Some(shard) = shard else { return Ok(all) };
    if shard.world == 0 || shard.rank >= shard.world {
        let context = format!("rank {} of {} ranks", shard.rank, shard.world);
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    let Some(&(_, dim)) = shard.rules.iter().find(|(pattern, _)| fits(pattern, &tensor.name)) else {
        return Ok(all);
    };
    let world = u64::from(shard.world);
    match tensor.shape.get(dim) {
        Some(&n) if n % world == 0 => {
            let part = n / world;
            let start = u64::from(shard.rank) * part;
            all.cut(dim, start..start + part)
        }
        Some(&n) => Err(all.uncut(dim, &format!("{n} is no multiple of {world} ranks"))),
        None => Err(all.uncut(dim, "it has no such dimension")),
    }
}

/// Whether a name fits a pattern: `*` stands for any text, `?` for one character.
pub fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            (p, n) = (p + 1, n + 1);
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            (p, n) = (at + 1, from + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name) in [
            ("*", ""),
            ("a*c", "abc"),
            ("a*c", "ac"),
            ("*.weight", "x.weight"),
            ("l.?.w", "l.1.w"),
            ("*b*b", "abcbb"),
        ] {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("", "a"), ("a*c", "acd"), ("?", ""), ("l.?.w", "l.10.w"), ("A", "a")] {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }

    fn info(dtype: Dtype, shape: &[u64]) -> TensorInfo {
        let len = dtype.tensor_bytes(shape).unwrap();
        TensorInfo { name: "w".into(), dtype, shape: shape.to_vec(), data_offsets: (100, 100 + len) }
    }

    fn cut(tensor: &TensorInfo, rank: u32, world: u32, dim: usize) -> Result<PlannedTensor> {
        planned(tensor, 0, Some(&Shard { rank, world, rules: vec![("w".into(), dim)] }))
    }

    #[test]
    fn a_part_along_each_dimension() {
        let tensor = info(Dtype::F32, &[4, 6, 2]);
        let first = cut(&tensor, 1, 2, 0).unwrap();
        assert_eq!((first.shape.clone(), first.len), (vec![2, 6, 2], 96));
        assert_eq!(first.ranges().collect::<Vec<_>>(), [(196, 96)]);
        let middle = cut(&tensor, 2, 3, 1).unwrap();
        assert_eq!(middle.shape, [4, 2, 2]);
        assert_eq!(middle.ranges().collect::<Vec<_>>(), [(132, 16), (180, 16), (228, 16), (276, 16)]);
        let last = cut(&tensor, 0, 2, 2).unwrap();
        assert_eq!((last.ranges().count(), last.len), (24, 96));
    }

    #[test]
    fn a_range_of_a_dimension() {
        let whole = planned(&info(Dtype::F32, &[4, 6, 2]), 0, None).unwrap();
        let rows = whole.cut(0, 1..3).unwrap();
        assert_eq!((rows.shape.clone(), rows.len), (vec![2, 6, 2], 96));
        assert_eq!(rows.ranges().collect::<Vec<_>>(), [(148, 96)]);
        let columns = whole.cut(1, 5..6).unwrap();
        assert_eq!(columns.ranges().collect::<Vec<_>>(), [(140, 8), (188, 8), (236, 8), (284, 8)]);
        assert_eq!(whole.cut(1, 0..6).unwrap(), whole);
        assert_eq!((whole.cut(2, 1..1).unwrap().shape, whole.cut(2, 1..1).unwrap().len), (vec![4, 6, 0], 0));
        for (dim, range) in [(1, 5..7), (3, 0..1), (0, Range { start: 2, end: 1 })] {
            assert_eq!(whole.cut(dim, range).unwrap_err().kind(), ErrorKind::Invalid);
        }
        let packed = planned(&info(Dtype::F4, &[2, 4]), 0, None).unwrap();
        assert_eq!(packed.cut(1, 2..4).unwrap().ranges().collect::<Vec<_>>(), [(101, 1), (103, 1)]);
        assert!(packed.cut(1, 1..3).is_err());
    }

    #[test]
    fn parts_that_are_none_are_refused() {
        for (dtype, shape, world, dim, words) in [
            (Dtype::F32, vec![4, 6], 4, 1, "no multiple"),
            (Dtype::F32, vec![4, 6], 2, 2, "no such dimension"),
            (Dtype::F4, vec![4, 2], 2, 1, "no whole number"),
            (Dtype::from_ggml(2).unwrap(), vec![2, 32], 2, 1, "no whole number"),
        ] {
            let error = cut(&info(dtype, &shape), 0, world, dim).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        assert!(cut(&info(Dtype::U8, &[4]), 2, 2, 0).is_err());
        assert_eq!(cut(&info(Dtype::F32, &[0, 4]), 0, 2, 1).unwrap().len, 0);
    }
}
