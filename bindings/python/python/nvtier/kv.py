"""KV caches that survive: blocks of keys and values in a pool, put from tensors and got into them.

::

    with nvtier.Pool("/mnt/nvme/pool") as pool:
        store = nvtier.kv.Store(pool, ram=1 << 30)
        space = store.namespace(nvtier.kv.fingerprint(weights=digest, dtype="bf16"), block_bytes=2 << 20, tenant="alice")
        keys = nvtier.kv.chain(space.fingerprint, tokens, block_tokens=16)
        space.put(keys, blocks)                          # a tensor whose rows are blocks
        there = space.lookup(keys)                       # the longest prefix that can be loaded
        got = space.get(keys[:there], out)               # "memory", "drive", or why not: "absent", "corrupt", "failed"

A block that cannot be loaded, for whatever reason, is a miss and never an exception; a call that makes no sense is an exception.
``nvtier.transformers`` is made of this.
"""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from . import _nvtier
from ._errors import InvalidArgument, NotSupported
from ._nvtier import KvPlanner as Planner
from ._nvtier import Pool
from ._sizes import Size, size_of

__all__ = ["Namespace", "Planes", "Planner", "Store", "chain", "digest_tensors", "fingerprint"]

#: What ``Namespace.get`` says of a block that is there now.
HITS = ("memory", "drive")


def fingerprint(**parts: Any) -> bytes:
    """A digest of everything that blocks depend on besides the tokens: digests of the weights (``digest_tensors``), tokenizer, adapters and
    their scale, type, attention, layout, size of blocks. ``parts``: numbers, text, bytes, None, and lists and dicts of them."""

    def plain(value: Any) -> Any:
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": bytes(value).hex()}
        if isinstance(value, Mapping):
            return {"dict": sorted((str(key), plain(item)) for key, item in value.items())}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return {"set": sorted(map(str, value))}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        return {"text": str(value)}

    return _nvtier.kv_digest(json.dumps(plain(parts), sort_keys=True).encode())


def chain(seed: bytes, tokens: Sequence[int], block_tokens: int, extras: Optional[Sequence[bytes]] = None) -> List[bytes]:
    """The key of each whole block of a sequence: a hash of ``seed`` and of all tokens up to the block's end. ``extras``: of each whole block, what its
    bytes depend on besides tokens, such as the picture that some of them stand for; ``b""`` for nothing."""
    return _nvtier.kv_chain(seed, tokens, block_tokens, extras)


def digest_tensors(tensors: Mapping[str, Any]) -> bytes:
    """A digest of names, types, shapes and all bytes of torch tensors, on the host or a GPU: what a model's weights are, whatever their
    path. Every byte is read: about a second for some gigabytes."""
    keep, by_device, heads = [], {}, []
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
        keep.append(tensor)
        heads.append([name, str(tensor.dtype), list(tensor.shape)])
        entry = (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        by_device.setdefault(_device(tensor), []).append((len(heads) - 1, entry))
    digests: List[bytes] = [b""] * len(heads)
    for device, entries in by_device.items():
        _finish_device(device)
        found = _nvtier.kv_digest_memory(device, [entry for _, entry in entries])
        for (index, _), digest in zip(entries, found):
            digests[index] = digest
    del keep
    return _nvtier.kv_digest(json.dumps([[head, digest.hex()] for head, digest in zip(heads, digests)]).encode())


def _device(tensor: Any) -> str:
    kind = tensor.device.type
    if kind == "cpu":
        return "cpu"
    if kind == "cuda":
        return f"cuda:{tensor.device.index}"
    raise NotSupported(f"KV blocks of tensors on {tensor.device}: the host and CUDA devices are supported")


def _finish_device(device: str) -> None:
    """What the framework started on the device before must have ended: copies of ours run beside it."""
    if device != "cpu":
        import torch

        torch.cuda.current_stream(device).synchronize()


class Planes:
    """Where blocks lie in tensors: planes (K or V of a layer) of one shape, ``[1, heads, tokens, head_dim]`` with any strides, whose tokens are
    cut into blocks. Block ``i`` is tokens ``i * block_tokens`` and following, of all planes."""

    def __init__(self, tensors: Sequence[Any], block_tokens: int) -> None:
        if not tensors:
            raise InvalidArgument("planes of no tensors")
        first = tensors[0]
        for tensor in tensors:
            same = tensor.shape == first.shape and tensor.stride() == first.stride()
            if tensor.dim() != 4 or tensor.shape[0] != 1 or not same or tensor.dtype != first.dtype:
                raise NotSupported(
                    f"KV blocks of tensors of shape {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}: one sequence, and all"
                    f" planes like the first, {tuple(first.shape)}, {first.stride()}, {first.dtype}, are supported"
                )
            if tensor.device != first.device:
                raise NotSupported(f"KV blocks of tensors on {tensor.device} and {first.device}: one device is supported")
        _, heads, tokens, dim = first.shape
        size = first.element_size()
        _, head_stride, token_stride, dim_stride = first.stride()
        if dim > 1 and dim_stride != 1:
            raise NotSupported("KV blocks of tensors whose last dimension has gaps")
        blocks = tokens // block_tokens
        self.keep = list(tensors)
        self.device = _device(first)
        span = ((heads - 1) * head_stride + (tokens - 1) * token_stride + dim) * size if blocks else 0
        self.planes = [(tensor.data_ptr(), span) for tensor in tensors]
        row = dim * size
        self.shape = (blocks, block_tokens * token_stride * size, block_tokens, token_stride * size, heads, head_stride * size, row)
        self.block_bytes = row * heads * block_tokens * len(self.keep)


class _Rows:
    """A tensor whose rows are blocks."""

    def __init__(self, tensor: Any) -> None:
        if not tensor.is_contiguous() or tensor.dim() < 1:
            raise InvalidArgument("blocks are rows of a contiguous tensor")
        rows = tensor.shape[0]
        size = tensor.numel() * tensor.element_size()
        row = size // max(rows, 1)
        self.keep = [tensor]
        self.device = _device(tensor)
        self.planes = [(tensor.data_ptr(), size)]
        self.shape = (rows, row, 1, row, 1, row, row)
        self.block_bytes = row


Where = Union[Planes, Any]


class Namespace:
    """Blocks of one fingerprint, size and tenant. May be shared by threads; calls release the GIL."""

    def __init__(self, inner: _nvtier.KvBlocks, fingerprint: bytes, tenant: str) -> None:
        self._inner = inner
        #: What the blocks depend on besides their keys.
        self.fingerprint = fingerprint
        #: Whose they are.
        self.tenant = tenant
        #: Why the last put or get that did not go well did not, for a person; None: all went well.
        self.trouble: Optional[str] = None

    @property
    def block_bytes(self) -> int:
        return self._inner.block_bytes

    @property
    def is_remote(self) -> bool:
        """Whether another process owns the pool: blocks go through it then."""
        return self._inner.is_remote

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many blocks from the first on can be loaded. They count as asked for."""
        return self._inner.lookup(keys)

    def contains(self, keys: Sequence[bytes]) -> List[bool]:
        """Which blocks are there."""
        return self._inner.contains(keys)

    def in_memory(self, keys: Sequence[bytes]) -> List[bool]:
        """Which blocks are in this process's memory."""
        return self._inner.in_memory(keys)

    def _arguments(self, where: Where, keys: Sequence[bytes], places: Optional[Sequence[int]]) -> Tuple[Any, Sequence[int]]:
        layout = where if isinstance(where, Planes) else _Rows(where)
        _finish_device(layout.device)
        return layout, range(len(keys)) if places is None else places

    def put(
        self, keys: Sequence[bytes], where: Where, places: Optional[Sequence[int]] = None, *, deadline: Optional[float] = None
    ) -> List[str]:
        """Stores blocks: ``where`` is a tensor whose rows are blocks, or ``Planes``; ``places`` says which block of it each key is of (the first,
        the second, ... by default). ``deadline``: seconds from now. Says of each block ``"new"``, ``"present"``; or why it is not stored:
        ``"admission"``, ``"budget"``, ``"quota"``, ``"space"`` by policy, ``"failed"`` by an error (see ``trouble``)."""
        layout, places = self._arguments(where, keys, places)
        done, self.trouble = self._inner.put(layout.device, layout.planes, layout.shape, places, keys, deadline)
        return done

    def get(
        self, keys: Sequence[bytes], where: Where, places: Optional[Sequence[int]] = None, *, deadline: Optional[float] = None
    ) -> List[str]:
        """Loads blocks to their places. Says of each where it came from, ``"memory"`` or ``"drive"``; or why it is not there:
        ``"absent"``, ``"corrupt"``, ``"failed"``. Only places of blocks that are there are written to."""
        layout, places = self._arguments(where, keys, places)
        return self._get(keys, layout, places, deadline)

    def _get(self, keys: Sequence[bytes], layout: Any, places: Sequence[int], deadline: Optional[float]) -> List[str]:
        done, self.trouble = self._inner.get(layout.device, layout.planes, layout.shape, places, keys, deadline)
        return done

    def pin(self, keys: Sequence[bytes], pinned: bool = True) -> int:
        """Keeps blocks whatever else has to go, or no longer. Returns how many are there."""
        return self._inner.pin(keys, pinned)

    def remove(self, keys: Sequence[bytes]) -> int:
        """Takes blocks out. Returns how many were there."""
        return self._inner.remove(keys)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Drops blocks from memory; they stay in the store."""
        self._inner.forget(keys)

    def set_quota(self, quota: Size) -> None:
        """Limits the bytes that this tenant's blocks may have in all of the store; 0: no limit."""
        self._inner.set_quota(size_of("quota", quota) or 0)

    def flush(self) -> None:
        """Makes every put that returned durable; otherwise it is within 50 ms."""
        self._inner.flush()

    def stat(self) -> Dict[str, Any]:
        """What the store holds, and what happened since it was opened, with the names of ``nvtier kv stat --json``."""
        return self._inner.stat()

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> "Namespace":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _quotas(quotas: Optional[Mapping[str, Size]]) -> List[Tuple[str, int]]:
    if quotas is None:
        return []
    if not isinstance(quotas, Mapping) or not all(isinstance(tenant, str) for tenant in quotas):
        raise InvalidArgument(f"quotas={quotas!r}: bytes by the names of tenants, such as {{'alice': '10GiB'}}; 0: no limit")
    return [(tenant, size_of(f"quotas[{tenant!r}]", quota) or 0) for tenant, quota in quotas.items()]


class Store:
    """A KV store of a pool, which is made where there is none. Processes that open the same pool share it: the pool's owner does the work of
    the others.

    ``ram``: bytes of memory for blocks, taken once, and pinned where a GPU is used. ``keep``: whether blocks stay there after their use. Settings of
    the store count when nobody has it open yet: ``budget`` (bytes in the pool; default: half of what is free), ``ttl`` (seconds),
    ``write_bytes_per_day``, ``second_offer`` (write only what was offered before, keeping so many offers in mind), ``quotas`` (bytes that the blocks of
    tenants may have, by name), ``tenant_quota`` (of a tenant with a name who is new to the store). Quotas are kept in the store, and what is set here is
    set again whenever it is opened so. ``deadline``: seconds of every operation, and of a put or get that says nothing else. Bytes may be text:
    ``"200GB"``, ``"64GiB"``.
    """

    def __init__(
        self,
        pool: Union[Pool, str, "os.PathLike[str]"],
        name: str = "default",
        *,
        budget: Optional[Size] = None,
        ram: Size = 256 << 20,
        keep: bool = True,
        ttl: Optional[int] = None,
        write_bytes_per_day: Optional[Size] = None,
        second_offer: Optional[int] = None,
        quotas: Optional[Mapping[str, Size]] = None,
        tenant_quota: Optional[Size] = None,
        deadline: float = 5.0,
    ) -> None:
        budget, write_bytes_per_day = size_of("budget", budget), size_of("write_bytes_per_day", write_bytes_per_day)
        ram_bytes = size_of("ram", ram) or 0
        limits = _quotas(quotas)
        tenant_bytes = size_of("tenant_quota", tenant_quota) or 0
        self._own = None if isinstance(pool, Pool) else Pool(pool)
        self.pool: Pool = pool if isinstance(pool, Pool) else self._own
        self._spaces: List[Namespace] = []
        if ram_bytes < 1 << 20:
            raise InvalidArgument(f"ram={ram}: at least 1 MiB is needed for blocks on their way")
        self._inner = _nvtier.KvStore(
            self.pool,
            name=name,
            budget=budget,
            ram=ram_bytes,
            keep=keep,
            ttl=ttl,
            write_bytes_per_day=write_bytes_per_day,
            second_offer=second_offer,
            quotas=limits,
            tenant_quota=tenant_bytes,
            deadline=deadline,
        )

    @property
    def name(self) -> str:
        return self._inner.name

    def namespace(self, fingerprint: bytes, block_bytes: int, tenant: str = "") -> Namespace:
        """Blocks of a fingerprint (see ``fingerprint``), a size and a tenant. Others' blocks are never found."""
        space = Namespace(self._inner.namespace(fingerprint, block_bytes, tenant), fingerprint, tenant)
        self._spaces.append(space)
        return space

    def memory(self) -> Dict[str, Any]:
        """What the memory above the store holds: ``budget_bytes``, ``blocks``, ``hits``, ``evictions``."""
        return self._inner.memory()

    def close(self) -> None:
        """Closes its namespaces, and the pool if it was opened here."""
        for space in self._spaces:
            space.close()
        self._spaces.clear()
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
