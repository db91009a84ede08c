"""The compiled module; ``nvtier`` re-exports all of it."""

import os
from types import TracebackType
from typing import Any, Iterable, Callable, Dict, List, Literal, Optional, Sequence, Tuple, Type, Union, final

from ._load import Loaded

__version__: str

_Path = Union[str, "os.PathLike[str]"]

def format(
    path: _Path,
    *,
    size: Optional[int] = None,
    members: Sequence[_Path] = ...,
    force: bool = False,
    raw: bool = False,
) -> Dict[str, Any]:
    """Makes a pool and returns what ``Pool.info`` says of it.

    ``size``: quota of a directory pool, length of an image file, in bytes. ``members``: directories, block devices or image
    files; none: ``path`` itself. Other data found there is refused (``NotAPool``) unless ``force``. ``raw``: make an image file.
    """

@final
class Entry:
    """A node of a pool."""

    @property
    def path(self) -> str:
        """Path from the root, without a leading ``/``."""
    @property
    def kind(
        self,
    ) -> Literal["directory", "region", "symlink", "fifo", "socket", "char_device", "block_device"]: ...
    @property
    def size(self) -> int:
        """Bytes."""
    @property
    def allocated(self) -> int:
        """Bytes that it occupies on the members."""
    @property
    def mode(self) -> int:
        """Permission bits."""
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def mtime(self) -> float:
        """Last change of the content, seconds since the epoch."""
    @property
    def generation(self) -> int:
        """Another one after each commit of its content."""
    @property
    def target(self) -> Optional[str]:
        """Target of a symbolic link."""

@final
class Tensor:
    """A named slice of a region."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str:
        """safetensors' name (``"F32"``, ``"BF16"``), or ggml's of a quantised type (``"Q4_K"``)."""
    @property
    def shape(self) -> Tuple[int, ...]:
        """C order: the last dimension is contiguous."""
    @property
    def data_offsets(self) -> Tuple[int, int]:
        """First byte and the byte after the last, from the start of the region."""
    @property
    def nbytes(self) -> int: ...

@final
class Pool:
    """An open pool: this process owns it, or the process that does is asked. May be shared by threads.

    ``ram``: bytes of the RAM tier when this process becomes the owner. ``wait``: seconds to wait for an owner that lets nobody in.
    """

    def __init__(
        self, path: _Path, *, read_only: bool = False, ram: Optional[int] = None, wait: float = 5.0
    ) -> None: ...
    @property
    def path(self) -> Any:
        """The ``pathlib.Path`` it was opened by."""
    @property
    def is_remote(self) -> bool:
        """Whether another process owns the pool."""
    @property
    def owner_pid(self) -> int: ...
    def info(self) -> Dict[str, Any]:
        """What the superblocks say, with the names of ``nvtier info --json``."""
    def stat(self) -> Dict[str, Any]:
        """What it holds and did."""
    def ls(self, path: str = "", recursive: bool = False) -> List[Entry]:
        """Entries of a directory in order of names; of anything else, itself."""
    def stat_path(self, path: str) -> Entry: ...
    def exists(self, path: str) -> bool: ...
    def mkdirs(self, path: str) -> None:
        """Makes a directory and those above it; one that exists is fine."""
    def rm(self, path: str, recursive: bool = False) -> None: ...
    def rename(self, source: str, target: str) -> None:
        """As ``rename(2)``: replaces what is at ``target``."""
    def sync(self) -> None:
        """Makes everything that is committed durable."""
    def import_file(self, src: _Path, name: str, *, resume: bool = False) -> Entry:
        """Copies a file into the pool; it appears at ``name`` when it is whole. ``resume``: go on where an interrupted import of
        the same file ended, and keep what is written if this one is interrupted."""
    def write(self, name: str, data: bytes) -> Entry:
        """Makes a region of these bytes, whole or not at all."""
    def export_file(self, name: str, dest: _Path) -> int:
        """Copies a region to a file, whole or not at all; returns its bytes."""
    def read(self, name: str, offset: int = 0, length: Optional[int] = None) -> bytes:
        """Bytes of a region, fewer at its end."""
    def tensors(self, name: str) -> Dict[str, Tensor]:
        """The tensors of a region, in the order of their data."""
    def verify(
        self, path: str = "", progress: Optional[Callable[[int, int, int], object]] = None
    ) -> Dict[str, Any]:
        """Checks every sum at and below ``path``. ``progress`` is called with bytes done, bytes in all, bad chunks."""
    def region(self, name: str) -> Region:
        """A handle on the present content of a region."""
    def warm(self, name: str) -> int:
        """Brings a region into the RAM tier (``ram=``), as far as there is room: what is there goes to a device from where it lies at the next load. Returns
        the bytes that are there then: 0 of a pool in one directory, whose tier is the page cache, and of one that another process owns."""
    def load(self, names: Union[_Path, Iterable[_Path]], **options: Any) -> Loaded:
        """As ``nvtier.load``, of regions by name: ``pool.load("m.safetensors", device="cuda:0")``."""
    def close(self) -> None:
        """Ends the session; an owner's pool is synced. Calls after that raise ``Closed``. Open regions and tensor files keep the
        pool open until they are closed."""
    def __enter__(self) -> "Pool": ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]] = None,
        exc: Optional[BaseException] = None,
        traceback: Optional[TracebackType] = None,
    ) -> bool: ...

@final
class Region:
    """One generation of a region's content, held in place: until it is closed, its bytes stay where and what they are, whatever is
    done with its name, and their space is not reused."""

    @property
    def pool(self) -> Pool: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int:
        """Bytes."""
    @property
    def generation(self) -> int: ...
    @property
    def is_leased(self) -> bool:
        """Whether this process leases the extents itself. Where another process owns the pool, the owner holds them instead."""
    @property
    def closed(self) -> bool: ...
    def tensors(self) -> Dict[str, Tensor]:
        """Its tensors, in the order of their data."""
    def read(self, offset: int = 0, length: Optional[int] = None) -> bytes:
        """Bytes, fewer at its end."""
    def load(self, **options: Any) -> Loaded:
        """As ``nvtier.load``, of this region. ``Changed`` when its name has other content by now."""
    def close(self) -> None:
        """Lets go of the content. Loaded tensors stay."""
    def __enter__(self) -> "Region": ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]] = None,
        exc: Optional[BaseException] = None,
        traceback: Optional[TracebackType] = None,
    ) -> bool: ...

@final
class DeviceTensor:
    """A loaded tensor. Its memory is given back when the last tensor of its load is gone, and the last view of one that another
    library made through DLPack or an array interface."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str:
        """safetensors' word (``BF16``, ``F8_E4M3``); ggml's for its quantised types (``Q4_0``)."""
    @property
    def shape(self) -> Tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:N``."""
    @property
    def data_ptr(self) -> int:
        """Address of the first byte on the device."""
    def as_bytes(self, rows: bool = False) -> "DeviceTensor":
        """The same memory as ``U8``: of one dimension, or with ``rows`` of the tensor's own and rows of bytes."""
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Optional[Tuple[int, int]] = None,
        dl_device: Optional[Tuple[int, int]] = None,
        copy: Optional[bool] = None,
    ) -> Any:
        """Types that share bytes between elements come as rows of bytes."""
    def __dlpack_device__(self) -> Tuple[int, int]: ...
    @property
    def __array_interface__(self) -> Dict[str, Any]:
        """On the host only. Types that numpy lacks are opaque (``V2`` for BF16)."""
    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        """On a GPU only."""

@final
class TensorFile:
    """Open tensor files, for ``nvtier.torch.safe_open``."""

    def __init__(
        self, paths: Sequence[_Path], *, pool: Optional[Pool] = None, verify: bool = True, cache: str = "auto"
    ) -> None: ...
    def keys(self) -> List[str]: ...
    def metadata(self) -> Dict[str, str]: ...
    def info(self, name: str) -> Tensor: ...
    def get(self, name: str, device: str, cut: Optional[Tuple[int, int, int]] = None) -> DeviceTensor: ...
    def get_all(self, device: str) -> Tuple[List[DeviceTensor], Dict[str, Any]]: ...
    def ahead(self) -> Tuple[int, int]: ...
    def forget(self) -> None: ...

@final
class KvStore:
    """Below ``nvtier.kv.Store``."""

    def __init__(
        self,
        pool: Pool,
        *,
        name: str,
        budget: Optional[int],
        ram: int,
        keep: bool,
        ttl: Optional[int],
        write_bytes_per_day: Optional[int],
        second_offer: Optional[int],
        quotas: Sequence[Tuple[str, int]],
        tenant_quota: int,
        deadline: float,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    def namespace(self, fingerprint: bytes, block_bytes: int, tenant: str) -> "KvBlocks": ...
    def memory(self) -> Dict[str, Any]: ...

_Shape = Tuple[int, int, int, int, int, int, int]

@final
class KvBlocks:
    """Below ``nvtier.kv.Namespace``."""

    @property
    def is_remote(self) -> bool: ...
    @property
    def block_bytes(self) -> int: ...
    def lookup(self, keys: Sequence[bytes]) -> int: ...
    def contains(self, keys: Sequence[bytes]) -> List[bool]: ...
    def in_memory(self, keys: Sequence[bytes]) -> List[bool]: ...
    def forget(self, keys: Sequence[bytes]) -> None: ...
    def pin(self, keys: Sequence[bytes], pinned: bool) -> int: ...
    def remove(self, keys: Sequence[bytes]) -> int: ...
    def set_quota(self, quota: int) -> None: ...
    def flush(self) -> None: ...
    def stat(self) -> Dict[str, Any]: ...
    def put(
        self,
        device: str,
        planes: Sequence[Tuple[int, int]],
        shape: _Shape,
        places: Sequence[int],
        keys: Sequence[bytes],
        deadline: Optional[float],
    ) -> Tuple[List[str], Optional[str]]:
        """Private: the addresses must be memory of tensors that the caller holds."""
    def get(
        self,
        device: str,
        planes: Sequence[Tuple[int, int]],
        shape: _Shape,
        places: Sequence[int],
        keys: Sequence[bytes],
        deadline: Optional[float],
    ) -> Tuple[List[str], Optional[str]]:
        """Private, as ``put``."""
    def close(self) -> None: ...

@final
class KvTier:
    def __init__(
        self,
        store: KvStore,
        memory: Any,
        device: str,
        planes: Sequence[Tuple[int, int]],
        shape: _Shape,
        block_bytes: int,
        fingerprint: bytes,
        threads: int,
        deadline: float,
    ) -> None:
        """Private: the addresses must be of ``memory``."""
    def lookup(self, request: str, tenant: str, key: bytes) -> Optional[bool]: ...
    def prefix(self, request: str, tenant: str, keys: Sequence[bytes]) -> Optional[int]: ...
    def forget(self, request: str) -> None: ...
    def store(self, job: int, tenant: str, keys: Sequence[bytes], places: Sequence[int]) -> None: ...
    def load(self, job: int, tenant: str, keys: Sequence[bytes], places: Sequence[int]) -> None: ...
    def finished(self) -> List[Tuple[int, bool, List[bool], float, int]]: ...
    def is_busy(self) -> bool: ...
    def drain(self) -> None: ...
    def stat(self) -> Dict[str, Any]: ...
    def trouble(self) -> Optional[str]: ...
    def close(self) -> List[Tuple[int, bool, List[bool], float, int]]: ...

@final
class KvClient:
    def __init__(self, store: KvStore, threads: int, deadline: float) -> None: ...
    def event_fd(self) -> int: ...
    def submit(
        self,
        op: str,
        owners: Sequence[Tuple[bytes, str, Sequence[int]]],
        keys: Sequence[bytes],
        views: Sequence[Tuple[int, int]],
        memory: Any,
    ) -> int:
        """Private: the addresses must be of ``memory``."""
    def finished(self) -> List[Tuple[int, bool, str, Optional[List[bool]]]]: ...
    def stat(self) -> Dict[str, Any]: ...
    def close(self) -> None: ...

class KvPlanner:
    """What computing and loading cost, as measured lately. May be shared by threads; for one model on one device."""

    def __init__(self) -> None: ...
    def computed(self, start: int, end: int, seconds: float) -> None:
        """Tokens ``start`` to ``end`` were computed in so many seconds, those before being there."""
    def loaded(self, bytes: int, seconds: float, memory: bool = False) -> None:
        """So many bytes were loaded by one call, from the drive or from memory."""
    def compute_seconds(self, start: int, end: int) -> Optional[float]:
        """What computing these tokens is expected to take; None: nothing was measured."""
    def load_seconds(self, bytes: int, memory: bool = False) -> Optional[float]: ...

@final
class KvRestore:
    """A prefix on its way, for ``nvtier.transformers``: ``("blocks", start, end)``, ``("wait", 0, 0)`` or ``("done", 0, 0)`` are its steps."""

    def __init__(
        self,
        planner: KvPlanner,
        memory: Sequence[bool],
        *,
        block_tokens: int,
        block_bytes: int,
        compute: bool,
        load: bool,
        chunk_tokens: int,
        load_blocks: int,
    ) -> None: ...
    def next_compute(self, now: float) -> Tuple[str, int, int]: ...
    def computed(self, seconds: float) -> None: ...
    def next_load(self, now: float) -> Tuple[str, int, int]: ...
    def loaded(self, first: int, good: Sequence[bool], now: float) -> None: ...
    def restored(self) -> Dict[str, int]: ...

@final
class StateTicket:
    """An operation on a unit, or a commit, for ``nvtier.train``."""

    def wait(self, copied: bool = False) -> None: ...
    def is_done(self, copied: bool = False) -> bool: ...

@final
class State:
    """Private: units of training state; the addresses must be memory of ``keep``, which nobody else uses until the ticket is done."""

    def __init__(
        self, pool: Pool, *, name: str, budget: int, block_bytes: int, ram: int, deadline: float, hold: bool = False, at: Optional[int] = None
    ) -> None: ...
    @staticmethod
    def commits(pool: Pool, name: str) -> List[Tuple[int, int, bytes]]: ...
    @staticmethod
    def look(pool: Pool, name: str) -> Optional[Tuple[int, bytes]]: ...
    @staticmethod
    def remove(pool: Pool, name: str) -> bool: ...
    @staticmethod
    def room_for(lens: Sequence[int], extra: int, block_bytes: int) -> int: ...
    def units(self) -> List[int]: ...
    def has(self, unit: int) -> bool: ...
    def add(self, lens: Sequence[int]) -> int: ...
    def keep_in_ram(self, unit: int) -> None: ...
    def fetch(self, unit: int, device: str, address: int, after: int, keep: Any) -> StateTicket: ...
    def store(self, unit: int, device: str, address: int, after: int, keep: Any, write: bool) -> StateTicket: ...
    def commit(self, meta: bytes) -> StateTicket: ...
    def settle(self) -> None: ...
    def moved(self) -> Dict[str, int]: ...
    def close(self) -> None: ...

def kv_chain(seed: bytes, tokens: Sequence[int], block_tokens: int, extras: Optional[Sequence[bytes]] = None) -> List[bytes]: ...
def kv_digest(bytes: bytes) -> bytes: ...
def kv_digest_memory(device: str, ranges: Sequence[Tuple[int, int]]) -> List[bytes]:
    """Private: the addresses must be memory of tensors that the caller holds."""

def load(
    paths: Sequence[_Path],
    *,
    device: str,
    filters: Sequence[str],
    shard: Optional[Tuple[int, int, List[Tuple[str, int]]]],
    pool: Optional[Pool],
    verify: bool,
    cache: str,
    path: str,
    cached: str,
    progress: Optional[Callable[[int, int], Any]],
    deadline: Optional[float],
    priority: str,
    out: Optional[Sequence[Tuple[str, str, Sequence[int], int, int]]],
) -> Tuple[List[DeviceTensor], Dict[str, Any]]:
    """Private: the addresses of `out` must be memory of tensors that the caller holds."""

def save(
    path: _Path,
    tensors: Sequence[Tuple[str, str, Sequence[int], int, int]],
    *,
    metadata: Optional[Dict[str, str]],
    device: str,
    progress: Optional[Callable[[int, int], Any]],
    deadline: Optional[float],
) -> Dict[str, Any]:
    """Private: the addresses must be memory of tensors that the caller holds."""

def look_at_dlpack(capsule: Any) -> Tuple[int, str, str, List[int], int, bool]: ...
def look_at_interface(interface: Dict[str, Any], cuda: bool) -> Tuple[int, str, str, List[int], int, bool]: ...
def trim() -> None:
    """Gives back the pinned memory (at most two rings a device, 144 MiB) that is kept for the next load."""

def device_info(device: str) -> Dict[str, Any]:
    """What a device is: name, PCI address, memory, free memory, driver."""
