//! Opens tensors through a mount and compares them with the files they came from, byte by byte.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::tensors::{TensorIndex, TensorInfo, npy_header, parse, view_name};
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::interrupt;

/// Tensors looked at in each shard: the first, some in between, the last.
const PER_SHARD: usize = 5;

/// What was compared.
#[derive(Debug, Default, Serialize)]
pub struct Compared {
    /// Tensors.
    pub tensors: u64,
    /// Bytes of them, each read twice: as a slice and as a .npy file.
    pub bytes: u64,
}

/// Compares tensors of every shard.
pub fn compare(mountpoint: &Path, name: &str, shards: &[PathBuf]) -> Outcome<Compared> {
    let mut compared = Compared::default();
    for shard in shards {
        let file_name = shard.file_name().unwrap_or_default();
        let region = mountpoint.join(name).join(file_name);
        let views = mountpoint.join(".tensors").join(name).join(file_name);
        let index = read_index(&region)?;
        let step = (index.tensors.len() - 1).div_ceil(PER_SHARD - 1).max(1);
        let last = index.tensors.len() - 1;
        let picked = (0..last).step_by(step).chain([last]);
        for tensor in picked.map(|position| &index.tensors[position]) {
            interrupt::check()?;
            let expected = slice(shard, tensor)?;
            if slice(&region, tensor)? != expected {
                return Err(differs(&region, tensor));
            }
            let view = views.join(format!("{}.npy", view_name(&tensor.name)));
            let bytes = std::fs::read(&view)
                .map_err(|error| Failure::io(format!("read {}", view.display()), &error))?;
            let header = npy_header(tensor).unwrap_or_default();
            if header.is_empty() || !bytes.starts_with(&header) || bytes[header.len()..] != expected {
                return Err(differs(&view, tensor));
            }
            compared.tensors += 1;
            compared.bytes += tensor.len();
        }
    }
    Ok(compared)
}

fn differs(path: &Path, tensor: &TensorInfo) -> Failure {
    Failure::corrupt(format!(
        "{}: tensor {} differs from the file it was imported from",
        path.display(),
        tensor.name
    ))
}

fn read_index(path: &Path) -> Outcome<TensorIndex> {
    let tried = || format!("open {}", path.display());
    let file = File::open(path).map_err(|error| Failure::io(tried(), &error))?;
    let len = file.metadata().map_err(|error| Failure::io(tried(), &error))?.len();
    let index = parse(&path.to_string_lossy(), len, &mut |offset, buffer| {
        file.read_exact_at(buffer, offset)
            .map_err(|error| engine::Error::new(engine::ErrorKind::Io, error.to_string()))
    });
    let index = index.map_err(|error| Failure::from(error).while_doing(tried()))?;
    index
        .filter(|index| !index.tensors.is_empty())
        .ok_or_else(|| Failure::failed(format!("{}: no tensors", tried())))
}

fn slice(path: &Path, tensor: &TensorInfo) -> Outcome<Vec<u8>> {
    let tried = || format!("read tensor {} of {}", tensor.name, path.display());
    let file = File::open(path).map_err(|error| Failure::io(tried(), &error))?;
    let mut bytes = vec![0; tensor.len() as usize];
    file.read_exact_at(&mut bytes, tensor.data_offsets.0).map_err(|error| Failure::io(tried(), &error))?;
    Ok(bytes)
}
