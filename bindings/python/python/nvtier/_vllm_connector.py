"""vLLM's KV connector to a pool; see ``nvtier.vllm``."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from . import _nvtier, kv
from ._errors import InvalidArgument, NotSupported
from ._vllm_layout import Layout, refuse
from ._vllm_names import Adapters, media_extras
from ._vllm_weights import weights_digest

logger = logging.getLogger(__name__)

#: Counters in vLLM's Prometheus output, by their names in ``KvTier.stat``.
COUNTERS = {
    "stored": "Blocks stored in the nvtier pool.",
    "present": "Blocks that were to be stored and were there.",
    "refused": "Blocks that were not stored by policy: admission, quota, write budget, room.",
    "store_failed": "Blocks that could not be stored.",
    "loaded": "Blocks loaded from the nvtier pool, checksums compared.",
    "lost": "Blocks that were gone when they were to be loaded.",
    "corrupt": "Blocks that were not as they were stored: dropped, and computed anew.",
    "load_failed": "Blocks that could not be loaded in time or at all.",
    "stored_bytes": "Bytes stored in the nvtier pool.",
    "loaded_bytes": "Bytes loaded from the nvtier pool.",
    "hits": "Blocks that were asked for and are there.",
    "misses": "Blocks that were asked for and are not there.",
}

#: Keys of ``kv_connector_extra_config`` and what they are where they are not given.
_DEFAULTS: Dict[str, Any] = {
    "pool": None,
    "store": "vllm",
    "budget": None,
    "fingerprint": None,
    "tenant_key": "tenant",
    "threads": 4,
    "deadline": 10.0,
    "ram": 256 << 20,
    "ttl": None,
    "write_bytes_per_day": None,
    "second_offer": None,
    "quotas": None,
    "tenant_quota": None,
}


def _options(given: Dict[str, Any]) -> Dict[str, Any]:
    unknown = sorted(set(given) - set(_DEFAULTS))
    if unknown:
        raise InvalidArgument(f"kv_connector_extra_config has {', '.join(unknown)}: nvtier knows {', '.join(_DEFAULTS)}")
    if not given.get("pool"):
        raise InvalidArgument('kv_connector_extra_config has no "pool": the path of a pool, see `nvtier format`')
    return {**_DEFAULTS, **given}


class _Shared:
    """A store of this process: scheduler and worker may both live here, and a pool has one owner."""

    _all: Dict[Tuple[str, str], "_Shared"] = {}

    def __init__(self, key: Tuple[str, str], options: Dict[str, Any]) -> None:
        self._key = key
        self.users = 0
        # What vLLM has on its device need not be in memory as well.
        self.store = kv.Store(
            options["pool"],
            options["store"],
            budget=options["budget"],
            ram=options["ram"],
            keep=False,
            ttl=options["ttl"],
            write_bytes_per_day=options["write_bytes_per_day"],
            second_offer=options["second_offer"],
            quotas=options["quotas"],
            tenant_quota=options["tenant_quota"],
            deadline=options["deadline"],
        )

    @classmethod
    def take(cls, options: Dict[str, Any]) -> "_Shared":
        key = (os.path.realpath(options["pool"]), options["store"])
        shared = cls._all.get(key)
        if shared is None:
            shared = cls._all[key] = _Shared(key, options)
        shared.users += 1
        return shared

    def give_back(self) -> None:
        self.users -= 1
        if self.users == 0:
            del self._all[self._key]
            self.store.close()


class NvtierStats(KVConnectorStats):
    """Counts since the last ones."""

    def reset(self) -> None:
        self.data: Dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, more in other.data.items():
            self.data[name] = self.data.get(name, 0) + more
        return self

    def reduce(self) -> Dict[str, Any]:
        return {name: count for name, count in self.data.items() if count}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class NvtierPromMetrics(KVConnectorPromMetrics):
    """The counts in vLLM's Prometheus output."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: List[str], per_engine_labelvalues: Dict[int, List[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: Dict[Tuple[int, str], Any] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:nvtier_connector_{name}", documentation=text, labelnames=labelnames)
            for engine, values in per_engine_labelvalues.items():
                self._counters[engine, name] = counter.labels(*values)

    def observe(self, transfer_stats_data: Dict[str, Any], engine_idx: int = 0) -> None:
        for name, more in transfer_stats_data.items():
            self._counters[engine_idx, name].inc(more)


@dataclass
class _Transfer:
    """Blocks of a request that are to be loaded or stored."""

    request: str
    tenant: str
    keys: List[bytes]
    blocks: List[int]


@dataclass
class NvtierMetadata(KVConnectorMetadata):
    """What the workers are to do in a step."""

    fingerprint: bytes = b""
    loads: List[_Transfer] = field(default_factory=list)
    stores: List[_Transfer] = field(default_factory=list)
    preempted: Set[str] = field(default_factory=set)


@dataclass
class NvtierHandshake(KVConnectorHandshakeMetadata):
    """How a worker's blocks lie in its memory."""

    layout: bytes
    block_bytes: int


class NvtierConnector(KVConnectorBase_V1):
    """Blocks of prompts between vLLM's device and a KV store of a pool. Threads of the binding move them; the scheduler and the workers do not
    wait for a drive, but for a request that is preempted."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._options = _options(dict(self._kv_transfer_config.kv_connector_extra_config or {}))
        refuse(vllm_config, kv_cache_config)
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            # What cannot be loaded is a miss. vLLM reads this after it made the scheduler's connector.
            logger.info("nvtier: kv_load_failure_policy is recompute")
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self._inner: Any = _Scheduler(self) if role is KVConnectorRole.SCHEDULER else _Worker(self)

    # Of the worker.

    def register_kv_caches(self, kv_caches: Dict[str, torch.Tensor]) -> None:
        self._inner.register(kv_caches)

    def get_handshake_metadata(self) -> Optional[KVConnectorHandshakeMetadata]:
        return self._inner.handshake()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._inner.preempted(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._inner.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests are scheduled when their blocks are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored whole, after the step."""

    def wait_for_save(self) -> None:
        """Begins to store: vLLM keeps the blocks until ``get_finished`` says that they are stored."""
        self._inner.store(self._get_connector_metadata())

    def get_finished(self, finished_req_ids: Set[str]) -> Tuple[Optional[Set[str]], Optional[Set[str]]]:
        return self._inner.finished(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> Set[int]:
        return self._inner.bad_blocks()

    # Of both.

    def get_kv_connector_stats(self) -> Optional[KVConnectorStats]:
        return self._inner.stats()

    def shutdown(self) -> None:
        """Ends the threads; what was stored is durable."""
        self._inner.close()

    @classmethod
    def build_kv_connector_stats(cls, data: Optional[Dict[str, Any]] = None) -> Optional[KVConnectorStats]:
        return NvtierStats(data=data) if data is not None else NvtierStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: List[str], per_engine_labelvalues: Dict[int, List[object]]
    ) -> Optional[KVConnectorPromMetrics]:
        return NvtierPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Of the scheduler.

    def set_xfer_handshake_metadata(self, metadata: Dict[int, KVConnectorHandshakeMetadata]) -> None:
        self._inner.meet(metadata)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Tuple[Optional[int], bool]:
        return self._inner.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._inner.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._inner.metadata(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._inner.update(connector_output)

    def reset_cache(self) -> Optional[bool]:
        return self._inner.reset()

    def request_finished(self, request: Any, block_ids: List[int]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        return self._inner.over(request.request_id), None


class _Counted:
    """A tier whose counts are told once."""

    def __init__(self) -> None:
        self.tier: Optional[_nvtier.KvTier] = None
        self._told: Dict[str, Any] = {}
        #: Whether the step computes something. What is told of others is lost where vLLM's engine is called step by step.
        self.computes = False

    def stats(self) -> Optional[NvtierStats]:
        if self.tier is None or not self.computes:
            return None
        trouble = self.tier.trouble()
        if trouble:
            logger.warning("nvtier connector: %s", trouble)
        now = self.tier.stat()
        more = {name: now[name] - self._told.get(name, 0) for name in COUNTERS if now[name] != self._told.get(name, 0)}
        self._told = now
        return NvtierStats(data=more) if more else None


class _Request:
    """What the scheduler knows of a request."""

    def __init__(self, tenant: str, keys: List[bytes]) -> None:
        self.tenant = tenant
        #: Of each whole block of the prompt.
        self.keys = keys
        self.blocks: List[int] = []
        #: Blocks from the first on that the device had when it was asked for more.
        self.local = 0
        #: Blocks from the first on that were handed over to be stored.
        self.stored = 0
        #: Whether the workers have something to tell of its stores when it is over.
        self.storing = False
        #: Blocks that are on their way.
        self.loading: Set[int] = set()
        #: Something could not be loaded: the rest is computed.
        self.failed = False


class _Scheduler(_Counted):
    def __init__(self, connector: NvtierConnector) -> None:
        super().__init__()
        config = connector._vllm_config
        self._options = connector._options
        self._ranks = config.parallel_config.tensor_parallel_size
        transfer = config.kv_transfer_config
        self._loads_any, self._stores_any = transfer.is_kv_consumer, transfer.is_kv_producer
        spec = connector._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self._block_tokens = spec.block_size
        self._model = _model_parts(config, self._options["fingerprint"])
        self._adapters = Adapters(getattr(config, "lora_config", None), float(self._options["deadline"]))
        self._print = b""
        self._block_bytes = 0
        self._requests: Dict[str, _Request] = {}
        self._loads: List[_Transfer] = []
        self._shared: Optional[_Shared] = _Shared.take(self._options)

    def meet(self, metadata: Dict[int, KVConnectorHandshakeMetadata]) -> None:
        met = {(told.layout, told.block_bytes) for told in metadata.values() if isinstance(told, NvtierHandshake)}
        if len(met) != 1 or len(metadata) != self._ranks:
            raise NotSupported(f"blocks of {len(metadata)} workers, of {self._ranks}, lie in {len(met)} different ways: one way is supported")
        layout, self._block_bytes = met.pop()
        self._ask(
            kv.fingerprint(
                layout="nvtier vllm connector 1", model=self._model, ranks=self._ranks, block_tokens=self._block_tokens, blocks=layout
            )
        )

    def _ask(self, fingerprint: bytes) -> None:
        """Asks for blocks of a fingerprint from now on."""
        if self._shared is None:
            return
        self._print = fingerprint
        self.tier = self._tier(self._shared, fingerprint)
        self._told = {}

    def _tier(self, shared: _Shared, fingerprint: bytes) -> _nvtier.KvTier:
        size = self._block_bytes
        shape = (1, size, 1, size, 1, size, size)
        return _nvtier.KvTier(shared.store._inner, None, "cpu", [], shape, size, fingerprint, 0, float(self._options["deadline"]))

    def reset(self) -> Optional[bool]:
        """The weights may be other ones from now on. What they are is not known: blocks of this engine meet no others."""
        if self.tier is None or self._loads or any(known.loading for known in self._requests.values()):
            return False
        old, self.tier, shared = self.tier, None, self._shared
        fingerprint = self._print = kv.fingerprint(layout="nvtier vllm connector, after a reset", before=self._print, random=os.urandom(16))

        def again() -> None:
            # The pool may be another process's, which may hang. Until this is through nothing is found.
            old.close()
            if shared is None or shared is not self._shared:
                return
            try:
                tier = self._tier(shared, fingerprint)
            except Exception as error:
                logger.warning("nvtier connector: nothing is found any more, the pool cannot be asked: %s", error)
                return
            if self._shared is shared and self._print == fingerprint:
                self._told, self.tier = {}, tier
            else:
                tier.close()

        threading.Thread(target=again, name="nvtier-reset", daemon=True).start()
        # Their names are of the old ones.
        for known in self._requests.values():
            known.keys, known.stored = [], 0
        return True

    def _known(self, request: Any) -> Tuple[bool, Optional[_Request]]:
        """Whether it is known what the request's blocks are called, and the request; None: they have no names."""
        known = self._requests.get(request.request_id)
        if known is not None:
            return True, known
        if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
            return True, None
        apart: Dict[str, Any] = {}
        if request.lora_request is not None:
            ready, adapter = self._adapters.digest(request.request_id, request.lora_request)
            if adapter is None:
                if ready:
                    # Nobody asks again, and nothing of it is stored.
                    self._requests[request.request_id] = _Request("", [])
                return ready, None
            apart["adapter"] = adapter
        # The digest of vLLM's own hashes is another one in each process.
        seed = kv.fingerprint(layout=self._print, salt=request.cache_salt, **apart)
        extras = media_extras(request.mm_features, len(request.prompt_token_ids), self._block_tokens)
        keys = kv.chain(seed, request.prompt_token_ids, self._block_tokens, extras)
        params = request.kv_transfer_params or {}
        known = self._requests[request.request_id] = _Request(str(params.get(self._options["tenant_key"], "")), keys)
        return True, known

    def _of_ranks(self, keys: Sequence[bytes]) -> List[bytes]:
        """The keys of blocks of all ranks."""
        return [_of_rank(key, rank) for key in keys for rank in range(self._ranks)]

    def matched(self, request: Any, computed: int) -> Tuple[Optional[int], bool]:
        ready, known = self._known(request)
        if not ready:
            return None, False
        if self.tier is None or known is None or known.failed or not self._loads_any or computed % self._block_tokens:
            return 0, False
        if getattr(request, "skip_reading_prefix_cache", False):
            # Something is wanted of every token of the prompt, such as its probability.
            return 0, False
        known.local = computed // self._block_tokens
        # The last token has to be computed.
        most = (request.num_prompt_tokens - 1) // self._block_tokens
        wanted = known.keys[known.local : most]
        if not wanted:
            return 0, False
        there = self.tier.prefix(request.request_id, known.tenant, self._of_ranks(wanted))
        if there is None:
            return None, False
        tokens = there // self._ranks * self._block_tokens
        return tokens, tokens > 0

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        known = self._requests.get(request.request_id)
        if known is None or self.tier is None:
            return
        # What was answered is over: who asks again, after a preemption, is answered anew.
        self.tier.forget(request.request_id)
        known.blocks = list(blocks.get_block_ids()[0])
        if external:
            first, last = known.local, known.local + external // self._block_tokens
            transfer = _Transfer(request.request_id, known.tenant, known.keys[first:last], known.blocks[first:last])
            known.loading = set(transfer.blocks)
            self._loads.append(transfer)

    def metadata(self, output: Any) -> NvtierMetadata:
        self.computes = output.total_num_scheduled_tokens > 0
        meta = NvtierMetadata(fingerprint=self._print, preempted=set(output.preempted_req_ids or ()))
        for request in meta.preempted:
            if request in self._requests:
                self._requests[request].stored, self._requests[request].storing = 0, False
        meta.loads, self._loads = self._loads, []
        for new in output.scheduled_new_reqs:
            self._store(meta, new.req_id, list(new.block_ids[0]), True, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for index, request in enumerate(cached.req_ids):
            more = cached.new_block_ids[index]
            resumed = request in cached.resumed_req_ids
            self._store(meta, request, list(more[0]) if more else [], resumed, cached.num_computed_tokens[index], output)
        return meta

    def _store(self, meta: NvtierMetadata, request: str, blocks: List[int], whole: bool, computed: int, output: Any) -> None:
        known = self._requests.get(request)
        if known is None or known.stored == len(known.keys) or not self._stores_any:
            return
        known.blocks = blocks if whole else known.blocks + blocks
        full = min((computed + output.num_scheduled_tokens[request]) // self._block_tokens, len(known.keys), len(known.blocks))
        if full > known.stored:
            part = slice(known.stored, full)
            meta.stores.append(_Transfer(request, known.tenant, known.keys[part], known.blocks[part]))
            known.stored, known.storing = full, True

    def update(self, output: Any) -> None:
        bad = output.invalid_block_ids or set()
        for known in self._requests.values() if bad else ():
            known.failed |= not known.loading.isdisjoint(bad)
        for request in output.finished_recving or ():
            if request in self._requests:
                self._requests[request].loading = set()

    def over(self, request: str) -> bool:
        """A request is over. Whether its blocks are still being stored."""
        if self.tier is not None:
            self.tier.forget(request)
        self._adapters.forget(request)
        known = self._requests.pop(request, None)
        # Those of a request that waits for a load are kept until it is through, and it has stored nothing.
        return known is not None and known.storing and not known.loading

    def close(self) -> None:
        if self._shared is not None:
            if self.tier is not None:
                self.tier.close()
            self.tier = None
            self._adapters.close()
            self._shared.give_back()
            self._shared = None


class _Worker(_Counted):
    def __init__(self, connector: NvtierConnector) -> None:
        super().__init__()
        self._options = connector._options
        parallel = connector._vllm_config.parallel_config
        self._rank = parallel.rank % parallel.tensor_parallel_size
        self._blocks = connector._kv_cache_config.num_blocks
        self._layout: Optional[Layout] = None
        self._shared: Optional[_Shared] = None
        self._print = b""
        self._next = 0
        #: Jobs on their way: of whom, and of loads their blocks.
        self._jobs: Dict[int, Tuple[str, Optional[List[int]]]] = {}
        #: By request that stored something: jobs that are not through.
        self._storing: Dict[str, int] = {}
        #: Requests that are over and whose blocks are to be given back when they are stored.
        self._over: Set[str] = set()
        self._bad: Set[int] = set()
        #: Requests whose loads are through, whatever came of them.
        self._came: Set[str] = set()
        #: What is to be stored when the device is done with a step.
        self._waiting: List[Tuple[Any, List[_Transfer]]] = []

    def register(self, caches: Dict[str, torch.Tensor]) -> None:
        self._layout = Layout(caches, self._blocks)
        logger.info("nvtier: %s", self._layout.describe())
        # Before the scheduler does: where it is another process, who moves the blocks is to own the pool, and who asks is to be its guest.
        self._shared = _Shared.take(self._options)

    def handshake(self) -> NvtierHandshake:
        if self._layout is None:
            raise NotSupported("vLLM registered no KV caches: nvtier does not fit this vLLM")
        return NvtierHandshake(self._layout.digest, self._layout.block_bytes)

    def _begin(self, fingerprint: bytes) -> None:
        if fingerprint == self._print or self._layout is None or self._shared is None:
            return
        if self.tier is not None:
            # After a reset.
            self._flush(True)
            self.tier.drain()
            self._reap()
            self.tier.close()
        layout, self._print, self._told = self._layout, fingerprint, {}
        self.tier = _nvtier.KvTier(
            self._shared.store._inner,
            layout.keep,
            layout.device,
            layout.planes,
            layout.shape,
            layout.block_bytes,
            fingerprint,
            self._options["threads"],
            float(self._options["deadline"]),
        )

    def _submit(self, start: Any, transfer: _Transfer, blocks: Optional[List[int]]) -> None:
        self._next += 1
        self._jobs[self._next] = (transfer.request, blocks)
        start(self._next, transfer.tenant, [_of_rank(key, self._rank) for key in transfer.keys], transfer.blocks)

    def load(self, meta: NvtierMetadata) -> None:
        # Nothing is waited for on the device. vLLM gives a block to a load when no step that still runs can write to it (its scheduler defers
        # frees for that), and a load is told when its bytes are there, before the step that reads them is begun.
        self._begin(meta.fingerprint)
        self.computes = False
        for transfer in meta.loads:
            if self.tier is None:
                raise NotSupported("a load before vLLM registered its KV caches: nvtier does not fit this vLLM")
            self._submit(self.tier.load, transfer, transfer.blocks)

    def store(self, meta: NvtierMetadata) -> None:
        self.computes = True
        if not meta.stores or self.tier is None or self._layout is None:
            return
        for transfer in meta.stores:
            self._storing[transfer.request] = self._storing.get(transfer.request, 0) + 1
        event = None
        if self._layout.device != "cpu":
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((event, meta.stores))
        self._flush(False)

    def _flush(self, wait: bool) -> None:
        """Begins to store what the device has computed."""
        while self._waiting and self.tier is not None:
            event, stores = self._waiting[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._waiting.pop(0)
            for transfer in stores:
                self._submit(self.tier.store, transfer, None)

    def preempted(self, meta: NvtierMetadata) -> None:
        """Blocks of these requests are about to be somebody else's."""
        mine = [request for request in meta.preempted if request in self._storing]
        if mine and self.tier is not None:
            self._flush(True)
            self.tier.drain()
            self._reap()
            for request in mine:
                del self._storing[request]

    def _reap(self) -> None:
        """Takes note of jobs that are over."""
        for job, success, good, _, _ in self.tier.finished() if self.tier is not None else ():
            request, blocks = self._jobs.pop(job)
            if blocks is None:
                self._storing[request] -= 1
                continue
            self._came.add(request)
            if not success:
                self._bad.update(block for block, there in zip(blocks, good) if not there)

    def finished(self, over: Set[str]) -> Tuple[Optional[Set[str]], Optional[Set[str]]]:
        self._flush(False)
        self._reap()
        self._over.update(request for request in over if request in self._storing)
        stored = {request for request in self._over if self._storing[request] == 0}
        for request in stored:
            self._over.discard(request)
            del self._storing[request]
        came, self._came = self._came, set()
        return stored or None, came or None

    def bad_blocks(self) -> Set[int]:
        bad, self._bad = self._bad, set()
        return bad

    def close(self) -> None:
        if self._shared is None:
            return
        if self.tier is not None:
            self._flush(True)
            self.tier.drain()
            self.tier.close()
            self.tier = None
        self._shared.give_back()
        self._shared = None
        self._layout = None


def _of_rank(key: bytes, rank: int) -> bytes:
    return key + rank.to_bytes(4, "little")


def _model_parts(config: Any, fingerprint: Optional[str]) -> Dict[str, Any]:
    """What keys and values depend on besides tokens and layout."""
    model, cache = config.model_config, config.cache_config
    described = {key: value for key, value in model.hf_config.to_dict().items() if not key.startswith("_") and key != "transformers_version"}
    return {
        "weights": fingerprint if fingerprint is not None else weights_digest(model.model, model.revision),
        "config": described,
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
    }
