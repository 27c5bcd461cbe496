"""What the tests of checkpoints share: a run that is stopped, and what it left."""

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import hf_sparse
from hf_sparse.hf import settings
from hf_sparse.train import SparseTrainingArguments
from hf_sparse.train.checkpoints import CheckpointTrainer

STEPS = 9  # three epochs of ten samples: two steps of two batches, then one of the batch that is left


class Killed(BaseException):
    """What a callback raises in place of a SIGKILL."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def samples(count, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(64, (count, 24), generator=draw)
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(place, folder="run", *, limit=None, kill_at=None, optimizer_cls_and_kwargs=None, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    hf_sparse.patch_model(model, hf_sparse.SlidingWindow(8))
    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "seed": 1,
        **changes,
    }
    made = CheckpointTrainer(
        model=get_peft_model(model, lora),
        args=SparseTrainingArguments(output_dir=str(place / folder), **options),
        train_dataset=samples(10, seed=1),
        eval_dataset=samples(4, seed=2),
        callbacks=[] if kill_at is None else [KillAt(kill_at)],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        trained_with={"length": 24},
        sparse_settings=settings(model),
        limit=limit,
    )
    made.tmp = place
    return made


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(folder):
    return sorted(path.name for path in folder.iterdir())
