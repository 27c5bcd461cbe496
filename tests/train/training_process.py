"""One of the processes of a training, started by accelerate: runs every case it is given, in order.

    python training_process.py CASES.json

A case is {"arguments": {...}, "training": {...}}. Each process leaves what it saw of it in ``process-RANK.json`` of its
output_dir: the targets of every row that its objective was given, and what was logged.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType, PartialState

from hf_sparse.train import AdaptationArguments, SparseTrainingArguments, prepare, run


def allow_fsdp_on_the_cpu():
    """Accelerate runs FSDP on accelerators only, and would take DDP without a word."""
    make = AcceleratorState.__init__

    def made(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if (plugin := kwargs.get("fsdp_plugin")) is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = made


def allow_deepspeed_on_the_cpu():
    """The same of DeepSpeed."""
    make = PartialState.__init__

    def made(self, cpu=False, **kwargs):
        make(self, cpu=False, **kwargs)

    PartialState.__init__ = made
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)


def watched(trainer):
    """Return the list to which every call of the trainer's objective adds the targets of its rows."""
    seen, objective = [], trainer.objective

    def call(model, batch, count=None):
        if model.training:
            seen.append([row[row.ne(-100)].tolist() for row in batch["labels"]])
        return objective(model, batch, count)

    trainer.objective = call
    return seen


def run_case(case):
    training = SparseTrainingArguments(**case["training"])
    trainer = prepare(AdaptationArguments(**case["arguments"]), training)
    seen = watched(trainer)
    run(trainer)
    found = {"rows": seen, "log": trainer.state.log_history, "world": training.world_size}
    engine = (
        "deepspeed" if trainer.is_deepspeed_enabled else "fsdp2" if trainer.accelerator.is_fsdp2 else None
    )
    file = Path(training.output_dir) / f"process-{training.process_index}.json"
    file.write_text(json.dumps({**found, "engine": engine}))


if __name__ == "__main__":
    allow_fsdp_on_the_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        allow_deepspeed_on_the_cpu()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case)
