"""``nvtier.stream.Cache``: keys and values of a context that is larger than the device's memory.

A layer has segments (``_segments.py``) and, on the device, a tail: tokens that are not a whole chunk yet. What is full is written once; nothing that was written is
written again. When the layer is used, attention gets one tensor of all its keys and one of all its values, made as ``DynamicCache`` would have made them.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ._errors import InvalidArgument, NotSupported, OutOfDeviceMemory
from ._nvtier import Pool
from ._segments import SEGMENT_BYTES, Tier
from ._sizes import size_of
from .train._offload import _pool_of

#: Bytes of a chunk at most; and the part of the device's budget that tails of all layers have at most.
_CHUNK_BYTES = 1 << 20
_TAILS = 8


class _Rows:
    """What a token's row is made of: keys of all sequences and heads, then values."""

    def __init__(self, sequences: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.sequences = sequences
        self.heads = ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        self.parts = [sequences * heads * length for heads, length in self.heads]
        self.width = sum(self.parts)

    def views(self, rows: torch.Tensor) -> List[torch.Tensor]:
        """Of rows, the keys and the values: sequence, head, token, element."""
        first, found = 0, []
        for (heads, length), part in zip(self.heads, self.parts):
            view = rows[:, first : first + part].view(rows.shape[0], self.sequences, heads, length)
            found.append(view.permute(1, 2, 0, 3))
            first += part
        return found

    def of(self, sequences: int) -> _Rows:
        """The same of another number of sequences."""
        other = _Rows.__new__(_Rows)
        other.sequences, other.heads = sequences, self.heads
        other.parts = [sequences * heads * length for heads, length in self.heads]
        other.width = sum(other.parts)
        return other


class _Tokens:
    """What both kinds of layers have."""

    dtype: torch.dtype
    device: torch.device
    is_initialized: bool

    def __init__(self, tier: Tier, number: int, chunk_tokens: Optional[int], windows: List[Optional[int]]) -> None:
        #: ``windows``: tokens that each layer of the cache keeps at most.
        self._tier, self._number, self._windows = tier, number, windows
        self._chunk, self._chosen = chunk_tokens or 0, chunk_tokens is not None
        self._segments = tier.lists[number]
        #: Bytes of the largest segment so far.
        self._largest = 0
        self._rows: Any = None
        self._tail: Any = None
        self._tail_tokens = 0
        #: Tokens that are seen, and those of the first segment that are not any more.
        self._length = self._skip = 0

    # Shapes

    def _begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """The first tokens: what they look like is known."""
        self.dtype, self.device = key.dtype, key.device
        self._rows = _Rows(key.shape[0], key, value)
        tier, row = self._tier, self._rows.width * self.dtype.itemsize
        tier.device = self.device
        if not self._chunk:
            most = _CHUNK_BYTES if tier.vram is None else min(_CHUNK_BYTES, tier.vram // _TAILS // len(tier.lists))
            self._chunk = 1 << max(most // row, 1).bit_length() - 1
        if not any(tier.lists):
            tier.block_bytes = min(tier.block_bytes, self._chunk * row)
            tier.share_ram(self._windows, row, self._per_segment())

    def _new_tail(self) -> torch.Tensor:
        bytes = self._chunk * self._rows.width * self.dtype.itemsize
        self._tier.make_room(bytes)
        self._tier.count(bytes)
        self._tier.tails += bytes
        return torch.empty((self._chunk, self._rows.width), dtype=self.dtype, device=self.device)

    def _drop_tail(self, tail: torch.Tensor) -> None:
        bytes = tail.numel() * tail.element_size()
        self._tier.count(-bytes)
        self._tier.tails -= bytes

    def _check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise InvalidArgument("nvtier.stream.Cache is for inference: call the model under torch.no_grad()")
        if key.dtype != value.dtype or key.device != value.device or key.dim() != 4 or value.dim() != 4:
            raise NotSupported(f"nvtier.stream.Cache: keys {key.dtype} {tuple(key.shape)} and values {value.dtype} {tuple(value.shape)}")
        if self._tier.device not in (None, key.device):
            raise NotSupported(f"nvtier.stream.Cache for a model on several devices: layers before are on {self._tier.device}, this one is on {key.device}")
        if self._rows is not None:
            wanted = (self._rows.sequences, self._rows.heads[0], self.dtype, self.device)
            found = (key.shape[0], (key.shape[1], key.shape[3]), key.dtype, key.device)
            if found != wanted:
                raise InvalidArgument(f"this cache holds sequences, heads, type and device {wanted}, and was given {found}")

    def _check_room(self, new: int) -> int:
        """Bytes that attention will be shown. Refuses what cannot be on the device together."""
        tier, row, layers = self._tier, self._rows.width * self.dtype.itemsize, len(self._tier.lists)
        shown, chunk = (self._length + new) * row, self._chunk * row
        if tier.vram is None:
            return shown
        tails = max(tier.tails, chunk * layers)
        if tails + shown + max(self._largest, chunk) > tier.vram:

            def enough(shown: int) -> int:
                # Chunks and segments are larger where there is more: see _begin and _per_segment.
                return (shown + tails + chunk) * 16 // 15 + 1 if self._chosen else (shown + (layers + 1) * row) * 4 // 3 + 1

            raise OutOfDeviceMemory(
                f"vram={tier.vram} bytes: {self._length + new} tokens of one layer take {shown}; with the tails of {layers} layers and a segment that comes or "
                f"goes {enough(shown)} are enough, and {enough(2 * shown)} to fetch one layer while another one computes"
            )
        return shown

    def _per_segment(self) -> int:
        """Tokens of a segment at most."""
        bytes = self._chunk * self._rows.width * self.dtype.itemsize
        vram = self._tier.vram
        most = SEGMENT_BYTES if vram is None else min(SEGMENT_BYTES, vram // 16, vram - self._tier.tails - self._tier.largest)
        return max(most // bytes, 1) * self._chunk

    # Content

    def _use(self, key: torch.Tensor, value: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """All tokens that are seen, and new ones behind, each in one tensor."""
        if self._rows is None:
            self._begin(key, value)
        tier, new = self._tier, key.shape[2]
        shown = self._check_room(new)
        if self._tail is None:
            self._tail = self._new_tail()
        row = self._rows.width * self.dtype.itemsize
        tier.begin(self._number, shown, max(new, self._chunk) * row)
        total = self._length + new
        whole = [
            torch.empty((*states.shape[:2], total, states.shape[3]), dtype=self.dtype, device=self.device) for states in (key, value)
        ]
        at, skip = 0, self._skip
        for segment, memory in tier.bring(list(self._segments)):
            rows = self._rows.of(memory.shape[1] * self._rows.sequences // self._rows.width)
            count = segment.tokens - skip
            for to, states in zip(whole, rows.views(memory[skip : segment.tokens])):
                to[:, :, at : at + count].copy_(states if segment.index is None else states.index_select(0, segment.index))
            at, skip = at + count, 0
        for to, tail, states in zip(whole, self._rows.views(self._tail[skip : self._tail_tokens]), (key, value)):
            to[:, :, at : self._length].copy_(tail)
            to[:, :, self._length :].copy_(states)
        return whole[0], whole[1]

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        count, at = key.shape[2], 0
        whole = (self._tail_tokens + count) // self._chunk * self._chunk
        while whole > 0:
            tokens = min(whole, self._per_segment())
            memory = self._tier.empty(self._number, (tokens, self._rows.width), self.dtype, self.device)
            before, self._tail_tokens = self._tail_tokens, 0
            memory[:before].copy_(self._tail[:before])
            self._pack(memory[before:], key, value, at)
            at += tokens - before
            whole -= tokens
            self._largest = max(self._largest, memory.numel() * memory.element_size())
            self._tier.add(self._number, memory)
        if at < count:
            self._pack(self._tail[self._tail_tokens : self._tail_tokens + count - at], key, value, at)
            self._tail_tokens += count - at
        self._length += count

    def _pack(self, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: int) -> None:
        for to, states in zip(self._rows.views(rows), (key, value)):
            to.copy_(states[:, :, at : at + rows.shape[0]])

    def _drop_first(self, count: int) -> None:
        """Tokens that are not seen any more."""
        self._length -= count
        self._skip += count
        while self._segments and self._skip >= self._segments[0].tokens:
            self._skip -= self._segments[0].tokens
            self._tier.remove(self._segments[0])
        if not self._segments and self._skip:
            left = self._tail[self._skip : self._tail_tokens].clone()
            self._tail_tokens, self._skip = left.shape[0], 0
            self._tail[: self._tail_tokens].copy_(left)

    def _drop_last(self, count: int) -> None:
        """Tokens that were not to be there."""
        count = min(count, self._length)
        self._length -= count
        in_tail = min(count, self._tail_tokens)
        self._tail_tokens -= in_tail
        count -= in_tail
        while count:
            last = self._segments[-1]
            some = min(count, last.tokens)
            last.tokens -= some
            count -= some
            if last.tokens <= (self._skip if len(self._segments) == 1 else 0):
                self._tier.remove(last)
        if not self._length:
            self._clear()

    def _clear(self) -> None:
        while self._segments:
            self._tier.remove(self._segments[-1])
        self._length = self._skip = self._tail_tokens = self._largest = 0

    def select(self, index: torch.Tensor, made: Dict[Any, torch.Tensor]) -> None:
        """Which sequences go on, in which order. What is stored stays as it is; ``made``: orders of orders, which segments share."""
        if not self._length:
            return
        for segment in self._segments:
            key = id(segment.index)
            if key not in made:
                made[key] = index if segment.index is None else segment.index[index]
                # So that no other one gets its id.
                made[key, "old"] = segment.index  # type: ignore[assignment]
            segment.index = made[key]
        before, tail = self._rows, self._tail
        self._rows = before.of(index.shape[0])
        self._tail = self._new_tail()
        for to, states in zip(self._rows.views(self._tail[: self._tail_tokens]), before.views(tail[: self._tail_tokens])):
            to.copy_(states.index_select(0, index))
        self._drop_tail(tail)

    # As transformers calls them.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        self._tier.check()
        self._check(key_states, value_states)
        with self._tier.guard(), _plain():
            self.is_initialized = True
            whole = self._use(key_states, value_states)
            self._keep(key_states, value_states)
            self._tier.ahead()
        return whole

    def _keep(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """New tokens, which attention was shown: what stays of all of them."""
        self._append(key, value)

    def offload(self) -> None:
        """It is where it is."""

    def prefetch(self) -> None:
        """It comes when it is time."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._tier.check()
        with self._tier.guard(), _plain():
            self.select(beam_idx.to(self._tier.device), {})

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._length:
            self.reorder_cache(torch.arange(self._rows.sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self._length:
            self.reorder_cache(torch.arange(self._rows.sequences, device=indices.device)[indices])

    def reset(self) -> None:
        """No tokens."""
        self._tier.check()
        with self._tier.guard(), _plain():
            self._clear()
            if self._tail is not None:
                self._drop_tail(self._tail)
            # Other sequences may come, and other numbers of them.
            self._tail = self._rows = None
            self._tier.largest = 0
            if hasattr(self, "cumulative_length"):
                self.cumulative_length = 0


class _FullLayer(_Tokens, DynamicLayer):
    def __init__(self, tier: Tier, number: int, chunk_tokens: Optional[int], windows: List[Optional[int]]) -> None:
        DynamicLayer.__init__(self)
        _Tokens.__init__(self, tier, number, chunk_tokens, windows)

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        self._tier.check()
        # It may be a tensor.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            # As it was meant once: the tokens that stay.
            tokens_to_remove = max(self._length - tokens_to_remove, 0)
        with self._tier.guard(), _plain():
            self._drop_last(abs(tokens_to_remove))


class _SlidingLayer(_Tokens, DynamicSlidingWindowLayer):
    def __init__(self, tier: Tier, number: int, chunk_tokens: Optional[int], windows: List[Optional[int]]) -> None:
        window = windows[number]
        assert window is not None
        DynamicSlidingWindowLayer.__init__(self, window)
        _Tokens.__init__(self, tier, number, chunk_tokens, windows)

    def _keep(self, key: torch.Tensor, value: torch.Tensor) -> None:
        new, keep = key.shape[2], self.sliding_window - 1
        self.cumulative_length += new
        out = 0 if self.record_past else self._length + new - keep
        if out >= self._length and out > 0:
            self._clear()
            self._append(key[:, :, max(new - keep, 0) :], value[:, :, max(new - keep, 0) :])
        else:
            if out > 0:
                self._drop_first(out)
            self._append(key, value)

    def crop(self, tokens_to_remove: int) -> None:
        self._tier.check()
        # It may be a tensor.
        tokens_to_remove = int(tokens_to_remove)
        if self.cumulative_length < self.sliding_window:
            if tokens_to_remove > 0:
                tokens_to_remove = max(self._length - tokens_to_remove, 0)
        elif not self.record_past:
            raise RuntimeError(
                "`crop` was called, but the current layer does not track past states, and the sliding window size was already reached. Call "
                "`activate_past_recording` before `crop` to be able to rollback the cache."
            )
        elif tokens_to_remove > 0:
            raise RuntimeError("once the window is full, a layer with one is only cropped by a negative number, of the tokens to remove")
        with self._tier.guard(), _plain():
            count = min(abs(tokens_to_remove), self._length)
            self._drop_last(count)
            self.cumulative_length -= count
            if self.cumulative_length + count >= self.sliding_window and self._length > self.sliding_window - 1:
                self._drop_first(self._length - self.sliding_window + 1)


class Cache(DynamicCache):
    """Keys and values for ``generate(past_key_values=...)``, on the device, in the host's memory and in a pool; the numbers are those of ``DynamicCache``.

    ``vram``: bytes on the device at a time, for tokens and for what attention is shown of the layer that is used; None: no limit. ``ram``: bytes of pinned host memory that
    are used before the pool. ``room``: bytes of the pool at most; None: nine tenths of what is free. All are hard. ``pool``: a pool, its path, or where it is mounted; None:
    the one that the model's weights are in. ``chunk_tokens``: tokens of a layer that are collected on the device before they can leave it; None: about 1 MiB.

    One call at a time. ``close()``, or a ``with`` block, gives all of it back; so does dropping it, and what a killed process has left goes with the next cache on the pool.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        vram: Union[None, int, str],
        ram: Union[int, str] = 0,
        room: Union[None, int, str] = None,
        pool: Union[None, str, "os.PathLike[str]", Pool] = None,
        chunk_tokens: Optional[int] = None,
        deadline: float = 60.0,
    ) -> None:
        config: Any = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise NotSupported(f"nvtier.stream.Cache for a {type(model).__name__}: models of transformers are supported")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise InvalidArgument(f"chunk_tokens={chunk_tokens}: tokens, 1 or more")
        decoder = config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False) or (getattr(decoder, "num_kv_shared_layers", None) or 0) > 0:
            raise NotSupported("nvtier.stream.Cache for a model with an encoder, or with layers that share keys and values")
        super().__init__(config=config)
        found = self.layers
        for layer in found:
            if type(layer) is not DynamicLayer and not (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1):
                raise NotSupported(f"nvtier.stream.Cache for layers of type {type(layer).__name__}: full and sliding-window attention are supported")
        vram_bytes, ram_bytes, room_bytes = size_of("vram", vram), size_of("ram", ram) or 0, size_of("room", room)
        if pool is None:
            pool = getattr(model, "_nvtier_pool", None)
            if pool is None:
                raise InvalidArgument("nvtier.stream.Cache: this model's weights are in no pool: name one, pool=...")
        opened = _pool_of(pool)
        try:
            self._tier = Tier(
                opened, len(found), vram=vram_bytes, ram=ram_bytes, room=room_bytes, deadline=deadline, owns_pool=opened is not pool
            )
        except BaseException:
            if opened is not pool:
                opened.close()
            raise
        windows = [getattr(layer, "sliding_window", None) for layer in found]
        self._own: List[Any] = [
            (_FullLayer if window is None else _SlidingLayer)(self._tier, number, chunk_tokens, windows) for number, window in enumerate(windows)
        ]
        self.layers = self._own
        self._finalizer = weakref.finalize(self, self._tier.close, "was dropped")
        caches = model.__dict__.get("_nvtier_caches")
        if caches is not None:
            caches.add(self)

    def close(self) -> None:
        """Gives memory and space back. Once more is fine."""
        self._finalizer.detach()
        for layer in self._own:
            layer._tail = None
        self._tier.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def stats(self) -> Dict[str, Any]:
        """Bytes: ``held``, of keys and values, by where they are; moved since it was made, by tier; on the device now and at most, with what attention is shown.
        ``tokens`` of the first layer."""
        tier = self._tier
        return {
            "tokens": self.get_seq_length(),
            "held": tier.held(),
            **tier.moved(),
            "device_bytes": tier.device_bytes,
            "device_peak_bytes": tier.device_peak,
        }

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """For beam search: nothing is moved; what was stored is read in another order."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self._sequences()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(self._sequences(), device=indices.device)[indices])

    def _sequences(self) -> int:
        return max((layer._rows.sequences for layer in self._own if layer._rows is not None), default=0)

    def _select(self, index: torch.Tensor) -> None:
        self._tier.check()
        if self._tier.device is None:
            return
        with self._tier.guard(), _plain():
            made: Dict[Any, torch.Tensor] = {}
            index = index.to(self._tier.device)
            for layer in self._own:
                layer.select(index, made)

    def __iter__(self) -> Iterator[Any]:
        raise NotSupported("nvtier.stream.Cache does not give its tensors away: they are not all on the device")

    def __deepcopy__(self, memo: Any) -> Any:
        raise NotSupported("a copy of an nvtier.stream.Cache: its tokens are in a pool; nvtier.transformers.PrefixCache keeps prefixes for more than one use")


class _plain:
    """Tensors that are changed later as well, whatever mode the model is called in."""

    def __enter__(self) -> None:
        self._modes = (torch.inference_mode(False), torch.no_grad())
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exc)
