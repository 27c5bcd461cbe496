"""The adaptation: load, patch, add LoRA, cut the text into samples, train, save an adapter that knows its pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..documents import read_documents, refuse_empty, standard_library
from ..evaluate.output_folder import check_output_folder
from ..evaluate.tokens import check_vocabulary
from ..hf import patch_model, save_adapter
from ..hf.describe import is_causal
from ..hf.loading import load_base, load_tokenizer, read_config
from ..hf.sources import check_source, is_adapter
from .checkpoints import CheckpointKeeper, checkpoint_to_resume
from .config import AdaptationArguments
from .data import collate, make_samples
from .lora import add_lora

ADAPTER = "adapter"  # folder of the final adapter in output_dir
POOL = 4  # samples drawn for each one that will be seen: training draws from more documents than it needs


def prepare(arguments: AdaptationArguments, training: TrainingArguments) -> Trainer:
    """Return a Trainer, ready to run, for the patched model with LoRA on the text's samples.

    With ``max_steps`` set, only as many documents are tokenised as give four times the samples those steps see.

    Raises:
        ValueError: anything that cannot work: an unreadable model or text, a pattern that does not fit the model, a
            length beyond its positions, no document long enough, settings that contradict a checkpoint to resume.
    """
    check_output_folder("output_dir", str(training.output_dir))
    trained_with = {**arguments.as_json(), **_sample_order(training)}
    checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, str(training.output_dir), trained_with)
    documents = read_documents(arguments.text) if arguments.text else standard_library("train")
    refuse_empty(documents)
    model, tokenizer = _load_base(arguments)
    patch_model(
        model,
        arguments.chosen_pattern(),
        backend=arguments.backend,
        layers=arguments.layers,
        seq_len=arguments.length,
    )
    model.config.use_cache = False
    if training.gradient_checkpointing:
        model.enable_input_require_grads()  # the embeddings are frozen, yet the checkpointed blocks need a gradient
    samples = make_samples(
        tokenizer,
        documents,
        arguments.length,
        seed=training.seed,
        limit=_samples_wanted(training),
    )
    check_vocabulary(_largest(samples), model)
    torch.manual_seed(training.seed)  # LoRA's first matrices are random: the dense control gets the same
    adapted = add_lora(model, arguments)
    keeper = CheckpointKeeper(trained_with, training.save_total_limit)
    training.save_total_limit = None  # the keeper's task, see there
    training.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
    return Trainer(
        model=adapted,
        args=training,
        train_dataset=samples,
        data_collator=collate,
        callbacks=[keeper],
    )


def run(trainer: Trainer) -> Path:
    """Train, from the checkpoint `prepare` found if any, and return the folder of the finished adapter.

    The adapter's folder appears whole or not at all.
    """
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    folder = Path(str(trainer.args.output_dir)) / ADAPTER
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        save_adapter(model, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def _load_base(arguments: AdaptationArguments) -> tuple[Any, Any]:
    """Return the base model, on the CPU and in the dtype asked for (the Trainer moves it), and its tokenizer."""
    name = arguments.model
    if is_adapter(name):
        raise ValueError(f"model={name} is an adapter; name the model it was trained on.")
    check_source(name)
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # the adapter remembers it, and must find it from any folder
    read_config(name, {})  # where it is broken, the tokenizer would be blamed
    tokenizer = load_tokenizer(name)
    model = load_base(name, dtype=getattr(torch, arguments.dtype))
    if not is_causal(model):
        raise ValueError(
            f"model={arguments.model} is an encoder: {type(model).__name__} lets a token see the ones it is trained "
            "to predict; give a causal language model."
        )
    trained = getattr(model.config, "max_position_embeddings", None)
    if trained and arguments.length > trained:
        raise ValueError(
            f"length={arguments.length} is beyond the {trained} positions of {type(model).__name__}; "
            f"use length={trained} or less."
        )
    return model, tokenizer


def _samples_wanted(training: TrainingArguments) -> int | None:
    if training.max_steps <= 0:
        return None
    return POOL * training.max_steps * _samples_per_step(training)


def _samples_per_step(training: TrainingArguments) -> int:
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def _sample_order(training: TrainingArguments) -> dict[str, Any]:
    """Return what decides which samples a step sees: a run that goes on with others is another run."""
    return {
        "seed": training.seed,
        "data_seed": training.data_seed,
        "batch size * gradient_accumulation_steps * processes": _samples_per_step(training),
    }


def _largest(samples: Any) -> int:
    """Return the largest token id in the samples."""
    return max(int(batch["input_ids"].max()) for batch in samples.with_format("numpy").iter(1000))
