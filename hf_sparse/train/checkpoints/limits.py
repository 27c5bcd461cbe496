"""What is refused before training because no checkpoint of it would be whole, safe, or good to go on from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from .state import encode

_REFUSED = {
    "enable_jit_checkpoint": "it saves amid a step, under the name of a whole checkpoint",
    "save_only_model": "no run could go on from its checkpoints",
    "save_on_each_node": "the nodes would each hold a part of a checkpoint",
}


def check_supported(training: TrainingArguments) -> None:
    """Raise ValueError for settings of transformers under which a checkpoint would not be one."""
    for name, reason in _REFUSED.items():
        if getattr(training, name):
            raise ValueError(f"{name}=True is not supported: {reason}; leave it out.")
    if training.device.type == "xla":
        raise ValueError("checkpoints of a training on XLA devices are not supported; set save_strategy=no.")


def check_optimizer(trainer: Any) -> None:
    """Raise ValueError for an optimizer whose state is more than tensors and numbers, as one step of another shows."""
    wanted = OptimizerNames(trainer.args.optim).value
    if trainer.optimizer is not None:
        optimizer = trainer.optimizer
    else:
        try:
            chosen = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
                trainer.args, trainer.model
            )
        except ImportError as error:
            raise ValueError(
                f"optim={wanted} needs a library that is not here ({' '.join(str(error).split())}); "
                "install it, or use optim=adamw_torch."
            ) from None
        optimizer_class, options = chosen
        if special := options.keys() & {"model", "optimizer_dict", "params"}:
            raise ValueError(
                f"optim={wanted} needs {special.pop()} of its own, whose state is not tensors and "
                "numbers alone; use optim=adamw_torch."
            )
        weight = torch.nn.Parameter(torch.zeros(2, 2, device=trainer.args.device))
        weight.grad = torch.zeros_like(weight)
        optimizer = optimizer_class([weight], **options)
        optimizer.step()
    try:
        encode(optimizer.state_dict(), {}, "its state")
    except ValueError as error:
        raise ValueError(
            f"optim={wanted} cannot be saved safely: {error.args[0].rstrip('.')}; use optim=adamw_torch."
        ) from None
