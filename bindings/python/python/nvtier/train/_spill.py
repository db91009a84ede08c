"""Activations that wait in host memory and in the pool: inputs of blocks, which gradient checkpointing keeps until the backward pass.

They are units of a state of their own that is never committed, and is removed with the run's end. What autograd saves outside of checkpointed blocks goes
through :meth:`Spill._pack`: it stays where it is, until a block is given the same tensor as its input. Then it is stored, and let go when that is done; and
it comes back when its block's backward pass begins, or that of the block after it.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch

from .. import _nvtier
from .._errors import Closed, NoSpace
from .._nvtier import Pool
from .._sizes import size_of
from .._units import fetch, store
from ._blocks import Block, Param
from ._planes import seen

if TYPE_CHECKING:
    from ._manager import Manager

#: Behind the name of the run's state.
ACTIVATIONS = ".activations"
#: Smaller ones are not worth an operation.
_LEAST = 64 << 10
#: Tensors that may be on their way at a time.
_LEAVING = 2


class Slot:
    """A tensor that autograd saved."""

    __slots__ = ("tensor", "version", "like", "bytes", "unit", "ticket", "coming", "counted", "spill", "__weakref__")

    def __init__(self, spill: Spill, tensor: torch.Tensor) -> None:
        self.tensor: Optional[torch.Tensor] = tensor
        self.version = tensor._version
        self.like = (tensor.dtype, tensor.shape)
        self.bytes = tensor.numel() * tensor.element_size()
        self.unit: Optional[int] = None
        self.ticket: Any = None
        self.coming: Optional[Tuple[torch.Tensor, Any]] = None
        #: Bytes that it has in the manager's count.
        self.counted = 0
        self.spill = spill

    def __del__(self) -> None:
        self.spill._gone(self)


class Weight:
    """A parameter, or a view of one, of a block that streams: what it is made of may be another plane in the backward pass."""

    def __init__(self, entry: Param, tensor: torch.Tensor, offset: int) -> None:
        self.entry, self.shape, self.stride, self.offset = entry, tensor.shape, tensor.stride(), offset

    def tensor(self) -> torch.Tensor:
        data = self.entry.param.data
        return data.as_strided(self.shape, self.stride, data.storage_offset() + self.offset)


class Spill:
    """``room``: bytes of the pool at most; ``ram``: of pinned host memory, which is used first."""

    def __init__(self, pool: Pool, name: str, manager: Manager, room: int, ram: int, deadline: float) -> None:
        self._pool, self._name, self._manager = pool, name, manager
        self._room, self._ram, self._deadline = room, ram, deadline
        self._state: Any = None
        self._block_bytes = 0
        #: Units that are free, by length; those in host memory; lengths of all.
        self._free: Dict[int, List[int]] = {}
        self._in_ram: Dict[int, bool] = {}
        self._used = [0, 0]
        self._slots: "weakref.WeakValueDictionary[Any, Slot]" = weakref.WeakValueDictionary()
        self._of: Dict[Block, List[Any]] = {}
        self._leaving: List[Slot] = []
        self._inside: Optional[Block] = None
        self._hooks: Any = None
        self._handles: List[Any] = []
        self._closed = False
        #: Inputs of blocks that are on the device, in bytes: now, and at most. Those that there was no room for elsewhere.
        self.held, self.held_peak, self.stayed = 0, 0, 0
        #: Bytes of the largest input of a block so far.
        self.largest = 0
        _nvtier.State.remove(pool, name)

    def attach(self, model: torch.nn.Module) -> None:
        """From here on."""

        def begin(module: Any, args: Any) -> None:
            self._end_hooks()
            if torch.is_grad_enabled():
                self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
                self._hooks.__enter__()

        def end(module: Any, args: Any, output: Any) -> None:
            self._end_hooks()

        self._handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]

    def _end_hooks(self) -> None:
        self._inside = None
        if self._hooks is not None:
            hooks, self._hooks = self._hooks, None
            hooks.__exit__(None, None, None)

    # Autograd

    def _pack(self, tensor: torch.Tensor) -> Any:
        weight = self._weight(tensor)
        if weight is not None:
            return weight
        if tensor.device != self._manager.device or tensor.numel() * tensor.element_size() < _LEAST or tensor.layout != torch.strided:
            return tensor
        key = _key(tensor)
        slot = self._slots.get(key)
        if slot is None or slot.tensor is None:
            slot = self._slots[key] = Slot(self, tensor)
        return slot

    def _weight(self, tensor: torch.Tensor) -> Optional[Weight]:
        block = self._inside
        if block is None:
            return None
        storage = tensor.untyped_storage().data_ptr()
        for plane, whole in block.planes.items():
            if seen(plane) and whole.untyped_storage().data_ptr() == storage:
                at = tensor.storage_offset() * tensor.element_size() // whole.element_size()
                for entry in block.params:
                    data = entry.param.data
                    inside = entry.place.start <= at < entry.place.start + entry.place.count
                    if inside and data.untyped_storage().data_ptr() == storage and data.dtype == tensor.dtype:
                        return Weight(entry, tensor, int(tensor.storage_offset() - data.storage_offset()))
        return None

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, Weight):
            return packed.tensor()
        if not isinstance(packed, Slot):
            return packed
        if packed.tensor is None:
            if self._closed:
                raise Closed("a backward pass after the optimizer was closed: its activations are gone")
            if packed.coming is None:
                self._fetch(packed)
            assert packed.coming is not None
            tensor, ticket = packed.coming
            ticket.wait()
            packed.tensor, packed.coming, packed.version = tensor, None, tensor._version
        elif packed.tensor._version != packed.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation "
                f"(shape {list(packed.like[1])}, version {packed.tensor._version}, expected {packed.version})"
            )
        return packed.tensor

    # Blocks

    def enter(self, block: Block, values: Iterable[Any]) -> None:
        """A block's forward pass begins, with these arguments."""
        self._inside = block
        last = bool(self._manager.order) and block is self._manager.order[-1]
        for tensor in _tensors(values):
            slot = self._slots.get(_key(tensor))
            # The last one's backward pass comes at once.
            if slot is not None and slot.tensor is not None and slot.unit is None and not last and tensor.is_contiguous():
                self._store(slot, block)

    def leave(self) -> None:
        """It is over."""
        self._inside = None
        self.reap()

    def ahead(self, block: Block) -> None:
        """Fetches what the block's backward pass will need, where the budget has room."""
        manager = self._manager
        for slot in [slot for reference in self._of.get(block, []) if (slot := reference()) is not None]:
            if slot.tensor is None and slot.coming is None:
                if not manager.makes_room(slot.bytes):
                    return
                self._fetch(slot)

    def stats(self) -> Dict[str, int]:
        """Bytes."""
        moved = self._state.moved() if self._state is not None else {}
        return {
            "activations_stored_bytes": moved.get("stored_bytes", 0),
            "activations_fetched_bytes": moved.get("fetched_bytes", 0),
            "activations_drive_written_bytes": moved.get("drive_written_bytes", 0),
            "activations_device_peak_bytes": self.held_peak,
            "activations_stayed_bytes": self.stayed,
        }

    # Units

    def _open(self, bytes: int) -> None:
        from ._offload import _block_bytes

        self._block_bytes = _block_bytes([bytes])
        budget = _nvtier.State.room_for([], self._room, self._block_bytes)
        self._state = _nvtier.State(
            self._pool, name=self._name, budget=budget, block_bytes=self._block_bytes, ram=self._ram, deadline=self._deadline
        )

    def _take(self, bytes: int) -> Optional[int]:
        """A unit of that length, where there is room."""
        if self._free.get(bytes):
            # Those in host memory first.
            unit = max(self._free[bytes], key=lambda unit: self._in_ram[unit])
            self._free[bytes].remove(unit)
            return unit
        if self._state is None:
            self._open(bytes)
        blocks = -(-bytes // self._block_bytes)
        space = blocks * (-(-self._block_bytes // 4096) * 4096)
        in_ram = self._used[0] + space <= self._ram
        # A version that is replaced goes when the next one is there.
        if not in_ram and self._used[1] + 2 * space > self._room:
            return None
        unit = self._state.add([bytes])
        if in_ram:
            self._state.keep_in_ram(unit)
            self._used[0] += space
        else:
            self._used[1] += 2 * space
        self._in_ram[unit] = in_ram
        return unit

    def _store(self, slot: Slot, block: Block) -> None:
        slot.unit = self._take(slot.bytes)
        if slot.unit is None:
            self.stayed += slot.bytes
            return
        self._hold(slot.bytes)
        self.largest = max(self.largest, slot.bytes)
        references = [reference for reference in self._of.get(block, []) if reference() is not None]
        self._of[block] = [*references, weakref.ref(slot)]
        tensor = slot.tensor
        assert tensor is not None
        slot.ticket = store(self._state, slot.unit, tensor, not self._in_ram[slot.unit])
        self._leaving.append(slot)
        while len(self._leaving) > _LEAVING:
            self._leaving[0].ticket.wait(copied=True)
            self.reap()

    def _hold(self, bytes: int) -> None:
        self.held += bytes
        self.held_peak = max(self.held_peak, self.held)

    def reap(self, wait: bool = False) -> None:
        """Lets go of what is moved; with ``wait`` of all that is on its way."""
        left = []
        for slot in self._leaving:
            if wait:
                slot.ticket.wait(copied=True)
            if not slot.ticket.is_done(copied=True):
                left.append(slot)
            elif slot.tensor is not None:
                if slot.tensor._version != slot.version:
                    raise RuntimeError("an input of a block was modified in place while it was moved out of the device's memory")
                slot.tensor = None
                self.held -= slot.bytes
        self._leaving = left

    def _fetch(self, slot: Slot) -> None:
        manager = self._manager
        manager.makes_room(slot.bytes)
        dtype, shape = slot.like
        tensor = torch.empty(shape, dtype=dtype, device=manager.device)
        slot.counted = slot.bytes
        manager._count(tensor, 1)
        self._hold(slot.bytes)
        assert slot.unit is not None
        slot.coming = (tensor, fetch(self._state, slot.unit, tensor))

    def _gone(self, slot: Slot) -> None:
        """Autograd needs it no more."""
        if slot.unit is None:
            return
        if slot.tensor is not None or slot.coming is not None:
            self.held -= slot.bytes
        self._manager.device_bytes -= slot.counted
        # Operations on a unit run one after the other, and keep their tensors.
        self._free.setdefault(slot.bytes, []).append(slot.unit)

    def close(self) -> None:
        """All of it goes."""
        if self._closed:
            return
        self._closed = True
        self._end_hooks()
        for handle in self._handles:
            handle.remove()
        self._leaving = []
        if self._state is not None:
            self._state.close()
            _nvtier.State.remove(self._pool, self._name)


def room_in(pool: Pool, activations: Union[int, str], taken: int, ranks: int) -> int:
    """Bytes of the pool for activations: so many, or (``"pool"``) most of what is free beside what the ranks take."""
    # Logs and slabs of its own.
    free = int(pool.stat()["free_bytes"]) - ranks * (taken + (128 << 20))
    if activations == "pool":
        return max(free, 0) // ranks // 10 * 9
    room = size_of("activations", activations) or 0
    if room * ranks > free:
        raise NoSpace(f"activations={activations!r}: the pool has {max(free, 0)} bytes free for them beside weights, gradients and state")
    return room


def _key(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
