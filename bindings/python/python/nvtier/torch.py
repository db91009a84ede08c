"""Tensor files as PyTorch tensors: ``load_file``, ``safe_open`` and ``save_file`` as safetensors.torch has them, by nvtier.

Paths may be a file, a directory, an ``*.index.json``, or a list of files; with ``pool`` names of regions. safetensors and GGUF
(and npy); the quantised types of GGUF come as uint8 tensors of their rows' bytes, as the gguf package gives them.
"""

from __future__ import annotations

import contextlib
import math
import os
from types import TracebackType
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch

from . import _load, _nvtier, _paths, _progress
from ._errors import Closed, InvalidArgument, NotSupported, SharedTensors
from ._nvtier import DeviceTensor, Pool

__all__ = ["TensorSlice", "load_file", "safe_open", "save_file"]

_PoolLike = Union[Pool, str, "os.PathLike[str]", None]

# What torch takes by DLPack as it is; the others go by their bytes.
_PLAIN: Dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_BY_BYTES: Dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F4": "float4_e2m1fn_x2",
    }.items()
    if hasattr(torch, attribute)
}
_DTYPES = {**_PLAIN, **_BY_BYTES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Only numpy files have it; safetensors does not.
_PLAIN["C128"] = _DTYPES["C128"] = torch.complex128
# Types of safetensors; what is none of them is one of ggml's quantised types.
_SAFETENSORS = {
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16",
    "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64", "C128",
}  # fmt: skip


def _torch_type(name: str, dtype: str, shape: Sequence[int]) -> Tuple[Optional[torch.dtype], List[int]]:
    """What a tensor is in torch: its type and shape; None for rows of bytes."""
    if dtype not in _SAFETENSORS:
        return None, list(shape)
    if dtype not in _DTYPES:
        raise NotSupported(
            f"tensor {name!r} is {dtype}, which torch {torch.__version__} has no type for; nvtier.load gives its bytes"
        )
    if dtype == "F4":
        # torch's type holds two elements.
        if not shape or shape[-1] % 2:
            raise NotSupported(f"tensor {name!r} is F4 of shape {tuple(shape)}: torch holds two elements in one")
        return _DTYPES[dtype], [*shape[:-1], shape[-1] // 2]
    return _DTYPES[dtype], list(shape)


def _to_torch(tensor: DeviceTensor) -> torch.Tensor:
    """A torch tensor on the same memory, with a storage of its own (so that nothing looks shared that is not)."""
    dtype, shape = _torch_type(tensor.name, tensor.dtype, tensor.shape)
    if dtype is None:
        return torch.from_dlpack(tensor.as_bytes(rows=True))
    if tensor.nbytes == 0:
        return torch.empty(shape, dtype=dtype, device=tensor.device)
    if tensor.dtype in _PLAIN:
        return torch.from_dlpack(tensor)
    return torch.from_dlpack(tensor.as_bytes()).view(dtype).view(shape)


def _device(device: Any) -> Tuple[str, Optional[torch.device]]:
    """Where nvtier loads to, and where torch has to move tensors after that (devices that nvtier cannot load to)."""
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"device={device!r}: {error}") from None
    if parsed.type == "cpu":
        return "cpu", None
    if parsed.type != "cuda":
        return "cpu", parsed
    index = parsed.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return f"cuda:{index}", None


@contextlib.contextmanager
def _torch_device_kept(where: str) -> Iterator[None]:
    """The lane makes its device's context current on this thread; torch's own device is put back."""
    if where.startswith("cuda") and not torch.cuda.is_initialized():
        # torch's device before it was started is the first one. What is wrong here nvtier says in its own words.
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.cuda.init()
    if torch.cuda.is_initialized():
        with torch.cuda.device(torch.cuda.current_device()):
            yield
    else:
        yield


def load_file(
    filename: _paths.Paths,
    device: Any = "cpu",
    *,
    filters: Union[str, Sequence[str], None] = None,
    shard: Optional[_load.Shard] = None,
    pool: _PoolLike = None,
    progress: Any = None,
    deadline: Optional[float] = None,
    verify: bool = True,
    cache: str = "auto",
    path: str = "auto",
    cached: str = "auto",
    priority: str = "foreground",
    pin_memory: bool = False,
) -> Dict[str, torch.Tensor]:
    """Loads tensor files. Arguments are those of ``nvtier.load``.

    ``pin_memory``: page-locked tensors on the host, for fast copies to a GPU later; ``NotSupported`` without CUDA.
    """
    where, then = _device(device)
    if pin_memory:
        if where != "cpu" or then is not None:
            raise InvalidArgument(f"pin_memory is for tensors on the host, device={device!r} is not")
        if not torch.cuda.is_available():
            raise NotSupported("pin_memory=True needs CUDA, and torch.cuda is not available here")
    with _torch_device_kept(where):
        loaded = _load.load(
            filename,
            device=where,
            filters=filters,
            shard=shard,
            pool=pool,
            progress=progress,
            deadline=deadline,
            verify=verify,
            cache=cache,
            path=path,
            cached=cached,
            priority=priority,
        )
        tensors = {name: _to_torch(tensor) for name, tensor in loaded.items()}
    del loaded
    if pin_memory:
        # torch's own page-locked memory: a copy, one tensor at a time. The load's block goes when the last one is copied.
        for name in tensors:
            tensors[name] = tensors[name].pin_memory()
    if then is not None:
        for name in tensors:
            tensors[name] = tensors[name].to(then)
    return tensors


class TensorSlice:
    """A tensor that is loaded, or a part of it, when it is indexed."""

    def __init__(self, file: _nvtier.TensorFile, name: str, where: str, then: Optional[torch.device]) -> None:
        info = file.info(name)
        self._file, self._name, self._where, self._then = file, name, where, then
        self._dtype, self._shape = info.dtype, list(info.shape)

    def get_shape(self) -> List[int]:
        """Lengths as the file has them."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The type's name as the file has it."""
        return self._dtype

    def on(self, device: Any) -> TensorSlice:
        """The same, to be loaded to another device."""
        where, then = _device(device)
        return TensorSlice(self._file, self._name, where, then)

    def _get(self, cut: Optional[Tuple[int, int, int]] = None) -> torch.Tensor:
        with _torch_device_kept(self._where):
            tensor = _to_torch(self._file.get(self._name, self._where, cut))
        return tensor if self._then is None else tensor.to(self._then)

    def __getitem__(self, index: Any) -> torch.Tensor:
        dtype, shape = _torch_type(self._name, self._dtype, self._shape)
        plan = _plan(index, shape) if dtype is not None and self._dtype != "F4" else None
        if plan is None:
            whole = self._get()
            return whole if index is Ellipsis else whole[index]
        # torch's own words for an index that does not fit, before anything is read.
        torch.empty(shape, dtype=torch.uint8, device="meta")[index]
        cut, rest = plan
        tensor = self._get(cut)
        return tensor if rest is None else tensor[rest]


def _plan(index: Any, shape: List[int]) -> Optional[Tuple[Optional[Tuple[int, int, int]], Optional[Tuple[Any, ...]]]]:
    """The one dimension that saves most to cut along, and the index that is left. None: load all, let torch index."""
    items = index if isinstance(index, tuple) else (index,)
    if not all(item is Ellipsis or isinstance(item, slice) or type(item) is int for item in items):
        return None
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1 or len(items) - len(dots) > len(shape):
        return None
    missing = len(shape) - (len(items) - len(dots))
    at = dots[0] if dots else len(items)
    full: List[Any] = [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]
    best, best_share = None, 1.0
    for dim, (item, length) in enumerate(zip(full, shape)):
        if type(item) is int:
            start = item + length if item < 0 else item
            if not 0 <= start < length:
                return None  # torch says so
            bounds = (start, start + 1)
            rest: Any = 0
        else:
            if item.step is not None and (not isinstance(item.step, int) or item.step < 1):
                return None
            try:
                start, stop, step = item.indices(length)
            except TypeError:
                return None
            bounds = (start, max(start, stop))
            rest = slice(0, bounds[1] - start, step)
        share = (bounds[1] - bounds[0]) / length if length else 1.0
        if share < best_share:
            best, best_share = (dim, *bounds, rest), share
    left = None if all(item == slice(None) for item in full) else tuple(full)
    if best is None:
        return None, left
    dim, start, stop, rest = best
    full[dim] = rest
    return (dim, start, stop), tuple(full)


class safe_open:
    """Tensor files whose tensors are loaded when they are asked for, as ``safetensors.safe_open``.

    A tensor that is asked for in the order of the file brings those after it along (up to 512 MiB), because one large load is
    much faster than many small ones. Slices stay usable after the file was closed, as the reference library's do.
    """

    def __init__(
        self,
        filename: _paths.Paths,
        framework: str = "pt",
        device: Any = "cpu",
        *,
        pool: _PoolLike = None,
        verify: bool = True,
        cache: str = "auto",
    ) -> None:
        if framework not in ("pt", "torch", "pytorch"):
            raise InvalidArgument(f"framework={framework!r}: nvtier.torch is for \"pt\"; see nvtier.numpy for \"np\"")
        self._where, self._then = _device(device)
        self._own: Optional[Pool] = None
        if pool is not None and not isinstance(pool, Pool):
            pool = self._own = Pool(pool, read_only=True, ram=64 << 20)
        self._pool = pool
        try:
            paths = _paths.resolve(filename, pool)
            self._file: Optional[_nvtier.TensorFile] = _nvtier.TensorFile(paths, pool=pool, verify=verify, cache=cache)
        except BaseException:
            if self._own is not None:
                self._own.close()
            raise

    def _open(self) -> _nvtier.TensorFile:
        if self._file is None:
            raise Closed("the tensor file is closed")
        return self._file

    def keys(self) -> List[str]:
        """Names of the tensors, sorted."""
        return sorted(self._open().keys())

    def offset_keys(self) -> List[str]:
        """Names of the tensors, in the order of their data."""
        return self._open().keys()

    def metadata(self) -> Optional[Dict[str, str]]:
        """What the header says beside the tensors; None where it says nothing."""
        return self._open().metadata() or None

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor that is loaded when it is indexed."""
        return TensorSlice(self._open(), name, self._where, self._then)

    def get_tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.get_slice(name)._get()

    def get_tensors(self) -> Dict[str, torch.Tensor]:
        """All tensors, in one load."""
        with _torch_device_kept(self._where):
            tensors, _ = self._open().get_all(self._where)
            loaded = {tensor.name: _to_torch(tensor) for tensor in tensors}
        return loaded if self._then is None else {name: tensor.to(self._then) for name, tensor in loaded.items()}

    def close(self) -> None:
        """Ends it; what was loaded stays, and so do slices."""
        file, self._file = self._file, None
        if file is not None:
            file.forget()
        own, self._own = self._own, None
        if own is not None:
            own.close()

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]] = None,
        exc: Optional[BaseException] = None,
        traceback: Optional[TracebackType] = None,
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._open().keys()

    def __len__(self) -> int:
        return len(self._open().keys())


def _span(tensor: torch.Tensor) -> Tuple[int, int]:
    """First address and the one after the last, of a dense tensor."""
    reach = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    start = tensor.data_ptr()
    return start, start + (reach * tensor.element_size() if tensor.numel() else 0)


def _check(tensors: Any) -> None:
    """Refuses what the reference library refuses."""
    if not isinstance(tensors, dict):
        raise InvalidArgument(f"Expected a dict of [str, torch.Tensor] but received {type(tensors)}")
    groups: Dict[Any, List[str]] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"names of tensors are str, not {type(name).__name__}")
        if not isinstance(tensor, torch.Tensor):
            raise InvalidArgument(f"save tensor {name!r}: expected torch.Tensor but received {type(tensor)}")
        if tensor.layout != torch.strided:
            raise InvalidArgument(f"save tensor {name!r}: it is sparse; make it dense before with .to_dense()")
        if tensor.device.type == "meta":
            raise InvalidArgument(f"save tensor {name!r}: it is on the meta device and has no data")
        storage = tensor.untyped_storage()
        if storage.data_ptr() != 0 and storage.nbytes() != 0:
            groups.setdefault((tensor.device, storage.data_ptr(), storage.nbytes()), []).append(name)
    for names in groups.values():
        areas = sorted((*_span(tensors[name]), name) for name in names)
        for (_, end, name), (start, _, other) in zip(areas, areas[1:]):
            if start < end:
                raise SharedTensors(
                    f"save tensors {name!r} and {other!r}: they share memory, which would be in the file twice and be shared no "
                    "more after loading; save one of them, or .clone() it"
                )
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise InvalidArgument(f"save tensor {name!r}: it is not contiguous; pack it before with .contiguous()")
        if tensor.dtype not in _NAMES:
            raise NotSupported(f"save tensor {name!r}: safetensors has no type for {tensor.dtype}")


def save_file(
    tensors: Dict[str, torch.Tensor],
    filename: _paths.PathLike,
    metadata: Optional[Mapping[str, str]] = None,
    *,
    progress: Any = None,
    deadline: Optional[float] = None,
) -> Dict[str, Any]:
    """Saves tensors to a safetensors file: the bytes that safetensors.torch.save_file would write, from one GPU by its lane.

    The file is there whole, flushed to its drive, when this returns; after an error it is what it was before. Metadata of
    several keys is in sorted order (the reference library's order is random). Returns a report.
    """
    _check(tensors)
    keep = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in tensors.items()}
    devices = {tensor.device for tensor in keep.values()}
    device = "cpu"
    if len(devices) == 1 and next(iter(devices)).type == "cuda":
        device = str(next(iter(devices)))
        # Whatever writes to the tensors on whatever stream has to be through.
        torch.cuda.synchronize(next(iter(devices)))
    else:
        keep = {name: tensor.cpu() for name, tensor in keep.items()}
    entries = []
    for name, tensor in keep.items():
        dtype, shape = _NAMES[tensor.dtype], list(tensor.shape)
        if dtype == "F4":
            if not shape:
                raise NotSupported(f"save tensor {name!r}: a single pair of F4 elements has no shape in safetensors")
            shape[-1] *= 2
        entries.append((name, dtype, shape, tensor.data_ptr(), math.prod(tensor.shape) * tensor.element_size()))
    report, done = _progress.adapt(progress, "save")
    try:
        with _torch_device_kept(device):
            return _nvtier.save(
                filename,
                entries,
                metadata=None if metadata is None else dict(metadata),
                device=device,
                progress=report,
                deadline=deadline,
            )
    finally:
        done()
        keep.clear()
