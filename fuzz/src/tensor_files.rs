//! safetensors, GGUF and npy headers.

use engine::tensors::{self, Dtype, TensorIndex, TensorInfo, npy_header, view_name};

use crate::digest;

pub fn safetensors(input: &[u8]) -> u64 {
    // As it is, and with the header's length made right: else nearly every mutation ends at the first 8 bytes.
    let mut framed = input.to_vec();
    if let Some((head, rest)) = framed.split_first_chunk_mut::<8>()
        && u64::from_le_bytes(*head) > rest.len() as u64
    {
        let end = rest.iter().rposition(|byte| *byte == b'}').map_or(rest.len(), |at| at + 1);
        *head = (end as u64).to_le_bytes();
        check("a.safetensors", &framed);
    }
    check("a.safetensors", input)
}

pub fn gguf(input: &[u8]) -> u64 {
    check("a.gguf", input)
}

pub fn npy(input: &[u8]) -> u64 {
    check("dir/a.npy", input)
}

fn parse(name: &str, file: &[u8]) -> engine::Result<Option<TensorIndex>> {
    tensors::parse(name, file.len() as u64, &mut |offset, out| {
        let at = usize::try_from(offset).expect("an offset inside the file");
        // Out of range here is a parser that reads beyond the file's end.
        out.copy_from_slice(&file[at..at + out.len()]);
        Ok(())
    })
}

fn check(name: &str, file: &[u8]) -> u64 {
    let index = match parse(name, file) {
        Ok(Some(index)) => index,
        Ok(None) => return 0,
        Err(error) => return digest(&error.chain()),
    };
    let text: usize = index.tensors.iter().map(|t| t.name.len() + 8 * t.shape.len()).sum::<usize>()
        + index.metadata.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
    // Numbers as text grow: a byte of an array becomes up to 5, a float of 4 bytes up to 50.
    assert!(text <= 16 * file.len() + 64, "{text} bytes kept of {}", file.len());
    let mut covered = 0;
    for tensor in &index.tensors {
        let (begin, end) = tensor.data_offsets;
        assert!(covered <= begin && begin <= end && end <= file.len() as u64, "{tensor:?} after {covered}");
        assert_eq!(tensor.dtype.tensor_bytes(&tensor.shape), Some(end - begin), "{tensor:?}");
        covered = end;
        let found = index.find_view(&view_name(&tensor.name)).expect("every tensor has a view");
        assert!(found.name == tensor.name || view_name(&found.name).contains("%~"), "{tensor:?} {found:?}");
        header_comes_back(tensor);
    }
    digest(&(index.format, &index.tensors, &index.metadata))
}

/// The header that a tensor's view gets is one that the npy parser reads, to the same type and shape.
fn header_comes_back(tensor: &TensorInfo) {
    let Some(mut view) = npy_header(tensor) else { return };
    let bytes = tensor.len();
    if bytes > 1 << 16 || !matches!(tensor.dtype.bits(), Some(bits) if bits % 8 == 0) {
        return;
    }
    view.resize(view.len() + bytes as usize, 0);
    // numpy has no name for some types: their views are opaque, and such files are not read as tensors again.
    let Ok(Some(again)) = parse("view.npy", &view) else {
        assert!(!plain(tensor.dtype), "the view of {tensor:?} is no npy file");
        return;
    };
    assert_eq!(again.tensors[0].shape, tensor.shape);
    assert_eq!(again.tensors[0].len(), bytes);
    assert!(!plain(tensor.dtype) || again.tensors[0].dtype == tensor.dtype, "{tensor:?}");
}

/// Types that numpy has as well.
fn plain(dtype: Dtype) -> bool {
    use Dtype::*;
    matches!(dtype, Bool | U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64 | F16 | F32 | F64 | C64 | C128)
}
