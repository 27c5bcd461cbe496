"""The adaptation: load, patch, add LoRA, cut the text into samples, train, save an adapter that knows its pattern."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..evaluate.output_folder import check_output_folder, write_atomically
from ..hf import save_adapter, settings
from .card import model_card, write_card
from .checkpoints import checkpoint_to_resume
from .config import AdaptationArguments
from .course import check_steps, trained_with
from .data import MaskEpochs
from .datasets import make_datasets
from .engine import check_backend_trains, check_engine, check_head, loaded_in_full, spreads_weights
from .evaluation import check_best, held_out, score_while_training
from .export import check_push, push
from .lora import add_lora
from .model import load_patched
from .objective import Objective
from .report import check_report_to
from .schedule import Narrowing
from .student import StudentAttention
from .trainer import Adaptation, SparseTrainer

ADAPTER, LOG = "adapter", "log.json"  # the final adapter in output_dir, and all that was logged on the way


def prepare(arguments: AdaptationArguments, training: TrainingArguments) -> SparseTrainer:
    """Return a Trainer, ready to run, for the patched model with LoRA on the text's samples.

    With ``max_steps`` set, only as many documents are tokenised as give four times the samples those steps see.

    Raises:
        ValueError: anything that cannot work: an unreadable model or text, a pattern that does not fit the model, a
            length beyond its positions, no document long enough, settings that contradict a checkpoint to resume.
    """
    training = copy.copy(training)  # what is changed below may be used again
    check_output_folder("output_dir", str(training.output_dir))
    check_engine(training)
    check_report_to(training)
    if training.push_to_hub:
        check_push(training, arguments.model)
    documents, unreadable = arguments.read_texts()
    shared = trained_with(arguments, training, documents)
    checkpoint = checkpoint_to_resume(
        training.resume_from_checkpoint,
        str(training.output_dir),
        shared,
        trust_engine_state=getattr(training, "trust_engine_state", False),
    )
    unseen = held_out(arguments, training)
    check_best(training, scored=bool(unseen) and not spreads_weights(training))
    with loaded_in_full(training):
        model, tokenizer = load_patched(arguments, arguments.length)
    check_backend_trains(training, model, arguments.length)
    if training.gradient_checkpointing:
        model.enable_input_require_grads()  # the embeddings are frozen, yet the checkpointed blocks need a gradient
    samples, evaluated = make_datasets(arguments, training, model, tokenizer, documents, unseen)
    check_steps(training, len(samples))
    pushes, training.push_to_hub = training.push_to_hub, False  # the Trainer would push checkpoints
    sparse = settings(model)
    assert sparse is not None, "just patched"
    widest = None if arguments.dense_control else arguments.narrow_from
    narrowing = Narrowing.of(model, sparse, widest, arguments.narrow_share, arguments.length)
    torch.manual_seed(training.seed)  # LoRA's first matrices are random: the dense control gets the same
    adapted = add_lora(model, arguments)
    student = StudentAttention(adapted)
    objective = Objective(adapted, arguments, student)
    check_head(training, objective.head.trained())
    kept, training.save_total_limit = training.save_total_limit, None  # see CheckpointTrainer
    training.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
    trainer = SparseTrainer(
        objective=objective,
        student=student,
        narrowing=narrowing,
        model=adapted,
        args=training,
        train_dataset=samples,
        eval_dataset=evaluated,
        data_collator=samples.collate,
        processing_class=tokenizer,
        trained_with=shared,
        sparse_settings=sparse,
        limit=kept,
        callbacks=[MaskEpochs()] if samples.masking else None,
    )
    left_out = (*unreadable, *samples.skipped)
    scores = score_while_training(trainer, unseen, arguments)
    trainer.adaptation = Adaptation(arguments, samples, left_out, scores, pushes)
    return trainer


def run(trainer: SparseTrainer) -> Path:
    """Train, from the checkpoint `prepare` found if any, and return the folder of the finished adapter.

    The adapter's folder appears whole or not at all; its card follows. OUTPUT_DIR/log.json has what was logged. With
    ``push_to_hub`` the folder, and nothing else, is uploaded at the end.
    """
    output = Path(str(trainer.args.output_dir))
    folder = output / ADAPTER
    if trainer.is_world_process_zero():
        for left in output.glob(f".{ADAPTER}.*"):  # by a run that was killed
            shutil.rmtree(left)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    done = trainer.adaptation
    assert done is not None, "made by prepare"
    figures, scored = None, 0
    if done.scores is not None:
        figures, scored = done.scores.figures(without_adapter=True), len(done.scores.documents)
    model = trainer.accelerator.unwrap_model(trainer.model)
    spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    # collected from all processes
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if spread else None
    if trainer.is_world_process_zero():
        save_adapter(model, folder, state_dict=weights)
        steps = trainer.state.global_step
        card = model_card(
            model, done.arguments, trainer.args, done.samples, steps=steps, figures=figures, scored=scored
        )
        write_card(folder, card)
        log = json.dumps(trainer.state.log_history, indent=1) + "\n"
        write_atomically(output / LOG, log.encode())
        if done.pushes:
            push(folder, trainer.args)
    trainer.accelerator.wait_for_everyone()
    return folder
