"""Experts of mixture-of-experts layers that come from a pool one by one, when a token is routed to them.

A layer of ``n`` experts keeps each parameter of all of them in one tensor, experts first (``Qwen3MoeExperts``, ``GptOssExperts``, ``MixtralExperts`` and
others of transformers). Each expert is a unit of the state. What is on the device is a number of slots, and each layer has its share of them: the expert
that a layer has not used for longest makes room.
"""

from __future__ import annotations

import collections
import contextlib
from typing import Any, Dict, List, Optional, Tuple

import torch

from ._errors import Closed, Error, InvalidArgument
from ._units import fetch, store

_ALIGN = 256


class Layer:
    """The experts of one layer."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name, self.module = name, module
        self.count = int(module.num_experts)  # type: ignore[arg-type]
        #: Parameter, its type and the shape that one expert has of it, and where that begins in a slot.
        self.parts: Dict[str, Tuple[torch.dtype, torch.Size, int]] = {}
        self.bytes = 0
        for key, param in module._parameters.items():
            if param is not None:
                self.parts[key] = (param.dtype, param.shape[1:], self.bytes)
                self.bytes += -(-param[0].numel() * param.element_size() // _ALIGN) * _ALIGN
        self.params: Dict[str, Any] = {key: module._parameters[key] for key in self.parts}
        self.first = 0
        #: Experts on the device, or on their way, the one that was used longest ago first.
        self.there: "collections.OrderedDict[int, Slot]" = collections.OrderedDict()
        #: Times that one of them was needed, and that one was fetched.
        self.uses = self.misses = 0
        # The loop over experts, whatever implementation was chosen for tensors that are all there.
        self.forward = getattr(type(module).forward, "__wrapped__", type(module).forward)

    def view(self, slot: torch.Tensor, key: str) -> torch.Tensor:
        dtype, shape, start = self.parts[key]
        return slot[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def describe(self) -> List[Any]:
        return [self.name, self.count, {key: [str(dtype), list(shape), start] for key, (dtype, shape, start) in self.parts.items()}]


class Slot:
    """Memory of one expert on the device."""

    __slots__ = ("memory", "ticket")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory, self.ticket = memory, None  # type: torch.Tensor, Any


class _Rows:
    """Stands for a parameter of all experts while they run: has each of them when it is asked for."""

    def __init__(self, experts: "Experts", layer: Layer, key: str) -> None:
        self._experts, self._layer, self._key = experts, layer, key
        param = layer.params[key]
        self.shape, self.dtype, self.device = param.shape, param.dtype, experts.device

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._layer.view(self._experts.at(self._layer, self._experts.number_of(index)), self._key)


def find_layers(model: torch.nn.Module) -> List[Layer]:
    """Modules of experts, and nothing but experts. Their parameters are taken from the model."""
    layers = []
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        own = [param for param in module._parameters.values() if param is not None]
        if not isinstance(count, int) or count < 2 or not own or len(own) != sum(1 for _ in module.parameters()):
            continue
        # A router has a matrix of as many rows.
        if any(param.dim() < 2 or param.shape[0] != count for param in own) or max(param.dim() for param in own) < 3:
            continue
        layers.append(Layer(name, module))
    for layer in layers:
        for key in layer.parts:
            layer.module._parameters[key] = None
    return layers


class Experts:
    """All layers of a model, and the slots that they share."""

    def __init__(self, layers: List[Layer], state: Any, device: torch.device, slots: int) -> None:
        self.layers, self.state, self.device = layers, state, device
        self.bytes = max(layer.bytes for layer in layers)
        self.free = [Slot(torch.empty(self.bytes, dtype=torch.uint8, device=device)) for _ in range(slots)]
        self.slots = slots
        self.share = max(1, slots // len(layers))
        #: Experts that the layer at work will ask for, in order, and the one that it has asked for last.
        self._coming: List[int] = []
        self._now: Optional[int] = None
        self._index: Tuple[Any, int] = (None, -1)
        self._closed = False

    def number(self, first: int) -> None:
        """The state's number of the first unit."""
        for layer in self.layers:
            layer.first = first
            first += layer.count

    def take_in(self) -> None:
        """Puts all experts into their units."""
        slots, leaving = self.free, []  # type: List[Slot], List[Any]
        number = 0
        for layer in self.layers:
            for expert in range(layer.count):
                if number >= len(slots):
                    leaving[number - len(slots)].wait(copied=True)
                memory = slots[number % len(slots)].memory
                memory.zero_()
                for key, param in layer.params.items():
                    layer.view(memory, key).copy_(param.data[expert])
                leaving.append(store(self.state, layer.first + expert, memory[: layer.bytes], True))
                number += 1
        for ticket in leaving:
            ticket.wait()

    def attach(self) -> None:
        for layer in self.layers:
            # Shapes and types stay known; the bytes are in the pool.
            layer.params = {key: _Shape(param.shape, param.dtype) for key, param in layer.params.items()}
            layer.module.forward = self._forward(layer)  # type: ignore[method-assign]

    def close(self) -> None:
        """Waits for what is on its way, and lets the slots go."""
        self._closed = True
        for layer in self.layers:
            for slot in layer.there.values():
                if slot.ticket is not None:
                    # What came for nothing may have failed: who needs something hears of it.
                    with contextlib.suppress(Error):
                        slot.ticket.wait()
            layer.there.clear()
        self.free = []

    def _forward(self, layer: Layer) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._closed:
                raise Closed("this model was closed, and its parameters went with it: load the model again")
            chosen = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor) and not value.is_floating_point()]
            if len(chosen) != 1:
                raise InvalidArgument(f"nvtier.stream: {layer.name} was called with {len(chosen)} tensors of expert numbers, and one was expected")
            self._begin(layer, [expert for expert in torch.unique(chosen[0]).tolist() if expert < layer.count])
            for key in layer.parts:
                layer.module.__dict__[key] = _Rows(self, layer, key)
            try:
                return layer.forward(layer.module, *args, **kwargs)
            finally:
                for key in layer.parts:
                    del layer.module.__dict__[key]
                self._coming, self._now, self._index = [], None, (None, -1)

        return forward

    def _begin(self, layer: Layer, wanted: List[int]) -> None:
        layer.uses += len(wanted)
        # Those that are there first stay there: they are used, and newer than the others.
        for expert in wanted:
            if expert in layer.there:
                layer.there.move_to_end(expert)
        self._coming = wanted
        self._ahead(layer)

    def _ahead(self, layer: Layer) -> None:
        """Begins to fetch what will be asked for, as far as there are slots."""
        for expert in self._coming:
            if expert in layer.there:
                continue
            slot = self._slot(layer)
            if slot is None:
                return
            slot.ticket = fetch(self.state, layer.first + expert, slot.memory[: layer.bytes])
            layer.there[expert] = slot
            layer.misses += 1

    def _slot(self, layer: Layer) -> Optional[Slot]:
        """A slot for another expert of a layer; None: all of them are needed."""
        if self.free:
            return self.free.pop()
        fullest = max(self.layers, key=lambda other: len(other.there))
        for other in (layer, fullest) if len(layer.there) >= self.share else (fullest, layer):
            for expert, slot in other.there.items():
                if other is layer and (expert in self._coming or expert == self._now):
                    continue
                if slot.ticket is not None:
                    slot.ticket.wait()
                    slot.ticket = None
                del other.there[expert]
                return slot
        return None

    def number_of(self, index: Any) -> int:
        # The same tensor asks for every parameter of an expert, and to look into it is to wait for the device.
        if index is not self._index[0]:
            self._index = (index, int(index))
        return self._index[1]

    def at(self, layer: Layer, expert: int) -> torch.Tensor:
        """An expert's slot, with its bytes there."""
        if expert != self._now:
            # Who has asked for another one is done with the one before.
            self._now = expert
            if expert in self._coming:
                self._coming = self._coming[self._coming.index(expert) :]
            else:
                self._coming = [expert]
            self._ahead(layer)
            if expert not in layer.there:
                # Every slot has one that comes later: the last of them comes again.
                self._coming.remove(next(later for later in reversed(self._coming) if later in layer.there))
                self._ahead(layer)
            self._coming = self._coming[1:]
        slot = layer.there[expert]
        if slot.ticket is not None:
            slot.ticket.wait()
            slot.ticket = None
            layer.there.move_to_end(expert)
        return slot.memory

    def stats(self) -> Dict[str, Any]:
        """How often an expert was on the device when it was needed."""
        uses, misses = sum(layer.uses for layer in self.layers), sum(layer.misses for layer in self.layers)
        return {
            "hits": uses - misses,
            "misses": misses,
            "hit_rate": (uses - misses) / max(uses, 1),
            "slots": self.slots,
            "experts": sum(layer.count for layer in self.layers),
            "expert_bytes": self.bytes,
            "layers": {layer.name: {"hits": layer.uses - layer.misses, "misses": layer.misses} for layer in self.layers},
        }


class _Shape:
    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
