"""Hugging Face's ``Trainer`` over an offloaded model."""

from __future__ import annotations

from typing import Any

from .._errors import InvalidArgument, NotSupported
from ._optimizer import Optimizer


def adapt(trainer: Any) -> Any:
    """Lets a ``transformers.Trainer`` train a model that was offloaded before, and returns it::

        model, optimizer = nvtier.train.offload(model, ...)
        trainer = nvtier.train.adapt(Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None)))
        trainer.train()
        optimizer.save_pretrained("fine-tuned")

    Clipping goes to the optimizer, each step is committed with the trainer's state, and gradients are cleared as nvtier wants it. The trainer's own checkpoints are refused: they would
    be of a model whose weights are elsewhere.
    """
    optimizer = trainer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise InvalidArgument("adapt(trainer): make the trainer with optimizers=(optimizer, None), and the optimizer that offload() returned")
    if optimizer._manager.ranks is not None:
        raise NotSupported("adapt(trainer): a Trainer under several ranks wraps the model in DistributedDataParallel; a loop of your own trains with ranks")
    strategy = str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy))
    if strategy != "no":
        raise NotSupported(
            f"adapt(trainer): save_strategy={strategy!r}; the run in the pool is the checkpoint: take save_strategy='no', and optimizer.save_pretrained(folder) to write the model"
        )

    def clip(parameters: Any, max_norm: float, norm_type: float = 2.0) -> Any:
        return optimizer.clip_grad_norm_(max_norm, norm_type)

    trainer.accelerator.clip_grad_norm_ = clip

    from transformers import TrainerCallback

    class Committer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer.zero_grad()
            schedule = kwargs.get("lr_scheduler")
            optimizer.commit(
                {"global_step": state.global_step, "epoch": state.epoch, "schedule": _json(schedule.state_dict()) if schedule is not None else None}
            )

    trainer.add_callback(Committer())
    return trainer


def _json(state: Any) -> Any:
    """What JSON has of a scheduler's state."""
    if isinstance(state, dict):
        return {key: _json(value) for key, value in state.items() if not callable(value) and key != "lr_lambdas"}
    if isinstance(state, (list, tuple)):
        return [_json(value) for value in state]
    return state
