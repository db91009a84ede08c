"""``nvtier.load`` and ``nvtier.save``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping as MappingABC
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from . import _nvtier, _paths, _progress
from ._errors import InvalidArgument, NoTensor, NotSupported
from ._nvtier import DeviceTensor, Pool

Rules = Union[Mapping[str, int], Sequence[Tuple[str, int]]]
Shard = Tuple[int, int, Rules]


class Loaded(MappingABC):
    """Tensors by name, in the order of their files, and how the load went. Of a load into ``out`` they are what was given there."""

    def __init__(self, tensors: Mapping[str, Any], report: Dict[str, Any]) -> None:
        self._tensors = dict(tensors)
        #: What the load did: bytes, seconds, path, what bound it; the names are those of ``nvtier load --json``.
        self.report = report

    def __getitem__(self, name: str) -> Any:
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


#: Name, type, shape, address, bytes.
_Place = Tuple[str, str, List[int], int, int]


def _look(tensor: Any, write: bool) -> Tuple[Tuple[int, str, str, List[int], int, bool], Any]:
    """Where memory of another library's tensor is and what is there, and what keeps it."""
    if isinstance(tensor, DeviceTensor):
        return (tensor.data_ptr, tensor.device, tensor.dtype, list(tensor.shape), tensor.nbytes, False), tensor
    export = getattr(tensor, "__dlpack__", None)
    # numpy's says whether it is read-only, in all of its versions, and knows arrays whose types DLPack has not.
    if export is not None and not (write and hasattr(tensor, "__array_interface__")):
        try:
            capsule = export(max_version=(1, 1))
        except TypeError:
            capsule = export()
        return _nvtier.look_at_dlpack(capsule), (tensor, capsule)
    for name in ("__cuda_array_interface__", "__array_interface__"):
        interface = getattr(tensor, name, None)
        if interface is not None:
            return _nvtier.look_at_interface(interface, name.startswith("__cuda")), (tensor, interface)
    raise NotSupported(f"{type(tensor).__name__} has no __dlpack__, no __cuda_array_interface__ and no __array_interface__")


def _places(doing: str, tensors: Mapping[str, Any], write: bool) -> Tuple[str, List[_Place], List[Any]]:
    """The device of all of them, where each is, and what is to be held until nobody uses the addresses any more."""
    places: List[_Place] = []
    keep: List[Any] = []
    devices = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"names of tensors are str, not {type(name).__name__}")
        try:
            (address, device, dtype, shape, length, writable), kept = _look(tensor, write)
            if write and not writable:
                raise InvalidArgument("it is read-only")
        except (InvalidArgument, NotSupported) as error:
            raise type(error)(f"{doing}: tensor {name!r}: {error}") from None
        keep.append(kept)
        devices.add(device)
        places.append((name, dtype, shape, address, length))
    if len(devices) > 1:
        raise InvalidArgument(f"{doing}: tensors are on several devices: {', '.join(sorted(devices))}")
    return devices.pop() if devices else "cpu", places, keep


def load(
    paths: _paths.Paths,
    *,
    device: Any = None,
    filters: Union[str, Sequence[str], None] = None,
    shard: Optional[Shard] = None,
    pool: Union[Pool, str, "os.PathLike[str]", None] = None,
    progress: Any = None,
    deadline: Optional[float] = None,
    verify: bool = True,
    cache: str = "auto",
    path: str = "auto",
    cached: str = "auto",
    priority: str = "foreground",
    out: Optional[Mapping[str, Any]] = None,
) -> Loaded:
    """Loads tensor files (safetensors, GGUF, npy) onto a device.

    ``paths``: a file, a directory, an ``*.index.json``, or several of them, loaded as one. With ``pool`` (an open ``Pool``, or the
    path of one) they are names of regions. ``filters``: patterns of names with ``*`` and ``?``. ``shard``: ``(rank, world,
    rules)``, rules being patterns and the dimension that such tensors are cut along; others are loaded whole. ``progress``: True
    for a tqdm bar, a bar of your own, or a function of ``(done, total)`` bytes. ``deadline``: seconds from now. ``verify``: compare
    the checksums of a pool. ``cache``: "auto", "direct" (O_DIRECT) or "buffered". ``path``: the best way that can be trusted ("auto"),
    "bounce", or "cufile" (an error where it is not GPUDirect). ``cached``: how a file in the page cache is read, "copy" or "map".
    ``priority``: "background" lets other loads of this process go first.

    All tensors are on the device when it returns; after an error, Ctrl-C or a deadline nothing is.

    ``out``: tensors or arrays by name, whose memory is filled: these and no others are loaded, to the device that they are on. Each must be like
    the one in the file, contiguous, writable, and not used by anybody meanwhile. They are what speaks DLPack, ``__cuda_array_interface__`` or
    ``__array_interface__``. After an error they may hold anything.
    """
    places: Optional[List[_Place]] = None
    keep: List[Any] = []
    if out is not None:
        if filters:
            raise InvalidArgument("filters and out: what is in out is loaded, and nothing else")
        where, places, keep = _places("load", out, True)
        if device is not None and places and device_name(device) not in (where, where.split(":")[0]):
            raise InvalidArgument(f"load to {device_name(device)} into tensors on {where}: leave device out")
        device = where
    report, done = _progress.adapt(progress, "load")
    try:
        with opened(pool) as session:
            tensors, info = _nvtier.load(
                _paths.resolve(paths, session),
                device="cpu" if device is None else device_name(device),
                filters=[filters] if isinstance(filters, str) else list(filters or []),
                shard=shard_arguments(shard),
                pool=session,
                verify=verify,
                cache=cache,
                path=path,
                cached=cached,
                progress=report,
                deadline=deadline,
                priority=priority,
                out=places,
            )
    finally:
        done()
        keep.clear()
    return Loaded(out if out is not None else {tensor.name: tensor for tensor in tensors}, info)


def save(
    tensors: Mapping[str, Any],
    path: _paths.PathLike,
    metadata: Optional[Mapping[str, str]] = None,
    *,
    progress: Any = None,
    deadline: Optional[float] = None,
) -> Dict[str, Any]:
    """Saves tensors of anything that speaks DLPack, ``__cuda_array_interface__`` or ``__array_interface__`` to a safetensors file: whole or not at
    all, flushed.

    All of them must be on one device (the host or one GPU), contiguous, and complete: work of other streams that still writes to
    them must be waited for before, but for a stream that an array interface names. Returns a report.
    """
    device, entries, keep = _places(f"save {os.fspath(path)}", tensors, False)
    report, done = _progress.adapt(progress, "save")
    try:
        return _nvtier.save(
            path,
            entries,
            metadata=None if metadata is None else dict(metadata),
            device=device,
            progress=report,
            deadline=deadline,
        )
    finally:
        done()
        keep.clear()
