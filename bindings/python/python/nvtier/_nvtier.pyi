"""The compiled module; ``nvtier`` re-exports all of it."""

import os
from types import TracebackType
from typing import Any, Callable, Dict, List, Literal, Optional, Sequence, Tuple, Type, Union, final

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
    def close(self) -> None:
        """Ends the session; an owner's pool is synced. Calls after that raise ``Error``."""
    def __enter__(self) -> "Pool": ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]] = None,
        exc: Optional[BaseException] = None,
        traceback: Optional[TracebackType] = None,
    ) -> bool: ...
