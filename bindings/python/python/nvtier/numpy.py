"""Tensor files as numpy arrays. bfloat16 and the 8-bit floats are ml_dtypes' types, where that package is installed."""

from __future__ import annotations

import os
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import numpy as np

from . import _load, _nvtier, _paths, _progress
from ._errors import InvalidArgument, NotSupported
from ._nvtier import DeviceTensor, Pool

__all__ = ["load_file", "save_file"]

_PLAIN = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "C128": "complex128",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_NAMES = {**{dtype: name for name, dtype in _PLAIN.items() if name != "C128"}, **{v: k for k, v in _ML_DTYPES.items()}}
_PACKED = {"F4", "F6_E2M3", "F6_E3M2"}


def _dtype(tensor: DeviceTensor) -> Optional[np.dtype[Any]]:
    """numpy's type; None for rows of bytes (quantised types of GGUF)."""
    if tensor.dtype in _PLAIN:
        return np.dtype(_PLAIN[tensor.dtype])
    if tensor.dtype in _PACKED:
        raise NotSupported(f"tensor {tensor.name!r} is {tensor.dtype}, which numpy has no type for; see nvtier.load")
    if tensor.dtype not in _ML_DTYPES:
        return None
    try:
        import ml_dtypes
    except ImportError:
        raise NotSupported(
            f"tensor {tensor.name!r} is {tensor.dtype}, which numpy has no type for; install ml_dtypes, or use nvtier.load"
        ) from None
    return np.dtype(getattr(ml_dtypes, _ML_DTYPES[tensor.dtype]))


def _to_numpy(tensor: DeviceTensor) -> np.ndarray[Any, Any]:
    dtype = _dtype(tensor)
    if dtype is None:
        return np.asarray(tensor.as_bytes(rows=True))
    if tensor.nbytes == 0:
        return np.empty(tensor.shape, dtype)
    # numpy keeps the tensor, and with it the memory, as the array's base.
    return np.asarray(tensor.as_bytes()).view(dtype).reshape(tensor.shape)


def load_file(
    filename: _paths.Paths,
    *,
    filters: Union[str, Sequence[str], None] = None,
    shard: Optional[_load.Shard] = None,
    pool: Union[Pool, str, "os.PathLike[str]", None] = None,
    progress: Any = None,
    deadline: Optional[float] = None,
    verify: bool = True,
    cache: str = "auto",
) -> Dict[str, np.ndarray[Any, Any]]:
    """Loads tensor files. Arguments are those of ``nvtier.load``."""
    loaded = _load.load(
        filename, filters=filters, shard=shard, pool=pool, progress=progress, deadline=deadline, verify=verify, cache=cache
    )
    return {name: _to_numpy(tensor) for name, tensor in loaded.items()}


def save_file(
    tensors: Dict[str, np.ndarray[Any, Any]],
    filename: _paths.PathLike,
    metadata: Optional[Mapping[str, str]] = None,
    *,
    progress: Any = None,
    deadline: Optional[float] = None,
) -> Dict[str, Any]:
    """Saves arrays to a safetensors file, whole or not at all, flushed. Returns a report."""
    keep, entries = [], []
    for name, array in tensors.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise InvalidArgument(f"save tensor {name!r}: expected numpy.ndarray but received {type(array)}")
        dtype = _NAMES.get(array.dtype.name)
        if dtype is None:
            raise NotSupported(f"save tensor {name!r}: safetensors has no type for {array.dtype}")
        if not array.flags.c_contiguous:
            raise InvalidArgument(f"save tensor {name!r}: it is not contiguous; see numpy.ascontiguousarray")
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        keep.append(array)
        entries.append((name, dtype, list(array.shape), array.ctypes.data, array.nbytes))
    report, done = _progress.adapt(progress, "save")
    try:
        return _nvtier.save(
            filename,
            entries,
            metadata=None if metadata is None else dict(metadata),
            device="cpu",
            progress=report,
            deadline=deadline,
        )
    finally:
        done()
        keep.clear()
