"""Operations on units of a state, with tensors."""

from __future__ import annotations

from typing import Any

import torch


def name_of(device: torch.device) -> str:
    """The device, as the state calls it."""
    return "cpu" if device.type == "cpu" else f"cuda:{device.index}"


def fetch(state: Any, unit: int, tensor: torch.Tensor, event: Any = None, behind: Any = None) -> Any:
    """Begins to copy a unit to a tensor, which has its length, after an event of the device (default: after what was started on it so far). ``behind``: the
    ticket of a store of this state that copies from the tensor, and ends first. The ticket."""
    event = event_on(tensor.device) if event is None else event
    return state.fetch(unit, name_of(tensor.device), tensor.data_ptr(), _handle(event), (tensor, event), behind)


def store(state: Any, unit: int, tensor: torch.Tensor, write: bool) -> Any:
    """Begins to make what a tensor holds, after what was started on the device so far, the unit's bytes. The ticket."""
    event = event_on(tensor.device)
    return state.store(unit, name_of(tensor.device), tensor.data_ptr(), _handle(event), (tensor, event), write)


def event_on(device: torch.device) -> Any:
    """An event after what was started on a device so far; None: it does at once what it is told."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _handle(event: Any) -> int:
    return event.cuda_event if event is not None else 0
