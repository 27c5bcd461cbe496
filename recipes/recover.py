"""How much of what a pattern costs does a short LoRA training give back? Every main pattern, three seeds.

    python recipes/recover.py [--work runs/recover] [--output recipes/results] [--parts recovery trials copy]

- recovery: every recipe and the dense control (the same data, steps, seeds and LoRA under dense attention) with three
  seeds; gap closed = 1 - (sparse trained - control) / (sparse untrained - dense), in nats per token of held-out test
  documents of 2,048 tokens, each with its paired 95 % interval over documents; what is left by position;
- copy: copying random tokens over a distance, dense, sparse untrained and trained;
- trials: what was tried on the way to the recipes' defaults, one seed each, scored on validation files.

Each training is `accelerate launch recipes/finetune_lora.py --config recipes/NAME.yaml --seed S --output_dir ...`. All
that is trained and measured stays in --work, and the same command goes on where it was stopped. OUTPUT gets
recovery.json with every figure, recovery.md with the tables, recovery_log.jsonl with the losses of every training, and
recovery.png.
"""

import argparse
from datetime import date
from pathlib import Path

import torch
from recover_report import save_report
from recover_study import PARTS, Study
from transformers import logging

from hf_sparse.evaluate.machine import describe_machine
from hf_sparse.evaluate.output_folder import check_output_folder

ROOT = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/recover"), help="default runs/recover")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="default recipes/results")
    parser.add_argument("--documents", type=int, default=32, help="test documents")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    check_output_folder("--output", args.output)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(args.work, args.documents)
    parts = {part: study.part(part) for part in args.parts}
    if set(PARTS) - set(parts):
        print(f"kept in {args.work}; run without --parts for the report")
        return
    record = {
        "command": "python recipes/recover.py",
        "date": date.today().isoformat(),
        "machine": describe_machine(torch.device("cpu")),
        **parts,
    }
    for path in save_report(record, study.logs(), args.output):
        print(path)


if __name__ == "__main__":
    main()
