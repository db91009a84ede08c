"""Hugging Face transformers: prompts whose keys and values were computed before come back from a pool.

::

    store = nvtier.kv.Store("/mnt/nvme/pool")
    cache = nvtier.transformers.PrefixCache(model, store, tokenizer, tenant="alice")
    tokens = cache.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=100)
    print(cache.last)                                # how many tokens were loaded, computed, saved

``generate`` restores the longest prefix that is stored, computes the rest, and saves what is new. A restore computes from the head while blocks
load from the tail, as far as that is faster than either alone (``plan="auto"``).

Blocks belong to a fingerprint of the model's weights as they are in memory, its configuration and attention, adapters, the tokenizer and its
chat template, and to a tenant; whatever differs in any of these never meets. What cannot be loaded is computed.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Dict, List, Optional, Tuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from . import _nvtier, kv
from ._attention import without_masks
from ._errors import InvalidArgument, NotSupported
from ._sizes import Size, size_of

__all__ = ["KvCache", "PrefixCache"]

#: Keys whose values make no difference to what is computed.
_NO_DIFFERENCE = ("_name_or_path", "transformers_version", "use_cache", "output_attentions", "output_hidden_states", "return_dict")
#: Bytes that are asked for at once at most. Each call takes half a millisecond besides, in which memory would give 25 MB.
_LOAD_BYTES = 256 << 20
#: Calls that load at once: a drive has the next one's blocks before the last one's are all there.
_LOADERS = 2
#: So many tokens behind a restored prefix are left to ``generate``, which computes the last token in any case: one pass over the weights less.
_TAIL = 256
#: Growth of a layer that is full.
_GROW = 1.5


class _Room:
    """Keys and values of a layer in memory with room behind them: a block has a place before its token comes."""

    _buffers: Optional[Tuple[torch.Tensor, torch.Tensor]] = None
    #: What ``keys`` was when it was last seen: who replaces it (beam search, crop) makes new buffers of it.
    _seen: Optional[torch.Tensor] = None
    #: Tokens in the buffers, and which token of the sequence is the first there.
    _held = 0
    _base = 0
    _reserve = 0

    def _make(self, key_states: torch.Tensor, value_states: torch.Tensor, tokens: int) -> None:
        old, held = self._buffers, self._held
        new = tuple(
            torch.empty((*like.shape[:2], tokens, like.shape[3]), dtype=like.dtype, device=like.device)
            for like in (key_states, value_states)
        )
        if old is not None and held:
            for to, source in zip(new, old):
                to[:, :, :held] = source[:, :, :held]
        self._buffers = new

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.keys is not self._seen:
            # Somebody put other tensors there.
            content = (self.keys, self.values) if self.keys is not None and self.keys.numel() else None
            self._buffers = None if content is None else content
            self._held = 0 if content is None else self.keys.shape[-2]
            total = self.get_seq_length() if content is not None else 0
            self._base = max(total - self._held, 0)
            if content is not None:
                self._make(key_states, value_states, max(int(self._held * _GROW), self._reserve, self._held + key_states.shape[-2]))
        need = self._held + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < need:
            self._make(key_states, value_states, max(int(need * _GROW), self._reserve))
        for buffer, states in zip(self._buffers, (key_states, value_states)):
            buffer[:, :, self._held : need] = states
        self._held = need

    def _show(self, start: int) -> None:
        self.keys, self.values = (buffer[:, :, start : self._held] for buffer in self._buffers)
        self._seen = self.keys


class _FullLayer(_Room, DynamicLayer):
    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states)
        self._show(0)
        return self.keys, self.values

    def set_length(self, tokens: int) -> None:
        self._held = tokens
        self._show(0)


class _SlidingLayer(_Room, DynamicSlidingWindowLayer):
    """Shows what the window wants and keeps all, so that blocks can be saved."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        replaced = self.keys is not self._seen
        shown = self.keys.shape[-2] if self.keys.numel() else 0
        self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        start = 0 if replaced else self._held - key_states.shape[-2] - shown
        full = tuple(buffer[:, :, start : self._held] for buffer in self._buffers)
        if self.record_past:
            self._show(start)
        else:
            self._show(max(self._held - self.sliding_window + 1, 0))
        return full

    def set_length(self, tokens: int) -> None:
        self._held = tokens
        self.cumulative_length = tokens
        self._show(max(tokens - self.sliding_window + 1, 0))


class KvCache(DynamicCache):
    """A ``DynamicCache`` whose layers keep all tokens of one sequence in place, with room for more."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        layers: List[Any] = []
        for layer in self.layers:
            if type(layer) is DynamicLayer:
                layers.append(_FullLayer())
            elif type(layer) is DynamicSlidingWindowLayer:
                layers.append(_SlidingLayer(layer.sliding_window))
            else:
                raise NotSupported(f"KV blocks of layers of type {type(layer).__name__}: full and sliding-window attention are supported")
        self.layers = layers

    def reserve(self, tokens: int, samples: List[Tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Takes room for so many tokens, of the shapes and types of ``samples``."""
        for layer, (key, value) in zip(self.layers, samples):
            layer.lazy_initialization(key, value)
            layer._reserve = tokens
            layer._make(key, value, tokens)
            layer.set_length(0)

    def set_length(self, tokens: int) -> None:
        """So many tokens are there, which somebody put into the buffers."""
        for layer in self.layers:
            layer.set_length(tokens)

    def whole(self) -> int:
        """Tokens that all layers have from the first on, of one sequence; 0 where a layer lost some."""
        fine = all(
            layer.is_initialized and layer._buffers is not None and layer.keys is layer._seen and layer._base == 0 and layer.keys.shape[0] == 1
            for layer in self.layers
        )
        return min(layer._held for layer in self.layers) if fine else 0

    def planes(self, block_tokens: int) -> kv.Planes:
        """Where blocks lie: layer by layer, K before V."""
        return kv.Planes([buffer for layer in self.layers for buffer in layer._buffers], block_tokens)


def _tokenizer_parts(tokenizer: Any) -> Dict[str, Any]:
    if tokenizer is None:
        return {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules: Any = backend.to_str()
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return {
        "rules": rules,
        "special": {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()},
        "template": getattr(tokenizer, "chat_template", None),
    }


def _adapter_parts(model: Any) -> Dict[str, Any]:
    """Adapters whose weights are among the model's; how strong they are is not."""
    configs = getattr(model, "peft_config", None) or {}
    scales = {
        name: {key: float(scale) for key, scale in module.scaling.items()}
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    states = {
        name: [getattr(module, "disable_adapters", False), list(getattr(module, "merged_adapters", []))]
        for name, module in model.named_modules()
        if name in scales
    }
    active = getattr(model, "active_adapters", None)
    if callable(active):
        active = active() if configs else None
    plain = {name: config.to_dict() if hasattr(config, "to_dict") else str(config) for name, config in configs.items()}
    return {"configs": plain, "scales": scales, "states": states, "active": str(active) if configs else None}


class PrefixCache:
    """Prefixes of one model in a store, for one tenant. One call at a time.

    ``block_tokens``: tokens of a block; only whole blocks are stored. ``plan``: ``"auto"`` computes from the head while blocks load from the
    tail, ``"load"`` and ``"compute"`` do one of both. ``chunk_tokens``: tokens that are computed at once at most. ``salt``: whatever else
    the prompts depend on. ``deadline``: seconds of a load or save, after which what is left is computed, or not saved. ``quota``: bytes that the
    tenant's blocks may have in all of the store, kept there (``"10GiB"``; 0: no limit); default: it stays as it is.
    """

    def __init__(
        self,
        model: Any,
        store: kv.Store,
        tokenizer: Any = None,
        *,
        tenant: str = "",
        block_tokens: int = 16,
        plan: str = "auto",
        chunk_tokens: int = 32768,
        salt: bytes = b"",
        deadline: Optional[float] = None,
        planner: Optional[kv.Planner] = None,
        quota: Optional[Size] = None,
    ) -> None:
        limit = size_of("quota", quota)
        if plan not in ("auto", "load", "compute"):
            raise InvalidArgument(f'plan={plan!r}: write "auto", "load" or "compute"')
        if block_tokens < 1 or chunk_tokens < block_tokens:
            raise InvalidArgument(f"block_tokens={block_tokens}, chunk_tokens={chunk_tokens}: 1 or more, and a chunk holds a block")
        self.model, self.store, self.tokenizer, self.tenant = model, store, tokenizer, tenant
        self.block_tokens, self.plan, self.chunk_tokens, self.salt, self.deadline = block_tokens, plan, chunk_tokens, bytes(salt), deadline
        #: What computing and loading cost; may be shared by caches of one model on one device.
        self.planner = planner or kv.Planner()
        #: How the last ``generate`` or ``prefill`` went: tokens and seconds.
        self.last: Dict[str, Any] = {}
        config = model.config.get_text_config(decoder=True)
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kinds = [rope.get("rope_type")] + [part.get("rope_type") for part in rope.values() if isinstance(part, dict)]
        for kind in kinds:
            if kind in ("dynamic", "longrope"):
                raise NotSupported(f"KV blocks of a model with {kind} positions: its keys depend on how long the sequence becomes")
        self._samples = self._probe()
        sample = KvCache(model.config)
        sample.reserve(block_tokens, self._samples)
        self._block_bytes = sample.planes(block_tokens).block_bytes
        self._weights: Optional[Tuple[Any, bytes]] = None
        self._space: Optional[kv.Namespace] = None
        self._tokenizer_parts = _tokenizer_parts(tokenizer)
        space = self.namespace()
        if limit is not None:
            space.set_quota(limit)

    def _probe(self) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """What keys and values of one token look like."""
        cache = KvCache(self.model.config)
        self._forward(cache, torch.zeros((1, 1), dtype=torch.long, device=self.model.device))
        if not all(layer.is_initialized for layer in cache.layers):
            raise NotSupported("KV blocks of a model whose layers share their keys and values")
        return [tuple(buffer[:, :, :1].clone() for buffer in layer._buffers) for layer in cache.layers]

    def _forward(self, cache: KvCache, tokens: torch.Tensor) -> None:
        if self.model.training:
            raise InvalidArgument("the model is in training mode: call model.eval() first")
        with torch.no_grad(), without_masks(self.model):
            self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def fingerprint(self) -> bytes:
        """Of everything but the tokens. Weights are read again when any of them was replaced or written to."""
        tensors = dict(self.model.named_parameters())
        tensors.update(self.model.named_buffers())
        seen = [(name, tensor.data_ptr(), tensor._version, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
        if self._weights is None or self._weights[0] != seen:
            self._weights = (seen, kv.digest_tensors(tensors))
        config = {key: value for key, value in self.model.config.to_dict().items() if key not in _NO_DIFFERENCE}
        return kv.fingerprint(
            layout="nvtier 1: plane, head, token",
            weights=self._weights[1],
            model=type(self.model).__name__,
            config=config,
            attention=getattr(self.model.config, "_attn_implementation", None),
            types=[str(key.dtype) for key, _ in self._samples],
            adapters=_adapter_parts(self.model),
            tokenizer=self._tokenizer_parts,
            block_tokens=self.block_tokens,
            salt=self.salt,
        )

    def refresh(self) -> None:
        """Has the weights read again at the next call: after they were written to in a way that torch does not count, as by ``weight.data.copy_``."""
        self._weights = None

    def namespace(self) -> kv.Namespace:
        """Where the blocks of the model as it is now are."""
        print_ = self.fingerprint()
        if self._space is None or self._space.fingerprint != print_:
            self._space = self.store.namespace(print_, self._block_bytes, self.tenant)
        return self._space

    def _keys(self, space: kv.Namespace, tokens: List[int]) -> List[bytes]:
        return kv.chain(space.fingerprint, tokens, self.block_tokens)

    def _restore(self, space: kv.Namespace, cache: KvCache, ids: torch.Tensor, keys: List[bytes]) -> Dict[str, Any]:
        """Brings the first blocks of ``keys`` into the cache; says what came how."""
        if self.plan == "compute" or not keys:
            return {"blocks": 0, "loaded": 0, "computed": 0, "steps": []}
        planes = cache.planes(self.block_tokens)
        restore = _nvtier.KvRestore(
            self.planner,
            space.in_memory(keys),
            block_tokens=self.block_tokens,
            block_bytes=self._block_bytes,
            compute=self.plan == "auto",
            load=True,
            chunk_tokens=self.chunk_tokens,
            load_blocks=max(_LOAD_BYTES // self._block_bytes, 1),
        )
        device = planes.device
        # What used this memory before has ended; from now on the loader need not wait for what computes.
        kv._finish_device(device)
        until = None if self.deadline is None else time.monotonic() + self.deadline
        news = threading.Condition()
        failure: List[BaseException] = []
        steps: List[Tuple[str, int, int, float, float]] = []
        origin = time.monotonic()

        def load() -> None:
            try:
                while not failure:
                    what, start, end = restore.next_load(time.monotonic())
                    if what != "blocks":
                        return
                    begun = time.monotonic()
                    left = None if until is None else max(until - begun, 0.0)
                    done = space._get(keys[start:end], planes, range(start, end), left)
                    over = time.monotonic()
                    restore.loaded(start, [one in kv.HITS for one in done], over)
                    steps.append(("load", start * self.block_tokens, end * self.block_tokens, begun - origin, over - begun))
                    with news:
                        news.notify_all()
            except BaseException as error:  # whatever it was, the caller's thread raises it
                failure.append(error)
            finally:
                with news:
                    loading.discard(threading.current_thread())
                    news.notify_all()

        loaders = [threading.Thread(target=load, name="nvtier-kv-load", daemon=True) for _ in range(_LOADERS)]
        loading = set(loaders)
        for loader in loaders:
            loader.start()
        try:
            while not failure:
                what, start, end = restore.next_compute(time.monotonic())
                if what == "done":
                    break
                if what == "wait":
                    with news:
                        if not loading:
                            # Nobody will bring the rest; ask once more, with nothing under way.
                            if restore.next_compute(time.monotonic())[0] == "wait":
                                break
                            continue
                        news.wait(0.05)
                    continue
                begun = time.monotonic()
                self._forward(cache, ids[:, start * self.block_tokens : end * self.block_tokens])
                kv._finish_device(device)
                spent = time.monotonic() - begun
                restore.computed(spent)
                steps.append(("compute", start * self.block_tokens, end * self.block_tokens, begun - origin, spent))
        finally:
            for loader in loaders:
                loader.join()
        if failure:
            raise failure[0]
        restored = restore.restored()
        restored["steps"] = sorted(steps, key=lambda step: step[3])
        cache.set_length(restored["blocks"] * self.block_tokens)
        return restored

    def prefill(self, input_ids: torch.Tensor, room: int = 0) -> KvCache:
        """A cache with all of ``input_ids`` (one sequence) but the last token: restored as far as it is stored, computed for the rest. ``room``:
        tokens that will come. Pass it to ``model.generate(input_ids, past_key_values=cache)``, and to ``save`` afterwards."""
        return self._prefill(input_ids, room, 0)

    def _prefill(self, input_ids: torch.Tensor, room: int, leave: int) -> KvCache:
        """``leave``: the last tokens are not computed if there are at most so many."""
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise NotSupported(f"a prompt of shape {tuple(input_ids.shape)}: one sequence at a time, [1, tokens], is supported")
        begun = time.monotonic()
        space = self.namespace()
        ids = input_ids.to(self.model.device)
        count = ids.shape[1]
        cache = KvCache(self.model.config)
        cache.reserve(-(-(count + room) // self.block_tokens) * self.block_tokens, self._samples)
        keys = self._keys(space, ids[0, : count - 1].tolist())
        stored = space.lookup(keys)
        prepared_by = time.monotonic()
        restored = self._restore(space, cache, ids, keys[:stored])
        at = restored["blocks"] * self.block_tokens
        restored_by = time.monotonic()
        first = at
        while at < count - 1 and count - 1 - first > leave:
            end = min(at + self.chunk_tokens, count - 1)
            since = time.monotonic()
            self._forward(cache, ids[:, at:end])
            kv._finish_device(kv._device(ids))
            self.planner.computed(at, end, time.monotonic() - since)
            at = end
        self.last = {
            "prompt_tokens": count,
            "stored_tokens": stored * self.block_tokens,
            "loaded_tokens": restored["loaded"] * self.block_tokens,
            "computed_tokens": restored["computed"] * self.block_tokens + (count - 1 - first),
            # Until it is known what is stored, and there is room for it: a part of the restore.
            "prepare_seconds": prepared_by - begun,
            "restore_seconds": restored_by - begun,
            # Of the restore: ("load" or "compute", first token, end, when it began, seconds).
            "steps": restored["steps"],
            "prefill_seconds": time.monotonic() - begun,
        }
        return cache

    def save(self, cache: KvCache, tokens: torch.Tensor) -> int:
        """Stores the whole blocks of a cache that are not stored yet; ``tokens``: the sequence that it is of, at least as many as it holds.
        Returns how many blocks are new. What the store refuses, or fails to write, is not saved: see ``namespace().trouble``."""
        space = self.namespace()
        held = min(cache.whole(), tokens.shape[-1])
        keys = self._keys(space, tokens.reshape(-1)[:held].tolist())
        if not keys:
            return 0
        done = space.put(keys, cache.planes(self.block_tokens), deadline=self.deadline)
        return done.count("new")

    def generate(self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None, **options: Any) -> Any:
        """As ``model.generate``, of one sequence of tokens. Inputs besides tokens (pictures, embeddings, padding) are refused: blocks are known by
        tokens alone."""
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise NotSupported("a prompt with padding or a mask: pass one sequence, without padding")
        if (kinds := options.pop("token_type_ids", None)) is not None and bool(kinds.any()):
            raise NotSupported("a prompt with token types: blocks are known by tokens alone")
        for name, value in options.items():
            if isinstance(value, torch.Tensor) or name in ("past_key_values", "inputs_embeds", "cache_implementation", "use_cache"):
                raise NotSupported(f"generate({name}=...) with a PrefixCache: blocks are known by tokens alone, and the cache is its own")
        new = options.get("max_new_tokens")
        limit = options.get("max_length")
        room = new if new is not None else (max(limit - input_ids.shape[1], 0) if limit is not None else 256)
        given, defaults = options.get("generation_config"), self.model.generation_config
        counts = [
            next((found for found in (options.get(name), getattr(given or defaults, name, None)) if found), 1)
            for name in ("num_beams", "num_return_sequences")
        ]
        several = max(counts) > 1
        cache = self._prefill(input_ids, room, 0 if several else _TAIL)
        # Several sequences share the prompt; afterwards it is not to be told from theirs.
        saved = self.save(cache, input_ids) if several else 0
        if several:
            cache.batch_repeat_interleave(max(counts))
        ids = input_ids.to(self.model.device)
        begun = time.monotonic()
        with without_masks(self.model):
            output = self.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        self.last["generate_seconds"] = time.monotonic() - begun
        tokens = output if isinstance(output, torch.Tensor) else output.sequences
        if not several:
            saved = self.save(cache, tokens[:1])
        self.last["saved_tokens"] = saved * self.block_tokens
        return output
