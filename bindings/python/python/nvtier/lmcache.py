"""LMCache's second tier in a pool: a native plugin, by configuration alone.

::

    lmcache server ... --l2-adapter '{"type": "native_plugin", "module_path": "nvtier.lmcache", "class_name": "NvtierClient",
      "adapter_params": {"pool": "/mnt/nvme0/pool", "budget": 200000000000, "fingerprint": "llama-3.1-8b, 2026-11-01"}}'

``adapter_params``: ``pool``; ``store`` (name, ``lmcache``), ``budget`` (bytes), ``fingerprint`` (text that changes with the weights: LMCache's keys
name the model, not its weights), ``threads``, ``deadline`` (seconds of a batch), ``ram`` (bytes on their way), ``ttl``,
``write_bytes_per_day``, ``second_offer``, ``quotas`` (bytes by tenant: ``{"alice": "10GiB"}``), ``tenant_quota`` (of tenants who are new). A key's
cache salt is its tenant.

A block that is damaged, gone or late is a miss of its own; the others of its batch come.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import _nvtier, kv
from ._errors import InvalidArgument
from ._sizes import Size

__all__ = ["NvtierClient"]

#: Separates the fields of LMCache's keys: ``model@rank@group@hash[@salt]``.
_SEPARATOR = "@"


class NvtierClient:
    """What LMCache's ``native_plugin`` adapter drives: batches that are begun here and fetched when the eventfd says so. Threads of the binding
    move the bytes, between LMCache's memory and the pool; no call here waits for a drive."""

    def __init__(
        self,
        pool: str,
        *,
        store: str = "lmcache",
        budget: Optional[Size] = None,
        fingerprint: str = "",
        threads: int = 4,
        deadline: float = 10.0,
        ram: Size = 256 << 20,
        ttl: Optional[int] = None,
        write_bytes_per_day: Optional[Size] = None,
        second_offer: Optional[int] = None,
        quotas: Optional[Dict[str, Size]] = None,
        tenant_quota: Optional[Size] = None,
    ) -> None:
        if not isinstance(fingerprint, str):
            raise InvalidArgument(f"fingerprint={fingerprint!r}: text that changes with the weights")
        # Model, rank and group are in the keys.
        self._print = kv.fingerprint(layout="nvtier lmcache 1", weights=fingerprint)
        # What LMCache has in its first tier need not be in memory twice.
        self._store = kv.Store(
            pool,
            store,
            budget=budget,
            ram=ram,
            keep=False,
            ttl=ttl,
            write_bytes_per_day=write_bytes_per_day,
            second_offer=second_offer,
            quotas=quotas,
            tenant_quota=tenant_quota,
            deadline=deadline,
        )
        try:
            self._client = _nvtier.KvClient(self._store._inner, threads, float(deadline))
        except BaseException:
            self._store.close()
            raise
        self._open = True

    def event_fd(self) -> int:
        """A file descriptor that is readable while a batch is over and was not fetched."""
        return self._client.event_fd()

    def submit_batch_get(self, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        """Begins to load blocks into memory; only that of blocks that come is written to. Returns the batch's number."""
        for view in memoryviews:
            if memoryview(view).readonly:
                raise InvalidArgument("a block is to be loaded into memory that is read-only")
        return self._submit("get", keys, memoryviews)

    def submit_batch_set(self, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        """Begins to store blocks."""
        return self._submit("set", keys, memoryviews)

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Begins to look which blocks are there."""
        return self._submit("exists", keys, ())

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Begins to take blocks out."""
        return self._submit("delete", keys, ())

    def drain_completions(self) -> List[Tuple[int, bool, str, Optional[List[bool]]]]:
        """Batches that are over: number, whether all of it went well, why not, and of each block whether it came, is there, or was there."""
        return self._client.finished()

    def stat(self) -> Dict[str, Any]:
        """What happened since it was made, with the names of vLLM's tier (``stored``, ``loaded``, ``corrupt``, ...)."""
        return self._client.stat()

    def close(self) -> None:
        """Ends the threads and lets go of LMCache's memory; what was stored is durable."""
        if not self._open:
            return
        self._open = False
        self._client.close()
        self._store.close()

    def _submit(self, op: str, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        views = [_where(view) for view in memoryviews]
        owners: Dict[str, List[int]] = {}
        blocks = []
        for index, key in enumerate(keys):
            block, salt = key, ""
            if key.count(_SEPARATOR) == 4:
                block, salt = key.rsplit(_SEPARATOR, 1)
            elif key.count(_SEPARATOR) != 3:
                raise InvalidArgument(f"the key {key!r} is not model@rank@group@hash[@salt]: nvtier does not fit this LMCache")
            owners.setdefault(salt, []).append(index)
            blocks.append(block.encode())
        parts = [(self._print, salt, at) for salt, at in owners.items()]
        return self._client.submit(op, parts, blocks, views, list(memoryviews))


def _where(view: Any) -> Tuple[int, int]:
    """Address and length of memory."""
    import numpy as np

    memory = memoryview(view)
    if not memory.c_contiguous:
        raise InvalidArgument("a block in memory with gaps: it has to be in one piece")
    return np.frombuffer(memory, dtype=np.uint8).ctypes.data if memory.nbytes else 0, memory.nbytes
