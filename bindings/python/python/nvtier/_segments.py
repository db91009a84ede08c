"""Segments of keys and values, and where each of them is: on the device, in pinned host memory, or in a pool. Below ``nvtier.stream.Cache``.

A segment is some tokens of one layer, as rows of a tensor that lies in one piece. It is made on the device and stays there as long as the budget has room; then it is
stored in a unit of a state, once, and comes back into other memory whenever its layer is used. The state is never committed. It has a name that says whose it is, and is
removed when the cache is closed or dropped, or by the next cache on the pool where its process was killed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections import deque
from typing import Any, Deque, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch

from . import _nvtier
from ._errors import Closed, Error, NoSpace, OutOfDeviceMemory
from ._nvtier import Pool
from ._units import fetch, store
from .train._ranks import _STATES

#: A segment has at most so many bytes, or is one chunk.
SEGMENT_BYTES = 8 << 20
#: Bytes of a state's block at most: what is read and checked at once.
_BLOCK_MOST = 4 << 20
#: Segments that may be stored in a second version for a moment, where a unit is used again.
_AGAIN = 16
#: Space that the state's logs and slabs have beside its blocks.
_OWN_BYTES = 128 << 20

_live: Set[str] = set()
_numbers = itertools.count()


class Segment:
    """Tokens of a layer. ``memory`` is there or comes, or a unit has its bytes, or both."""

    __slots__ = ("layer", "tokens", "shape", "dtype", "bytes", "index", "memory", "unit", "leaving", "coming")

    def __init__(self, layer: int, memory: torch.Tensor) -> None:
        self.layer = layer
        #: Rows that count; those behind were cropped.
        self.tokens = memory.shape[0]
        self.shape, self.dtype = memory.shape, memory.dtype
        self.bytes = memory.numel() * memory.element_size()
        #: Which of the sequences that it has are meant, in which order; None: all.
        self.index: Optional[torch.Tensor] = None
        self.memory: Optional[torch.Tensor] = memory
        self.unit: Optional[int] = None
        self.leaving: Any = None
        self.coming: Optional[Tuple[torch.Tensor, Any]] = None


class Tier:
    """The segments of all layers of a cache. ``vram``, ``ram``, ``room``: bytes on the device, of pinned host memory and of the pool; all are hard."""

    def __init__(self, pool: Pool, layers: int, *, vram: Optional[int], ram: int, room: Optional[int], deadline: float, owns_pool: bool) -> None:
        self.vram, self._ram, self._deadline = vram, ram, deadline
        self._pool, self._owns_pool, self._process = pool, owns_pool, os.getpid()
        sweep(pool)
        free = max(int(pool.stat()["free_bytes"]) - _OWN_BYTES - _AGAIN * SEGMENT_BYTES, 0)
        if room is not None and room > free:
            raise NoSpace(f"room={room}: the pool has {free} bytes free for keys and values, beside what keeps account of them")
        self._room = free // 10 * 9 if room is None else room
        #: Segments of each layer, in the order of their tokens.
        self.lists: List[List[Segment]] = [[] for _ in range(layers)]
        #: Of each layer, those that are on the device and nowhere else, the oldest first; and their bytes.
        self._resident: List[Deque[Segment]] = [deque() for _ in range(layers)]
        self._resident_bytes = [0] * layers
        self._stored = [0] * layers
        #: Of each layer, the share of the host memory and what is used of it. Layers wait for drives evenly so.
        self._ram_shares = [ram // layers] * layers
        self._ram_used = [0] * layers
        self._pool_used = 0
        self._free: Dict[Tuple[int, bool], List[int]] = {}
        self._in_ram: Dict[int, bool] = {}
        self._leaving: List[Segment] = []
        self._state: Any = None
        self._name = ""
        #: Where all of it is used.
        self.device: Optional[torch.device] = None
        #: Bytes of a block of the state, for the first segment that is stored.
        self.block_bytes = _BLOCK_MOST
        self.order: List[int] = []
        self._seen: List[int] = []
        self._using: Optional[int] = None
        #: Layers whose segments are all there or on their way.
        self._asked: Set[int] = set()
        self.device_bytes = self.device_peak = 0
        #: Of the device: tails of layers; what attention is shown now, and at most of one layer.
        self.tails = self._shown = self.largest = self._more = 0
        self._moved: Dict[str, int] = {}
        self._ended: Optional[str] = None

    # Use

    def check(self) -> None:
        if self._ended is not None:
            raise Closed(f"this cache {self._ended}: make another one")

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Ends everything where something fails: some layers would have tokens that others have not."""
        try:
            yield
        except BaseException as error:
            # What went wrong first is what matters.
            with contextlib.suppress(Error):
                self.close(f"ended when this failed: {str(error) or type(error).__name__}")
            raise

    def begin(self, layer: int, shown: int, more: int) -> None:
        """A layer is used: attention is shown so many bytes of it, which replace those of the layer before; ``more``: by how much that, and what is kept, may be
        larger the next time."""
        if layer in self._seen:
            self.order, self._seen = self._seen, []
        self._seen.append(layer)
        self._using = layer
        self.count(-self._shown)
        self._shown = 0
        self.largest, self._more = max(self.largest, shown), more
        self._fit()
        self.make_room(shown)
        self.count(shown)
        self._shown = shown

    def bring(self, segments: Sequence[Segment]) -> Iterator[Tuple[Segment, torch.Tensor]]:
        """Each of them with its memory, one after the other: it may go when the next one is asked for."""
        waiting = deque(segment for segment in segments if segment.memory is None and segment.coming is None)
        for segment in segments:
            while waiting and self._fits(waiting[0].bytes):
                self._fetch(waiting.popleft())
            if not waiting:
                # So that nothing pauses while this one is waited for.
                self.ahead()
            if segment.memory is None:
                if segment.coming is None:
                    self.make_room(segment.bytes)
                    self._fetch(segment)
                    if waiting and waiting[0] is segment:
                        waiting.popleft()
                assert segment.coming is not None
                memory, ticket = segment.coming
                ticket.wait()
                segment.memory, segment.coming = memory, None
            yield segment, segment.memory
            if segment.unit is not None and segment.leaving is None and segment.memory is not None:
                segment.memory = None
                self.count(-segment.bytes)
        if self._using is not None:
            self._asked.discard(self._using)

    def ahead(self) -> None:
        """Begins to fetch what the layers after this one will need, in their order, as far as the budget has room."""
        self.reap()
        keep = self.largest - self._shown + self._more
        for layer in self._following():
            if layer in self._asked or not self._stored[layer]:
                continue
            for segment in self.lists[layer]:
                if segment.memory is None and segment.coming is None:
                    if not self._fits(segment.bytes + keep):
                        return
                    self._fetch(segment)
            self._asked.add(layer)

    def _following(self) -> List[int]:
        order = self.order or list(range(len(self.lists)))
        if self._using not in order:
            return []
        at = order.index(self._using)
        return order[at + 1 :] + order[:at]

    def share_ram(self, windows: Sequence[Optional[int]], row_bytes: int, segment_tokens: int) -> None:
        """Divides the host's memory among the layers: those with a window get no more than that takes."""
        even = self._ram // len(windows)
        most = [None if window is None else (window + 2 * segment_tokens) * row_bytes for window in windows]
        shares = [None if bytes is None else min(bytes, even) for bytes in most]
        others = shares.count(None)
        left = self._ram - sum(share or 0 for share in shares)
        self._ram_shares = [left // others if share is None else share for share in shares]

    # Segments

    def empty(self, layer: int, shape: Tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a segment."""
        self.make_room(shape[0] * shape[1] * dtype.itemsize)
        memory = torch.empty(shape, dtype=dtype, device=device)
        self.count(memory.numel() * memory.element_size())
        return memory

    def add(self, layer: int, memory: torch.Tensor) -> None:
        """A segment is full."""
        segment = Segment(layer, memory)
        self.lists[layer].append(segment)
        self._resident[layer].append(segment)
        self._resident_bytes[layer] += segment.bytes
        self._asked.discard(layer)
        self._fit()

    def remove(self, segment: Segment) -> None:
        """Its tokens are not needed any more."""
        self.lists[segment.layer].remove(segment)
        if segment.unit is None:
            self._resident[segment.layer].remove(segment)
            self._resident_bytes[segment.layer] -= segment.bytes
            self.count(-segment.bytes)
            return
        self._give_up(segment)
        if segment.memory is not None and segment.leaving is None:
            self.count(-segment.bytes)
        self._stored[segment.layer] -= 1
        # Operations on a unit run one after the other, and keep their tensors.
        self._free.setdefault((segment.bytes, self._in_ram[segment.unit]), []).append(segment.unit)
        if not any(self.lists) and self._state is not None:
            # Nothing is left of what was: units of other lengths may come.
            self._drop_state()

    def _fetch(self, segment: Segment) -> None:
        assert segment.unit is not None
        memory = torch.empty(segment.shape, dtype=segment.dtype, device=self.device)
        self.count(segment.bytes)
        segment.coming = (memory, fetch(self._state, segment.unit, memory))

    def _give_up(self, segment: Segment) -> None:
        """What comes is not wanted yet."""
        if segment.coming is not None:
            memory, ticket = segment.coming
            segment.coming = None
            ticket.wait()
            self.count(-segment.bytes)
            self._asked.discard(segment.layer)

    def _store(self, segment: Segment) -> None:
        """A segment goes from the device, and will come back when it is needed."""
        segment.unit = self._take(segment)
        memory = segment.memory
        assert memory is not None
        self._resident[segment.layer].remove(segment)
        self._resident_bytes[segment.layer] -= segment.bytes
        self._stored[segment.layer] += 1
        segment.leaving = store(self._state, segment.unit, memory, not self._in_ram[segment.unit])
        self._leaving.append(segment)

    def _take(self, segment: Segment) -> int:
        """A unit of its length."""
        for in_ram in (True, False):
            free = self._free.get((segment.bytes, in_ram))
            if free:
                return free.pop()
        if self._state is None:
            self._open(segment)
        slots = -(-segment.bytes // self.block_bytes) * (-(-self.block_bytes // 4096) * 4096)
        layer = segment.layer
        in_ram = self._ram_used[layer] + slots <= self._ram_shares[layer]
        if not in_ram and self._pool_used + slots > self._room:
            raise NoSpace(
                f"keys and values that the device (vram={self.vram}) and the host's memory (ram={self._ram}) have no room for take more than the "
                f"{self._room} bytes of the pool that are theirs: more of any of the three, or a shorter context"
            )
        unit: int = self._state.add([segment.bytes])
        if in_ram:
            self._state.keep_in_ram(unit)
            self._ram_used[layer] += slots
        else:
            self._pool_used += slots
        self._in_ram[unit] = in_ram
        return unit

    # Budget

    def count(self, more: int) -> None:
        self.device_bytes += more
        self.device_peak = max(self.device_peak, self.device_bytes)

    def _fits(self, more: int) -> bool:
        return self.vram is None or self.device_bytes + more <= self.vram

    def make_room(self, more: int) -> None:
        self.reap()
        while not self._fits(more):
            if self._leaving:
                self._leaving[0].leaving.wait(copied=True)
                self.reap()
            elif not self._give_up_ahead() and not self._store_one() and not self._give_up_ahead(own=True):
                raise OutOfDeviceMemory(
                    f"vram={self.vram}: {more} bytes more of keys and values, and {self.device_bytes} are in use"
                )

    def _give_up_ahead(self, own: bool = False) -> bool:
        """Lets go of what was fetched for the layer that is farthest, or for the one that is used. False: there is nothing."""
        layers = [self._using] if own else self._following()
        for layer in reversed(layers):
            for segment in reversed(self.lists[layer] if layer is not None else []):
                if segment.coming is not None:
                    self._give_up(segment)
                    return True
        return False

    def _store_one(self) -> bool:
        """Takes a segment from the device, of the layer that has most there."""
        layer = max(range(len(self.lists)), key=self._resident_bytes.__getitem__)
        if not self._resident[layer]:
            return False
        self._store(self._resident[layer][0])
        return True

    def _fit(self) -> None:
        """Stores what has to leave the device so that one layer can be shown while the next one comes."""
        if self.vram is None:
            return
        left = self.vram - self.tails - self.largest
        resident = sum(self._resident_bytes)
        if not any(self._stored) and resident <= left:
            return
        while resident > max(left - self.largest, 0):
            before = resident
            if not self._store_one():
                return
            resident = sum(self._resident_bytes)
            assert resident < before

    def reap(self) -> None:
        """Lets go of what has left the device."""
        left = []
        for segment in self._leaving:
            if not segment.leaving.is_done(copied=True):
                left.append(segment)
                continue
            segment.leaving, segment.memory = None, None
            self.count(-segment.bytes)
            self._asked.discard(segment.layer)
        self._leaving = left

    # State

    def _open(self, segment: Segment) -> None:
        self.block_bytes = min(self.block_bytes, _BLOCK_MOST)
        self._name = f"{_owner()}{next(_numbers)}"
        _live.add(self._name)
        budget = _nvtier.State.room_for([], self._room + _AGAIN * max(SEGMENT_BYTES, segment.bytes), self.block_bytes)
        try:
            self._state = _nvtier.State(
                self._pool, name=self._name, budget=budget, block_bytes=self.block_bytes, ram=self._ram, deadline=self._deadline
            )
        except BaseException:
            self._forget(self._name)
            raise

    def moved(self) -> Dict[str, int]:
        """Bytes moved so far."""
        now = self._state.moved() if self._state is not None else {}
        keys = ("fetched_bytes", "ram_bytes", "stored_bytes", "drive_read_bytes", "drive_written_bytes")
        return {key: self._moved.get(key, 0) + now.get(key, 0) for key in keys}

    def held(self) -> Dict[str, int]:
        """Bytes of keys and values, by where they are."""
        stored = {True: 0, False: 0}
        for segment in itertools.chain(*self.lists):
            if segment.unit is not None:
                stored[self._in_ram[segment.unit]] += segment.bytes
        return {"device": sum(self._resident_bytes) + self.tails, "ram": stored[True], "pool": stored[False]}

    def _drop_state(self) -> None:
        state, name, self._state = self._state, self._name, None
        self._moved = {**self._moved, **{key: self._moved.get(key, 0) + value for key, value in state.moved().items()}}
        state.close()
        for segment in self._leaving:
            self.count(-segment.bytes)
        self._leaving = []
        self._free, self._in_ram, self._pool_used = {}, {}, 0
        self._ram_used = [0] * len(self._ram_used)
        self._forget(name)

    def _forget(self, name: str) -> None:
        _live.discard(name)
        # A pool that was closed before: the next cache there removes it.
        with contextlib.suppress(Closed):
            _nvtier.State.remove(self._pool, name)

    def close(self, how: str = "was closed") -> None:
        """All of it goes. Once more is fine."""
        if self._ended is not None:
            return
        self._ended = how
        if os.getpid() != self._process:
            # What a forked child has of it is its parent's.
            return
        for segments in (*self.lists, *self._resident):
            segments.clear()
        try:
            if self._state is not None:
                self._drop_state()
        finally:
            if self._owns_pool:
                self._pool.close()
        self.device_bytes = 0


def _start_of(pid: str) -> Optional[str]:
    """When a process began, in ticks since the machine did. None: there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # One that nobody has waited for is none any more.
    return None if fields[0] in "ZX" else fields[19]


def _here() -> Tuple[str, str]:
    """This start of the machine, and the space of process numbers."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip().replace("-", "")[:12]
    return boot, re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))


def _owner() -> str:
    """What names of states of this process begin with."""
    boot, space = _here()
    return f"context-{boot}-{space}-{os.getpid()}-{_start_of('self')}-"


def sweep(pool: Pool) -> None:
    """Removes what caches of processes that are gone have left in a pool. Those of another container may be alive: they are left until the machine was started again."""
    if not pool.exists(_STATES):
        return
    boot, space = _here()
    for entry in pool.ls(_STATES):
        name = entry.path.rsplit("/", 1)[-1]
        found = re.fullmatch(r"context-([0-9a-f]+)-([0-9]+)-([0-9]+)-([0-9]+)-[0-9]+", name)
        if found is None or name in _live:
            continue
        gone = found[1] != boot or found[2] == space and (_start_of(found[3]) != found[4] or int(found[3]) == os.getpid())
        if gone:
            with contextlib.suppress(Error):
                _nvtier.State.remove(pool, name)
