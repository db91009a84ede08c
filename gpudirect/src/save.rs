//! A save: tensors on the device to a safetensors file that is there as a whole or not at all.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use engine::tensors::Dtype;
use nvme::{Device, FileDevice};
use rustix::fs::OFlags;

use crate::control::Control;
use crate::error::{Error, ErrorKind, Result};
use crate::lane::Lane;
use crate::lane::write::Span;
use crate::report::SaveReport;

/// A tensor to save. Who calls keeps its memory until the save has returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveTensor {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Lengths in C order.
    pub shape: Vec<u64>,
    /// Where it is on the device.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// How to save.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SaveOptions {
    /// `__metadata__` of the file. With more than one key the reference library's order is random; here it is sorted.
    pub metadata: BTreeMap<String, String>,
}

/// The types of safetensors in the order that its reference library has them (`enum Dtype` of its 0.8): larger elements come
/// first in a file, so that each tensor is aligned to its element.
const ORDER: [&str; 23] = [
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
    "",
];

fn rank(dtype: Dtype) -> usize {
    ORDER.iter().position(|name| *name == dtype.name()).unwrap_or(0)
}

/// The head of a safetensors file and the order of its tensors, as the reference library writes them.
fn head(tensors: &[SaveTensor], options: &SaveOptions) -> Result<(Vec<u8>, Vec<usize>)> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (&tensors[a], &tensors[b]);
        rank(b.dtype).cmp(&rank(a.dtype)).then_with(|| a.name.cmp(&b.name))
    });
    let text = |value: &str| serde_json::Value::from(value).to_string();
    let mut json = String::from("{");
    if !options.metadata.is_empty() {
        let pairs: Vec<String> =
            options.metadata.iter().map(|(key, value)| format!("{}:{}", text(key), text(value))).collect();
        json.push_str(&format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut offset = 0u64;
    for &index in &order {
        let tensor = &tensors[index];
        let refuse = |why: String| {
            Err(Error::new(ErrorKind::Invalid, format!("save tensor {:?}: {why}", tensor.name)))
        };
        if Dtype::from_safetensors(tensor.dtype.name()) != Some(tensor.dtype) {
            return refuse(format!("safetensors has no type {}", tensor.dtype));
        }
        if tensor.dtype.tensor_bytes(&tensor.shape) != Some(tensor.len) {
            return refuse(format!("{} x {:?} is not {} bytes", tensor.dtype, tensor.shape, tensor.len));
        }
        if tensor.name == "__metadata__" {
            return refuse("the name is taken".into());
        }
        let end = offset.checked_add(tensor.len).filter(|&end| end < 1 << 60);
        let Some(end) = end else { return refuse("the file would be too large".into()) };
        if json.len() > 1 {
            json.push(',');
        }
        let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
        json.push_str(&format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{offset},{end}]}}",
            text(&tensor.name),
            tensor.dtype.name(),
            shape.join(",")
        ));
        offset = end;
    }
    json.push('}');
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::new(ErrorKind::Invalid, format!("save tensor {:?} twice", pair[0])));
    }
    let mut json = json.into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > engine::tensors::safetensors::HEADER_MAX {
        return Err(Error::new(ErrorKind::Invalid, format!("a header of {} bytes is too long", json.len())));
    }
    let mut head = (json.len() as u64).to_le_bytes().to_vec();
    head.append(&mut json);
    Ok((head, order))
}

/// The file until it has its name; removed when it does not get it.
struct Draft {
    path: PathBuf,
    keep: bool,
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!("remove {}: {error}", self.path.display());
        }
    }
}

/// Writes tensors to a file, in place of what is there, flushed; after an error the file is what it was.
pub fn save(
    lane: &mut Lane,
    path: &Path,
    tensors: &[SaveTensor],
    options: &SaveOptions,
    control: &mut Control<'_>,
) -> Result<SaveReport> {
    let started = Instant::now();
    let device = lane.driver().info()?;
    let (head, order) = head(tensors, options)?;
    let mut spans = vec![Span { at: 0, device: None, len: head.len() as u64 }];
    let mut len = head.len() as u64;
    for index in order {
        let tensor = &tensors[index];
        if tensor.len > 0 {
            spans.push(Span { at: len, device: Some(tensor.address), len: tensor.len });
        }
        len += tensor.len;
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let name = path.file_name().ok_or_else(|| {
        Error::new(ErrorKind::Invalid, format!("save {}: it names no file", path.display()))
    })?;
    let (file, mut draft) = create(folder, name)?;
    let failed = |what: &str, error: std::io::Error| Error::io(format!("{what} {}", path.display()), error);
    let mut notes = Vec::new();
    let shown = path.display().to_string();
    let copy = || file.try_clone().map_err(|error| failed("open", error));
    let target = match FileDevice::from_file(copy()?, shown.clone(), true) {
        Ok(target) => target,
        Err(error) => {
            notes.push(format!("{shown} is written through the page cache: {error}"));
            FileDevice::from_file(copy()?, shown.clone(), false)?
        }
    };
    let direct = target.alignment() > 1;
    // The space now, so that a full drive is told before anything is copied. Direct writes are whole blocks.
    target.allocate(len.next_multiple_of(4096))?;
    let target: Arc<dyn Device> = Arc::new(target);
    let written = lane.write(&target, &head, &spans, len, control)?;
    let flushing = Instant::now();
    file.set_len(len).map_err(|error| failed("set the length of", error))?;
    file.sync_all().map_err(|error| failed("flush", error))?;
    // Held until the new one is safe: a file system takes a while to free a large file, and it does so when the last one who
    // has it open lets go.
    let old = OpenOptions::new().read(true).custom_flags(OFlags::PATH.bits() as i32).open(path).ok();
    std::fs::rename(&draft.path, path).map_err(|error| failed("give its name to", error))?;
    draft.keep = true;
    let directory = File::open(folder).map_err(|error| failed("flush the directory of", error))?;
    directory.sync_all().map_err(|error| failed("flush the directory of", error))?;
    if let Some(old) = old {
        // Where no thread is to be had, this one frees it.
        let _ = std::thread::Builder::new().name("nvtier-free".into()).spawn(move || drop(old));
    }
    notes.extend(written.note.clone());
    let seconds = started.elapsed().as_secs_f64();
    Ok(SaveReport {
        device,
        tensors: tensors.len(),
        bytes: len,
        seconds,
        gb_per_second: len as f64 / seconds.max(1e-9) / 1e9,
        flush_seconds: flushing.elapsed().as_secs_f64(),
        write_busy_seconds: written.io_busy.as_secs_f64(),
        copy_busy_seconds: written.copy_busy.as_secs_f64(),
        direct,
        backend: written.backend,
        notes,
    })
}

/// A new file beside the one it is to replace.
fn create(folder: &Path, name: &std::ffi::OsStr) -> Result<(File, Draft)> {
    let mut attempt = 0u32;
    loop {
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{attempt}.part", std::process::id()));
        let path = folder.join(hidden);
        match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, Draft { path, keep: false })),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && attempt < 1000 => attempt += 1,
            Err(error) => return Err(Error::io(format!("create {}", path.display()), error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> SaveTensor {
        let len = dtype.tensor_bytes(shape).unwrap_or(0);
        SaveTensor { name: name.into(), dtype, shape: shape.to_vec(), address: 0, len }
    }

    #[test]
    fn what_cannot_be_saved_is_refused() {
        let refused = |tensors: &[SaveTensor], words: &str| {
            let error = head(tensors, &SaveOptions::default()).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        };
        refused(&[tensor("a", Dtype::C128, &[1])], "no type C128");
        refused(&[tensor("a", Dtype::from_ggml(2).unwrap(), &[32])], "no type Q4_0");
        refused(&[tensor("a", Dtype::F32, &[1]), tensor("a", Dtype::U8, &[1])], "twice");
        refused(&[tensor("__metadata__", Dtype::U8, &[1])], "taken");
        let wrong = SaveTensor { len: 3, ..tensor("a", Dtype::F32, &[1]) };
        refused(&[wrong], "not 3 bytes");
    }

    /// Against the reference library: every type, names that need escaping, no tensors, metadata.
    #[test]
    fn heads_are_those_of_the_reference_library() {
        use safetensors::tensor::{Dtype as Theirs, TensorView};
        let theirs = [
            Theirs::BOOL,
            Theirs::F4,
            Theirs::F6_E2M3,
            Theirs::F6_E3M2,
            Theirs::U8,
            Theirs::I8,
            Theirs::F8_E5M2,
            Theirs::F8_E4M3,
            Theirs::F8_E8M0,
            Theirs::F8_E4M3FNUZ,
            Theirs::F8_E5M2FNUZ,
            Theirs::I16,
            Theirs::U16,
            Theirs::F16,
            Theirs::BF16,
            Theirs::I32,
            Theirs::U32,
            Theirs::F32,
            Theirs::C64,
            Theirs::F64,
            Theirs::I64,
            Theirs::U64,
        ];
        let zeros = vec![0u8; 4096];
        for count in [0, 1, theirs.len()] {
            for metadata in [None, Some("p\"t\n")] {
                let mut views = Vec::new();
                let mut ours = Vec::new();
                for (i, dtype) in theirs.iter().take(count).enumerate() {
                    for shape in [vec![4 * (i + 1)], vec![0, 3], vec![2, 2, 1]] {
                        let name = format!("layer.{}/{}\"\\é\u{1}.{:?}", theirs.len() - i, dtype, shape);
                        let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                        views.push((
                            name.clone(),
                            TensorView::new(*dtype, shape.clone(), &zeros[..len]).unwrap(),
                        ));
                        let shape: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
                        ours.push(tensor(
                            &name,
                            Dtype::from_safetensors(&dtype.to_string()).unwrap(),
                            &shape,
                        ));
                    }
                }
                let info = metadata
                    .map(|value| std::collections::HashMap::from([("format".to_owned(), value.to_owned())]));
                let reference = safetensors::serialize(views, info).unwrap();
                let metadata =
                    metadata.map(|value| ("format".to_owned(), value.to_owned())).into_iter().collect();
                let (head, order) = head(&ours, &SaveOptions { metadata }).unwrap();
                assert_eq!(order.len(), ours.len());
                let json = |bytes: &[u8]| String::from_utf8_lossy(&bytes[8..]).into_owned();
                assert_eq!(json(&head), json(&reference[..head.len()]));
                assert_eq!(head, reference[..head.len()]);
            }
        }
    }
}
