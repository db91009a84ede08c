"""Which parts of a model stream, and what is known of each."""

from __future__ import annotations

import weakref
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch

from .._errors import InvalidArgument, NotSupported
from ._planes import FROZEN, FULL, SPLIT, Layout, Place, seen


class Param:
    """A parameter of a block."""

    __slots__ = ("name", "param", "kind", "key", "place", "group", "steps")

    def __init__(self, name: str, param: torch.nn.Parameter, kind: str, key: str, place: Place) -> None:
        self.name, self.param, self.kind, self.key, self.place = name, param, kind, key, place
        self.group = -1
        #: Times that it was updated: one without a gradient is not.
        self.steps = 0

    @property
    def trainable(self) -> bool:
        return self.kind != FROZEN


class Piece(NamedTuple):
    """What of a parameter lies in this rank's part of its planes."""

    #: Where in the part, where in the parameter, and how many elements; none: it is all another rank's.
    start: int
    skip: int
    length: int


class Block:
    """Parameters that come and go together. ``module`` None: those that stay."""

    def __init__(self, name: str, module: Optional[torch.nn.Module], layout: Layout, rank: int = 0) -> None:
        self.name, self.module, self.layout, self.rank = name, module, layout, rank
        self.params: List[Param] = []
        #: Number of the state's unit of each plane; set by :meth:`number`.
        self.units: Dict[str, int] = {}
        self._weights: List[str] = []
        self._states: List[str] = []
        self._gradients: List[str] = []
        #: Planes that were stored: the state has them, or will have before it is asked.
        self.stored: Set[str] = set()
        #: Planes of the RAM share.
        self.in_ram: Set[str] = set()
        #: What is on the device.
        self.planes: Dict[str, torch.Tensor] = {}
        #: On their way there: the tensors and tickets.
        self.coming: Dict[str, Tuple[torch.Tensor, Any]] = {}
        #: Parameters that have a gradient of the step that is gathered, by place in ``params``.
        self.graded: Set[int] = set()
        #: Those that had one of the step before, which is not carried out yet.
        self.owed: Set[int] = set()
        #: Of these, what came in this backward.
        self.arrived: Set[int] = set()
        #: Norms of the gradients, by place in ``params``; device scalars.
        self.norms: Dict[int, torch.Tensor] = {}
        #: Planes of which the whole is there, not only this rank's part.
        self.whole: Set[str] = set()
        #: This rank's gradients of this micro-batch, whole, by plane; planes that hold the sum of the micro-batches before.
        self.incoming: Dict[str, torch.Tensor] = {}
        self.summed: Set[str] = set()
        #: Parameters that get a gradient in this backward pass, where that is counted.
        self.expected: Optional[int] = None
        self.in_backward = False
        #: One for each input whose gradient is not there; they go with the graph.
        self.waiting: "weakref.WeakSet[Any]" = weakref.WeakSet()
        self.bound = False
        #: Stays on the device once it is there.
        self.keep = False
        self.handles: List[Any] = []
        #: Its backward needs no weights.
        self.forward_only = isinstance(module, torch.nn.Embedding)

    @property
    def trainable(self) -> List[Param]:
        return [param for param in self.params if param.trainable]

    def number(self, plane: str, unit: int) -> None:
        """Has a plane be a unit of the state."""
        if plane not in self.units:
            # Asked for many times a step.
            (self._weights if seen(plane) else self._gradients if plane in ("g", "sg") else self._states).append(plane)
        self.units[plane] = unit

    def weight_planes(self) -> List[str]:
        """What its forward and backward need."""
        return self._weights

    def state_planes(self) -> List[str]:
        """What an update needs besides, the gradients aside."""
        return self._states

    def gradient_planes(self) -> List[str]:
        return self._gradients

    def view(self, param: Param, plane: str) -> torch.Tensor:
        """A parameter's part of a plane, flat."""
        place = param.place
        return self.planes[plane][place.start : place.start + place.count]

    def piece(self, param: Param) -> Piece:
        """Where a parameter's elements are in this rank's part. Parts begin at whole vectors, as parameters do."""
        share = self.layout.share(param.key)
        first, place = self.rank * share, param.place
        start = min(max(place.start, first), first + share)
        end = min(max(place.start + place.count, first), first + share)
        return Piece(start - first, start - place.start, end - start)

    def mine(self, plane: str) -> torch.Tensor:
        """This rank's part of a plane."""
        return self.part(plane, self.planes[plane])

    def part(self, plane: str, tensor: torch.Tensor) -> torch.Tensor:
        """Of a tensor for a plane, what is this rank's."""
        if self.layout.ranks == 1 or not seen(plane):
            return tensor
        share = tensor.numel() // self.layout.ranks
        return tensor[self.rank * share : (self.rank + 1) * share]

    def own(self, param: Param, plane: str) -> torch.Tensor:
        """What of a parameter lies in this rank's part of a plane, flat."""
        piece = self.piece(param)
        return self.mine(plane)[piece.start : piece.start + piece.length]


def _of(kind: str, *names: str) -> str:
    return names[0] if kind == FULL else names[1]


def gradient_plane(param: Param) -> str:
    return _of(param.kind, "g", "sg")


def moment_planes(param: Param) -> Tuple[str, str]:
    return _of(param.kind, "m", "sm"), _of(param.kind, "v", "sv")


def weight_plane(param: Param) -> str:
    return {FULL: "w", SPLIT: "hi"}.get(param.kind, param.key)


def find_blocks(model: torch.nn.Module, wanted: Optional[Iterable[torch.nn.Module]]) -> List[Tuple[str, torch.nn.Module]]:
    """The modules that stream, in the order of the model. Default: the layers of the longest lists of modules, and what is as large outside."""
    names = {module: name for name, module in model.named_modules()}
    if wanted is not None:
        blocks = list(wanted)
        for block in blocks:
            if block not in names:
                raise InvalidArgument(f"blocks: a {type(block).__name__} that is no part of the model")
        _refuse_nested(blocks)
        return sorted(((names[block], block) for block in blocks), key=lambda entry: list(names).index(entry[1]))
    blocks = []
    taken: Set[torch.nn.Module] = set()
    for module in model.modules():
        if module in taken or not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) or len(module) < 2:
            continue
        for child in module:
            if any(True for _ in child.parameters()):
                blocks.append(child)
        taken.update(module.modules())
    if not blocks:
        raise InvalidArgument(
            "this model has no list of layers (nn.ModuleList, nn.Sequential): name the modules that stream by blocks=[...]"
        )
    mean = sum(_bytes(block) for block in blocks) / len(blocks)
    inside = {param for block in blocks for param in block.parameters()}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        leaf = isinstance(module, (torch.nn.Embedding, torch.nn.Linear))
        if leaf and module not in taken and own and not any(param in inside for param in own) and _bytes(module) > mean / 2:
            blocks.append(module)
    order = {module: index for index, module in enumerate(model.modules())}
    blocks.sort(key=lambda block: order[block])
    return [(names[block], block) for block in blocks]


def _refuse_nested(blocks: Sequence[torch.nn.Module]) -> None:
    for block in blocks:
        for other in blocks:
            if other is not block and any(module is other for module in block.modules()):
                raise InvalidArgument("blocks: one of them is a part of another one")


def _bytes(module: torch.nn.Module) -> int:
    return sum(param.numel() * param.element_size() for param in module.parameters())


def take_apart(
    model: torch.nn.Module,
    found: Sequence[Tuple[str, torch.nn.Module]],
    precision: str,
    accumulate: bool,
    passing: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> Tuple[List[Block], Block]:
    """The blocks, and the block of what stays: parameters outside of blocks, and those that several of them share. Of each, what rank ``rank`` has."""
    owners: Dict[torch.nn.Parameter, Set[str]] = {}
    linear: Set[torch.nn.Parameter] = set()
    for name, module in found:
        for param in module.parameters():
            owners.setdefault(param, set()).add(name)
    inside = {module for _, block in found for module in block.modules()}
    for module in model.modules():
        # Subclasses may do anything with their weights.
        if type(module) is torch.nn.Linear:
            linear.add(module.weight)
        if module not in inside:
            for param in module.parameters(recurse=False):
                owners.setdefault(param, set()).add("")
    other_uses = _uses_outside_linear(model)
    blocks = {name: Block(name, module, Layout(precision, accumulate, ranks=ranks, passing=passing), rank) for name, module in found}
    # Its gradients stay where autograd puts them.
    rest = Block("", None, Layout(precision, accumulate, gradients=False, ranks=ranks), rank)
    for name, param in model.named_parameters():
        of = owners[param]
        block = blocks[next(iter(of))] if len(of) == 1 and "" not in of else rest
        _check(name, param, precision)
        if not param.requires_grad:
            kind = FROZEN
        elif precision == "mixed" and block is not rest and param in linear and param not in other_uses:
            kind = SPLIT
        else:
            kind = FULL
        key, place = block.layout.add(kind, param)
        block.params.append(Param(name, param, kind, key, place))
    return [block for block in blocks.values() if block.params], rest


def _uses_outside_linear(model: torch.nn.Module) -> Set[torch.nn.Parameter]:
    """Parameters that some module other than an ``nn.Linear`` has as its own as well."""
    found: Set[torch.nn.Parameter] = set()
    for module in model.modules():
        if type(module) is not torch.nn.Linear:
            found.update(module.parameters(recurse=False))
        elif module.bias is not None:
            found.add(module.bias)
    return found


def _check(name: str, param: torch.nn.Parameter, precision: str) -> None:
    if type(param) not in (torch.nn.Parameter,):
        raise NotSupported(f"the parameter {name} is a {type(param).__name__}: ordinary parameters are supported")
    if param.is_sparse or (param.requires_grad and not param.data.is_contiguous()):
        raise NotSupported(f"the parameter {name} is sparse or has gaps: dense, contiguous parameters are supported")
    if param.numel() == 0:
        raise NotSupported(f"the parameter {name} is empty")
    if not param.requires_grad:
        return
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    if param.dtype != wanted:
        raise InvalidArgument(
            f"precision={precision!r} trains parameters of {wanted}, and {name} is of {param.dtype}: convert the model first, or freeze it"
        )
