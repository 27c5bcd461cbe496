"""Adapt a pretrained model to a sparse attention pattern with LoRA.

    accelerate launch recipes/finetune_lora.py --config recipes/sliding_window.yaml
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/finetune_lora.py \\
        --config recipes/longformer.yaml --model meta-llama/Llama-3.2-1B --text book1.txt book2.txt

Settings come from the YAML file, then from ``--key value`` on the command line, which wins. They are the fields of
hf_sparse.train.AdaptationArguments and of transformers.TrainingArguments; ``--help`` lists them all.

What happens: the base model is loaded and patched with the pattern; LoRA goes to its attention, and its normalisation
layers train along; the text is cut into samples of one length, each from one document; transformers' Trainer trains.
Every checkpoint and the final adapter in OUTPUT_DIR/adapter carry the pattern in ``sparse_attention.json``, so that
``hf-sparse eval OUTPUT_DIR/adapter`` and ``hf_sparse.load`` restore it. With ``--resume_from_checkpoint auto`` a run
that was stopped goes on from its last whole checkpoint.

A mistake in the settings ends with one sentence and exit status 2, before anything is trained or written.
"""

import sys

from transformers import set_seed

import hf_sparse
from hf_sparse.train import AdaptationArguments, ConfigParser, SparseTrainingArguments, prepare, run


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
        report_start(trainer, arguments)
    folder = run(trainer)
    if trainer.is_world_process_zero():
        plugins = "".join(f" --plugin {file}" for file in arguments.plugin or ())
        print(f"adapter   {folder}\nevaluate  hf-sparse eval {folder}{plugins}")
    return 0


def report_start(trainer, arguments: AdaptationArguments) -> None:
    """Say what is about to be trained, and where the pattern runs."""
    base = trainer.model.get_base_model()
    trained, total = trainer.model.get_nb_trainable_parameters()
    print(hf_sparse.describe(base, seq_len=arguments.length))
    print(f"trained   {trained:,} of {total:,} parameters ({trained / total:.1%})")
    print(f"samples   {len(trainer.train_dataset):,} of {arguments.length:,} tokens each")
    if trainer.args.resume_from_checkpoint:
        print(f"resuming  {trainer.args.resume_from_checkpoint}")


if __name__ == "__main__":
    sys.exit(main())
