"""vLLM's secondary tier in a pool; see ``nvtier.vllm``. Imported where vLLM has tiers (from 0.26 on) only."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

try:
    from vllm.v1.kv_offload.base import Medium
except ImportError:  # 0.26 counts all tiers alike
    Medium = None

from . import _nvtier, kv
from ._errors import InvalidArgument
from ._sizes import Size
from ._vllm_weights import weights_digest

logger = logging.getLogger(__name__)

#: Counters of the tier in vLLM's Prometheus output, by their names in ``KvTier.stat``.
_COUNTERS = {
    "stored": "Chunks stored in the nvtier pool.",
    "present": "Chunks that were to be stored and were there.",
    "refused": "Chunks that were not stored by policy: admission, quota, write budget, room.",
    "store_failed": "Chunks that could not be stored.",
    "loaded": "Chunks loaded from the nvtier pool, checksums compared.",
    "lost": "Chunks that were gone when they were to be loaded.",
    "corrupt": "Chunks that were not as they were stored: dropped, and a miss.",
    "load_failed": "Chunks that could not be loaded in time or at all.",
    "stored_bytes": "Bytes stored in the nvtier pool.",
    "loaded_bytes": "Bytes loaded from the nvtier pool.",
    "hits": "Chunks that were asked for and are there.",
    "misses": "Chunks that were asked for and are not there.",
}
#: Whether vLLM is of the line that knows less of tiers: no layout in their configuration, no parts of jobs in their results.
_FEWER = "successful_keys" not in {field.name for field in fields(JobResult)}
_QUEUED = "vllm:nvtier_tier_queued"


def _metric(name: str) -> str:
    return f"vllm:nvtier_tier_{name}"


class NvtierTier(SecondaryTierManager):
    """Chunks of vLLM's CPU tier in a KV store of a pool. Threads of the binding move them; no call here waits for a drive but ``drain_jobs``
    and ``shutdown``."""

    medium = None if Medium is None else Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        pool: str,
        store: str = "vllm",
        budget: Optional[Size] = None,
        fingerprint: Optional[str] = None,
        tenant_key: str = "tenant",
        threads: int = 4,
        deadline: float = 10.0,
        ram: Size = 256 << 20,
        ttl: Optional[int] = None,
        write_bytes_per_day: Optional[Size] = None,
        second_offer: Optional[int] = None,
        quotas: Optional[Dict[str, Size]] = None,
        tenant_quota: Optional[Size] = None,
        locality: Optional[str] = None,
        module_path: Optional[str] = None,
    ) -> None:
        # In 0.26 there is neither back-pressure nor a module path, which is left in the tier's configuration then.
        detector = () if _FEWER else (backpressure_detector,)
        super().__init__(offloading_spec, primary_kv_view, tier_type, *detector)
        rows, row = len(primary_kv_view), (primary_kv_view.strides or (0,))[0]
        self._row = row
        if not primary_kv_view.c_contiguous or primary_kv_view.nbytes != rows * row:
            raise InvalidArgument("vLLM's CPU tier is not one piece of memory: nvtier does not fit this vLLM")
        # A pool is on drives of this machine; drives that are behind a network can be said to be REMOTE.
        self.locality = Locality.LOCAL if locality is None else Locality(locality)
        self._tenant_key = tenant_key
        self._print = self._fingerprint(fingerprint)
        if _FEWER and "PYTHONHASHSEED" not in os.environ:
            logger.warning("PYTHONHASHSEED is not set: this vLLM calls blocks by other names in each process, and finds nothing after a restart")
        # What vLLM has in its CPU tier need not be in memory twice.
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
            memory = np.frombuffer(primary_kv_view, dtype=np.uint8)
            planes, shape = [(memory.ctypes.data, rows * row)], (rows, row, 1, row, 1, row, row)
            self._tier = _nvtier.KvTier(
                self._store._inner, primary_kv_view, "cpu", planes, shape, row, self._print, threads, float(deadline)
            )
            del memory
        except BaseException:
            self._store.close()
            raise
        self._open = True
        #: Keys of loads on their way, to say which of them came.
        self._loads: Dict[int, Tuple[OffloadKey, ...]] = {}
        self._told: Dict[str, Any] = {}

    def _fingerprint(self, given: Optional[str]) -> bytes:
        config = self._offloading_spec.config
        parallel = config.parallel
        apart: Any = None
        if not parallel.is_parallelism_agnostic:
            # The bytes of a chunk depend on how the model is cut.
            apart = [parallel.world_size, parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size, parallel.rank]
        if not hasattr(config, "kv_cache_layout"):
            # vLLM does not say how bytes lie in a chunk: another version may have another way.
            apart = [apart, vllm.__version__, os.environ.get("VLLM_KV_CACHE_LAYOUT")]
        return kv.fingerprint(
            layout="nvtier vllm 1",
            weights=given if given is not None else weights_digest(config.model.name),
            dtype=config.model.dtype,
            groups=[[group.tokens_per_block, list(group.layer_names), getattr(group, "group_id", None)] for group in config.groups],
            tokens_per_hash=config.cache.tokens_per_hash,
            blocks_per_chunk=config.cache.blocks_per_chunk,
            bytes_per_block=config.worker_kv_bytes_per_block,
            chunk=self._row,
            kv_layout=getattr(config, "kv_cache_layout", None),
            canonical=getattr(config, "canonical_layout", None),
            replicated=getattr(config, "replicated_layout", None),
            parallel=apart,
        )

    def _tenant(self, req_context: ReqContext) -> str:
        return str((req_context.kv_transfer_params or {}).get(self._tenant_key, ""))

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        there = self._tier.lookup(req_context.req_id, self._tenant(req_context), key)
        if there is None:
            return LookupResult.RETRY
        return LookupResult.HIT if there else LookupResult.MISS

    def submit_store(self, job_metadata: Any) -> None:
        self._submit(self._tier.store, job_metadata)

    def submit_load(self, job_metadata: Any) -> None:
        self._loads[job_metadata.job_id] = tuple(job_metadata.keys)
        self._submit(self._tier.load, job_metadata)

    def _submit(self, start: Any, job: Any) -> None:
        start(job.job_id, self._tenant(job.req_context), list(job.keys), (job.block_ids if _FEWER else job.chunk_ids).tolist())

    def get_finished_jobs(self) -> Iterable[JobResult]:
        if not self._open:
            return []
        trouble = self._tier.trouble()
        if trouble:
            logger.warning("nvtier tier: %s", trouble)
        return [self._result(*finished) for finished in self._tier.finished()]

    def _result(self, job: int, success: bool, good: List[bool], seconds: float, moved: int) -> JobResult:
        keys = self._loads.pop(job, None)
        if _FEWER:
            # What came is asked for again, alone.
            return JobResult(job_id=job, success=success)
        came: Optional[Collection[OffloadKey]] = None
        if keys is not None and not success:
            came = tuple(key for key, there in zip(keys, good) if there) or None
        return JobResult(job_id=job, success=success, successful_keys=came, transfer_time=seconds, transfer_bytes=moved)

    def has_pending_work(self) -> bool:
        return self._open and self._tier.is_busy()

    def on_request_finished(self, req_context: ReqContext) -> None:
        if self._open:
            self._tier.forget(req_context.req_id)

    def drain_jobs(self) -> None:
        if self._open:
            self._tier.drain()

    def shutdown(self) -> None:
        """Ends the threads and lets go of vLLM's memory; what was stored is durable."""
        if not self._open:
            return
        self._open = False
        self._tier.close()
        self._store.close()
        self._primary_kv_view = memoryview(b"")

    @classmethod
    def build_metric_definitions(cls, extra_config: Dict[str, Any]) -> Dict[str, Any]:
        metrics: Dict[str, Any] = {_metric(name): OffloadingCounterMetadata(documentation=text) for name, text in _COUNTERS.items()}
        metrics[_QUEUED] = OffloadingGaugeMetadata(documentation="Pieces of jobs that wait for a thread of the nvtier tier or are with one.")
        return metrics

    def get_stats(self) -> Optional[OffloadingConnectorStats]:
        if not self._open:
            return None
        now = self._tier.stat()
        stats = OffloadingConnectorStats()
        for name in _COUNTERS:
            more = now[name] - self._told.get(name, 0)
            if more:
                stats.increase_counter(_metric(name), more)
        if now["queued"] != self._told.get("queued"):
            stats.set_gauge(_QUEUED, now["queued"])
        self._told = now
        return stats
