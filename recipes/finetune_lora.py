"""Adapt a pretrained model to a sparse attention pattern with LoRA.

    accelerate launch recipes/finetune_lora.py --config recipes/sliding_window.yaml
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/finetune_lora.py \\
        --config recipes/longformer.yaml --model meta-llama/Llama-3.2-1B --text book1.txt book2.txt

Settings come from the YAML file, then from ``--key value`` on the command line, which wins. They are the fields of
hf_sparse.train.AdaptationArguments and of transformers.TrainingArguments; ``--help`` lists them all.

What happens: the base model is loaded and patched with the pattern; LoRA goes to its attention, and its normalisation
layers train along; the texts are cut into samples, none of which crosses from one document into another; every step the
model reads its batch twice, dense and without the adapter as the teacher, then sparse, and the adapter is moved so that
both predict the same. Every checkpoint and the final adapter in OUTPUT_DIR/adapter carry the pattern in
``sparse_attention.json``, so that ``hf-sparse eval OUTPUT_DIR/adapter`` and ``hf_sparse.load`` restore it. With
``--resume_from_checkpoint auto`` a run that was stopped goes on from its last whole checkpoint.

A mistake in the settings ends with one sentence and exit status 2, before anything is trained or written.
"""

import sys

from transformers import set_seed

from hf_sparse.train import AdaptationArguments, ConfigParser, SparseTrainingArguments, prepare, run
from hf_sparse.train.report import end_report, start_report


def main(argv: list[str] | None = None) -> int:
    parser = ConfigParser((AdaptationArguments, SparseTrainingArguments), description=__doc__)
    try:
        arguments, training = parser.parse(sys.argv[1:] if argv is None else argv)
        set_seed(training.seed)
        trainer = prepare(arguments, training)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    if trainer.is_world_process_zero():
        print(start_report(trainer, arguments), flush=True)
    folder = run(trainer)
    if trainer.is_world_process_zero():
        print(end_report(folder, arguments.plugin))
    return 0


if __name__ == "__main__":
    sys.exit(main())
