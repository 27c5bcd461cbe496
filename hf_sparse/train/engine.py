"""Which ways of spreading a training over devices can run a pattern, and what their shared-out weights need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..hf import settings
from ..hf.describe import preview_layer
from ..hf.routing import attention_layers

_REFUSED = {
    "label_smoothing_factor": "is not part of this objective; leave it out",
    "use_liger_kernel": "puts another output head into the model, which this objective runs in chunks; leave it out",
    "torch_compile": "follows one attention, and teacher and student take turns at it; leave it out",
}
_SHARED_OUT = {
    "cp": "context parallelism (ring attention) gives each process some of the tokens, of which a pattern needs all",
    "sp": "sequence parallelism (Ulysses) cuts the targets of a sample apart, which this objective does not follow",
    "tp": "tensor parallelism divides the weights that LoRA is put around here",
}


def check_engine(training: Any) -> None:
    """Raise ValueError for ways to spread a training that cannot run a pattern, or this objective."""
    if training.n_gpu > 1:
        raise ValueError(
            f"one process would share {training.n_gpu} GPUs (DataParallel), which splits the mask of a batch; start "
            "one process per GPU with accelerate launch."
        )
    for name, reason in _REFUSED.items():
        if value := getattr(training, name):
            raise ValueError(f"{name}={value} {reason}.")
    if training.fp16 and training.device.type == "cpu":
        raise ValueError("fp16=True needs an accelerator; on a CPU use bf16=True, or neither.")
    for kind, reason in _SHARED_OUT.items():
        if (size := _parallel_size(training, kind)) > 1:
            raise ValueError(
                f"{kind}_size={size}: {reason}; share out samples and weights instead (multi_gpu, fsdp2 or "
                "deepspeed_zero3 of recipes/accelerate)."
            )
    _check_fsdp(training)
    if _zero_stage(training) == 3 and not _zero_settings(training).get(_GATHERED):
        raise ValueError(
            f"ZeRO-3 without {_GATHERED} cannot save the adapter; set it (zero3_save_16bit_model: true in the file of "
            "accelerate)."
        )


def check_backend_trains(training: Any, model: Any, length: int) -> None:
    """Raise ValueError where the backend that was asked for cannot train the patched model on this device.

    Args:
        length: tokens of a sample.
    """
    current = settings(model)
    assert current is not None, "the model is patched first"
    if current.backend == "auto":
        return
    layer = (current.layers or attention_layers(model.config.get_text_config()))[0]
    mixed = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    dtype = mixed or next(model.parameters()).dtype
    preview_layer(model, current, layer, length, training.device, dtype, training=True)


def spreads_weights(training: Any) -> bool:
    """True where no process has the whole model: FSDP, and any stage of DeepSpeed, which takes the model over."""
    return _uses_fsdp(training) or training.deepspeed_plugin is not None


def check_head(training: Any, trained: Sequence[Any]) -> None:
    """Raise ValueError where the head's own weights are trained, but no process holds them in full.

    Args:
        trained: the parameters of the head that are.
    """
    if trained and (_uses_fsdp(training) or _zero_stage(training) == 3):
        raise ValueError(
            "FSDP and ZeRO-3 share out the weights of the output head, which are trained here but run in chunks; set "
            "train_embeddings=False (and train_norms=False for an encoder), or use DDP or ZeRO-2."
        )


_GATHERED = "stage3_gather_16bit_weights_on_model_save"


def _check_fsdp(training: Any) -> None:
    """Raise ValueError for ways of FSDP that have no whole adapter to save, or no whole model to try a pattern on."""
    if not _uses_fsdp(training):
        return
    given = training.fsdp_plugin_args or {}
    version = int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        raise ValueError(
            f"fsdp_version={version} puts what is trained and what is frozen into one tensor; set it to 2."
        )
    kind = str(given.get("state_dict_type", os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")))
    if kind.upper() != "FULL_STATE_DICT":
        raise ValueError(
            f"fsdp_state_dict_type={kind} leaves no process with the whole adapter; set it to FULL_STATE_DICT."
        )
    lazy = given.get("cpu_ram_efficient_loading", os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"))
    if str(lazy).lower() in ("true", "1"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights to try the pattern on; set it "
            "to false."
        )


def _uses_fsdp(training: Any) -> bool:
    return training.fsdp_plugin_args is not None or _is_set("ACCELERATE_USE_FSDP")


def _zero_stage(training: Any) -> int:
    return int(_zero_settings(training).get("stage", 0))


def _zero_settings(training: Any) -> dict[str, Any]:
    plugin = training.deepspeed_plugin
    return {} if plugin is None else dict(plugin.deepspeed_config.get("zero_optimization", {}))


def _parallel_size(training: Any, kind: str) -> int:
    """Return over how many processes a dimension is spread, by the arguments or by what accelerate launch was told."""
    config = training.parallelism_config
    if config is not None:
        return int(getattr(config, f"{kind}_size") or 1)
    if not _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    return int(os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1"))


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


@contextmanager
def loaded_in_full(training: Any) -> Iterator[None]:
    """Let a model be loaded with all its weights inside the block: ZeRO-3 would load a part, which no pattern can be
    tried on; it takes the weights apart when training begins instead.
    """
    plugin = training.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(getattr(training, "hf_deepspeed_config", None) or plugin.dschf)


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Let what FSDP2 has gathered stay gathered inside the block, in which backward passes of the head alone run.

    Each would otherwise let go of weights, those of the last norm, that the step's own backward pass reads as they are.
    """
    if not hasattr(model, "set_reshard_after_backward"):
        yield
        return
    model.set_reshard_after_backward(False)
    model.set_is_last_backward(False)
    try:
        yield
    finally:
        model.set_reshard_after_backward(True)
        model.set_is_last_backward(True)
