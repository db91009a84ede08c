"""Operations on units of a state, with tensors."""

from __future__ import annotations

from typing import Any

import torch


def name_of(device: torch.device) -> str:
    """The device, as the state calls it."""
    return "cpu" if device.type == "cpu" else f"cuda:{device.index}"


def fetch(state: Any, unit: int, tensor: torch.Tensor) -> Any:
    """Begins to copy a unit to a tensor, which has its length, after what was started on the device so far. The ticket."""
    event = _event(tensor.device)
    return state.fetch(unit, name_of(tensor.device), tensor.data_ptr(), _handle(event), (tensor, event))


def store(state: Any, unit: int, tensor: torch.Tensor, write: bool) -> Any:
    """Begins to make what a tensor holds, after what was started on the device so far, the unit's bytes. The ticket."""
    event = _event(tensor.device)
    return state.store(unit, name_of(tensor.device), tensor.data_ptr(), _handle(event), (tensor, event), write)


def _event(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _handle(event: Any) -> int:
    return event.cuda_event if event is not None else 0
