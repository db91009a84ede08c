"""Which files are meant: a file, several, a directory, an index of shards."""

from __future__ import annotations

import json
import os
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Callable, Iterable, List, Optional, Union

from ._errors import Malformed, NotFound

if TYPE_CHECKING:
    from ._nvtier import Pool

PathLike = Union[str, "os.PathLike[str]"]
Paths = Union[PathLike, Iterable[PathLike]]

_INDEX = ".safetensors.index.json"


def _shards(index: str, text: Union[str, bytes]) -> List[str]:
    """The files that an index names, in the order of their names, beside it."""
    try:
        weight_map = json.loads(text)["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Malformed(f"{index} is no index of shards: it has no usable weight_map ({error!r})") from None
    folder = os.path.dirname(index)
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise Malformed(f"{index} names a shard outside its directory: {name!r}")
    return [os.path.join(folder, name) if folder else name for name in names]


def _choose(place: str, names: List[str], read: Callable[[str], Union[str, bytes]]) -> List[str]:
    """What stands for a directory with these entries (whole paths): an index's shards, its safetensors files, its GGUF files."""
    indexes = [name for name in names if name.endswith(_INDEX)]
    if len(indexes) == 1:
        return _shards(indexes[0], read(indexes[0]))
    for extension in (".safetensors", ".gguf"):
        found = [name for name in names if name.lower().endswith(extension)]
        if found:
            return found
    raise NotFound(f"load {place}: there is no .safetensors and no .gguf file in it")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise NotFound(f"load {path}: {error.strerror}") from error


def _files(path: str) -> List[str]:
    if os.path.isdir(path):
        return _choose(path, sorted(os.path.join(path, name) for name in os.listdir(path)), _read)
    if path.endswith(".index.json"):
        return _shards(path, _read(path))
    return [path]


def _regions(pool: Pool, name: str) -> List[str]:
    name = name.strip("/")
    if name.endswith(".index.json"):
        return _shards(name, pool.read(name))
    if pool.stat_path(name).kind == "directory":
        inside = sorted(entry.path for entry in pool.ls(name) if entry.kind == "region")
        return _choose(f"{name!r} of the pool", inside, pool.read)
    return [name]


def resolve(paths: Paths, pool: Optional[Any] = None) -> List[str]:
    """Paths of files, or names of regions."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    resolved: List[str] = []
    for path in paths:
        text = os.fspath(path)
        if not isinstance(text, str):
            raise TypeError(f"a path must be str or os.PathLike[str], not {type(path).__name__}")
        resolved += _files(text) if pool is None else _regions(pool, text)
    return resolved
