"""Parameters that come and go with the modules that use them.

Forward, a block: its weights (fetched ahead) are waited for; where a step is pending for it, its gradients and moments as well, the step is carried out, and
what it changed is written back behind; the module runs; the weights go. Backward: the weights come again, gradients are gathered as they arrive, added to
those of earlier micro-batches, and written back; the weights go.

Nothing here moves a byte between a drive and memory: that is ``_nvtier.State``.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch

from .._errors import Closed, Error, InvalidArgument, OutOfDeviceMemory
from .._units import event_on, fetch, name_of, store
from ._blocks import Block, Param, gradient_plane, moment_planes, weight_plane
from ._planes import FULL, SPLIT, Place, join, low_parts, split
from ._ranks import Alone, Ranks
from ._spill import Spill


#: Elements that a step updates at a time; whole vectors.
_AT_A_TIME = 1 << 23


class Pending:
    """A step whose gradients are there, and which blocks carry out when they are used next."""

    def __init__(self, step: int, groups: Sequence[Dict[str, Any]], clip: Optional[torch.Tensor]) -> None:
        self.step, self.groups, self.clip = step, [dict(group) for group in groups], clip


class Spare:
    """Memory of a plane that is not in use any more."""

    __slots__ = ("tensor", "bytes", "ticket", "event", "ours")

    def __init__(self, tensor: torch.Tensor, ticket: Any, event: Any, ours: bool) -> None:
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        #: A store that copies from it still, or None.
        self.ticket = ticket
        #: After which the device has no use for it.
        self.event = event
        #: Whether nobody else has a part of it (autograd keeps transposed weights): only then it is used again.
        self.ours = ours

    def copied(self) -> bool:
        # After a failure nothing copies any more; who waits for something hears of it.
        with contextlib.suppress(Error):
            if self.ticket is not None and not self.ticket.is_done(copied=True):
                return False
        self.ticket = None
        return True


class Manager:
    def __init__(self, state: Any, blocks: List[Block], rest: Block, device: torch.device, vram: Optional[int], write_at_once: bool, ranks: Optional[Alone] = None) -> None:
        self.state, self.blocks, self.rest, self.device = state, blocks, rest, device
        self.vram = vram
        #: None: one process.
        self.ranks = ranks if isinstance(ranks, Ranks) else None
        #: Whether what is in the RAM share goes to the drive as it is stored, or with a commit.
        self.write_at_once = write_at_once
        #: Whether one pass follows the other, and the first block comes after the last.
        self.cyclic = False
        #: Experts that come one by one.
        self.experts: Any = None
        #: A pool that is closed with it.
        self.closes: Any = None
        #: Where inputs of blocks wait for the backward pass, if they do.
        self.spill: Optional[Spill] = None
        self.pending: Optional[Pending] = None
        #: Whether a block is updated as soon as its gradients are there; and the step that is carried out so, until ``step()`` says that it was one.
        self.steps_in_backward = False
        self.carried: Optional[Pending] = None
        #: What such a step is made with.
        self.begin_step: Any = None
        #: Steps done.
        self.step = 0
        #: Micro-batches that the gathered gradients are of.
        self.gathered = 0
        self.order: List[Block] = []
        #: Of the block that is :meth:`resident`: the whole of what ranks have parts of.
        self._full: Dict[str, torch.Tensor] = {}
        self._seen: List[Block] = []
        self._blanks: Dict[Any, torch.Tensor] = {}
        #: What is in use and copied from, with the ticket.
        self._leaving: List[Tuple[torch.Tensor, Any]] = []
        #: Memory for the planes that come next; counted as in use. The one that became free first is first.
        self._spare: List[Spare] = []
        #: Micro-batches of the last step; None: there was none yet.
        self.micro: Optional[int] = None
        self._in_backward = False
        self._using: Optional[Block] = None
        #: Blocks whose weights are on the device and not in use, the one that was used longest ago first.
        self._idle: List[Block] = []
        self.device_bytes = 0
        self.device_peak = 0
        #: Called before a block is used in a forward pass, and with the bytes that were stored since the last commit.
        self.on_use: Any = None
        self.on_store: Any = None
        self.stored_since_commit = 0

    # Memory on the device

    def _empty(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Memory for a plane that the device writes to."""
        return self._take(dtype, count)[0]

    def _take(self, dtype: torch.dtype, count: int, fetched: bool = False) -> Tuple[torch.Tensor, Optional[Spare]]:
        """Memory for a plane, and what it was. ``fetched``: what comes into it may wait for what is copied from it still."""
        found = self._find(dtype, count, fetched)
        while found is None:
            if self._idle:
                self._evict(self._idle[0])
                nothing = False
            else:
                nothing = not self._reap(wait=True) and not self._give_up_ahead()
            # What was being copied a moment ago may be free now: it is looked at once more before it is given up.
            found = self._find(dtype, count, fetched)
            if found is None and nothing:
                raise self._no_room(count * dtype.itemsize)
        return found

    def _find(self, dtype: torch.dtype, count: int, fetched: bool) -> Optional[Tuple[torch.Tensor, Optional[Spare]]]:
        """As :meth:`_take`, where that takes nothing from anybody."""
        bytes = count * dtype.itemsize
        self._reap()
        alike = [spare for spare in self._spare if spare.ours and spare.bytes == bytes]
        # What the device has had no use for the longest.
        spare = next((spare for spare in alike if spare.copied()), None)
        if spare is None and not self._fits(bytes):
            self._free(bytes)
        if spare is None and self._fits(bytes):
            tensor = torch.empty(count, dtype=dtype, device=self.device)
            self._count(tensor, 1)
            return tensor, None
        if spare is None and fetched:
            spare = next(iter(alike), None)
        if spare is None:
            return None
        self._spare.remove(spare)
        return spare.tensor if spare.tensor.dtype == dtype else spare.tensor.view(dtype), spare

    def _free(self, more: int) -> None:
        """Gives memory back, as far as it takes for so many bytes to fit."""
        for spare in list(self._spare):
            if self._fits(more):
                return
            if spare.copied():
                self._let_go(spare)

    def _let_go(self, spare: Spare) -> None:
        self._spare.remove(spare)
        self.count_bytes(-spare.bytes)

    def makes_room(self, more: int) -> bool:
        """Whether so many bytes fit without anything else having to go."""
        self._reap()
        self._free(more)
        return self._fits(more)

    def _no_room(self, more: int) -> Exception:
        return OutOfDeviceMemory(
            f"nvtier: {more} bytes more of training state than the budget of {self.vram} bytes on {name_of(self.device)}: {self.device_bytes} are in use"
        )

    def _count(self, tensor: torch.Tensor, sign: int) -> None:
        self.count_bytes(sign * tensor.numel() * tensor.element_size())

    def count_bytes(self, more: int) -> None:
        self.device_bytes += more
        self.device_peak = max(self.device_peak, self.device_bytes)

    def _fetch(self, block: Block, plane: str) -> None:
        dtype, count = block.layout.room(plane)
        self._begin_fetch(block, plane, self._take(dtype, count, fetched=True))

    def _begin_fetch(self, block: Block, plane: str, room: Tuple[torch.Tensor, Optional[Spare]]) -> None:
        tensor, spare = room
        # New memory may be what the device is busy with until now.
        event, behind = (spare.event, spare.ticket) if spare is not None else (None, None)
        block.coming[plane] = (tensor, fetch(self.state, block.units[plane], block.part(plane, tensor), event, behind))

    def _store(self, block: Block, plane: str) -> None:
        tensor, part = block.planes[plane], block.mine(plane)
        ticket = store(self.state, block.units[plane], part, self.write_at_once)
        block.stored.add(plane)
        self._leaving.append((tensor, ticket))
        if self.write_at_once or plane not in block.in_ram:
            self.stored_since_commit += part.numel() * part.element_size()

    def _drop(self, block: Block, planes: Sequence[str]) -> None:
        event: Any = None
        for plane in planes:
            tensor = block.planes.pop(plane, None)
            if tensor is None:
                continue
            block.whole.discard(plane)
            # Operations on a unit follow each other: the last one counts.
            tickets = [ticket for other, ticket in self._leaving if other is tensor]
            self._leaving = [entry for entry in self._leaving if entry[0] is not tensor]
            event = event_on(self.device) if event is None else event
            self._put_by(Spare(tensor, tickets[-1] if tickets else None, event, _alone(tensor)))

    def _put_by(self, spare: Spare) -> None:
        """Of memory that is not in use any more; where it cannot be used again, it goes as soon as nothing copies from it."""
        if (self.vram is None or not spare.ours) and spare.copied():
            self._count(spare.tensor, -1)
        else:
            self._spare.append(spare)

    def _reap(self, wait: bool = False) -> bool:
        """Takes note of what was copied; with ``wait`` waits for one copy. False: there is none to wait for."""
        waited = next((spare.ticket for spare in self._spare if not spare.copied()), None) if wait else None
        if waited is None and wait and self._leaving:
            waited = self._leaving[0][1]
        if waited is not None:
            waited.wait(copied=True)
        self._leaving = [entry for entry in self._leaving if not entry[1].is_done(copied=True)]
        for spare in [spare for spare in self._spare if (self.vram is None or not spare.ours) and spare.copied()]:
            self._let_go(spare)
        if self.spill is not None:
            self.spill.reap()
        return waited is not None

    def settle(self, block: Block) -> None:
        """Waits until nothing of a block is being copied from: it is about to be changed."""
        for tensor, ticket in self._leaving:
            if any(tensor is mine for mine in block.planes.values()):
                ticket.wait(copied=True)
        self._reap()

    def _fits(self, more: int) -> bool:
        return self.vram is None or self.device_bytes + more <= self.vram

    def _evict(self, block: Block) -> None:
        self._idle.remove(block)
        self._drop(block, list(block.planes))

    def _give_up_ahead(self) -> bool:
        """Lets go of what was fetched ahead, or for another order than the one that came; False: there is nothing."""
        using = self._using
        course = [] if using is None else [block for block, _ in self._course(using, self._in_backward)]
        # What is needed last goes first.
        for block in [*(block for block in self.blocks if block not in course), *reversed(course)]:
            if block.coming and block is not using:
                self._give_up(block)
                return True
        return False

    def _give_up(self, block: Block) -> None:
        for tensor, ticket in block.coming.values():
            # What came for nothing may have failed: who needs something hears of it.
            with contextlib.suppress(Error):
                ticket.wait()
            self._put_by(Spare(tensor, None, None, _alone(tensor)))
        block.coming.clear()

    # Coming

    def _planes_for(self, block: Block, backward: bool) -> List[str]:
        planes = [] if backward and block.forward_only else block.weight_planes()
        if self._owes(block) and not backward:
            planes = block.weight_planes() + block.state_planes() + block.gradient_planes()
        elif backward and self.gathered > 0 and block.trainable:
            planes = planes + block.gradient_planes()
        return planes

    def _owes(self, block: Block) -> bool:
        return self.pending is not None and bool(block.owed)

    def _ahead(self, block: Block, backward: bool) -> None:
        """Begins to fetch what the blocks after this one will need, in their order, as far as the budget has room. What a nearer one needs stays for it."""
        nearer, gradients = [block], None
        course = self._course(block, backward)
        for following, in_backward in itertools.chain([(block, True)], course) if backward else course:
            if self.vram is None and len(nearer) > 2:
                return
            planes = self._planes_for(following, in_backward)
            if in_backward and self.steps_in_backward and following.trainable:
                planes = following.weight_planes() + following.state_planes()
            # Inputs of blocks that come back are needed sooner.
            keep = 2 * self.spill.largest if self.spill is not None else 0
            if backward and not in_backward:
                # Of the step that this backward pass is the last one of; gradients are not there yet.
                planes = following.weight_planes() + following.state_planes()
            if backward or in_backward:
                gradients = self._for_gradients(block, backward) if gradients is None else gradients
                keep += gradients
            for plane in planes:
                if plane in following.planes or plane in following.coming or plane not in following.stored:
                    continue
                room = self._room_ahead(*following.layout.room(plane), keep, [*nearer, following])
                if room is None:
                    return
                self._begin_fetch(following, plane, room)
            nearer.append(following)

    def _room_ahead(self, dtype: torch.dtype, count: int, keep: int, nearer: List[Block]) -> Optional[Tuple[torch.Tensor, Optional[Spare]]]:
        """Memory for what is fetched ahead, where ``keep`` bytes are left beside it, and ``nearer`` blocks stay."""
        bytes = count * dtype.itemsize
        while True:
            spare = sum(spare.bytes for spare in self._spare)
            if self.vram is None or self.device_bytes - spare + bytes + keep <= self.vram:
                found = self._find(dtype, count, fetched=True)
                if found is not None:
                    return found
            far = [idle for idle in self._idle if idle not in nearer]
            free = sum(spare.bytes for spare in self._spare if spare.copied()) - self.device_bytes + (self.vram or 0)
            # Nothing goes that is not enough.
            enough = free + sum(tensor.numel() * tensor.element_size() for idle in far for tensor in idle.planes.values()) >= bytes + keep
            if not far or not enough:
                return None
            self._evict(far[0])

    def _for_gradients(self, block: Block, backward: bool) -> int:
        """Bytes that the gradients of the two blocks will need whose backward passes come first."""
        course = itertools.chain([(block, True)] if backward else [], self._course(block, backward))
        coming = itertools.islice((other for other, in_backward in course if in_backward), 2)
        missing = ((other, plane) for other in coming for plane in other.layout.gradient_planes() if plane not in other.planes)
        return sum(dtype.itemsize * count for dtype, count in (other.layout.gradient_planes()[plane] for other, plane in missing))

    def _course(self, block: Block, backward: bool) -> Iterator[Tuple[Block, bool]]:
        """What will be used after a block, and whether in a backward pass: the rest of the forward pass, then back to the first block, then, where the
        next forward pass carries out a step, forward again."""
        order = self.order or self.blocks
        if block not in order:
            return
        index, forward = order.index(block), not backward
        if self.cyclic:
            yield from ((other, False) for other in order[index + 1 :] + order[:index])
            return
        if not backward:
            yield from ((other, False) for other in order[index + 1 :])
            if not torch.is_grad_enabled():
                return
            index = len(order)
        yield from ((other, True) for other in reversed(order[:index]))
        if not forward and self.micro == self.gathered + 1 and not self.steps_in_backward:
            yield from ((other, False) for other in order)

    def _bring(self, block: Block, planes: Sequence[str], ahead: Optional[bool] = None) -> None:
        """Waits for planes of a block. ``ahead``: what comes after them, in a forward (False) or backward pass, is asked for first, so that nothing pauses."""
        self._using = block
        if block in self._idle:
            self._idle.remove(block)
        for plane in planes:
            if plane in block.planes or plane in block.coming:
                continue
            dtype, count = block.layout.room(plane)
            if plane in block.stored:
                self._fetch(block, plane)
            else:
                # Moments before the first step.
                block.planes[plane] = self._empty(dtype, count).zero_()
        if ahead is not None:
            self._ahead(block, ahead)
        for plane in planes:
            if plane in block.coming:
                tensor, ticket = block.coming.pop(plane)
                ticket.wait()
                block.planes[plane] = tensor

    def _bind(self, block: Block) -> None:
        if self.ranks is not None:
            self.ranks.whole(block)
        if block.bound:
            return
        for param in block.params:
            plane = weight_plane(param)
            if plane in block.planes:
                # Also of another type: what a Linear is given under autocast.
                param.param.data = block.view(param, plane).view(param.param.shape)
        block.bound = True

    def _blank(self, param: Param, dtype: torch.dtype) -> torch.Tensor:
        """Shape and type of a parameter, without its memory."""
        one = self._blanks.get(dtype)
        if one is None:
            one = self._blanks[dtype] = nothing(dtype, self.device)
        return one.expand(param.param.shape)

    def _release(self, block: Block) -> None:
        """A block is not in use any more: what an update needed goes, its weights when their room is needed."""
        if block is self.rest or block.keep:
            return
        if block.bound:
            for param in block.params:
                param.param.data = self._blank(param, param.param.dtype)
            block.bound = False
        weights = block.weight_planes() if self.vram is not None else []
        self._drop(block, [plane for plane in block.planes if plane not in weights])
        if self.ranks is not None:
            # What is still there, and so whether the others' parts have to be gathered again, must not differ between ranks.
            block.whole.clear()
        if block.planes and block not in self._idle:
            self._idle.append(block)

    def drop_all(self) -> None:
        """After an interrupted pass: everything goes but what stays."""
        for block in self.blocks:
            self._give_up(block)
            for tensor in block.incoming.values():
                self._count(tensor, -1)
            block.incoming.clear()
            block.in_backward = False
            self._release(block)
        for block in list(self._idle):
            self._evict(block)
        self._reap()
        for spare in [spare for spare in self._spare if spare.copied()]:
            self._let_go(spare)
        self._in_backward = False

    # Hooks

    def attach(self) -> None:
        for block in self.blocks:
            assert block.module is not None
            block.handles.append(block.module.register_forward_pre_hook(self._before(block), with_kwargs=True))
            block.handles.append(block.module.register_forward_hook(self._after(block), always_call=True))
            for index, param in enumerate(block.params):
                if param.trainable:
                    hook = self._arrived(block, index)
                    block.handles.append(param.param.register_post_accumulate_grad_hook(hook))

    def detach(self, closed: bool) -> None:
        def refuse(module: Any, args: Any) -> None:
            raise Closed("this model was closed, and its parameters went with it: load the model again")

        for block in self.blocks:
            for handle in block.handles:
                handle.remove()
            block.handles.clear()
            if closed:
                assert block.module is not None
                block.module.register_forward_pre_hook(refuse)

    def _before(self, block: Block) -> Any:
        mixed = SPLIT in block.layout.counts

        def before(module: Any, args: Any, kwargs: Any) -> None:
            if mixed and not torch.is_autocast_enabled(self.device.type):
                raise InvalidArgument(
                    f"precision='mixed' is training under torch.autocast({self.device.type!r}, dtype=torch.bfloat16), and the model is called without it"
                )
            if torch._C._current_graph_task_id() != -1:
                # What checkpointing computes again.
                self._enter_backward(block)
                return
            if self.carried is not None:
                raise InvalidArgument("backward() has updated weights already (step_in='backward'), and step() has to follow before the model is used again")
            if self.on_use is not None:
                self.on_use()
            self._note(block)
            self.use(block)
            if torch.is_grad_enabled():
                if self.spill is not None:
                    self.spill.enter(block, [*args, *kwargs.values()])
                for value in [*args, *kwargs.values()]:
                    if isinstance(value, torch.Tensor) and value.requires_grad:
                        self._await_gradient(block, value)
            self._ahead(block, backward=False)

        return before

    def _after(self, block: Block) -> Any:
        def after(module: Any, args: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            if self.spill is not None:
                self.spill.leave()
            tensor = _first_tensor(output)
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                tensor.register_hook(lambda gradient: self._enter_backward(block))
                if self.order and block is self.order[-1]:
                    # Its backward comes at once.
                    return
            self._release(block)

        return after

    def _await_gradient(self, block: Block, tensor: torch.Tensor) -> None:
        """A block's weights are needed until the gradients of its parameters *and* of its inputs are there: either may be first."""
        token = _Token()
        block.waiting.add(token)

        def there(gradient: torch.Tensor) -> None:
            block.waiting.discard(token)
            self._perhaps_gather(block)

        tensor.register_hook(there)

    def _perhaps_gather(self, block: Block) -> None:
        if not block.in_backward or block.waiting:
            return
        if self.ranks is not None and block.expected is None:
            # What has no gradient here may have one elsewhere, and all ranks have to go on at the same moment.
            block.expected = self.ranks.expected(block)
        if len(block.arrived) == (len(block.trainable) if block.expected is None else block.expected):
            self._gather(block)

    def _note(self, block: Block) -> None:
        if block in self._seen:
            self.order, self._seen = self._seen, []
        self._seen.append(block)

    def use(self, block: Block) -> None:
        """Has a block's weights on the device, of the last step."""
        self._bring_up(block)
        self._bind(block)

    def _bring_up(self, block: Block) -> None:
        self._bring(block, self._planes_for(block, backward=False), ahead=False)
        if self._owes(block):
            self._apply(block)

    def _enter_backward(self, block: Block) -> None:
        if not self._in_backward:
            if self.carried is not None:
                raise InvalidArgument("a second backward() before step(): step_in='backward' is for one micro-batch a step")
            self._in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        if block.in_backward:
            return
        if self._owes(block):
            raise RuntimeError(f"nvtier: the block {block.name} is in a backward pass whose forward pass was before the last step")
        block.in_backward = True
        if self.spill is not None:
            self.spill.ahead(block)
        self._bring(block, self._planes_for(block, backward=True), ahead=True if self.spill is None else None)
        self._bind(block)
        if self.spill is not None:
            for before, _ in itertools.islice(self._course(block, True), 1):
                self.spill.ahead(before)
        self._ahead(block, backward=True)

    def _arrived(self, block: Block, index: int) -> Any:
        entry = block.params[index]

        def arrived(parameter: torch.Tensor) -> None:
            if not block.in_backward:
                self._enter_backward(block)
            gradient = parameter.grad
            parameter.grad = None
            if gradient is None:
                return
            if self.ranks is not None:
                self.ranks.take(self, block, index, gradient)
                self._perhaps_gather(block)
                return
            plane = gradient_plane(entry)
            if plane not in block.planes:
                dtype, count = block.layout.gradient_planes()[plane]
                # What has no gradient is not read.
                block.planes[plane] = self._empty(dtype, count)
            into = block.view(entry, plane)
            with torch.no_grad():
                if index in block.graded:
                    if into.dtype != torch.float32 and entry.kind == SPLIT:
                        raise RuntimeError(
                            "nvtier: gradients of several micro-batches are added up, and accumulate=False was promised to offload()"
                        )
                    into.add_(gradient.view(-1))
                else:
                    into.copy_(gradient.view(-1))
                block.graded.add(index)
            # A plane that is looked at is not put by.
            del into
            block.arrived.add(index)
            self._perhaps_gather(block)

        return arrived

    def _gather(self, block: Block) -> None:
        """The gradients of a block are there."""
        if self.ranks is not None:
            self.ranks.reduce(self, block)
        elif not self.steps_in_backward:
            self._note_norms(block)
        block.arrived.clear()
        block.expected = None
        block.in_backward = False
        if self.steps_in_backward and block.graded:
            if self.carried is None:
                self.carried = self.begin_step()
            self._bring(block, block.weight_planes() + block.state_planes())
            self._update(block, self.carried, block.graded)
        else:
            for plane in block.gradient_planes():
                if plane in block.planes:
                    self._store(block, plane)
        self._release(block)
        self._stored()

    def _note_norms(self, block: Block) -> None:
        """Of the gradients that came in this pass, with those of the micro-batches before: the last one that is noted is the one of all of them."""
        for kind, dtype in ((SPLIT, torch.float32), (FULL, None)):
            came = [index for index in block.arrived if block.params[index].kind == kind]
            if came:
                parts = [block.view(block.params[index], gradient_plane(block.params[index])) for index in came]
                block.norms.update(zip(came, torch._foreach_norm(parts, 2.0, dtype)))

    def _end_backward(self) -> None:
        self._in_backward = False
        for block in self.blocks:
            if block.in_backward:
                self._gather(block)
        self.gathered += 1
        self._reap()

    # Steps

    def _apply(self, block: Block) -> None:
        """Carries out the pending step on a block whose planes are all there."""
        assert self.pending is not None
        self._update(block, self.pending, block.owed)
        block.owed = set()
        self._drop(block, block.state_planes() + block.gradient_planes())
        self._stored()

    def _update(self, block: Block, pending: Pending, indices: Set[int]) -> None:
        self.settle(block)
        with torch.no_grad():
            self.update(block, pending, {index: block.own(block.params[index], gradient_plane(block.params[index])) for index in indices})
        block.whole.clear()
        for plane in block.weight_planes() + block.state_planes():
            if not plane.startswith("frozen"):
                self._store(block, plane)

    def _stored(self) -> None:
        if self.on_store is not None:
            self.on_store(self.stored_since_commit)

    def update(self, block: Block, pending: Pending, gradients: Dict[int, torch.Tensor]) -> None:
        for index in sorted(gradients):
            entry = block.params[index]
            entry.steps += 1
            gradient = gradients[index]
            # A fill, where a tensor made of a number would be a copy from the host that everything waits for.
            step = torch.full((), float(entry.steps), dtype=torch.float32, device=self.device)
            # None: it lies in the parts of other ranks.
            for first in range(0, gradient.numel(), _AT_A_TIME):
                self._update_some(block, entry, gradient[first : first + _AT_A_TIME], first, step, pending)

    def _update_some(self, block: Block, entry: Param, gradient: torch.Tensor, first: int, step: torch.Tensor, pending: Pending) -> None:
        """Some elements of a parameter: what a step makes for itself is small so, and each element's numbers are its own."""
        count, group = gradient.numel(), pending.groups[entry.group]
        gradient = _as_master(gradient, entry)
        if pending.clip is not None:
            torch._foreach_mul_([gradient], pending.clip)
        m, v = (block.own(entry, plane)[first : first + count] for plane in moment_planes(entry))
        if entry.kind == SPLIT:
            high, low = block.own(entry, "hi")[first : first + count], self._low(block, entry, first, count)
            weight = join(high, *low, self.state)
        else:
            weight = block.own(entry, "w")[first : first + count]
        torch._fused_adamw_(
            [weight],
            [gradient],
            [m],
            [v],
            [],
            [step],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )
        if entry.kind == SPLIT:
            split(weight, high, *low, self.state)

    def _low(self, block: Block, entry: Param, first: int, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
        return low_parts(block.planes["lo"], block.layout.share(SPLIT), Place(block.piece(entry).start + first, count))

    def _master(self, block: Block, entry: Param) -> torch.Tensor:
        if entry.kind == FULL:
            return block.own(entry, "w")
        return join(block.own(entry, "hi"), *self._low(block, entry, 0, block.piece(entry).length), self.state)

    def master(self, block: Block, entry: Param) -> torch.Tensor:
        """A copy of a parameter's weights as they are trained, on the host. The block's planes are there."""
        if entry.kind == SPLIT:
            whole = self._part_of("master", entry) if self.ranks is not None else self._master(block, entry)
            return whole.view(entry.param.shape).cpu()
        return block.view(entry, weight_plane(entry)).view(entry.param.shape).detach().cpu().clone()

    def moments(self, block: Block, entry: Param) -> List[torch.Tensor]:
        """Copies of a parameter's moments on the host. The block's planes are there."""
        planes = moment_planes(entry)
        parts = [block.view(entry, plane) if self.ranks is None else self._part_of(plane, entry) for plane in planes]
        return [part.view(entry.param.shape).cpu().clone() for part in parts]

    def _part_of(self, plane: str, entry: Param) -> torch.Tensor:
        return self._full[plane][entry.place.start : entry.place.start + entry.place.count]

    @contextlib.contextmanager
    def resident(self, block: Block, moments: bool) -> Iterator[None]:
        """Has what :meth:`master`, or with ``moments`` :meth:`moments`, needs of a block on the device."""
        if block is not self.rest:
            wanted = block.state_planes() if moments else block.weight_planes() + [plane for plane in block.units if plane == "lo"]
            self._bring(block, wanted)
        if self.ranks is not None:
            planes = [plane for plane in block.state_planes() if plane != "lo"] if moments else ["master"] if "lo" in block.units else []
            self._full = self.ranks.full(block, planes)
            self.ranks.whole(block)
        try:
            yield
        finally:
            self._full = {}
            self._release(block)

    def catch_up(self) -> None:
        """Carries out the pending step on all blocks."""
        if self._in_backward or any(block.in_backward for block in self.blocks):
            raise InvalidArgument("a backward pass is under way")
        for block in self.order or self.blocks:
            if self._owes(block):
                self._bring_up(block)
                self._release(block)

    def store_rest(self) -> None:
        """Writes back what stays on the device."""
        for plane in self.rest.units:
            if plane not in self.rest.gradient_planes():
                self._store(self.rest, plane)


def nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a weight that is not there is made of: whoever uses it all the same gets no number, instead of a wrong one."""
    if dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return torch.full((1,), float("nan"), dtype=dtype, device=device)
    return torch.zeros(1, dtype=dtype, device=device)


def _alone(tensor: torch.Tensor) -> bool:
    """Whether no other tensor has a part of this one's memory."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    # One is the tensor's, one is what is asked with.
    return count is not None and count(tensor.untyped_storage()._cdata) <= 2


class _Token:
    __slots__ = ("__weakref__",)


def _as_master(gradient: torch.Tensor, entry: Param) -> torch.Tensor:
    """As plain PyTorch has it: the gradient of a float32 weight is float32."""
    return gradient.float() if entry.kind == SPLIT and gradient.dtype != torch.float32 else gradient


def _first_tensor(output: Any) -> Optional[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        output = output.values()
    if hasattr(output, "__iter__"):
        for value in output:
            if isinstance(value, torch.Tensor):
                return value
    return None
