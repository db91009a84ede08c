"""Learning rates as aiDAPTIV names them, by torch's own schedulers, a step an update."""

from __future__ import annotations

from typing import Any, Dict

import torch
from torch.optim import lr_scheduler

#: ``run_settings.lr_scheduler.mode``.
NAMES = {
    -1: "constant",
    0: "LinearLR(start_factor=0.5, total_iters=20)",
    1: "CosineAnnealingLR(T_max=150)",
    2: "ExponentialLR(gamma=0.99)",
    3: "MultiplicativeLR(0.95)",
    4: "StepLR(step_size=30, gamma=0.1)",
    5: "MultiStepLR(milestones=[30, 80], gamma=0.1)",
}


def _same(epoch: int) -> float:
    return 1.0


def _shrink(epoch: int) -> float:
    return 0.95


def make(mode: int, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """The scheduler of a mode."""
    if mode == -1:
        return lr_scheduler.LambdaLR(optimizer, _same)
    if mode == 0:
        return lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=20)
    if mode == 1:
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=150)
    if mode == 2:
        return lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    if mode == 3:
        return lr_scheduler.MultiplicativeLR(optimizer, _shrink)
    if mode == 4:
        return lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    if mode == 5:
        return lr_scheduler.MultiStepLR(optimizer, milestones=[30, 80], gamma=0.1)
    raise ValueError(f"no scheduler of mode {mode}")


def save(scheduler: lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """What makes an equal scheduler go on as this one, for JSON. Rates are kept themselves: most schedulers compute the next from the last."""
    plain = {key: value for key, value in scheduler.state_dict().items() if _is_plain(value)}
    return {"state": plain, "lr": [float(group["lr"]) for group in optimizer.param_groups]}


def restore(saved: Dict[str, Any], scheduler: lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what ``save`` gave."""
    state = scheduler.state_dict()
    state.update(saved["state"])
    scheduler.load_state_dict(state)
    for group, lr in zip(optimizer.param_groups, saved["lr"]):
        group["lr"] = lr


def _is_plain(value: Any) -> bool:
    # Lambdas and the milestones' Counter stay those of the scheduler that was made.
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)
