"""The model card of an adapter, and of the model it was merged into: what was trained, how, and how to load it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..hf import SparseSettings, attention_name, describe, settings, settings_to_json
from ..hf.atomic_file import write_atomically
from ..hf.describe import is_causal
from ..hf.extension import extension_of
from .config import AdaptationArguments
from .config.objective import ObjectiveArguments
from .config.schedule import ScheduleArguments
from .config.trainables import TrainableArguments
from .data import Samples
from .figures import nats_per_token, perplexity_section, results
from .provenance import eval_texts_of, hub_id, license_of, listed, shown, texts_of, versions

CARD = "README.md"
MARKER = "<!-- Written by hf_sparse, which replaces this file as long as this line is in it. -->"
TRAINING, LOADING = "## Training", "## How to load"


def model_card(
    model: Any,
    arguments: AdaptationArguments,
    training: TrainingArguments,
    samples: Samples,
    *,
    steps: int,
    figures: Mapping[str, float] | None = None,
    scored: int = 0,
) -> ModelCard:
    """Return the card of a trained adapter. The same training gives the same text, without a path of the machine.

    Args:
        model: the patched `PeftModel`.
        samples: that it was trained on, for so many `steps`.
        figures: of held-out texts, as `PerplexityCallback` logs them, such as ``eval_base_dense_nats_per_token``; none
            where nothing was measured.
        scored: how many texts they are of.
    """
    sparse = settings(model)
    assert sparse is not None, "the adapter of a model without a pattern has no card"
    base, found = model.get_base_model(), nats_per_token(figures or {})
    title = f"{Path(shown(arguments.model)).name} under {_name(sparse)}"
    task = _task(base)
    what = "trained under a sparse attention pattern of hf_sparse and to be run under it"
    if arguments.dense_control:
        what = "trained with dense attention as the control of one that was trained with hf_sparse under a pattern"
    data = ModelCardData(
        base_model=hub_id(arguments.model),
        base_model_relation=None if hub_id(arguments.model) is None else "adapter",
        library_name="peft",
        pipeline_tag=task,
        tags=_tags(sparse, "lora"),
        datasets=hub_id(arguments.dataset or ""),
        model_name=title if found else None,
        eval_results=results(found, task, eval_texts_of(arguments, scored)) if found else None,
        **license_of(arguments.model),
    )
    body = [
        f"# {title}",
        f"A LoRA adapter for {shown(arguments.model)}, {what}.",
        *_model_section(base, sparse, arguments.model, arguments.length),
        *_training_section(model, arguments, training, samples, steps),
        *perplexity_section(found, arguments, eval_texts_of(arguments, scored)),
        LOADING,
        _code(
            'model = hf_sparse.load("FOLDER")  # a folder with these files; its base, patched, with the adapter on'
        ),
        *_with_peft(base),
        "`hf-sparse merge FOLDER --output DIR` writes a model with the adapter in its weights.",
        "## Limits",
        "Trained sparse and to be run sparse: dense attention with this adapter is another model, which was not "
        "trained. What holds for the base model, its licence and its biases, holds here too.",
    ]
    return _card(data, body)


def merged_card(model: Any, sparse: SparseSettings, adapter: str, base: str) -> ModelCard:
    """Return the card of a model that an adapter was merged into, with what the adapter's own card says of itself.

    Args:
        adapter: its folder; `base`: the folder or hub id of what it was trained on.
    """
    before = _own_card(Path(adapter) / CARD)
    known = before.data.to_dict() if before else {}
    name, implementation = f"{Path(base).name} under {_name(sparse)}", attention_name(sparse.pattern)
    data = ModelCardData(
        base_model=hub_id(base),
        base_model_relation=None if hub_id(base) is None else "finetune",
        library_name="transformers",
        pipeline_tag=_task(model),
        tags=_tags(sparse),
        datasets=known.get("datasets"),
        **license_of(base),
    )
    told = [] if before is None else [_training_told(before.text)]
    body = [
        f"# {name}",
        f"{shown(base)} with the weights of an adapter merged in, which was trained under a sparse attention pattern "
        "of hf_sparse. It is to be run under it.",
        *_model_section(model, sparse, base, None),
        *told,
        LOADING,
        _code('model = hf_sparse.load("FOLDER")  # a folder with these files'),
        *([] if sparse.learned_sinks else _with_transformers(model, implementation)),
        "## Limits",
        "Without `attn_implementation`, from_pretrained gives these weights dense attention: another model than the "
        f"one that was trained, with other figures. `import hf_sparse` makes {implementation} known to transformers.",
    ]
    return _card(data, body)


def write_card(folder: str | os.PathLike[str], card: ModelCard) -> bool:
    """Let README.md be the card, whole or not at all; return False, and leave it, where a person wrote it."""
    path = Path(folder) / CARD
    if path.exists() and _own_card(path) is None:
        return False
    write_atomically(path, card.content.encode())
    return True


def _own_card(path: Path) -> ModelCard | None:
    """Return the card that was written here before, None where there is none or another's."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return ModelCard(text, ignore_metadata_errors=True) if MARKER in text else None


def _card(data: ModelCardData, body: Iterable[str]) -> ModelCard:
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARKER}\n\n" + "\n\n".join(body) + "\n")


def _model_section(base: Any, sparse: SparseSettings, name: str, length: int | None) -> list[str]:
    revision = getattr(base.config, "_commit_hash", None)
    return [
        "## Model",
        f"- base model: {shown(name)}"
        + (f", revision {revision}" if revision else "")
        + f"\n- pattern: `{json.dumps(settings_to_json(sparse))}`",
        f"```\n{describe(base, seq_len=length)}\n```",
    ]


def _training_section(
    model: Any,
    arguments: AdaptationArguments,
    training: TrainingArguments,
    samples: Samples,
    steps: int,
) -> list[str]:
    config = model.peft_config[model.active_adapter]
    trained, total = model.get_nb_trainable_parameters()
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    precision = next((name for name in ("bf16", "fp16") if getattr(training, name)), None)
    lines = {
        "texts": texts_of(arguments),
        "samples": f"{len(samples):,} of up to {arguments.length:,} tokens, {samples.tokens:,} tokens in all, short "
        f"pieces: {arguments.short}; sha256 `{_fingerprint(samples)}`",
        "seen": f"{steps:,} steps of {batch:,} samples, {steps * batch / len(samples):.3g} times all of them",
        "trained": f"{trained:,} of {total:,} parameters",
        "LoRA on": listed(sorted(config.target_modules)),
        "in full": listed(sorted(config.modules_to_save or ())) or "nothing",
        "trainables": _fields(arguments, TrainableArguments),
        "objective": _fields(arguments, ObjectiveArguments),
        "schedule": _fields(arguments, ScheduleArguments),
        "optimizer": f"{_word(training.optim)}, learning rate {training.learning_rate:g}, "
        f"{_word(training.lr_scheduler_type)}, {training.get_warmup_steps(steps):,} warm-up steps, weight decay "
        f"{training.weight_decay:g}, gradient norm at most {training.max_grad_norm:g}",
        "precision": f"weights {arguments.dtype}" + (f", {precision} autocast" if precision else ""),
        "seed": str(training.seed),
        "versions": versions(),
    }
    return [TRAINING, "\n".join(f"- {name}: {text}" for name, text in lines.items())]


def _fingerprint(samples: Samples) -> str:
    """Return the SHA-256 of all tokens and where samples begin, as hex."""
    digest = hashlib.sha256()
    for array in (samples.ids, samples.piece_starts, samples.row_starts):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _name(sparse: SparseSettings) -> str:
    return sparse.pattern.name or "a composed pattern"


def _tags(sparse: SparseSettings, *more: str) -> list[str]:
    return ["hf_sparse", "sparse-attention", attention_name(sparse.pattern), *more]


def _with_transformers(model: Any, implementation: str) -> list[str]:
    return [
        "or, which gives the same,",
        _code(
            f'model = {_auto_class(model)}.from_pretrained("FOLDER", attn_implementation="{implementation}")',
            f"from transformers import {_auto_class(model)}\n",
        ),
    ]


def _with_peft(base: Any) -> list[str]:
    if extension_of(base) is not None:
        return [
            "The base is also made to read more tokens than it was trained for, which peft alone does not know."
        ]
    auto_class = _auto_class(base)
    return [
        "With peft alone, the pattern is in `sparse_attention.json` and has to be put in before the adapter:",
        _code(
            f'base = {auto_class}.from_pretrained("BASE")\n'
            'hf_sparse.patch_model(base, "FOLDER/sparse_attention.json")\n'
            'model = PeftModel.from_pretrained(base, "FOLDER")',
            f"from peft import PeftModel\nfrom transformers import {auto_class}\n",
        ),
    ]


def _task(base: Any) -> str | None:
    name = type(base).__name__
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "fill-mask"
    return "text-generation" if is_causal(base) and base.get_output_embeddings() is not None else None


def _auto_class(model: Any) -> str:
    tasks = {"fill-mask": "AutoModelForMaskedLM", "text-generation": "AutoModelForCausalLM"}
    return tasks.get(_task(model) or "", type(model).__name__)


def _fields(arguments: AdaptationArguments, section: type) -> str:
    names = [field.name for field in dataclasses.fields(section)]
    return ", ".join(f"{name}={getattr(arguments, name)}" for name in names)


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _code(lines: str, imports: str = "") -> str:
    return f"```python\n{imports}import hf_sparse\n\n{lines}\n```"


def _training_told(text: str) -> str:
    """Return what an adapter's card says of its training and what was measured."""
    return TRAINING + text.partition(TRAINING)[2].partition(LOADING)[0].rstrip()
