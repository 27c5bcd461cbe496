"""Which heads need the distance? Calibration on one half of the texts, measured on the other, and all that it beats.

    python recipes/calibrate_heads.py [--model recipes/tiny_base] [--output docs/calibration]

Calibrated on validation files of the embedded text, measured on test files, nothing trained:

- choice: the calibrated patterns at two densities, against the same window everywhere, every other pattern at equal
  density, evenly spaced dense layers and random choices, with paired 95 % intervals;
- scores: every score against exact ablation: rank correlation, forward passes, and what its choice closes; the exact
  greedy search included;
- stages: what taking the default score anew is worth, with several windows to choose from;
- agreement: the choices on two disjoint halves of the calibration files;
- copy: copying over a distance, dense and calibrated;
- serving: bytes of the cache and time per decoded token, predicted and measured (run this part on a quiet machine).

Every figure is kept in --work as it comes, and the same command goes on where it was stopped. OUTPUT gets NAME.json
with every figure, NAME.md with the tables, and the pictures.
"""

import argparse
from pathlib import Path

import torch
from calibrate_heads_report import save_report
from calibrate_heads_study import LENGTH, PARTS, Study
from transformers import logging

from hf_sparse.evaluate.machine import describe_machine
from hf_sparse.evaluate.output_folder import check_output_folder

ROOT = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "tiny_base"), help="default recipes/tiny_base")
    parser.add_argument("--output", type=Path, default=ROOT.parent / "docs" / "calibration")
    parser.add_argument(
        "--work", type=Path, help="where figures are kept as they come (default OUTPUT/work-NAME)"
    )
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--documents", type=int, default=32, help="test documents at most")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    check_output_folder("--output", args.output)
    name = Path(args.model).name
    args.work = args.work or args.output / f"work-{name}"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(args.model, args.work, args.samples, args.documents)
    parts = {part: study.part(part) for part in args.parts}
    if set(PARTS) - set(parts):
        print(f"kept in {args.work}; run without --parts for the report")
        return
    record = {
        "model": name,
        "command": f"python recipes/calibrate_heads.py --model recipes/{name}",
        "samples": args.samples,
        "length": LENGTH,
        "machine": describe_machine(torch.device("cpu")),
        **parts,
    }
    for path in save_report(record, args.output):
        print(path)


if __name__ == "__main__":
    main()
