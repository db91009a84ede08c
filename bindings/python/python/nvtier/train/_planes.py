"""How the bytes of parameters lie in planes: flat tensors of one type for all parameters of a block.

==========  ==================================================================  ======================
precision   planes of a trainable parameter, bytes an element                   what the module sees
==========  ==================================================================  ======================
``fp32``    ``w`` 4, ``m`` 4, ``v`` 4, ``g`` 4                                   ``w``, float32
``bf16``    ``w`` 2, ``m`` 2, ``v`` 2, ``g`` 2                                   ``w``, bfloat16
``mixed``   ``hi`` 2, ``lo`` 2 + 1/8, ``m`` 4, ``v`` 4, ``g`` 4 (or 2)           ``hi``, bfloat16
==========  ==================================================================  ======================

``mixed`` is float32 weights under ``torch.autocast(dtype=torch.bfloat16)``. A weight of an ``nn.Linear`` is used there as bfloat16 only, which is ``hi``: the
float32 weight rounded to the nearest, ties to even. ``lo`` are the low 16 bits of the float32 weight, and a bit that says, at ties, which way it was
rounded; together they are the float32 weight again, bit for bit. Other parameters (norms, biases, embeddings) are as in ``fp32``.

With several ranks each has an equal part of every plane, and of the planes that modules see the whole while they are used.
"""

from __future__ import annotations

import functools
from typing import Any, Dict, NamedTuple, Tuple

import torch

from .._units import name_of

#: Elements that a parameter's place in a plane is a multiple of: whole vectors of every type (kernels round otherwise in a tail than in a vector).
ALIGN = 64

#: Kinds of parameters.
FULL, SPLIT, FROZEN = "full", "split", "frozen"


class Place(NamedTuple):
    """A parameter's elements in the planes of its kind."""

    start: int
    count: int


def padded(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def split(master: torch.Tensor, hi: torch.Tensor, lo: torch.Tensor, ties: torch.Tensor, state: Any = None) -> None:
    """Takes float32 weights apart: into bfloat16 ``hi``, int16 ``lo``, and uint8 ``ties`` of an eighth as many elements, rounded up. ``state``: the one that
    has the kernel of a GPU, which does it in one pass."""
    if _by_kernel(state, False, master, hi, lo, ties):
        return
    bits = master.view(torch.int32)
    hi.copy_(master)
    low = bits & 0xFFFF
    lo.copy_(low)  # wraps
    upper = (bits >> 16) & 0xFFFF
    rounded = hi.view(torch.int16).to(torch.int32) & 0xFFFF
    up = (low == 0x8000) & (rounded != upper)
    ties.copy_(_pack(up))


def join(hi: torch.Tensor, lo: torch.Tensor, ties: torch.Tensor, state: Any = None) -> torch.Tensor:
    """The float32 weights that :func:`split` took apart."""
    if state is not None and hi.is_cuda:
        master = torch.empty(hi.numel(), dtype=torch.float32, device=hi.device)
        if _by_kernel(state, True, master, hi, lo, ties):
            return master
    low = lo.to(torch.int32) & 0xFFFF
    tie = low == 0x8000
    up = torch.where(tie, _unpack(ties, low.numel()), low > 0x8000)
    upper = (hi.view(torch.int16).to(torch.int32) - up.to(torch.int32)) & 0xFFFF
    return ((upper << 16) | low).view(torch.float32)


def _by_kernel(state: Any, joins: bool, master: torch.Tensor, *halves: torch.Tensor) -> bool:
    if state is None or not master.is_cuda or master.numel() == 0:
        return False
    addresses = [tensor.data_ptr() for tensor in (master, *halves)]
    if any(address % 16 for address in addresses[:-1]) or not master.is_contiguous():
        return False
    stream = torch.cuda.current_stream(master.device).cuda_stream
    state.halves(name_of(master.device), stream, joins, *addresses, master.numel())
    return True


@functools.lru_cache(maxsize=None)
def _weights(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _pack(bits: torch.Tensor) -> torch.Tensor:
    rest = -bits.numel() % 8
    if rest:
        bits = torch.cat([bits, bits.new_zeros(rest)])
    # A sum of eight different powers of two stays within a byte.
    return (bits.view(-1, 8).to(torch.uint8) * _weights(bits.device)).sum(dim=1, dtype=torch.uint8)


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    return ((packed.unsqueeze(1) & _weights(packed.device)) != 0).view(-1)[:count]


def seen(plane: str) -> bool:
    """Whether modules see the plane."""
    return plane in ("w", "hi") or plane.startswith(FROZEN)


class Layout:
    """The planes of a block: types, numbers of elements, and where each parameter lies."""

    def __init__(self, precision: str, accumulate: bool, gradients: bool = True, ranks: int = 1, passing: bool = False) -> None:
        self.precision, self.gradients, self.ranks = precision, gradients, ranks
        #: Gradients are used as soon as they are there: no plane of the pool is theirs.
        self.passing = passing
        self.counts: Dict[str, int] = {}
        self.frozen: Dict[str, torch.dtype] = {}
        #: What was asked for once: it is asked for many times a step.
        self._rooms: Dict[str, Tuple[torch.dtype, int]] = {}
        self._gradients: Dict[str, Tuple[torch.dtype, int]] = {}
        self.gradient = torch.float32 if precision != "bf16" else torch.bfloat16
        #: Of weights whose gradient comes as bfloat16: kept so where nothing is added to it, and it is no mean of several.
        self.split_gradient = torch.float32 if accumulate or ranks > 1 else torch.bfloat16

    def add(self, kind: str, tensor: torch.Tensor) -> Tuple[str, Place]:
        """A place for a parameter."""
        key = kind if kind != FROZEN else f"{FROZEN}:{tensor.dtype}"
        self._rooms.clear()
        self._gradients = {}
        start = self.counts.get(key, 0)
        place = Place(start, tensor.numel())
        self.counts[key] = start + padded(tensor.numel())
        if kind == FROZEN:
            self.frozen[key] = tensor.dtype
        return key, place

    def share(self, key: str) -> int:
        """Elements of a rank's part of the planes of a kind."""
        return padded(-(-self.counts.get(key, 0) // self.ranks))

    def planes(self) -> Dict[str, Tuple[torch.dtype, int]]:
        """Type and elements of every plane, by name: a rank's part of it, which is what is kept in the pool."""
        planes = {key: (dtype, self.share(key)) for key, dtype in self.frozen.items()}
        kept = self.gradient_planes() if self.gradients and not self.passing else {}
        full = self.share(FULL)
        if full:
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            planes.update({name: (dtype, full) for name in ("w", "m", "v")})
            if "g" in kept:
                planes["g"] = kept["g"]
        split_count = self.share(SPLIT)
        if split_count:
            planes["hi"] = (torch.bfloat16, split_count)
            # Low halves, and an eighth as many bytes of ties, as int16.
            planes["lo"] = (torch.int16, split_count + split_count // 16)
            planes.update({name: (torch.float32, split_count) for name in ("sm", "sv")})
            if "sg" in kept:
                planes["sg"] = kept["sg"]
        return planes

    def gradient_planes(self) -> Dict[str, Tuple[torch.dtype, int]]:
        """As :meth:`planes`, of the gradients, wherever they are."""
        if not self._gradients:
            kinds = ((FULL, "g", self.gradient), (SPLIT, "sg", self.split_gradient))
            self._gradients = {name: (dtype, self.share(kind)) for kind, name, dtype in kinds if self.counts.get(kind)}
        return self._gradients

    def room(self, plane: str) -> Tuple[torch.dtype, int]:
        """Type and elements of a plane on the device: the whole of what modules see."""
        if plane not in self._rooms:
            dtype, count = self.planes()[plane]
            self._rooms[plane] = dtype, count * self.ranks if seen(plane) else count
        return self._rooms[plane]


def low_parts(lo: torch.Tensor, count: int, place: Place) -> Tuple[torch.Tensor, torch.Tensor]:
    """Of a ``lo`` plane for ``count`` elements, what is of one parameter: its low halves and its ties."""
    ties = lo[count:].view(torch.uint8)
    first = place.start // 8
    return lo[place.start : place.start + place.count], ties[first : first + -(-place.count // 8)]
