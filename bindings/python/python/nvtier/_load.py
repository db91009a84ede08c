"""``nvtier.load`` and ``nvtier.save``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping as MappingABC
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from . import _nvtier, _paths, _progress
from ._errors import InvalidArgument, NoTensor, NotSupported
from ._nvtier import DeviceTensor, Pool

Rules = Union[Mapping[str, int], Sequence[Tuple[str, int]]]
Shard = Tuple[int, int, Rules]


class Loaded(MappingABC):
    """Tensors by name, in the order of their files, and how the load went."""

    def __init__(self, tensors: Iterable[DeviceTensor], report: Dict[str, Any]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        #: What the load did: bytes, seconds, path, what bound it; the names are those of ``nvtier load --json``.
        self.report = report

    def __getitem__(self, name: str) -> DeviceTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise NoTensor(f"no tensor {name!r} was loaded") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        bytes_, device = self.report["bytes"], self.report["device"]["id"]
        return f"<nvtier.Loaded: {len(self)} tensors, {bytes_} bytes on {device}>"


def device_name(device: Any) -> str:
    """``cpu``, ``cuda`` or ``cuda:N`` of a string, a number, or something that prints as one (``torch.device``)."""
    if isinstance(device, bool):
        raise InvalidArgument(f"device={device!r}: write \"cpu\", \"cuda:0\" or a number")
    if isinstance(device, int):
        return f"cuda:{device}"
    name = str(device)
    return "cpu" if name == "cpu:0" else name


@contextlib.contextmanager
def opened(pool: Union[Pool, str, "os.PathLike[str]", None]) -> Iterator[Optional[Pool]]:
    """A pool that is open, or one that is opened for as long as this lasts."""
    if pool is None or isinstance(pool, Pool):
        yield pool
    else:
        with Pool(pool, read_only=True, ram=64 << 20) as own:
            yield own


def shard_arguments(shard: Optional[Shard]) -> Optional[Tuple[int, int, List[Tuple[str, int]]]]:
    if shard is None:
        return None
    rank, world, rules = shard
    pairs = rules.items() if isinstance(rules, MappingABC) else rules
    return rank, world, [(pattern, dim) for pattern, dim in pairs]


def load(
    paths: _paths.Paths,
    *,
    device: Any = "cpu",
    filters: Union[str, Sequence[str], None] = None,
    shard: Optional[Shard] = None,
    pool: Union[Pool, str, "os.PathLike[str]", None] = None,
    progress: Any = None,
    deadline: Optional[float] = None,
    verify: bool = True,
    cache: str = "auto",
) -> Loaded:
    """Loads tensor files (safetensors, GGUF, npy) onto a device.

    ``paths``: a file, a directory, an ``*.index.json``, or several of them, loaded as one. With ``pool`` (an open ``Pool``, or the
    path of one) they are names of regions. ``filters``: patterns of names with ``*`` and ``?``. ``shard``: ``(rank, world,
    rules)``, rules being patterns and the dimension that such tensors are cut along; others are loaded whole. ``progress``: True
    for a tqdm bar, a bar of your own, or a function of ``(done, total)`` bytes. ``deadline``: seconds from now. ``verify``: compare
    the checksums of a pool. ``cache``: "auto", "direct" (O_DIRECT) or "buffered".

    All tensors are on the device when it returns; after an error, Ctrl-C or a deadline nothing is.
    """
    report, done = _progress.adapt(progress, "load")
    try:
        with opened(pool) as session:
            tensors, info = _nvtier.load(
                _paths.resolve(paths, session),
                device=device_name(device),
                filters=[filters] if isinstance(filters, str) else list(filters or []),
                shard=shard_arguments(shard),
                pool=session,
                verify=verify,
                cache=cache,
                progress=report,
                deadline=deadline,
            )
    finally:
        done()
    return Loaded(tensors, info)


def save(
    tensors: Mapping[str, Any],
    path: _paths.PathLike,
    metadata: Optional[Mapping[str, str]] = None,
    *,
    progress: Any = None,
    deadline: Optional[float] = None,
) -> Dict[str, Any]:
    """Saves tensors of anything that speaks DLPack to a safetensors file: whole or not at all, flushed.

    All of them must be on one device (the host or one GPU), contiguous, and complete: work of other streams that still writes to
    them must be waited for before. Returns a report.
    """
    keep: List[Any] = []
    entries: List[Tuple[str, str, List[int], int, int]] = []
    devices = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"names of tensors are str, not {type(name).__name__}")
        if isinstance(tensor, DeviceTensor):
            keep.append(tensor)
            entries.append((name, tensor.dtype, list(tensor.shape), tensor.data_ptr, tensor.nbytes))
            devices.add(tensor.device)
            continue
        export = getattr(tensor, "__dlpack__", None)
        if export is None:
            raise NotSupported(f"save tensor {name!r}: {type(tensor).__name__} has no __dlpack__")
        try:
            capsule = export(max_version=(1, 1))
        except TypeError:
            capsule = export()
        keep.append(capsule)
        try:
            address, device, dtype, shape, length = _nvtier.look_at_dlpack(capsule)
        except (InvalidArgument, NotSupported) as error:
            raise type(error)(f"save tensor {name!r}: {error}") from None
        devices.add(device)
        entries.append((name, dtype, shape, address, length))
    if len(devices) > 1:
        raise InvalidArgument(f"save {os.fspath(path)}: tensors are on several devices: {', '.join(sorted(devices))}")
    report, done = _progress.adapt(progress, "save")
    try:
        return _nvtier.save(
            path,
            entries,
            metadata=None if metadata is None else dict(metadata),
            device=devices.pop() if devices else "cpu",
            progress=report,
            deadline=deadline,
        )
    finally:
        done()
        keep.clear()
